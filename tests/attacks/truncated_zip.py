"""A checkpoint cut off in the middle, as an interrupted download leaves it."""

import io
from pathlib import Path

import torch
from craft import main

EXIT, FINDS = 1, "truncated"


def make(path: Path, canary: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"format": "edgegen", "weight": torch.ones(1000)}, buffer)
    path.write_bytes(buffer.getvalue()[:3000])


def naive(path: Path, canary: Path) -> None:
    """Without a check it ends in a traceback from inside torch."""
    try:
        torch.load(path, weights_only=True)
    except RuntimeError:
        canary.touch()


if __name__ == "__main__":
    main(make)
