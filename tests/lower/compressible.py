"""A small network with every kind of op that a plan compresses, and plans for it, for the tests of Apple's backends."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from edgegen.graph.evaluate import evaluate
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import LowerRequest
from edgegen.precision.plan import OpPlan, Range
from edgegen.precision.quantize import quantized, tail
from edgegen.precision.sites import Site, sites
from edgegen.verify.metrics import sqnr_db

INPUT = TensorSpec(name="x", shape=(1, 4, 8, 8), dtype="float32")
OUTPUT = TensorSpec(name="y", shape=(1, 3, 16, 16), dtype="float32")
VARIANTS = {
    "w8": {"precision": "w8"},
    "w8 groups": {"precision": "w8", "group": 4},
    "w4": {"precision": "w4"},
    "w4 groups": {"precision": "w4", "group": 4},
    "palette 4": {"precision": "w4", "form": "palette"},
    "palette 4 groups": {"precision": "w4", "form": "palette", "group": 4},
    "palette 6": {"precision": "w6", "form": "palette"},
    "palette 8": {"precision": "w8", "form": "palette"},
    "w8a8": {"precision": "w8a8"},
    "w8a8-dynamic": {"precision": "w8a8-dynamic"},
}
OF_WEIGHTS = [name for name in VARIANTS if not name.startswith("w8a8")]
SITES = 8
"""Six with weights and two products of values."""


class Net(nn.Module):
    """Convolutions (one depthwise, one transposed, one with a relu), linears over tokens, products of values; ends
    with a scale and a shift, which converters fold into a convolution before them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.wide = nn.Linear(16, 32)
        self.narrow = nn.Linear(32, 16, bias=False)
        self.up = nn.ConvTranspose2d(16, 8, 4, 2, 1)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.conv_in(x))
        h = h + self.depthwise(h)
        tokens = h.flatten(2).transpose(1, 2)
        other = self.narrow(nn.functional.gelu(self.wide(tokens)))
        attention = torch.matmul(other, other.transpose(1, 2)).softmax(-1)
        tokens = tokens + torch.matmul(attention, tokens)
        h = tokens.transpose(1, 2).reshape(h.shape)
        return self.out(nn.functional.silu(self.up(h))) * 2 - 1


@dataclass(frozen=True)
class Quantized:
    """A graph with what a plan puts in, its ops, and what it computes of `inputs`: the fake-quant reference."""

    program: ExportedProgram
    ops: dict[str, OpPlan]
    inputs: dict[str, np.ndarray]
    reference: np.ndarray

    def request(self, folder: Path, precision: Any = "fp32", **options: str) -> LowerRequest:
        return LowerRequest("part", (INPUT,), (OUTPUT,), precision, folder, options, quantized=self.ops)

    def sqnr(self, value: np.ndarray) -> float:
        return sqnr_db(self.reference, value)


def net() -> tuple[ExportedProgram, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    module, x = Net().eval(), torch.randn(INPUT.shape)
    return torch.export.export(module, (x,)), {"x": x}


def plan(program: ExportedProgram, inputs: dict[str, torch.Tensor], choose: Any) -> dict[str, OpPlan]:
    """Ops by node, ranges those of `inputs`; `choose(site)` gives the fields of an op, or None for a float."""
    seen = dict(inputs)
    evaluate(program, inputs, lambda node, value: seen.__setitem__(node.name, value))
    nodes = {node.name: node for node in program.graph.nodes}

    def range_of(node: Any) -> Range:
        return Range(low=float(seen[node.name].min()), high=float(seen[node.name].max()))

    ops = {}
    for site in sites(program).values():
        fields, node = choose(site), nodes[site.node]
        if fields is None:
            continue
        if fields["precision"] == "w8a8":
            other = {"other": range_of(node.args[1])} if site.kind == "matmul" else {}
            fields = {**fields, "input": range_of(node.args[0]), "output": range_of(tail(node)), **other}
        ops[site.node] = OpPlan(op=site.kind, **fields)
    return ops


def all_in(variant: str) -> Any:
    """Every site in the variant, as far as it has weights, and groups that divide its channels."""
    fields = VARIANTS[variant]

    def choose(site: Site) -> dict[str, Any] | None:
        if site.weight is None:
            return fields if fields["precision"] == "w8a8" else None
        group = fields.get("group", 0)
        channels = site.shape[site.axis if fields.get("form") == "palette" else 1 - site.axis]
        return {**fields, "group": group if group and channels % group == 0 else 0}

    return choose


def quantize(program: ExportedProgram, inputs: dict[str, torch.Tensor], choose: Any) -> Quantized:
    ops = plan(program, inputs, choose)
    made = quantized(program, ops)
    (reference,) = evaluate(made, inputs)
    given = {name: value.numpy() for name, value in inputs.items()}
    return Quantized(made, ops, given, reference.float().numpy())
