"""Attention on channels-first values, as Apple's Neural Engine wants it: one head at a time or all at once."""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.attention import ATTENTION, AttentionCall, additive_mask, hides_a_row, read_attention
from edgegen.graph.edit import Editor
from edgegen.graph.rearrange import Rearrangement, permuted, rearrangement, reshaped
from edgegen.rewrite.base import Decline, Pass, Rewritten, decline
from edgegen.rewrite.chunk_queries import chunks
from edgegen.rewrite.grouped_query import bare
from edgegen.rewrite.merge_rearrangements import chain, emit

aten = torch.ops.aten


@dataclass(frozen=True)
class ChannelsFirstAttention(Pass):
    """Scaled dot-product attention on queries [B, H * E, 1, L] and values [B, H * V, 1, S], channels before tokens.

        %q: f32[B, H, L, E], %k: f32[B, H, S, E], %v: f32[B, H, S, V]
        %o = aten.scaled_dot_product_attention(%q, %k, %v, %mask)

    becomes, for every head h of form `split` (the layout of ane_transformers and of "Deploying Transformers on the
    Apple Neural Engine", Apple 2022), where the keys come as [B, S, 1, H * E],

        %qh = aten.split(%q, E, 1)[h]                        # [B, E, 1, L]
        %kh = aten.split(%k, E, 3)[h]                        # [B, S, 1, E]
        %vh = aten.split(%v, V, 1)[h]                        # [B, V, 1, S]
        %s = aten.einsum("bkhc,bchq->bkhq", [%kh, %qh])      # [B, S, 1, L]
        %w = aten.softmax(aten.add(%s, %mask), 1)
        %oh = aten.einsum("bchk,bkhq->bchq", [%vh, %w])      # [B, V, 1, L]
        %o = aten.cat([%o0, %o1, ...], 1)

    and of form `whole`, with [B, H, E, L] a reshape of [B, H * E, 1, L],

        %s = aten.matmul(aten.transpose(%k, 2, 3), %q)       # [B, H, S, L]
        %w = aten.softmax(aten.add(%s, %mask), 2)
        %o = aten.matmul(%v, %w)                             # [B, H, V, L]

    Views and permutes that lead to the attention and away from it are merged with those to the new layout, which
    `channels-first-tokens` then takes away on both sides. The scale goes into the weights of the linear that makes the
    queries when only reshapes lie between, else into a `mul` of them. A constant mask becomes -6e4 where it hides.
    Grouped queries share their key's slices, and what repeats keys for them goes. Scores beyond `max_score_bytes` are
    made for a part of the queries at a time.

    Declines
    1. dropout;
    2. inputs that are not [B, heads, tokens, channels] with equal batches, or heads that broadcast;
    3. a constant mask that hides every key from some query, or a boolean one that the graph computes;
    4. grouped queries with form `whole`, which would repeat the keys.
    """

    form: Literal["split", "whole"] = "split"
    max_score_bytes: int | None = None

    name: ClassVar[str] = "channels-first-attention"
    after: ClassVar[tuple[str, ...]] = ("remove-identities", "fold-constants")
    tolerance: ClassVar[float] = 1e-5
    removes: ClassVar[tuple[Any, ...]] = (ATTENTION,)

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        declined: list[Decline] = []
        masks = _Masks(editor)
        written: list[Node] = []
        for node in editor.nodes(ATTENTION):
            call = _unrepeated(read_attention(node), self.form)
            reason = self._refusal(call, editor)
            if reason is not None:
                declined.append(decline(node, reason))
                continue
            with editor.at(node):
                _give(editor, node, self._write_out(editor, call, masks))
            written.append(node)
        if not written:
            return Rewritten(program, False, tuple(declined))
        editor.graph.eliminate_dead_code()
        for node in written:  # torch counts attention, which may drop out, among what is never dead
            editor.graph.erase_node(node)
        return Rewritten(editor.finish(), True, tuple(declined))

    def _refusal(self, call: AttentionCall, editor: Editor) -> str | None:
        query, key, value = (tuple(one.meta["val"].shape) for one in (call.query, call.key, call.value))
        if call.dropout != 0.0:
            return "it drops out: export the module in eval mode"
        if not len(query) == len(key) == len(value) == 4:
            return f"queries, keys and values of {len(query)}, {len(key)} and {len(value)} axes, not [B, H, L, E]"
        fits = query[1] == key[1] or (call.grouped and query[1] % key[1] == 0)
        if query[0] != key[0] or key[:2] != value[:2] or not fits:
            return f"batch axes {list(query[:2])}, {list(key[:2])} and {list(value[:2])} are broadcast"
        if self.form == "whole" and query[1] != key[1]:
            return "grouped queries: form `split` shares the keys without a copy"
        if call.mask is None:
            return None
        known = editor.value(call.mask)
        if known is None:
            boolean = call.mask.meta["val"].dtype == torch.bool
            return "a boolean mask that the graph computes" if boolean else None
        return "its mask hides every key from some query" if hides_a_row(known) else None

    def _write_out(self, editor: Editor, call: AttentionCall, masks: _Masks) -> Node:
        """Output [B, H * V, 1, L] with form `split`, [B, H, V, L] with `whole`."""
        merged: Literal["channels"] | None = "channels" if self.form == "split" else None
        query = _moved(editor, _scaled(editor, call), (0, 1, 3, 2), merged)
        value = _moved(editor, call.value, (0, 1, 3, 2), merged)
        batch, heads, length, depth = (int(size) for size in call.query.meta["val"].shape)
        shared, keys, width = (int(size) for size in call.value.meta["val"].shape[1:])
        row_bytes = batch * (heads if self.form == "whole" else 1) * keys * call.query.meta["val"].element_size()
        parts = chunks(length, row_bytes, self.max_score_bytes)
        if self.form == "whole":
            key = editor.call(aten.transpose.int, _moved(editor, call.key, (0, 1, 3, 2), None), 2, 3)
            outs = []
            for first, last in parts:
                scores = editor.call(aten.matmul.default, key, _columns(editor, query, first, last))
                weights = editor.call(aten.softmax.int, masks.add(scores, call, None, first, last), 2)
                outs.append(editor.call(aten.matmul.default, value, weights))
            return _joined(editor, outs, 3)
        key = _moved(editor, call.key, (0, 2, 1, 3), "tokens")
        ks, vs = _split(editor, key, depth, 3), _split(editor, value, width, 1)
        by_head = []
        for head, q in enumerate(_split(editor, query, depth, 1)):
            k, v = (one[head * shared // heads] for one in (ks, vs))
            outs = []
            for first, last in parts:
                part = _columns(editor, q, first, last)
                scores = editor.call(aten.einsum.default, "bkhc,bchq->bkhq", [k, part])
                weights = editor.call(aten.softmax.int, masks.add(scores, call, head, first, last), 1)
                outs.append(editor.call(aten.einsum.default, "bchk,bkhq->bchq", [v, weights]))
            by_head.append(_joined(editor, outs, 3))
        return _joined(editor, by_head, 1)


def _unrepeated(call: AttentionCall, form: str) -> AttentionCall:
    """With the keys and values that `call` repeats for several heads, where form `split` can share them."""
    key, value = bare(call.key), bare(call.value)
    if form != "split" or key is None or value is None or key.meta["val"].shape[1] != value.meta["val"].shape[1]:
        return call
    return dataclasses.replace(call, key=key, value=value, grouped=True)


def _moved(editor: Editor, node: Node, dims: tuple[int, ...], merged: Literal["channels", "tokens"] | None) -> Node:
    """`node` [B, H, L, E] permuted and with heads and channels as one axis; from where its elements come."""
    source, how, _ = chain(node)
    shape = tuple(how.target_shape)
    batch, heads, tokens, channels = shape
    target = tuple(shape[axis] for axis in dims)
    layout = permuted(shape, dims)
    if merged is not None:
        width = heads * channels
        final = (batch, width, 1, tokens) if merged == "channels" else (batch, tokens, 1, width)
        view = reshaped(target, final)
        assert view is not None  # neighbouring axes become one
        joined = layout.then(view)
        assert joined is not None
        layout = joined
    return _carried(editor, node, source, how, layout)


def _carried(editor: Editor, node: Node, source: Node, how: Rearrangement, layout: Rearrangement) -> Node:
    """`layout` of `node`, which is `how` of `source`: in one go where the two have common factors."""
    whole = how.then(layout)
    return emit(editor, node, layout.steps()) if whole is None else emit(editor, source, whole.steps())


def _scaled(editor: Editor, call: AttentionCall) -> Node:
    """The queries times the scale."""
    if call.scale == 1.0:
        return call.query
    made, _, between = chain(call.query)
    weight, bias = (editor.value(one) for one in (*made.args, None, None, None)[1:3])
    computed = weight is None or (bias is None and len(made.args) > 2 and made.args[2] is not None)
    alone = all(len(one.users) == 1 for one in (made, *between)) and call.query not in (call.key, call.value)
    if made.target is not aten.linear.default or computed or not alone:
        return editor.call(aten.mul.Tensor, call.query, call.scale)
    assert weight is not None
    with editor.at(made):
        scaled = [editor.constant(weight * call.scale, editor.named(made, "weight_scaled"))]
        if bias is not None:
            scaled.append(editor.constant(bias * call.scale, editor.named(made, "bias_scaled")))
        new = editor.call(aten.linear.default, made.args[0], *scaled)
    editor.replace(made, new)
    return call.query if between else new


def _split(editor: Editor, node: Node, size: int, axis: int) -> list[Node]:
    count = int(node.meta["val"].shape[axis]) // size
    if count == 1:
        return [node]
    parts = editor.call(aten.split.Tensor, node, size, axis)
    return [editor.call(operator.getitem, parts, index) for index in range(count)]


def _columns(editor: Editor, node: Node, first: int, last: int) -> Node:
    if last - first == int(node.meta["val"].shape[3]):
        return node
    return editor.call(aten.slice.Tensor, node, 3, first, last)


def _joined(editor: Editor, parts: list[Node], axis: int) -> Node:
    return parts[0] if len(parts) == 1 else editor.call(aten.cat.default, parts, axis)


def _give(editor: Editor, node: Node, out: Node) -> None:
    """`out` [B, H * V, 1, L] or [B, H, V, L] in the place of `node` [B, H, L, V] and of what only rearranges it."""
    batch, heads, tokens, width = (int(size) for size in node.meta["val"].shape)
    seen = reshaped(tuple(out.meta["val"].shape), (batch, heads, width, tokens))
    assert seen is not None
    back = seen.then(permuted((batch, heads, width, tokens), (0, 1, 3, 2)))
    assert back is not None
    for end, how in ends(node, back):
        with editor.at(end):
            editor.replace(end, emit(editor, out, how.steps()))


def ends(node: Node, how: Rearrangement) -> list[tuple[Node, Rearrangement]]:
    """`node`, which is `how` of some value, and its rearrangements: those that something else reads, as `how` of it."""
    found: list[tuple[Node, Rearrangement]] = []
    waiting = [(node, how)]
    while waiting:
        value, made = waiting.pop()
        steps = [(user, None if (step := rearrangement(user)) is None else made.then(step)) for user in value.users]
        if any(then is None for _, then in steps):
            found.append((value, made))
        waiting += [(user, then) for user, then in steps if then is not None]
    return found


@dataclass
class _Masks:
    """Additive masks of one graph in the layout of the scores, made once for all attentions that read the same."""

    editor: Editor
    made: dict[Any, Node] = field(default_factory=dict)

    def add(self, scores: Node, call: AttentionCall, head: int | None, first: int, last: int) -> Node:
        """`scores` plus the mask, if there is one; `head` None for scores of all heads, [B, H, S, L]."""
        mask = self._mask(call, head)
        if mask is None:
            return scores
        part = mask if mask.meta["val"].shape[3] == 1 else _columns(self.editor, mask, first, last)
        return self.editor.call(aten.add.Tensor, scores, part)

    def _mask(self, call: AttentionCall, head: int | None) -> Node | None:
        dtype = call.query.meta["val"].dtype
        rows, columns = int(call.query.meta["val"].shape[2]), int(call.key.meta["val"].shape[2])
        if call.causal:
            causal = torch.ones(rows, columns, dtype=torch.bool).tril()[None, None]
            return self._held(("causal", rows, columns, dtype, head), additive_mask(causal, dtype), head, "causal_mask")
        if call.mask is None:
            return None
        shape = [int(size) for size in call.mask.meta["val"].shape]
        shape = [1] * (4 - len(shape)) + shape
        head = None if head is None else min(head, shape[1] - 1)
        key = (call.mask.name, dtype, head)
        known = self.editor.value(call.mask)
        if known is not None:
            return self._held(key, additive_mask(known, dtype).reshape(shape), head, f"{call.mask.name}_additive")
        if key not in self.made:
            self.made[key] = self._computed(call.mask, shape, head)
        return self.made[key]

    def _held(self, key: Any, mask: Tensor, head: int | None, name: str) -> Node:
        if key not in self.made:
            turned = mask.transpose(2, 3)
            if head is not None:
                turned = turned[:, min(head, mask.shape[1] - 1), :, None]
            self.made[key] = self.editor.constant(turned, name)
        return self.made[key]

    def _computed(self, mask: Node, shape: list[int], head: int | None) -> Node:
        node = self.editor.call(aten.reshape.default, mask, shape)
        if head is None:
            return self.editor.call(aten.transpose.int, node, 2, 3)
        if shape[1] > 1:
            node = self.editor.call(aten.slice.Tensor, node, 1, head, head + 1)
        return self.editor.call(aten.permute.default, node, [0, 3, 1, 2])
