"""Values of one artifact as files: what `--dump` writes, and what keeps blame from holding a whole network in memory.

Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from edgegen.errors import EdgegenError
from edgegen.lower.backend import Array

INDEX = "index.json"
_MAPPED_FROM = 1 << 16
"""Bytes from which a value is mapped into memory in place of being read."""


class Values(Mapping[str, Array]):
    """Arrays in one folder by name, in the order in which they were put there: `00000.npy` and so on, and an index.

    EdgegenError when the folder cannot be written. Names never become paths: they come from files that others made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ops: dict[str, str] = {}
        self._files: dict[str, str] = {}
        self._facts: dict[str, dict[str, object]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EdgegenError(f"`{folder}` cannot be written: {error.strerror}") from error

    def put(self, name: str, op: str, value: Array) -> None:
        """Write one value; one that is there already under this name is left as it is."""
        if name in self._files:
            return
        file = f"{len(self._files):05d}.npy"
        try:
            np.save(self.folder / file, value, allow_pickle=False)
        except OSError as error:
            raise EdgegenError(f"`{self.folder / file}` cannot be written: {error.strerror}") from error
        finite = not np.issubdtype(value.dtype, np.floating) or bool(np.isfinite(value).all())
        self.ops[name], self._files[name] = op, file
        self._facts[name] = {"dtype": value.dtype.name, "shape": list(value.shape), "finite": finite, "file": file}

    def __getitem__(self, name: str) -> Array:
        path = self.folder / self._files[name]
        mapped = path.stat().st_size >= _MAPPED_FROM
        found: Array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def write_index(self, about: Mapping[str, object], more: Mapping[str, Mapping[str, object]]) -> Path:
        """`index.json`: `about` and, in order, each value's name, op, type, shape and file, with `more` about it."""
        entries = [
            {"name": name, "op": self.ops[name], **facts, **more.get(name, {})} for name, facts in self._facts.items()
        ]
        path = self.folder / INDEX
        try:
            path.write_text(json.dumps({**about, "values": entries}, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise EdgegenError(f"`{path}` cannot be written: {error.strerror}") from error
        return path


def plain(value: float) -> float | str:
    """A number as JSON has it; infinities and NaN as text."""
    if math.isfinite(value):
        return round(value, 3)
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
