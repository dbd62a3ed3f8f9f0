"""Any legal order of any passes computes the same: random small networks, every order of a few passes, all in a row."""

import copy
from collections import Counter
from dataclasses import dataclass, field
from itertools import permutations
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from edgegen.graph.edit import weights
from edgegen.graph.evaluate import evaluate
from edgegen.rewrite.pipeline import order_problem
from edgegen.rewrite.registry import all_passes, get_pass, parse

TIMESTEP = 7.0
# Passes whose defaults do nothing, or that have none; of several forms one is drawn.
OPTIONS = {
    "activation-form": ("", '{gelu="split", silu="split"}'),
    "bind-input": (f'{{input="timestep", value=[{TIMESTEP}]}}',),
    "channels-first-attention": ('{form="split"}', '{form="whole"}'),
    "chunk-queries": ("{max_score_bytes=256}",),
    "conv1x1-to-linear": ("", '{where="everywhere"}'),
    "explicit-attention": ("{rank=3}", "{rank=4}"),
    "explicit-group-norm": ('{form="grouped-conv"}', '{form="dense-conv"}', '{form="linear"}'),
    "explicit-layer-norm": ('{form="linear-mean"}', '{form="mean"}'),
    "conv3d-to-conv2d": ("", '{form="taps"}'),
    "linear-to-conv1x1": ("", '{where="everywhere"}'),
    "merge-rearrangements": ("", "{images=true}"),
    "mobile-linear-attention": ("", '{total="product"}'),
    "pixel-shuffle-form": ("", '{form="call"}', '{form="conv"}'),
    "sink-transposes": ("", "{images=true}"),
    "specialise-timestep": (f"{{values=[{TIMESTEP}]}}",),
}
INEXACT = {"to-half", "approximate-gelu"}  # they change the function, or its precision
NAMES = [name for name in all_passes() if name not in INEXACT]


# With no roots, no epsilons given these two do nothing; their own tests give some.
IDLE_ALONE = {"prescale-sums", "raise-epsilon"}


class Network(nn.Module):
    """A few layers in a row, on images [1, C, H, W] and their tokens [1, HW, C]; each is named by one of LAYERS.

    Earlier values of the same shape come back as residuals and concatenations. Weights are drawn from the seed.
    """

    def __init__(self, layers, seed):
        super().__init__()
        self.layers = layers
        self.held = nn.ParameterList()
        self.draw = torch.Generator().manual_seed(seed)
        self.recording = True
        with torch.no_grad():
            self(*inputs())
        self.recording = False

    def weight(self, *shape):
        if self.recording:
            self.held.append(nn.Parameter(torch.randn(shape, generator=self.draw) / max(shape[-1], 1) ** 0.5))
        self.place += 1
        return self.held[self.place - 1]

    def forward(self, x, timestep):
        self.place = 0
        seen = [x]
        for layer in self.layers:
            before = x
            x = LAYERS[layer](self, x, seen, timestep)
            assert isinstance(x, torch.Tensor), layer
            if x.shape != before.shape or x.numel() > 4096:
                seen = [one for one in seen if one.shape == x.shape]
            seen.append(x)
        return x


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 4, 4, 6, generator=generator), torch.tensor([TIMESTEP])


def per_channel(net, x):
    return net.weight(x.shape[1], 1, 1) if x.dim() == 4 else net.weight(x.shape[-1])


def conv(net, x, seen, t):
    if x.dim() == 3:
        return F.linear(x, net.weight(x.shape[-1], x.shape[-1]), net.weight(x.shape[-1]))
    return F.conv2d(x, net.weight(x.shape[1], x.shape[1], 3, 3), net.weight(x.shape[1]), padding=1)


def pointwise(net, x, seen, t):
    if x.dim() == 3:
        return F.linear(x, net.weight(2 * x.shape[-1], x.shape[-1])).chunk(2, -1)[0]
    return F.conv2d(x, net.weight(x.shape[1], x.shape[1], 1, 1))


def norm(net, x, seen, t):
    if x.dim() == 3:
        return F.layer_norm(x, (x.shape[-1],), net.weight(x.shape[-1]), net.weight(x.shape[-1]))
    return F.group_norm(x, 2, net.weight(x.shape[1]), net.weight(x.shape[1]))


def batch_norm(net, x, seen, t):
    if x.dim() == 3:
        return x
    mean, variance = net.weight(x.shape[1]), net.weight(x.shape[1]).detach() ** 2 + 0.5
    return F.batch_norm(x, mean, variance, net.weight(x.shape[1]), None)


def attention(net, x, seen, t):
    if x.dim() == 4:
        x = to_tokens(net, x, seen, t)
    width, heads = x.shape[-1], 2
    q, k, v = (
        F.linear(x, net.weight(width, width)).view(1, -1, heads, width // heads).transpose(1, 2) for _ in range(3)
    )
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def geglu(net, x, seen, t):
    axis = 1 if x.dim() == 4 else -1
    if x.dim() == 3:
        x = F.linear(x, net.weight(2 * x.shape[-1], x.shape[-1]), net.weight(2 * x.shape[-1]))
    value, gate = x.chunk(2, axis)
    return torch.cat([value * F.gelu(gate), value], axis) if x.dim() == 4 else value * F.gelu(gate)


def to_tokens(net, x, seen, t):
    if x.dim() == 4:
        return x.flatten(2).transpose(1, 2)
    return x.transpose(1, 2).reshape(1, x.shape[-1], -1, 6)


def channels_last(net, x, seen, t):
    if x.dim() == 3:
        return x.unsqueeze(1).transpose(1, 2).squeeze(2)
    y = F.silu(x.permute(0, 2, 3, 1)) * net.weight(x.shape[1])
    return y.permute(0, 3, 1, 2)


def upsample(net, x, seen, t):
    if x.dim() == 3 or x.shape[2] > 8:
        return x
    y = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.avg_pool2d(F.conv2d(y, net.weight(4, 4, 3, 3), padding=1), 2) if x.shape[1] == 4 else y


def shuffle(net, x, seen, t):
    if x.dim() == 3 or x.shape[1] % 4:
        return x
    return F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2)


def frames(net, x, seen, t):
    if x.dim() == 3:
        return x
    clip = torch.stack([x, x * 0.5, x.tanh()], 2)
    weight = net.weight(x.shape[1], x.shape[1], 3, 1, 1)
    return F.conv3d(F.pad(clip, (0, 0, 0, 0, 2, 0)), weight)[:, :, -1]


def time(net, x, seen, t):
    width = x.shape[1] if x.dim() == 4 else x.shape[-1]
    features = F.linear(F.silu(torch.cat([t[:, None].cos(), t[:, None].sin()], -1)), net.weight(width, 2))
    return x + (features[:, :, None, None] if x.dim() == 4 else features[:, None])


def low_rank(net, x, seen, t):
    if x.dim() == 4:
        return x
    width = x.shape[-1]
    down = F.linear(x, net.weight(2, width))
    return F.linear(x, net.weight(width, width)) + 0.5 * F.linear(down, net.weight(width, 2))


def expanded(net, x, seen, t):
    return x + per_channel(net, x).expand_as(x)


def grouped_attention(net, x, seen, t):
    """Two heads of queries, one of keys and values, and a causal mask of -inf."""
    if x.dim() == 4:
        x = to_tokens(net, x, seen, t)
    width, length = x.shape[-1], x.shape[1]
    q = F.linear(x, net.weight(width, width)).view(1, length, 2, width // 2).transpose(1, 2)
    k, v = (F.linear(x, net.weight(width // 2, width))[:, None].expand(1, 2, -1, -1) for _ in range(2))
    scores = q @ k.transpose(-1, -2) * 0.5
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    attended = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return (attended + F.scaled_dot_product_attention(q, k, v)).transpose(1, 2).flatten(2)


def guided(net, x, seen, t):
    both = conv(net, torch.cat([x, x * 0.5]), seen, t)
    first, second = both.chunk(2)
    return first + 1.0 * (second - first)


def linear_attention(net, x, seen, t):
    if x.dim() == 4:
        x = to_tokens(net, x, seen, t)
    width = x.shape[-1]
    q, k, v = (F.linear(x, net.weight(width, width)).transpose(1, 2)[:, None] for _ in range(3))
    q, k = F.relu(q), F.relu(k).transpose(-1, -2)
    summed = F.pad(v, (0, 0, 0, 1), value=1.0) @ k @ q
    return (summed[:, :, :-1] / (summed[:, :, -1:] + 1e-2))[:, 0].transpose(1, 2)


def own_norm(net, x, seen, t):
    mean, square = x.mean(-1, keepdim=True), x.pow(2).mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt(square - mean.pow(2) + 0.1)


def repeated_cat(net, x, seen, t):
    if x.dim() == 3:
        return torch.cat([x, x], -1).chunk(2, -1)[1]
    return F.conv2d(torch.cat([x, x], 1), net.weight(x.shape[1], 2 * x.shape[1], 3, 3), padding=1)


def rms_norm(net, x, seen, t):
    if x.dim() == 4:
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 0.1) * net.weight(x.shape[1], 1, 1)
    return F.rms_norm(x, (x.shape[-1],), net.weight(x.shape[-1]))


def scaled_conv(net, x, seen, t):
    return conv(net, x * (per_channel(net, x) + 1), seen, t)


def idle(net, x, seen, t):
    return F.dropout(x * 1, 0.1, False).contiguous().to(torch.float32 if x.dtype == torch.float32 else x.dtype) + 0


LAYERS = {
    "activation": lambda net, x, seen, t: F.silu(x),
    "attention": attention,
    "batch norm": batch_norm,
    "channels last": channels_last,
    "constant factor": lambda net, x, seen, t: x * (per_channel(net, x) + 1),
    "constant summand": lambda net, x, seen, t: x + per_channel(net, x),
    "conv": conv,
    "expanded": expanded,
    "frames": frames,
    "geglu": geglu,
    "gelu": lambda net, x, seen, t: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "grouped attention": grouped_attention,
    "guided": guided,
    "linear attention": linear_attention,
    "own norm": own_norm,
    "repeated cat": repeated_cat,
    "rms norm": rms_norm,
    "scaled conv": scaled_conv,
    "hard swish": lambda net, x, seen, t: F.hardswish(x) * 0.5,
    "idle": idle,
    "in place": lambda net, x, seen, t: F.relu(x.exp().add_(1)).mul_(0.5),
    "low rank": low_rank,
    "mean": lambda net, x, seen, t: x + x.mean(1, keepdim=True).sigmoid(),
    "norm": norm,
    "pointwise": pointwise,
    "residual": lambda net, x, seen, t: x + seen[0] if seen[0].shape == x.shape else x,
    "shuffle": shuffle,
    "softmax": lambda net, x, seen, t: x.softmax(-1) + x,
    "swish": lambda net, x, seen, t: x * torch.sigmoid(x),
    "time": time,
    "to tokens": to_tokens,
    "twice": lambda net, x, seen, t: x.tanh() * 0.5 + x.tanh(),
    "upsample": upsample,
}


@dataclass(frozen=True)
class Captured:
    """A network's graph, its inputs by name, what it gives, and how far fp32 is from fp64 there."""

    layers: tuple[str, ...]
    seed: int
    program: torch.export.ExportedProgram = field(repr=False)
    given: dict[str, torch.Tensor] = field(repr=False)
    expected: torch.Tensor = field(repr=False)
    rounding: float


def captured(layers, seed):
    network = Network(layers, seed).eval()
    with torch.no_grad():
        program = torch.export.export(network, inputs())
    given = dict(zip(("x", "timestep"), inputs(), strict=True))
    (expected,) = evaluate(program, copy.deepcopy(given))
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(*[one.double() for one in inputs()])
    rounding = ((expected.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()
    assume(torch.isfinite(expected).all() and expected.abs().max() > 1e-3)
    return Captured(tuple(layers), seed, program, given, expected, rounding)


def drawn(seed):
    """A network of 3 to 8 layers and every pass with some options, in some order.

    From a seed, as hypothesis draws short lists of the first few choices, of which most passes find nothing to do.
    """
    random = Random(seed)
    made = captured(random.choices(sorted(LAYERS), k=random.randint(3, 8)), seed)
    passes = [parse(name + random.choice(OPTIONS.get(name, ("",))))[0] for name in NAMES]
    random.shuffle(passes)
    return made, passes


@pytest.fixture
def step(relative_error):
    """step(pass, (program, inputs, allowed so far), captured) -> the same three after the pass, checked."""

    def step(one, state, made):
        program, given, allowed = state
        before, after = one.equivalent_inputs(given)
        assert all(torch.equal(before[name], value) for name, value in given.items())
        result = one(program)
        if not result.modified:
            assert result.program is program
            return state
        assert signature(result.program) != signature(program), f"`{one}` says that it changed what it did not"
        result.program.graph.lint()
        allowed += one.tolerance
        (found,) = evaluate(result.program, copy.deepcopy(after))
        error = relative_error(made.expected, found)
        # Of a graph that is itself ill-conditioned no more is asked than a few times its own distance from fp64.
        limit = allowed + (16 * made.rounding if allowed else 0)
        assert error <= limit, f"`{one}`: relative error {error:.3g} > {limit:.3g}"
        return result.program, after, allowed

    return step


def signature(program):
    """What tells two programs apart: the graph's text, what holds its weights, and their bytes."""
    held = {name: (value.data_ptr(), tuple(value.shape)) for name, value in weights(program).items()}
    return str(program.graph), held


def bounded(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),  # the networks are small as they are; shrinking one takes minutes
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


@bounded(16)
@given(st.integers(0, 2**32))
def test_every_legal_order_of_a_few_passes(step, seed):
    """Two that have something to do, and one that at first has not."""
    made, passes = drawn(seed)
    start = (made.program, made.given, 0.0)
    states = {(one,): step(one, start, made) for one in passes[:12]}
    active = [order[0] for order, state in states.items() if state[0] is not made.program]
    idle = [one for one in passes[:12] if one not in active]
    chosen = active[:2] + idle[: 3 - len(active[:2])]
    for order in permutations(chosen):
        if order_problem(order) is not None:
            continue
        for length in range(2, len(order) + 1):
            if order[:length] not in states:
                states[order[:length]] = step(order[length - 1], states[order[: length - 1]], made)


@bounded(12)
@given(st.integers(0, 2**32))
def test_all_passes_in_a_legal_order(step, seed):
    made, waiting = drawn(seed)
    order = []
    while waiting:
        free = [one for one in waiting if not {*one.after, *one.needs} & {other.name for other in waiting}]
        assert free, f"no order is legal for {[one.name for one in waiting]}"
        order.append(free[0])
        waiting.remove(free[0])
    assert order_problem(order) is None
    state = (made.program, made.given, 0.0)
    for one in order:
        state = step(one, state, made)


def test_every_pass_has_something_to_do(step):
    """Alone or behind `functionalise` and `fold-constants`, on networks of all layers: an idle pass is untested."""
    images = [name for name in LAYERS if "attention" not in name and name not in ("to tokens", "low rank")]
    tokens = ["to tokens", *(name for name in LAYERS if name != "to tokens")]
    starts = []
    for network in (captured(images, 0), captured(tokens, 1), captured(["conv"], 2)):
        plain = (network.program, network.given, 0.0)
        ready = step(get_pass("fold-constants")(), step(get_pass("functionalise")(), plain, network), network)
        starts += [(plain, network), (ready, network)]
    idle = set()
    for name in NAMES:
        options = [parse(name + text)[0] for text in OPTIONS.get(name, ("",))]
        runs = ((one, start, network) for one in options for start, network in starts)
        if not any(step(one, start, network)[0] is not start[0] for one, start, network in runs):
            idle.add(name)
    assert idle == IDLE_ALONE


def test_every_layer_is_what_its_name_says():
    """A layer that does nothing tests nothing."""
    made = Counter()
    for layer in LAYERS:
        module = Network(["to tokens", layer, "to tokens", layer], 0).eval()
        with torch.no_grad():
            program = torch.export.export(module, inputs())
        made[layer] = len(list(program.graph.nodes))
    assert min(made.values()) > 6
