"""Attention written out as two matrix products around a softmax, heads folded into the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.errors import EdgegenError
from edgegen.graph.attention import ATTENTION, MASKED, AttentionCall, additive_mask, hides_a_row, read_attention
from edgegen.graph.edit import Editor
from edgegen.rewrite.base import Decline, Pass, Rewritten, decline
from edgegen.rewrite.fold_attention_scale import PERMUTES, RESHAPES, fold_scale

aten = torch.ops.aten


@dataclass(frozen=True)
class ExplicitAttention(Pass):
    """Scaled dot-product attention as `softmax(q k^T + mask) v` on matrices whose batch axis is batch times heads.

        %q0: f32[1, L, D] = aten.linear(%x, %wq)
        %q = aten.transpose(aten.view(%q0, [1, L, H, E]), 1, 2)
        %k, %v likewise: f32[1, H, S, E]
        %o: f32[1, H, L, E] = aten.scaled_dot_product_attention(%q, %k, %v, %m)
    ->
        %q0: f32[1, L, D] = aten.linear(%x, %wq * scale)
        %q: f32[H, L, E] = aten.permute(aten.reshape(%q0, [L, H, E]), [1, 0, 2])
        %k: f32[H, E, S], %v: f32[H, S, E] likewise
        %s: f32[H, L, S] = aten.add(aten.bmm(%q, %k), %m)
        %o: f32[H, L, E] = aten.bmm(aten.softmax(%s, -1), %v)

    With `rank` 4 the products are `aten.matmul` of [B, H, ...]. Views and permutations around the attention are merged
    into one of each. The scale goes into the weight of the linear (or convolution) that makes the queries, or else
    the keys, when nothing but reshaping lies between; otherwise it is a `mul` of the queries. What is gained: no
    safe-softmax debris (`any`, `logical_not`, `where`) that no delegate takes.

    A boolean or -inf mask becomes an additive one of -6e4, at once when it is a weight; `is_causal` a constant mask.
    Grouped queries (`enable_gqa`) are rows of their key's head, so keys are not repeated. A row that masks every key,
    which only a computed mask can, is the softmax of its scores here, and zero or NaN before.

    Declines
    1. dropout;
    2. fewer than 3 axes, or batch axes of query, key and value that broadcast;
    3. a constant mask that hides every key from some query;
    4. grouped queries with a computed mask, or with one that differs between heads.
    """

    rank: Literal[3, 4] = 3

    name: ClassVar[str] = "explicit-attention"
    after: ClassVar[tuple[str, ...]] = ("remove-identities", "fold-constants", "split-chunked-linear")
    tolerance: ClassVar[float] = 1e-5
    removes: ClassVar[tuple[Any, ...]] = (ATTENTION,)

    def requires(self, program: ExportedProgram) -> None:
        if self.rank not in (3, 4):
            raise EdgegenError(f"pass `{self.name}` makes products of rank 3 or 4, not {self.rank}")

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        declined: list[Decline] = []
        modified = False
        masks = _Masks(editor)
        for node in editor.nodes(ATTENTION):
            call = read_attention(node)
            reason = _refusal(call, editor)
            if reason is not None:
                declined.append(decline(node, reason))
                continue
            with editor.at(node):
                _write_out(editor, node, call, self.rank, masks)
            editor.graph.erase_node(node)  # it counts as random, for its dropout, so no sweep takes it
            modified = True
        if not modified:
            return Rewritten(program, False, tuple(declined))
        return Rewritten(editor.finish(), True, tuple(declined))


def _refusal(call: AttentionCall, editor: Editor) -> str | None:
    query, key, value = (node.meta["val"].shape for node in (call.query, call.key, call.value))
    if call.dropout != 0.0:
        return "it drops out: export the module in eval mode"
    if len(query) < 3 or not len(query) == len(key) == len(value):
        return f"queries, keys and values of {len(query)}, {len(key)} and {len(value)} axes"
    if key[:-2] != value[:-2] or query[:-3] != key[:-3] or (query[-3] != key[-3] and not call.grouped):
        return f"batch axes {list(query[:-2])}, {list(key[:-2])} and {list(value[:-2])} are broadcast"
    if call.mask is None:
        return None
    mask = call.mask.meta["val"]
    known = editor.value(call.mask)
    if call.share > 1 and (known is None or math.prod(mask.shape[:-2]) != 1):
        return "grouped queries with a mask that is computed or differs between heads"
    if known is not None and hides_a_row(known):
        return "its mask hides every key from some query"
    return None


def _write_out(editor: Editor, node: Node, call: AttentionCall, rank: int, masks: _Masks) -> None:
    query, key = _scaled(editor, call)
    lead = (math.prod(call.lead),) if rank == 3 else (math.prod(call.lead[:-1]), call.lead[-1])
    rows, depth = call.share * int(query.meta["val"].shape[-2]), int(query.meta["val"].shape[-1])
    columns, width = (int(size) for size in call.value.meta["val"].shape[-2:])
    product = aten.bmm.default if rank == 3 else aten.matmul.default
    q = _shaped(editor, query, (*lead, rows, depth))
    k = _shaped(editor, key, (*lead, columns, depth), swap=True)
    v = _shaped(editor, call.value, (*lead, columns, width))
    scores = editor.call(product, q, k)
    mask = masks.of(call)
    if mask is not None:
        scores = _masked(editor, scores, mask, (*call.lead, rows, columns))
    out = editor.call(product, editor.call(aten.softmax.int, scores, -1), v)
    _give(editor, node, out)


def _scaled(editor: Editor, call: AttentionCall) -> tuple[Node, Node]:
    """Query and key, one of them times the scale."""
    if call.scale == 1.0:
        return call.query, call.key
    folded = fold_scale(editor, call)
    return folded if folded is not None else (editor.call(aten.mul.Tensor, call.query, call.scale), call.key)


def _shaped(editor: Editor, node: Node, shape: tuple[int, ...], swap: bool = False) -> Node:
    """`node` with the axes of `shape`, the last two exchanged if `swap`: one reshape and one permutation if possible.

    `node` has more axes than `shape` or as many, in the same order of elements.
    """
    base, inner, order = node, list(shape), list(range(len(shape)))
    if node.target in PERMUTES:
        base, order = node.args[0], _order(node)  # type: ignore[assignment]
        inner = [int(size) for size in base.meta["val"].shape]
    while base.target in RESHAPES:
        base = base.args[0]  # type: ignore[assignment]
    # Batch axes of one that `shape` lacks go first: what is left is often `shape` itself.
    while len(order) > len(shape) and any(inner[dim] == 1 for dim in order[:-2]):
        gone = next(dim for dim in order[:-2] if inner[dim] == 1)
        order = [dim - (dim > gone) for dim in order if dim != gone]
        del inner[gone]
    if swap:
        order[-2:] = order[:-3:-1]
        shape = (*shape[:-2], shape[-1], shape[-2])
    new = _reshaped(editor, base, inner)
    if order != sorted(order):
        new = editor.call(aten.permute.default, new, order)
    return _reshaped(editor, new, shape)


def _reshaped(editor: Editor, node: Node, shape: Sequence[int]) -> Node:
    if list(node.meta["val"].shape) == list(shape):
        return node
    return editor.call(aten.reshape.default, node, list(shape))


def _order(node: Node) -> list[int]:
    """The axes of a permutation's argument in the order of its result."""
    args: Any = node.args
    rank = node.meta["val"].dim()
    if node.target is aten.permute.default:
        return [dim % rank for dim in args[1]]
    order = list(range(rank))
    a, b = (dim % rank for dim in args[1:3])
    order[a], order[b] = order[b], order[a]
    return order


def _masked(editor: Editor, scores: Node, mask: Node, shape: tuple[int, ...]) -> Node:
    """`scores` plus a mask that broadcasts to `shape` [batch..., heads, rows, columns]."""
    folded = [int(size) for size in scores.meta["val"].shape]
    said = [int(size) for size in mask.meta["val"].shape]
    lead = [1] * (len(shape) - len(said)) + said[:-2]
    if all(size == 1 for size in lead):
        mask = _reshaped(editor, mask, said[-2:])
    elif lead == list(shape[:-2]):
        mask = _reshaped(editor, mask, [*folded[:-2], *said[-2:]])
    elif math.prod(shape[:-3]) == 1:
        mask = _reshaped(editor, mask, [lead[-1], *said[-2:]])
    elif len(folded) < len(shape):
        whole = editor.call(aten.add.Tensor, _reshaped(editor, scores, shape), mask)
        return _reshaped(editor, whole, folded)
    return editor.call(aten.add.Tensor, scores, mask)


def _give(editor: Editor, node: Node, out: Node) -> None:
    """`out` in the place of `node`; with heads in its batch, a permutation and a reshape after it are merged."""
    shape, made = ([int(size) for size in one.meta["val"].shape] for one in (node, out))
    extra = len(shape) - len(made)  # batch axes of one, when the rest is the shape of `out`
    plain: Node | None = None
    for user in list(node.users):
        order = _order(user) if user.target in PERMUTES else []
        if (
            extra > 0
            and shape == [1] * extra + made
            and order[:extra] == list(range(extra))
            and all(one.target in RESHAPES for one in user.users)
        ):
            moved = editor.call(aten.permute.default, out, [dim - extra for dim in order[extra:]])
            for one in list(user.users):
                with editor.at(one):
                    editor.replace(one, _reshaped(editor, moved, [int(size) for size in one.meta["val"].shape]))
                editor.graph.erase_node(one)
            editor.graph.erase_node(user)
            continue
        if plain is None:
            plain = _reshaped(editor, out, shape)
        user.replace_input_with(node, plain)


@dataclass
class _Masks:
    """Additive masks of one graph, each made once for all attentions that read it."""

    editor: Editor
    made: dict[Any, Node] = field(default_factory=dict)

    def of(self, call: AttentionCall) -> Node | None:
        """The mask to add to the scores of `call`, or None."""
        dtype = call.query.meta["val"].dtype
        rows, columns = int(call.query.meta["val"].shape[-2]), int(call.key.meta["val"].shape[-2])
        if call.causal:
            causal = torch.ones(rows, columns, dtype=torch.bool).tril()
            return self._constant(("causal_mask", rows, columns, dtype, call.share), causal, None)
        if call.mask is None:
            return None
        held = self.editor.value(call.mask)
        if held is None:
            if call.mask.meta["val"].dtype != torch.bool:
                return call.mask
            kept = self.editor.call(aten.to.dtype, call.mask, dtype)
            return self.editor.call(aten.mul.Tensor, self.editor.call(aten.sub.Tensor, kept, 1.0), -MASKED)
        return self._constant((call.mask.name, rows, columns, dtype, call.share), held, call.mask)

    def _constant(self, key: tuple[str, int, int, torch.dtype, int], mask: Tensor, source: Node | None) -> Node:
        """`mask` finite, of the right dtype, without leading axes of one; repeated for queries that share a key."""
        if key not in self.made:
            name, rows, columns, dtype, share = key
            value = additive_mask(mask, dtype)
            while value.dim() > 2 and value.shape[0] == 1:
                value = value[0]
            if share > 1:
                value = value.expand(rows, columns).repeat(share, 1)
            same = source is not None and value.shape == mask.shape and value.dtype == mask.dtype
            keep = same and torch.equal(value, mask)
            self.made[key] = source if keep and source is not None else self.editor.constant(value, f"{name}_additive")
        return self.made[key]
