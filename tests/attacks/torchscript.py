"""A TorchScript archive whose `__setstate__` writes a file while it is being loaded."""

from pathlib import Path

import torch
from craft import main
from torch import Tensor, nn

EXIT, FINDS = 5, "TorchScript"


class Writer(nn.Module):
    target: str

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target

    def forward(self, x: Tensor) -> Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.target, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.target = state[0]
        self.training = state[1]
        torch.save(torch.ones(1), state[0])


def make(path: Path, canary: Path) -> None:
    torch.jit.script(Writer(str(canary))).save(str(path))


def naive(path: Path, canary: Path) -> None:
    torch.jit.load(str(path))


if __name__ == "__main__":
    main(make)
