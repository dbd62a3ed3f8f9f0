"""A picture file as the picture that a student starts from. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgegen.errors import EdgegenError, UsageError

Floats = NDArray[np.float32]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
PIXEL_LIMIT = 1 << 27
"""Pixels of a file that is opened: 134 million, above any camera's."""
RULE = "scaled until it covers the student's size, then cut to it around its middle"


def read_start_picture(path: Path, height: int, width: int) -> tuple[Floats, tuple[str, ...]]:
    """The picture at `path` -> [1, 3, height, width] fp32 in -1..1, and what was done to it where it did not fit.

    It is turned as its EXIF says, laid on white where it is transparent, and fitted by `RULE` (bicubic). Of an animated
    file the first frame is taken. UsageError for a file that is missing or no picture; EdgegenError for one that is
    damaged or larger than `PIXEL_LIMIT`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise UsageError(f"picture `{path}` does not exist or is no file", hint="name a PNG, JPEG or WebP file")
    try:
        with Image.open(path, formats=FORMATS) as opened:
            if opened.width * opened.height > PIXEL_LIMIT:
                raise EdgegenError(
                    f"picture `{path}` has {opened.width} x {opened.height} pixels, more than {PIXEL_LIMIT}",
                    hint="make it smaller first",
                )
            turned = ImageOps.exif_transpose(opened).convert("RGBA")
            size = turned.size
            if size == (width, height):
                fitted = turned
            else:
                fitted = ImageOps.fit(turned, (width, height), method=Image.Resampling.BICUBIC, centering=(0.5, 0.5))
            flat = Image.new("RGBA", fitted.size, (255, 255, 255, 255))
            flat.alpha_composite(fitted)
            pixels = np.asarray(flat.convert("RGB"), dtype=np.float32)
    except EdgegenError:
        raise
    except UnidentifiedImageError as error:
        raise UsageError(f"`{path}` is no picture that can be read", hint="name a PNG, JPEG or WebP file") from error
    except Exception as error:  # the library raises what its decoders raise on damaged bytes
        reason = " ".join(str(error).split())[:200]
        raise EdgegenError(f"picture `{path}` cannot be read: {reason}", hint="save it again as a PNG") from error
    remarks = () if size == (width, height) else (f"`{path}` is {size[0]} x {size[1]}: {RULE}, {width} x {height}",)
    made: Floats = np.ascontiguousarray(pixels.transpose(2, 0, 1))[None] / np.float32(127.5) - np.float32(1.0)
    return made, remarks
