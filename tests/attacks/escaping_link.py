"""A diffusers folder in which the weights are a link to a file outside."""

from pathlib import Path

from craft import copied_folder, main

EXIT, FINDS = 5, "outside the folder"


def make(path: Path, canary: Path) -> None:
    copied_folder(path)
    (path.parent / "secret.safetensors").write_text("secret")
    (path / "text_encoder/model.safetensors").symlink_to("../../secret.safetensors")


def naive(path: Path, canary: Path) -> None:
    if (path / "text_encoder/model.safetensors").read_text() == "secret":
        canary.touch()


if __name__ == "__main__":
    main(make)
