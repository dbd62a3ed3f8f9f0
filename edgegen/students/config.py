"""A student in plain data: what a checkpoint says beside its tensors."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from edgegen.graph.tensor_spec import TensorSpec
from edgegen.students.pruning import Pruning
from edgegen.students.sampler import SamplerConfig

LEVEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class ComponentConfig(BaseModel):
    """One network: `architecture` names an entry of `edgegen.students.architectures`, `config` is that entry's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    config: dict[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    pruning: Pruning | None = None
    """What was cut out of that network; None: nothing."""

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What was never pruned is written as before there was pruning: its bytes are in hashes.
        data: dict[str, Any] = handler(self)
        if self.pruning is None:
            del data["pruning"]
        return data


class LatentConfig(BaseModel):
    """The latent the denoiser works on; what the decoder is given is `scale * latent + shift`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, ...]
    scale: float = 1.0
    shift: float = 0.0


TASKS = {
    "text-to-image": ("text_encoder", "denoiser", "decoder"),
    "image-to-image": ("image_encoder", "denoiser", "decoder"),
    "image-to-video": ("image_encoder", "denoiser", "decoder"),
    "single": ("model",),
}
"""Task -> its components, in the order in which they run."""

Task = Literal["text-to-image", "image-to-image", "image-to-video", "single"]


class StudentConfig(BaseModel):
    """Components in the order in which they run, the sampler between them, and prompts that the student understands.

    A task that draws has a conditioning component, which runs once, a denoiser, a decoder, a sampler and a latent. The
    denoiser is given by name what it asks for: `latent`, `timestep` [1], outputs of the conditioning component, and
    scalars [1] that `conditions` names with their defaults. text-to-image conditions on text (`text_encoder` takes
    `input_ids` [1, L] int32 and needs a tokenizer), image-to-image and image-to-video on a picture (`image_encoder`
    takes `image` [1, 3, h, w] in -1..1; what comes out may be larger). single is one component named `model` and
    nothing else.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    task: Task
    components: dict[str, ComponentConfig]
    sampler: SamplerConfig | None = None
    latent: LatentConfig | None = None
    conditions: dict[str, float] = {}
    """Scalar that the denoiser takes -> the value it has unless someone says otherwise."""
    frames_per_second: float | None = Field(default=None, gt=0)
    """Of a video; None leaves it to whoever shows it."""
    example_prompts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader must know of the checkpoint itself, such as that nothing in it was trained."""

    levels: dict[str, dict[str, Pruning]] = {}
    """Sizes that this checkpoint holds, the largest first: name -> component -> what is cut out of the network that is
    stored. `edgegen.prune.elastic` trains them and takes one out."""

    @model_validator(mode="after")
    def _check_levels(self) -> StudentConfig:
        for level, cuts in self.levels.items():
            unknown = [name for name in cuts if name not in self.components]
            if unknown or not LEVEL_NAME.fullmatch(level):
                what = f"cuts component `{unknown[0][:80]}`, which is not there" if unknown else "is no name"
                raise ValueError(f"level `{level[:80]}` {what}")
        return self

    @model_serializer(mode="wrap")
    def _without_levels(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # As of `pruning`: what has one size is written as before there were several.
        data: dict[str, Any] = handler(self)
        if not self.levels:
            del data["levels"]
        return data

    @property
    def conditioning(self) -> str | None:
        """The component that runs once, before the denoiser; None where nothing is drawn."""
        return None if self.task == "single" else TASKS[self.task][0]
