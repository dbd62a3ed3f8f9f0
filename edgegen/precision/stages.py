"""The stages of a plan: candidates, ranges, sensitivity, choice, measurement. What takes long is cached by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edgegen.cache import Cache
from edgegen.errors import UsageError
from edgegen.graph.count import count
from edgegen.precision.budget import Budget, Measured, problem, psnr, within
from edgegen.precision.calibrate import Ranges, affordable, calibrate_once
from edgegen.precision.calls import Calls
from edgegen.precision.canonical import canonical_passes, timesteps_of
from edgegen.precision.choose import Choice, InfeasibleError, Problem, choose
from edgegen.precision.cost import Candidate, candidates, float_precision, places
from edgegen.precision.expected import expected, fp32_bytes, front, measured_of, said
from edgegen.precision.file import Notes
from edgegen.precision.memo import kept, planner_fingerprint
from edgegen.precision.mend import Mended, Mender, Repair
from edgegen.precision.options import Planned, PlanOptions, Progress
from edgegen.precision.panel import panel
from edgegen.precision.pictures import TOLERANCE, Pictures, Sample
from edgegen.precision.plan import ComponentPlan, OpPlan, Precision, PrecisionPlan
from edgegen.precision.prompts import default_settings, prompts_for
from edgegen.precision.refusal import refused
from edgegen.precision.repair.tensors import content, serialised
from edgegen.precision.repair.trained import Trainer
from edgegen.precision.sensitivity import Confirmed, Effect, Key, average, confirm
from edgegen.precision.settle import MissedError, settle
from edgegen.precision.simulate import Drawing, Network
from edgegen.students.sample import sampler_table
from edgegen.students.student import Student
from edgegen.targets import Target

CONFIRMATION_MACS = 1e12
"""Multiply-accumulates that measuring single ops may take, each as if from the start: about 10 s on two cores."""
MENDABLE = 2.5
"""How many times as much as it may a plan may lose before it is not tried with repairs: they brought up to 8 dB."""
Experiment = Pictures | Calls
Plans = Mapping[str, Mapping[str, OpPlan]]


@dataclass(frozen=True)
class Stages:
    """One plan in the making; `make` goes through all of them."""

    student: Student
    target: Target
    backends: tuple[str, ...]
    options: PlanOptions
    cache: Cache
    progress: Progress
    networks: Mapping[str, Network]
    """Of the canonical graphs; of the equalised ones, once `equal` holds what was moved."""
    equal: Mended = field(default_factory=lambda: Mended({}))

    def make(self) -> Planned:
        """Every stage, with the repairs that `options` asks for."""
        if not self.options.repairs:
            return self._made(None)
        pool = tuple(one for one in dict.fromkeys(self._prompts()) if one not in self._tried())
        reason = Mender.refusal(self.student, pool)
        if reason is not None:
            made = self._made(None)
            none = Repair(name="repairs", where="all components", reason=reason)
            return replace(made, repairs=(none, *made.repairs))
        self.progress.stage("equalise", len(self.networks))
        mender = Mender(self.student, self.networks, pool, self.cache, self.progress.advance)
        equal = mender.equalised()
        return replace(self, networks=equal.networks(self.networks), equal=equal)._made(mender)

    def _made(self, mender: Mender | None) -> Planned:
        base = self.options.precision or float_precision(self.target, self.backends)
        found = self._candidates(base)
        observed = self._ranges()
        ops = {key: self._ops(key, found[key], observed) for key in found}
        options = {key: made[1:] for key, made in ops.items() if len(made) > 1}
        experiment = self._experiment()
        confirmed = self._sensitivity(experiment, options)
        whole = problem(self.networks, self._calls(), found, confirmed.effects, self.target, self.backends, base)
        budget = self.options.budget(self._latency(), self._size())
        asked = within(whole, budget, self.backends)
        self.progress.stage("choose, measure", 0)

        def plans(choice: Choice) -> dict[str, dict[str, OpPlan]]:
            chosen: dict[str, dict[str, OpPlan]] = {name: {} for name in self.networks}
            for item, option in zip(whole.items, choice.options, strict=True):
                key = (item.component, item.key)
                chosen[item.component][item.key] = ops[key][item.options.index(option)]
            return chosen

        def measure(choice: Choice) -> Measured:
            return self._measured(experiment, plans(choice))

        def planned(choice: Choice, measured: Measured) -> Planned:
            components = {name: ComponentPlan(float_precision=base, ops=made) for name, made in plans(choice).items()}
            plan = PrecisionPlan(
                student=self.student.config.name,
                student_sha256=self.student.fingerprint,
                target=self.target.name,
                target_sha256=self.target.sha256,
                backends=self.backends,
                components=components,
                calibration=observed.calibration,
                budget=self.options.asked(budget),
                predicted=self._predicted(choice, measured, confirmed.rank_correlation),
                front=front(whole, self.backends),
            )
            return Planned(plan, _notes(options, confirmed), confirmed.rank_correlation, len(confirmed.measured))

        made = None if mender is None else self._hopeful(mender, asked, budget, measure, planned, experiment)
        if made is None:
            try:
                choice, measured = settle(asked, budget, measure, self.progress.advance)
            except (InfeasibleError, MissedError) as error:
                raise refused(error, asked, budget, measure, self.progress.advance) from error
            made = planned(choice, measured)
            if mender is not None:
                made = self._mended(mender, made, experiment, measured, budget)
        return made if self.options.qat is None else self._trained(mender, made, experiment, budget)

    def _hopeful(
        self,
        mender: Mender,
        asked: Problem,
        budget: Budget,
        measure: Callable[[Choice], Measured],
        planned: Callable[[Choice, Measured], Planned],
        experiment: Experiment,
    ) -> Planned | None:
        """What the estimates choose, where it misses its budget by so little that repairs bring it there: fewer ops
        have to stay float then than if plans had to do without."""
        try:
            choice = choose(asked)
        except InfeasibleError:
            return None
        before = measure(choice)
        if before.keeps(budget) or before.short(budget) > MENDABLE:
            return None
        made = self._mended(mender, planned(choice, before), experiment, before, budget)
        return made if measured_of(made.plan.predicted).keeps(budget) else None

    def _trained(self, mender: Mender | None, planned: Planned, experiment: Experiment, budget: Budget) -> Planned:
        """With the training that `options` asks for."""
        floats = self.networks if mender is None else mender.networks
        plans = {name: part.ops for name, part in planned.plan.components.items()}

        def measure(made: Mended) -> Measured:
            assert isinstance(experiment, Pictures)
            drawing = Drawing(self.student, made.networks(floats), made.schedule)
            return self._measured(
                replace(experiment, drawing=drawing, truth=Drawing(self.student, floats)), plans, made
            )

        judging = {*self._tried(), *self.student.config.example_prompts}  # of plans, and of builds
        pool = tuple(one for one in dict.fromkeys(self._prompts()) if one not in judging)
        trainer = Trainer(self.student, floats, pool, self.cache, self.progress, measure, budget, mender)
        return trainer.trained(planned, self.options.qat or 0)

    def _mended(
        self, mender: Mender, planned: Planned, experiment: Experiment, before: Measured, budget: Budget
    ) -> Planned:
        """With the repairs that come after the choice, where the plan still keeps to `budget` with them."""
        plan = planned.plan
        self.progress.stage("repair, measure", len(self.networks) + 2)
        made = mender.mended(plan.components, self.equal)
        plans = {name: part.ops for name, part in plan.components.items()}
        after = before
        if (made.tensors, made.schedule) != (self.equal.tensors, self.equal.schedule):
            assert isinstance(experiment, Pictures)
            drawing = Drawing(self.student, made.networks(mender.networks), made.schedule)
            tried = replace(experiment, drawing=drawing, truth=Drawing(self.student, mender.networks))
            after = self._measured(tried, plans, made)
            if before.keeps(budget) and not after.keeps(budget):
                reason = f"with them the plan misses its budget: {before.said()} became {after.said()}"
                left = Repair(name="repairs", where="after the choice", reason=reason)
                made, after = replace(self.equal, repairs=(*self.equal.repairs, left)), before
        self.progress.advance()
        tensors = made.flat()
        predicted = plan.predicted | said(after) | {"picture_psnr_db_unrepaired": round(before.psnr, 3)}
        plan = plan.model_copy(
            update={
                "predicted": predicted,
                "repairs": tuple(dict.fromkeys(one.name for one in made.repairs if one.changed)),
                "tensors_sha256": hashlib.sha256(serialised(tensors)).hexdigest() if tensors else None,
                "sampler": dict(made.schedule),
            }
        )
        return replace(planned, plan=plan, tensors=tensors, repairs=made.repairs)

    def _latency(self) -> dict[str, float] | None:
        """Of each backend, the most that it may take as a share of fp32's."""
        if self.options.max_latency is not None:
            return dict.fromkeys(self.backends, self.options.max_latency)
        if self.options.max_latency_ms is None:
            return None
        shares = {}
        for name in self.backends:
            speed = self.target.backend(name).speed
            if speed is None:
                raise UsageError(
                    f"nobody has measured how fast target `{self.target.name}` runs fp32 with `{name}`",
                    hint="ask for a share of it instead: `--max-latency 0.45`",
                )
            shares[name] = self.options.max_latency_ms / (1e3 * self._macs() / speed.macs_per_second)
        return shares

    def _size(self) -> int | None:
        ratio = self.options.max_size_ratio
        return self.options.max_size if ratio is None else int(ratio * fp32_bytes(self.networks))

    def _candidates(self, base: Precision) -> dict[Key, tuple[Candidate, ...]]:
        found = {}
        for name, network in self.networks.items():
            at = places(network.program, network.sites)
            for key, site in network.sites.items():
                found[name, key] = candidates(
                    site.kind, at[key], self.target, self.backends, base, self.options.precisions
                )
        return found

    def _ranges(self) -> Ranges:
        """On every number of steps that the student serves."""
        self.progress.stage("calibrate", 0)
        settings, counts = default_settings(), sorted(self._times())
        programs = {name: network.program for name, network in self.networks.items()}
        prompts = self._prompts()[: affordable(programs, counts, settings)]
        times = timesteps_of(self.student)
        passes = {name: str(canonical_passes(name, times, self.backends)) for name in self.networks}
        passes |= {name: f"{passes[name]}, {content(one)}" for name, one in self.equal.tensors.items()}
        return calibrate_once(
            self.student,
            programs,
            passes,
            prompts,
            settings,
            self.cache,
            planner_fingerprint(),
            done=lambda drawn, of: self.progress.advance(),
        )

    def _prompts(self) -> tuple[str, ...]:
        return prompts_for(self.student, self.options.calibration)

    def _tried(self) -> tuple[str, ...]:
        """From the end: ranges are from the beginning, and repairs learn there. As many as there are pairs of them to
        judge, if enough others are left; none that builds are judged on."""
        known = tuple(dict.fromkeys(self._prompts()))
        others = tuple(one for one in known if one not in self.student.config.example_prompts)
        pool = others if len(others) > self.options.samples else known
        return pool[
            -max(self.options.samples + 1, min(self.options.judged + 1, len(pool) - default_settings().prompts)) :
        ]

    def _ops(self, key: Key, found: Sequence[Candidate], observed: Ranges) -> tuple[OpPlan, ...]:
        site, seen = self.networks[key[0]].sites[key[1]], observed.components[key[0]][key[1]]
        facts: dict[str, Any] = {"op": site.kind, "weights": site.weights, "macs": site.macs, "input": seen.input}
        facts |= {"output": seen.output, "step_inputs": seen.step_inputs}
        facts["other"] = seen.other if site.kind == "matmul" else None
        return tuple(
            OpPlan(precision=one.precision, form=one.form, group=one.group, **facts)  # type: ignore[arg-type]
            for one in found
        )

    def _steps(self) -> int:
        sampler = self.student.config.sampler
        assert sampler is not None
        steps = self.options.steps or sampler.default_steps
        sampler_table(self.student, steps)  # refuses steps that the student was not distilled for
        return steps

    def _times(self) -> tuple[int, ...]:
        sampler = self.student.config.sampler
        return () if sampler is None else tuple(sampler.times)

    def _calls(self) -> dict[str, int]:
        steps = 1 if self.student.config.sampler is None else self._steps()
        return {name: steps if name == "denoiser" else 1 for name in self.networks}

    def _experiment(self) -> Experiment:
        if self.student.config.task == "single":
            calls = tuple(
                (name, dict(zip((spec.name for spec in part.inputs), given, strict=True)))
                for name, part in self.student.components.items()
                for given in part.samples()[: self.options.samples]
            )
            return Calls(self.networks, calls, self.options.projections)
        ids = self.student.given(list(self._tried()))
        number, steps = len(ids), [self._steps()] * self.options.samples
        if self.options.steps is None:  # one of each other number that the student serves
            steps += [one for one in sorted(self._times()) if one != self._steps()]
        samples = tuple(
            Sample(ids[i % number][None], self.options.seed + i, ids[(i + 1) % number][None], each)
            for i, each in enumerate(steps)
        )
        others = [] if self.options.steps is not None else [one for one in sorted(self._times()) if one != steps[0]]
        macs = {name: count(network.program).macs for name, network in self.networks.items()}
        tolerance = TOLERANCE if self.options.max_conditioning is None else self.options.max_conditioning
        judge = panel(self.student, ids, steps[0], others, macs, self.options.seed, self.options.judged, tolerance)
        return Pictures(Drawing(self.student, self.networks), samples, self.options.projections, panel=judge)

    def _sensitivity(self, experiment: Experiment, options: Mapping[Key, tuple[OpPlan, ...]]) -> Confirmed:
        """Estimates, an entry of the cache for each sample; then the measured ones."""
        if not options:
            return Confirmed({}, {})
        settings = self._settings(options)
        self.progress.stage("sensitivity: one backward pass a sample", experiment.count)
        found = []
        for index in range(experiment.count):
            made = kept(
                self.cache,
                "plan-estimate",
                {**settings, "sample": index},
                lambda index=index: _plain(experiment.estimate(index, options)),  # type: ignore[misc]
            )
            found.append(_effects(made))
            self.progress.advance()
        effects = average(found)
        top, spread = self._confirmed(experiment.count)
        self.progress.stage("sensitivity: single ops measured", min(top + spread, sum(map(len, options.values()))))

        def measure() -> list[Any]:
            confirmed = confirm(experiment, options, effects, top, spread, self.progress.advance)
            return [[*key, index, *pair] for (key, index), pair in confirmed.measured.items()]

        rows = kept(self.cache, "plan-confirm", {**settings, "top": top, "spread": spread}, measure)
        return Confirmed.of(effects, {((name, key), index): (a, b) for name, key, index, a, b in rows})

    def _confirmed(self, samples: int) -> tuple[int, int]:
        """How many ops are measured alone: of large students fewer, by `CONFIRMATION_MACS`."""
        asked = self.options.confirmed + self.options.spread
        share = min(1.0, CONFIRMATION_MACS / max(1, asked * samples * self._macs()))
        top, spread = (max(min(4, n), round(share * n)) for n in (self.options.confirmed, self.options.spread))
        return top, spread

    def _measured(self, experiment: Experiment, plans: Plans, made: Mended | None = None) -> Measured:
        """`plans` on `experiment`, whose graphs are those of `made` where repairs have changed them."""

        def measure() -> list[float | None]:
            alignment = None
            if self.options.min_alignment is not None:
                alignment = self._alignment(experiment, plans)
            if isinstance(experiment, Calls):
                return [psnr(experiment.loss(plans)), 0.0, alignment, None, None, 0]
            found = experiment.judged(plans)
            losses = [psnr(found.psnr_loss), found.conditioning, alignment, psnr(found.psnr_loss_most)]
            return [*losses, found.conditioning_most, found.pairs]

        extra: dict[str, Any] = {
            "plans": {
                name: {key: op.model_dump(mode="json") for key, op in ops.items()} for name, ops in plans.items()
            },
            "alignment": self.options.min_alignment and self.options.alignment_prompts,
        }
        if made is not None:
            extra["repaired"] = content(made.flat())
            extra["schedule"] = {str(steps): factors for steps, factors in made.schedule.items()}
        return Measured(*kept(self.cache, "plan-measure", {**self._settings({}), **extra}, measure))

    def _alignment(self, experiment: Experiment, plans: Plans) -> float:
        """Of the `shapes` student computed so, over an even share of its held-back prompts."""
        from edgegen.students.shapes.evaluate import evaluate

        assert isinstance(experiment, Pictures)
        drawing = experiment.drawing
        changed = {name: drawing.networks[name].changes(ops) for name, ops in plans.items()}

        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Any:
            for prompt, seed in zip(prompts, seeds, strict=True):
                yield drawing.draw(self.student.given([prompt]), seed, self._steps(), changed).image[0].numpy()

        return evaluate(draw, self._steps(), self.options.alignment_prompts).alignment

    def _predicted(self, choice: Choice, measured: Measured, correlation: float | None) -> dict[str, float]:
        return expected(
            choice, measured, correlation, self.target, self.backends, self._macs(), fp32_bytes(self.networks)
        )

    def _macs(self) -> int:
        return sum(count(one.program).macs * self._calls()[name] for name, one in self.networks.items())

    def _settings(self, options: Mapping[Key, tuple[OpPlan, ...]]) -> dict[str, Any]:
        """What decides a measurement: a changed planner never reuses what an older one measured."""
        chosen = [[*key, [op.model_dump(mode="json") for op in made]] for key, made in options.items()]
        return {
            "student": self.student.fingerprint,
            "graphs": {name: sorted(network.sites) for name, network in self.networks.items()},
            "options": chosen,
            "samples": self.options.samples,
            "judged": self.options.judged,
            "prompts": list(self._tried()),
            "projections": self.options.projections,
            "seed": self.options.seed,
            "steps": [self.options.steps, self._calls()],
            "equalised": {name: content(one) for name, one in self.equal.tensors.items()},
        }


def _dumped(ops: Mapping[str, OpPlan]) -> dict[str, Any]:
    return {key: op.model_dump(mode="json") for key, op in ops.items()}


def _plain(effects: Mapping[Key, tuple[Effect, ...]]) -> list[Any]:
    return [[*key, [[one.picture, one.conditioning] for one in made]] for key, made in effects.items()]


def _effects(rows: Sequence[Any]) -> dict[Key, tuple[Effect, ...]]:
    return {(name, key): tuple(Effect(*pair) for pair in pairs) for name, key, pairs in rows}


def _notes(options: Mapping[Key, tuple[OpPlan, ...]], confirmed: Confirmed) -> Notes:
    """Beside each op, what each precision of it alone does to the picture."""
    return {
        key: "alone "
        + ", ".join(
            f"{op.precision} {psnr(effect.picture):.1f} dB"
            for op, effect in zip(made, confirmed.effects[key], strict=True)
        )
        for key, made in options.items()
    }
