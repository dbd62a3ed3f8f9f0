"""The precisions that ops may have beside their widths, with what each loses: from the stages of the precision plan.

A plan names the ops of a canonical graph, a search of widths those of the captured one. Ops of one module path are the
same there: where passes made several of one, a precision is theirs together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgegen.cache import Cache
from edgegen.precision.asked import Asked
from edgegen.precision.canonical import canonical_programs
from edgegen.precision.cost import Candidate
from edgegen.precision.options import PlanOptions, Progress
from edgegen.precision.plan import BITS
from edgegen.precision.sensitivity import Effect, Key
from edgegen.precision.simulate import Network
from edgegen.precision.sites import sites
from edgegen.precision.stages import Stages
from edgegen.prune.cost import Priced
from edgegen.students.student import Student
from edgegen.targets import Target


def priced(
    student: Student,
    target: Target,
    backends: Sequence[str],
    precisions: tuple[str, ...] | None,
    cache: Cache,
    progress: Progress,
) -> dict[tuple[str, str], Priced]:
    """(component, module path) -> its precisions, of the whole student; `precisions` None: all that the target
    executes. Losses are those of full widths: what is cut away quantizes no more, so they are too high rather than too
    low."""
    networks = {
        name: Network(name, program, sites(program)) for name, program in canonical_programs(student, backends).items()
    }
    options = PlanOptions(precisions=precisions, confirmed=6, spread=10)
    asked = Asked(student, target, tuple(backends), options, cache, progress, networks)
    found, effects = Stages(asked).known()
    macs = {(name, key): site.macs for name, network in networks.items() for key, site in network.sites.items()}
    paths: dict[tuple[str, str], list[Key]] = {}
    for name, key in found:
        paths.setdefault((name, key.split("#")[0]), []).append((name, key))
    return {path: _joined(keys, found, effects, macs, backends) for path, keys in paths.items()}


def _joined(
    keys: Sequence[Key],
    found: Mapping[Key, Sequence[Candidate]],
    effects: Mapping[Key, Sequence[Effect]],
    macs: Mapping[Key, int],
    backends: Sequence[str],
) -> Priced:
    """What all of `keys` may have, the float first; times weighted by MACs, losses added up."""
    choices = [{one.precision: index for index, one in enumerate(found[key])} for key in keys]
    common = [one.precision for one in found[keys[0]] if all(one.precision in other for other in choices)]
    weight = max(1, sum(macs[key] for key in keys))

    def time(precision: str, backend: str) -> float:
        each = (
            found[key][choice[precision]].time[backend] * macs[key]  # type: ignore[index]
            for key, choice in zip(keys, choices, strict=True)
        )
        return sum(each) / weight

    def loss(precision: str) -> float:
        places = [choice[precision] for choice in choices]  # type: ignore[index]
        # Effects are of all options but the first, the float, which does nothing.
        return sum(effects[key][place - 1].picture for key, place in zip(keys, places, strict=True) if place)

    return Priced(
        tuple(common),
        {name: tuple(time(one, name) for one in common) for name in backends},
        tuple(BITS[one] for one in common),
        {"picture": tuple(loss(one) for one in common)},
    )
