"""A shallow copy of a student for `--smoke`: same signature, sampler and tokenizer, few layers, random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from edgegen.errors import UsageError
from edgegen.students.architectures import ARCHITECTURES, build_module
from edgegen.students.config import ComponentConfig
from edgegen.students.student import Component, Student

Config = dict[str, Any]


def _unet(config: Config) -> Config:
    """Two levels: the first, and the narrowest that attends to the prompt."""
    widths, attends = config["block_out_channels"], config["cross_attention"]
    second = next((level for level in range(1, len(widths)) if attends[level]), len(widths) - 1)
    return {
        **config,
        "block_out_channels": (widths[0], widths[second]),
        "cross_attention": (attends[0], attends[second]),
        "layers_per_block": 1,
    }


DEPTHS = ("num_hidden_layers", "num_layers", "num_single_layers", "n_layers", "depth")
"""Keys of a config, or of a published config inside it, that count layers: two are left."""
REPEATS = (
    "layers_per_block",
    "decoder_layers_per_block",
    "num_blocks",
    "depths",
    "down_transformer_layers",
    "up_transformer_layers",
    "transformer_layers_per_block",
)
"""Keys that count repetitions level by level: one is left of each."""
PATTERNS = ("blocks",)
"""Keys that name a kind for each layer: the first of each kind is left."""


def _fewer(config: Config) -> Config:
    """The rule for every network without one of its own."""
    return {key: _shorter(key, value) for key, value in config.items()}


def _shorter(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return _fewer(value)
    if key in DEPTHS and isinstance(value, int):
        return min(2, value)
    if key == "layers_per_block" and isinstance(value, int):
        return min(1, value)
    if key in REPEATS and isinstance(value, list | tuple) and all(isinstance(one, int) for one in value):
        return type(value)(min(1, one) for one in value)
    if key in PATTERNS and isinstance(value, list | tuple):
        return type(value)(dict.fromkeys(value))
    return value


SHRINK: dict[str, Callable[[Config], Config]] = {"unet": _unet}


def smoke_copy(student: Student) -> Student:
    """The two-layer copy; UsageError for a student whose networks are not ours to rebuild (a `.pt2`)."""
    components, configs = {}, {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, part in student.config.components.items():
            if part.architecture not in ARCHITECTURES:
                raise UsageError(
                    f"component `{name}` is a finished graph: there is no smaller copy of it to try first",
                    hint="build without `--smoke`",
                )
            whole = ARCHITECTURES[part.architecture][0].model_validate(part.config).model_dump()
            config = SHRINK.get(part.architecture, _fewer)(whole)
            module = build_module(part.architecture, config)
            components[name] = Component(name, module, part.inputs, part.outputs)
            configs[name] = ComponentConfig(
                architecture=part.architecture, config=config, inputs=part.inputs, outputs=part.outputs
            )
    config_ = student.config.model_copy(update={"components": configs, "name": f"{student.config.name}-smoke"[:64]})
    return Student(config_, components, student.tokenizer_json)
