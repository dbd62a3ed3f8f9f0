"""Families of published students: which there are, and a new, untrained student of one of them.

A family is one file beside this one with one or more constants of type `Family`; every such file is found by being
there.
"""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

import edgegen.students.families as package
from edgegen.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from edgegen.students.config import StudentConfig
    from edgegen.students.student import Student

State = dict[str, "dict[str, Tensor]"]


@dataclass(frozen=True)
class Family:
    """A published architecture at its sizes: `full` is the exact public configuration, `tiny` a small one with every
    feature of it."""

    name: str
    summary: str
    """One line."""
    sizes: Mapping[str, Callable[[], StudentConfig]]
    sources: tuple[str, ...]
    """Papers and public configurations."""
    readings: tuple[str, ...] = ()
    """Details that no source states and that are our choice."""
    padding: int | None = None
    """Id that the tokenizer of the published student fills up with, where it is not CLIP's end and the text encoder's
    configuration does not say."""
    from_upstream: Callable[[Mapping[str, Tensor]], State] | None = None
    """State dict with the names that its authors publish -> ours, by component."""


FAMILIES: Mapping[str, Family]
"""All of them by name; imported when they are first asked for, since family files import `Family` from here."""


def __getattr__(name: str) -> Mapping[str, Family]:
    if name == "FAMILIES":
        return families()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def families() -> Mapping[str, Family]:
    """Every `Family` of the files beside this one, by name, sorted."""
    found: dict[str, Family] = {}
    for info in pkgutil.iter_modules(package.__path__):
        for value in vars(import_module(f"{package.__name__}.{info.name}")).values():
            if isinstance(value, Family):
                found[value.name] = value
    return {name: found[name] for name in sorted(found)}


def family(name: str) -> Family:
    """The family called `name`; UsageError with the nearest name for one that does not exist."""
    known = families()
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else "`edgegen student families` lists them"
        raise UsageError(f"there is no family `{name}`", hint=hint)
    return known[name]


def config_of(name: str, size: str) -> StudentConfig:
    """The configuration of family `name` at `size`; UsageError for a family or a size that does not exist."""
    chosen = family(name)
    if size not in chosen.sizes:
        raise UsageError(
            f"family `{name}` has no size `{size}`",
            hint="use " + " or ".join(f"`--size {one}`" for one in chosen.sizes),
        )
    return chosen.sizes[size]()


def new(name: str, size: str = "full", seed: int = 0, tokenizer_json: str | None = None) -> Student:
    """An untrained student of family `name`: its weights are torch's own initialisation from `seed`.

    A student that reads text is given `tokenizer_json`, or the stand-in of `edgegen.students.stand_in_tokenizer`; its
    config's `notes` say what is not the published student's. UsageError for a name or a size that does not exist, the
    errors of `edgegen.students.assembly` for a tokenizer that does not fit.
    """
    import torch

    from edgegen.students.architectures import build_module
    from edgegen.students.assembly import check_tokenizer
    from edgegen.students.dataflow import check_flow
    from edgegen.students.stand_in_tokenizer import NOTE, stand_in_for
    from edgegen.students.student import Component, Student

    chosen, config = family(name), config_of(name, size)
    check_flow(config, name)
    notes = [f"weights are random, from seed {seed}: nothing was trained"]
    if "text_encoder" in config.components:
        length = config.components["text_encoder"].inputs[0].shape[-1]
        if tokenizer_json is None:
            tokenizer_json = stand_in_for(config.components["text_encoder"], chosen.padding)
            notes.append(NOTE)
        check_tokenizer(tokenizer_json, name, length)
    elif tokenizer_json is not None:
        raise UsageError(f"family `{name}` starts from a picture and reads no text", hint="leave `--tokenizer` out")
    components = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part_name, part in config.components.items():
            module = build_module(part.architecture, part.config)
            components[part_name] = Component(part_name, module, part.inputs, part.outputs)
    return Student(config.model_copy(update={"notes": (*config.notes, *notes)}), components, tokenizer_json)


def parameters(config: StudentConfig) -> dict[str, int]:
    """Parameters of each component, counted without memory for them."""
    import torch

    from edgegen.students.architectures import build_module

    with torch.device("meta"):
        modules = {name: build_module(part.architecture, part.config) for name, part in config.components.items()}
    return {name: sum(tensor.numel() for tensor in module.parameters()) for name, module in modules.items()}
