"""LTX-Video's encoder for one frame against diffusers' own class."""

import pytest
import torch

from edgegen.students.architectures import build_module
from edgegen.students.networks.video_encoder import collapse

CONFIG = {
    "latent_channels": 8,
    "block_out_channels": (16, 24, 24),
    "layers_per_block": (1, 2, 1, 1),
    "spatio_temporal_scaling": (True, True, False),
}


@pytest.fixture(scope="module")
def upstream():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    levels = len(CONFIG["block_out_channels"])
    network = diffusers.AutoencoderKLLTXVideo(
        **CONFIG,
        down_block_types=("LTXVideoDownBlock3D",) * levels,
        decoder_block_out_channels=(16,) * levels,
        decoder_layers_per_block=(1,) * (levels + 1),
        decoder_spatio_temporal_scaling=(False,) * levels,
        decoder_inject_noise=(False,) * (levels + 1),
        upsample_residual=(False,) * levels,
        upsample_factor=(1,) * levels,
    ).eval()
    with torch.no_grad():
        for parameter in network.encoder.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return network


@pytest.mark.parametrize("size", [(32, 48), (40, 36)], ids=["even", "odd"])
def test_latent_of_a_picture(upstream, size):
    network = build_module("video_encoder", CONFIG | {"scaling_factor": 0.5})
    network.load_state_dict(collapse(upstream.encoder.state_dict(), 8))
    image = torch.rand(1, 3, *size) * 2 - 1
    with torch.no_grad():
        expected = upstream.encode(image[:, :, None]).latent_dist.mean * 0.5
        found = network(image)
    assert found.shape == expected.shape
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()
