"""What `edgegen tune` does: walk the front of latency and quality, and keep the best few points as recipes.

Every point is one choice of widths, blocks and precisions together. Points are chosen by estimates and then measured:
what is left is drawn with, in float and without healing, on prompts that nothing was chosen on. Points are measured in
processes of joblib, or wherever the joblib backend that is active takes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from joblib import Parallel, delayed

from edgegen.cache import Cache
from edgegen.errors import UsageError
from edgegen.precision.options import Progress
from edgegen.prune.assemble import Assembled, Options, assemble
from edgegen.prune.elastic import require_one_size
from edgegen.prune.find import spaces as find
from edgegen.prune.importance import Probe, importance
from edgegen.prune.precisions import priced
from edgegen.prune.recipe import Recipe
from edgegen.prune.refusal import refused
from edgegen.prune.search import Choice, NoFitError, walk
from edgegen.prune.space import Spaces
from edgegen.prune.target_speed import TargetSpeed, target_speed
from edgegen.prune.trial import Trial
from edgegen.students.pruning import Pruning
from edgegen.students.student import Component, Student
from edgegen.targets import Target

NOISE = 1e-15
"""Losses below are 150 dB: no picture is nearer to another."""


@dataclass(frozen=True)
class TuneOptions:
    """`points` of the front, of which the `best` fastest that lose no more than `min_psnr` dB are kept. Caps are shares
    of what the student has (`max_latency_ms`: milliseconds of the target). `precisions`: beside the float; () for none,
    None for all that the target executes. `prompts`: that the alignment of `shapes` is judged on, 0 for none."""

    components: tuple[str, ...] = ("denoiser", "decoder")
    points: int = 8
    best: int = 3
    min_psnr: float = 15.0
    max_latency: float | None = None
    max_latency_ms: float | None = None
    max_macs: float | None = None
    max_size: float | None = None
    precisions: tuple[str, ...] | None = None
    depth: bool = True
    steps: int | None = None
    samples: int = 12
    prompts: int = 60
    jobs: int = 1


@dataclass(frozen=True)
class Measured:
    """One point. `costs`: shares of the student's, estimated but for `macs` and `bytes`; `loss`: that of the picture,
    precisions included, estimated; `psnr`, `alignment`: of what is left, in float, drawn."""

    choice: Choice
    costs: dict[str, float]
    loss: float
    psnr: float
    alignment: float | None
    removed: int
    compressed: int

    @property
    def psnr_estimated(self) -> float:
        return decibels(self.loss)

    def plain(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "estimated": {**self.costs, "picture_psnr_db": self.psnr_estimated},
            "measured": {"picture_psnr_db": self.psnr, "alignment": self.alignment},
            "removals": list(self.choice.removed),
            "compressed_ops": self.compressed,
        }


@dataclass(frozen=True)
class Tuned:
    """The front, and the recipes of its best points, the fastest first, with the student that each leaves. `speed`:
    backend -> what makes milliseconds of the target of those of this machine, None where its file does not say."""

    front: tuple[Measured, ...]
    recipes: tuple[tuple[Recipe, Student], ...]
    latency_ms: dict[str, float]
    """Of the whole student, estimated, by `latency <backend>`: on the target where that is known."""
    speed: dict[str, TargetSpeed | None]
    correlation: float | None
    """Spearman's, of the estimates of blocks with their measured removal."""
    surface_error: dict[str, float]
    """Backend -> the median over kernels of how far the surface is from a measured time, at worst."""


def decibels(loss: float) -> float:
    return round(-10 * math.log10(max(loss, NOISE)), 3)


def tune(
    student: Student, target: Target, backends: Sequence[str], options: TuneOptions, cache: Cache, progress: Progress
) -> Tuned:
    """Walk the front. UsageError for what cannot be asked, GateError for caps that nothing keeps to."""
    require_one_size(student, "a search of its size")
    if student.config.sampler is None:
        raise UsageError(
            f"student `{student.config.name}` draws no pictures that a budget could be weighed against",
            hint="give a text-to-image or image-to-video student",
        )
    speeds = {name: target_speed(target.backend(name), cache, progress) for name in backends}
    if options.max_latency_ms is not None and speeds[backends[0]] is None:
        raise UsageError(
            f"nobody has measured how fast target `{target.name}` runs fp32 with `{backends[0]}`",
            hint="ask for a share instead: `--max-latency 0.6x`",
        )
    known = None
    if options.precisions != ():
        known = priced(student, target, backends, options.precisions, cache, progress)
    probe = Probe.of(student, min(8, options.samples), options.steps)
    scores: dict[str, dict[str, Sequence[float]]] = {}

    def rank(part: Component, found: Spaces) -> dict[str, Sequence[float]]:
        if part.name not in scores:
            progress.stage(f"importance of units of {part.name}", probe.count)
            made = importance(probe, {part.name: found}, progress.advance)[part.name]
            scores[part.name] = {name: units.tolist() for name, units in made.units.items()}
        return scores[part.name]

    wanted = Options(
        options.components, depth=options.depth, samples=options.samples, steps=options.steps, jobs=options.jobs
    )
    made = assemble(student, target, backends, wanted, find, rank, cache, progress, known)
    whole = made.whole.totals
    along = f"latency {backends[0]}"
    problem = replace(made.problem, caps=_caps(options, whole, backends, speeds), minimise={"picture": 1.0})
    progress.stage("walk the front", options.points + 2)
    try:
        choices = walk(problem, along, options.points, progress.advance)
    except NoFitError as error:
        raise refused(error, problem.caps, whole) from error
    front = _measured(made, choices, whole, options, progress)
    kept = sorted(_undominated(front, along), key=lambda one: one.costs[along])
    good = [one for one in kept if one.psnr >= options.min_psnr][: options.best]
    recipes = tuple((_recipe(made, one, target, backends), made.pruned(one.choice)) for one in good)
    errors = {
        name: sorted(one.error for one in found.values())[len(found) // 2]
        for name, found in made.surfaces.items()
        if found
    }
    latency = {}
    for name in backends:
        scale = speeds[name]
        latency[f"latency {name}"] = whole[f"latency {name}"] * (1.0 if scale is None else scale.factor)
    return Tuned(tuple(front), recipes, latency, speeds, _correlation(made), errors)


def _caps(
    options: TuneOptions, whole: dict[str, float] | Any, backends: Sequence[str], speeds: dict[str, TargetSpeed | None]
) -> dict[str, float]:
    caps = {}
    for name in backends:
        if options.max_latency is not None:
            caps[f"latency {name}"] = options.max_latency * whole[f"latency {name}"]
    first = speeds[backends[0]]
    if options.max_latency_ms is not None and first is not None:
        caps[f"latency {backends[0]}"] = options.max_latency_ms / first.factor
    if options.max_macs is not None:
        caps["macs"] = options.max_macs * whole["macs"]
    if options.max_size is not None:
        caps["bytes"] = options.max_size * whole["bytes"]
    return caps


def _measured(
    made: Assembled, choices: Sequence[Choice], whole: Any, options: TuneOptions, progress: Progress
) -> list[Measured]:
    progress.stage("measure the points of the front", 1)
    unseen = Trial.of(made.student, options.steps, options.samples, unseen=True)
    _ = unseen.pictures, unseen.conditioning  # once, before they go to other processes
    prompts = options.prompts if made.student.config.name == "shapes" else 0
    jobs = [(unseen, made.prunings(choice), prompts) for choice in choices]
    found = Parallel(n_jobs=options.jobs)(delayed(drawn)(*one) for one in jobs)
    progress.advance()
    points = []
    for choice, (loss, alignment) in zip(choices, found, strict=True):
        costs = {
            name: choice.totals[name] / whole[name]
            for name in whole
            if whole[name] and name.split(" ")[0] in ("latency", "macs", "bytes")
        }
        compressed = sum(len(ops) for ops in made.precisions(choice).values())
        removed = len(choice.removed)
        loss_all = choice.totals["picture"]
        points.append(Measured(choice, costs, loss_all, decibels(loss), alignment, removed, compressed))
    return points


def drawn(trial: Trial, prunings: dict[str, Pruning], prompts: int) -> tuple[float, float | None]:
    """The loss of what is left, and the alignment of `shapes`: a job for another process."""
    from functools import partial

    from edgegen.prune.apply import pruned
    from edgegen.students.sample import draw_many
    from edgegen.students.shapes.evaluate import evaluate

    student = pruned(trial.student, prunings)
    loss = trial.loss(student)
    if not prompts:
        return loss, None
    return loss, evaluate(partial(draw_many, student, steps=trial.steps), trial.steps, prompts).alignment


def _undominated(points: Sequence[Measured], along: str) -> list[Measured]:
    """Those that no other is both faster and truer than, as measured."""

    def beaten(one: Measured) -> bool:
        return any(
            other.costs[along] <= one.costs[along] and other.psnr >= one.psnr and other is not one for other in points
        )

    return [one for one in points if not beaten(one)]


def _recipe(made: Assembled, point: Measured, target: Target, backends: Sequence[str]) -> Recipe:
    measured = {"picture_psnr_db": point.psnr}
    if point.alignment is not None:
        measured["alignment"] = point.alignment
    return Recipe(
        student=made.student.config.name,
        student_sha256=made.student.fingerprint,
        target=target.name,
        target_sha256=target.sha256,
        backends=tuple(backends),
        prunings=made.prunings(point.choice),
        precisions=made.precisions(point.choice),  # type: ignore[arg-type]
        estimated={**point.costs, "picture_psnr_db": point.psnr_estimated},
        measured=measured,
    )


def _correlation(made: Assembled) -> float | None:
    from scipy.stats import spearmanr

    if len(made.measured) < 3:
        return None
    guesses = [made.estimates[name].picture for name in made.measured]
    return round(float(spearmanr(guesses, list(made.measured.values())).statistic), 3)
