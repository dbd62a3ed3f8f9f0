"""What a plan is asked for, and what follows from it before anything is tried: prompts, ranges, candidates, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgegen.cache import Cache
from edgegen.errors import UsageError
from edgegen.graph.count import count
from edgegen.precision.calibrate import Ranges, affordable, calibrate_once
from edgegen.precision.calls import Calls
from edgegen.precision.canonical import canonical_passes, timesteps_of
from edgegen.precision.cost import Candidate, candidates, places, work_of
from edgegen.precision.expected import fp32_bytes
from edgegen.precision.memo import planner_fingerprint
from edgegen.precision.mend import Mended
from edgegen.precision.options import PlanOptions, Progress
from edgegen.precision.panel import panel
from edgegen.precision.pictures import TOLERANCE, Pictures, Sample
from edgegen.precision.plan import OpPlan, Precision
from edgegen.precision.prompts import default_settings, prompts_for
from edgegen.precision.repair.tensors import content
from edgegen.precision.sensitivity import Key
from edgegen.precision.simulate import Drawing, Network
from edgegen.students.sample import sampler_table
from edgegen.students.student import Student
from edgegen.targets import Target
from edgegen.targets.model import QuantizableOp

Experiment = Pictures | Calls


@dataclass(frozen=True)
class Asked:
    """A student, a target, its backends and the user's options."""

    student: Student
    target: Target
    backends: tuple[str, ...]
    options: PlanOptions
    cache: Cache
    progress: Progress
    networks: Mapping[str, Network]
    """Of the canonical graphs; of the equalised ones, once `equal` holds what was moved."""
    equal: Mended = field(default_factory=lambda: Mended({}))

    def latency(self) -> dict[str, float] | None:
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
            shares[name] = self.options.max_latency_ms / (1e3 * self.macs() / speed.macs_per_second)
        return shares

    def size(self) -> int | None:
        ratio = self.options.max_size_ratio
        return self.options.max_size if ratio is None else int(ratio * fp32_bytes(self.networks))

    def candidates(self, base: Precision) -> dict[Key, tuple[Candidate, ...]]:
        found = {}
        for name, network in self.networks.items():
            at = places(network.program, network.sites)
            for key, site in network.sites.items():
                found[name, key] = candidates(
                    site.kind, at[key], self.target, self.backends, base, self.options.precisions, work_of(site)
                )
        return found

    def ranges(self) -> Ranges:
        """On every number of steps that the student serves."""
        self.progress.stage("calibrate", 0)
        settings, counts = default_settings(), sorted(self.times())
        programs = {name: network.program for name, network in self.networks.items()}
        prompts = self.prompts()[: affordable(programs, counts, settings)]
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

    def prompts(self) -> tuple[str, ...]:
        return prompts_for(self.student, self.options.calibration)

    def tried(self) -> tuple[str, ...]:
        """From the end: ranges are from the beginning, and repairs learn there. As many as there are pairs of them to
        judge, if enough others are left; none that builds are judged on."""
        known = tuple(dict.fromkeys(self.prompts()))
        others = tuple(one for one in known if one not in self.student.config.example_prompts)
        pool = others if len(others) > self.options.samples else known
        return pool[
            -max(self.options.samples + 1, min(self.options.judged + 1, len(pool) - default_settings().prompts)) :
        ]

    def ops(self, key: Key, found: Sequence[Candidate], observed: Ranges) -> tuple[OpPlan, ...]:
        site, seen = self.networks[key[0]].sites[key[1]], observed.components[key[0]][key[1]]
        facts: dict[str, Any] = {"op": site.kind, "weights": site.weights, "macs": site.macs, "input": seen.input}
        facts |= {"output": None if self.float_output(site.kind) else seen.output, "step_inputs": seen.step_inputs}
        facts["other"] = seen.other if site.kind == "matmul" else None
        return tuple(
            OpPlan(precision=one.precision, form=one.form, group=one.group, **facts)  # type: ignore[arg-type]
            for one in found
        )

    def float_output(self, op: QuantizableOp) -> bool:
        """Whether every backend's w8a8 kernel of it gives float."""
        costs = [self.target.backend(name).cost(op, "w8a8") for name in self.backends]
        return all(cost is not None and cost.float_output for cost in costs)

    def steps(self) -> int:
        sampler = self.student.config.sampler
        assert sampler is not None
        steps = self.options.steps or sampler.default_steps
        sampler_table(self.student, steps)  # refuses steps that the student was not distilled for
        return steps

    def times(self) -> tuple[int, ...]:
        sampler = self.student.config.sampler
        return () if sampler is None else tuple(sampler.times)

    def calls(self) -> dict[str, int]:
        steps = 1 if self.student.config.sampler is None else self.steps()
        return {name: steps if name == "denoiser" else 1 for name in self.networks}

    def experiment(self) -> Experiment:
        if self.student.config.task == "single":
            calls = tuple(
                (name, dict(zip((spec.name for spec in part.inputs), given, strict=True)))
                for name, part in self.student.components.items()
                for given in part.samples()[: self.options.samples]
            )
            return Calls(self.networks, calls, self.options.projections)
        ids = self.student.given(list(self.tried()))
        number, steps = len(ids), [self.steps()] * self.options.samples
        if self.options.steps is None:  # one of each other number that the student serves
            steps += [one for one in sorted(self.times()) if one != self.steps()]
        samples = tuple(
            Sample(ids[i % number][None], self.options.seed + i, ids[(i + 1) % number][None], each)
            for i, each in enumerate(steps)
        )
        others = [] if self.options.steps is not None else [one for one in sorted(self.times()) if one != steps[0]]
        macs = {name: count(network.program).macs for name, network in self.networks.items()}
        tolerance = TOLERANCE if self.options.max_conditioning is None else self.options.max_conditioning
        judge = panel(self.student, ids, steps[0], others, macs, self.options.seed, self.options.judged, tolerance)
        return Pictures(Drawing(self.student, self.networks), samples, self.options.projections, panel=judge)

    def macs(self) -> int:
        return sum(count(one.program).macs * self.calls()[name] for name, one in self.networks.items())

    def settings(self, options: Mapping[Key, tuple[OpPlan, ...]]) -> dict[str, Any]:
        """What decides a measurement: a changed planner never reuses what an older one measured."""
        chosen = [[*key, [op.model_dump(mode="json") for op in made]] for key, made in options.items()]
        return {
            "student": self.student.fingerprint,
            "graphs": {name: sorted(network.sites) for name, network in self.networks.items()},
            "options": chosen,
            "samples": self.options.samples,
            "judged": self.options.judged,
            "prompts": list(self.tried()),
            "projections": self.options.projections,
            "seed": self.options.seed,
            "steps": [self.options.steps, self.calls()],
            "equalised": {name: content(one) for name, one in self.equal.tensors.items()},
        }
