"""Decoding a picture tile by tile: where tiles lie, how they are cut out of a latent and put together.

Tiles overlap. A convolution sees only its neighbourhood, so what lies at least `halo` latent rows inside a tile is what
the whole decoder would have drawn there; only that part of each tile is kept. Tiles at a border start at that
border and see the same padding as the whole. Imports no torch: an app does the same from the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

Floats = NDArray[np.float32]


class Tiling(BaseModel):
    """How a latent [1, C, ..., H, W] is decoded in tiles of `tile` rows and columns of it.

    `scale` pixels lie along one latent row or column; `seam` is the largest difference to the whole decoder that was
    seen when it was chosen, in grey levels of 255.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    latent: tuple[int, int]
    tile: tuple[int, int]
    halo: int = Field(ge=0)
    scale: int = Field(ge=1)
    seam: float = Field(ge=0)

    @model_validator(mode="after")
    def _check(self) -> Tiling:
        for whole, tile in zip(self.latent, self.tile, strict=True):
            if not 0 < tile <= whole:
                raise ValueError(f"a tile of {tile} does not lie in {whole}")
            if tile < whole and tile <= 2 * self.halo:
                raise ValueError(f"a tile of {tile} has nothing inside a halo of {self.halo} on both sides")
        return self

    def spans(self, axis: int) -> tuple[Span, ...]:
        """Tiles along axis 0 (rows) or 1 (columns), in order; what they keep covers the axis exactly once."""
        whole, tile = self.latent[axis], self.tile[axis]
        if tile == whole:
            return (Span(0, 0, whole),)
        spans, kept = [], 0
        while kept < whole:
            start = min(max(0, kept - self.halo), whole - tile)
            stop = whole if start + tile == whole else start + tile - self.halo
            spans.append(Span(start, kept, stop))
            kept = stop
        return tuple(spans)

    @property
    def count(self) -> int:
        """How many tiles a picture takes."""
        return len(self.spans(0)) * len(self.spans(1))


@dataclass(frozen=True)
class Span:
    """A tile along one axis, in latent rows: it starts at `start`, and `keep` up to `stop` of the whole is its."""

    start: int
    keep: int
    stop: int


def cut_tiles(latent: Floats, tiling: Tiling) -> Iterator[tuple[Span, Span, Floats]]:
    """Every tile of `latent` [..., H, W]: its span of rows, of columns, and its values."""
    for rows, columns in product(tiling.spans(0), tiling.spans(1)):
        below, right = rows.start + tiling.tile[0], columns.start + tiling.tile[1]
        yield rows, columns, np.ascontiguousarray(latent[..., rows.start : below, columns.start : right])


def decode_tiled(decode: Callable[[Floats], Floats], latent: Floats, tiling: Tiling) -> Floats:
    """`decode` run on each tile of `latent` [1, C, ..., H, W], and the kept parts as one picture [1, 3, ..., h, w]."""
    scale = tiling.scale
    picture: Floats | None = None
    for rows, columns, tile in cut_tiles(latent, tiling):
        drawn = decode(tile)
        if picture is None:
            picture = np.empty((*drawn.shape[:-2], *(side * scale for side in tiling.latent)), dtype=np.float32)
        inner = drawn[
            ...,
            (rows.keep - rows.start) * scale : (rows.stop - rows.start) * scale,
            (columns.keep - columns.start) * scale : (columns.stop - columns.start) * scale,
        ]
        picture[..., rows.keep * scale : rows.stop * scale, columns.keep * scale : columns.stop * scale] = inner
    assert picture is not None
    return picture


def seam(whole: Floats, tiled: Floats) -> float:
    """The largest difference between two pictures in -1..1, in grey levels of 255; values outside count as clipped."""
    difference = np.abs(np.clip(whole, -1, 1) - np.clip(tiled, -1, 1))
    return float(difference.max() * 127.5)
