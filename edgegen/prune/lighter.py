"""A student whose convolutions were made separable before anything is cut, and how long it takes beside the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgegen.cache import Cache
from edgegen.graph.capture import capture
from edgegen.graph.count import GraphCount, count
from edgegen.precision.options import Progress
from edgegen.prune.apply import pruned
from edgegen.prune.estimate import before_and_after
from edgegen.prune.options import PruneOptions, components_of
from edgegen.prune.separable import separate
from edgegen.prune.trial import Trial
from edgegen.students.pruning import Pruning
from edgegen.students.student import Student
from edgegen.targets import Target


@dataclass(frozen=True)
class Lighter:
    """`student` with separable convolutions, by `records`. `whole`, `left`: counts of the components that are pruned,
    before and after. `latency`: backend -> milliseconds of a picture before and after, estimated from
    `latency_source`."""

    student: Student
    records: Mapping[str, Pruning]
    whole: Mapping[str, GraphCount]
    left: Mapping[str, GraphCount]
    latency: Mapping[str, tuple[float, float]]
    latency_source: str

    @property
    def slower(self) -> dict[str, float]:
        """Backend -> how many times as long the student takes that it was made of."""
        return {name: before / after for name, (before, after) in self.latency.items() if after}

    def shares(self, given: Mapping[str, float]) -> dict[str, float]:
        """Component -> a share of the MACs that are left, from one of those that there were."""
        return {name: min(1.0, one * self.whole[name].macs / self.left[name].macs) for name, one in given.items()}


def lighter(
    student: Student, target: Target, backends: Sequence[str], options: PruneOptions, cache: Cache, progress: Progress
) -> Lighter:
    """`student` with the separable convolutions that are asked for, before anything is cut."""
    whole = {name: count(capture(student.components[name])) for name in components_of(student, options)}
    trial = Trial.of(student, options.steps, options.samples)
    records = separate(student, options.separable, trial, progress.stage, progress.advance)
    made = pruned(student, records)
    left = {name: count(capture(part)) for name, part in made.components.items() if name in whole}
    latency, source = before_and_after(student, made, trial.steps, target, backends, cache, progress)
    return Lighter(made, records, whole, left, latency, source)
