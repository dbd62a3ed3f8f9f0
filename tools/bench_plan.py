"""Plans of the `shapes` student: what they keep of the picture, at what size, and how fast their denoisers run.

    python tools/bench_plan.py --markdown docs/benchmarks/plan-shapes.md

Quality is measured in torch on the fake-quant graphs that every artifact is held against, on prompts and seeds that no
plan learned from: PSNR of the picture against the float student's, by how much another prompt moves the denoiser's
answer more or less, and alignment, the share of held-back prompts that are drawn right (`--prompts` of the 432). One
plan is for all of `--backend` together, as `edgegen plan --backend onnx,tflite,executorch` makes it. Naive whole-int8
is every convolution and linear in static int8 with one scale a tensor. The student with planted outliers has the same
function as the one that ships. Plans and quality come from edgegen's cache where they were made before by the same
code; latency never does: denoisers of one backend are lowered in this process and called in turns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from int8_ours import by_component
from lines import Lines
from plan_subjects import FACTOR, naive, planted
from pydantic import BaseModel
from turns import in_turns, keep_to, request_of, settings_of

from edgegen.build.graphs import Graphs
from edgegen.cache import Cache
from edgegen.cores import cores
from edgegen.graph.edit import weights
from edgegen.lower.backend import get_backend
from edgegen.precision.budget import psnr
from edgegen.precision.canonical import canonical_passes, canonical_programs, timesteps_of
from edgegen.precision.expected import fp32_bytes
from edgegen.precision.memo import kept
from edgegen.precision.mend import Mended
from edgegen.precision.options import Planned, PlanOptions
from edgegen.precision.pictures import Pictures, Sample
from edgegen.precision.plan import OpPlan
from edgegen.precision.planner import make_plan
from edgegen.precision.prompts import prompts_for
from edgegen.precision.repair.tensors import content
from edgegen.precision.simulate import Drawing, Network
from edgegen.precision.sites import sites
from edgegen.rewrite.choose import shape_preset
from edgegen.rewrite.pipeline import Pipeline
from edgegen.students.load import load
from edgegen.students.shapes import family
from edgegen.students.shapes.evaluate import evaluate
from edgegen.students.student import Student
from edgegen.targets import load_target

STEPS = (4, 1)
BACKENDS = ("tflite", "executorch", "onnx")
ASKED = {"tflite": 0.45, "executorch": 0.60, "onnx": 0.60}
"""Share of its own fp32's latency that the denoiser may take."""
PALETTE = {"precisions": ("w4",), "max_size_ratio": 0.16}
BRIEF = {"samples": 2, "judged": 8, "confirmed": 6, "spread": 12}
"""How much is measured for the plan of the student with planted outliers, and with `--brief` for all: a quarter of what
plans do."""
SAMPLES = 4


class Row(BaseModel):
    """One way to compute one student at one number of steps."""

    student: str
    row: str
    steps: int
    alignment: float
    conditioning: float
    """Mean magnitude of the change of how far another prompt moves the denoiser's answer, a share."""
    psnr_db: float
    bytes_ratio: float


class Timed(BaseModel):
    """One denoiser on one backend, in turns with its own fp32."""

    backend: str
    row: str
    ms: float
    to_fp32: float
    asked: float | None = None
    megabytes: float
    made_s: float


class Found(BaseModel):
    """What one run found; `repairs` has a line for each repair of each plan."""

    settings: dict[str, str]
    rows: list[Row] = []
    timed: list[Timed] = []
    repairs: list[str] = []
    correlations: dict[str, float] = {}
    """Of each plan's estimates with ops measured alone, Spearman's."""


class Bench:
    """One student with its graphs, and what it is tried on."""

    def __init__(self, name: str, student: Student, backends: Sequence[str], cache: Cache, prompts: int) -> None:
        self.name, self.student, self.cache, self.prompts = name, student, cache, prompts
        self.backends = tuple(backends)
        programs = canonical_programs(student, self.backends)
        self.programs = programs
        self.networks = {key: Network(key, program, sites(program)) for key, program in programs.items()}
        self.drawing = Drawing(student, self.networks)
        ids = [student.tokenize([one]) for one in prompts_for(student)[-SAMPLES - 1 :]]
        self.samples = {
            steps: tuple(Sample(ids[i], PlanOptions().seed + i, ids[i + 1], steps) for i in range(SAMPLES))
            for steps in STEPS
        }

    def plan(self, repairs: bool, target: str = "linux-x86", **more: object) -> Planned:
        print(f"{self.name}: plan for {self.backends}, repairs {repairs}", file=sys.stderr, flush=True)
        options = PlanOptions(repairs=repairs, **more)  # type: ignore[arg-type]
        return make_plan(self.student, load_target(target), self.backends, options, self.cache, Lines(), self.programs)

    def rows(
        self,
        row: str,
        drawing: Drawing,
        plans: Mapping[str, Mapping[str, OpPlan]],
        stored: float,
        identity: object,
    ) -> Iterator[Row]:
        for steps in STEPS:

            def measure(steps: int = steps) -> list[float]:
                pictures = Pictures(drawing, self.samples[steps], truth=self.drawing)
                changed = {name: drawing.networks[name].changes(ops) for name, ops in plans.items()}

                def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[np.ndarray]:
                    for prompt, seed in zip(prompts, seeds, strict=True):
                        made = drawing.draw(self.student.tokenize([prompt]), seed, steps, changed)
                        yield made.image[0].numpy()

                found = evaluate(draw, steps, self.prompts)
                return [found.alignment, pictures.conditioning(plans), psnr(pictures.loss(plans))]

            said = {name: {key: op.model_dump(mode="json") for key, op in ops.items()} for name, ops in plans.items()}
            parts = {"student": self.student.fingerprint, "plans": said, "steps": steps, "row": identity}
            alignment, conditioning, decibels = kept(
                self.cache, "bench-plan", {**parts, "prompts": self.prompts, "samples": SAMPLES}, measure
            )
            yield Row(
                student=self.name,
                row=row,
                steps=steps,
                alignment=round(alignment, 4),
                conditioning=round(conditioning, 4),
                psnr_db=round(decibels, 2),
                bytes_ratio=round(stored, 4),
            )

    def float_rows(self) -> Iterator[Row]:
        yield from self.rows("float", self.drawing, {}, 1.0, "float")

    def naive_rows(self) -> Iterator[Row]:
        networks, plans = naive(self.student, self.networks, self.cache)
        total, saved = fp32_bytes(self.networks), 0
        for name, network in self.networks.items():
            values = weights(network.program)
            saved += sum(values[str(network.sites[key].weight)].numel() * 3 for key in plans[name])
        yield from self.rows("naive whole-int8", Drawing(self.student, networks), plans, 1 - saved / total, "naive")

    def planned_rows(self, row: str, made: Planned) -> Iterator[Row]:
        mended = Mended(by_component(made), made.plan.sampler)
        drawing = Drawing(self.student, mended.networks(self.networks), mended.schedule)
        plans = {name: part.ops for name, part in made.plan.components.items()}
        identity = [content(dict(made.tensors)), {str(steps): one for steps, one in mended.schedule.items()}]
        yield from self.rows(row, drawing, plans, made.plan.predicted["bytes_ratio"], identity)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, nargs="+", default=list(BACKENDS))
    parser.add_argument("--unrepaired", action="store_true", help="the plan without repairs too")
    parser.add_argument("--max-size", type=float, help="share of fp32's bytes, for the plan")
    parser.add_argument(
        "--brief", action="store_true", help="measure a quarter of what plans do: minutes instead of many"
    )
    parser.add_argument("--no-palettes", action="store_true", help="leave the palettes for Core ML out")
    parser.add_argument("--prompts", type=int, default=108, help="held-back prompts that alignment is over")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--repeats", type=int, default=60, help="calls of each denoiser that count")
    parser.add_argument("--no-latency", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    keep_to(options.threads)
    torch.set_num_threads(options.threads)
    settings = settings_of(
        options.backend,
        options.threads,
        repeats=f"{options.repeats} calls of each denoiser in turns, medians, after 3 that do not count",
        plans="as for the planted outliers: a quarter measured of what plans do" if options.brief else "as by default",
        pictures=f"{SAMPLES} for PSNR and conditioning, {options.prompts} held-back prompts for alignment",
    )
    print("\n".join(f"{name}: {value}" for name, value in settings.items()), file=sys.stderr, flush=True)
    cache = Cache(None)
    started = time.perf_counter()
    found = Found(settings=settings)

    def write() -> None:
        """After every section, so that a run that is ended early says what it found."""
        found.settings["this run"] = f"{time.perf_counter() - started:.0f} s"
        if options.json:
            options.json.write_text(found.model_dump_json(indent=2) + "\n")
        if options.markdown:
            options.markdown.write_text(_markdown(found))

    def show(made: Iterator[Row]) -> None:
        for row in made:
            found.rows.append(row)
            print(row, flush=True)
        write()

    def planned(bench: Bench, name: str, made: Planned) -> None:
        found.repairs += [f"{name}: {one}" for one in made.repairs]
        if made.rank_correlation is not None:
            found.correlations[name] = round(made.rank_correlation, 3)
        show(bench.planned_rows(name, made))

    brief = BRIEF if options.brief else {}
    student = load(family.WEIGHTS)
    bench = Bench("shapes", student, options.backend, cache, options.prompts)
    show(bench.float_rows())
    show(bench.naive_rows())
    outliers = Bench("shapes, planted outliers", planted(student), ("onnx",), cache, options.prompts)
    show(outliers.naive_rows())
    planned(outliers, "planted outliers, plan for onnx, repaired", outliers.plan(True, **BRIEF))
    plans: list[tuple[str, Planned]] = []
    for repairs in (False, True) if options.unrepaired else (True,):
        name = f"plan for {', '.join(options.backend)}" + ", repaired" * repairs
        plans.append((name, bench.plan(repairs, max_size_ratio=options.max_size, **brief)))
        planned(bench, *plans[-1])
    if not options.no_latency:
        for backend in options.backend:
            for one in _timed(bench, backend, plans, options.repeats):
                found.timed.append(one)
                print(one, flush=True)
            write()
    if not options.no_palettes:
        apple = Bench("shapes", student, ("coreml",), cache, options.prompts)
        for repairs in (False, True):
            name = "w4 palettes for coreml" + ", repaired" * repairs
            planned(apple, name, apple.plan(repairs, "iphone15", **PALETTE, **brief))


def _timed(bench: Bench, backend: str, plans: Sequence[tuple[str, Planned]], repeats: int) -> Iterator[Timed]:
    """Denoisers of `plans` and of fp32, lowered as a build does and called in turns."""
    part = bench.student.components["denoiser"]
    graphs, on = Graphs(), get_backend(backend)
    canonical = canonical_passes("denoiser", timesteps_of(bench.student), bench.backends)
    shape = Pipeline(tuple(shape_preset(backend)))
    context = bench.drawing.encode(bench.samples[4][0].ids)
    drawn = bench.drawing.draw(bench.samples[4][0].ids, PlanOptions().seed, 4)
    given = bench.drawing.denoiser_inputs(drawn.table[0], drawn.latents[0], context)
    calls: list[Callable[[], object]] = []
    made: list[tuple[str, float, float]] = []
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as folder:
        for place, (row, planned) in enumerate([("fp32", None), *plans]):
            started = time.perf_counter()
            if planned is None:
                graph = graphs.shaped(part, canonical, shape)
            else:
                tensors = by_component(planned).get("denoiser", {})
                component = planned.plan.components["denoiser"]
                graph = graphs.planned(
                    part, canonical, shape, component, tensors, (), half=None, quantizes=on.quantizes or "graph"
                )
            at = Path(folder) / str(place)
            at.mkdir()
            request = replace(request_of(graph.program, at), quantized=graph.quantized)
            lowered = on.lower(graph.program, request)
            seconds = time.perf_counter() - started
            path = at / lowered.file
            executable = on.load(path, request.inputs, request.outputs)
            feed = {spec.name: given[spec.name].numpy() for spec in request.inputs}
            calls.append(lambda executable=executable, feed=feed: executable(feed))  # type: ignore[misc]
            size = float(sum(one.stat().st_size for one in at.rglob("*") if one.is_file()))
            made.append((row, size / 1e6, seconds))
        medians = in_turns(calls, repeats)
    for (row, size, seconds), median in zip(made, medians, strict=True):
        yield Timed(
            backend=backend,
            row=row,
            ms=round(median * 1e3, 3),
            to_fp32=round(median / medians[0], 3),
            asked=None if row == "fp32" else ASKED[backend],
            megabytes=round(size, 2),
            made_s=round(seconds, 1),
        )


def _summary(found: Found) -> Iterator[str]:
    """What was asked for in numbers."""
    for name, correlation in found.correlations.items():
        yield f"- rank correlation of the estimates with ops measured alone (asked 0.8), {name}: {correlation}"
    hard = [one for one in found.rows if "planted" in one.student]
    for steps in STEPS:
        naive_db = [one.psnr_db for one in hard if one.steps == steps and one.row.startswith("naive")]
        plan_db = [one.psnr_db for one in hard if one.steps == steps and "plan for" in one.row]
        if naive_db and plan_db:
            gain = plan_db[0] - naive_db[0]
            yield f"- planted outliers, {steps} steps: {naive_db[0]} dB naive, {plan_db[0]} planned: {gain:+.1f} dB"


def _markdown(found: Found) -> str:
    lines = ["# Precision plans of the `shapes` student", ""]
    lines += [f"- {name}: {value}" for name, value in found.settings.items()]
    lines += [
        "",
        "Asked: alignment within 1 point of float, conditioning within 5 %, PSNR >= 30 dB, at <= 0.30x the fp32 bytes.",
        f"Planted: channels {FACTOR:g} times as large, in a student of the same function; asked: a plan is 8 dB better",
        "than naive whole-int8.",
        "",
        *_summary(found),
        "",
        "| student | how | steps | alignment | conditioning | PSNR dB | bytes / fp32 |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {one.student} | {one.row} | {one.steps} | {one.alignment:.1%} | {one.conditioning:.2%} | "
        f"{'exact' if one.psnr_db >= 200 else one.psnr_db} | {one.bytes_ratio:.3f} |"
        for one in found.rows
    ]
    if found.timed:
        lines += ["", "## The denoiser's latency", ""]
        lines += ["| backend | how | ms | to its fp32 | asked | MB | made in s |", "|---|---|---:|---:|---:|---:|---:|"]
        lines += [
            f"| {one.backend} | {one.row} | {one.ms} | {one.to_fp32} | {one.asked or '-'} | {one.megabytes} | "
            f"{one.made_s} |"
            for one in found.timed
        ]
    lines += ["", "## What the repairs did", "", *(f"- {one}" for one in found.repairs)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
