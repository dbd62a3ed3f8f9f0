"""Grouped and multi-query attention without repeating keys and values for the heads that share them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.attention import ATTENTION, AttentionCall, additive_mask, read_attention
from edgegen.graph.edit import Editor
from edgegen.rewrite.base import Decline, Pass, Rewritten, decline

aten = torch.ops.aten


@dataclass(frozen=True)
class GroupedQuery(Pass):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245): G = H / K heads of queries read one of the keys.

        %r = aten.repeat_interleave(%k: [B, K, S, E], G, 1)             # [B, H, S, E]; the same for %v
        %o = aten.scaled_dot_product_attention(%q: [B, H, L, E], %r, ...)

    becomes, with form `fold`, where the heads of a group are further queries,

        %f = aten.reshape(%q, [B, K, G * L, E])
        %a = aten.scaled_dot_product_attention(%f, %k, %v)
        %o = aten.reshape(%a, [B, H, L, V])

    and with form `flag`, for passes after this one that share keys themselves,

        %o = aten.scaled_dot_product_attention(%q, %k, %v, enable_gqa=True)

    Keys and values may be repeated by `repeat_interleave`, by an expanded axis that is reshaped away, or, with one
    head (multi-query, Shazeer 2019, arXiv 1911.02150), by `expand` or `repeat`; or come with `enable_gqa` already.

    Declines
    1. keys and values that are repeated differently, and heads repeated in another order (`repeat` of two heads);
    2. with `fold`, a mask that differs between heads in a way that no reshape gives, or that the graph computes and
       that has a row for every query.
    """

    form: Literal["fold", "flag"] = "fold"
    least: int = 1
    """With `fold` and no mask: one key head is repeated up to this many. The TFLite converter makes a product of one
    matrix a FULLY_CONNECTED of two activations, which XNNPACK declines; a batch of two it takes."""

    name: ClassVar[str] = "grouped-query"
    after: ClassVar[tuple[str, ...]] = ("remove-identities", "fold-constants")
    tolerance: ClassVar[float] = 1e-5

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        declined: list[Decline] = []
        modified = False
        for node in editor.nodes(ATTENTION):
            call = read_attention(node)
            if call.query.meta["val"].dim() != 4 or call.dropout != 0.0:
                continue
            key, value = call.key, call.value
            repeated = not call.grouped
            if repeated:
                bare_key, bare_value = bare(key), bare(value)
                if bare_key is None or bare_value is None:
                    if bare_key is not bare_value or _odd(key) or _odd(value):
                        declined.append(decline(node, "keys and values are not repeated head by head, both the same"))
                    continue
                key, value = bare_key, bare_value
            heads, shared = int(call.query.meta["val"].shape[1]), int(key.meta["val"].shape[1])
            if shared != int(value.meta["val"].shape[1]):
                declined.append(decline(node, "keys and values are not repeated head by head, both the same"))
                continue
            if self.form == "flag":
                if repeated:
                    kwargs = {**node.kwargs, "enable_gqa": True}
                    with editor.at(node):
                        new = editor.call(ATTENTION, call.query, key, value, *node.args[3:], **kwargs)
                    editor.replace(node, new)
                    editor.graph.erase_node(node)  # torch counts it among what is never dead
                    modified = True
                continue
            if heads == shared:
                continue
            with editor.at(node):
                mask = _mask(editor, node, call, heads // shared)
                if isinstance(mask, str):
                    declined.append(decline(node, mask))
                    continue
                if mask is None and shared == 1 and heads % self.least == 0 and self.least > 1:
                    key, value = (editor.call(aten.cat.default, [one] * self.least, 1) for one in (key, value))
                editor.replace(node, _fold(editor, call, key, value, mask))
            editor.graph.erase_node(node)
            modified = True
        if not modified:
            return Rewritten(program, False, tuple(declined))
        return Rewritten(editor.finish(), True, tuple(declined))


def _fold(editor: Editor, call: AttentionCall, key: Node, value: Node, mask: Node | None) -> Node:
    batch, heads, length, depth = (int(size) for size in call.query.meta["val"].shape)
    shared, width = int(key.meta["val"].shape[1]), int(value.meta["val"].shape[3])
    folded = editor.call(aten.reshape.default, call.query, [batch, shared, heads // shared * length, depth])
    extra = [] if mask is None else [mask]
    usual = call.scale == depth**-0.5
    out = editor.call(ATTENTION, folded, key, value, *extra, **({} if usual else {"scale": call.scale}))
    return editor.call(aten.reshape.default, out, [batch, heads, length, width])


def _mask(editor: Editor, node: Node, call: AttentionCall, share: int) -> Node | str | None:
    """A mask for [B, K, G * L, S]; why there is none; None without one."""
    heads, length = (int(size) for size in call.query.meta["val"].shape[1:3])
    if call.causal:
        rows = torch.ones(length, int(call.key.meta["val"].shape[2]), dtype=torch.bool).tril()
        held = additive_mask(rows, call.query.meta["val"].dtype).repeat(share, 1)
        return editor.constant(held, editor.named(node, "causal_mask"))
    if call.mask is None:
        return None
    shape = [int(size) for size in call.mask.meta["val"].shape]
    shape = [1] * (4 - len(shape)) + shape
    if shape[1] == heads and heads > 1:
        if shape[2] != length:
            return "its mask differs between heads and not between queries"
        return editor.call(aten.reshape.default, call.mask, [shape[0], heads // share, share * length, shape[3]])
    if shape[2] == 1:
        return call.mask
    known = editor.value(call.mask)
    if known is None:
        return "the graph computes its mask, with a row for every query"
    return editor.constant(known.reshape(shape).repeat(1, 1, share, 1), editor.named(node, "mask_of_group"))


def bare(node: Node) -> Node | None:
    """Keys or values [B, K, S, E] that `node` [B, H, S, E] repeats, each G times in a row; None when it does not."""
    source: Any = node.args[0] if node.args else None
    if not isinstance(source, Node) or node.meta["val"].dim() != 4:
        return None
    if node.target is aten.repeat_interleave.self_int:
        return source if (node.args[2] if len(node.args) > 2 else None) in (1, -3) else None
    held, wanted = source.meta["val"].shape, node.meta["val"].shape
    single = source.meta["val"].dim() == 4 and held[1] == 1 and wanted[1] > 1
    if node.target in (aten.expand.default, aten.repeat.default) and single:
        return source if held[0] == wanted[0] and held[2:] == wanted[2:] else None
    if node.target in (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints):
        if source.target in (aten.clone.default, aten.contiguous.default):
            source = source.args[0]
        if source.target not in (aten.expand.default, aten.repeat.default) or source.meta["val"].dim() != 5:
            return None
        inner: Any = source.args[0]
        before, after = tuple(inner.meta["val"].shape), tuple(source.meta["val"].shape)
        if len(before) != 5 or before[2] != 1 or after != (*before[:2], after[2], *before[3:]):
            return None
        if tuple(wanted) != (before[0], before[1] * after[2], *before[3:]):
            return None
        if inner.target is aten.unsqueeze.default and inner.args[1] in (2, -3):
            return inner.args[0]  # type: ignore[no-any-return]
    return None


def _odd(node: Node) -> bool:
    """Whether `node` repeats something, if not as heads are shared."""
    return node.target in (aten.repeat.default, aten.expand.default, aten.repeat_interleave.self_int)
