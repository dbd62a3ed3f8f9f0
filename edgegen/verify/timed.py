"""An executable whose calls are timed: verification calls artifacts anyway, and slow ones need not be called again."""

from __future__ import annotations

import time
from collections.abc import Mapping

from edgegen.lower.backend import Array, Executable


class Timed:
    """`calls` has the seconds of every call that succeeded, in order; `load_seconds` is what loading took."""

    def __init__(self, executable: Executable, load_seconds: float) -> None:
        self._executable = executable
        self.load_seconds = load_seconds
        self.calls: list[float] = []

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        started = time.perf_counter()
        made = self._executable(inputs)
        self.calls.append(time.perf_counter() - started)
        return made

    def close(self) -> None:
        self._executable.close()
