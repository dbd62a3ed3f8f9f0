"""What the text-to-image families have in common: the shapes between text encoder, denoiser and decoder, and the
key names of a diffusers folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from edgegen.errors import EdgegenError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.students.config import ComponentConfig, LatentConfig, StudentConfig
from edgegen.students.networks.clip_pair import ClipHalfConfig, ClipPairConfig
from edgegen.students.networks.clip_text import ClipTextConfig
from edgegen.students.sampler import SamplerConfig

if TYPE_CHECKING:
    from torch import Tensor

PROMPTS = (
    "a photograph of a cat on a windowsill",
    "a red car on an empty street, evening light",
    "a bowl of fruit on a wooden table, oil painting",
    "a house by the sea",
)
VOCABULARY, END, CONTEXT_LENGTH = 49408, 49407, 77
TINY_LENGTH = 16
_LAYER = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d+)\.")


class Network(BaseModel):
    """An entry of `edgegen.students.architectures` with its configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    config: BaseModel

    def component(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> ComponentConfig:
        return ComponentConfig(
            architecture=self.architecture,
            config=self.config.model_dump(mode="json", exclude_unset=True),
            inputs=inputs,
            outputs=outputs,
        )


def clip_l(layers: int = 12) -> ClipTextConfig:
    """The text encoder of CLIP ViT-L/14 (openai/clip-vit-large-patch14): 123,060,480 parameters."""
    return _clip(768, layers, 12, "quick_gelu")


def open_clip_h() -> ClipTextConfig:
    """OpenCLIP ViT-H/14 as SD 2 uses it: without its last layer."""
    return _clip(1024, 23, 16, "gelu")


def open_clip_g() -> ClipTextConfig:
    """OpenCLIP ViT-bigG/14, second text encoder of SDXL and SD 3."""
    return _clip(1280, 32, 20, "gelu")


def tiny_clip(hidden_size: int, heads: int, hidden_act: str, layers: int = 2) -> ClipTextConfig:
    """A small one that reads `TINY_LENGTH` ids of the same vocabulary."""
    return _clip(hidden_size, layers, heads, hidden_act, TINY_LENGTH)


def _clip(width: int, layers: int, heads: int, act: str, length: int = CONTEXT_LENGTH) -> ClipTextConfig:
    return ClipTextConfig.model_validate(
        {
            "vocab_size": VOCABULARY,
            "max_position_embeddings": length,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            "hidden_act": act,
        }
    )


def clip_pair(first: ClipTextConfig, second: ClipTextConfig, pooled: int, width: int | None = None) -> ClipPairConfig:
    """Two encoders side by side, the second with a pooled vector and with 0 as its padding, filled up to `width`."""
    return ClipPairConfig(
        first=ClipHalfConfig(text=first, eos_token_id=END),
        second=ClipHalfConfig(text=second, projection_dim=pooled, eos_token_id=END, pad_token_id=0),
        width=width,
    )


def text_to_image(
    name: str,
    text: ClipTextConfig | ClipPairConfig,
    denoiser: Network,
    decoder: Network,
    latent: LatentConfig,
    sampler: SamplerConfig,
    reads_pooled: bool = False,
) -> StudentConfig:
    """A student that draws 8 times the side of its latent."""
    pooled: tuple[TensorSpec, ...] = ()
    if isinstance(text, ClipPairConfig):
        first, width = text.first.text, text.first.text.hidden_size + text.second.text.hidden_size
        encoder, width = Network(architecture="clip_pair", config=text), text.width or width
        pooled = (TensorSpec(name="pooled", shape=(1, text.second.projection_dim or 0)),)
    else:
        first, width = text, text.hidden_size
        encoder = Network(architecture="clip_text", config=text)
    length = first.max_position_embeddings
    ids = TensorSpec(name="input_ids", shape=(1, length), dtype="int32")
    context = TensorSpec(name="context", shape=(1, length, width))
    noisy = TensorSpec(name="latent", shape=latent.shape)
    asked = (noisy, TensorSpec(name="timestep", shape=(1,)), context, *(pooled if reads_pooled else ()))
    image = TensorSpec(name="image", shape=(1, 3, 8 * latent.shape[-2], 8 * latent.shape[-1]))
    return StudentConfig(
        name=name,
        task="text-to-image",
        components={
            "text_encoder": encoder.component((ids,), (context, *pooled)),
            "denoiser": denoiser.component(asked, (TensorSpec(name="prediction", shape=latent.shape),)),
            "decoder": decoder.component((noisy,), (image,)),
        },
        sampler=sampler,
        latent=latent,
        example_prompts=PROMPTS,
    )


def from_folder(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors named `<subfolder>.<key>` as a diffusers folder has them -> ours, by component.

    Subfolders are text_encoder, text_encoder_2, unet, and of vae the decoder; its encoder is left out. With two text
    encoders the last layer of the first is left out too, which no pipeline reads. EdgegenError for another subfolder.
    """
    made: dict[str, dict[str, Tensor]] = {"text_encoder": {}, "denoiser": {}, "decoder": {}}
    two = any(key.startswith("text_encoder_2.") for key in state)
    layers = [int(found[1]) for key in state if (found := _LAYER.match(key.removeprefix("text_encoder.")))]
    for key, value in state.items():
        folder, _, rest = key.partition(".")
        if folder == "unet":
            made["denoiser"][rest] = value
        elif folder == "vae":
            if rest.startswith("decoder."):
                made["decoder"][rest.removeprefix("decoder.")] = value
        elif folder in ("text_encoder", "text_encoder_2"):
            if rest.endswith("position_ids"):
                continue
            if two and folder == "text_encoder":
                found = _LAYER.match(rest)
                if "final_layer_norm" in rest or "text_projection" in rest or (found and int(found[1]) == max(layers)):
                    continue
            # transformers 5 writes `text_model` without the prefix that older ones and ours have.
            if not rest.startswith(("text_model.", "text_projection.")):
                rest = f"text_model.{rest}"
            made["text_encoder"][f"{folder}.{rest}" if two else rest] = value
        else:
            raise EdgegenError(
                f"`{key}` belongs to no part of a text-to-image student",
                hint="name tensors `unet.<key>`, `vae.<key>`, `text_encoder.<key>`, as a diffusers folder holds them",
            )
    return made
