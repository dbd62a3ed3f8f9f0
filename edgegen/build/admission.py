"""Work side by side as far as memory goes: a job waits until what runs already leaves room for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

SHARE = 0.7
"""Of the free memory, this much is given out: estimates are estimates."""


class Admission:
    """`budget` bytes for everything that runs at once; None: nobody knows how much there is, and nothing waits."""

    def __init__(self, budget: int | None) -> None:
        self._budget = budget
        self._taken = 0
        self._running = 0
        self._changed = threading.Condition()

    @contextmanager
    def room_for(self, needed: int) -> Iterator[None]:
        """Hold `needed` bytes of the budget. What is larger than all of it waits until it is alone, and then runs."""
        with self._changed:
            self._changed.wait_for(lambda: self._fits(needed))
            self._taken += needed
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._taken -= needed
                self._running -= 1
                self._changed.notify_all()

    def _fits(self, needed: int) -> bool:
        return self._budget is None or not self._running or self._taken + needed <= self._budget
