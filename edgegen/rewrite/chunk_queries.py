"""Attention a part of the queries at a time, where its scores would not fit."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.errors import EdgegenError
from edgegen.graph.attention import ATTENTION, AttentionCall, additive_mask, read_attention
from edgegen.graph.edit import Editor
from edgegen.rewrite.base import Decline, Pass, Rewritten, decline

aten = torch.ops.aten


@dataclass(frozen=True)
class ChunkQueries(Pass):
    """Scores of more than `max_score_bytes` (batch x heads x queries x keys) in several attentions over static slices.

        %o = aten.scaled_dot_product_attention(%q, %k, %v)      # scores [1, 8, 4096, 4096]: 512 MiB in fp32

    becomes

        %q0 = aten.slice(%q, 2, 0, 1024)
        %o0 = aten.scaled_dot_product_attention(%q0, %k, %v)    # scores [1, 8, 1024, 4096]
        ...
        %o = aten.cat([%o0, %o1, %o2, %o3], 2)

    Each query sees all keys, so nothing is approximated: a softmax needs its own row only. The parts differ by at most
    one query in length. A mask with a row for every query is cut with them; `is_causal` becomes a constant mask.

    Declines
    1. scores that fit (no decline is recorded: nothing was to be done);
    2. a single query whose scores alone do not fit;
    3. dropout.
    """

    max_score_bytes: int

    name: ClassVar[str] = "chunk-queries"
    after: ClassVar[tuple[str, ...]] = ("remove-identities", "fold-constants", "grouped-query")
    tolerance: ClassVar[float] = 1e-5

    def requires(self, program: ExportedProgram) -> None:
        if self.max_score_bytes < 1:
            raise EdgegenError(f"pass `{self.name}` needs a positive `max_score_bytes`, not {self.max_score_bytes}")

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        declined: list[Decline] = []
        modified = False
        for node in editor.nodes(ATTENTION):
            call = read_attention(node)
            parts, reason = self._plan(call)
            if reason is not None:
                declined.append(decline(node, reason))
            elif len(parts) > 1:
                with editor.at(node):
                    editor.replace(node, _write_out(editor, node, call, parts))
                editor.graph.erase_node(node)  # torch counts it among what is never dead
                modified = True
        if not modified:
            return Rewritten(program, False, tuple(declined))
        return Rewritten(editor.finish(), True, tuple(declined))

    def _plan(self, call: AttentionCall) -> tuple[list[tuple[int, int]], str | None]:
        value = call.query.meta["val"]
        length, keys = int(value.shape[-2]), int(call.key.meta["val"].shape[-2])
        row = int(value[..., 0, 0].numel()) * keys * value.element_size()
        if row * length <= self.max_score_bytes:
            return [(0, length)], None
        if call.dropout != 0.0:
            return [], "it drops out: export the module in eval mode"
        if length == 1:
            return [], f"the scores of one query alone are {row} bytes, above {self.max_score_bytes}"
        return chunks(length, row, self.max_score_bytes), None


def chunks(length: int, row_bytes: int, max_bytes: int | None) -> list[tuple[int, int]]:
    """(first, last + 1) of the fewest parts of `length` rows that fit in `max_bytes`, all of about the same length."""
    if max_bytes is None:
        return [(0, length)]
    most = max(1, max_bytes // row_bytes)
    count = -(-length // most)
    marks = [length * part // count for part in range(count + 1)]
    return list(pairwise(marks))


def _write_out(editor: Editor, node: Node, call: AttentionCall, parts: list[tuple[int, int]]) -> Node:
    rank = call.query.meta["val"].dim()
    length = int(call.query.meta["val"].shape[-2])
    mask = _mask(editor, node, call)
    kwargs: dict[str, Any] = dict(node.kwargs)
    for name in ("attn_mask", "is_causal"):
        kwargs.pop(name, None)
    outs = []
    for first, last in parts:
        query = editor.call(aten.slice.Tensor, call.query, rank - 2, first, last)
        part = mask
        if mask is not None:
            axes = mask.meta["val"].dim()
            if axes > 1 and int(mask.meta["val"].shape[-2]) == length:
                part = editor.call(aten.slice.Tensor, mask, axes - 2, first, last)
        outs.append(editor.call(ATTENTION, query, call.key, call.value, *([] if part is None else [part]), **kwargs))
    return editor.call(aten.cat.default, outs, rank - 2)


def _mask(editor: Editor, node: Node, call: AttentionCall) -> Node | None:
    if not call.causal:
        return call.mask
    rows, columns = int(call.query.meta["val"].shape[-2]), int(call.key.meta["val"].shape[-2])
    causal = additive_mask(torch.ones(rows, columns, dtype=torch.bool).tril(), call.query.meta["val"].dtype)
    return editor.constant(causal, editor.named(node, "causal_mask"))
