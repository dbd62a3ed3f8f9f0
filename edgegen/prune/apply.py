"""A student from another one and a record of what is cut out of its components."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from edgegen.errors import UsageError
from edgegen.students.architectures import ARCHITECTURES
from edgegen.students.pruning import Pruning
from edgegen.students.reduce import reduce
from edgegen.students.student import Component, Student


def pruned(student: Student, prunings: Mapping[str, Pruning]) -> Student:
    """`student` with components made smaller; it itself stays as it is. Components that are not named are shared.

    A record is of the component as it is now: pruning what was pruned before adds to its record. UsageError for a
    component that is a finished graph, which has no modules.
    """
    components, configs = dict(student.components), dict(student.config.components)
    for name, pruning in prunings.items():
        part, config = components[name], configs[name]
        require_modules(name, config.architecture)
        module = reduce(copy.deepcopy(part.module), pruning, weights=True).requires_grad_(False)
        components[name] = Component(part.name, module, part.inputs, part.outputs, part.examples)
        whole = (config.pruning or Pruning()).then(pruning)
        configs[name] = config.model_copy(update={"pruning": whole})
    config_ = student.config.model_copy(update={"components": configs})
    return Student(config_, components, student.tokenizer_json)


def require_modules(name: str, architecture: str) -> None:
    """UsageError where component `name` is a graph and not a network that can be built smaller."""
    if architecture not in ARCHITECTURES:
        raise UsageError(
            f"component `{name}` is a finished graph (`{architecture}`): it has no modules to prune",
            hint="give the checkpoint that the `.pt2` was exported from: a `.pt`, `.safetensors` with its config, or a "
            "diffusers folder",
        )
