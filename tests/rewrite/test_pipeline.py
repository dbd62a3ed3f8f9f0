"""Orders are proven before anything runs; every pass leaves a record."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from edgegen.errors import UsageError
from edgegen.rewrite.base import Decline, Pass, PassError, Rewritten
from edgegen.rewrite.fold_constants import FoldConstants
from edgegen.rewrite.merge_common import MergeCommon
from edgegen.rewrite.pipeline import Pipeline, order_problem
from edgegen.rewrite.registry import all_passes
from edgegen.rewrite.remove_identities import RemoveIdentities


@dataclass(frozen=True)
class Idle(Pass):
    name: ClassVar[str] = "idle"

    def call(self, program):
        return Rewritten(program, False, (Decline(node="x", op="", module="", reason="idle"),))


@dataclass(frozen=True)
class Later(Idle):
    name: ClassVar[str] = "later"
    after: ClassVar[tuple[str, ...]] = ("idle",)


@dataclass(frozen=True)
class Needy(Idle):
    name: ClassVar[str] = "needy"
    needs: ClassVar[tuple[str, ...]] = ("idle",)


@dataclass(frozen=True)
class Circular(Idle):
    name: ClassVar[str] = "circular"
    after: ClassVar[tuple[str, ...]] = ("other",)


@dataclass(frozen=True)
class Other(Idle):
    name: ClassVar[str] = "other"
    after: ClassVar[tuple[str, ...]] = ("circular",)


@pytest.mark.parametrize("order", [(Idle(), Later()), (Later(),), (Idle(), Needy(), Later()), ()])
def test_orders_that_hold(order):
    assert order_problem(order) is None
    assert Pipeline(order).passes == order


@pytest.mark.parametrize(
    ("order", "why"),
    [
        ((Later(), Idle()), "`later` must come after `idle`"),
        ((Needy(),), "`needy` needs `idle` before it"),
        ((Needy(), Idle()), "`needy` needs `idle` before it"),
        ((Idle(), Idle()), "`idle` is there twice"),
        ((Circular(), Other()), "`circular` must come after `other`"),
        ((Other(), Circular()), "`other` must come after `circular`"),
    ],
)
def test_orders_that_do_not(order, why):
    with pytest.raises(UsageError) as caught:
        Pipeline(order)
    assert why in str(caught.value)


def test_the_declared_orders_of_all_passes_can_hold_together():
    waiting, placed = dict(all_passes()), []
    while waiting:
        free = [name for name, kind in waiting.items() if not {*kind.after, *kind.needs} & set(waiting)]
        assert free, f"in a circle: {sorted(waiting)}"
        placed += free
        for name in free:
            del waiting[name]
    known = set(all_passes())
    for name, kind in all_passes().items():
        assert {*kind.after, *kind.needs} <= known, f"`{name}` is ordered against a pass that does not exist"


class Network(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, self.training).exp() + x.exp()


@pytest.fixture
def program():
    with torch.no_grad():
        return torch.export.export(Network().eval(), (torch.randn(3),))


def test_every_pass_leaves_a_record_and_is_observed(program):
    seen = []

    def observe(one, before, result):
        seen.append((one.name, len(before.graph.nodes), result.modified))

    text = str(program.graph)
    pipeline = Pipeline((RemoveIdentities(), Idle(), MergeCommon(), FoldConstants()))
    result, records = pipeline.run(program, [observe])
    assert str(program.graph) == text
    assert [(record.spec, record.modified) for record in records] == [
        ("remove-identities", True),
        ("idle", False),
        ("merge-common", True),
        ("fold-constants", False),
    ]
    assert records[0].removed == {"aten.dropout": 1} and records[2].removed == {"aten.exp": 1}
    assert records[1].declined[0].reason == "idle" and records[0].added == {}
    assert [record.ops_after for record in records] == [3, 3, 2, 2] and records[0].ops_before == 4
    assert [name for name, _, _ in seen] == ["remove-identities", "idle", "merge-common", "fold-constants"]
    assert str(pipeline) == "remove-identities, idle, merge-common, fold-constants"
    assert result is not program


@dataclass(frozen=True)
class Lies(Idle):
    name: ClassVar[str] = "lies"

    def call(self, program):
        return Rewritten(RemoveIdentities().call(program).program, False)


@dataclass(frozen=True)
class Breaks(Idle):
    name: ClassVar[str] = "breaks"

    def call(self, program):
        result = RemoveIdentities().call(program)
        next(node for node in result.program.graph.nodes if "exp" in node.name).target = torch.ops.aten.sin.default
        return result


@pytest.mark.parametrize(("one", "why"), [(Lies(), "returns another graph"), (Breaks(), "without saying so")])
def test_a_pass_that_breaks_its_promise_is_caught(program, one, why):
    with pytest.raises(PassError, match=why):
        Pipeline((one,)).run(program)
