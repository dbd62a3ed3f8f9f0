"""Where the seconds of a build go: spans of wall time, as `reports/times.json` of the bundle has them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import BaseModel, ConfigDict


class Span(BaseModel):
    """One piece of work: seconds from the start of the clock, and how long it took. Spans nest and overlap."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    start: float
    seconds: float


class Clock:
    """Started when it is made; any thread may measure on it."""

    def __init__(self) -> None:
        self._zero = time.perf_counter()
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Note how long the block takes, also when it raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            ended = time.perf_counter()
            made = Span(name=name, start=round(started - self._zero, 2), seconds=round(ended - started, 2))
            with self._lock:
                self._spans.append(made)

    def spans(self) -> tuple[Span, ...]:
        """Everything noted so far, by its start."""
        with self._lock:
            return tuple(sorted(self._spans, key=lambda one: (one.start, -one.seconds)))
