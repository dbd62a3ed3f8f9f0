"""A `.pt2` whose sample inputs are a pickle with code: torch refuses it, then retries without refusing."""

import io
from pathlib import Path

import torch
from craft import Touch, honest_pt2, main, rewrite

EXIT, FINDS = 5, ".exec`"


def make(path: Path, canary: Path) -> None:
    buffer = io.BytesIO()
    torch.save(((torch.ones(2, 4), Touch(canary)), {}), buffer)
    path.write_bytes(rewrite(honest_pt2(), {"data/sample_inputs/model.pt": lambda _: buffer.getvalue()}))


def naive(path: Path, canary: Path) -> None:
    torch.export.load(path)


if __name__ == "__main__":
    main(make)
