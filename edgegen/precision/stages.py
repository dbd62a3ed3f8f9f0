"""The stages of a plan: candidates, ranges, sensitivity, choice, measurement. What takes long is cached by content."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgegen.precision.asked import Asked, Experiment
from edgegen.precision.budget import Budget, Measured, costs_like, problem, psnr, within
from edgegen.precision.calls import Calls
from edgegen.precision.choose import Choice, InfeasibleError, Problem, choose
from edgegen.precision.cost import Candidate, float_precision
from edgegen.precision.expected import expected, fp32_bytes, front, measured_of, said
from edgegen.precision.file import Notes
from edgegen.precision.memo import kept
from edgegen.precision.mend import Mended, Mender, Repair
from edgegen.precision.options import Planned
from edgegen.precision.pictures import Pictures
from edgegen.precision.plan import ComponentPlan, OpPlan, PrecisionPlan
from edgegen.precision.refusal import refused
from edgegen.precision.repair.tensors import content, serialised
from edgegen.precision.repair.trained import Trainer
from edgegen.precision.sensitivity import Confirmed, Effect, Key, average, confirm
from edgegen.precision.settle import MissedError, settle
from edgegen.precision.simulate import Drawing

CONFIRMATION_MACS = 1e12
"""Multiply-accumulates that measuring single ops may take, each as if from the start: about 10 s on two cores."""
MENDABLE = 2.5
"""How many times as much as it may a plan may lose before it is not tried with repairs: they brought up to 8 dB."""
MENDABLE_HEARING = 1.2
"""The same where only how prompts are heard is missed: farther off, repairs did not bring either plan of `shapes` there
that was tried, and trying takes as long as four measurements."""
Plans = Mapping[str, Mapping[str, OpPlan]]


@dataclass(frozen=True)
class Stages:
    """One plan in the making; `make` goes through all of them."""

    asked: Asked

    def make(self) -> Planned:
        """Every stage, with the repairs that `options` asks for."""
        if not self.asked.options.repairs:
            return self._made(None)
        pool = tuple(one for one in dict.fromkeys(self.asked.prompts()) if one not in self.asked.tried())
        reason = Mender.refusal(self.asked.student, pool)
        if reason is not None:
            made = self._made(None)
            none = Repair(name="repairs", where="all components", reason=reason)
            return replace(made, repairs=(none, *made.repairs))
        self.asked.progress.stage("equalise", len(self.asked.networks))
        mender = Mender(self.asked.student, self.asked.networks, pool, self.asked.cache, self.asked.progress.advance)
        equal = mender.equalised()
        return Stages(replace(self.asked, networks=equal.networks(self.asked.networks), equal=equal))._made(mender)

    def known(self) -> tuple[dict[Key, tuple[Candidate, ...]], Mapping[Key, tuple[Effect, ...]]]:
        """Every op's candidates, the float first, and the effects of the others: what a search that decides more than
        precisions starts from."""
        base = self.asked.options.precision or float_precision(self.asked.target, self.asked.backends)
        found = self.asked.candidates(base)
        observed = self.asked.ranges()
        ops = {key: self.asked.ops(key, found[key], observed) for key in found}
        options = {key: made[1:] for key, made in ops.items() if len(made) > 1}
        return found, self._sensitivity(self.asked.experiment(), options).effects

    def _made(self, mender: Mender | None) -> Planned:
        base = self.asked.options.precision or float_precision(self.asked.target, self.asked.backends)
        found = self.asked.candidates(base)
        observed = self.asked.ranges()
        ops = {key: self.asked.ops(key, found[key], observed) for key in found}
        options = {key: made[1:] for key, made in ops.items() if len(made) > 1}
        experiment = self.asked.experiment()
        confirmed = self._sensitivity(experiment, options)
        whole = problem(
            self.asked.networks,
            self.asked.calls(),
            found,
            confirmed.effects,
            self.asked.target,
            self.asked.backends,
            base,
        )
        latency, size = self.asked.latency(), self.asked.size()
        if self.asked.options.like is not None:
            latency, size = costs_like(whole, self.asked.options.like, self.asked.backends)
        budget = self.asked.options.budget(latency, size)
        asked = within(whole, budget, self.asked.backends)
        self.asked.progress.stage("choose, measure", 0)

        def plans(choice: Choice) -> dict[str, dict[str, OpPlan]]:
            chosen: dict[str, dict[str, OpPlan]] = {name: {} for name in self.asked.networks}
            for item, option in zip(whole.items, choice.options, strict=True):
                key = (item.component, item.key)
                chosen[item.component][item.key] = ops[key][item.options.index(option)]
            return chosen

        def measure(choice: Choice) -> Measured:
            return self._measured(experiment, plans(choice), budget)

        def planned(choice: Choice, measured: Measured) -> Planned:
            components = {name: ComponentPlan(float_precision=base, ops=made) for name, made in plans(choice).items()}
            plan = PrecisionPlan(
                student=self.asked.student.config.name,
                student_sha256=self.asked.student.fingerprint,
                target=self.asked.target.name,
                target_sha256=self.asked.target.sha256,
                backends=self.asked.backends,
                components=components,
                calibration=observed.calibration,
                budget=self.asked.options.asked(budget),
                predicted=self._predicted(choice, measured, confirmed.rank_correlation),
                front=front(whole, self.asked.backends),
            )
            return Planned(plan, _notes(options, confirmed), confirmed.rank_correlation, len(confirmed.measured))

        made = None if mender is None else self._hopeful(mender, asked, budget, measure, planned, experiment)
        if made is None:
            try:
                choice, measured = settle(asked, budget, measure, self.asked.progress.advance)
            except (InfeasibleError, MissedError) as error:
                raise refused(error, asked, budget, measure, self.asked.progress.advance) from error
            made = planned(choice, measured)
            if mender is not None:
                made = self._mended(mender, made, experiment, measured, budget)
        return made if self.asked.options.qat is None else self._trained(mender, made, experiment, budget)

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
        missed = before.misses(budget)
        if not missed or before.short(budget) > (MENDABLE if "psnr" in missed else MENDABLE_HEARING):
            return None
        made = self._mended(mender, planned(choice, before), experiment, before, budget)
        return made if measured_of(made.plan.predicted).keeps(budget) else None

    def _trained(self, mender: Mender | None, planned: Planned, experiment: Experiment, budget: Budget) -> Planned:
        """With the training that `options` asks for."""
        floats = self.asked.networks if mender is None else mender.networks
        plans = {name: part.ops for name, part in planned.plan.components.items()}

        def measure(made: Mended) -> Measured:
            assert isinstance(experiment, Pictures)
            drawing = Drawing(self.asked.student, made.networks(floats), made.schedule)
            return self._measured(
                replace(experiment, drawing=drawing, truth=Drawing(self.asked.student, floats)), plans, budget, made
            )

        judging = {*self.asked.tried(), *self.asked.student.config.example_prompts}  # of plans, and of builds
        pool = tuple(one for one in dict.fromkeys(self.asked.prompts()) if one not in judging)
        trainer = Trainer(
            self.asked.student, floats, pool, self.asked.cache, self.asked.progress, measure, budget, mender
        )
        return trainer.trained(planned, self.asked.options.qat or 0)

    def _mended(
        self, mender: Mender, planned: Planned, experiment: Experiment, before: Measured, budget: Budget
    ) -> Planned:
        """With the repairs that come after the choice, where the plan still keeps to `budget` with them."""
        plan = planned.plan
        self.asked.progress.stage("repair, measure", len(self.asked.networks) + 2)
        made = mender.mended(plan.components, self.asked.equal)
        plans = {name: part.ops for name, part in plan.components.items()}
        after = before
        if (made.tensors, made.schedule) != (self.asked.equal.tensors, self.asked.equal.schedule):
            assert isinstance(experiment, Pictures)
            drawing = Drawing(self.asked.student, made.networks(mender.networks), made.schedule)
            tried = replace(experiment, drawing=drawing, truth=Drawing(self.asked.student, mender.networks))
            after = self._measured(tried, plans, budget, made)
            if before.keeps(budget) and not after.keeps(budget):
                reason = f"with them the plan misses its budget: {before.said()} became {after.said()}"
                left = Repair(name="repairs", where="after the choice", reason=reason)
                made, after = replace(self.asked.equal, repairs=(*self.asked.equal.repairs, left)), before
        self.asked.progress.advance()
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

    def _sensitivity(self, experiment: Experiment, options: Mapping[Key, tuple[OpPlan, ...]]) -> Confirmed:
        """Estimates, an entry of the cache for each sample; then the measured ones."""
        if not options:
            return Confirmed({}, {})
        settings = self.asked.settings(options)
        self.asked.progress.stage("sensitivity: one backward pass a sample", experiment.count)
        found = []
        for index in range(experiment.count):
            made = kept(
                self.asked.cache,
                "plan-estimate",
                {**settings, "sample": index},
                lambda index=index: _plain(experiment.estimate(index, options)),  # type: ignore[misc]
            )
            found.append(_effects(made))
            self.asked.progress.advance()
        effects = average(found)
        top, spread = self._confirmed(experiment.count)
        self.asked.progress.stage(
            "sensitivity: single ops measured", min(top + spread, sum(map(len, options.values())))
        )

        def measure() -> list[Any]:
            confirmed = confirm(experiment, options, effects, top, spread, self.asked.progress.advance)
            return [[*key, index, *pair] for (key, index), pair in confirmed.measured.items()]

        rows = kept(self.asked.cache, "plan-confirm", {**settings, "top": top, "spread": spread}, measure)
        return Confirmed.of(effects, {((name, key), index): (a, b) for name, key, index, a, b in rows})

    def _confirmed(self, samples: int) -> tuple[int, int]:
        """How many ops are measured alone: of large students fewer, by `CONFIRMATION_MACS`."""
        asked = self.asked.options.confirmed + self.asked.options.spread
        share = min(1.0, CONFIRMATION_MACS / max(1, asked * samples * self.asked.macs()))
        top, spread = (
            max(min(4, n), round(share * n)) for n in (self.asked.options.confirmed, self.asked.options.spread)
        )
        return top, spread

    def _measured(self, experiment: Experiment, plans: Plans, budget: Budget, made: Mended | None = None) -> Measured:
        """`plans` on `experiment`, whose graphs are those of `made` where repairs have changed them. What is plainly
        outside `budget` is measured on fewer prompts."""

        allowed = math.inf if budget.conditioning is None else budget.conditioning

        def measure() -> list[float | None]:
            alignment = None
            if self.asked.options.min_alignment is not None:
                alignment = self._alignment(experiment, plans)
            if isinstance(experiment, Calls):
                return [psnr(experiment.loss(plans)), 0.0, alignment, None, None, 0]
            found = experiment.judged(plans, allowed)
            losses = [psnr(found.psnr_loss), found.conditioning, alignment, psnr(found.psnr_loss_most)]
            return [*losses, found.conditioning_most, found.pairs]

        extra: dict[str, Any] = {
            "plans": {
                name: {key: op.model_dump(mode="json") for key, op in ops.items()} for name, ops in plans.items()
            },
            "alignment": self.asked.options.min_alignment and self.asked.options.alignment_prompts,
            "allowed": budget.conditioning,
        }
        if made is not None:
            extra["repaired"] = content(made.flat())
            extra["schedule"] = {str(steps): factors for steps, factors in made.schedule.items()}
        return Measured(*kept(self.asked.cache, "plan-measure", {**self.asked.settings({}), **extra}, measure))

    def _alignment(self, experiment: Experiment, plans: Plans) -> float:
        """Of the `shapes` student computed so, over an even share of its held-back prompts."""
        from edgegen.students.shapes.evaluate import evaluate

        assert isinstance(experiment, Pictures)
        drawing = experiment.drawing
        changed = {name: drawing.networks[name].changes(ops) for name, ops in plans.items()}

        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Any:
            for prompt, seed in zip(prompts, seeds, strict=True):
                yield (
                    drawing.draw(self.asked.student.given([prompt]), seed, self.asked.steps(), changed).image[0].numpy()
                )

        return evaluate(draw, self.asked.steps(), self.asked.options.alignment_prompts).alignment

    def _predicted(self, choice: Choice, measured: Measured, correlation: float | None) -> dict[str, float]:
        return expected(
            choice,
            measured,
            correlation,
            self.asked.target,
            self.asked.backends,
            self.asked.macs(),
            fp32_bytes(self.asked.networks),
        )


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
