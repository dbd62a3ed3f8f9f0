"""Healing: a pruned student learns to draw as the one that it was cut out of, without data.

Each pruned network learns alone (`edgegen.prune.lessons`), then the denoiser and the decoder for a few steps together.
Where blocks and channels went out of one network, depth is healed before width, as PPCL does (progressive pruning of
contiguous layers): channels are cut out of what has learned to do without the blocks. The text encoder is left alone.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache as memoize
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgegen.cache import Cache
from edgegen.errors import EdgegenError
from edgegen.graph.capture import capture
from edgegen.graph.count import count
from edgegen.prune.features import taps
from edgegen.prune.judging import Judge, Prompts, prompts_to_heal
from edgegen.prune.lessons import (
    POOL,
    POOL_MACS,
    Arithmetic,
    Decoded,
    Pair,
    Walks,
    drawn_latents,
    fastest,
    takes_batches,
)
from edgegen.prune.training import Course, Judged, Lessons, Training
from edgegen.students.pruning import Pruning
from edgegen.students.reduce import reduce
from edgegen.students.student import Component, Student

HEALED = ("denoiser", "decoder")
SEED = 500_000
SEEDS_APART = 10_000_000
"""Between two runs that are to learn from other noise and other prompts."""
DEPTH_SHARE = 0.3
"""Of a network's work, for learning to do without blocks before channels go: steps at full width cost more."""
BACK_AND_FORTH = 3
"""What a step costs the network that learns, in calls; the teacher is called once."""
JOINT_SHARE = 0.1
"""Of the steps, on top of them, for both networks together."""
JOINT_RATE = 0.2


class Progress(Protocol):
    """Where healing says what it is doing; `edgegen.cli.console` has the one that people see."""

    def stage(self, name: str, total: int) -> None: ...

    def advance(self) -> None: ...

    def note(self, text: str) -> None: ...

    def status(self, text: str) -> None: ...


@dataclass(frozen=True)
class HealOptions:
    """`steps` of each network. Healing of a network ends early when its pictures are good enough: `max_drop` is the
    share of prompts (`shapes` alone) by which it may fall behind the teacher, `min_psnr` in dB; None asks nothing, and
    where both are None all steps are taken. `seed`: which noise and prompts are learned from, and in what order."""

    steps: int
    batch: int = 32
    rate: float = 1e-3
    ema: float = 0.995
    features: float = 0.3
    max_drop: float | None = None
    min_psnr: float | None = None
    judge_every: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise EdgegenError("healing takes at least one step of one picture")

    def plain(self) -> dict[str, float | int | None]:
        """For a key."""
        return dataclasses.asdict(self)

    def enough(self, found: Judged, of_teacher: float | None) -> bool:
        """Whether `found` keeps what is asked."""
        asked = [self.min_psnr is not None and found.psnr_db >= self.min_psnr] if self.min_psnr is not None else []
        if self.max_drop is not None and found.alignment is not None and of_teacher is not None:
            asked.append(found.alignment >= of_teacher - self.max_drop)
        return bool(asked) and all(asked)


class Lesson(NamedTuple):
    """One course that was taken: of `component`, or of both."""

    component: str
    phase: str
    course: Course


@dataclass(frozen=True)
class Healed:
    """`before` and `after`: as held-back prompts are drawn."""

    student: Student
    lessons: tuple[Lesson, ...]
    before: Judged
    after: Judged
    teacher_alignment: float | None

    def summary(self) -> dict[str, object]:
        """As plain data."""
        return {
            "before": self.before.model_dump(),
            "after": self.after.model_dump(),
            "alignment_unpruned": self.teacher_alignment,
            "courses": [
                {
                    "component": one.component,
                    "phase": one.phase,
                    "steps": one.course.step,
                    "loss": one.course.loss,
                    "seconds": one.course.seconds,
                    "ended": one.course.ended,
                }
                for one in self.lessons
            ],
        }


def heal(teacher: Student, pruned: Student, options: HealOptions, cache: Cache, progress: Progress) -> Healed:
    """`pruned` with trained weights; `teacher` is what it was cut out of.

    Kept in `cache`, where a run that was killed goes on. EdgegenError for students of which nothing was cut, or that
    draw nothing.
    """
    require_drawing(teacher)
    names = [name for name in HEALED if name in teacher.components and cut_of(teacher, name) != cut_of(pruned, name)]
    require_cut(names)
    healing = Healing(teacher, pruned, options, cache, progress)
    return healing.run(names)


def require_cut(names: Sequence[str]) -> None:
    """EdgegenError where no component is left to heal."""
    if not names:
        raise EdgegenError("nothing was cut out of the denoiser or the decoder: there is nothing to heal")


def require_drawing(student: Student) -> None:
    """EdgegenError for a student that draws nothing."""
    if student.config.sampler is None or student.config.conditioning is None:
        raise EdgegenError(
            f"student `{student.config.name}` draws no pictures: there is nothing to heal it by",
            hint="leave `--heal` out",
        )


@memoize
def healing_fingerprint() -> str:
    """sha256 over the sources that decide what is learned."""
    digest = hashlib.sha256()
    for name in ("elastic", "features", "heal", "judging", "lessons", "training"):
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()


def cut_of(student: Student, name: str) -> Pruning:
    """The record of component `name`."""
    return student.config.components[name].pruning or Pruning()


@dataclass
class Healing:
    """One run, and what its parts share."""

    teacher: Student
    pruned: Student
    options: HealOptions
    cache: Cache
    progress: Progress
    lessons: list[Lesson] = field(default_factory=list)

    def run(self, names: Sequence[str]) -> Healed:
        key = self.cache.key(
            "heal",
            sources=healing_fingerprint(),
            teacher=self.teacher.fingerprint,
            pruned=self.pruned.fingerprint,
            options=self.options.plain(),
            arithmetic=self.arithmetic.plain(),
            torch=torch.__version__,
        )

        def build(folder: Path) -> None:
            state = self.cache.unfinished(key)
            for name in names:
                self.alone(name, state)
            if len(names) > 1:
                both = nn.ModuleDict({name: self.modules[name].train() for name in names})
                pairs = {name: self.pair(name, both[name], both[name], self._since(name)) for name in names}
                self.together(both, self.walks(pairs), state, judged=True)
            for name in names:
                save_weights(self.modules[name], folder / f"{name}.safetensors")
            said = [(one.component, one.phase, one.course.model_dump(mode="json")) for one in self.lessons]
            (folder / "lessons.json").write_text(json.dumps(said))

        entry = self.cache.directory(key, build)
        said = json.loads((entry / "lessons.json").read_text())
        lessons = tuple(Lesson(one, phase, Course.model_validate(course)) for one, phase, course in said)
        modules = {}
        for name in names:
            modules[name] = copy.deepcopy(self.pruned.components[name].module)
            modules[name].load_state_dict(load_file(entry / f"{name}.safetensors"))
        student = with_modules(self.pruned, modules)
        return Healed(student, lessons, self.judge(self.pruned), self.judge(student), self.judge.of_teacher)

    @cached_property
    def arithmetic(self) -> Arithmetic:
        return fastest()

    @cached_property
    def prompts(self) -> Prompts:
        return prompts_to_heal(self.teacher)

    @cached_property
    def judge(self) -> Judge:
        return Judge(self.teacher, self.prompts)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """What was trained so far."""
        return {}

    @cached_property
    def _teacher(self) -> Student:
        """On the device, never trained."""
        moved = {
            name: self.arithmetic.placed(copy.deepcopy(part.module).requires_grad_(False).eval())
            for name, part in self.teacher.components.items()
        }
        return with_modules(self.teacher, moved)

    def alone(self, name: str, state: Path) -> None:
        cut = self._since(name)
        module = copy.deepcopy(self.pruned.components[name].module)
        steps = self.options.steps
        if cut.removed and (cut.cuts or cut.separated):
            depth = Pruning(removed=cut.removed)
            module = reduce(copy.deepcopy(self.teacher.components[name].module), depth, weights=True)
            first = max(1, round(DEPTH_SHARE * steps * self._cost(name, module)))
            module = self._course(name, "depth", module, depth, first, state, judged=False)
            rest = Pruning(kept=cut.kept, cuts=cut.cuts, separated=cut.separated)
            module = reduce(module.cpu(), rest, weights=True)
            steps = max(1, steps - first)
        self.modules[name] = self._course(
            name, "width" if cut.cuts or cut.separated else "depth", module, cut, steps, state
        )

    def _since(self, name: str) -> Pruning:
        """What was cut out of the teacher's network."""
        return between(self.teacher.config.components[name].pruning, cut_of(self.pruned, name))

    def _cost(self, name: str, module: nn.Module) -> float:
        """Of a step of the pruned network in terms of one of `module`, which has its full width."""
        whole, left = self.teacher.components[name], self.pruned.components[name]
        macs = [count(capture(one)).macs for one in (whole, left, replace(whole, module=module.cpu().eval()))]
        return (macs[0] + BACK_AND_FORTH * macs[1]) / (macs[0] + BACK_AND_FORTH * macs[2])

    def _course(
        self, name: str, phase: str, module: nn.Module, cut: Pruning, steps: int, state: Path, judged: bool = True
    ) -> nn.Module:
        """`module` after a course alone."""
        self.progress.stage(f"heal the {name}: {phase}", steps)
        module = self.arithmetic.placed(module.train().requires_grad_(True))
        lessons = self.lesson(name, module, module, cut)
        training = self.training(module, lessons, steps, state / f"{name}-{phase}.safetensors")
        if judged:
            training.judge = lambda: self.judged({name: module})
            training.enough = lambda found: self.options.enough(found, self.judge.of_teacher)
        self.taken(name, phase, training.run())
        return module.eval()

    def training(self, module: nn.Module, lessons: Lessons, steps: int, state: Path) -> Training:
        """With these options."""
        options = self.options
        return Training(
            module, lessons, steps, options.rate, options.ema, self.progress, state, judge_every=options.judge_every
        )

    def taken(self, component: str, phase: str, course: Course) -> None:
        """Remember and say what a course did."""
        self.lessons.append(Lesson(component, phase, course))
        said = f"; {course.judged[-1][1].said()}" if course.judged else ""
        self.progress.note(f"{component}, {phase}: {course.step} steps, {course.seconds:.0f} s{said}")

    def pair(self, name: str, module: nn.Module, shape: nn.Module, cut: Pruning) -> Pair:
        """`module` against the teacher's component; `shape` is the network in it, where it is a slice of another."""
        part = self._teacher.components[name]
        watched = taps(shape, part.module, cut) if self.options.features else ()
        return Pair(part, module, watched, self.arithmetic, takes_batches(self.teacher.components[name]))

    def lesson(self, name: str, module: nn.Module, shape: nn.Module, cut: Pruning) -> Lessons:
        """What the network of component `name` learns from."""
        pair, options = self.pair(name, module, shape, cut), self.options
        if name == "denoiser":
            return Walks(self._teacher, pair, self.prompts.learning, options.batch, self.seed, options.features)
        return Decoded(pair, self._latents, max(1, options.batch // 2), self.seed, options.features)

    def walks(self, pairs: Mapping[str, Pair]) -> Walks:
        """What the denoiser and the decoder learn from together."""
        options, prompts = self.options, self.prompts.learning
        seed = self.seed + SEED
        return Walks(self._teacher, pairs["denoiser"], prompts, options.batch, seed, options.features, pairs["decoder"])

    @property
    def seed(self) -> int:
        return SEED + SEEDS_APART * self.options.seed

    @cached_property
    def _latents(self) -> Tensor:
        part = self.teacher.components["denoiser"]
        assert self.teacher.config.sampler is not None
        each = count(capture(part)).macs * max(self.teacher.config.sampler.times)
        number = int(min(POOL, max(8, POOL_MACS / max(1, each))))
        return drawn_latents(
            self._teacher, self.prompts.learning, number, self.seed - 1, self.arithmetic, self.options.batch
        )

    def together(self, both: nn.ModuleDict, lessons: Lessons, state: Path, judged: bool = False) -> None:
        """A last course of both networks, of few steps and at a low rate."""
        steps = max(1, round(JOINT_SHARE * self.options.steps))
        self.progress.stage("heal both together", steps)
        training = self.training(both, lessons, steps, state / "both.safetensors")
        training.rate *= JOINT_RATE
        if judged:
            training.judge = lambda: self.judged(both)
        self.taken("both", "together", training.run())
        both.eval()

    def judged(self, modules: Mapping[str, nn.Module] | nn.ModuleDict) -> Judged:
        """The student with `modules` in place of the teacher's."""
        copies = {name: copy.deepcopy(one).cpu().eval() for name, one in modules.items()}
        return self.judge(with_modules(self.teacher, copies))


def save_weights(module: nn.Module, path: Path) -> None:
    """Its state dict, as `.safetensors`."""
    save_file({name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}, path)


def with_modules(student: Student, modules: Mapping[str, nn.Module]) -> Student:
    """`student` with other networks in some places; the config stays."""
    components: dict[str, Component] = {
        name: replace(part, module=modules[name]) if name in modules else part
        for name, part in student.components.items()
    }
    return replace(student, components=components)


def between(before: Pruning | None, after: Pruning) -> Pruning:
    """What goes on top of `before` to come to `after`: positions are those of the network that `before` leaves."""
    if before is None:
        return after
    ranks = {path: rank for path, rank in after.separated.items() if path not in before.separated}
    before = before.separating(ranks)
    cuts: dict[str, dict[int, Sequence[int]]] = {}
    for name, dims in after.cuts.items():
        for dim in dims:
            left, now = before.positions(name, dim), after.positions(name, dim)
            assert now is not None
            if left is not None:
                place = {position: index for index, position in enumerate(left)}
                if any(position not in place for position in now):
                    raise EdgegenError(f"`{name}` of the pruned student holds what its teacher does not have any more")
                if len(now) == len(left):
                    continue
                now = tuple(place[position] for position in now)
            cuts.setdefault(name, {})[dim] = now
    return Pruning.of(cuts, {path: way for path, way in after.removed.items() if path not in before.removed}, ranks)
