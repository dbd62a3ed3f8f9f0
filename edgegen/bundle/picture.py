"""Writing a picture: a PNG, whole or not at all, and never over something that is no PNG."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from edgegen.errors import EdgegenError, UsageError
from edgegen.verify.trajectory import Picture

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def check_png_path(path: Path) -> None:
    """UsageError when a PNG must not or cannot be written to `path`; asked before the work starts."""
    hint = "choose another file with `-o name.png`"
    if path.suffix.lower() != ".png":
        raise UsageError(f"`{path}` does not end in .png, and a PNG is what is written", hint=hint)
    try:
        if path.is_dir():
            raise UsageError(f"`{path}` is a folder", hint=hint)
        if path.exists():
            if not path.is_file() or (path.stat().st_size and not _is_png(path)):
                raise UsageError(f"`{path}` exists and is no PNG; it is not overwritten", hint=hint)
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


def _is_png(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(_SIGNATURE)) == _SIGNATURE
