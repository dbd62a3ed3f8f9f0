"""Errors that reach a user. Each class is one exit code; each message names the thing and says why; `hint` can be
typed."""

from __future__ import annotations


class EdgegenError(Exception):
    """Something failed: exit code 1.

    `message` is one sentence without a full stop; `hint` says what to do next, with what can be typed in backticks.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(EdgegenError):
    """The command line or an option is wrong: exit code 2."""

    exit_code = 2


class GateError(EdgegenError):
    """The work was done and a quality gate was not met: exit code 3."""

    exit_code = 3


class DeviceError(EdgegenError):
    """A device could not be reached: exit code 4."""

    exit_code = 4


class UnsafeError(EdgegenError):
    """An input was refused because opening it could run code or escape its folder: exit code 5."""

    exit_code = 5
