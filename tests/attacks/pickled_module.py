"""A whole `nn.Module` saved with `torch.save(module)`: unpickling imports and runs what its pickle names."""

from pathlib import Path

import torch
from craft import Touch, main
from torch import nn

EXIT, FINDS = 5, "pickle"


def make(path: Path, canary: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module.hook = Touch(canary)
    torch.save(module, path)


def naive(path: Path, canary: Path) -> None:
    torch.load(path, weights_only=False)


if __name__ == "__main__":
    main(make)
