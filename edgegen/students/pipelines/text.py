"""What reads the prompt: CLIP, two CLIPs, or a language model, with the tokenizer that goes before it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgegen.errors import EdgegenError
from edgegen.students.networks.transformers_text import READ
from edgegen.students.networks.upstream import upstream_class
from edgegen.students.pipelines.files import SAVE_HINT, Part, config_of, number, require, require_depth, single, weights
from edgegen.students.pipelines.tokenizers import (
    after_instruction,
    count,
    in_chat,
    padded,
    padding_token,
    read_tokenizer,
)

if TYPE_CHECKING:
    from torch import Tensor

CLIP_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {"layer_norm_eps": (1e-5, (1e-5,))}
CLIP_READ = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "hidden_act": "quick_gelu",
}
LEGACY_EOS = 2
"""transformers' configs of CLIP before 2023 say this, and mean the last id of the vocabulary."""

CHAT = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
"""Qwen's chat around one question, as its template writes it without a system message."""

PADDING = {"T5EncoderModel": "<pad>", "Gemma2Model": "<pad>", "Qwen3Model": "<|endoftext|>"}
NAMES = {"Qwen3ForCausalLM": "Qwen3Model", "Gemma2ForCausalLM": "Gemma2Model"}
"""Whole language models, of which only the inner model is used."""


@dataclass(frozen=True)
class Text:
    """The text encoder, its input's length, and the tokenizer that fills it."""

    part: Part
    length: int
    tokenizer: str


def clip(folder: Path) -> Text:
    """One `CLIPTextModel`, whose last hidden state is the context."""
    config, state = _clip(folder, "text_encoder")
    length = config["max_position_embeddings"]
    part = Part("clip_text", config, state, {"context": (1, length, config["hidden_size"])})
    return Text(part, length, _clip_tokenizer(folder, length))


def clip_pair(folder: Path, *, pool_both: bool = False, width: int | None = None, absent_tokens: int = 0) -> Text:
    """SDXL's two encoders, or with `pool_both` Stable Diffusion 3's, whose features fill up to `width`."""
    halves: dict[str, dict[str, Any]] = {}
    states: dict[str, Tensor] = {}
    pooled, features = 0, 0
    for key, part, pools in (("first", "text_encoder", pool_both), ("second", "text_encoder_2", True)):
        name = f"{part}/config.json"
        settings = config_of(folder, part)
        config, state = _clip(folder, part)
        half: dict[str, Any] = {"text": config, "eos_token_id": _eos(settings, config, name)}
        if pools:
            half["projection_dim"] = single(settings, "projection_dim", 512, name)
            pooled += half["projection_dim"]
        else:
            last = f"text_model.encoder.layers.{config['num_hidden_layers'] - 1}."
            left_out = (last, "text_model.final_layer_norm.", "text_projection.")
            state = {key_: value for key_, value in state.items() if not key_.startswith(left_out)}
        features += config["hidden_size"]
        halves[key] = half
        states |= {f"{part}.{key_}": value for key_, value in state.items()}
    length = halves["first"]["text"]["max_position_embeddings"]
    if halves["second"]["text"]["max_position_embeddings"] != length:
        raise EdgegenError("the two text encoders read different lengths", hint=SAVE_HINT)
    text = _clip_tokenizer(folder, length)
    second = read_tokenizer(folder, "tokenizer_2")
    _, halves["second"]["pad_token_id"] = padding_token(folder, second, "!", "tokenizer_2")
    if halves["first"]["text"]["vocab_size"] != halves["second"]["text"]["vocab_size"]:
        raise EdgegenError("the two text encoders have different vocabularies", hint=SAVE_HINT)
    made = {**halves, "width": width, "absent_tokens": absent_tokens}
    outputs = {"context": (1, length + absent_tokens, width or features), "pooled": (1, pooled)}
    return Text(Part("clip_pair", made, states, outputs), length, text)


def language_model(folder: Path, name: str, kept: int, *, instructed: str | None = None, chat: bool = False) -> Text:
    """A language model whose context has `kept` positions; with `chat` the prompt is a question and the layer before
    the last counts, else prompts are taken in lower case, behind the instruction of pipeline `instructed` if named."""
    name = NAMES.get(name, name)
    where = "text_encoder/config.json"
    config = config_of(folder, "text_encoder")
    read = {key: config[key] for key in READ[name] if config.get(key) is not None}
    layers = "num_layers" if name == "T5EncoderModel" else "num_hidden_layers"
    width = single(config, "d_model" if name == "T5EncoderModel" else "hidden_size", None, where)
    depth = single(config, layers, None, where)
    state = _language_state(folder, name, f"layers.{depth - 1}." if chat else None)
    require_depth(read, len(state), where)
    text = read_tokenizer(folder)
    token, identity = padding_token(folder, text, PADDING[name])
    length = kept
    if chat:
        text = in_chat(text, *CHAT)
    else:
        instruction = "" if instructed is None else _instruction(instructed)
        # The pipeline keeps the first token and the last `kept` - 1, behind all of the instruction but its start.
        length = kept if not instruction else count(text, instruction) + kept - 2
        text = after_instruction(text, instruction)
    text = padded(folder, text, length, token, identity)
    made = {
        "class_name": name,
        "encoder": read,
        "pad_token_id": identity,
        "layer": "penultimate" if chat else "last",
        "keep": None if length == kept else kept,
    }
    outputs = {"context": (1, kept, width), "mask": (1, kept)}
    return Text(Part("transformers_text", made, state, outputs), length, text)


def _instruction(pipeline: str) -> str:
    """What a pipeline of diffusers puts before every prompt unless it is told otherwise."""
    call = inspect.signature(upstream_class("diffusers", pipeline).__call__)
    return "\n".join(call.parameters["complex_human_instruction"].default)


def _language_state(folder: Path, name: str, last: str | None) -> dict[str, Tensor]:
    state = {}
    for key, value in weights(folder, "text_encoder", "model").items():
        if name == "T5EncoderModel":
            if key.startswith(("decoder.", "lm_head.")) or key == "encoder.embed_tokens.weight":
                continue
            own = "embed_tokens.weight" if key == "shared.weight" else key.removeprefix("encoder.")
        else:
            own = key.removeprefix("model.")
            if own.startswith("lm_head.") or (last is not None and own.startswith((last, "norm."))):
                continue
        state[f"model.{own}"] = value
    return state


def _clip(folder: Path, part: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    name = f"{part}/config.json"
    config = config_of(folder, part)
    require(config, CLIP_FIXED, name)
    if config.get("hidden_act", "quick_gelu") not in ("gelu", "quick_gelu"):
        raise EdgegenError(
            f"`hidden_act` in `{name}` is {config['hidden_act']!r}, not gelu or quick_gelu", hint=SAVE_HINT
        )
    read = {key: config.get(key, default) for key, default in CLIP_READ.items()}
    for key in list(read)[:-1]:
        single(config, key, read[key], name)
    state = weights(folder, part, "model", lambda key: not key.endswith("position_ids"))
    require_depth(config, len(state), name)
    # transformers 5 writes the names without the prefix that older ones and ours have.
    prefix = "text_model."
    named = (prefix, "text_projection.")
    return read, {key if key.startswith(named) else prefix + key: value for key, value in state.items()}


def _eos(settings: Mapping[str, Any], config: Mapping[str, Any], name: str) -> int:
    eos = int(number(settings, "eos_token_id", 49407, name))
    return int(config["vocab_size"]) - 1 if eos == LEGACY_EOS else eos


def _clip_tokenizer(folder: Path, length: int) -> str:
    text = read_tokenizer(folder)
    return padded(folder, text, length, *padding_token(folder, text, "<|endoftext|>"))
