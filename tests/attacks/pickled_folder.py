"""A diffusers folder with `.bin` weights, which are pickles."""

from pathlib import Path

import torch
from craft import Touch, copied_folder, main

EXIT, FINDS = 5, "pickled weights"


def make(path: Path, canary: Path) -> None:
    copied_folder(path)
    torch.save({"x": Touch(canary)}, path / "text_encoder/pytorch_model.bin")


def naive(path: Path, canary: Path) -> None:
    torch.load(path / "text_encoder/pytorch_model.bin", weights_only=False)


if __name__ == "__main__":
    main(make)
