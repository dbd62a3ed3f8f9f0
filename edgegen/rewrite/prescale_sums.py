"""Divide what a formula does not depend on the scale of, so that its squares and sums stay inside float16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.errors import EdgegenError
from edgegen.graph.edit import Editor, made_by
from edgegen.graph.homogeneous import region, rescale
from edgegen.rewrite.base import Decline, Pass, Rewritten, decline


@dataclass(frozen=True)
class PrescaleSums(Pass):
    """A value is divided by a power of two where everything made of it comes out the same in the end.

    Linear attention over N tokens (SANA, arXiv 2410.10629; MobileI2V, arXiv 2511.21475), `%k` divided by 2^10:

        %kv = aten.matmul(%v1, %k)                           %s = aten.mul(%k, 2^-10)
        %o = aten.matmul(%kv, %q)                            %kv = aten.matmul(%v1, %s)
        %n, %d = aten.slice(%o, ...), aten.slice(%o, ...)    %o = aten.matmul(%kv, %q)
        %y = aten.div(%n, aten.add(%d, eps))          ->     %n, %d = aten.slice(%o, ...), aten.slice(%o, ...)
                                                             %y = aten.div(%n, aten.add(%d, eps * 2^-10))

    RMSNorm, and whatever else divides by a root of a sum of squares, `%x` divided by 2^4:

        %v = aten.mean(aten.pow(%x, 2), [-1], True)          %s = aten.mul(%x, 2^-4)
        %r = aten.rsqrt(aten.add(%v, eps))            ->     %v = aten.mean(aten.pow(%s, 2), [-1], True)
        %y = aten.mul(%x, %r)                                %r = aten.rsqrt(aten.add(%v, eps * 2^-8))
                                                             %y = aten.mul(%s, %r)

    `group_norm`, `layer_norm` and `rms_norm` in one call, and the scores of an attention, count as such formulas. A
    division by a power of two is exact as long as nothing underflows, so float32 keeps its bits but for odd roots.

    Declines
    1. a root behind which something needs its scale: a value inside is read elsewhere, or an op is not homogeneous;
    2. a root that this pass divided before.
    EdgegenError for a name that is not in the graph. A negative exponent multiplies: sums that underflow.
    """

    roots: tuple[tuple[str, str, int], ...] = ()
    """(value to divide, a call in the formula that is meant, exponent of 2), in the order in which they are applied."""

    name: ClassVar[str] = "prescale-sums"
    tolerance: ClassVar[float] = 1e-6
    after: ClassVar[tuple[str, ...]] = ("remove-identities", "fold-constants", "two-pass-variance", "finite-masks")

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        named = {node.name: node for node in editor.graph.nodes}
        declined: list[Decline] = []
        for root, target, exponent in self.roots:
            for name in (root, target):
                if name not in named:
                    raise EdgegenError(f"pass `{self.name}`: there is no value `{name}`")
            reason = self._apply(editor, named[root], named[target], exponent)
            if reason is not None:
                declined.append(decline(named[target], reason))
        if not editor.changes:
            return Rewritten(program, False, tuple(declined))
        return Rewritten(editor.finish(), True, tuple(declined))

    def _apply(self, editor: Editor, root: Node, target: Node, exponent: int) -> str | None:
        found = region(editor, root, target)
        if found is None:
            return f"what is made of `{root.name}` depends on its scale"
        if any(_divides(node, root) and self.name in made_by(node) for node in found.nodes):
            return f"`{root.name}` is divided already"
        rescale(editor, found, exponent)
        return None


def _divides(user: Node, root: Node) -> bool:
    return user.target is torch.ops.aten.mul.Tensor and user.args[0] is root
