"""torch's checkpoint format of before 1.6: several pickles in a row, no zip."""

from pathlib import Path

import torch
from craft import Touch, main

EXIT, FINDS = 5, "bare pickle"


def make(path: Path, canary: Path) -> None:
    torch.save({"weight": torch.ones(2), "extra": Touch(canary)}, path, _use_new_zipfile_serialization=False)


def naive(path: Path, canary: Path) -> None:
    torch.load(path, weights_only=False)


if __name__ == "__main__":
    main(make)
