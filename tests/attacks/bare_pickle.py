"""A plain `pickle.dump`, which calls itself safetensors."""

import pickle
from pathlib import Path

from craft import Touch, main

EXIT, FINDS = 5, ".exec`"
SUFFIX = ".safetensors"


def make(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": Touch(canary)}))


def naive(path: Path, canary: Path) -> None:
    with path.open("rb") as stream:
        pickle.load(stream)


if __name__ == "__main__":
    main(make)
