"""Progress of benchmarks, as lines on stderr."""

from __future__ import annotations

import sys
import time

EVERY = 30.0
"""Seconds between two lines about one stage."""


class Lines:
    """What stages, plans and healing say. `steps`: how often anything advanced."""

    def __init__(self) -> None:
        self.said, self.steps = 0.0, 0

    def stage(self, name: str, total: int) -> None:
        print(f"  {name}", file=sys.stderr, flush=True)

    def advance(self) -> None:
        self.steps += 1

    def note(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    def status(self, text: str) -> None:
        if time.monotonic() - self.said > EVERY:
            self.said = time.monotonic()
            print(f"    {text}", file=sys.stderr, flush=True)
