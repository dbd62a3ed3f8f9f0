"""Healing: a pruned student learns to draw as the one that it was cut out of, without data.

Each pruned network learns alone (`edgegen.prune.lessons`), then the denoiser and the decoder for a few steps together.
Where blocks and channels went out of one network, depth is healed before width, as PPCL does (progressive pruning of
contiguous layers): channels are cut out of what has learned to do without the blocks. The text encoder is left alone.
"""

from __future__ import annotations

import copy
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

SEED = 500_000
DEPTH_SHARE = 0.3
"""Of a network's steps, for learning to do without blocks before channels go."""
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
    where both are None all steps are taken."""

    steps: int
    batch: int = 32
    rate: float = 1e-3
    ema: float = 0.995
    features: float = 0.3
    max_drop: float | None = None
    min_psnr: float | None = None
    judge_every: int = 250

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise EdgegenError("healing takes at least one step of one picture")

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


def heal(teacher: Student, pruned: Student, options: HealOptions, cache: Cache, progress: Progress) -> Healed:
    """`pruned` with trained weights; `teacher` is what it was cut out of.

    Kept in `cache`, where a run that was killed goes on. EdgegenError for students of which nothing was cut, or that
    draw nothing.
    """
    names = [name for name in teacher.components if _cut(teacher, name) != _cut(pruned, name)]
    names = [name for name in ("denoiser", "decoder") if name in names]
    if teacher.config.sampler is None or teacher.config.conditioning is None:
        raise EdgegenError(
            f"student `{teacher.config.name}` draws no pictures: there is nothing to heal it by",
            hint="leave `--heal` out",
        )
    if not names:
        raise EdgegenError("nothing was cut out of the denoiser or the decoder: there is nothing to heal")
    healing = _Healing(teacher, pruned, options, cache, progress)
    return healing.run(names)


@memoize
def healing_fingerprint() -> str:
    """sha256 over the sources that decide what is learned."""
    digest = hashlib.sha256()
    for name in ("features", "heal", "judging", "lessons", "training"):
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()


def _cut(student: Student, name: str) -> Pruning:
    return student.config.components[name].pruning or Pruning()


@dataclass
class _Healing:
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
            options=[self.options.__dict__[one] for one in sorted(self.options.__dict__)],
            arithmetic=[self.arithmetic.device.type, self.arithmetic.half],
            torch=torch.__version__,
        )

        def build(folder: Path) -> None:
            state = self.cache.unfinished(key)
            for name in names:
                self._alone(name, state)
            if len(names) > 1:
                self._together(names, state)
            for name in names:
                tensors = {key: value.detach().cpu().contiguous() for key, value in self._modules[name].state_dict().items()}
                save_file(tensors, folder / f"{name}.safetensors")
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
    def _modules(self) -> dict[str, nn.Module]:
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

    def _alone(self, name: str, state: Path) -> None:
        cut = between(self.teacher.config.components[name].pruning, _cut(self.pruned, name))
        module = copy.deepcopy(self.pruned.components[name].module)
        steps = self.options.steps
        if cut.removed and cut.cuts:
            depth = Pruning(removed=cut.removed)
            module = reduce(copy.deepcopy(self.teacher.components[name].module), depth, weights=True)
            first = max(1, round(DEPTH_SHARE * steps))
            module = self._course(name, "depth", module, depth, first, state, judged=False)
            module = reduce(module.cpu(), Pruning(kept=cut.kept, cuts=cut.cuts), weights=True)
            steps = max(1, steps - first)
        self._modules[name] = self._course(name, "width" if cut.cuts else "depth", module, cut, steps, state)

    def _course(
        self, name: str, phase: str, module: nn.Module, cut: Pruning, steps: int, state: Path, judged: bool = True
    ) -> nn.Module:
        """`module` after a course alone."""
        self.progress.stage(f"heal the {name}: {phase}", steps)
        module = self.arithmetic.placed(module.train().requires_grad_(True))
        lessons = self._lessons(name, module, cut)
        training = Training(
            module,
            lessons,
            steps,
            self.options.rate,
            self.options.ema,
            self.progress,
            state / f"{name}-{phase}.safetensors",
            (lambda: self._judged({name: module})) if judged else None,
            lambda found: self.options.enough(found, self.judge.of_teacher),
            self.options.judge_every,
        )
        self._taken(name, phase, training.run())
        return module.eval()

    def _taken(self, component: str, phase: str, course: Course) -> None:
        self.lessons.append(Lesson(component, phase, course))
        said = f"; {course.judged[-1][1].said()}" if course.judged else ""
        self.progress.note(f"{component}, {phase}: {course.step} steps, {course.seconds:.0f} s{said}")

    def _pair(self, name: str, module: nn.Module, cut: Pruning) -> Pair:
        part = self._teacher.components[name]
        watched = taps(module, part.module, cut) if self.options.features else ()
        return Pair(part, module, watched, self.arithmetic, takes_batches(self.teacher.components[name]))

    def _lessons(self, name: str, module: nn.Module, cut: Pruning) -> Lessons:
        pair, options = self._pair(name, module, cut), self.options
        if name == "denoiser":
            return Walks(self._teacher, pair, self.prompts.learning, options.batch, SEED, options.features)
        return Decoded(pair, self._latents, max(1, options.batch // 2), SEED, options.features)

    @cached_property
    def _latents(self) -> Tensor:
        part = self.teacher.components["denoiser"]
        each = count(capture(part)).macs * max(self.teacher.config.sampler.times) if self.teacher.config.sampler else 1
        number = int(min(POOL, max(8, POOL_MACS / max(1, each))))
        return drawn_latents(self._teacher, self.prompts.learning, number, SEED - 1, self.arithmetic, self.options.batch)

    def _together(self, names: Sequence[str], state: Path) -> None:
        steps = max(1, round(JOINT_SHARE * self.options.steps))
        self.progress.stage("heal both together", steps)
        both = nn.ModuleDict({name: self._modules[name].train() for name in names})
        cuts = {name: between(self.teacher.config.components[name].pruning, _cut(self.pruned, name)) for name in names}
        pairs = {name: self._pair(name, both[name], cuts[name]) for name in names}
        lessons = Walks(
            self._teacher,
            pairs["denoiser"],
            self.prompts.learning,
            self.options.batch,
            SEED * 2,
            self.options.features,
            pairs["decoder"],
        )
        training = Training(
            both,
            lessons,
            steps,
            JOINT_RATE * self.options.rate,
            self.options.ema,
            self.progress,
            state / "both.safetensors",
            lambda: self._judged({name: both[name] for name in names}),
            judge_every=self.options.judge_every,
        )
        self._taken("both", "together", training.run())
        both.eval()

    def _judged(self, modules: Mapping[str, nn.Module]) -> Judged:
        """The student with `modules` in place of the teacher's."""
        copies = {name: copy.deepcopy(one).cpu().eval() for name, one in modules.items()}
        return self.judge(with_modules(self.teacher, copies))


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
    cuts: dict[str, dict[int, Sequence[int]]] = {}
    for name, dims in after.cuts.items():
        for dim in dims:
            left, now = before.positions(name, dim), after.positions(name, dim)
            assert now is not None
            if left is not None:
                place = {position: index for index, position in enumerate(left)}
                if any(position not in place for position in now):
                    raise EdgegenError(f"`{name}` of the pruned student holds what its teacher does not have any more")
                now = tuple(place[position] for position in now)
            cuts.setdefault(name, {})[dim] = now
    return Pruning.of(cuts, {path: way for path, way in after.removed.items() if path not in before.removed})
