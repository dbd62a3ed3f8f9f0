"""An edgegen checkpoint, right in everything but one value of its config."""

from pathlib import Path

import torch
from craft import Touch, main

EXIT, FINDS = 5, ".exec`"


def make(path: Path, canary: Path) -> None:
    config = {"name": Touch(canary)}
    torch.save({"format": "edgegen", "version": 1, "config": config, "tokenizer": None, "state_dicts": {}}, path)


def naive(path: Path, canary: Path) -> None:
    torch.load(path, weights_only=False)


if __name__ == "__main__":
    main(make)
