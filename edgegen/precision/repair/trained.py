"""`edgegen plan --qat N`: training as the last repair of a plan, judged and recorded as the others are.

It starts from what the repairs without training left, without their schedule, which was learned for other errors; the
schedule is learned again behind it. What held-back prompts are no better for is not taken, nor what makes anything
worse that the plan says of itself: pictures or how prompts are heard, the mean of the one and the worst of the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edgegen.cache import Cache
from edgegen.errors import EdgegenError
from edgegen.graph.count import count
from edgegen.precision.budget import Budget, Measured, psnr
from edgegen.precision.expected import said
from edgegen.precision.memo import planner_fingerprint
from edgegen.precision.mend import Mended, Mender, Repair
from edgegen.precision.options import Planned, Progress
from edgegen.precision.pictures import Sample
from edgegen.precision.plan import COMPRESSED, ComponentPlan, OpPlan
from edgegen.precision.prompts import default_settings
from edgegen.precision.repair.lessons import Components, HeldBack, Judged, Lessons, Trajectories
from edgegen.precision.repair.qat import Course, Training
from edgegen.precision.repair.straight_through import Trainable
from edgegen.precision.repair.tensors import Tensors, content, load, save, serialised
from edgegen.precision.simulate import Drawing, Network
from edgegen.students.archive import available_memory
from edgegen.students.student import Student

FEWEST = 4
"""Prompts, of learning and judging together."""
HELD_BACK = 4
"""Of them at most so many judge, and at most a third; fewer of large students, by `MACS`."""
MACS = 4e11
"""Multiply-accumulates that judging once may take."""
SEED = 100_000
"""Added to the calibration's: lessons have noise that nothing else is drawn from."""
COPIES = 7
"""Of each trained weight: as repairs left it, as it is trained, on its grid, its gradient, two moments, the best."""
KEPT_FOR_GRADIENTS = 1.5
"""Times the bytes of all values of a graph: of `shapes` 0.5 to 1.1 are kept for the way back, and gradients come on."""


def memory_needed(networks: Mapping[str, Network], plans: Mapping[str, Mapping[str, OpPlan]] | None = None) -> int:
    """Bytes that training takes beside the student itself, estimated; with `plans` None, of every op that has a
    weight."""
    trained = sum(
        site.weights
        for name, network in networks.items()
        for key, site in network.sites.items()
        if plans is None or (key in plans.get(name, {}) and plans[name][key].precision in COMPRESSED)
    )
    largest = 0
    for name, network in networks.items():
        values = [node.meta.get("val") for node in network.program.graph.nodes if node.op == "call_function"]
        held = sum(one.numel() * one.element_size() for one in values if isinstance(one, torch.Tensor))
        largest = max(largest, held * (2 if name == "denoiser" else 1))  # a pair of prompts at once
    return int(4 * COPIES * trained + KEPT_FOR_GRADIENTS * largest)


def check_memory(networks: Mapping[str, Network], plans: Mapping[str, Mapping[str, OpPlan]] | None = None) -> int:
    """`memory_needed`; EdgegenError where this machine has less."""
    needed, free = memory_needed(networks, plans), available_memory()
    if free is not None and needed > free:
        raise EdgegenError(
            f"training this student takes about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free",
            hint="plan without `--qat`, or on a machine with more memory",
        )
    return needed


@dataclass(frozen=True)
class Trainer:
    """`floats` are the canonical graphs; `prompts` none of those that judge the plan; `mender` learns the schedule
    again, where repairs were asked for. `measure` judges a plan with what was made of it, on other prompts."""

    student: Student
    floats: Mapping[str, Network]
    prompts: tuple[str, ...]
    cache: Cache
    progress: Progress
    measure: Callable[[Mended], Measured]
    """For students that draw; others are measured on their example inputs."""
    budget: Budget
    mender: Mender | None = None

    def trained(self, planned: Planned, steps: int) -> Planned:
        """`planned`, trained for at most `steps` steps, or as it was with the reason why."""
        plans = planned.plan.components
        before = Mended(nested(planned.tensors), dict(planned.plan.sampler), planned.repairs)
        reason = self._refusal(plans)
        if reason:
            return _left(planned, Repair(name="qat", where=f"{steps} steps", reason=reason))
        needed = check_memory(self.floats, {name: part.ops for name, part in plans.items()})
        self.progress.note(f"training takes about {max(0.1, needed / 1e9):.1f} GB of memory")
        self.progress.stage("quantization-aware training", steps)
        tensors, course = self._course(plans, before, steps)
        where = f"{course.best_step} steps" if course.best_step else f"{course.step} steps"
        if not course.best_step:
            reason = course.ended or "held-back prompts are no better for it"
            return _left(planned, Repair(name="qat", where=where, before_db=psnr(course.before[0]), reason=reason))
        self.progress.stage("judge what was trained", 3)
        after = self._scheduled(plans, replace(before, tensors=_merged(before.tensors, tensors), schedule={}))
        worth = self._judged(plans, before), self._judged(plans, after)
        self.progress.advance()
        decibels: dict[str, Any] = {"before_db": psnr(worth[0].loss), "after_db": psnr(worth[1].loss)}
        reason = worth[1].spoils(worth[0])
        if reason:
            return _left(planned, Repair(name="qat", where=where, reason=reason, **decibels))
        measured = self._measured(plans, before), self._measured(plans, after)
        self.progress.advance()
        if measured[0].keeps(self.budget) and not measured[1].keeps(self.budget):
            reason = f"with it the plan misses its budget: {measured[0].said()} became {measured[1].said()}"
            return _left(planned, Repair(name="qat", where=where, reason=reason))
        if measured[1].spoils(measured[0]):
            reason = f"it would make the plan worse: {measured[0].said()} became {measured[1].said()}"
            return _left(planned, Repair(name="qat", where=where, reason=reason))
        changed = sum(map(len, tensors.values()))
        record = Repair(name="qat", where=where, changed=changed, reason=course.ended, **decibels)
        return self._planned(planned, after, record, *measured)

    def _planned(self, planned: Planned, made: Mended, record: Repair, before: Measured, after: Measured) -> Planned:
        tensors = made.flat()
        line = f"qat: {record.where}, {record.before_db:.2f} -> {record.after_db:.2f} dB"
        kept = [one for one in planned.plan.repairs if one != "q-sched"]
        learned = ["q-sched"] if made.schedule else []
        plan = planned.plan.model_copy(
            update={
                "predicted": planned.plan.predicted
                | said(after)
                | {"picture_psnr_db_untrained": round(before.psnr, 3)},
                "repairs": (*kept, line, *learned),
                "tensors_sha256": hashlib.sha256(serialised(tensors)).hexdigest(),
                "sampler": dict(made.schedule),
            }
        )
        return replace(planned, plan=plan, tensors=tensors, repairs=(*made.repairs, record))

    def _refusal(self, plans: Mapping[str, ComponentPlan]) -> str:
        if not any(
            op.precision in COMPRESSED and op.op != "matmul" for part in plans.values() for op in part.ops.values()
        ):
            return "no weight is compressed"
        if self.student.config.sampler is not None and len(self.prompts) < FEWEST:
            return f"{len(self.prompts)} calibration prompts judge nothing else, and training takes at least {FEWEST}"
        return ""

    def _course(
        self, plans: Mapping[str, ComponentPlan], made: Mended, steps: int
    ) -> tuple[dict[str, Tensors], Course]:
        """From the cache, or from where a killed run came to."""
        ops = {name: part.ops for name, part in plans.items()}
        key = self.cache.key(
            "plan-qat",
            planner=planner_fingerprint(),
            student=self.student.fingerprint,
            graphs={name: sorted(network.sites) for name, network in self.floats.items()},
            plans={name: part.model_dump(mode="json") for name, part in plans.items()},
            tensors={name: content(found) for name, found in made.tensors.items()},
            prompts=list(self.prompts),
            steps=steps,
            seed=default_settings().seed + SEED,
            torch=torch.__version__,
        )

        def build(folder: Path) -> None:
            quantized = made.networks(self.floats)
            trainable = Trainable.of(quantized, ops)
            state = self.cache.unfinished(key) / "state.safetensors"
            course = Training(trainable, self._lessons(quantized), steps, state, self.progress.advance).run()
            flat = {f"{name}/{at}": one for name, found in trainable.tensors().items() for at, one in found.items()}
            digest = save(folder / "made.safetensors", flat if course.best_step else {})
            (folder / "made.json").write_text(json.dumps([digest, course.model_dump_json()]))

        entry = self.cache.directory(key, build)
        digest, course = json.loads((entry / "made.json").read_text())
        return nested(load(entry / "made.safetensors", digest)), Course.model_validate_json(course)

    def _lessons(self, quantized: Mapping[str, Network]) -> Lessons:
        seed = default_settings().seed + SEED
        if self.student.config.sampler is None:
            return Components(quantized, self.floats, self._examples(), seed, HELD_BACK)
        floats = Drawing(self.student, self.floats)
        drawing = Drawing(self.student, quantized)
        ids = [self.student.given([one]) for one in self.prompts]
        return Trajectories(
            drawing, floats, ids[: -self._held_back], HeldBack(drawing, self._samples(), truth=floats), seed
        )

    def _measured(self, plans: Mapping[str, ComponentPlan], made: Mended) -> Measured:
        if self.student.config.sampler is not None:
            return self.measure(made)
        return Measured(psnr(self._judged(plans, made, calls=1).loss), 0.0)

    def _judged(self, plans: Mapping[str, ComponentPlan], made: Mended, calls: int = HELD_BACK) -> Judged:
        """On what is held back, as the plan with its tensors says, encoded anew."""
        ops = {name: part.ops for name, part in plans.items()}
        networks = made.networks(self.floats)
        if self.student.config.sampler is None:
            lessons = Components(networks, self.floats, self._examples(), default_settings().seed + SEED, calls)
            with torch.no_grad():
                return lessons.judge({name: networks[name].changes(part) for name, part in ops.items()})
        changes = {name: networks[name].changes(part) for name, part in ops.items()}
        truth = Drawing(self.student, self.floats)
        drawing = Drawing(self.student, networks, made.schedule)
        return HeldBack(drawing, self._samples(), truth=truth, given={**changes}).judge()

    def _scheduled(self, plans: Mapping[str, ComponentPlan], made: Mended) -> Mended:
        """With a schedule learned for it, where held-back pictures are nearer so."""
        repairs = tuple(one for one in made.repairs if one.name != "q-sched")
        if self.mender is None:
            return replace(made, repairs=repairs)
        factors, said = self.mender.schedule(plans, made)
        tried = replace(made, schedule=factors, repairs=(*repairs, *said))
        if factors and self._judged(plans, tried).loss <= self._judged(plans, made).loss:
            return tried
        return replace(made, repairs=repairs)

    def _examples(self) -> dict[str, dict[str, torch.Tensor]]:
        return {
            name: dict(zip((spec.name for spec in part.inputs), part.example_inputs(), strict=True))
            for name, part in self.student.components.items()
        }

    def _samples(self) -> tuple[Sample, ...]:
        """The last prompts, each before the next of them, at every number of steps."""
        ids = [self.student.given([one]) for one in self.prompts[-self._held_back :]]
        seed = default_settings().seed + SEED - 1
        return tuple(
            Sample(one, seed - index, ids[(index + 1) % len(ids)], steps)
            for index, one in enumerate(ids)
            for steps in self._counts
        )

    @property
    def _held_back(self) -> int:
        """At least two: one alone cannot be held against another."""
        each = {name: count(network.program).macs for name, network in self.floats.items()}
        denoiser = each.pop("denoiser", 0)
        one = sum(5 * number * denoiser + sum(each.values()) for number in self._counts)
        return max(2, min(HELD_BACK, len(self.prompts) // 3, int(MACS // max(1, one))))

    @property
    def _counts(self) -> Sequence[int]:
        sampler = self.student.config.sampler
        return [] if sampler is None else sorted(sampler.times)


def _left(planned: Planned, why: Repair) -> Planned:
    return replace(planned, repairs=(*planned.repairs, why))


def nested(flat: Mapping[str, torch.Tensor]) -> dict[str, Tensors]:
    """As `Mended.flat` has them, by component."""
    found: dict[str, Tensors] = {}
    for name, tensor in flat.items():
        component, _, at = name.partition("/")
        found.setdefault(component, {})[at] = tensor
    return found


def _merged(under: Mapping[str, Tensors], over: Mapping[str, Tensors]) -> dict[str, Tensors]:
    return {name: {**under.get(name, {}), **over.get(name, {})} for name in {**under, **over}}
