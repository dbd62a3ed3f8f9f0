"""Bundles of pruned students for `tools/bench_prune.py`: built, drawn with in turns, judged by what they draw.

A turn is `--in-a-row` pictures of one bundle, one after another, then of the next, so that a machine that is busy for a
while slows all of them down. A turn's first picture finds another bundle's weights in the caches; it is timed for
itself. Everything but it is what drawing picture after picture takes. Before a turn nothing runs for some milliseconds,
in which the threads stop that a runtime leaves waiting for more work.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel
from turns import PAUSE, WARM_UP, on_cores

from edgegen.bundle.open import open_bundle
from edgegen.bundle.run import Runtime
from edgegen.students.checkpoint import save_pt
from edgegen.students.shapes.evaluate import evaluate, subject_for
from edgegen.students.student import Student
from edgegen.verify.outcome import ParityReport

TARGET = "linux-x86"
BACKENDS = ("tflite", "executorch")
STEPS = (4, 1)
MISSED = 3
"""Exit code of a build that did not meet a gate: what it made lies in OUTPUT.failed, is timed, and is said to have
failed."""


class Timed(BaseModel):
    """One bundle on one backend; milliseconds are medians, by stage and of a whole picture of four steps."""

    key: str
    name: str
    backend: str
    threads: int
    ms: dict[str, float]
    first_ms: float
    """Of a turn's first picture."""
    bytes: int
    alignment: dict[int, float]
    missed: list[str] = []
    """Gates that its build did not meet."""


def edgegen(*arguments: str, cache: Path) -> int:
    """The command as a user types it: 0, or 3 where a gate was not met."""
    call = [sys.executable, "-m", "edgegen.cli.main", *arguments]
    print(f"  edgegen {' '.join(arguments)}", file=sys.stderr, flush=True)
    env = {**os.environ, "EDGEGEN_CACHE_DIR": str(cache)}
    done = subprocess.run(call, check=False, stdout=subprocess.DEVNULL, env=env)
    if done.returncode not in (0, MISSED):
        done.check_returncode()
    return done.returncode


@dataclass(frozen=True)
class Made:
    """A student of which a bundle is built; `recipe`: what `edgegen tune` chose, whose precisions the plan is to cost
    no more than."""

    student: Student
    quantized: bool = False
    recipe: Path | None = None


def bundle(work: Path, name: str, made: Made) -> Path:
    """Built once for each student; a bundle is whole or not there."""
    student = made.student
    plain = name.replace(",", "").replace("%", "").replace(" ", "-")
    folder = work / f"{plain}-{student.fingerprint[:12]}"
    missed = folder.with_name(f"{folder.name}.failed")
    for known in (folder, missed):
        if known.is_dir():
            return known
    checkpoint, plan = folder.with_suffix(".pt"), folder.with_suffix(".plan.toml")
    save_pt(student, checkpoint)
    target = ("--target", TARGET, "--backend", ",".join(BACKENDS))
    if made.quantized:
        budget = () if made.recipe is None else ("--recipe", str(made.recipe))
        edgegen("plan", str(checkpoint), *target, *budget, "-o", str(plan), cache=work / "cache")
        target = ("--target", TARGET, "--plan", str(plan))
    code = edgegen("build", str(checkpoint), *target, "-o", str(folder), cache=work / "cache")
    return missed if code == MISSED else folder


def timed(folders: Mapping[str, Path], prompt: str, threads: int, repeats: int, in_a_row: int) -> list[Timed]:
    """Every bundle, all of them in the same turns."""
    made = []
    for backend in BACKENDS:
        drawn = on_cores(threads, _drawn, folders, backend, prompt, repeats, in_a_row)
        for name, folder in folders.items():
            first, rest = drawn[name]
            stages = {stage: statistics.median(one[stage] for one in rest) * 1e3 for stage in rest[0]}
            one = Timed(
                key=f"{folder.name}-{backend}-{threads}",
                name=name,
                backend=backend,
                threads=threads,
                ms=stages,
                first_ms=statistics.median(one["picture"] for one in first) * 1e3,
                bytes=sum(one.stat().st_size for one in (folder / "components" / backend).rglob("*") if one.is_file()),
                alignment={},
                missed=_gates_missed(folder, backend),
            )
            print(one, file=sys.stderr, flush=True)
            made.append(one)
    return made


Drawn = tuple[list[dict[str, float]], list[dict[str, float]]]


def _drawn(folders: Mapping[str, Path], backend: str, prompt: str, repeats: int, in_a_row: int) -> dict[str, Drawn]:
    """By name, the seconds of the stages of each turn's first picture, and of all the others."""
    taken: dict[str, Drawn] = {name: ([], []) for name in folders}
    with ExitStack() as stack:
        opened = {name: stack.enter_context(Runtime(open_bundle(one), backend)) for name, one in folders.items()}
        for turn in range(WARM_UP + repeats):
            for name, runtime in opened.items():
                time.sleep(PAUSE)
                for place in range(in_a_row):
                    timings = runtime.generate(prompt, turn, STEPS[0]).timings
                    if turn >= WARM_UP:
                        taken[name][min(place, 1)].append(_by_stage(timings))
    return taken


def _by_stage(timings: Mapping[str, float]) -> dict[str, float]:
    """Seconds of one call of each network, and of the networks of one whole picture."""
    denoiser = [value for stage, value in timings.items() if stage.startswith("denoiser.")]
    stages = {
        "text_encoder": timings["text_encoder"],
        "denoiser": statistics.median(denoiser),
        "decoder": timings["decoder"],
    }
    return {**stages, "picture": stages["text_encoder"] + sum(denoiser) + stages["decoder"]}


def _gates_missed(folder: Path, backend: str) -> list[str]:
    """As the build's own report says."""
    report = ParityReport.model_validate(json.loads((folder / "reports/parity.json").read_text())[backend])
    return [f"{one.gate} of {one.subject}: {one.measured}, {one.required}" for one in report.failed]


def align(rows: Sequence[Timed], folders: Mapping[str, Path], limit: int | None, write: Callable[[], None]) -> None:
    """What the artifacts themselves draw, once for each bundle and backend."""
    known: dict[tuple[str, int], float] = {}
    for one in rows:
        known.update({(f"{one.name} {one.backend}", steps): share for steps, share in one.alignment.items()})
    for one in rows:
        for steps in STEPS:
            if steps in one.alignment or one.name not in folders:
                continue
            key = f"{one.name} {one.backend}", steps
            if key not in known:
                drawer = subject_for(folders[one.name], steps, one.backend)
                known[key] = evaluate(drawer.draw, steps, limit).alignment
                print(f"  {key[0]}, {steps} steps: {known[key]:.4f}", file=sys.stderr, flush=True)
            one.alignment[steps] = known[key]
            write()


def lines(rows: Sequence[Timed], networks: Sequence[str]) -> list[str]:
    """The table, held against the bundle `float` of the same backend and threads."""
    if not rows:
        return []
    made = [
        "",
        "## Built for this machine",
        "",
        "Asked: latency falls by at least 0.8x of what the MACs fall by; pruned and quantized together 0.20x of",
        "the float original's latency and 0.15x of its bytes at 2 points of alignment. One call of each network; a",
        "picture is the text encoder, four calls of the denoiser and the decoder, one picture after another; `first`",
        "is the picture after another bundle's. Bytes are of all artifacts.",
        "",
        "| bundle | backend | threads | denoiser ms | to float | decoder ms | to float | picture ms | to float "
        "| first ms | to float | bytes | to float | alignment, 4 steps | 1 step |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    bases = {(one.backend, one.threads): one for one in rows if one.name == "float"}
    for one in sorted(rows, key=lambda row: (BACKENDS.index(row.backend), -row.threads)):
        base = bases.get((one.backend, one.threads))
        if base is None:
            continue
        cells = [f"{one.ms[stage]:.2f} | {one.ms[stage] / base.ms[stage]:.3f}" for stage in (*networks, "picture")]
        cells.append(f"{one.first_ms:.2f} | {one.first_ms / base.first_ms:.3f}")
        drawn = " | ".join(f"{one.alignment[steps]:.1%}" if steps in one.alignment else "-" for steps in STEPS)
        made.append(
            f"| {one.name} | {one.backend} | {one.threads} | {' | '.join(cells)} | {one.bytes:,} "
            f"| {one.bytes / base.bytes:.3f} | {drawn} |"
        )
    missed = sorted({f"- {one.name}, {one.backend}: {each}" for one in rows for each in one.missed})
    if missed:
        made += [
            "",
            "Gates that builds did not meet; these artifacts were timed and judged all the same:",
            "",
            *missed,
        ]
    return made
