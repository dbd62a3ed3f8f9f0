"""A bomb without compression: many entries that share the same bytes (Fifield 2019)."""

import io
import struct
import zipfile
from pathlib import Path

from craft import main

EXIT, FINDS = 5, "zip bomb"
COPIES = 200


def make(path: Path, canary: Path) -> None:
    """One stored entry of a mebibyte, which the directory lists two hundred times."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data/000", bytes(1 << 20))
        file.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        first = 46 + len(file.infolist()[0].filename)
    data = buffer.getvalue()
    start = struct.unpack("<L", data[-6:-2])[0]
    entry, rest = data[start : start + first], data[start + first : -22]
    directory = b"".join(entry.replace(b"data/000", b"data/%03d" % index) for index in range(COPIES)) + rest
    count = COPIES + 1
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(directory), start, 0)
    path.write_bytes(data[:start] + directory + end)


def naive(path: Path, canary: Path) -> None:
    with zipfile.ZipFile(path) as file:
        if sum(info.file_size for info in file.infolist()) > 100 * path.stat().st_size:
            canary.touch()


if __name__ == "__main__":
    main(make)
