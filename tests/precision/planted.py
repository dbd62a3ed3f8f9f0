"""A small student's denoiser and the same with planted outlier channels: other weights, the same function.

Random networks have no outliers, and trained ones do; so a channel is made large in one layer and small again in the
next, wherever nothing but a scale lies between.
"""

import copy

import torch
from torch import nn


class Gated(nn.Module):
    """A GEGLU of two linears, as a transformer's feed-forward has it."""

    def __init__(self, width):
        super().__init__()
        self.value, self.gate = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.out(self.value(x) * nn.functional.gelu(self.gate(x)))


class Plain(nn.Module):
    """A residual block of relus, one with SiLU, and a transformer's feed-forward."""

    def __init__(self, width=32):
        super().__init__()
        self.conv_in = nn.Conv2d(4, width, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(8, width)
        self.proj = nn.Conv2d(width, width, 1)
        self.silu_conv = nn.Conv2d(width, width, 3, padding=1)
        self.layer_norm, self.feed = nn.LayerNorm(width), Gated(width)
        self.conv_out = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, latent):
        x = self.conv_in(latent)
        x = x + self.conv3(torch.relu(self.conv2(torch.relu(self.conv1(x)))))
        h = self.proj(self.norm(x))
        h = self.silu_conv(nn.functional.silu(h))
        tokens = h.flatten(2).transpose(1, 2)
        tokens = tokens + self.feed(self.layer_norm(tokens))
        return self.conv_out(x + tokens.transpose(1, 2).reshape(x.shape))


def planted(module, factor=200.0, channel=3):
    """A copy of `module` with that channel `factor` times as large between every two layers that allow it."""
    made = copy.deepcopy(module)
    with torch.no_grad():
        for writer, reader in ((made.conv1, made.conv2), (made.conv2, made.conv3), (made.feed.value, made.feed.out)):
            writer.weight[channel] *= factor
            writer.bias[channel] *= factor
            reader.weight[:, channel] /= factor
        made.norm.weight[channel] *= factor
        made.norm.bias[channel] *= factor
        made.proj.weight[:, channel] /= factor
    return made


def network(seed=5, width=32):
    """`Plain` with random weights, in evaluation, and samples of its input."""
    torch.manual_seed(seed)
    module = Plain(width).eval()
    with torch.no_grad():
        for norm in (module.norm, module.layer_norm):
            norm.weight.normal_(1.0, 0.2)
            norm.bias.normal_(0.0, 0.1)
    return module, [{"latent": torch.randn(1, 4, 16, 16)} for _ in range(6)]


def exported(module, samples):
    """The graph of `module`, as a plan's graphs are made."""
    from edgegen.rewrite.fold_norm_affine import FoldNormAffine
    from edgegen.rewrite.pipeline import Pipeline

    with torch.no_grad():
        program = torch.export.export(module, tuple(samples[0].values()))
    return Pipeline((FoldNormAffine(),)).run(program)[0]


def plan(program, samples, precision="w8a8", skip=(), **fields):
    """Call -> how it is computed, every conv and linear in one precision, by ranges of `samples`."""
    from edgegen.graph.evaluate import evaluate
    from edgegen.precision.plan import OpPlan, Range
    from edgegen.precision.quantize import tail
    from edgegen.precision.sites import sites

    seen = {}

    def note(name, value):
        if torch.is_tensor(value):
            low, high = seen.get(name, (0.0, 0.0))
            seen[name] = (min(low, value.min().item()), max(high, value.max().item()))

    for one in samples:
        evaluate(program, one, lambda node, value: note(node.name, value))
        for name, value in one.items():
            note(name, value)
    calls, ops = {node.name: node for node in program.graph.nodes}, {}
    for key, site in sites(program).items():
        if site.kind != "matmul" and key not in skip:
            node = calls[site.node]
            given, made = seen[node.args[0].name], seen[tail(node).name]
            ranges = {"input": Range(low=given[0], high=given[1]), "output": Range(low=made[0], high=made[1])}
            ops[site.node] = OpPlan(op=site.kind, precision=precision, **ranges, **fields)
    return ops
