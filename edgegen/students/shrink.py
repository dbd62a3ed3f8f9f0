"""A shallow copy of a student for `--smoke`: same signature, sampler and tokenizer, few layers, random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from edgegen.errors import UsageError
from edgegen.students.architectures import build_module
from edgegen.students.config import ComponentConfig
from edgegen.students.student import Component, Student

Config = dict[str, Any]


def _clip_text(config: Config) -> Config:
    return {**config, "num_hidden_layers": min(2, config["num_hidden_layers"])}


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


def _tiny_decoder(config: Config) -> Config:
    return {**config, "num_blocks": tuple(1 for _ in config["num_blocks"])}


SHRINK: dict[str, Callable[[Config], Config]] = {
    "clip_text": _clip_text,
    "unet": _unet,
    "tiny_decoder": _tiny_decoder,
}


def smoke_copy(student: Student) -> Student:
    """The two-layer copy; UsageError for a student whose networks are not ours to rebuild (a `.pt2`)."""
    components, configs = {}, {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, part in student.config.components.items():
            if part.architecture not in SHRINK:
                raise UsageError(
                    f"component `{name}` is a finished graph: there is no smaller copy of it to try first",
                    hint="build without `--smoke`",
                )
            config = SHRINK[part.architecture](part.config)
            module = build_module(part.architecture, config)
            components[name] = Component(name, module, part.inputs, part.outputs)
            configs[name] = ComponentConfig(
                architecture=part.architecture, config=config, inputs=part.inputs, outputs=part.outputs
            )
    config_ = student.config.model_copy(update={"components": configs, "name": f"{student.config.name}-smoke"[:64]})
    return Student(config_, components, student.tokenizer_json)
