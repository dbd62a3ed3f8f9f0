"""Turbo-VAED's decoder against the same network in 3-D convolutions and one shuffle of all three axes."""

import pytest
import torch
import torch.nn.functional as F

from edgegen.errors import EdgegenError
from edgegen.rewrite.pipeline import Pipeline
from edgegen.rewrite.presets import canonical
from edgegen.students.architectures import build_module

CONFIG = {
    "latent_channels": 6,
    "block_out_channels": (16, 24),
    "layers_per_block": (1, 2, 1),
    "spatio_temporal_scaling": (True, False),
    "is_dw_conv": (False, False, True),
    "dw_kernel_size": 5,
}


@pytest.fixture(scope="module")
def network():
    return decoder()


def decoder(**changes):
    torch.manual_seed(0)
    module = build_module("video_decoder", CONFIG | changes)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if "norm" in name:
                value.copy_(torch.rand_like(value) + 0.5)
    return module


class Plain:
    """[1, C, T, H, W] throughout."""

    def __init__(self, weights):
        self.weights = weights

    def conv(self, x, name, groups=1):
        weight = self.weights[f"{name}.weight"]
        reach = weight.shape[2] // 2
        x = torch.cat([x[:, :, :1]] * reach + [x] + [x[:, :, -1:]] * reach, dim=2)
        edge = weight.shape[-1] // 2
        return F.conv3d(x, weight, self.weights[f"{name}.bias"], padding=(0, edge, edge), groups=groups)

    def whole(self, x, name):
        if f"{name}.conv.weight" in self.weights:
            return self.conv(x, f"{name}.conv")
        return self.conv(self.conv(x, f"{name}.depthwise_conv", x.shape[1]), f"{name}.pointwise_conv")

    def norm(self, x):
        return x / (x.pow(2).mean(1, keepdim=True) + 1e-8).sqrt()

    def resnet(self, x, name, act=F.silu):
        h = self.whole(act(self.norm(x)), f"{name}.conv1")
        h = self.whole(F.silu(self.norm(h)), f"{name}.conv2")
        if f"{name}.norm3.weight" in self.weights:
            affine = self.weights[f"{name}.norm3.weight"], self.weights[f"{name}.norm3.bias"]
            x = F.layer_norm(x.movedim(1, -1), x.shape[1:2], *affine, eps=1e-6).movedim(-1, 1)
            x = self.whole(x, f"{name}.conv_shortcut")
        return x + h

    def pixels(self, x, name):
        frames = [
            F.pixel_shuffle(
                F.conv2d(x[:, :, t], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], padding=1), 2
            )
            for t in range(x.shape[2])
        ]
        return torch.stack(frames, dim=2)

    def __call__(self, latent):
        x = self.resnet(self.whole(latent, "conv_in"), "mid_block.resnets.0")
        x = self.resnet(self.resnet(x, "up_blocks.0.resnets.0"), "up_blocks.0.resnets.1")
        x = self.resnet(x, "up_blocks.1.conv_in")
        x = self.conv(x, "up_blocks.1.upsamplers.0.conv")
        _, channels, frames, height, width = x.shape
        # Channels are (kept, row, column, frame): the spatial shuffle works on what the temporal one has left.
        x = x.reshape(1, channels // 8, 2, 2, 2, frames, height, width).permute(0, 1, 5, 4, 6, 2, 7, 3)
        x = x.reshape(1, channels // 8, 2 * frames, 2 * height, 2 * width)[:, :, 1:]
        x = self.resnet(x, "up_blocks.1.resnets.0", F.relu)
        x = self.pixels(F.silu(self.norm(x)), "upsampler2d_1.conv")
        x = self.pixels(F.silu(self.norm(x)), "upsampler2d_2.conv")
        mean, var = self.weights["norm_out.running_mean"], self.weights["norm_out.running_var"]
        return self.whole(F.silu(F.batch_norm(x, mean, var)), "conv_out")


def test_same_numbers_as_in_three_dimensions(network):
    latent = torch.randn(1, 6, 3, 4, 5)
    expected = Plain(network.state_dict())(latent)
    found = network(latent)
    assert found.shape == expected.shape == (1, 3, 5, 32, 40)
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()


def test_the_picture_is_cut(network):
    latent = torch.randn(1, 6, 3, 4, 5)
    assert torch.equal(decoder(crop=(30, 39))(latent), network(latent)[..., :30, :39])


def test_nothing_has_more_than_four_axes_but_what_comes_in_and_goes_out(network):
    captured = torch.export.export(network, (torch.randn(1, 6, 3, 4, 5),))
    program, _ = Pipeline(canonical.passes()).run(captured)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert max(node.meta["val"].dim() for node in calls[:-1]) == 4
    assert not any("conv3d" in str(node.target) for node in calls)


@pytest.mark.parametrize(
    "changes", [{"layers_per_block": (1, 1)}, {"is_dw_conv": (True, True)}, {"block_out_channels": (24, 24)}]
)
def test_a_config_that_does_not_join_is_refused(changes):
    with pytest.raises(EdgegenError, match="config of `video_decoder`"):
        build_module("video_decoder", CONFIG | changes)
