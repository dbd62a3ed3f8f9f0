"""A `.pt2` whose guards, which torch executes as Python, do more than guard."""

from pathlib import Path

import torch
from craft import edit_model, main, source

EXIT, FINDS = 5, "guards_code"


def make(path: Path, canary: Path) -> None:
    def guard(document: dict) -> None:
        document["guards_code"] = [f"({source(canary)} or True)"]

    edit_model(path, guard)


def naive(path: Path, canary: Path) -> None:
    torch.export.load(path).module()(torch.ones(2, 4))


if __name__ == "__main__":
    main(make)
