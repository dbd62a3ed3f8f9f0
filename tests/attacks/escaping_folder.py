"""A diffusers folder in which a whole component is a link to a folder outside."""

from pathlib import Path

from craft import copied_folder, main

EXIT, FINDS = 5, "outside the folder"


def make(path: Path, canary: Path) -> None:
    copied_folder(path)
    (path / "text_encoder").rename(path.parent / "elsewhere")
    (path / "text_encoder").symlink_to("../elsewhere")


def naive(path: Path, canary: Path) -> None:
    if (path / "text_encoder/config.json").read_text():
        canary.touch()


if __name__ == "__main__":
    main(make)
