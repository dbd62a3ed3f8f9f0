"""Tiles cover a picture exactly once, and a decoder of convolutions draws the same with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from edgegen.graph.tiles import Tiling, cut_tiles, decode_tiled, seam
from edgegen.students.networks.tiny_decoder import TinyDecoder, TinyDecoderConfig


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    halo = draw(st.integers(0, 6))
    latent = tuple(draw(st.integers(2 * halo + 2, 60)) for _ in range(2))
    tile = tuple(draw(st.integers(2 * halo + 1, side)) for side in latent)
    return Tiling(latent=latent, tile=tile, halo=halo, scale=draw(st.integers(1, 4)), seam=0)


@given(tilings())
def test_every_pixel_is_kept_once_and_has_its_halo(tiling: Tiling) -> None:
    for axis in range(2):
        whole, tile = tiling.latent[axis], tiling.tile[axis]
        spans = tiling.spans(axis)
        assert [span.keep for span in spans] == [0, *(span.stop for span in spans[:-1])]
        assert spans[-1].stop == whole
        for span in spans:
            assert 0 <= span.start <= span.keep < span.stop <= span.start + tile <= whole
            assert span.start == 0 or span.keep - span.start >= tiling.halo
            assert span.start + tile == whole or span.start + tile - span.stop >= tiling.halo
    latent = np.random.default_rng(0).normal(size=(1, 2, *tiling.latent)).astype(np.float32)

    def blow_up(tile: np.ndarray) -> np.ndarray:
        return tile.repeat(tiling.scale, axis=-2).repeat(tiling.scale, axis=-1)

    assert np.array_equal(decode_tiled(blow_up, latent, tiling), blow_up(latent))
    assert sum(1 for _ in cut_tiles(latent, tiling)) == tiling.count


def test_a_decoder_of_convolutions_has_no_seams_within_its_reach_and_seams_without() -> None:
    torch.manual_seed(0)
    decoder = TinyDecoder(TinyDecoderConfig(width=8, num_blocks=(1, 1))).eval()
    latent = torch.randn(1, 4, 40, 40).numpy()

    def decode(tile: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return decoder(torch.from_numpy(tile)).numpy()

    whole = decode(latent)

    def seam_of(halo: int) -> float:
        tiling = Tiling(latent=(40, 40), tile=(24, 20), halo=halo, scale=whole.shape[-1] // 40, seam=0)
        return seam(whole, decode_tiled(decode, latent, tiling))

    assert seam_of(8) < 0.01
    assert seam_of(0) > 1


@pytest.mark.parametrize("tile, halo", [((8, 8), 4), ((0, 8), 1), ((17, 8), 1)])
def test_a_tile_must_lie_in_the_latent_and_keep_something(tile: tuple[int, int], halo: int) -> None:
    with pytest.raises(ValidationError):
        Tiling(latent=(16, 16), tile=tile, halo=halo, scale=8, seam=0)
