"""Repairs of a plan while it is made: what they are tried on, in which order, and what of them stays.

`Mender.equalised` comes before ranges are observed, `Mender.mended` after precisions are chosen. Prompts are the first
of the calibration's, none of which judges the plan: from most of them a repair learns, and on the others, with their
own noise, it has to show that the picture is no farther from the float student's. What does not is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from edgegen.cache import Cache
from edgegen.errors import EdgegenError
from edgegen.graph.count import count
from edgegen.precision.budget import psnr
from edgegen.precision.memo import kept, kept_tensors
from edgegen.precision.pictures import Pictures, Sample
from edgegen.precision.plan import ComponentPlan
from edgegen.precision.prompts import default_settings
from edgegen.precision.repair.equalise import equalise
from edgegen.precision.repair.q_sched import Factors
from edgegen.precision.repair.sequence import learn_schedule, repair_component
from edgegen.precision.repair.tensors import RepairRecord, Samples, Tensors, apply, content
from edgegen.precision.simulate import Drawing, Network
from edgegen.precision.sites import sites
from edgegen.students.student import Student

LEARNED, HELD_OUT = 6, 2
"""Prompts, each drawn at every number of steps that the student serves."""
FEWEST = 4
"""Of both together; with fewer nothing is repaired."""
MACS = 4e11
"""Multiply-accumulates that drawing all of those once may take; of larger students fewer prompts are drawn."""
Tick = Callable[[], None]


class Repair(BaseModel):
    """What one repair did, or why it changed nothing. dB against float: of a component's output, for roundings on the
    calls that they are learned from and for biases on others; for schedules of the last latent of held-out prompts; of
    the picture, of held-out prompts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    where: str
    """A component, a number of steps, or what is judged."""
    changed: int = 0
    """Tensors, or steps."""
    before_db: float | None = None
    after_db: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        decibels = ""
        if self.before_db is not None and self.after_db is not None:
            decibels = f"{self.before_db:.2f} -> {self.after_db:.2f} dB"
        said = [decibels, f"{self.changed} changed" if self.changed else "", self.reason]
        return f"{self.name}, {self.where}: " + ", ".join(one for one in said if one)


@dataclass(frozen=True)
class Mended:
    """Tensors of each component, those of equalisation among them; and the sampler's factors."""

    tensors: Mapping[str, Tensors]
    schedule: Mapping[int, Factors] = field(default_factory=dict)
    repairs: tuple[Repair, ...] = ()

    def flat(self) -> Tensors:
        """`component/call:place` -> tensor, as a plan's file has them."""
        return {f"{name}/{at}": one for name, found in sorted(self.tensors.items()) for at, one in found.items()}

    def networks(self, floats: Mapping[str, Network]) -> dict[str, Network]:
        """`floats` with the tensors in them."""
        return {name: repaired(network, self.tensors.get(name, {})) for name, network in floats.items()}


def repaired(network: Network, tensors: Tensors) -> Network:
    """`network` with `tensors`; itself where there are none."""
    if not tensors:
        return network
    program = apply(network.program, tensors)
    return Network(network.name, program, sites(program))


@dataclass(frozen=True)
class Mender:
    """`networks` are the canonical graphs of a student that draws, `prompts` none of those that judge."""

    student: Student
    networks: Mapping[str, Network]
    prompts: tuple[str, ...]
    cache: Cache
    done: Tick = lambda: None

    @staticmethod
    def refusal(student: Student, prompts: Sequence[str]) -> str | None:
        """Why nothing can be repaired with these prompts."""
        if student.config.sampler is None:
            return "a student without a sampler has no trajectory to learn from"
        if len(prompts) < FEWEST:
            return f"{len(prompts)} calibration prompts judge nothing else, and repairs take at least {FEWEST}"
        return None

    def equalised(self) -> Mended:
        """Scales moved between channels, component by component; the graphs' function stays."""
        tensors, said = {}, []
        for name, network in self.networks.items():

            def make(name: str = name, network: Network = network) -> tuple[Tensors, Any]:
                made = equalise(network.program, self._samples[0][name])
                return made.tensors, len(made.record.declined)

            found, left = kept_tensors(self.cache, "plan-equalise", self._parts({"component": name}), make)
            if found:
                tensors[name] = found
            reason = "the same function" if found else f"none of {left} inputs has channels that a scale can even out"
            said.append(Repair(name="equalise", where=name, changed=len(found), reason=reason))
            self.done()
        return Mended(tensors, {}, tuple(said))

    def mended(self, plans: Mapping[str, ComponentPlan], equal: Mended) -> Mended:
        """What `plans`, made on the graphs of `equal`, become: weights rounded and biases corrected, then the schedule
        learned, each kept where held-out pictures are no worse for it."""
        made, base = equal, self._loss(plans, equal)
        start = base
        for name, plan in plans.items():
            if plan.compressed:
                tensors, said = self._component(name, plan, equal)
                tried = replace(made, tensors={**made.tensors, name: {**equal.tensors.get(name, {}), **tensors}})
                made, base = self._better(plans, made, tried, base, said, bool(tensors))
            self.done()
        if any(plan.compressed for name, plan in plans.items() if name != "decoder"):
            factors, said = self.schedule(plans, made)
            made, base = self._better(plans, made, replace(made, schedule=factors), base, said, bool(factors))
        self.done()
        whole = Repair(name="picture", where="held-out prompts", before_db=psnr(start), after_db=psnr(base))
        return replace(made, repairs=(*made.repairs, whole.model_copy(update={"reason": "all repairs together"})))

    def _better(
        self,
        plans: Mapping[str, ComponentPlan],
        made: Mended,
        tried: Mended,
        loss: float,
        said: Sequence[Repair],
        changed: bool,
    ) -> tuple[Mended, float]:
        """`tried` where its held-out pictures lose no more than `loss`, what those of `made` do."""
        if not changed:
            return replace(made, repairs=(*made.repairs, *said)), loss
        found = self._loss(plans, tried)
        if found <= loss:
            return replace(tried, repairs=(*made.repairs, *said)), found
        reason = f"held-out pictures would go from {psnr(loss):.2f} to {psnr(found):.2f} dB"
        left = [one.model_copy(update={"changed": 0, "reason": reason}) if one.changed else one for one in said]
        return replace(made, repairs=(*made.repairs, *left)), loss

    def _component(self, name: str, plan: ComponentPlan, equal: Mended) -> tuple[Tensors, list[Repair]]:
        own = equal.tensors.get(name, {})

        def make() -> tuple[Tensors, Any]:
            learned, held_out = (samples[name] for samples in self._samples)
            tensors, records = repair_component(repaired(self.networks[name], own).program, plan, learned, held_out)
            return tensors, [_said(record, name, tensors).model_dump() for record in records]

        parts = {"component": name, "plan": plan.model_dump(mode="json"), "tensors": content(own)}
        tensors, said = kept_tensors(self.cache, "plan-repair", self._parts(parts), make)
        return tensors, [Repair.model_validate(one) for one in said]

    def schedule(self, plans: Mapping[str, ComponentPlan], made: Mended) -> tuple[dict[int, Factors], list[Repair]]:
        """Steps -> factors learned for `plans` on the graphs of `made`, () left out; and what each brought."""
        floats = {name: network.program for name, network in self.networks.items()}
        quantized = {name: network.program for name, network in made.networks(self.networks).items()}
        parts = {name: plan.model_dump(mode="json") for name, plan in plans.items()}
        tensors = {name: content(found) for name, found in made.tensors.items()}
        factors: dict[int, Factors] = {}
        said = []
        for steps in self._counts:

            def make(steps: int = steps) -> Any:
                seed = default_settings().seed
                try:
                    found = learn_schedule(self.student, floats, quantized, plans, self._chosen, steps, seed)
                except EdgegenError as error:
                    return [[], None, None, str(error)]
                return [found.factors, min(200.0, found.before_db), min(200.0, found.after_db), found.reason]

            found, before, after, reason = kept(
                self.cache,
                "plan-schedule",
                self._parts({"plans": parts, "tensors": tensors, "steps": steps}),
                make,
            )
            if found:
                factors[steps] = tuple((a, b) for a, b in found)
            where = f"{steps} step{'s' * (steps > 1)}"
            said.append(
                Repair(name="q-sched", where=where, changed=len(found), before_db=before, after_db=after, reason=reason)
            )
        return factors, said

    def _loss(self, plans: Mapping[str, ComponentPlan], made: Mended) -> float:
        """Of the held-out prompts' pictures against those of the float student, squared, over the square of the peak:
        the mean over numbers of steps."""
        parts = {
            "plans": {name: plan.model_dump(mode="json") for name, plan in plans.items()},
            "tensors": {name: content(found) for name, found in made.tensors.items()},
            "schedule": {str(steps): found for steps, found in made.schedule.items()},
        }

        def measure() -> float:
            drawing = Drawing(self.student, made.networks(self.networks), made.schedule)
            pictures = replace(self._held_out, drawing=drawing, truth=self._held_out.drawing)
            return pictures.loss({name: plan.ops for name, plan in plans.items()})

        return float(kept(self.cache, "plan-held-out", self._parts(parts), measure))

    @cached_property
    def _held_out(self) -> Pictures:
        first = len(self._chosen) - self._kept
        return Pictures(
            Drawing(self.student, self.networks),
            tuple(
                Sample(ids, default_settings().seed + first + index, ids, steps)
                for index, ids in enumerate(self.student.given([one]) for one in self._chosen[first:])
                for steps in self._counts
            ),
        )

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        assert self.student.config.sampler is not None
        return tuple(sorted(self.student.config.sampler.times))

    @cached_property
    def _chosen(self) -> tuple[str, ...]:
        each = {name: count(network.program).macs for name, network in self.networks.items()}
        denoiser = each.pop("denoiser", 0)
        one = sum(number * denoiser + sum(each.values()) for number in self._counts)
        return self.prompts[: max(FEWEST, min(LEARNED + HELD_OUT, int(MACS // max(1, one))))]

    @property
    def _kept(self) -> int:
        """Held out: the last prompts."""
        return max(1, len(self._chosen) * HELD_OUT // (LEARNED + HELD_OUT))

    @cached_property
    def _samples(self) -> tuple[dict[str, Samples], dict[str, Samples]]:
        """Calls' inputs by name on the float trajectory: to learn from, and held out."""
        drawing = Drawing(self.student, self.networks)
        found: tuple[dict[str, Any], dict[str, Any]] = ({name: [] for name in self.networks}, {})
        found[1].update({name: [] for name in self.networks})
        for index, prompt in enumerate(self._chosen):
            into = found[index >= len(self._chosen) - self._kept]
            ids = self.student.given([prompt])
            into[drawing.encoder].append({self.networks[drawing.encoder].inputs[0]: ids})
            for steps in self._counts:
                drawn = drawing.draw(ids, default_settings().seed + index, steps)
                into["denoiser"] += [
                    drawing.denoiser_inputs(step, x, drawn.context)
                    for step, x in zip(drawn.table, drawn.latents, strict=True)
                ]
                into["decoder"].append({self.networks["decoder"].inputs[0]: drawn.decoder_input})
        return found

    def _parts(self, more: dict[str, Any]) -> dict[str, Any]:
        return {
            "student": self.student.fingerprint,
            "graphs": {name: sorted(network.sites) for name, network in self.networks.items()},
            "prompts": list(self._chosen),
            "held_out": self._kept,
            "seed": default_settings().seed,
            "torch": torch.__version__,
            **more,
        }


def _said(record: RepairRecord, where: str, tensors: Tensors) -> Repair:
    changed = len(record.changed)
    reason = record.declined.get("", "" if changed else "not better than the nearest codes")
    before, after = (min(200.0, one) for one in (record.before_db, record.after_db))
    return Repair(name=record.name, where=where, changed=changed, before_db=before, after_db=after, reason=reason)
