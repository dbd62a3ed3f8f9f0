"""Regions of token-wise ops with channels first."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgegen.rewrite.base import census
from edgegen.rewrite.channels_first_attention import ChannelsFirstAttention
from edgegen.rewrite.channels_first_tokens import ChannelsFirstTokens
from edgegen.students.networks.clip_text import ClipTextConfig, ClipTextEncoder
from edgegen.students.networks.unet import SpatialTransformer, TransformerShape

MOVES = ("aten.transpose", "aten.permute")


def shake(module):
    """Affine parameters that are neither one nor zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + 0.5 * (parameter.dim() == 1))
    return module


def export(module, *inputs):
    return torch.export.export(module.eval(), inputs)


def moves(program):
    return sum(census(program)[name] for name in MOVES)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = SpatialTransformer(8, TransformerShape(6, 2), 4)
        self.second = SpatialTransformer(8, TransformerShape(6, 4), 4)

    def forward(self, x, context):
        return self.second(self.first(x, context), context)


@pytest.mark.parametrize(("form", "left"), [("split", 3), ("whole", 5)])
def test_a_transformer_in_an_image_network_needs_no_transposes(check_pass, form, left):
    program = export(shake(Block()), torch.randn(1, 8, 4, 4), torch.randn(1, 3, 6))
    program = ChannelsFirstAttention(form)(program).program
    gone = {"aten.layer_norm": 0, "aten.linear": 2 if form == "split" else 0, "aten.flatten": 0}
    result = check_pass(ChannelsFirstTokens(), program, torch.randn(1, 8, 4, 4), torch.randn(1, 3, 6), after=gone)
    # One for the context; then the keys': a copy with form `split`, a flag of the product with `whole`.
    assert moves(result.program) == left
    assert (
        max(node.meta["val"].dim() for node in result.program.graph.nodes if hasattr(node.meta.get("val"), "dim")) <= 4
    )


CLIP = ClipTextConfig(
    vocab_size=16,
    max_position_embeddings=5,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    hidden_act="quick_gelu",
)


@pytest.mark.parametrize(("form", "left"), [("split", 2 + 2 + 1), ("whole", 2 + 2 + 1)])
def test_a_text_encoder_is_turned_once_and_back(check_pass, form, left):
    ids = torch.randint(0, 16, (1, 5))
    program = ChannelsFirstAttention(form)(export(shake(ClipTextEncoder(CLIP)), ids)).program
    result = check_pass(ChannelsFirstTokens(), program, ids, after={"aten.linear": 0, "aten.layer_norm": 0})
    assert moves(result.program) <= left + 1


class TokenMlp(nn.Module):
    """Everything a region may hold, between two transposes of an image."""

    def __init__(self, affine=True):
        super().__init__()
        self.norm = nn.LayerNorm(6, elementwise_affine=affine)
        self.rms = nn.RMSNorm(6, elementwise_affine=affine)
        self.wide, self.narrow = nn.Linear(6, 16), nn.Linear(8, 6, bias=False)
        self.shift = nn.Parameter(torch.randn(6))
        self.table = nn.Parameter(torch.randn(1, 1, 6))
        self.place = nn.Parameter(torch.randn(1, 12, 6))

    def forward(self, image, scale, gate):
        x = image.flatten(2).transpose(1, 2) + self.place
        y = self.norm(x) * (1 + scale) + self.table
        a, b = self.wide(y).chunk(2, dim=-1)
        y = self.narrow(F.silu(a) * torch.sigmoid(b)) * gate + self.shift
        first, last = y[..., :2], y[:, :, 2:]
        y = torch.cat([last, first], -1) / 2
        x = x - self.rms(y)
        return x.transpose(1, 2).reshape(image.shape)


@pytest.mark.parametrize("affine", [True, False])
def test_all_kinds_of_members(check_pass, affine):
    inputs = torch.randn(2, 6, 3, 4), torch.randn(2, 1, 6), torch.randn(6)
    gone = {"aten.linear": 0, "aten.layer_norm": 0, "aten.rms_norm": 0, "aten.conv2d": 2}
    result = check_pass(ChannelsFirstTokens(), TokenMlp(affine), *inputs, before={"aten.transpose": 2}, after=gone)
    assert moves(result.program) == 0


class ChannelsLastBorders(nn.Module):
    """Borders as diffusers writes them with linear projections."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, image):
        b, c, h, w = image.shape
        x = self.inner(image.permute(0, 2, 3, 1).reshape(b, h * w, c))
        x = self.outer(F.gelu(x))
        return image + x.reshape(b, h, w, c).permute(0, 3, 1, 2).contiguous()


def test_borders_with_channels_last(check_pass):
    result = check_pass(ChannelsFirstTokens(), ChannelsLastBorders(), torch.randn(1, 6, 3, 4), after={"aten.linear": 0})
    assert moves(result.program) == 0


class NearZeroScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        with torch.no_grad():
            self.norm.weight[0], self.norm.bias[:] = 1e-7, 2.0

    def forward(self, image):
        return self.norm(image.flatten(2).transpose(1, 2)).transpose(1, 2)


def test_a_shift_is_not_divided_by_a_scale_near_zero(check_pass):
    result = check_pass(ChannelsFirstTokens(), NearZeroScale(), torch.randn(1, 4, 2, 3))
    assert all(value.abs().max() < 1e3 for value in result.program.state_dict.values())


class FeedsOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, image):
        tokens = self.linear(image.flatten(2).transpose(1, 2))
        return tokens, tokens.transpose(1, 2).reshape(image.shape), torch.relu(tokens).transpose(1, 2)


def test_tokens_that_are_outputs_are_turned_back(check_pass):
    result = check_pass(ChannelsFirstTokens(), FeedsOutput(), torch.randn(1, 4, 2, 3))
    assert moves(result.program) == 1


class PlainMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, tokens):
        return self.linear(self.norm(tokens))


class ComputedWeight(nn.Module):
    def forward(self, image, weight):
        return F.linear(image.flatten(2).transpose(1, 2), weight.tanh()).transpose(1, 2)


class WideNorm(nn.Module):
    def forward(self, image):
        return F.layer_norm(image.flatten(2).transpose(1, 2), [6, 4]).transpose(1, 2)


def test_declines(check_pass):
    result = check_pass(ChannelsFirstTokens(), PlainMlp(), torch.randn(1, 3, 4), modified=False)
    assert "0 permutes at the borders of 2 ops would become 2" in result.declined[0].reason
    check_pass(ChannelsFirstTokens(), ComputedWeight(), torch.randn(1, 4, 2, 3), torch.randn(5, 4), modified=False)
    check_pass(ChannelsFirstTokens(), WideNorm(), torch.randn(1, 4, 2, 3), modified=False)
