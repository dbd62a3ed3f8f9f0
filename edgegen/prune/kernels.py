"""Kernels: what an op's time depends on beside its widths, and small networks that do nothing else.

A kernel is timed at a few widths (`edgegen.prune.bench`), and a straight-edged surface through those times says what it
takes at any other (`edgegen.prune.cost`). Ops of one kernel share it, in whatever student they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.fx import Node

from edgegen.graph.attention import ATTENTION, read_attention
from edgegen.graph.count import op_name

Kind = Literal["conv", "transposed", "depthwise", "linear", "attention", "group_norm", "layer_norm", "pointwise"]
COPIES = 4
"""Of the kernel in one artifact, so that what a call costs beside it counts little."""
_POINTWISE = ("aten.silu", "aten.gelu", "aten.mul", "aten.sigmoid", "aten.tanh", "aten.hardswish")
_CONVS = ("aten.conv1d", "aten.conv2d", "aten.conv3d")
_TRANSPOSED = ("aten.conv_transpose2d",)


class Kernel(BaseModel):
    """`sizes`: conv and depthwise (kernel height, width, stride, height, width of what is read), linear (rows),
    attention (queries, keys, width of a head; it is as wide as it has heads), group_norm (places, groups), layer_norm
    (rows), pointwise (places)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    sizes: tuple[int, ...]

    @property
    def two_sided(self) -> bool:
        """Whether what it reads and what it writes have widths of their own."""
        return self.kind in ("conv", "transposed", "linear")

    @property
    def step(self) -> int:
        """Widths that it may have are multiples of this."""
        return self.sizes[1] if self.kind == "group_norm" else 1


def kernel_of(node: Node) -> Kernel | None:
    """The kernel that a call of a captured graph is; None for what moves values only, is fused into its neighbour (an
    addition, a ReLU, an upsampling), or has no rule."""
    name = op_name(node)
    if not isinstance(node.meta.get("val"), Tensor):
        return None
    if name in (*_CONVS, *_TRANSPOSED):
        return _convolution(node, name)
    shape = _shape(node)
    if name == "aten.linear":
        return Kernel(kind="linear", sizes=(max(1, math.prod(shape[:-1])),))
    if node.target is ATTENTION:
        call = read_attention(node)
        query, key = _shape(call.query), _shape(call.key)
        return Kernel(kind="attention", sizes=(query[-2], key[-2], query[-1]))
    if name == "aten.group_norm":
        groups: Any = node.args[1]
        return Kernel(kind="group_norm", sizes=(math.prod(shape[2:]), int(groups)))
    if name in ("aten.layer_norm", "aten.rms_norm"):
        return Kernel(kind="layer_norm", sizes=(math.prod(shape[:-1]),))
    if name in _POINTWISE and len(shape) > 1:
        channels = shape[-1] if len(shape) == 3 else shape[1]
        return Kernel(kind="pointwise", sizes=(math.prod(shape) // max(1, channels),))
    return None


def _convolution(node: Node, name: str) -> Kernel | None:
    read, weight = _shape(node.args[0]), _shape(node.args[1])
    if len(read) != 4:
        return None
    stride: Any = node.args[3] if len(node.args) > 3 else (1,)
    groups: Any = node.args[6] if len(node.args) > 6 else 1  # of transposed ones too
    sizes = (*weight[2:], int(stride[0]), *read[2:])
    if name in _TRANSPOSED:
        return Kernel(kind="transposed", sizes=sizes)
    return Kernel(kind="depthwise" if int(groups) > 1 else "conv", sizes=sizes)


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


class _Summed(nn.Module):
    """Each reads the same, and their answers are added up."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList([make() for _ in range(COPIES)])

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.each[0](x)
        for one in list(self.each)[1:]:
            made = made + one(x)
        return made


class _Chained(nn.Module):
    """Each reads what the one before wrote."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList([make() for _ in range(COPIES)])

    def forward(self, x: Tensor) -> Tensor:
        for one in self.each:
            x = one(x)
        return x


class _Attention(nn.Module):
    """Attention over keys that are values too; queries come in, [1, queries, heads * width]."""

    keys: Tensor

    def __init__(self, heads: int, keys: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.register_buffer("keys", torch.randn(1, heads, keys, width))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[1]
        queries = x.view(1, rows, self.heads, self.width).transpose(1, 2)
        made = F.scaled_dot_product_attention(queries, self.keys, self.keys)
        return made.transpose(1, 2).reshape(1, rows, self.heads * self.width)


class _Conv(nn.Conv2d):
    """With the padding that keeps the size, or halves it."""

    def __init__(self, read: int, written: int, sizes: tuple[int, ...], groups: int = 1) -> None:
        height, width, stride = sizes[:3]
        padding = ((height - 1) // 2, (width - 1) // 2)
        super().__init__(read, written, (height, width), stride, padding, groups=groups)


def network(kernel: Kernel, read: int, written: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A network of `COPIES` of the kernel, and the shape of its one input. `written` is `read` of what is not
    two-sided; attention counts heads."""
    sizes = kernel.sizes
    if kernel.kind in ("conv", "depthwise"):
        groups = read if kernel.kind == "depthwise" else 1
        return _Summed(lambda: _Conv(read, written, sizes, groups)), (1, read, *sizes[3:])
    if kernel.kind == "transposed":
        height, width, stride = sizes[:3]
        padding = ((height - stride + 1) // 2, (width - stride + 1) // 2)

        def transposed() -> nn.Module:
            return nn.ConvTranspose2d(read, written, (height, width), stride, padding)

        return _Summed(transposed), (1, read, *sizes[3:])
    if kernel.kind == "linear":
        return _Summed(lambda: nn.Linear(read, written)), (1, sizes[0], read)
    if kernel.kind == "attention":
        queries, keys, width = sizes
        return _Chained(lambda: _Attention(read, keys, width)), (1, queries, read * width)
    if kernel.kind == "group_norm":
        side = math.isqrt(sizes[0])
        shape = (side, side) if side * side == sizes[0] else (1, sizes[0])
        return _Chained(lambda: nn.GroupNorm(sizes[1], read)), (1, read, *shape)
    if kernel.kind == "layer_norm":
        return _Chained(lambda: nn.LayerNorm(read)), (1, sizes[0], read)
    return _Chained(nn.SiLU), (1, sizes[0], read)
