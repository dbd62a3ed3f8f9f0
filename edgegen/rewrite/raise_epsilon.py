"""An epsilon that float16 would round to 0 becomes one that it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.export import ExportedProgram

from edgegen.errors import EdgegenError
from edgegen.graph.edit import Editor
from edgegen.graph.epsilon import epsilon, set_epsilon
from edgegen.rewrite.base import Decline, Pass, Rewritten, decline


@dataclass(frozen=True)
class RaiseEpsilon(Pass):
    """The epsilon of a denominator or a norm is raised to a value that is not 0 in float16.

        %d = aten.add(%sum, 1e-08)           ->     %d = aten.add(%sum, 6.1e-05)
        %y = aten.div(%x, %d)                       %y = aten.div(%x, %d)

    The smallest number above 0 in float16 is 6e-8, and 6.1e-5 the smallest that no chip flushes to 0. The quotient
    moves by epsilon / %sum, relatively: `half_safety` raises only where the sums that are not 0 are at least 1000 times
    that.

    Declines
    1. a call whose epsilon is as large already, or is no number in the graph.
    EdgegenError for a name that no call has.
    """

    epsilons: tuple[tuple[str, float], ...] = ()
    """Name of the call -> its new epsilon."""

    name: ClassVar[str] = "raise-epsilon"
    tolerance: ClassVar[float] = 1e-3
    after: ClassVar[tuple[str, ...]] = ("prescale-sums",)

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        calls = {node.name: node for node in editor.nodes()}
        declined: list[Decline] = []
        for name, value in self.epsilons:
            if name not in calls:
                raise EdgegenError(f"pass `{self.name}`: there is no call `{name}`")
            node, held = calls[name], epsilon(calls[name], editor.value)
            if held is None or held >= value:
                said = "it has no epsilon that is a number" if held is None else f"its epsilon is {held:g} already"
                declined.append(decline(node, said))
                continue
            set_epsilon(editor, node, value)
        if not editor.changes:
            return Rewritten(program, False, tuple(declined))
        return Rewritten(editor.finish(), True, tuple(declined))
