"""One linear or convolution for each part that its output is cut into."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.rewrite.base import Decline, Pass, Rewritten, decline

aten = torch.ops.aten
LINEARS = (aten.linear.default,)
CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
SPLITS = (
    aten.chunk.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.tensor_split.sections,
    aten.unsafe_chunk.default,
)
VIEWS = (aten.view.default, aten.reshape.default, aten.unflatten.int)
PERMUTES = (aten.permute.default, aten.transpose.int)
_SLICE = ((1, "dim"), (2, "start"), (3, "end"), (4, "step"))
_GROUPS = 6  # the place of `groups` among a convolution's arguments


@dataclass(frozen=True)
class _Part:
    """`node` reads the features `start` to `end` of a product; `shape` and `order` undo what lay between the two."""

    node: Node
    start: int
    end: int
    shape: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SplitChunkedLinear(Pass):
    """A linear or a convolution whose output is only cut along its features becomes one a part.

        %h: f32[1, L, 2N] = aten.linear(%x, %w, %b)        %value: f32[1, L, N] = aten.linear(%x, %w[:N], %b[:N])
        %c = aten.chunk(%h, 2, -1)                    ->   %gate: f32[1, L, N] = aten.linear(%x, %w[N:], %b[N:])
        %value, %gate = getitem(%c, 0), getitem(%c, 1)

    The same for `split`, `split_with_sizes`, plain slices, and for a fused projection that is viewed as
    [..., 3, heads, dim], permuted or not, and then unbound. Features that nothing reads are not computed any more.
    A delegate without a split (XNNPACK) keeps one piece; the others save a copy. The sums are those of the original;
    a matrix product of another width may add them in another order.

    Declines
    1. the parts are cut along another axis than the features (the last of a linear, the second of a convolution);
    2. something beside the parts reads the whole output;
    3. parts overlap or skip features in steps: they would be computed twice, or their weights gathered;
    4. the weight or bias is computed, or another call reads it: the file would hold it twice;
    5. a grouped convolution: a part's features may come from several groups.
    """

    name: ClassVar[str] = "split-chunked-linear"
    after: ClassVar[tuple[str, ...]] = ("remove-identities", "fold-constants")
    tolerance: ClassVar[float] = 1e-5

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        declined: list[Decline] = []
        modified = False
        for node in editor.nodes(*LINEARS, *CONVS):
            if not any(_cuts(user) for user in node.users):
                continue
            parts = _parts(node)
            reason = parts if isinstance(parts, str) else _refusal(node, parts, editor)
            if isinstance(parts, str) or reason is not None:
                declined.append(decline(node, reason or ""))
                continue
            for part in parts:
                _replace(node, part, editor)
            modified = True
        if not modified:
            return Rewritten(program, False, tuple(declined))
        return Rewritten(editor.finish(), True, tuple(declined))


def _cuts(node: Node) -> bool:
    """Whether `node` takes parts of its argument, itself or behind a view."""
    if node.target in SPLITS or node.target is aten.slice.Tensor:
        return True
    return node.target in VIEWS and any(
        user.target is aten.unbind.int
        or (user.target in PERMUTES and any(u.target is aten.unbind.int for u in user.users))
        for user in node.users
    )


def _axis(node: Node) -> int:
    """The axis of the features; a convolution may lack the one of the batch."""
    rank, args = int(node.meta["val"].dim()), cast(Any, node.args)
    return rank - 1 if node.target in LINEARS else rank + 1 - int(args[1].meta["val"].dim())


def _parts(node: Node) -> tuple[_Part, ...] | str:
    """Who reads which features of `node`, or why that cannot be said."""
    axis, users = _axis(node), list(node.users)
    rank, width = node.meta["val"].dim(), int(node.meta["val"].shape[axis])
    if all(user.target is aten.slice.Tensor for user in users):
        parts = []
        for user in users:
            dim, start, end, step = (_argument(user, place, name) for place, name in _SLICE)
            if (dim or 0) % rank != axis or step not in (None, 1):
                return f"slice `{user.name}` is not a run of features"
            low, high = (_place(value, width, default) for value, default in ((start, 0), (end, width)))
            parts.append(_Part(user, low, high))
        return tuple(parts)
    if len(users) > 1 or users[0].op == "output":
        other = next(user for user in users if not _cuts(user) or len(users) > 1)
        return f"`{other.name}` reads its whole output too"
    (user,) = users
    if user.target not in SPLITS:
        return _unbound(node, user, axis)
    dim = _argument(user, 2, "dim") or 0
    if dim % rank != axis:
        return f"`{user.name}` cuts axis {dim}, which is not that of the features"
    ends = torch.tensor([0] + [int(part.shape[axis]) for part in user.meta["val"]]).cumsum(0).tolist()
    return tuple(_Part(item, ends[place], ends[place + 1]) for item, place in _items(user))


def _argument(node: Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def _items(node: Node) -> list[tuple[Node, int]]:
    """Who takes which of a call's several results."""
    return [(item, int(cast(Any, item.args[1]))) for item in node.users if item.target is operator.getitem]


def _unbound(node: Node, view: Node, axis: int) -> tuple[_Part, ...] | str:
    """Parts of `unbind(permute(view(node)))`, where the view puts the part outermost among the features."""
    shape, source = list(view.meta["val"].shape), list(node.meta["val"].shape)
    if axis != len(source) - 1 or shape[:axis] != source[:axis] or len(shape) < axis + 2:
        return f"`{view.name}` regroups more than the features"
    if len(view.users) > 1:
        return f"`{view.name}` has several readers"
    last = next(iter(view.users))
    order = list(range(len(shape)))
    if last.target in PERMUTES:
        if len(last.users) > 1:
            return f"`{last.name}` has several readers"
        args: Any = last.args
        if last.target is aten.permute.default:
            order = [axis % len(shape) for axis in args[1]]
        else:
            a, b = (axis % len(shape) for axis in args[1:3])
            order[a], order[b] = order[b], order[a]
        last = next(iter(last.users))
    if last.target is not aten.unbind.int:
        return f"`{last.name}` reads its whole output too"
    dim = (_argument(last, 1, "dim") or 0) % len(shape)
    if order[dim] != axis:
        return f"`{last.name}` takes parts that are not runs of features"
    step = source[axis] // shape[axis]
    rest = [d - (d > axis) for d in order if d != axis]
    moved = None if rest == sorted(rest) else tuple(rest)
    kept = tuple(shape[:axis] + shape[axis + 1 :])
    return tuple(_Part(item, place * step, (place + 1) * step, kept, moved) for item, place in _items(last))


def _place(value: Any, width: int, default: int) -> int:
    if value is None:
        return default
    return min(max(int(value) + (width if value < 0 else 0), 0), width)


def _refusal(node: Node, parts: tuple[_Part, ...], editor: Editor) -> str | None:
    ranges = sorted((part.start, part.end) for part in parts)
    if any(later[0] < earlier[1] for earlier, later in pairwise(ranges)):
        return "its parts overlap"
    for weight in node.args[1:3]:
        if weight is None:
            continue
        if editor.value(weight) is None:
            return "its weights are computed"
        if isinstance(weight, Node) and len(weight.users) > 1:
            return f"`{weight.name}` is read by another call"
    if node.target in CONVS and len(node.args) > _GROUPS and node.args[_GROUPS] != 1:
        return "a grouped convolution"
    return None


def _replace(node: Node, part: _Part, editor: Editor) -> None:
    x, weight, bias = (*node.args, None)[:3]
    value, offset = editor.value(weight), editor.value(bias)
    assert value is not None
    mark = f"{part.start}_{part.end}"
    with editor.at(part.node):
        rows = editor.constant(value[part.start : part.end], editor.named(node, f"weight_{mark}"))
        biases = None
        if offset is not None:
            biases = editor.constant(offset[part.start : part.end], editor.named(node, f"bias_{mark}"))
    with editor.at(node):
        new = editor.call(node.target, x, rows, biases, *node.args[3:], **node.kwargs)
    with editor.at(part.node):
        if part.shape is not None:
            new = editor.call(aten.reshape.default, new, list(part.shape))
        if part.order is not None:
            new = editor.call(aten.permute.default, new, list(part.order))
        editor.replace(part.node, new)
