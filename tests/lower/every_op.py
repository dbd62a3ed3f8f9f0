"""A network with every kind of op that a plan may name, each giving an output, and hand-made plans for its graph."""

from functools import cached_property

import numpy as np
import torch
from torch import nn


class Network(nn.Module):
    """Picture [1, 8, 10, 10] and tokens [1, 10, 32] in; one output a kind of op, the last three of two in a row.

    Many read what `stem` gives: a mean, a difference, a sum, a concatenation and, as a matrix, a linear. Runtimes that
    keep pictures channels last have to turn it there.
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.transposed = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1)
        self.row = nn.Conv1d(10, 12, 3, padding=1)
        self.projection = nn.Linear(32, 24)
        self.plain = nn.Linear(32, 16, bias=False)
        self.stem = nn.Conv2d(8, 12, 3, padding=1)
        self.down = nn.Conv2d(12, 10, 3, stride=2, padding=1)
        self.mix = nn.Conv2d(24, 6, 1, bias=False)
        self.columns = nn.Linear(100, 5)
        self.squashed = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, picture, tokens):
        heads = tokens.view(1, 10, 4, 8).transpose(1, 2).reshape(4, 10, 8)
        stem = self.stem(picture)
        residual = torch.nn.functional.silu(stem - stem.mean((2, 3), keepdim=True)) + stem
        return (
            self.conv(picture),
            self.grouped(picture),
            self.depthwise(picture),
            self.transposed(picture),
            self.row(tokens),
            self.projection(tokens),
            self.plain(tokens),
            torch.bmm(heads, heads.transpose(1, 2)) + 1.0,
            self.down(residual),
            self.mix(torch.cat([residual, stem], 1)),
            self.columns(stem.flatten(2)),
            torch.relu(self.squashed(torch.tanh(picture / 3.0) * 3.0)),
        )


class EveryOp:
    """The exported network, inputs for it, plans, and how near an artifact is to a graph."""

    def __init__(self):
        torch.manual_seed(0)
        self.module = Network().eval()
        self.inputs = {"picture": torch.randn(1, 8, 10, 10) * 2 + 0.5, "tokens": torch.randn(1, 10, 32) * 3}
        with torch.no_grad():
            self.program = torch.export.export(self.module, tuple(self.inputs.values()))

    @cached_property
    def _ranges(self):
        from edgegen.graph.evaluate import evaluate
        from edgegen.precision.plan import Range

        found = {name: Range(low=float(v.min()), high=float(v.max())) for name, v in self.inputs.items()}

        def watch(node, value):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                found[node.name] = Range(low=float(value.min()), high=float(value.max()))

        evaluate(self.program, self.inputs, watch)
        return found

    def plan(self, precision, others=None, **changes):
        """Node name -> OpPlan: `precision`, or what `others` says for a module; matmuls are w8a8 or left out."""
        from edgegen.precision.plan import OpPlan
        from edgegen.precision.sites import sites

        nodes, ops = {node.name: node for node in self.program.graph.nodes}, {}
        for key, site in sites(self.program).items():
            chosen = (others or {}).get(key, precision)
            if site.kind == "matmul" and chosen != "w8a8":
                continue
            node, fields = nodes[site.node], dict(changes)
            if chosen == "w8a8":
                fields |= {"input": self._ranges[node.args[0].name], "output": self._ranges[node.name]}
                if site.kind == "matmul":
                    fields["other"] = self._ranges[node.args[1].name]
            ops[site.node] = OpPlan(op=site.kind, precision=chosen, **fields)
        return ops

    def request(self, folder, ops, precision="fp32"):
        from edgegen.graph.capture import signature
        from edgegen.graph.tensor_spec import TensorSpec
        from edgegen.lower.backend import LowerRequest

        (values,) = self.program.graph.output_node().args
        outputs = tuple(
            TensorSpec(name=f"output_{place}", shape=tuple(value.meta["val"].shape), dtype="float32")
            for place, value in enumerate(values)
        )
        return LowerRequest("every_op", signature(self.program), outputs, precision, folder, quantized=ops)

    def run(self, backend, path):
        request = self.request(path.parent, {})
        executable = backend.load(path, request.inputs, request.outputs)
        values = executable({name: value.numpy() for name, value in self.inputs.items()})
        return [values[f"output_{place}"] for place in range(len(request.outputs))]

    def parity(self, backend, path, program):
        """Output -> SQNR in dB of the artifact against `program` in torch."""
        from edgegen.graph.evaluate import evaluate

        expected = evaluate(program, self.inputs)
        found = self.run(backend, path)
        return {
            place: sqnr_db(one.numpy(), other) for place, (one, other) in enumerate(zip(expected, found, strict=True))
        }


def sqnr_db(reference, value):
    reference, value = reference.astype(np.float64), value.astype(np.float64)
    return 10 * np.log10((reference**2).sum() / max(((reference - value) ** 2).sum(), 1e-30))
