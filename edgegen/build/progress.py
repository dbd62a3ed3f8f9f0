"""Where a build talks."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Where a build says what it is doing; `edgegen.cli.console` has the one that people see."""

    def stage(self, name: str, total: int) -> None: ...

    def advance(self) -> None: ...

    def note(self, text: str) -> None: ...
