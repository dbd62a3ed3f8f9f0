"""A student in plain data: what a checkpoint says beside its tensors."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgegen.graph.tensor_spec import TensorSpec
from edgegen.students.sampler import SamplerConfig


class ComponentConfig(BaseModel):
    """One network: `architecture` names an entry of `edgegen.students.architectures`, `config` is that entry's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    config: dict[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class LatentConfig(BaseModel):
    """The latent the denoiser works on; what the decoder is given is `scale * latent + shift`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, ...]
    scale: float = 1.0
    shift: float = 0.0


class StudentConfig(BaseModel):
    """Components in the order in which they run, the sampler between them, and prompts that the student understands.

    `task` text-to-image has components text_encoder, denoiser and decoder, a sampler, a latent and a tokenizer;
    single is one component named `model` and nothing else.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    task: Literal["text-to-image", "single"]
    components: dict[str, ComponentConfig]
    sampler: SamplerConfig | None = None
    latent: LatentConfig | None = None
    example_prompts: tuple[str, ...] = ()
