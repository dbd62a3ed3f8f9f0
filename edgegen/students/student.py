"""`Student`: what the load stage gives and every later stage takes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgegen.graph.tensor_spec import TensorSpec
from edgegen.students.config import StudentConfig
from edgegen.students.example_picture import example_picture
from edgegen.students.settings import settings

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
    examples: tuple[tuple[Tensor, ...], ...] = ()
    """Inputs that the user gave, in place of random ones."""

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Deterministic inputs of the right shapes, for tracing; verification uses the student's own trajectory
        instead."""
        if self.examples:
            return self.examples[0]
        generator = torch.Generator().manual_seed(0)
        made = []
        for spec in self.inputs:
            if spec.dtype == "int32":
                made.append(torch.ones(spec.shape, dtype=torch.int32))
            else:
                made.append(torch.randn(spec.shape, generator=generator))
        return tuple(made)

    def samples(self) -> tuple[tuple[Tensor, ...], ...]:
        """What a component without a trajectory is calibrated and verified on."""
        return self.examples or (self.example_inputs(),)

    @torch.no_grad()
    def call(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name; of `inputs` the component takes those that its signature names."""
        out = self.module(*(inputs[spec.name] for spec in self.inputs))
        values = (out,) if isinstance(out, Tensor) else tuple(out)
        return {spec.name: value for spec, value in zip(self.outputs, values, strict=True)}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over signature, what modules are set to, and names, dtypes, shapes and bytes of all tensors."""
        digest = hashlib.sha256(repr((self.name, self.inputs, self.outputs, str(self.module))).encode())
        for line in settings(self.module):
            digest.update(line.encode() + b"\n")
        # Tables that no state dict has are computed from settings, which need not be kept.
        tables = {name: one for name, one in self.module.named_buffers() if one is not None}
        for name, tensor in sorted({**tables, **self.module.state_dict()}.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            # A count of batches is a tensor without dimensions, which has no bytes to look at before it has one.
            flat = tensor.detach().contiguous().cpu().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data if tensor.numel() else b"")
        for sample in self.examples:
            for tensor in sample:
                digest.update(tensor.contiguous().numpy().tobytes())
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

    @property
    def conditioning(self) -> Component:
        """The component that runs once, before the denoiser, and says what is to be drawn."""
        assert self.config.conditioning is not None
        return self.components[self.config.conditioning]

    def given(self, prompts: Sequence[str]) -> Tensor:
        """What the conditioning component takes for `prompts`: input_ids [N, L] int32, or for a student that starts
        from a picture the example pictures of these names, [N, 3, H, W] in -1..1."""
        if self.config.conditioning == "text_encoder":
            return self.tokenize(list(prompts))
        height, width = self.conditioning.inputs[0].shape[-2:]
        return torch.from_numpy(np.stack([example_picture(name, height, width) for name in prompts]))

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Prompts -> input_ids [N, L] int32, padded and cut by the tokenizer's own settings."""
        return torch.tensor([e.ids for e in self.tokenizer.encode_batch(prompts)], dtype=torch.int32)


class _Uninitialised(TorchFunctionMode):
    """Parameters get no random numbers: they are about to be replaced, and a gigabyte of them takes longer to draw than
    to read. What a network computes for itself (tables, buffers) is computed."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        target = args[0] if args else given.get("tensor")
        random = getattr(func, "__module__", None) == "torch.nn.init" or func in _RANDOM
        if random and isinstance(target, nn.Parameter):
            return target
        return func(*args, **given)


_RANDOM = (Tensor.uniform_, Tensor.normal_)


def assemble(config: StudentConfig, state: Mapping[str, Mapping[str, Tensor]], tokenizer_json: str | None) -> Student:
    """Build every component that `config` names and give it its weights, in fp32; strict, EdgegenError on any
    mismatch."""
    from edgegen.errors import EdgegenError
    from edgegen.students.architectures import build_module
    from edgegen.students.reduce import reduce

    components = {}
    for name, part in config.components.items():
        with _Uninitialised():
            module = build_module(part.architecture, part.config)
            if part.pruning is not None:
                module = reduce(module, part.pruning, weights=False)
        if name not in state:
            raise EdgegenError(f"checkpoint has no weights for component `{name}`")
        weights = {key: value.float() if value.is_floating_point() else value for key, value in state[name].items()}
        weights = {key: value.contiguous() for key, value in weights.items()}
        try:
            # The tensors themselves, not copies: those of a float32 file stay memory-mapped.
            module.load_state_dict(weights, strict=True, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise EdgegenError(f"weights of component `{name}` do not fit its config: {reason}") from error
        components[name] = Component(name, module, part.inputs, part.outputs)
    return Student(config, components, tokenizer_json)
