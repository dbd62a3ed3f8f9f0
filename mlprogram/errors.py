"""What goes wrong with a package is one exception class, whatever was wrong with it."""

from __future__ import annotations


class ProgramError(Exception):
    """A package that cannot be read, or a program that cannot be executed as its operations are defined.

    `hint` says what to do about it, where there is something to do.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
