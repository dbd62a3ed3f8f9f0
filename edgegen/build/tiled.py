"""Choosing tiles for a decoder whose values do not fit into memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from edgegen.errors import EdgegenError
from edgegen.graph.tiles import Tiling, decode_tiled, seam
from edgegen.lower.chain import tile_specs
from edgegen.students.student import Component

SEAM_LIMIT = 0.1
"""Grey levels of 255 by which any value of a tiled picture may differ from the whole: nothing that can be seen, and
little enough for the gates, which hold tiled artifacts against the whole decoder."""
HALOS = (2, 4, 6, 8, 12, 16, 24, 32)
COUNTS = range(2, 17)

Floats = NDArray[np.float32]


def tile_component(decoder: Component, tiling: Tiling) -> Component:
    """`decoder` with the static shapes of one tile: the same module."""
    (latent,), (picture,) = decoder.inputs, decoder.outputs
    return Component(decoder.name, decoder.module, *tile_specs(latent, picture, tiling))


def choose_tiling(
    decoder: Component, latents: Sequence[Floats], budget: int, activations: Callable[[Component], int]
) -> Tiling:
    """The fewest tiles, then the smallest halo, whose values take at most `budget` bytes and whose seams on `latents`
    ([1, C, ..., H, W] each) stay below a tenth of a grey level of what the whole decoder draws.

    `activations` estimates the bytes of a component's values. EdgegenError when no tiling does, with the best that was
    seen: a decoder with attention or norms over the whole picture has no tiles that are true to it.
    """
    whole = [_run(decoder, latent) for latent in latents]
    best: Tiling | None = None
    smallest = activations(decoder)
    for tiling in _candidates(decoder):
        needed = activations(tile_component(decoder, tiling))
        smallest = min(smallest, needed)
        if needed > budget:
            continue
        seen = max(
            seam(picture, decode_tiled(lambda tile: _run(decoder, tile), latent, tiling))
            for latent, picture in zip(latents, whole, strict=True)
        )
        measured = tiling.model_copy(update={"seam": round(seen, 4)})
        if seen < SEAM_LIMIT:
            return measured
        if best is None or seen < best.seam:
            best = measured
    if best is None:
        raise EdgegenError(
            f"component `{decoder.name}` does not fit in tiles either: the smallest takes {smallest / 2**20:.1f} MiB "
            f"for its values, and {budget / 2**20:.1f} MiB are there",
            hint="build for a target with more memory, or a student of a smaller picture; `--max-memory` says what the "
            "app may use where you know better than the target file",
        )
    raise EdgegenError(
        f"component `{decoder.name}` cannot be run in tiles: with {best.count} of them their seams are "
        f"{best.seam:.1f} grey levels, and {SEAM_LIMIT} are allowed",
        hint="give the student a decoder of convolutions alone, as TAESD, or build for a target with more memory",
    )


def _candidates(decoder: Component) -> Iterator[Tiling]:
    """From few large tiles to many small ones; of equal number, those with the smaller halo first."""
    height, width = decoder.inputs[0].shape[-2:]
    scale = decoder.outputs[0].shape[-1] // width
    for count in COUNTS:
        for halo in HALOS:
            tile = (_side(height, count, halo), _side(width, count, halo))
            if all(side > 2 * halo for side in tile) and tile != (height, width):
                yield Tiling(latent=(height, width), tile=tile, halo=halo, scale=scale, seam=0)


def _side(whole: int, count: int, halo: int) -> int:
    """The smallest even side with which `count` tiles cover `whole`: inner ones keep all but two halos."""
    side = -(-(whole + 2 * halo * (count - 1)) // count)
    return min(whole, side + side % 2)


@torch.no_grad()
def _run(decoder: Component, latent: Floats) -> Floats:
    picture: Floats = decoder.module(torch.from_numpy(latent)).numpy()
    return picture
