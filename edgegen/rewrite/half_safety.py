"""A float32 graph made safe for float16: rewrites first, float32 islands where none is exact enough, and the proof.

Order of business, each step on the graph that the step before left:

1. masks that float16 does not have become finite;
2. variances that cancel are computed in two passes;
3. squares and sums that leave the range, or sink below it, are scaled where the scale does not matter;
4. epsilons that vanish are raised, where the denominators allow it;
5. what is still a hazard is computed in float32;
6. the result is computed in emulated float16 and held against float32. Short of the target, the calls that lose most on
   their own become islands too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.count import op_name
from edgegen.graph.edit import Editor, module_path
from edgegen.graph.evaluate import evaluate
from edgegen.graph.half_arithmetic import (
    HALF_MAX,
    SMALLEST,
    SMALLEST_NORMAL,
    Arithmetic,
    local_sqnr,
    run_half,
    sqnr_db,
)
from edgegen.graph.homogeneous import Region, region
from edgegen.graph.ranges.analyse import MARGIN, Interval, Ranges, analyse
from edgegen.rewrite.base import Pass
from edgegen.rewrite.finite_masks import FiniteMasks
from edgegen.rewrite.half_hazards import Hazard, find_hazards, overflowing
from edgegen.rewrite.prescale_sums import PrescaleSums
from edgegen.rewrite.raise_epsilon import RaiseEpsilon
from edgegen.rewrite.to_half import ToHalf
from edgegen.rewrite.two_pass_variance import TwoPassVariance

TARGET_DB = 40.0
_MASKS = (-6.0e4, -3.0e4, -1.5e4)
_ROUNDS = 12
_ROOM = HALF_MAX / 2
_STEPS_BACK = 4
"""How far before an overflow the value is looked for whose scale does not matter."""


@dataclass(frozen=True)
class HalfSafety:
    """How a graph goes to float16, and why that is right."""

    rewrites: tuple[Pass, ...]
    """To be run on the graph that was given, in this order; they keep its inputs and its float32 numbers."""
    to_half: ToHalf
    """To be run right after them: its islands are names in the graph that they leave."""
    safe: ExportedProgram
    """The float32 graph after `rewrites`."""
    half: ExportedProgram
    """The float16 graph after `to_half`."""
    hazards: tuple[Hazard, ...]
    remaining: tuple[Hazard, ...]
    """Risks that were left, each with its reason."""
    before_db: float
    after_db: float
    """Lowest SQNR of the outputs over the samples, in emulated float16, without and with all this; NaN unmeasured."""

    @property
    def passes(self) -> tuple[Pass, ...]:
        """All of it, for a pipeline."""
        return (*self.rewrites, self.to_half)


def make_half_safe(
    program: ExportedProgram,
    samples: Sequence[Mapping[str, Tensor]],
    *,
    arithmetic: Arithmetic = "decomposed",
    margin: float = MARGIN,
    target_db: float = TARGET_DB,
    inputs: Mapping[str, Interval] | None = None,
) -> HalfSafety:
    """Find what float16 would break in a float32 graph, and the passes that repair it.

    `samples` are calls on the student's trajectory, by input name; without any, only what follows from the graph alone
    is found, and nothing is measured. `arithmetic` is what the runtime rounds (`edgegen.graph.half_arithmetic`).
    """
    repair = _Repair(program, samples, arithmetic, margin, inputs)
    repair.masks()
    repair.variances()
    repair.scales()
    repair.epsilons()
    repair.islands()
    wanted = [evaluate(program, sample) for sample in samples]
    untouched = not repair.rewrites and not repair.kept
    # Where nothing was repaired there is one float16 graph, and it is computed once.
    half = repair.half() if untouched else ToHalf()(program).program
    before = _lowest_db(wanted, half, samples, arithmetic)
    after = repair.measure(target_db, wanted, before if untouched else None)
    return repair.result(before, after)


def _lowest_db(
    wanted: Sequence[tuple[Tensor, ...]],
    half: ExportedProgram,
    samples: Sequence[Mapping[str, Tensor]],
    arithmetic: Arithmetic,
) -> float:
    """Of the float16 graph on `samples`, for which the float32 one gives `wanted`."""
    lowest = math.inf if samples else math.nan
    for sample, outputs in zip(samples, wanted, strict=True):
        pairs = zip(outputs, run_half(half, sample, arithmetic), strict=True)
        lowest = min([lowest, *(sqnr_db(a, b) for a, b in pairs if a.is_floating_point())])
    return lowest


@dataclass
class _Repair:
    """The graph as it is so far, its ranges, and what became of each hazard."""

    original: ExportedProgram
    samples: Sequence[Mapping[str, Tensor]]
    arithmetic: Arithmetic
    margin: float
    inputs: Mapping[str, Interval] | None
    rewrites: list[Pass] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    """Islands, and why."""
    _half: tuple[tuple[ToHalf, int], ExportedProgram] | None = None
    found: dict[tuple[str, str], Hazard] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.program = self.original
        self._look()

    def _look(self) -> None:
        self.ranges: Ranges = analyse(self.program, self.samples, self.margin, self.inputs)
        self.hazards = find_hazards(self.program, self.ranges, self.arithmetic)
        for hazard in self.hazards:
            self.found.setdefault((hazard.node, hazard.kind), hazard)

    def _apply(self, one: Pass) -> bool:
        result = one(self.program)
        if result.modified:
            self.program = result.program
            self.rewrites.append(one)
            self._look()
        return result.modified

    def _fixed(self, hazards: Iterable[Hazard], fix: str) -> None:
        left = {(one.node, one.kind) for one in self.hazards}
        for hazard in hazards:
            key = (hazard.node, hazard.kind)
            if key not in left and not self.found[key].fix:
                self.found[key] = self.found[key].model_copy(update={"fix": fix})

    def masks(self) -> None:
        """Constants that float16 does not have."""
        constants = [one for one in self.hazards if one.kind == "constant"]
        if not constants:
            return
        start, before = self.program, self.hazards
        for value in _MASKS:
            one = FiniteMasks(value)
            result = one(start)
            if not result.modified:
                return
            self.program = result.program
            self._look()
            known = {hazard.node for hazard in before}
            if not any(hazard.kind == "overflow" and hazard.node not in known for hazard in self.hazards):
                break
        self.rewrites.append(one)
        self._fixed(before, str(one))

    def variances(self) -> None:
        """Differences of means that cancel."""
        cancelled = [one for one in self.hazards if one.kind == "cancellation"]
        before = self.hazards
        if cancelled and self._apply(TwoPassVariance()):
            self._fixed(before, str(TwoPassVariance()))

    def scales(self) -> None:
        """Squares and sums that leave the range on either side."""
        base, scaled, hopeless = self.program, dict[tuple[str, str], int](), set[str]()
        for _ in range(_ROUNDS):
            this_round: dict[tuple[str, str], int] = {}
            for hazard in self.hazards:
                if not self._scalable(hazard) or hazard.node in hopeless:
                    continue
                root = self._root(hazard, scaled)
                if root is None:
                    hopeless.add(hazard.node)
                else:
                    key, exponent = root
                    this_round[key] = max(exponent, this_round.get(key, exponent))
            if not this_round:
                break
            scaled |= {key: scaled.get(key, 0) + exponent for key, exponent in this_round.items()}
            before = self.hazards
            one = PrescaleSums(tuple((*key, exponent) for key, exponent in scaled.items()))
            self.program = one(base).program
            self._look()
            self._fixed(before, one.name)
        if scaled:
            self.rewrites.append(one)

    def _scalable(self, hazard: Hazard) -> bool:
        if hazard.kind == "accumulation":
            return self.arithmetic == "accumulating"
        return hazard.kind in ("overflow", "inside", "underflow", "epsilon", "denominator")

    def _root(self, hazard: Hazard, scaled: Mapping[tuple[str, str], int]) -> tuple[tuple[str, str], int] | None:
        """What to divide so that a hazard's value fits, a call of the formula that is meant, and the power of two."""
        editor = Editor(self.program, PrescaleSums.name)
        target = next(node for node in editor.graph.nodes if node.name == hazard.node)
        if hazard.kind == "denominator":
            source = target.args[1] if op_name(target) == "aten.div" else target.args[0]
            if not isinstance(source, Node):
                return None
            target = source
        named = {node.name for node in self.original.graph.nodes}
        for root in _before(target):
            if root.name not in named or _is_weight(editor, root):
                continue
            found = region(editor, root, target)
            if found is None:
                continue
            exponent = self._exponent(hazard, target, found)
            if exponent:
                inside = {node.name for node in found.nodes}
                known = (key for key in scaled if key[0] == root.name and key[1] in inside)
                return next(known, (root.name, target.name)), exponent
        return None

    def _exponent(self, hazard: Hazard, target: Node, found: Region) -> int:
        """By how many powers of two the root is to be divided, 0 where that does not help."""
        inside, value = self.ranges.inside.get(target.name), self.ranges.values.get(target.name)
        if target in found.degrees and hazard.kind in ("overflow", "underflow", "denominator", "epsilon"):
            degree = float(found.degrees[target])
            largest = 0.0 if value is None else value.seen() * self.margin
            least = hazard.interval[1] if hazard.kind == "underflow" else hazard.interval[0]
        elif inside is not None:
            degree = 1.0 if "attention" in op_name(target) else 2.0
            largest, least = max(inside.step, inside.total) * self.margin**2, inside.least
            largest = inside.step * self.margin**2 if degree == 1.0 else largest
        else:
            return 0
        if not degree or not largest:
            return 0
        most = math.ceil(math.log2(largest / _ROOM) / degree)
        if hazard.kind in ("overflow", "inside", "accumulation"):
            return max(most, 0)
        # Up until the smallest is a normal number; no use if the largest does not allow that.
        wanted = math.floor(math.log2(least / (8 * SMALLEST_NORMAL)) / degree) if 0 < least < math.inf else 0
        return wanted if most <= wanted < 0 else 0

    def epsilons(self) -> None:
        """Epsilons that are 0 in float16."""
        raised: list[tuple[str, float]] = []
        vanishing = [one for one in self.hazards if one.kind == "epsilon"]
        for hazard in vanishing:
            smallest = self._smallest_denominator(hazard.node)
            # A thousandth of the smallest denominator that is not 0; as large as that allows, up to a normal number.
            value = (
                min(SMALLEST_NORMAL, 2.0 ** math.floor(math.log2(smallest / 1000))) if 0 < smallest < math.inf else 0.0
            )
            if value >= 2 * SMALLEST:
                raised.append((hazard.node, value))
        if raised:
            one = RaiseEpsilon(tuple(raised))
            if self._apply(one):
                self._fixed(vanishing, str(one))

    def _smallest_denominator(self, name: str) -> float:
        node = next(one for one in self.program.graph.nodes if one.name == name)
        if op_name(node).endswith("_norm"):
            return self.ranges.inside[name].least_positive
        averages = op_name(node) in ("aten.linear", "aten.conv1d", "aten.conv2d")
        source = self.ranges.values[name if averages else node.args[0].name].observed
        return math.inf if source is None else source.smallest

    def islands(self) -> None:
        """What no rewrite repaired is computed in float32."""
        nodes = {node.name: node for node in self.program.graph.nodes}
        beyond = overflowing(self.program, self.ranges)
        for hazard in self.hazards:
            if not self._needs_island(hazard):
                continue
            node = nodes[hazard.node]
            if hazard.kind in ("overflow", "constant"):
                names = _spread(node, beyond)
            elif hazard.kind == "resolution" and op_name(node) in ("aten.sin", "aten.cos"):
                names = _angle(node)
            elif hazard.kind in ("resolution", "underflow", "epsilon"):
                names = [node.name, *(user.name for user in node.users if user.op == "call_function")]
            elif hazard.kind == "denominator":
                names = [node.name, *_behind(node.args[1] if op_name(node) == "aten.div" else node.args[0])]
            else:
                names = [node.name]
            self._keep([one for one in names if nodes[one].op == "call_function"], hazard)

    def _needs_island(self, hazard: Hazard) -> bool:
        if hazard.kind in ("accumulation", "denominator", "underflow", "epsilon"):
            return hazard.severity == "breaks"
        return True

    def _keep(self, names: Sequence[str], hazard: Hazard) -> None:
        for name in names:
            self.kept.setdefault(name, hazard.kind)
        key = (hazard.node, hazard.kind)
        fix = f"float32 island: {', '.join(f'`{name}`' for name in names[:6])}"
        fix += f" and {len(names) - 6} more" if len(names) > 6 else ""
        self.found[key] = self.found[key].model_copy(update={"fix": fix})

    def to_half(self) -> ToHalf:
        order = [node.name for node in self.program.graph.nodes]
        return ToHalf(tuple(sorted(self.kept, key=order.index)))

    def half(self) -> ExportedProgram:
        """The float16 graph of what the program is so far."""
        key = (self.to_half(), id(self.program))
        if self._half is None or self._half[0] != key:
            self._half = (key, key[0](self.program).program)
        return self._half[1]

    def measure(self, target_db: float, wanted: Sequence[tuple[Tensor, ...]], known: float | None = None) -> float:
        """Lowest SQNR of the outputs, which is `known` where that was measured; further islands until it reaches the
        target or none helps."""
        reached = known
        if reached is None:
            reached = _lowest_db(wanted, self.half(), self.samples, self.arithmetic)
        for floor in (20.0, 30.0, 40.0, 50.0):
            if not self.samples or reached >= target_db:
                break
            losses: dict[str, float] = {}
            for sample in self.samples:
                for name, value in local_sqnr(self.program, sample, self.arithmetic).items():
                    losses[name] = min(value, losses.get(name, math.inf))
            for node in self.program.graph.nodes:
                if losses.get(node.name, math.inf) < floor and node.name not in self.kept:
                    self._blame(node, losses[node.name])
            reached = _lowest_db(wanted, self.half(), self.samples, self.arithmetic)
        return reached

    def _blame(self, node: Node, loss: float) -> None:
        value = self.ranges.values.get(node.name)
        interval = (0.0, 0.0) if value is None or value.observed is None else (value.observed.low, value.observed.high)
        self.found[node.name, "measured"] = Hazard(
            node=node.name,
            op=op_name(node),
            module=module_path(node),
            kind="measured",
            severity="breaks",
            interval=interval,
            evidence="observed",
            detail=f"computed in float16 from right inputs it has {loss:.1f} dB",
        )
        self._keep(
            [node.name, *(one.name for one in node.users if one.op == "call_function")],
            self.found[node.name, "measured"],
        )

    def result(self, before: float, after: float) -> HalfSafety:
        to_half = self.to_half()
        half = self.half()
        measured = (
            "not measured: no samples" if math.isnan(after) else f"{_db(after)} in emulated float16 (was {_db(before)})"
        )
        told, remaining = [], []
        left = {(one.node, one.kind) for one in self.hazards}
        for key, hazard in self.found.items():
            if not hazard.fix and key not in left:
                hazard = hazard.model_copy(update={"fix": "removed by what was rewritten before it"})
            if not hazard.fix:
                remaining.append(hazard.model_copy(update={"proof": measured}))
                continue
            told.append(hazard.model_copy(update={"proof": f"{self._now(hazard)}; {measured}"}))
        return HalfSafety(
            rewrites=tuple(self.rewrites),
            to_half=to_half,
            safe=self.program,
            half=half,
            hazards=tuple(told),
            remaining=tuple(remaining),
            before_db=before,
            after_db=after,
        )

    def _now(self, hazard: Hazard) -> str:
        """The interval that took the place of a hazard's."""
        if hazard.node in self.kept:
            return "in float32"
        value, inside = self.ranges.values.get(hazard.node), self.ranges.inside.get(hazard.node)
        if hazard.kind in ("inside", "accumulation") and inside is not None:
            return f"inside it now reaches {inside.step:.4g}, its sums {inside.total:.4g}"
        if value is None or value.observed is None:
            return "the value is gone" if value is None else f"now in [{value.sound[0]:.4g}, {value.sound[1]:.4g}]"
        return f"now in [{value.observed.low:.4g}, {value.observed.high:.4g}]"


def _db(value: float) -> str:
    return "not finite" if value == -math.inf else f"{value:.1f} dB"


def _is_weight(editor: Editor, node: Node) -> bool:
    return editor.value(node) is not None


def _before(target: Node) -> list[Node]:
    """Candidates for a root: what leads to `target`, the nearest and smallest first."""
    found: dict[Node, None] = {}
    front = [target]
    for _ in range(_STEPS_BACK):
        sources = {source: None for node in front for source in node.all_input_nodes if source not in found}
        front = sorted(sources, key=_size)
        found.update(dict.fromkeys(front))
    return list(found)


def _size(node: Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0


def _spread(node: Node, beyond: set[str]) -> list[str]:
    """A value that overflows, all that it overflows into, and whatever reads one of them."""
    found: dict[str, None] = {node.name: None}
    todo = [node]
    while todo:
        for user in todo.pop().users:
            if user.op != "call_function" or user.name in found:
                continue
            found[user.name] = None
            if user.name in beyond or not isinstance(user.meta.get("val"), Tensor):
                todo.append(user)
    return list(found)


def _angle(node: Node) -> list[str]:
    """A sine and everything that its angle is made of, up to what has weights."""
    return _cone(node, lambda one: op_name(one) in _WEIGHTED)


def _behind(node: object) -> list[str]:
    """A denominator and the elementwise calls that it is made of."""
    return (
        _cone(node, lambda one: op_name(one) in _WEIGHTED or op_name(one) in _REDUCED) if isinstance(node, Node) else []
    )


def _cone(node: Node, stops: Callable[[Node], bool]) -> list[str]:
    found: dict[str, None] = {}
    todo = [node]
    while todo:
        one = todo.pop()
        if one.op != "call_function" or one.name in found or stops(one):
            continue
        found[one.name] = None
        todo += one.all_input_nodes
    return list(found)


_WITH_WEIGHTS = """
    linear conv1d conv2d conv3d group_norm layer_norm rms_norm scaled_dot_product_attention embedding
"""
_WEIGHTED = frozenset(f"aten.{name}" for name in _WITH_WEIGHTS.split())
_REDUCED = frozenset({"aten.matmul", "aten.bmm", "aten.sum", "aten.mean"})
