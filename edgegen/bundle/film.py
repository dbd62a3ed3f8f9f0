"""Writing a video: GIF, animated WebP, MP4, or a PNG of some of its frames; whole or not at all."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from edgegen.bundle.picture import check_output_path
from edgegen.errors import EdgegenError, UsageError
from edgegen.verify.trajectory import Frames, strip

SUFFIXES = (".gif", ".webp", ".mp4", ".png")
DEFAULT_RATE = 16.0
"""Frames a second where neither the student nor the user says."""
WEBP_QUALITY = 90
MP4_CRF = 17
"""x264's constant rate factor; at 17 or 18 people no longer see a loss."""


def check_film_path(path: Path) -> None:
    """UsageError when a video must not or cannot be written to `path`; asked before the work starts."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"`{path}` does not end in .gif, .webp, .mp4 or .png, and the student makes a video",
            hint="choose another file with `-o name.gif`",
        )
    check_output_path(path, (path.suffix.lower(),))
    if path.suffix.lower() == ".mp4" and find_spec("av") is None:
        raise UsageError(
            f"`{path}` needs PyAV, which is not installed here", hint="pip install 'edgegen[video]', or write a `.gif`"
        )


def write_film(path: Path, frames: Frames, rate: float, written: Callable[[], None] = lambda: None) -> None:
    """Write uint8 [T, H, W, 3] at `rate` frames a second; `written` is called after each frame.

    A `.png` gets up to six of the frames side by side, the first and the last among them. GIF times frames in
    hundredths of a second and has 256 colours a frame; MP4 is H.264, 4:2:0, and loses the last row or column of an odd
    size. The file appears in one rename.
    """
    check_film_path(path)
    if not 0.1 <= rate <= 100:
        raise UsageError(f"{rate:g} frames a second is not between 0.1 and 100", hint="`--fps 16`")
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    write = {".gif": _gif, ".webp": _webp, ".mp4": _mp4, ".png": _png}[path.suffix.lower()]
    try:
        with part.open("xb") as stream:
            write(stream, frames, rate, written)
        part.replace(path)
    except OSError as error:
        hint = "choose another file with `-o name.gif`"
        raise EdgegenError(f"`{path}` cannot be written: {error.strerror or error}", hint=hint) from error
    finally:
        part.unlink(missing_ok=True)


def _png(stream: Any, frames: Frames, rate: float, written: Callable[[], None]) -> None:
    from PIL import Image

    Image.fromarray(strip(frames)).save(stream, format="PNG", optimize=False)
    for _ in frames:
        written()


def _pictures(frames: Frames, written: Callable[[], None], colours: int | None = None) -> Iterator[Any]:
    from PIL import Image

    for frame in frames:
        picture = Image.fromarray(frame)
        yield picture if colours is None else picture.quantize(colours, method=Image.Quantize.MEDIANCUT)
        written()


def _gif(stream: Any, frames: Frames, rate: float, written: Callable[[], None]) -> None:
    first, *rest = _pictures(frames, written, colours=256)
    spent = [round(100 * (index + 1) / rate) - round(100 * index / rate) for index in range(len(frames))]
    durations = [10 * max(2, one) for one in spent]  # browsers slow down what is shorter than 20 ms
    first.save(stream, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0, optimize=False)


def _webp(stream: Any, frames: Frames, rate: float, written: Callable[[], None]) -> None:
    first, *rest = _pictures(frames, written)
    first.save(
        stream,
        format="WEBP",
        save_all=True,
        append_images=rest,
        duration=round(1000 / rate),
        loop=0,
        quality=WEBP_QUALITY,
        method=4,
    )


def _mp4(stream: Any, frames: Frames, rate: float, written: Callable[[], None]) -> None:
    import av

    height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2
    with av.open(stream, mode="w", format="mp4") as container:
        track: Any = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1000))
        track.width, track.height, track.pix_fmt = width, height, "yuv420p"
        track.options = {"crf": str(MP4_CRF), "threads": "1"}
        for frame in frames:
            pixels = np.ascontiguousarray(frame[:height, :width])
            for packet in track.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
            written()
        for packet in track.encode():
            container.mux(packet)
