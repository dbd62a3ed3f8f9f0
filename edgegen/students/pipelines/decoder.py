"""The decoder of a folder's autoencoder: edgegen's own where it is the tiny one that ours is, else diffusers' class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgegen.errors import EdgegenError
from edgegen.students.pipelines.files import (
    SAVE_HINT,
    Part,
    config_of,
    fits,
    number,
    require,
    require_depth,
    single,
    sizes,
    weights,
)

STEM = "diffusion_pytorch_model"
OWN_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "act_fn": ("relu", ("relu",)),
    "upsample_fn": ("nearest", ("nearest",)),
    "upsampling_scaling_factor": (2, (2,)),
}
TWICE = {**OWN_FIXED, "act_fn": ("relu", ("relu", "silu", "gelu", "mish", "swish"))}
KL_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    # A pipeline would use them in place of one scale and one shift.
    "latents_mean": (None, (None,)),
    "latents_std": (None, (None,)),
}

VQ_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {"norm_type": ("group", ("group",))}


@dataclass(frozen=True)
class Decoder:
    """The decoder; it is given `scale * latent + shift`, and a latent place becomes `factor` pixels a side."""

    part: Part
    factor: int
    scale: float
    shift: float
    sample_size: int | None
    """Side of the picture that the autoencoder names as its own."""


def decoder(folder: Path, class_name: str, place: str = "vae") -> Decoder:
    """The decoder in `place`, an autoencoder of class AutoencoderTiny, AutoencoderKL, AutoencoderDC or VQModel."""
    name = f"{place}/config.json"
    config = config_of(folder, place)
    scaling, shift = number(config, "scaling_factor", 1.0, name), number(config, "shift_factor", 0.0, name)
    if scaling == 0:
        raise EdgegenError(f"`scaling_factor` in `{name}` is 0", hint=SAVE_HINT)
    kept = ("decoder.", "post_quant_conv.", "quantize.")
    state = weights(folder, place, STEM, lambda key: key.startswith(kept))
    require_depth(config, max(len(state), 8), name)
    if class_name == "AutoencoderTiny":
        levels = len(sizes(config, "num_decoder_blocks", [3, 3, 3, 1], name))
    elif class_name == "AutoencoderDC":
        levels = len(sizes(config, "decoder_block_out_channels", [128, 256, 512, 512, 1024, 1024], name))
    else:
        require(config, VQ_FIXED if class_name == "VQModel" else KL_FIXED, name)
        levels = len(sizes(config, "block_out_channels", [64], name))
    part = _tiny(config, state, name) if class_name == "AutoencoderTiny" else None
    if part is None:
        own = {key: value for key, value in config.items() if not key.startswith("_")}
        part = Part("diffusers_decoder", {"class_name": class_name, "autoencoder": own}, state)
    size = config.get("sample_size")
    # What a pipeline hands to the decoder: latents / scaling_factor + shift_factor.
    return Decoder(part, 2 ** (levels - 1), 1 / scaling, shift, size if type(size) is int else None)


def _tiny(config: dict[str, Any], state: dict[str, Any], name: str) -> Part | None:
    """Ours, where all levels are as wide and act as ours do."""
    require(config, TWICE, name)
    blocks = sizes(config, "num_decoder_blocks", [3, 3, 3, 1], name)
    widths = sizes(config, "decoder_block_out_channels", [64, 64, 64, 64], name)
    if not fits(config, OWN_FIXED) or len(set(widths)) != 1:
        return None
    made = {
        "latent_channels": single(config, "latent_channels", 4, name),
        "out_channels": single(config, "out_channels", 3, name),
        "width": widths[0],
        "num_blocks": blocks,
    }
    return Part("tiny_decoder", made, {key.removeprefix("decoder."): value for key, value in state.items()})
