"""A quantized graph run as runtimes run it: whole numbers between the codes that go in and those that come out.

In float arithmetic an int8 op's sum is rounded at every addition, and its code turns out otherwise wherever it lies
that close to a half. Runtimes add exactly, in int32, and round twice: the sum to float32, and that times one float32
factor to a code (XNNPACK's requantization, onnxruntime's). So does this, and the codes are theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node

from edgegen.graph.evaluate import arguments
from edgegen.precision.arithmetic import qd
from edgegen.precision.encode import ACTIVATION_MAX, ACTIVATION_MIN
from edgegen.precision.sites import CONVS, LINEAR

aten = torch.ops.aten
_EXACT = 2.0**24
"""Below it float32 holds every whole number."""


def evaluate_integers(
    program: ExportedProgram, inputs: Mapping[str, Tensor], *, half: bool = False
) -> tuple[Tensor, ...]:
    """Outputs of `program` on `inputs`, as `edgegen.graph.evaluate` gives them but for that arithmetic.

    `half`: every float that an op computes, reads as a weight or is given is rounded to float16, and computed with in
    float32; what lies between the codes of an int8 op is not, and neither are scales.
    """
    with torch.no_grad():
        outputs = _Run(program, half).run(*arguments(program, inputs), enable_io_processing=False)
    return tuple(outputs)


class _Sum(NamedTuple):
    """The int32 sums of a call, held by float32, and the step [N, 1, ...] of each output channel."""

    sums: Tensor
    steps: Tensor


class _Run(Interpreter):
    def __init__(self, program: ExportedProgram, half: bool) -> None:
        super().__init__(program.graph_module, garbage_collect_values=True)
        self._half = half
        self._sums: dict[str, _Sum] = {}
        self._scales: dict[str, Tensor] = {}

    def run_node(self, node: Node) -> Any:
        value = self._value(node)
        return value.half().float() if self._half and _is_halved(node, value) else value

    def _value(self, node: Node) -> Any:
        if node.target is qd.dequantize_per_channel.default:
            self._scales[node.name] = self.fetch_args_kwargs_from_env(node)[0][1].float()
        if node.target in (LINEAR, *CONVS) and _is_int8(node):
            made = self._sum(node)
            self._sums[node.name] = made
            return made.sums * made.steps
        source: Any = node.args[0] if node.args else None
        held = self._sums.pop(source.name, None) if isinstance(source, Node) else None
        if held is not None and node.target is aten.relu.default:
            self._sums[node.name] = held._replace(sums=held.sums.relu())
        elif held is not None and node.target is qd.quantize_per_tensor.default:
            scale, zero_point = self.fetch_args_kwargs_from_env(node)[0][1:3]
            factors = held.steps / torch.tensor(scale, dtype=torch.float32)
            codes = (held.sums * factors).round_().add_(zero_point)
            return codes.clamp_(ACTIVATION_MIN, ACTIVATION_MAX).to(torch.int8)
        return super().run_node(node)

    def _sum(self, node: Node) -> _Sum:
        given: list[Any] = list(self.fetch_args_kwargs_from_env(node)[0])
        source, weight = node.args[:2]
        assert isinstance(source, Node) and isinstance(weight, Node)
        scales, axis = self._scales[weight.name], int(weight.args[3])  # type: ignore[arg-type]
        input_scale = torch.tensor(source.args[1], dtype=torch.float32)
        steps = scales * input_scale  # exact: both have eleven bits
        shape = [1] * given[1].dim()
        shape[axis] = -1
        # A code times a scale of eleven bits is exact in float32, and so is what divides it again.
        given[0], given[1] = given[0] / input_scale, given[1] / scales.view(shape)
        bias = given[2] if len(given) > 2 else None
        reach = given[1].abs().sum([dim for dim in range(given[1].dim()) if dim != axis])
        reach = reach * given[0].abs().amax()
        if bias is not None:
            given[2] = (bias.double() / steps.double()).round().float()
            reach = reach + given[2].abs()
        if not float(reach.max()) < _EXACT:  # sums may not fit: as slow as it is exact
            given = [one.double() if isinstance(one, Tensor) else one for one in given]
        assert callable(node.target)
        sums: Tensor = node.target(*given, **node.kwargs).float()
        place = [1] * sums.dim()
        place[-1 if node.target is LINEAR else sums.dim() - given[1].dim() + 1] = -1
        return _Sum(sums, steps.view(place))


def _is_int8(node: Node) -> bool:
    """Whether a runtime computes this call in int8: from codes and int8 weights to codes, a relu between at most."""
    source, weight = node.args[:2]
    if not (isinstance(source, Node) and source.target is qd.dequantize_per_tensor.default):
        return False
    if not (isinstance(weight, Node) and weight.target is qd.dequantize_per_channel.default):
        return False
    readers = list(node.users)
    if len(readers) == 1 and readers[0].target is aten.relu.default:
        readers = list(readers[0].users)
    return len(readers) == 1 and readers[0].target is qd.quantize_per_tensor.default


def _is_halved(node: Node, value: Any) -> bool:
    """Whether float16 arithmetic rounds `value`, that of `node`."""
    if node.op == "output" or not isinstance(value, Tensor) or value.dtype is not torch.float32:
        return False
    quantizes = getattr(node.target, "namespace", "") == "quantized_decomposed"
    parameters = node.op == "placeholder" and any(_reads_codes(user) for user in node.users)
    return not quantizes and not parameters and not (node.target in (LINEAR, *CONVS) and _is_int8(node))


def _reads_codes(node: Node) -> bool:
    """A scale's reader, or an int8 op, whose bias is whole numbers."""
    if getattr(node.target, "namespace", "") == "quantized_decomposed":
        return node.target not in (qd.quantize_per_tensor.default,)
    return node.target in (LINEAR, *CONVS) and _is_int8(node)
