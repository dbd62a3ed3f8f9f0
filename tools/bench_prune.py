"""What pruning and healing make of the `shapes` student: quality, latency, bytes, against cutting every layer alike.

    python tools/bench_prune.py --work runs/prune --markdown docs/benchmarks/prune-shapes.md

Seven parts, in this order; each writes what it found before the next begins, and what was found for the same student
with the same settings is not made again (`--again` forgets it). Healing that was killed goes on where it was.

- asked: the denoiser without 40 % of its MACs, the decoder without half of its own, healed.
- half: 50 % of both, chosen by `edgegen prune` and by the norm of weights at one ratio for every space (`uniform`),
  each healed for the same few steps.
- separable: the decoder at 40 % of its MACs by channels, by separable convolutions, and by both, healed alike.
- small: the student that is quantized afterwards, `--small` of the denoiser's MACs and `--small-decoder` of the
  decoder's, healed.
- tuned: where `--recipe` names one that `edgegen tune` wrote for this student, what it leaves, healed as `small`.
- bundles: what was asked, and the small one with a precision plan and what the recipe left with its own, built for this
  machine and drawn with in turns with a bundle of the float original; run it when nothing else runs.
- elastic: nested levels of `--levels` of both networks' MACs in one checkpoint, healed together, and beside each the
  same cut healed alone with as many steps.

Alignment is over all 432 held-back prompts, through torch for students and through its own artifacts for a bundle.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import prune_bundles as bundles
from lines import Lines
from prune_bundles import STEPS, TARGET, Timed
from pydantic import BaseModel
from turns import settings_of

from edgegen.cache import Cache
from edgegen.cores import cores
from edgegen.graph.capture import capture
from edgegen.graph.count import count
from edgegen.prune.apply import pruned
from edgegen.prune.assemble import Assembled, Options, assemble
from edgegen.prune.command import prune
from edgegen.prune.elastic import at_level, heal_levels, with_levels
from edgegen.prune.find import spaces
from edgegen.prune.heal import HealOptions, heal
from edgegen.prune.importance import Probe, importance, magnitude
from edgegen.prune.nested import Asked, choose
from edgegen.prune.options import PruneOptions
from edgegen.prune.ratio import ratio_for
from edgegen.prune.recipe import follow, read_recipe
from edgegen.prune.search import search
from edgegen.prune.separable import separate
from edgegen.prune.space import Spaces
from edgegen.prune.trial import Trial
from edgegen.students.checkpoint import save_pt
from edgegen.students.load import load
from edgegen.students.sample import draw_many
from edgegen.students.shapes import family
from edgegen.students.shapes.evaluate import evaluate
from edgegen.students.student import Component, Student
from edgegen.targets import load_target

PARTS = ("asked", "half", "separable", "small", "tuned", "bundles", "elastic")
BUNDLES = ("float", "asked", "small, quantized", "tuned, quantized")
CUT = ("denoiser", "decoder")
ASKED = {"denoiser": 0.6, "decoder": 0.5}
HALF = {"denoiser": 0.5, "decoder": 0.5}
DECODER = 0.4
"""Share of the decoder's MACs in part `separable`; both: 60 % by separable convolutions, the rest by channels."""
BOTH = 0.6


class Row(BaseModel):
    """One student. `macs`, `parameters`: shares of the original's, by component; `alignment` by sampling steps."""

    key: str
    name: str
    heal_steps: int
    macs: dict[str, float]
    parameters: dict[str, float]
    alignment: dict[int, float]
    psnr_db: float
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of healing; both are of all processes that worked at it."""


class Found(BaseModel):
    """Everything, as it lies in the folder of work."""

    rows: list[Row] = []
    timed: list[Timed] = []


class Bench:
    """The student, and a folder in which everything about it is found again."""

    def __init__(self, work: Path, limit: int | None) -> None:
        self.student = load(family.WEIGHTS)
        self.work, self.limit = work, limit
        work.mkdir(parents=True, exist_ok=True)
        self.cache = Cache(work / "cache")
        path = work / "found.json"
        self.found = Found.model_validate_json(path.read_text()) if path.is_file() else Found()

    def write(self) -> None:
        beside = self.work / "found.tmp"
        beside.write_text(self.found.model_dump_json(indent=1))
        beside.replace(self.work / "found.json")

    def remember(self, rows: Sequence[Timed]) -> None:
        """In place of what was timed before of the same bundles; what they draw stays known."""
        for one in rows:
            held = [old for old in self.found.timed if old.name == one.name and old.backend == one.backend]
            one.alignment = next((old.alignment for old in held if old.key == one.key), {})
            self.found.timed = [old for old in self.found.timed if old not in held or old.threads != one.threads]
            self.found.timed.append(one)
        self.write()

    def row(self, name: str, student: Student, heal_steps: int, seconds: float = 0.0, cpu: float = 0.0) -> Row:
        key = f"{student.fingerprint}-{self.limit}-{heal_steps}"
        for one in self.found.rows:
            if one.key == key:
                one.name = name
                return one
        alignment, decibels = {}, 0.0
        for steps in STEPS:
            print(f"  {name}: draw the held-back prompts in {steps} steps", file=sys.stderr, flush=True)
            alignment[steps] = evaluate(partial(draw_many, student, steps=steps), steps, self.limit).alignment
        decibels = self.psnr(student)
        made = Row(
            key=key,
            name=name,
            heal_steps=heal_steps,
            macs=shares(student, self.student, macs),
            parameters=shares(student, self.student, parameters),
            alignment=alignment,
            psnr_db=decibels,
            seconds=seconds,
            cpu_seconds=cpu,
        )
        self.found.rows.append(made)
        self.write()
        print(made, file=sys.stderr, flush=True)
        return made

    def psnr(self, student: Student) -> float:
        """Of pictures of calibration prompts against the original's, dB."""
        prompts = list(self.student.config.example_prompts) * 4
        seeds = list(range(len(prompts)))
        steps = STEPS[0]
        made = [np.stack(list(draw_many(one, prompts, seeds, steps))) for one in (student, self.student)]
        return float(10 * np.log10(4 / max(1e-12, float(np.square(made[0] - made[1]).mean()))))

    def healed(self, name: str, cut: Student, steps: int, seed: int = 0, rate: float = 1e-3) -> Student:
        """Before and after, as rows; what comes out is saved as a checkpoint too."""
        self.row(f"{name}, not healed", cut, 0)
        again = f"{f'-seed-{seed}' if seed else ''}{f'-rate-{rate:g}' if rate != 1e-3 else ''}"
        path = self.work / f"{name}-{cut.fingerprint[:12]}-healed-{steps}{again}.pt"
        if path.is_file():
            return load(path)
        print(f"{name}: heal", file=sys.stderr, flush=True)
        made = heal(self.student, cut, HealOptions(steps=steps, seed=seed, rate=rate), self.cache, Lines())
        name = f"{name}{f', seed {seed}' if seed else ''}{f', at {rate:g}' if rate != 1e-3 else ''}"
        save_pt(made.student, path)
        seconds = sum(one.course.seconds for one in made.lessons)
        cpu = sum(one.course.cpu_seconds for one in made.lessons)
        self.row(name, made.student, steps, seconds, cpu)
        return made.student

    def cut(self, name: str, make: Callable[[], Student]) -> Student:
        """What `make` cuts, once: the checkpoint lies in the folder of work."""
        path = self.work / f"{name}-cut.pt"
        if not path.is_file():
            print(f"{name}: cut", file=sys.stderr, flush=True)
            save_pt(make(), path)
        return load(path)

    def chosen(self, name: str, wanted: Mapping[str, float]) -> Student:
        """As `edgegen prune` cuts: losses measured under a cap on the MACs of each component."""

        def make() -> Student:
            found = self._measured
            whole = found.whole.totals
            caps = {f"macs {name}": share * whole[f"macs {name}"] for name, share in wanted.items()}
            return found.pruned(search(replace(found.problem, caps=caps, minimise={"picture": 1.0})))

        return self.cut(name, make)

    def tuned(self, recipe: Path, steps: int, rate: float) -> Student:
        """What the recipe leaves, healed."""
        cut = self.cut(f"tuned {recipe.stem}", lambda: follow(read_recipe(recipe), self.student))
        return self.healed("tuned", cut, steps, rate=rate)

    def small(self, wanted: Mapping[str, float]) -> Student:
        """What is quantized afterwards."""
        return self.chosen(f"small {' '.join(f'{share:g}' for share in wanted.values())}", wanted)

    @cached_property
    def _measured(self) -> Assembled:
        def matter(part: Component, found: Spaces) -> Mapping[str, Sequence[float]]:
            return importance(Probe.of(self.student), {part.name: found})[part.name].units

        options = Options(components=CUT)
        return assemble(self.student, load_target(TARGET), (), options, spaces, matter, self.cache, Lines())

    def separable(self, name: str, share: float, of: Student | None = None) -> Student:
        """The decoder with separable convolutions until `share` of its MACs is left."""

        def make() -> Student:
            student = of or self.student
            return pruned(student, separate(student, {"decoder": share}, Trial.of(student)))

        return self.cut(name, make)

    def narrowed(self, name: str, student: Student, share: float) -> Student:
        """`student` with channels cut out of its decoder until it has `share` of the original's MACs."""

        def make() -> Student:
            left = share * macs(self.student, "decoder") / macs(student, "decoder")
            options = PruneOptions(components=("decoder",), max_macs={"decoder": left}, measure=False)
            return prune(student, load_target(TARGET), (), options, self.cache, Lines()).student

        return self.cut(name, make)

    def elastic(self, levels: Sequence[float], steps: int) -> None:
        """All levels in one checkpoint and each of them alone, from the same cuts."""
        asked = [Asked(f"{share * 100:g}", dict.fromkeys(CUT, share)) for share in levels]

        def make() -> Student:
            cuts = {name: self._measured.prunings(one) for name, one in choose(self._measured, asked, Lines()).items()}
            whole = self.student.config.model_copy(update={"levels": cuts})
            return replace(self.student, config=whole)

        cuts = self.cut(f"elastic {' '.join(one.name for one in asked)}", make).config.levels
        print("elastic: heal all levels", file=sys.stderr, flush=True)
        started, worked = time.monotonic(), time.process_time()
        whole = with_levels(self.student, cuts)
        stored = heal_levels(self.student, whole, HealOptions(steps=steps), self.cache, Lines())
        seconds, cpu = time.monotonic() - started, time.process_time() - worked
        for name, cut in cuts.items():
            self.row(f"elastic, level {name}", at_level(stored, name), steps, seconds, cpu)
            self.healed(f"level {name} alone", pruned(self.student, cut), steps)

    def uniform(self, name: str, wanted: Mapping[str, float]) -> Student:
        """One ratio for every space of a component, the largest that keeps to the MACs; units of the least norm go."""

        def make() -> Student:
            made = self.student
            for component, share in wanted.items():
                part = self.student.components[component]
                found, whole = spaces(capture(part)), macs(self.student, component)
                norms = magnitude(part, found)
                ranks = {space: each.tolist() for space, each in norms.items()}
                cut = ratio_for(self.student, component, found, ranks, share * whole)
                made = pruned(made, {component: cut})
            return made

        return self.cut(name, make)


def separable_decoders(bench: Bench) -> dict[str, Student]:
    """The decoder at one share of its MACs, three ways."""
    percent = f"{DECODER:.0%}"
    by_both = bench.narrowed("decoder both", bench.separable("decoder both, first", BOTH), DECODER)
    return {
        f"decoder {percent}, channels": bench.narrowed("decoder channels", bench.student, DECODER),
        f"decoder {percent}, separable": bench.separable("decoder separable", DECODER),
        f"decoder {percent}, both": by_both,
    }


def bundles_of(
    bench: Bench, asked: argparse.Namespace, small: Mapping[str, float], small_heal: int
) -> dict[str, Callable[[], bundles.Made]]:
    """By name, what a bundle is made of."""
    decoders = {} if asked.bundle else separable_decoders(bench)
    made: dict[str, Callable[[], bundles.Made]] = {
        "float": lambda: bundles.Made(bench.student),
        **{name: partial(_healed, bench, name, cut, asked.separable_heal) for name, cut in decoders.items()},
        "asked": lambda: bundles.Made(bench.healed("asked", bench.chosen("asked", ASKED), asked.heal)),
        "small, quantized": lambda: bundles.Made(bench.healed("small", bench.small(small), small_heal), True),
    }
    if asked.recipe is not None:
        made["tuned, quantized"] = lambda: bundles.Made(
            bench.tuned(asked.recipe, small_heal, asked.tuned_rate), True, asked.recipe
        )
    return made


def _healed(bench: Bench, name: str, cut: Student, steps: int) -> bundles.Made:
    return bundles.Made(bench.healed(name, cut, steps))


def macs(student: Student, name: str) -> float:
    return count(capture(student.components[name])).macs


def parameters(student: Student, name: str) -> float:
    return sum(one.numel() for one in student.components[name].module.parameters())


def shares(student: Student, original: Student, of: object) -> dict[str, float]:
    assert callable(of)
    return {name: round(of(student, name) / of(original, name), 4) for name in CUT}


def markdown(found: Found, settings: Mapping[str, str]) -> str:
    lines = ["# Pruned and healed: the `shapes` student", ""]
    lines += [f"- {name}: {value}" for name, value in settings.items()]
    lines += [
        "",
        "Asked: -40 % of the denoiser's MACs and -50 % of the decoder's at 1.5 points of alignment after at most 30",
        "minutes of healing on two cores; at -50 %, 3 points more than uniform ratios with the same healing.",
        "MACs and parameters are what is left, as a share. PSNR of 16 pictures against the original's.",
        "",
        "| student | healed, steps | minutes | of CPU | denoiser MACs | decoder MACs | parameters | alignment, 4 steps "
        "| 1 step | PSNR dB |",
        "|---|---:|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for row in found.rows:
        left = ", ".join(f"{name} {share:.2f}" for name, share in row.parameters.items())
        lines.append(
            f"| {row.name} | {row.heal_steps or '-'} | {row.seconds / 60:.1f} | {row.cpu_seconds / 60:.1f} "
            f"| {row.macs['denoiser']:.3f} | {row.macs['decoder']:.3f} | {left} "
            f"| {row.alignment[4]:.1%} | {row.alignment[1]:.1%} | {min(row.psnr_db, 99.9):.1f} |"
        )
    lines += bundles.lines(found.timed, CUT)
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/prune"), help="what is found again")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--heal", type=int, default=2000, help="steps of `asked`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of `asked`: healed once with each")
    parser.add_argument("--recipe", type=Path, help="of `tuned`: what `edgegen tune` wrote")
    parser.add_argument("--tuned-rate", type=float, default=1e-3, help="that what the recipe leaves is healed at")
    parser.add_argument("--separable-heal", type=int, default=300, help="steps of the separable decoders")
    parser.add_argument("--small-heal", type=int, help="steps of `small`; default: those of --heal")
    parser.add_argument("--half-heal", type=int, nargs="+", default=[50, 200], help="steps of both students of `half`")
    parser.add_argument("--small", type=float, default=0.3, help="share of the denoiser's MACs that `small` keeps")
    parser.add_argument("--small-decoder", type=float, default=0.2, help="share of the decoder's MACs")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.75, 0.5, 0.3], help="shares of MACs of `elastic`")
    parser.add_argument("--elastic-heal", type=int, default=1000, help="steps of `elastic`, together and alone")
    parser.add_argument("--limit", type=int, help="an even share of the held-back prompts instead of all 432")
    parser.add_argument("--bundle", nargs="+", choices=BUNDLES, help="default: these and the separable decoders")
    parser.add_argument("--repeats", type=int, default=20, help="turns of each bundle that count")
    parser.add_argument("--in-a-row", type=int, default=10, help="pictures of a turn")
    parser.add_argument("--threads", type=int, nargs="+", default=[cores()], help="of bundles")
    parser.add_argument("--again", action="store_true", help="forget what was found before")
    parser.add_argument("--markdown", type=Path)
    asked = parser.parse_args()
    if "tuned, quantized" in (asked.bundle or ()) and asked.recipe is None:
        parser.error("`tuned, quantized` is what `--recipe` leaves, and none was given")
    turns = f"{asked.repeats} of {asked.in_a_row} pictures of each bundle, medians"
    settings = settings_of(bundles.BACKENDS, max(asked.threads), turns=turns)
    bench = Bench(asked.work, asked.limit)
    if asked.again:
        bench.found = Found()
        for path in (*asked.work.glob("*-cut.pt"), *asked.work.glob("*-healed-*.pt")):
            path.unlink()

    def show() -> None:
        if asked.markdown:
            asked.markdown.write_text(markdown(bench.found, settings))

    bench.row("original", bench.student, 0)
    if "asked" in asked.part:
        for seed in asked.seeds:
            bench.healed("asked", bench.chosen("asked", ASKED), asked.heal, seed)
            show()
    if "half" in asked.part:
        cuts = {"half": bench.chosen("half", HALF), "half, uniform": bench.uniform("half, uniform", HALF)}
        for steps in asked.half_heal:
            for name, cut in cuts.items():
                bench.healed(name, cut, steps)
                show()
    if "separable" in asked.part:
        for name, cut in separable_decoders(bench).items():
            bench.healed(name, cut, asked.separable_heal)
            show()
    small, small_heal = {"denoiser": asked.small, "decoder": asked.small_decoder}, asked.small_heal or asked.heal
    if "small" in asked.part:
        bench.healed("small", bench.small(small), small_heal)
        show()
    if "tuned" in asked.part and asked.recipe is not None:
        bench.tuned(asked.recipe, small_heal, asked.tuned_rate)
        show()
    if "bundles" in asked.part:
        built = bundles_of(bench, asked, small, small_heal)
        folders = {name: bundles.bundle(bench.work, name, built[name]()) for name in asked.bundle or built}
        prompt = bench.student.config.example_prompts[0]
        for threads in asked.threads:
            bench.remember(bundles.timed(folders, prompt, threads, asked.repeats, asked.in_a_row))
            show()
        bundles.align(bench.found.timed, folders, bench.limit, bench.write)
    if "elastic" in asked.part:
        bench.elastic(asked.levels, asked.elastic_heal)
    show()
    print(markdown(bench.found, settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
