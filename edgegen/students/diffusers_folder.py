"""A diffusers folder (`model_index.json`) read as data: no diffusers import, no class that the folder names is looked
up.

Its networks are mapped onto edgegen's own, which share names and arithmetic with diffusers and transformers; every
setting that would change the arithmetic must have the value that ours have, and is named when it has not.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgegen.errors import EdgegenError, UnsafeError
from edgegen.students.archive import EXPORT_HINT, check_relative, read_json, read_small
from edgegen.students.assembly import build_student, check_tokenizer, parse_config
from edgegen.students.exported_program import student_name
from edgegen.students.safetensors_file import read_tensors
from edgegen.students.schedulers import sampler_from
from edgegen.students.student import Student

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

PIPELINES = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderTiny",),
}
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker")
PROMPTS = ("a photograph of a cat", "a red car on a street", "a bowl of fruit on a table", "a house by the sea")
SAVE_HINT = "write the folder again with `pipeline.save_pretrained(folder, safe_serialization=True)`"

UNET_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    # key: (diffusers' default, the values that leave the arithmetic as ours is)
    "center_input_sample": (False, (False,)),
    "flip_sin_to_cos": (True, (True,)),
    "freq_shift": (0, (0,)),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", (None,)),
    "only_cross_attention": (False, (False,)),
    "downsample_padding": (1, (1,)),
    "act_fn": ("silu", ("silu", "swish")),
    "norm_eps": (1e-5, (1e-5,)),
    "transformer_layers_per_block": (1, (1,)),
    "reverse_transformer_layers_per_block": (None, (None,)),
    "encoder_hid_dim": (None, (None,)),
    "encoder_hid_dim_type": (None, (None,)),
    "num_attention_heads": (None, (None,)),
    "dual_cross_attention": (False, (False,)),
    "class_embed_type": (None, (None,)),
    "addition_embed_type": (None, (None,)),
    "num_class_embeds": (None, (None,)),
    "resnet_time_scale_shift": ("default", ("default",)),
    "resnet_skip_time_act": (False, (False,)),
    "resnet_out_scale_factor": (1.0, (1.0,)),
    "time_embedding_type": ("positional", ("positional",)),
    "time_embedding_dim": (None, (None,)),
    "time_embedding_act_fn": (None, (None,)),
    "timestep_post_act": (None, (None,)),
    "time_cond_proj_dim": (None, (None,)),
    "conv_in_kernel": (3, (3,)),
    "conv_out_kernel": (3, (3,)),
    "projection_class_embeddings_input_dim": (None, (None,)),
    "attention_type": ("default", ("default",)),
    "class_embeddings_concat": (False, (False,)),
    "mid_block_only_cross_attention": (None, (None, False)),
    "cross_attention_norm": (None, (None,)),
}
UNET_READ = (
    *("sample_size", "in_channels", "out_channels", "block_out_channels", "layers_per_block", "attention_head_dim"),
    *("cross_attention_dim", "norm_num_groups", "down_block_types", "up_block_types"),
)
UNET_FREE = (
    # Precision, dropout, the missing mid block's own settings, and how the projections are stored.
    *("dropout", "upcast_attention", "mid_block_scale_factor", "use_linear_projection", "addition_time_embed_dim"),
    "addition_embed_type_num_heads",
)
VAE_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "act_fn": ("relu", ("relu",)),
    "upsample_fn": ("nearest", ("nearest",)),
    "upsampling_scaling_factor": (2, (2,)),
}
TEXT_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {"layer_norm_eps": (1e-5, (1e-5,))}
TEXT_READ = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "hidden_act": "quick_gelu",
}


def load_folder(folder: Path) -> Student:
    """The text-to-image student in a diffusers folder, with safetensors weights.

    Raises UnsafeError for pickled weights and for links and names that leave the folder, EdgegenError for a class or a
    setting that edgegen's networks do not have; the message names the key.
    """
    index = read_json(_inside(folder, "model_index.json"))
    _check_index(index)
    text_state, text = _text_encoder(folder)
    unet_state, unet = _unet(folder)
    vae_state, vae, scale, shift = _vae(folder)
    side, length = unet["sample_size"], text["max_position_embeddings"]
    latent = [1, unet["in_channels"], side, side]
    context = [1, length, text["hidden_size"]]
    picture = side * 2 ** (len(vae["num_blocks"]) - 1)
    sampler = sampler_from(read_json(_inside(folder, "scheduler/scheduler_config.json")), "scheduler_config.json")
    config = parse_config(
        {
            "name": student_name(folder.resolve().name),
            "task": "text-to-image",
            "components": {
                "text_encoder": _component(
                    "clip_text", text, {"input_ids": [1, length]}, {"context": context}, {"input_ids": "int32"}
                ),
                "denoiser": _component(
                    "unet", unet, {"latent": latent, "timestep": [1], "context": context}, {"prediction": latent}
                ),
                "decoder": _component(
                    "tiny_decoder", vae, {"latent": latent}, {"image": [1, vae["out_channels"], picture, picture]}
                ),
            },
            "sampler": sampler.model_dump(mode="json"),
            "latent": {"shape": latent, "scale": scale, "shift": shift},
            "example_prompts": PROMPTS,
        },
        f"{folder.name}/model_index.json",
    )
    state = {"text_encoder": text_state, "denoiser": unet_state, "decoder": vae_state}
    return build_student(config, state, _tokenizer(folder, length), folder.name)


def _component(
    architecture: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, list[int]],
    outputs: Mapping[str, list[int]],
    dtypes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    def specs(shapes: Mapping[str, list[int]]) -> list[dict[str, Any]]:
        kinds = dtypes or {}
        return [{"name": name, "shape": shape, "dtype": kinds.get(name, "float32")} for name, shape in shapes.items()]

    return {"architecture": architecture, "config": dict(config), "inputs": specs(inputs), "outputs": specs(outputs)}


def _inside(folder: Path, relative: str) -> Path:
    """`relative` below `folder`, links followed and still inside it (or inside the Hugging Face cache it is a view
    of).
    """
    check_relative(relative, "a file of the folder")
    home = folder.resolve()
    path = (home / relative).resolve()
    roots = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        roots.append(home.parent.parent / "blobs")
    if not any(path.is_relative_to(root) for root in roots):
        raise UnsafeError(
            f"`{relative}` in `{folder}` is a link to `{path}`, outside the folder",
            hint=f"copy the folder with its links resolved: `cp -rL {folder} copy`",
        )
    if not path.exists():
        raise EdgegenError(f"`{relative}` is missing in `{folder}`", hint=SAVE_HINT)
    return path


def _check_index(index: Mapping[str, Any]) -> None:
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise EdgegenError(
            f"pipeline class `{pipeline}` is not one that edgegen reads",
            hint="it reads " + ", ".join(f"`{known}`" for known in PIPELINES),
        )
    for key, value in index.items():
        if key.startswith("_") or key == "scheduler":
            continue
        named = value[1] if isinstance(value, list) and len(value) == 2 else None
        if key in LEFT_OUT:
            if named:
                log.warning("`%s` (`%s`) of the folder is left out: the student is compiled without it", key, named)
        elif key not in CLASSES and named:
            raise EdgegenError(f"`{key}` (`{named}`) in model_index.json has no place in a student", hint=SAVE_HINT)
        elif key in CLASSES and named not in CLASSES[key]:
            wanted = " or ".join(f"`{known}`" for known in CLASSES[key][:2])
            raise EdgegenError(
                f"`{key}` in model_index.json is `{named}`, and edgegen reads {wanted}",
                hint="a student's decoder is a tiny one: `pipeline.vae = AutoencoderTiny.from_pretrained('taesd')`"
                if key == "vae"
                else SAVE_HINT,
            )
    for key in CLASSES:
        if key not in index:
            raise EdgegenError(f"model_index.json has no `{key}`", hint=SAVE_HINT)


def _require(config: Mapping[str, Any], fixed: Mapping[str, tuple[Any, tuple[Any, ...]]], name: str) -> None:
    for key, (default, allowed) in fixed.items():
        value = config.get(key, default)
        if value not in allowed or isinstance(value, bool) != any(isinstance(a, bool) and a == value for a in allowed):
            wanted = " or ".join(repr(one) for one in allowed)
            raise EdgegenError(
                f"`{key}` in `{name}` is {value!r}, and edgegen's network has {wanted}",
                hint=EXPORT_HINT,
            )


def _single(config: Mapping[str, Any], key: str, default: Any, name: str) -> int:
    """A setting that may be a number, or a list of one number repeated."""
    value = config.get(key, default)
    if isinstance(value, list) and value and all(one == value[0] for one in value):
        value = value[0]
    if type(value) is not int or value < 1:
        raise EdgegenError(
            f"`{key}` in `{name}` is {value!r}, and edgegen's network has one positive number", hint=SAVE_HINT
        )
    return value


def _sizes(config: Mapping[str, Any], key: str, default: list[int], name: str) -> list[int]:
    value = config.get(key, default)
    if not isinstance(value, list) or not value or not all(type(one) is int and one > 0 for one in value):
        raise EdgegenError(f"`{key}` in `{name}` is {value!r}, not a list of positive numbers", hint=SAVE_HINT)
    return value


def _weights(folder: Path, part: str, stem: str, wanted: Callable[[str], bool] = lambda key: True) -> dict[str, Tensor]:
    """The tensors of one network: one safetensors file, or the shards that its index names."""
    names = {entry.name for entry in _inside(folder, part).iterdir()}
    if f"{stem}.safetensors" in names:
        return read_tensors([_inside(folder, f"{part}/{stem}.safetensors")], wanted)
    if f"{stem}.safetensors.index.json" in names:
        index = read_json(_inside(folder, f"{part}/{stem}.safetensors.index.json"))
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
            raise EdgegenError(f"the index of `{part}` names no shards", hint=SAVE_HINT)
        for shard in set(shards.values()):
            check_relative(shard, f"a shard in the index of `{part}`")
        return read_tensors([_inside(folder, f"{part}/{shard}") for shard in sorted(set(shards.values()))], wanted)
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")))
    if pickled:
        raise UnsafeError(
            f"`{part}/{pickled[0]}` holds pickled weights, and only safetensors are read",
            hint=f"where you trust the folder: {SAVE_HINT}",
        )
    raise EdgegenError(f"`{part}` has no `{stem}.safetensors`", hint=SAVE_HINT)


def _text_encoder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    name = "text_encoder/config.json"
    config = read_json(_inside(folder, name))
    _require(config, TEXT_FIXED, name)
    if config.get("hidden_act", "quick_gelu") not in ("gelu", "quick_gelu"):
        raise EdgegenError(
            f"`hidden_act` in `{name}` is {config['hidden_act']!r}, not gelu or quick_gelu", hint=SAVE_HINT
        )
    read = {key: config.get(key, default) for key, default in TEXT_READ.items()}
    for key in list(read)[:-1]:
        _single(config, key, read[key], name)
    state = _weights(folder, "text_encoder", "model", lambda key: not key.endswith("position_ids"))
    # transformers 5 writes the names without the prefix that older ones and ours have.
    prefix = "text_model."
    return {key if key.startswith(prefix) else prefix + key: value for key, value in state.items()}, read


def _unet(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    name = "unet/config.json"
    config = read_json(_inside(folder, name))
    for key in config:
        if not key.startswith("_") and key not in (*UNET_FIXED, *UNET_READ, *UNET_FREE):
            raise EdgegenError(f"`{key}` in `{name}` is a setting that edgegen does not know", hint=SAVE_HINT)
    _require(config, UNET_FIXED, name)
    down, up = config.get("down_block_types"), config.get("up_block_types")
    kinds = {"DownBlock2D": ("UpBlock2D", False), "CrossAttnDownBlock2D": ("CrossAttnUpBlock2D", True)}
    if not isinstance(down, list) or not all(kind in kinds for kind in down):
        raise EdgegenError(f"`down_block_types` in `{name}` is {down!r}; known are {', '.join(kinds)}", hint=SAVE_HINT)
    if up != [kinds[kind][0] for kind in reversed(down)]:
        raise EdgegenError(
            f"`up_block_types` in `{name}` is {up!r}, not the mirror of `down_block_types`", hint=SAVE_HINT
        )
    widths = _sizes(config, "block_out_channels", [320, 640, 1280, 1280], name)
    if len(widths) != len(down):
        raise EdgegenError(f"`block_out_channels` in `{name}` does not have one entry a block", hint=SAVE_HINT)
    state = _weights(folder, "unet", "diffusion_pytorch_model")
    # A linear projection over channels is the 1x1 convolution that ours has.
    for key, value in state.items():
        if key.endswith(("proj_in.weight", "proj_out.weight")) and value.ndim == 2:
            state[key] = value[:, :, None, None]
    return state, {
        "sample_size": _single(config, "sample_size", None, name),
        "in_channels": _single(config, "in_channels", 4, name),
        "out_channels": _single(config, "out_channels", 4, name),
        "block_out_channels": widths,
        "cross_attention": [kinds[kind][1] for kind in down],
        "layers_per_block": _single(config, "layers_per_block", 2, name),
        # diffusers keeps the number of heads under this name for UNet2DConditionModel.
        "num_heads": _single(config, "attention_head_dim", 8, name),
        "cross_attention_dim": _single(config, "cross_attention_dim", 1280, name),
        "norm_num_groups": _single(config, "norm_num_groups", 32, name),
    }


def _vae(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], float, float]:
    name = "vae/config.json"
    config = read_json(_inside(folder, name))
    _require(config, VAE_FIXED, name)
    prefix = "decoder."
    state = _weights(folder, "vae", "diffusion_pytorch_model", lambda key: key.startswith(prefix))
    scaling, shift = config.get("scaling_factor", 1.0), config.get("shift_factor", 0.0)
    if not all(isinstance(value, int | float) for value in (scaling, shift)) or scaling == 0:
        raise EdgegenError(f"`scaling_factor` in `{name}` is {scaling!r}", hint=SAVE_HINT)
    blocks = _sizes(config, "num_decoder_blocks", [3, 3, 3, 1], name)
    widths = _sizes(config, "decoder_block_out_channels", [64, 64, 64, 64], name)
    made = {
        "latent_channels": _single(config, "latent_channels", 4, name),
        "out_channels": _single(config, "out_channels", 3, name),
        "width": _single({"decoder_block_out_channels": widths}, "decoder_block_out_channels", None, name),
        "num_blocks": blocks,
    }
    # What a pipeline hands to the decoder: latents / scaling_factor + shift_factor.
    return {key.removeprefix(prefix): value for key, value in state.items()}, made, 1 / scaling, float(shift)


def _tokenizer(folder: Path, length: int) -> str:
    """`tokenizer/tokenizer.json`, padding and cutting to `length` as the pipeline does."""
    if not (folder / "tokenizer/tokenizer.json").exists():
        raise EdgegenError(
            f"`tokenizer/tokenizer.json` is missing in `{folder}`",
            hint='from its vocab.json and merges.txt: `python -c "from transformers import CLIPTokenizerFast as T; '
            f"T.from_pretrained('{folder}/tokenizer').backend_tokenizer.save('{folder}/tokenizer/tokenizer.json')\"`",
        )
    try:
        text = read_small(_inside(folder, "tokenizer/tokenizer.json")).decode("utf-8")
    except UnicodeDecodeError as error:
        raise EdgegenError(f"`tokenizer/tokenizer.json` in `{folder}` is not UTF-8 text") from error
    check_tokenizer(text, folder.name)
    data = json.loads(text)
    padding, truncation = data.get("padding") or {}, data.get("truncation") or {}
    if padding.get("strategy") == {"Fixed": length} and truncation.get("max_length") == length:
        return text
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    settings_path = folder / "tokenizer/tokenizer_config.json"
    settings = read_json(_inside(folder, "tokenizer/tokenizer_config.json")) if settings_path.exists() else {}
    token = settings.get("pad_token", "<|endoftext|>")
    token = token.get("content") if isinstance(token, dict) else token
    identity = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if identity is None:
        raise EdgegenError(f"the tokenizer of `{folder}` has no padding token {token!r}", hint=SAVE_HINT)
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=identity, pad_token=token)
    made: str = tokenizer.to_str()
    return made
