"""Regions move to the layout that needs fewer transposes, whole axes with them; what reads positions stays."""

import pytest
import torch
from torch import nn

from edgegen.graph.edit import made_by
from edgegen.rewrite.base import census
from edgegen.rewrite.sink_transposes import SinkTransposes


class Wrap(nn.Module):
    def __init__(self, function, *weights):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(weights)

    def forward(self, *inputs):
        return self.function(*inputs, *self.weights)


def moves(program):
    names = ("view", "reshape", "flatten", "unsqueeze", "squeeze", "transpose", "permute", "clone", "contiguous")
    return {name: count for name, count in census(program).items() if name.removeprefix("aten.") in names}


def conv(x, weight):
    return nn.functional.conv2d(x, weight, padding=1)


def test_elementwise_work_between_transposes_moves(check_pass):
    def forward(x, scale):
        y = nn.functional.gelu(x.transpose(1, 2)) * scale + 1
        return y.transpose(1, 2)

    result = check_pass(SinkTransposes(), Wrap(forward, torch.randn(6)), torch.randn(2, 6, 5))
    assert moves(result.program) == {}
    (weight,) = result.program.state_dict.values()
    assert weight.shape == (1, 6, 1)


def test_tokens_and_their_image_are_one_region(check_pass):
    """chunk, gelu, product, residual and a bias of tokens run on the image."""

    def forward(x, weight, bias):
        image = conv(x, weight)
        tokens = image.flatten(2).transpose(1, 2)
        value, gate = (tokens + bias).chunk(2, dim=-1)
        tokens = torch.cat([value * nn.functional.gelu(gate), value], -1) + tokens
        return conv(tokens.transpose(1, 2).reshape(image.shape), weight)

    module = Wrap(forward, torch.randn(4, 4, 3, 3), torch.randn(4))
    result = check_pass(SinkTransposes(), module, torch.randn(2, 4, 6, 5), before={"aten.transpose": 2})
    assert moves(result.program) == {}


def test_axes_of_softmax_and_mean_are_renamed(check_pass):
    def forward(x):
        y = x.permute(0, 2, 3, 1)
        y = y.softmax(-1) - y.mean((1, 2), keepdim=True) + y.amax(-1, keepdim=True)
        return y[:, 1:].permute(0, 3, 1, 2)

    result = check_pass(SinkTransposes(), Wrap(forward), torch.randn(2, 4, 6, 5))
    assert moves(result.program) == {}
    assert next(n for n in result.program.graph.nodes if "softmax" in n.name).args[1] == 1


def test_norms_and_linears_of_the_last_axis_move_to_a_rank_that_keeps_it(check_pass):
    def forward(x, weight):
        y = x.reshape(2, 30, 4)
        y = nn.functional.linear(nn.functional.layer_norm(y, (4,)), weight)
        return y.reshape(2, 6, 5, 4)

    result = check_pass(SinkTransposes(), Wrap(forward, torch.randn(4, 4)), torch.randn(2, 6, 5, 4))
    assert moves(result.program) == {}


def test_fewer_elements_are_permuted_past_a_slice(check_pass):
    def forward(x, weight):
        y = conv(x, weight).permute(0, 2, 3, 1).relu()
        return y[..., :1].sigmoid().reshape(2, 30)

    result = check_pass(SinkTransposes(), Wrap(forward, torch.randn(4, 4, 3, 3)), torch.randn(2, 4, 6, 5))
    assert moves(result.program) == {"aten.reshape": 1}


def test_a_layer_norm_over_channels_keeps_its_tokens(check_pass):
    def forward(x):
        tokens = nn.functional.layer_norm(x.flatten(2).transpose(1, 2), (4,))
        return tokens.transpose(1, 2).reshape(x.shape)

    check_pass(SinkTransposes(), Wrap(forward), torch.randn(2, 4, 6, 5), modified=False)


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: nn.functional.gelu(x.transpose(1, 2)),
        lambda x: x.transpose(1, 2).cumsum(1).transpose(1, 2),
        lambda x: x.transpose(1, 2).relu() + x.reshape(2, 5, 6),
        lambda x: torch.rand_like(x.transpose(1, 2)).transpose(1, 2),
    ],
)
def test_what_saves_nothing_or_reads_positions_stays(check_pass, forward):
    if "rand_like" in forward.__code__.co_names:
        program = torch.export.export(Wrap(forward).eval(), (torch.randn(2, 6, 5),))
        assert not SinkTransposes()(program).modified
        return
    check_pass(SinkTransposes(), Wrap(forward), torch.randn(2, 6, 5), modified=False)


def test_a_value_that_a_region_reads_twice_is_turned_once(check_pass):
    """Priced as one permute, it has to be one: moved there and back again, this went on for ever."""

    def forward(x, first, second):
        a, b = x[:, :, :1], x[:, :, 1:2]
        pairs = [torch.cat([a, b], 1), torch.cat([a, b, a], 1)]
        pairs = [one.permute(0, 3, 2, 4, 1).reshape(1, 24, -1) for one in pairs]
        tokens = [nn.functional.linear(one, w) for one, w in zip(pairs, (first, second), strict=True)]
        images = [one.reshape(1, 4, 1, 6, 4).permute(0, 4, 2, 1, 3) for one in tokens]
        return torch.cat([a.exp(), *images], 2)

    module = Wrap(forward, torch.randn(4, 8), torch.randn(4, 12))
    check_pass(SinkTransposes(images=True), module, torch.randn(1, 4, 3, 4, 6), before={"aten.permute": 4})


def test_what_would_not_broadcast_in_the_other_layout_stays(check_pass):
    def forward(x, gate):
        y = x.reshape(2, 2, 3, 5) * gate + x.reshape(2, 2, 3, 5).mean(1, keepdim=True)
        return y.reshape(2, 6, 5)

    module = Wrap(forward, torch.randn(1, 2, 1, 1))
    check_pass(SinkTransposes(), module, torch.randn(2, 6, 5), modified=False)


def test_a_moved_value_may_be_an_output_and_a_residual(check_pass):
    def forward(x):
        y = x.transpose(1, 2)
        z = (y * 2).relu() + y
        return z, z.transpose(1, 2).exp(), (z.tanh() + y).transpose(1, 2)

    result = check_pass(SinkTransposes(), Wrap(forward), torch.randn(2, 6, 5))
    assert moves(result.program) == {"aten.transpose": 1}
    assert any(SinkTransposes.name in made_by(node) for node in result.program.graph.nodes)


def test_scalars_and_masks_go_along(check_pass):
    def forward(x, mask, factor):
        y = torch.where(mask.transpose(1, 2), x.transpose(1, 2), 0.0) * factor
        return y.transpose(1, 2)

    inputs = (torch.randn(2, 6, 5), torch.rand(2, 6, 5) > 0.5, torch.tensor(0.3))
    result = check_pass(SinkTransposes(), Wrap(forward), *inputs)
    assert moves(result.program) == {}
