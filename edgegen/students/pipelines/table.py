"""Pipelines of diffusers that are read: for each the classes of its parts, and how they are joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgegen.errors import EdgegenError
from edgegen.students.pipelines import denoiser, text
from edgegen.students.pipelines.files import SAVE_HINT, config_of, single

if TYPE_CHECKING:
    from edgegen.students.pipelines.decoder import Decoder
    from edgegen.students.pipelines.denoiser import Denoiser
    from edgegen.students.pipelines.text import Text

Classes = Mapping[str, str]
"""Part of the folder -> the class that `model_index.json` names for it."""

FAST = ("PreTrainedTokenizerFast", "TokenizersBackend")
CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", *FAST)
ANY_VAE = ("AutoencoderTiny", "AutoencoderKL")
ABSENT_T5_TOKENS = 256
"""Stable Diffusion 3's pipeline: positions of zeros where there is no third encoder."""


@dataclass(frozen=True)
class Pipeline:
    """One row. `classes` are the parts that must be there, `left_out` those a student does without, aloud."""

    classes: Mapping[str, tuple[str, ...]]
    text: Callable[[Path, Classes], Text]
    denoiser: Callable[[Path, Classes, Decoder, Text], Denoiser]
    left_out: tuple[str, ...] = ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker")
    refused: Mapping[str, str] = field(default_factory=dict)
    """Part that a student cannot have -> the hint that gets rid of it."""
    even_sigmas: bool = False
    """Whether the pipeline brings its own sigmas, evenly spaced down to 1 / steps."""


def _unet(guidance_scale: float) -> Callable[[Path, Classes, Decoder, Text], Denoiser]:
    return lambda folder, classes, vae, read: denoiser.unet(folder, vae.factor, guidance_scale)


def _transformer(guidance_scale: float = 1.0) -> Callable[[Path, Classes, Decoder, Text], Denoiser]:
    return lambda folder, classes, vae, read: denoiser.transformer(
        folder, classes["transformer"], vae.factor, guidance_scale
    )


def _z_image(folder: Path, classes: Classes, vae: Decoder, read: Text) -> Denoiser:
    if vae.sample_size is None or vae.sample_size % (2 * vae.factor):
        raise EdgegenError("`sample_size` in `vae/config.json` does not say how large the picture is", hint=SAVE_HINT)
    return denoiser.z_image(folder, vae.sample_size // vae.factor, read.part.outputs["mask"][1])


def _sd3_text(folder: Path, classes: Classes) -> Text:
    width = single(config_of(folder, "transformer"), "joint_attention_dim", 4096, "transformer/config.json")
    return text.clip_pair(folder, pool_both=True, width=width, absent_tokens=ABSENT_T5_TOKENS)


def _language(kept: int, instructed: str | None = None, *, chat: bool = False) -> Callable[[Path, Classes], Text]:
    return lambda folder, classes: text.language_model(
        folder, classes["text_encoder"], kept, instructed=instructed, chat=chat
    )


_CLIP = {"text_encoder": ("CLIPTextModel",), "tokenizer": CLIP_TOKENIZERS}
_UNET = {"unet": ("UNet2DConditionModel",), "vae": ANY_VAE}
_PROJECTED = ("CLIPTextModelWithProjection",)
_SANA = {
    "text_encoder": ("Gemma2Model", "Gemma2ForCausalLM"),
    "tokenizer": ("GemmaTokenizer", "GemmaTokenizerFast", *FAST),
    "transformer": ("SanaTransformer2DModel",),
    "vae": ("AutoencoderDC", "AutoencoderTiny"),
}
_PIXART = {
    "text_encoder": ("T5EncoderModel",),
    "tokenizer": ("T5Tokenizer", "T5TokenizerFast", *FAST),
    "transformer": ("PixArtTransformer2DModel",),
    "vae": ANY_VAE,
}
_NO_T5 = (
    "Stable Diffusion 3 also draws without it, less exactly where a prompt is long: write `[null, null]` "
    "for `text_encoder_3` and `tokenizer_3` in model_index.json, as `from_pretrained(folder, text_encoder_3=None, "
    "tokenizer_3=None)` does"
)

PIPELINES: dict[str, Pipeline] = {
    "StableDiffusionPipeline": Pipeline({**_CLIP, **_UNET}, lambda folder, _: text.clip(folder), _unet(7.5)),
    "LatentConsistencyModelPipeline": Pipeline({**_CLIP, **_UNET}, lambda folder, _: text.clip(folder), _unet(8.5)),
    "StableDiffusionXLPipeline": Pipeline(
        {**_CLIP, **_UNET, "text_encoder_2": _PROJECTED, "tokenizer_2": CLIP_TOKENIZERS},
        lambda folder, _: text.clip_pair(folder),
        _unet(5.0),
        left_out=("feature_extractor", "image_encoder", "force_zeros_for_empty_prompt", "add_watermarker"),
    ),
    "StableDiffusion3Pipeline": Pipeline(
        {
            "text_encoder": _PROJECTED,
            "tokenizer": CLIP_TOKENIZERS,
            "text_encoder_2": _PROJECTED,
            "tokenizer_2": CLIP_TOKENIZERS,
            "transformer": ("SD3Transformer2DModel",),
            "vae": ANY_VAE,
        },
        _sd3_text,
        _transformer(),
        left_out=("feature_extractor", "image_encoder"),
        refused={"text_encoder_3": _NO_T5, "tokenizer_3": _NO_T5},
    ),
    "SanaPipeline": Pipeline(_SANA, _language(300, "SanaPipeline"), _transformer()),
    "SanaSprintPipeline": Pipeline(_SANA, _language(300, "SanaSprintPipeline"), _transformer(4.5)),
    "PixArtAlphaPipeline": Pipeline(_PIXART, _language(120), _transformer()),
    "PixArtSigmaPipeline": Pipeline(_PIXART, _language(300), _transformer()),
    "ZImagePipeline": Pipeline(
        {
            "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
            "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast", *FAST),
            "transformer": ("ZImageTransformer2DModel",),
            "vae": ANY_VAE,
        },
        _language(512, chat=True),
        _z_image,
        even_sigmas=True,
    ),
}
