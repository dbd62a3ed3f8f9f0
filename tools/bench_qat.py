"""What `edgegen plan --qat N` brings to hard plans of the `shapes` student: quality before and after, time and memory.

    python tools/bench_qat.py --steps 200 --markdown docs/benchmarks/qat-shapes.md

Each subject is a precision of every op at once, those that a plan would leave float among them, or a plan as `edgegen
plan` chooses it. Quality is measured in torch on the fake-quant graphs that artifacts are held against, on prompts and
noise that nothing saw before: the worst picture's PSNR against the float student's, by how much another prompt moves
the denoiser's answer more or less, the worst and the root mean square, and alignment, the share of held-back prompts
that are drawn right. As in `edgegen plan`, what training made is kept where a panel of other prompts finds nothing
worse in it; what the panel said is in the second table. Training is kept in edgegen's cache, and goes on there when it
was cut off; its seconds are then of the last part alone, and said so.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from lines import Lines
from pydantic import BaseModel
from turns import settings_of

from edgegen.cache import Cache
from edgegen.graph.count import count
from edgegen.precision.budget import Budget, Measured, psnr
from edgegen.precision.calibrate import calibrate_once
from edgegen.precision.canonical import canonical_programs
from edgegen.precision.expected import fp32_bytes
from edgegen.precision.memo import kept, planner_fingerprint
from edgegen.precision.mend import Mended
from edgegen.precision.options import Planned
from edgegen.precision.panel import panel
from edgegen.precision.pictures import Pictures, Sample
from edgegen.precision.plan import ComponentPlan, OpPlan, PrecisionPlan
from edgegen.precision.prompts import default_settings, prompts_for
from edgegen.precision.repair.lessons import HeldBack
from edgegen.precision.repair.tensors import Tensors, content
from edgegen.precision.repair.trained import Trainer, nested
from edgegen.precision.simulate import Drawing, Network
from edgegen.precision.sites import sites
from edgegen.students.load import load
from edgegen.students.shapes import family
from edgegen.students.shapes.evaluate import evaluate
from edgegen.students.student import Student

SUBJECTS: dict[str, dict[str, object]] = {
    "all w8a8": {"precision": "w8a8"},
    "all w6 palettes": {"precision": "w6", "form": "palette"},
    "all w4 palettes": {"precision": "w4", "form": "palette"},
    "all w4, groups of 32": {"precision": "w4", "group": 32},
}
COUNTS = (4, 1)
PAIRS = 8
"""Of unseen prompts, for the table."""
PANEL = 24
"""Prompts whose pairs decide whether what was trained is kept."""


class Row(BaseModel):
    """One subject at one number of sampling steps."""

    subject: str
    training: str
    steps: int
    psnr_db: float
    conditioning: float
    """The worst of all pairs and steps."""
    mean_conditioning: float
    """The root of the mean square."""
    alignment: float


class Run(BaseModel):
    """What training one subject took."""

    subject: str
    said: str
    before: str
    after: str
    """What the panel measured without and with what training made; the same where it was not kept."""
    seconds: float
    cpu_seconds: float
    resumed: bool
    peak_gb: float


class Bench:
    def __init__(self, cache: Cache, prompts: int) -> None:
        self.student: Student = load(family.WEIGHTS)
        self.cache, self.prompts = cache, prompts
        programs = canonical_programs(self.student)
        self.networks = {name: Network(name, program, sites(program)) for name, program in programs.items()}
        known = prompts_for(self.student)
        self.judging, deciding = known[-PAIRS - 1 :], known[-PAIRS - 1 - PANEL : -PAIRS - 1]
        self.learning = known[: -PAIRS - 1 - PANEL]
        macs = {name: count(network.program).macs for name, network in self.networks.items()}
        ids = self.student.given(list(deciding))
        self.panel = panel(self.student, ids, COUNTS[0], COUNTS[1:], macs, 3000, PANEL)
        self.truth = Drawing(self.student, self.networks)

    def planned(self, form: Mapping[str, object]) -> Planned:
        """Every op that can have it in one form, by ranges of the student's own trajectory."""
        settings = default_settings()
        programs = {name: network.program for name, network in self.networks.items()}
        learned = self.learning[: settings.fewest]
        found = calibrate_once(
            self.student, programs, dict.fromkeys(programs, "qat"), learned, settings, self.cache, planner_fingerprint()
        )
        parts = {}
        for name, network in self.networks.items():
            ops = {}
            for key, site in network.sites.items():
                group = int(str(form.get("group", 0)))
                weightless = site.weight is None and not str(form["precision"]).startswith("w8a8")
                if weightless or (group and site.shape[1 - site.axis] % group):
                    continue
                seen = found.components[name][key]
                ranges = {"input": seen.input, "output": seen.output, "other": seen.other}
                ops[key] = OpPlan.model_validate({"op": site.kind, "weights": site.weights, **form, **ranges})
            parts[name] = ComponentPlan(float_precision="fp32", ops=ops)
        plan = PrecisionPlan(
            student=self.student.config.name,
            student_sha256=self.student.fingerprint,
            target="none",
            target_sha256="",
            backends=(),
            components=parts,
        )
        return Planned(plan, {}, None, 0)

    def trained(self, subject: str, planned: Planned, steps: int) -> tuple[Planned, Run]:
        """As `edgegen plan --qat` trains it, without a budget that it could miss."""
        lines = Lines()
        plans = {name: part.ops for name, part in planned.plan.components.items()}

        def measure(made: Mended) -> Measured:
            drawing = Drawing(self.student, made.networks(self.networks), made.schedule)
            found = self.panel.judged(self.truth, drawing, plans)
            decibels, least = psnr(found.psnr_loss), psnr(found.psnr_loss_most)
            return Measured(decibels, found.conditioning, None, least, found.conditioning_most, found.pairs)

        trainer = Trainer(self.student, self.networks, self.learning, self.cache, lines, measure, Budget())
        state = list(self.cache.root.glob("*/unfinished/*/state.safetensors"))
        wall, cpu = time.monotonic(), time.process_time()
        made = trainer.trained(planned, steps)
        return made, Run(
            subject=subject,
            said=str(made.repairs[-1]),
            before=measure(Mended(nested(planned.tensors))).said(),
            after=measure(Mended(nested(made.tensors))).said(),
            seconds=time.monotonic() - wall,
            cpu_seconds=time.process_time() - cpu,
            resumed=bool(state),
            peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        )

    def rows(self, subject: str, training: str, planned: Planned | None) -> list[Row]:
        """`planned` None: the float student."""
        found = []
        for steps in COUNTS:
            quality = [200.0, 0.0, 0.0, *self._kept(planned, steps)] if planned is None else self._kept(planned, steps)
            found.append(
                Row(
                    subject=subject,
                    training=training,
                    steps=steps,
                    psnr_db=quality[0],
                    conditioning=quality[1],
                    mean_conditioning=quality[2],
                    alignment=quality[3],
                )
            )
        return found

    def _kept(self, planned: Planned | None, steps: int) -> list[float]:
        parts: dict[str, object] = {"student": self.student.fingerprint, "steps": steps, "prompts": self.prompts}
        if planned is not None:
            parts |= {"plan": planned.plan.model_dump(mode="json"), "tensors": content(dict(planned.tensors))}
        return list(kept(self.cache, "bench-qat", parts, lambda: self._quality(planned, steps)))

    def _quality(self, planned: Planned | None, steps: int) -> list[float]:
        truth = Drawing(self.student, self.networks)
        made: Mapping[str, Tensors] = {} if planned is None else nested(planned.tensors)
        drawing = Drawing(self.student, Mended(made).networks(self.networks))
        ops = {} if planned is None else {name: part.ops for name, part in planned.plan.components.items()}
        changes = {name: drawing.networks[name].changes(part) for name, part in ops.items()}

        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> object:
            for prompt, seed in zip(prompts, seeds, strict=True):
                yield drawing.draw(self.student.given([prompt]), seed, steps, changes).image[0].numpy()

        alignment = evaluate(draw, steps, self.prompts).alignment  # type: ignore[arg-type]
        if planned is None:
            return [alignment]
        ids = [self.student.given([one]) for one in self.judging]
        samples = tuple(Sample(ids[i], 1000 + i, ids[i + 1], steps) for i in range(PAIRS))
        losses = [Pictures(drawing, (one,), truth=truth) for one in samples]
        worst = max(one.loss(ops) for one in losses)
        held = HeldBack(drawing, samples, truth=truth, given=dict(changes)).judge()
        return [psnr(worst), held.worst, held.heard, alignment]


def markdown(rows: Sequence[Row], runs: Sequence[Run], settings: Mapping[str, str]) -> str:
    lines = ["# Training of quantized weights on the `shapes` student", ""]
    lines += [f"- {name}: {value}" for name, value in settings.items()]
    lines += ["", f"Worst of {PAIRS} unseen pictures; conditioning over all pairs of their prompts, at every step.", ""]
    lines += ["| what | training | steps | PSNR dB | conditioning: worst | root mean square | alignment |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        decibels = "exact" if row.psnr_db >= 200 else f"{row.psnr_db:.2f}"
        heard = f"{row.conditioning:.2%} | {row.mean_conditioning:.2%} | {row.alignment:.1%}"
        lines.append(f"| {row.subject} | {row.training} | {row.steps} | {decibels} | {heard} |")
    lines += ["", "| what | record | the panel, before | after | seconds | of CPU | peak GB |"]
    lines += ["|---|---|---|---|---:|---:|---:|"]
    for run in runs:
        part = ", last part alone" if run.resumed else ""
        said = run.said.replace("|", "/")
        lines.append(
            f"| {run.subject} | {said} | {run.before} | {run.after} | {run.seconds:.0f}{part} | "
            f"{run.cpu_seconds:.0f} | {run.peak_gb:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--subject", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--prompts", type=int, default=108, help="held-back prompts for alignment")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, help="default: edgegen's own")
    parser.add_argument("--markdown", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    bench = Bench(Cache(asked.cache), asked.prompts)
    head = settings_of((), asked.threads)
    rows, runs = bench.rows("float", "", None), []
    for subject in asked.subject:
        print(subject, file=sys.stderr, flush=True)
        before = bench.planned(SUBJECTS[subject])
        after, run = bench.trained(subject, before, asked.steps)
        runs.append(run)
        rows += bench.rows(subject, "none", before)
        if after.tensors:
            rows += bench.rows(subject, f"{asked.steps} steps", after)
    settings = head | {
        "fp32 bytes of all weights": f"{fp32_bytes(bench.networks):,.0f}",
        "held-back prompts for alignment": str(asked.prompts),
    }
    text = markdown(rows, runs, settings)
    print(text)
    if asked.markdown:
        asked.markdown.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
