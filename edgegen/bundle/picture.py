"""Writing a picture: a PNG, whole or not at all, and never over something that is no picture of its kind."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from edgegen.errors import EdgegenError, UsageError
from edgegen.verify.trajectory import Picture

SIGNATURES = {
    ".png": (0, b"\x89PNG\r\n\x1a\n"),
    ".gif": (0, b"GIF8"),
    ".webp": (8, b"WEBP"),
    ".mp4": (4, b"ftyp"),
}
"""Suffix -> what such a file holds, and from which byte on."""


def check_png_path(path: Path) -> None:
    """UsageError when a PNG must not or cannot be written to `path`; asked before the work starts."""
    check_output_path(path, (".png",))


def check_output_path(path: Path, suffixes: Sequence[str]) -> None:
    """UsageError when `path` has none of `suffixes`, or a file of that kind must not or cannot be written there."""
    hint = f"choose another file with `-o name{suffixes[0]}`"
    suffix = path.suffix.lower()
    kind = suffixes[0][1:].upper()
    if suffix not in suffixes:
        raise UsageError(f"`{path}` does not end in {suffixes[0]}, and a {kind} is what is written", hint=hint)
    try:
        if path.is_dir():
            raise UsageError(f"`{path}` is a folder", hint=hint)
        if path.exists():
            if not path.is_file() or (path.stat().st_size and not _is_kind(path, suffix)):
                raise UsageError(f"`{path}` exists and is no {kind}; it is not overwritten", hint=hint)
        elif not path.parent.is_dir():
            raise UsageError(f"folder `{path.parent}` does not exist", hint=f"mkdir -p '{path.parent}'")
        if not os.access(path.parent, os.W_OK):
            raise EdgegenError(f"`{path.parent}` cannot be written", hint=hint)
    except OSError as error:
        raise EdgegenError(f"`{path}` cannot be written: {error.strerror}", hint=hint) from error


def write_png(path: Path, picture: Picture) -> None:
    """Write uint8 [H, W, 3]; the file appears in one rename. The same picture gives the same bytes."""
    from PIL import Image

    check_png_path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as stream:
            Image.fromarray(picture).save(stream, format="PNG", optimize=False)
        part.replace(path)
    except OSError as error:
        hint = "choose another file with `-o name.png`"
        raise EdgegenError(f"`{path}` cannot be written: {error.strerror or error}", hint=hint) from error
    finally:
        part.unlink(missing_ok=True)


def _is_kind(path: Path, suffix: str) -> bool:
    start, signature = SIGNATURES[suffix]
    with path.open("rb") as stream:
        return stream.read(start + len(signature))[start:] == signature
