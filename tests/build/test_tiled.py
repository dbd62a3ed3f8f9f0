"""Tiles of a decoder of convolutions are chosen by what their seams measure; what sees the whole picture has none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgegen.build.tiled import SEAM_LIMIT, choose_tiling, tile_component
from edgegen.errors import EdgegenError
from edgegen.graph.capture import capture
from edgegen.graph.liveness import footprint
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.students.networks.tiny_decoder import TinyDecoder, TinyDecoderConfig
from edgegen.students.student import Component


def component(module: torch.nn.Module, side: int = 32) -> Component:
    picture = TensorSpec(name="image", shape=(1, 3, 2 * side, 2 * side))
    return Component("decoder", module.eval(), (TensorSpec(name="latent", shape=(1, 4, side, side)),), (picture,))


def activations(part: Component) -> int:
    return footprint(capture(part)).activations


@pytest.fixture(scope="module")
def latents() -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((1, 4, 32, 32), generator=generator).numpy() for _ in range(2)]


def test_tiles_fit_the_budget_and_have_no_seams(latents):
    torch.manual_seed(0)
    decoder = component(TinyDecoder(TinyDecoderConfig(width=16, num_blocks=(1, 1))))
    budget = activations(decoder) // 2
    tiling = choose_tiling(decoder, latents, budget, activations)
    assert tiling.seam < SEAM_LIMIT
    assert tiling.scale == 2
    tile = tile_component(decoder, tiling)
    assert activations(tile) <= budget
    assert tile.outputs[0].shape == (1, 3, 2 * tiling.tile[0], 2 * tiling.tile[1])
    assert tile.module is decoder.module


def test_a_decoder_with_a_norm_over_the_picture_is_refused_with_its_seams(latents):
    torch.manual_seed(0)
    normed = torch.nn.Sequential(
        torch.nn.Conv2d(4, 16, 3, padding=1), torch.nn.GroupNorm(1, 16), torch.nn.Upsample(scale_factor=2),
        torch.nn.Conv2d(16, 3, 3, padding=1),
    )  # fmt: skip
    decoder = component(normed)
    with pytest.raises(EdgegenError, match=r"seams are .* grey levels") as caught:
        choose_tiling(decoder, latents, activations(decoder) // 2, activations)
    assert "TAESD" in str(caught.value.hint)


def test_a_budget_that_no_tile_meets_is_refused(latents):
    decoder = component(TinyDecoder(TinyDecoderConfig(width=16, num_blocks=(1, 1))))
    with pytest.raises(EdgegenError, match=r"in tiles either: the smallest takes 0\.\d MiB"):
        choose_tiling(decoder, latents, 1000, activations)
