"""MobileI2V's denoiser against the same network written token by token, as its public code has it."""

import math

import pytest
import torch
import torch.nn.functional as F

from edgegen.students.architectures import build_module
from edgegen.students.families.mobilei2v import tiny

STEPS = {1: (1.0, 0.0), 2: (1.0, 0.5, 0.0)}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    config = tiny().components["denoiser"].config
    module = build_module("mobile_dit", dict(config))
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "norm" in name:  # ones would let a weight be left out
                weight.add_(0.2 * torch.randn_like(weight))
    return module


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    latent, image = torch.randn(1, 16, 3, 4, 6), torch.randn(1, 16, 1, 4, 6)
    return {
        "latent": latent,
        "timestep": torch.tensor([600.0]),
        "image_latent": image,
        "flow_score": torch.tensor([3.0]),
    }


def embedded(weights, name, values):
    frequencies = torch.exp(-math.log(10000) * torch.arange(32) / 32)
    angles = values[:, None] * frequencies
    features = torch.cat([angles.cos(), angles.sin()], dim=-1)
    hidden = F.silu(features @ weights[f"{name}.mlp.0.weight"].T + weights[f"{name}.mlp.0.bias"])
    return hidden @ weights[f"{name}.mlp.2.weight"].T + weights[f"{name}.mlp.2.bias"]


def turned(x):
    """Each pair of channels of [N, heads, 24] as a complex number, turned by its position on one of three axes."""
    grid = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), torch.arange(6), indexing="ij"), -1)
    places = grid.reshape(72, 3) / torch.tensor([1.0, 0.25, 0.375])
    parts = []
    for axis, part in enumerate(x.chunk(3, dim=-1)):
        angles = places[:, axis, None] * 10000.0 ** (-torch.arange(4) / 4)
        pairs = torch.complex(*part.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
        parts += [pairs.real, pairs.imag]
    return torch.cat(parts, dim=-1)


def plain(weights, latent, timestep, image_latent, flow_score):
    """72 tokens of 96 channels, one time each; both attentions as a matrix of tokens by tokens."""
    config = tiny().components["denoiser"].config
    filled = torch.cat([image_latent, latent[:, :, 1:]], dim=2)
    tokens = filled[0].permute(1, 2, 3, 0).reshape(72, 16)
    x = tokens @ weights["x_embedder.proj.weight"][:, :, 0, 0].T + weights["x_embedder.proj.bias"]
    mask = torch.zeros(72)
    mask[:24] = 1
    times = torch.minimum(timestep.repeat(72), (1 - mask) * 1000) / 1000
    time = embedded(weights, "t_embedder", times)
    six = F.silu(time) @ weights["t_block.1.weight"].T + weights["t_block.1.bias"]
    flow = embedded(weights, "flow_embedder", flow_score.repeat(72))
    six = six + F.silu(flow) @ weights["flow_block.1.weight"].T + weights["flow_block.1.bias"]
    for index, kind in enumerate(config["blocks"]):
        own = {k.removeprefix(f"blocks.{index}."): v for k, v in weights.items() if k.startswith(f"blocks.{index}.")}
        rows = own["scale_shift_table"] + six.reshape(72, 6, 96)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = rows.unbind(1)
        h = F.layer_norm(x, (96,), eps=1e-6) * (1 + scale) + shift
        q, k, v = (h @ own["attn.qkv.weight"].T + own.get("attn.qkv.bias", torch.zeros(288))).chunk(3, dim=-1)
        if kind == "linear":
            q, k = (
                one / (one.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * own[f"attn.{name}_norm.weight"]
                for name, one in (("q", q), ("k", k))
            )
        q, k = turned(q.reshape(72, 4, 24)), turned(k.reshape(72, 4, 24))
        if kind == "linear":
            scores = torch.einsum("nhd,mhd->hnm", q.clamp(min=0), k.clamp(min=0))
            scores = scores / (scores.sum(-1, keepdim=True) + 1e-8)
        else:
            scores = (torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(24)).softmax(-1)
        mixed = torch.einsum("hnm,mhd->nhd", scores, v.reshape(72, 4, 24)).reshape(72, 96)
        x = x + gate * (mixed @ own["attn.proj.weight"].T + own["attn.proj.bias"])
        h = F.layer_norm(x, (96,), eps=1e-6) * (1 + mlp_scale) + mlp_shift
        h = h.reshape(3, 4, 6, 96).permute(0, 3, 1, 2)
        h = F.silu(F.conv2d(h, own["mlp.inverted_conv.conv.weight"], own["mlp.inverted_conv.conv.bias"]))
        h = F.conv2d(
            h, own["mlp.depth_conv.conv.weight"], own["mlp.depth_conv.conv.bias"], padding=1, groups=h.shape[1]
        )
        value, gated = h.chunk(2, dim=1)
        h = F.conv2d(value * F.silu(gated), own["mlp.point_conv.conv.weight"])
        x = x + mlp_gate * h.permute(0, 2, 3, 1).reshape(72, 96)
    shift, scale = (weights["final_layer.scale_shift_table"] + time[:, None]).unbind(1)
    h = F.layer_norm(x, (96,), eps=1e-6) * (1 + scale) + shift
    h = h @ weights["final_layer.linear.weight"].T + weights["final_layer.linear.bias"]
    return h.reshape(3, 4, 6, 16).permute(3, 0, 1, 2)[None]


def test_every_later_frame_is_that_of_the_plain_network(network, inputs):
    expected = plain(dict(network.named_parameters()), **inputs)[:, :, 1:]
    found = network(**inputs)[:, :, 1:]
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("steps", STEPS)
def test_euler_ends_on_the_image(network, inputs, steps):
    """The reference overwrites the first frame before each step and after the last."""
    x = noise = inputs["latent"]
    held = torch.cat([inputs["image_latent"], noise[:, :, 1:]], dim=2)
    for start, end in zip(STEPS[steps][:-1], STEPS[steps][1:], strict=True):
        given = {**inputs, "timestep": torch.tensor([1000.0 * start])}
        x = x + (end - start) * network(**{**given, "latent": x})
        held = held + (end - start) * network(**{**given, "latent": held})
        held = torch.cat([inputs["image_latent"], held[:, :, 1:]], dim=2)
    assert torch.allclose(x, held, atol=1e-5)
    assert not torch.allclose(x[:, :, :1], noise[:, :, :1], atol=0.1)


@pytest.mark.parametrize("name", ["timestep", "image_latent", "flow_score"])
def test_conditions_move_the_later_frames(network, inputs, name):
    changed = {**inputs, name: inputs[name] * 0.5 + 0.1}
    before, after = network(**inputs)[:, :, 1:], network(**changed)[:, :, 1:]
    assert (before - after).norm() > 0.01 * before.norm()


def test_what_the_image_replaces_is_not_read(network, inputs):
    other = inputs["latent"].clone()
    other[:, :, 0] += 1
    assert torch.equal(network(**inputs)[:, :, 1:], network(**{**inputs, "latent": other})[:, :, 1:])


def test_linear_attention_in_float16_with_sums_beyond_its_range():
    """Values of which 72 add up to more than 65504: the sums are taken in fp32, as the reference has them."""
    from edgegen.students.networks.mobile_dit import LinearAttention, MobileDiTConfig, rope_tables

    config = MobileDiTConfig(frames=3, height=4, width=6, hidden_size=96, head_dim=24, rope_scale=(1.0, 0.25, 0.375))
    torch.manual_seed(0)
    module = LinearAttention(96, 24)
    tables = rope_tables(config)
    with torch.no_grad():
        module.qkv.weight[192:] *= 8000
        module.proj.weight /= 8000
        x = torch.randn(1, 72, 96)
        exact = module(x, *tables)
        _, k, v = (part.reshape(72, 4, 24) for part in module.qkv(x).chunk(3, dim=-1))
        sums = torch.einsum("nhv,nhk->hvk", v, k / k.std())
        assert sums.abs().max() > 65504 * 2, "the sums do not leave float16's range"
        half = module.half()(x.half(), *(table.half() for table in tables))
    assert half.dtype == torch.float16 and torch.isfinite(half).all()
    assert (half.float() - exact).norm() <= 3e-3 * exact.norm()


def test_heads_that_three_axes_cannot_share_are_refused():
    from edgegen.errors import EdgegenError

    with pytest.raises(EdgegenError, match="multiple of 6"):
        build_module("mobile_dit", {"hidden_size": 96, "head_dim": 32})
