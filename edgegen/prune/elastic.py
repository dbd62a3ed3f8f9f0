"""One checkpoint, several sizes: nested sub-networks whose weights are slices of the largest one's.

Each step trains the largest, the smallest and one of those between (the sandwich rule of slimmable networks, Yu and
Huang 2019, arXiv 1903.05134), each to answer as the teacher. A checkpoint keeps the cuts of its levels in its config;
a level that is taken out is a pruned student as any other.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from edgegen.cache import Cache
from edgegen.errors import EdgegenError, UsageError
from edgegen.prune.apply import pruned
from edgegen.prune.heal import (
    HEALED,
    Healing,
    HealOptions,
    Progress,
    between,
    cut_of,
    healing_fingerprint,
    require_cut,
    require_drawing,
    save_weights,
    with_modules,
)
from edgegen.prune.lessons import Pair
from edgegen.prune.training import Lessons
from edgegen.students.pruning import Pruning
from edgegen.students.reduce import positions_in, reduce
from edgegen.students.student import Student

Levels = Mapping[str, Mapping[str, Pruning]]
"""Name -> component -> what is cut out of the network that the checkpoint holds; the largest first."""


class Slice(nn.Module):
    """A sub-network whose weights are slices of `whole`'s, differentiable in them.

    It has no parameters of its own: `shape` is the network that `pruning` leaves, and only its form is used.
    """

    def __init__(self, whole: nn.Module, pruning: Pruning) -> None:
        super().__init__()
        shape = reduce(copy.deepcopy(whole), pruning, weights=True)
        shape.requires_grad_(False)
        # In a tuple, so that neither network is a part of this one and nothing is trained or saved twice.
        self._held = (whole, shape)
        self._cuts = {
            name: [(dim, positions_in(pruning.kept[i]).to(one.device)) for dim, i in pruning.cuts.get(name, {}).items()]
            for name, one in shape.named_parameters()
        }

    def get_submodule(self, target: str) -> nn.Module:
        """Of the sub-network: what is watched inside is watched there."""
        return self._held[1].get_submodule(target)

    @property
    def shape(self) -> nn.Module:
        """The network that is left, with weights that nobody keeps up to date."""
        return self._held[1]

    def forward(self, *inputs: Tensor) -> Any:
        """As the network that `pruning` leaves."""
        whole = dict(self._held[0].named_parameters())
        weights = {}
        for name, cuts in self._cuts.items():
            value: Tensor = whole[name]
            for dim, kept in cuts:
                value = value.index_select(dim, kept)
            weights[name] = value
        return functional_call(self._held[1], weights, inputs)


def heal_levels(teacher: Student, student: Student, options: HealOptions, cache: Cache, progress: Progress) -> Student:
    """`student`, which holds levels (`with_levels`), with weights of which every one of them can be sliced; `teacher`
    is what all were cut out of.

    Kept in `cache`, where a run that was killed goes on. EdgegenError for students of which nothing was cut, or that
    draw nothing.
    """
    require_drawing(teacher)
    levels = student.config.levels
    cuts = {
        name: {
            level: between(
                teacher.config.components[name].pruning, cut_of(student, name).then(parts.get(name, Pruning()))
            )
            for level, parts in levels.items()
        }
        for name in HEALED
        if name in teacher.components
    }
    names = [name for name, each in cuts.items() if any(cut != Pruning() for cut in each.values())]
    require_cut(names)
    healing = Healing(teacher, student, options, cache, progress)
    key = cache.key(
        "heal-levels",
        sources=healing_fingerprint(),
        teacher=teacher.fingerprint,
        student=student.fingerprint,
        options=options.plain(),
        arithmetic=healing.arithmetic.plain(),
        torch=torch.__version__,
    )

    def build(folder: Path) -> None:
        state = cache.unfinished(key)
        pairs: dict[str, dict[str, Pair]] = {level: {} for level in levels}
        for name in names:
            module = copy.deepcopy(student.components[name].module).train().requires_grad_(True)
            healing.modules[name] = healing.arithmetic.placed(module)
            sizes = {level: _sized(module, parts.get(name, Pruning())) for level, parts in levels.items()}
            sandwich = Sandwich([healing.lesson(name, *sizes[one], cuts[name][one]) for one in levels], healing.seed)
            progress.stage(f"heal all sizes of the {name}", options.steps)
            course = healing.training(module, sandwich, options.steps, state / f"{name}.safetensors").run()
            healing.taken(name, "all sizes", course)
            for level, size in sizes.items():
                pairs[level][name] = healing.pair(name, *size, cuts[name][level])
        if len(names) > 1:
            both = nn.ModuleDict(healing.modules)
            healing.together(both, Sandwich([healing.walks(one) for one in pairs.values()], healing.seed), state)
        for name in names:
            save_weights(healing.modules[name], folder / f"{name}.safetensors")

    entry = cache.directory(key, build)
    modules = {}
    for name in names:
        modules[name] = copy.deepcopy(student.components[name].module)
        modules[name].load_state_dict(load_file(entry / f"{name}.safetensors"))
    return with_modules(student, modules)


def _sized(module: nn.Module, cut: Pruning) -> tuple[nn.Module, nn.Module]:
    """What computes a level of `module`, and a network of that form."""
    if cut == Pruning():
        return module, module
    part = Slice(module, cut)
    return part, part.shape


@dataclass
class Sandwich:
    """Lessons of all levels of one network, each with a trajectory of its own; the largest first."""

    levels: Sequence[Lessons]
    seed: int

    def learn(self, index: int) -> Tensor:
        chosen = [0, len(self.levels) - 1]
        if len(self.levels) > 2:
            generator = torch.Generator().manual_seed(self.seed + index)
            chosen.insert(1, 1 + int(torch.randint(len(self.levels) - 2, (), generator=generator)))
        return torch.stack([self.levels[one].learn(index) for one in dict.fromkeys(chosen)]).mean()

    def state(self) -> dict[str, Tensor]:
        return {f"{i}/{name}": value for i, one in enumerate(self.levels) for name, value in one.state().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for index, one in enumerate(self.levels):
            prefix = f"{index}/"
            one.restore({name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)})


def check_nested(levels: Levels) -> None:
    """EdgegenError unless every level is cut out of the one before it."""
    names = list(levels)
    for larger, smaller in pairwise(names):
        for component in {*levels[larger], *levels[smaller]}:
            outer = levels[larger].get(component, Pruning())
            inner = levels[smaller].get(component, Pruning())
            if not nested(outer, inner):
                raise EdgegenError(
                    f"level `{smaller}` is not cut out of `{larger}`: its {component} keeps what that one dropped",
                    hint="choose the smaller level among what the larger one keeps",
                )


def nested(outer: Pruning, inner: Pruning) -> bool:
    """Whether what `inner` keeps is among what `outer` keeps; both of the same network."""
    gone = tuple(f"{path}." for path in inner.removed)
    if any(path not in inner.removed and not path.startswith(gone) for path in outer.removed):
        return False
    for name, dims in outer.cuts.items():
        if gone and name.startswith(gone):
            continue
        for dim in dims:
            large, small = outer.positions(name, dim), inner.positions(name, dim)
            if small is None or large is None or not set(small) <= set(large):
                return False
    return True


def with_levels(student: Student, levels: Levels) -> Student:
    """`student` with the sub-networks that `levels` cut out of it, the largest first, and with no weight that none of
    them has: what is stored is the largest. EdgegenError for levels that are not nested."""
    check_nested(levels)
    alone = without_levels(student)
    largest = next(iter(levels.values()), {})
    left = {
        name: {part: between(largest.get(part), cut) for part, cut in cuts.items()} for name, cuts in levels.items()
    }
    stored = pruned(alone, largest)
    named = {name: {part: cut for part, cut in cuts.items() if cut != Pruning()} for name, cuts in left.items()}
    return replace(stored, config=stored.config.model_copy(update={"levels": named}))


def without_levels(student: Student) -> Student:
    """What the checkpoint stores, as a student of one size."""
    return replace(student, config=student.config.model_copy(update={"levels": {}}))


def require_one_size(student: Student, what: str) -> None:
    """UsageError, with the commands that take one out, for a checkpoint that holds several sizes."""
    if student.config.levels:
        names = ", ".join(f"`{one}`" for one in student.config.levels)
        first = next(iter(student.config.levels))
        raise UsageError(
            f"student `{student.config.name}` holds several sizes ({names}), and {what} is for one",
            hint=f"take one out: `edgegen student level MODEL {first} -o one.pt`",
        )


def chosen_level(student: Student, name: str | None) -> Student:
    """`student` at the level `name`; UsageError where it holds several and none is named, or has none of that name."""
    if name is not None:
        return at_level(student, name)
    if student.config.levels:
        known = ", ".join(f"`--level {one}`" for one in student.config.levels)
        raise UsageError(
            f"student `{student.config.name}` holds several sizes, and nothing says which", hint=f"use {known}"
        )
    return student


def at_level(student: Student, name: str) -> Student:
    """The sub-network of `student` that its checkpoint calls `name`; UsageError where there is none of that name."""
    levels = student.config.levels
    if not levels:
        raise UsageError(
            f"student `{student.config.name}` has one size: its checkpoint holds no levels", hint="leave `--level` out"
        )
    if name not in levels:
        known = ", ".join(f"`--level {one}`" for one in levels)
        raise UsageError(f"student `{student.config.name}` has no level `{name}`", hint=f"use {known}")
    return pruned(without_levels(student), levels[name])
