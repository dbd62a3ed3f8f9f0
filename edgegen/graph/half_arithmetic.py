"""What a runtime that computes in float16 makes of a float16 graph, in torch.

Torch's own float16 kernels keep sums and the inside of norms in float32, as few phones do. `Arithmetic` says how much
of an op is rounded:

- `fused`: only what an op returns is float16 (torch on a CPU, onnxruntime's CPU kernels);
- `decomposed`: norms, attention and other composite ops are computed op by op, and each step is float16; sums keep a
  wider accumulator (Core ML, XNNPACK, GPU delegates);
- `accumulating`: sums are float16 as well, added in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node

from edgegen.graph.edit import user_inputs, weights

aten = torch.ops.aten
Arithmetic = Literal["fused", "decomposed", "accumulating"]
HALF_MAX = 65504.0
SMALLEST_NORMAL = 2.0**-14
SMALLEST = 2.0**-24


def run_half(
    program: ExportedProgram,
    inputs: Mapping[str, Tensor],
    arithmetic: Arithmetic = "decomposed",
    watch: Callable[[Node, Any], None] | None = None,
) -> tuple[Tensor, ...]:
    """Outputs of a float16 graph (see `to-half`) on `inputs` when it is computed with `arithmetic`.

    `watch` sees the value of every call. KeyError for an input that is missing.
    """
    held = {**weights(program), **{node.name: inputs[node.name] for node in user_inputs(program)}}
    given = [held[node.name] for node in program.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        return tuple(_Runner(program, arithmetic, watch).run(*given, enable_io_processing=False))


def sqnr_db(reference: Tensor, measured: Tensor) -> float:
    """10 log10(sum r^2 / sum (r - m)^2); +inf when equal, -inf when `measured` is not finite where `reference` is."""
    a, b = reference.double(), measured.double()
    finite = torch.isfinite(a)
    if not torch.isfinite(b[finite]).all():
        return -math.inf
    noise, signal = (a - b)[finite].square().sum().item(), a[finite].square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


class _Runner(Interpreter):
    def __init__(
        self, program: ExportedProgram, arithmetic: Arithmetic, watch: Callable[[Node, Any], None] | None
    ) -> None:
        super().__init__(program.graph_module, garbage_collect_values=True)
        self._arithmetic = arithmetic
        self._watch = watch

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if self._watch is not None and n.op == "call_function":
            self._watch(n, value)
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call_half(target, args, kwargs, self._arithmetic)


def call_half(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], arithmetic: Arithmetic) -> Any:
    """One call; what is not float16, or has no steps inside, is torch's own."""
    step = _STEPS.get(target)
    first = next((one for one in args if isinstance(one, Tensor)), None)
    if first is None or first.dtype is not torch.float16:
        return target(*args, **kwargs)
    if target in _PRODUCTS:
        # Torch has no fast float16 product on a CPU; rounding the float32 one is what its kernels do, slowly.
        wide: Tensor = target(*(one.float() if isinstance(one, Tensor) else one for one in args), **kwargs)
        return wide.half()
    if step is None or arithmetic == "fused":
        return target(*args, **kwargs)
    return step(_wide_sum if arithmetic == "decomposed" else _half_sum, *args, **kwargs)


def local_sqnr(
    program: ExportedProgram, inputs: Mapping[str, Tensor], arithmetic: Arithmetic = "decomposed"
) -> dict[str, float]:
    """What each call of a float32 graph alone loses in float16, in dB: its inputs are right, only rounded."""
    return _Local(program, arithmetic).measure(inputs)


class _Local(Interpreter):
    def __init__(self, program: ExportedProgram, arithmetic: Arithmetic) -> None:
        super().__init__(program.graph_module, garbage_collect_values=True)
        self._program = program
        self._arithmetic = arithmetic
        self.found: dict[str, float] = {}

    def measure(self, inputs: Mapping[str, Tensor]) -> dict[str, float]:
        held = {**weights(self._program), **{node.name: inputs[node.name] for node in user_inputs(self._program)}}
        given = [held[node.name] for node in self._program.graph.nodes if node.op == "placeholder"]
        with torch.no_grad():
            self.run(*given, enable_io_processing=False)
        return self.found

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor) and value.dtype is torch.float32 and n.all_input_nodes:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            rounded = call_half(n.target, _rounded(args), _rounded(kwargs), self._arithmetic)
            self.found[n.name] = sqnr_db(value, rounded)
        return value


def _rounded(value: Any) -> Any:
    """Arguments as a float16 graph has them."""
    if isinstance(value, Tensor):
        return value.half() if value.dtype is torch.float32 else value
    if value is torch.float32:
        return torch.float16
    if isinstance(value, float) and HALF_MAX < abs(value) < math.inf:
        return math.copysign(math.inf, value)
    if isinstance(value, tuple | list):
        return type(value)(_rounded(one) for one in value)
    return {key: _rounded(one) for key, one in value.items()} if isinstance(value, dict) else value


Sum = Callable[[Tensor, list[int]], Tensor]


def _wide_sum(x: Tensor, dims: list[int]) -> Tensor:
    """Sum with a float32 accumulator, not yet rounded: a mean divides before it rounds."""
    return x.float().sum(dims, keepdim=True)


def _half_sum(x: Tensor, dims: list[int]) -> Tensor:
    """Sum whose every addition is rounded to float16, halves onto halves."""
    rank = x.ndim
    dims = [dim % rank for dim in dims]
    kept = [dim for dim in range(rank) if dim not in dims]
    flat = x.permute(*kept, *dims).reshape(*(x.shape[dim] for dim in kept), -1)
    while flat.shape[-1] > 1:
        if flat.shape[-1] % 2:
            flat = torch.nn.functional.pad(flat, (0, 1))
        half = flat.shape[-1] // 2
        flat = flat[..., :half] + flat[..., half:]
    return flat.reshape([1 if dim in dims else x.shape[dim] for dim in range(rank)])


def _mean(total: Sum, x: Tensor, dims: list[int]) -> Tensor:
    count = math.prod(x.shape[dim] for dim in dims)
    return (total(x, dims) / count).half()


def _standardise(total: Sum, x: Tensor, dims: list[int], eps: float, centre: bool) -> Tensor:
    if centre:
        x = x - _mean(total, x, dims)
    variance = _mean(total, x * x, dims)
    return x * torch.rsqrt(variance + torch.tensor(eps, dtype=torch.float16))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int]) -> Tensor:
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _group_norm(
    total: Sum,
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    _cudnn: bool = True,
) -> Tensor:
    grouped = x.reshape(x.shape[0], groups, -1)
    y = _standardise(total, grouped, [2], eps, True).reshape(x.shape)
    return _affine(y, weight, bias, [1, -1, *[1] * (x.ndim - 2)])


def _layer_norm(
    total: Sum,
    x: Tensor,
    shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    _cudnn: bool = True,
) -> Tensor:
    dims = list(range(x.ndim - len(shape), x.ndim))
    return _affine(_standardise(total, x, dims, eps, True), weight, bias, list(shape))


def _rms_norm(
    total: Sum, x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    dims = list(range(x.ndim - len(shape), x.ndim))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _affine(_standardise(total, x, dims, eps, False), weight, None, list(shape))


def _softmax(total: Sum, x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    powers = torch.exp(x - x.amax(dim, keepdim=True))
    return powers / total(powers, [dim]).half()


def _attention(
    total: Sum,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    _dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (one.repeat_interleave(query.shape[-3] // one.shape[-3], -3) for one in (key, value))
    scores = (query.float() @ key.float().transpose(-1, -2)).half() * (
        query.shape[-1] ** -0.5 if scale is None else scale
    )
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, -6e4)
    elif mask is not None:
        scores = scores + mask
    return (_softmax(total, scores, -1).float() @ value.float()).half()


def _dims(x: Tensor, dims: Any) -> list[int]:
    if dims is None or dims == []:
        return list(range(x.ndim))
    return [dims] if isinstance(dims, int) else list(dims)


def _reduced(y: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    return y if keepdim else y.squeeze(dims)


def _sum_op(total: Sum, x: Tensor, dims: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    over = _dims(x, dims)
    return _reduced(total(x, over).half(), over, keepdim)


def _mean_op(
    total: Sum, x: Tensor, dims: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    over = _dims(x, dims)
    return _reduced(_mean(total, x, over), over, keepdim)


def _vector_norm(
    total: Sum, x: Tensor, order: float = 2, dims: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    over = _dims(x, dims)
    if order != 2:
        other: Tensor = torch.linalg.vector_norm(x, order, over, keepdim)
        return other
    return _reduced(total(x * x, over).half().sqrt(), over, keepdim)


_PRODUCTS = frozenset(
    (
        aten.linear.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv2d.padding,
        aten.conv3d.default,
        aten.matmul.default,
        aten.bmm.default,
        aten.mm.default,
    )
)
_STEPS: dict[Any, Callable[..., Tensor]] = {
    aten.group_norm.default: _group_norm,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    aten.scaled_dot_product_attention.default: _attention,
    aten.sum.default: _sum_op,
    aten.sum.dim_IntList: _sum_op,
    aten.mean.default: _mean_op,
    aten.mean.dim: _mean_op,
    aten.linalg_vector_norm.default: _vector_norm,
}
