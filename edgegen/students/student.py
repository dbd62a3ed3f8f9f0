"""`Student`: what the load stage gives and every later stage takes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgegen.graph.tensor_spec import TensorSpec
from edgegen.students.config import StudentConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DTYPES = {"float32": torch.float32, "int32": torch.int32}


@dataclass(frozen=True)
class Component:
    """One network of a student with its static signature; inputs are passed in order, outputs come back in order."""

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Deterministic inputs of the right shapes, for tracing; verification uses the student's own trajectory
        instead."""
        generator = torch.Generator().manual_seed(0)
        made = []
        for spec in self.inputs:
            if spec.dtype == "int32":
                made.append(torch.ones(spec.shape, dtype=torch.int32))
            else:
                made.append(torch.randn(spec.shape, generator=generator))
        return tuple(made)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over signature, parameter names, dtypes, shapes and bytes."""
        digest = hashlib.sha256(repr((self.name, self.inputs, self.outputs, str(self.module))).encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data if tensor.numel() else b"")
        return digest.hexdigest()


@dataclass(frozen=True)
class Student:
    """Components + sampler + tokenizer + example inputs."""

    config: StudentConfig
    components: Mapping[str, Component]
    tokenizer_json: str | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        assert self.tokenizer_json is not None
        return Tokenizer.from_str(self.tokenizer_json)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over configuration, tokenizer and every component."""
        digest = hashlib.sha256(self.config.model_dump_json().encode())
        digest.update((self.tokenizer_json or "").encode())
        for component in self.components.values():
            digest.update(component.fingerprint.encode())
        return digest.hexdigest()

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Prompts -> input_ids [N, L] int32, padded and cut by the tokenizer's own settings."""
        return torch.tensor([e.ids for e in self.tokenizer.encode_batch(prompts)], dtype=torch.int32)


def assemble(config: StudentConfig, state: Mapping[str, Mapping[str, Tensor]], tokenizer_json: str | None) -> Student:
    """Build every component that `config` names and give it its weights, in fp32; strict, EdgegenError on any
    mismatch."""
    from edgegen.errors import EdgegenError
    from edgegen.students.architectures import build_module

    components = {}
    for name, part in config.components.items():
        module = build_module(part.architecture, part.config)
        if name not in state:
            raise EdgegenError(f"checkpoint has no weights for component `{name}`")
        weights = {key: value.float() if value.is_floating_point() else value for key, value in state[name].items()}
        try:
            module.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise EdgegenError(f"weights of component `{name}` do not fit its config: {reason}") from error
        components[name] = Component(name, module, part.inputs, part.outputs)
    return Student(config, components, tokenizer_json)
