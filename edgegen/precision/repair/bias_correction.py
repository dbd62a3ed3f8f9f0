"""The mean of what quantization adds to an op's output, taken off its bias (Nagel et al. 2019, arXiv 1906.04721, 4.2).

Measured op by op on the inputs of the float graph: the mean over samples and places of float minus quantized output,
before the output itself is quantized. Weights may have been rounded before: float is what they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node

from edgegen.graph.edit import Editor, module_path, user_inputs, weights
from edgegen.precision.arithmetic import fake_quantized
from edgegen.precision.encode import encode_weight
from edgegen.precision.plan import COMPRESSED, OpPlan
from edgegen.precision.repair.tensors import Repaired, RepairRecord, Samples, Tensors, apply, mean, quantized_db
from edgegen.precision.sites import LINEAR, channel_axis


def correct_biases(
    reference: ExportedProgram,
    program: ExportedProgram,
    ops: Mapping[str, OpPlan],
    samples: Samples,
    held_out: Samples | None = None,
) -> Repaired:
    """`program` with biases that take off the mean errors of `ops` (by calls); an op without a bias gets one.

    `reference` is the float graph that `program` was rounded from, or `program` itself. Nothing is changed, and the
    record says so, where the quantized graph is not nearer to `reference` on `held_out` (`samples`, where None).
    """
    errors = _mean_errors(reference, program, ops, samples)
    editor = Editor(program, "bias-correction")  # for its values alone
    tensors: Tensors = {}
    changed, declined = [], {}
    for node in editor.nodes():
        if node.name not in errors:
            continue
        held: Any = node.args[2] if len(node.args) > 2 else None
        bias = editor.value(held)
        if held is not None and bias is None:
            declined[module_path(node)] = "its bias is computed"
            continue
        shift = mean(errors[node.name])
        tensors[f"{node.name}:2"] = (shift if bias is None else bias.detach().double() + shift).float()
        changed.append(module_path(node))
    judged = samples if held_out is None else held_out
    before = quantized_db(reference, program, ops, judged)
    repaired = apply(program, tensors)
    after = quantized_db(reference, repaired, ops, judged)
    if after <= before:
        reason = {"": f"the whole graph would be at {after:.2f} dB instead of {before:.2f}"}
        record = RepairRecord(
            name="bias-correction", changed=(), before_db=before, after_db=before, declined=declined | reason
        )
        return Repaired(program, {}, record)
    record = RepairRecord(
        name="bias-correction", changed=tuple(changed), before_db=before, after_db=after, declined=declined
    )
    return Repaired(repaired, tensors, record)


def _mean_errors(
    reference: ExportedProgram, program: ExportedProgram, ops: Mapping[str, OpPlan], samples: Samples
) -> dict[str, list[Tensor]]:
    """Call -> for each sample the mean error of each output channel."""
    coded, biases = {}, {}
    values = weights(program)
    for node in program.graph.nodes:
        op = ops.get(node.name)
        if op is None or op.op == "matmul" or op.precision not in COMPRESSED or node.args[1].name not in values:
            continue
        coded[node.name] = encode_weight(values[node.args[1].name], op, channel_axis(node)).decode()
        held: Any = node.args[2] if len(node.args) > 2 else None
        biases[node.name] = None if held is None else values.get(held.name)
    errors: dict[str, list[Tensor]] = {name: [] for name in coded}

    class Watched(Interpreter):
        def run_node(self, node: Node) -> Any:
            value = super().run_node(node)
            if node.name in coded:
                args: Any
                args, _ = self.fetch_args_kwargs_from_env(node)
                x, op = args[0], ops[node.name]
                if op.precision == "w8a8":
                    assert op.input is not None
                    x = fake_quantized(x, op.input)
                assert callable(node.target)
                made = node.target(x, coded[node.name], biases[node.name], *args[3:])
                axis = -1 if node.target is LINEAR else 1
                errors[node.name].append((value - made).movedim(axis, 0).flatten(1).double().mean(1))
            return value

    runner = Watched(reference.graph_module)
    for sample in samples:
        given_by_name = {**weights(reference), **{node.name: sample[node.name] for node in user_inputs(reference)}}
        given = [given_by_name[node.name] for node in reference.graph.nodes if node.op == "placeholder"]
        with torch.no_grad():
            runner.run(*given, enable_io_processing=False)
    return errors
