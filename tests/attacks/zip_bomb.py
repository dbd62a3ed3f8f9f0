"""A checkpoint of some kilobytes that unpacks to sixty-four megabytes."""

import zipfile
from pathlib import Path

from craft import main

EXIT, FINDS = 5, "zip bomb"
UNPACKED = 1 << 26


def make(path: Path, canary: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/version", b"3")
        file.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        with file.open("archive/data/0", "w") as entry:
            for _ in range(UNPACKED >> 20):
                entry.write(bytes(1 << 20))


def naive(path: Path, canary: Path) -> None:
    read = 0
    with zipfile.ZipFile(path) as file, file.open("archive/data/0") as entry:
        while block := entry.read(1 << 20):
            read += len(block)
    if read > 100 * path.stat().st_size:
        canary.touch()


if __name__ == "__main__":
    main(make)
