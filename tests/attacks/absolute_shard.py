"""A diffusers folder whose shard index names an absolute path."""

import json
from pathlib import Path

from craft import copied_folder, main

EXIT, FINDS = 5, "leads out of its folder"


def make(path: Path, canary: Path) -> None:
    copied_folder(path)
    secret = path.parent / "secret.safetensors"
    secret.write_text("secret")
    index = {"weight_map": {"text_model.x": str(secret.resolve())}}
    (path / "text_encoder/model.safetensors.index.json").write_text(json.dumps(index))


def naive(path: Path, canary: Path) -> None:
    index = json.loads((path / "text_encoder/model.safetensors.index.json").read_text())
    if (path / "text_encoder" / index["weight_map"]["text_model.x"]).read_text() == "secret":
        canary.touch()


if __name__ == "__main__":
    main(make)
