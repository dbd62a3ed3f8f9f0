"""Linear attention without a row of ones, without a matrix of tokens by tokens, and with channels before tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.graph.rearrange import permuted
from edgegen.rewrite.base import Decline, Pass, Rewritten, decline
from edgegen.rewrite.channels_first_attention import ends
from edgegen.rewrite.merge_rearrangements import chain, emit

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default)
CASTS = (aten.to.dtype, aten._to_copy.default)


@dataclass(frozen=True)
class _Linear:
    """query [..., D, L], key [..., S, D], value [..., V, S]; each given as a node and whether that is its transpose."""

    query: tuple[Node, bool]
    key: tuple[Node, bool]
    value: tuple[Node, bool]
    tokens_first: bool
    """Whether the result is [..., L, V], not [..., V, L]."""


@dataclass(frozen=True)
class MobileLinearAttention(Pass):
    """Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236): sum_s v_s (k_s . q) / (sum_s k_s . q + eps).

    As SANA and MobileI2V (arXiv 2511.21475) write it, with q and k behind a ReLU, the denominator is one more row:

        %p = aten.pad(%v: [B, H, V, S], [0, 0, 0, 1], "constant", 1.0)
        %o = aten.matmul(aten.matmul(%p, %k: [B, H, S, D]), %q: [B, H, D, L])
        %y = aten.div(aten.slice(%o, 2, 0, -1), aten.add(aten.slice(%o, 2, -1), eps))

    becomes

        %n = aten.matmul(aten.matmul(%v, %k), %q)                       # [B, H, V, L]
        %d = aten.matmul(aten.sum(%k, [-2], True), %q)                  # [B, H, 1, L]
        %y = aten.div(%n, aten.add(%d, eps))

    so that nothing has V + 1 channels and the values are not copied for their row of ones. The division stays one: the
    inverse of a small denominator leaves fp16's range where the quotient does not (measured: NaN where a query is 0
    behind its ReLU), and Core ML tools' `reciprocal` adds an epsilon of 1e-4 of its own.
    Also recognised: tokens before channels ([B, H, L, D], the result is transposed once), ones that are concatenated,
    denominators of their own (`q @ sum(k)`, `(q * sum(k)).sum(-1)`), and either order of the two products: q k^T first
    is a matrix of L x S.

    `total` says how the keys are summed: `sum` as above; `product` with a row of ones, aten.bmm(%ones, %k), for a
    delegate that sums over no tokens. Operands of three axes are multiplied by `bmm`, which no runtime broadcasts.

    The scaling that keeps the sums inside fp16's range is `prescale-sums`'s.

    Declines
    1. numerator and denominator that are not made of the same queries and keys;
    2. a product computed in another precision than its operands: the casts are for its range, which is not proven;
    3. more than four axes, or batch axes that broadcast;
    4. fewer tokens than channels, where products in this order take more multiplications than in the other.
    """

    total: Literal["sum", "product"] = "sum"

    name: ClassVar[str] = "mobile-linear-attention"
    after: ClassVar[tuple[str, ...]] = ("remove-identities", "fold-constants")
    tolerance: ClassVar[float] = 1e-5

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        declined: list[Decline] = []
        modified = False
        for node in editor.nodes(aten.div.Tensor):
            found = _read(node)
            if isinstance(found, str):
                declined.append(decline(node, found))
            elif found is not None:
                reason = _refusal(found)
                if reason is not None:
                    declined.append(decline(node, reason))
                    continue
                _write_out(editor, node, found, self.total)
                modified = True
        if not modified:
            return Rewritten(program, False, tuple(declined))
        return Rewritten(editor.finish(), True, tuple(declined))


def _read(node: Node) -> _Linear | str | None:
    """The attention whose last step is the division `node`; why it is none though it looks like one; None."""
    numerator, shifted = node.args[:2]
    if not isinstance(numerator, Node) or not isinstance(shifted, Node):
        return None
    if shifted.target is not aten.add.Tensor or isinstance(shifted.args[1], Node):
        return None
    denominator = shifted.args[0]
    assert isinstance(denominator, Node)
    cast = numerator.target in CASTS or denominator.target in CASTS
    for name in (numerator, denominator):
        inner = name.args[0] if name.target is aten.slice.Tensor else name
        cast = cast or (isinstance(inner, Node) and inner.target in CASTS)
    if cast and any(_under_casts(one).target in PRODUCTS for one in (numerator, denominator)):
        return "its sums are computed in another precision than its operands"
    if numerator.target is aten.slice.Tensor and denominator.target is aten.slice.Tensor:
        return _with_ones(numerator, denominator)
    if numerator.target in PRODUCTS:
        return _with_sum(numerator, denominator)
    return None


def _under_casts(node: Node) -> Node:
    while node.target in (*CASTS, aten.slice.Tensor) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _with_ones(numerator: Node, denominator: Node) -> _Linear | str | None:
    product = numerator.args[0]
    if not isinstance(product, Node) or denominator.args[0] is not product or product.target not in PRODUCTS:
        return None
    rank = product.meta["val"].dim()
    axis, first, last = _range(numerator)
    other, start, end = _range(denominator)
    size = int(product.meta["val"].shape[axis])
    if axis != other or (first, last, start, end) != (0, size - 1, size - 1, size) or axis < rank - 2:
        return None
    tokens_first = axis == rank - 1
    for query, key, padded in _factors(product, tokens_first):
        value = _without_ones(padded, axis)
        if value is not None:
            return _Linear(query, key, (value, tokens_first), tokens_first)
    return "it divides by its last row, which is not made by a row of ones"


def _range(node: Node) -> tuple[int, int, int]:
    """Axis, first and last + 1 of a slice of step 1; (0, 0, 0) for another."""
    source = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    given: list[Any] = [*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :]]
    axis, first, last, step = given
    axis %= len(source)
    if step != 1:
        return 0, 0, 0
    begin, end, _ = slice(first, last).indices(int(source[axis]))
    return axis, begin, end


Operand = tuple[Node, bool]


def _factors(product: Node, tokens_first: bool) -> list[tuple[Operand, Operand, Node]]:
    """(query, key, values) for either order of the two products; values as they are in `product`."""
    left, right = product.args[:2]
    assert isinstance(left, Node) and isinstance(right, Node)
    found: list[tuple[Operand, Operand, Node]] = []
    if tokens_first:  # q (k^T v) or (q k^T) v
        if right.target in PRODUCTS:
            turned, value = right.args[:2]
            found.append(((left, True), (turned, True), value))  # type: ignore[arg-type]
        if left.target in PRODUCTS:
            query, turned = left.args[:2]
            found.append(((query, True), (turned, True), right))  # type: ignore[arg-type]
    else:  # (v k) q or v (k q)
        if left.target in PRODUCTS:
            value, key = left.args[:2]
            found.append(((right, False), (key, False), value))  # type: ignore[arg-type]
        if right.target in PRODUCTS:
            key, query = right.args[:2]
            found.append(((query, False), (key, False), left))  # type: ignore[arg-type]
    return found


def _without_ones(node: Node, axis: int) -> Node | None:
    """The values to which `node` adds one row of ones at the end of `axis`, or None."""
    rank = node.meta["val"].dim()
    if node.target in (aten.pad.default, aten.constant_pad_nd.default):
        widths = [0] * (2 * rank)
        given: Any = node.args[1]
        widths[: len(given)] = given
        at_end = 2 * (rank - 1 - axis) + 1
        constant = (
            node.target is aten.constant_pad_nd.default or (list(node.args[2:3]) or ["constant"])[0] == "constant"
        )
        filled = node.args[-1] if len(node.args) > 2 else None
        expected = [int(place == at_end) for place in range(2 * rank)]
        fits = constant and widths == expected and isinstance(filled, int | float) and filled == 1
        return node.args[0] if fits else None  # type: ignore[return-value]
    if node.target is aten.cat.default:
        parts: Any = node.args[0]
        along = node.args[1] if len(node.args) > 1 else 0
        if len(parts) == 2 and int(along) % rank == axis and parts[1].meta["val"].shape[axis] == 1:  # type: ignore[arg-type]
            return parts[0] if _is_ones(parts[1]) else None
    return None


def _is_ones(node: Node) -> bool:
    while node.target in (aten.expand.default, aten.slice.Tensor):
        node = node.args[0]  # type: ignore[assignment]
    if node.target in (aten.full.default, aten.full_like.default):
        return bool(node.args[1] == 1)
    return node.target in (aten.ones.default, aten.ones_like.default, aten.new_ones.default)


def _with_sum(numerator: Node, denominator: Node) -> _Linear | str | None:
    rank = numerator.meta["val"].dim()
    tokens_first = int(denominator.meta["val"].shape[-1]) == 1
    if denominator.meta["val"].dim() != rank or denominator.meta["val"].shape[-1 if tokens_first else -2] != 1:
        return None
    candidates = _factors(numerator, tokens_first)
    for query, key, value in candidates:
        if _is_total(denominator, query, key):
            total = denominator.args[0]
            summed = isinstance(total, Node) and total.target is aten.sum.dim_IntList and total.args[0] is key[0]
            if not tokens_first and summed and numerator.args[1] is query[0]:
                return None  # it is in this form
            return _Linear(query, key, (value, tokens_first), tokens_first)
        if not tokens_first and _is_row_product(denominator, query, key):
            return None  # it is in the other form
    return "its denominator is not made of the same queries and keys" if candidates else None


def _is_total(node: Node, query: Operand, key: Operand) -> bool:
    """Whether `node` is the sum over the tokens of `key`, times `query`."""
    if node.target in PRODUCTS:
        left, right = node.args[:2]
        first, second = (left, right) if query[1] else (right, left)
        return first is query[0] and _is_key_sum(second, key, -1 if query[1] else -2)
    if node.target is aten.sum.dim_IntList and query[1]:  # (q * sum(k)).sum(-1, keepdim)
        inner: Any = node.args[0]
        if not _sums(node, -1) or inner.target is not aten.mul.Tensor:
            return False
        pair = inner.args[:2]
        return any(pair[i] is query[0] and _is_key_sum(pair[1 - i], key, -2) for i in (0, 1))
    return False


def _is_row_product(node: Node, query: Operand, key: Operand) -> bool:
    """Whether `node` is (a row @ `key`) @ `query`, as form `product` sums the keys."""
    row = node.args[0]
    return (
        node.target in PRODUCTS
        and node.args[1] is query[0]
        and isinstance(row, Node)
        and row.target in PRODUCTS
        and row.args[1] is key[0]
    )


def _is_key_sum(node: Any, key: Operand, axis: int) -> bool:
    """Whether `node` is the sum of `key` over its tokens, as [..., 1, D] (`axis` -2) or [..., D, 1] (`axis` -1)."""
    if not isinstance(node, Node):
        return False
    source, after, _ = chain(node)
    read: Any = source.args[0] if source.target is aten.sum.dim_IntList else None
    if read is None or not _sums(source):
        return False
    summed = source.args[1][0] % read.meta["val"].dim()  # type: ignore[index]
    root, of_read, _ = chain(read)
    same, of_key, _ = chain(key[0])
    between = of_key.inverse().then(of_read) if same is root else None
    shape = [int(size) for size in key[0].meta["val"].shape]
    tokens = len(shape) - (1 if key[1] else 2)
    if between is None or between.source_axis(summed) != tokens:
        return False
    left = between.resized(tuple(1 if i == summed else size for i, size in enumerate(between.target_shape)))
    whole = None if left is None else left.then(after)
    channels = shape[-2 if key[1] else -1]
    expected = (*shape[:-2], *((1, channels) if axis == -2 else (channels, 1)))
    return whole is not None and whole.is_reshape and whole.target_shape == expected


def _sums(node: Node, axis: int | None = None) -> bool:
    """Whether a sum is over one axis (`axis`, where given) that stays with length 1."""
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    axes: Any = node.args[1]
    kept = len(node.args) > 2 and bool(node.args[2]) and len(axes) == 1
    return kept and (axis is None or axes[0] % rank == axis % rank)


def _refusal(found: _Linear) -> str | None:
    (query, turned_query), (key, turned_key), (value, turned_value) = found.query, found.key, found.value
    shapes = [tuple(int(size) for size in one.meta["val"].shape) for one in (query, key, value)]
    if len({len(shape) for shape in shapes}) != 1 or len(shapes[0]) not in (3, 4):
        return f"operands of {', '.join(str(len(shape)) for shape in shapes)} axes"
    if len({shape[:-2] for shape in shapes}) != 1:
        return "its batch axes are broadcast"
    if len({one.meta["val"].dtype for one in (query, key, value)}) != 1:
        return "its operands differ in precision"
    tokens, channels = shapes[1][-1 if turned_key else -2], shapes[1][-2 if turned_key else -1]
    length = shapes[0][-2 if turned_query else -1]
    width = shapes[2][-1 if turned_value else -2]
    first_keys = tokens * channels * (width + 1) + length * channels * (width + 1)
    first_scores = length * tokens * (channels + width + 1)
    if first_keys > first_scores:
        return f"{length} queries of {tokens} keys of {channels} channels take fewer products as scores"
    return None


def _write_out(editor: Editor, node: Node, found: _Linear, how_summed: Literal["sum", "product"]) -> None:
    call = editor.call
    shifted: Any = node.args[1]
    with editor.at(node):
        query, key, value = (_straight(editor, *one) for one in (found.query, found.key, found.value))
        matmul = aten.bmm.default if key.meta["val"].dim() == 3 else aten.matmul.default
        product = call(matmul, call(matmul, value, key), query)
        if how_summed == "product":
            *batch, tokens, _ = key.meta["val"].shape
            row = torch.ones((*batch, 1, tokens), dtype=key.meta["val"].dtype)
            summed = call(matmul, editor.constant(row, editor.named(node, "ones")), key)
        else:
            summed = call(aten.sum.dim_IntList, key, [-2], True)
        total = call(matmul, summed, query)
        out = call(aten.div.Tensor, product, call(aten.add.Tensor, total, *shifted.args[1:], **shifted.kwargs))
    if not found.tokens_first:
        editor.replace(node, out)
        return
    shape = tuple(int(size) for size in out.meta["val"].shape)
    for end, how in ends(node, permuted(shape, (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2))):
        with editor.at(end):
            editor.replace(end, emit(editor, out, how.steps()))


def _straight(editor: Editor, node: Node, turned: bool) -> Node:
    """`node`, or its last two axes exchanged, by the fewest calls from where its elements come."""
    if not turned:
        return node
    source, how, _ = chain(node)
    rank = len(how.target_shape)
    swap = permuted(how.target_shape, (*range(rank - 2), rank - 1, rank - 2))
    whole = how.then(swap)
    return emit(editor, node, swap.steps()) if whole is None else emit(editor, source, whole.steps())
