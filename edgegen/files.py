"""Files that ship with edgegen, and text that a user's path names. Imports no torch."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from edgegen.errors import UsageError


def shipped(folder: str, marker: str, what: str) -> Path:
    """`folder` of the checkout, or its copy in the installed package: the one that holds `marker`. UsageError that
    `what` is missing when neither does."""
    package = Path(__file__).parent
    for found in (package / "_data" / folder, package.parent / folder):
        if (found / marker).exists():
            return found
    raise UsageError(f"{what} that ship with edgegen are missing", hint="pip install --force-reinstall edgegen")


def read_text(path: Path, limit: int) -> str:
    """The UTF-8 text at `path`; UsageError for what is no regular file, of more than `limit` bytes, or no text.

    Never waits: a FIFO without a writer would make a plain open do so for ever.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise UsageError(f"{path}: is not a regular file")
            content = stream.read(limit + 1)
        if len(content) > limit:
            raise UsageError(f"{path}: is larger than {limit} bytes")
        return content.decode()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    except ValueError as error:  # a NUL in the path
        raise UsageError(f"{path}: {error}") from error
