"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) merged into a student when it is loaded.

    W + scale * alpha / rank * up @ down

A graph that carries adapters in itself is another matter: `edgegen.rewrite.merge_low_rank_adapters`. Names are read as
diffusers, kohya and peft write them; a name that belongs to nothing is refused, never skipped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from edgegen.errors import EdgegenError, UsageError
from edgegen.students.archive import DAMAGED_HINT
from edgegen.students.assembly import check_tensors, require_finite
from edgegen.students.low_rank_names import in_diffusers_words
from edgegen.students.safetensors_file import read_metadata, read_tensors
from edgegen.students.sniff import Kind, sniff
from edgegen.students.student import Component, Student

IN_FOLDER = "pytorch_lora_weights.safetensors"
"""Where `pipeline.save_lora_weights` writes, and where a folder's own adapter is looked for."""

ROLES = (
    # Longest first: the first that fits says what the tensor is.
    (".lora_A.default.weight", "down"),
    (".lora_B.default.weight", "up"),
    (".lora_A.weight", "down"),
    (".lora_B.weight", "up"),
    (".lora_down.weight", "down"),
    (".lora_up.weight", "up"),
    (".lora.down.weight", "down"),
    (".lora.up.weight", "up"),
    ("_lora.down.weight", "down"),
    ("_lora.up.weight", "up"),
    (".lora_linear_layer.down.weight", "down"),
    (".lora_linear_layer.up.weight", "up"),
    (".alpha", "alpha"),
)
PREFIXES = (
    # Written prefix -> component, prefix of its parameters, whether dots were written as underscores.
    ("base_model.model.", "denoiser", "", False),
    ("text_encoder_2.", "text_encoder", "text_encoder_2.", False),
    ("text_encoder.", "text_encoder", "text_encoder.", False),
    ("transformer.", "denoiser", "", False),
    ("denoiser.", "denoiser", "", False),
    ("unet.", "denoiser", "", False),
    ("lora_te2_", "text_encoder", "text_encoder_2.", True),
    ("lora_te1_", "text_encoder", "text_encoder.", True),
    ("lora_te_", "text_encoder", "text_encoder.", True),
    ("lora_transformer_", "denoiser", "", True),
    ("lora_unet_", "denoiser", "", True),
)
MADE_FOR_HINT = (
    "the adapter must have been made for the same network; its names may be diffusers', kohya's or peft's (convert "
    "others with `pipeline.load_lora_weights` and `pipeline.save_lora_weights`)"
)
FUSE_HINT = (
    "merge it in diffusers: `pipeline.load_lora_weights(file)`, `pipeline.fuse_lora()`, "
    "`pipeline.unload_lora_weights()`, `pipeline.save_pretrained(folder)`"
)
CLIP_NAMES = (("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "out_proj"))
_LAYER = re.compile(r"(.*\bencoder\.layers\.)(\d+)\.|(.*_encoder_layers_)(\d+)_")


@dataclass(frozen=True)
class Adapter:
    """A file of adapters, and by how much they count."""

    path: Path
    scale: float = 1.0


@dataclass
class _Pair:
    """What one weight is changed by, as it is read together."""

    name: str
    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None
    keys: list[str] = field(default_factory=list)


def parse_adapter(text: str) -> Adapter:
    """`FILE` or `FILE:scale` of the command line; UsageError for a scale that is no finite number."""
    path, colon, scale = text.rpartition(":")
    if not colon or not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", scale):
        if colon and not Path(text).exists() and Path(path).exists():
            raise UsageError(f"`{scale}` is not a scale", hint=f"give a number, as `--lora {path}:0.8`")
        return Adapter(Path(text))
    if not math.isfinite(float(scale)):
        raise UsageError(f"scale `{scale}` is too large", hint=f"give a number, as `--lora {path}:0.8`")
    return Adapter(Path(path), float(scale))


def with_adapters(student: Student, adapters: Sequence[Adapter]) -> Student:
    """`student` with every adapter merged into its weights, in float32.

    Raises UnsafeError for pickled files, EdgegenError for a name that no weight of the student has, for factors that
    do not fit their weight, and for kinds of adapters that are not a product of two (DoRA, LoHa, LoKr).
    """
    for adapter in adapters:
        student = _merged(student, adapter)
    return student


def _merged(student: Student, adapter: Adapter) -> Student:
    kind, _ = sniff(adapter.path)
    if kind is not Kind.SAFETENSORS:
        raise EdgegenError(
            f"`{adapter.path}` is not a safetensors file of adapters",
            hint="write it with `pipeline.save_lora_weights(folder)`",
        )
    tensors = read_tensors([adapter.path])
    check_tensors({"adapter": tensors}, adapter.path.name)
    states = {name: part.module.state_dict() for name, part in student.components.items()}
    pairs = _pairs(tensors, states, _alphas(adapter.path), adapter.path.name)
    if not pairs:
        raise EdgegenError(
            f"`{adapter.path.name}` holds nothing that changes this student", hint="leave out `--lora` for it"
        )
    changed: dict[str, dict[str, Tensor]] = {}
    for (component, key), pair in pairs.items():
        weight = states[component][key]
        changed.setdefault(component, {})[key] = weight + adapter.scale * _delta(pair, weight, adapter.path.name)
    components = dict(student.components)
    for component, values in changed.items():
        part = components[component]
        part.module.load_state_dict({**states[component], **values}, assign=True)
        part.module.requires_grad_(False)
        require_finite(component, part.module, adapter.path.name)
        # A component made anew: fingerprints are computed once.
        components[component] = Component(part.name, part.module, part.inputs, part.outputs)
    return Student(student.config, components, student.tokenizer_json)


def _alphas(path: Path) -> Mapping[str, float]:
    """Alphas by module that newer diffusers writes as JSON beside the tensors; the one without a name is `""`."""
    text = read_metadata(path).get("lora_adapter_metadata")
    if text is None:
        return {}
    found: dict[str, float] = {}
    try:
        data = json.loads(text)
        for key, value in data.items():
            prefix, _, name = key.rpartition(".")
            if name == "lora_alpha":
                found[f"{prefix}." if prefix else ""] = float(value)
            elif name == "alpha_pattern" and value:
                found |= {f"{prefix}.{module}" if prefix else module: float(alpha) for module, alpha in value.items()}
            elif name == "use_dora" and value:
                raise EdgegenError(f"`{path.name}` holds DoRA, which is not a product of two matrices", FUSE_HINT)
            elif name == "use_rslora" and value:
                raise EdgegenError(
                    f"`{path.name}` is scaled by the root of its rank (rsLoRA), which is not read", FUSE_HINT
                )
    except (ValueError, TypeError, AttributeError) as error:
        raise EdgegenError(
            f"`lora_adapter_metadata` of `{path.name}` cannot be read: {error}", hint=DAMAGED_HINT
        ) from error
    return found


def _pairs(
    tensors: Mapping[str, Tensor],
    states: Mapping[str, Mapping[str, Tensor]],
    alphas: Mapping[str, float],
    name: str,
) -> dict[tuple[str, str], _Pair]:
    flat = {
        component: {key.removesuffix(".weight").replace(".", "_"): key for key in state if key.endswith(".weight")}
        for component, state in states.items()
    }
    found: dict[tuple[str, str], _Pair] = {}
    strangers: dict[str, None] = {}
    for key, tensor in sorted(tensors.items()):
        suffix, role = next(((ending, role) for ending, role in ROLES if key.endswith(ending)), ("", ""))
        if not role:
            raise EdgegenError(
                f"`{key}` of `{name}` is not a factor of a low-rank adapter",
                hint="LoRA alone is merged: save DoRA, LoHa, LoKr or full differences merged into their network",
            )
        module = key.removesuffix(suffix)
        place = _place(module, states, flat)
        if place is None:
            if _beyond(module, states):
                continue
            strangers.setdefault(module)
            continue
        pair = found.setdefault(place, _Pair(module))
        if role == "alpha":
            pair.alpha = float(tensor.float().mean())
        elif getattr(pair, role) is not None:
            raise EdgegenError(
                f"`{module}` is changed twice by `{name}`",
                hint="write it once, by `pipeline.save_lora_weights(folder)`",
            )
        else:
            setattr(pair, role, tensor)
    if strangers:
        first, count = next(iter(strangers)), len(strangers) + len(found)
        every = "none is a weight" if not found else f"`{first}` and {len(strangers) - 1} more are no weights"
        if len(strangers) == 1 and found:
            every = f"`{first}` is no weight"
        raise EdgegenError(
            f"of the {count} modules that `{name}` changes, {every} of this student"
            + ("" if found else f": it holds `{first}`" + (" and the like" if count > 1 else "")),
            hint=MADE_FOR_HINT,
        )
    for pair in found.values():
        if pair.alpha is None and alphas:
            prefix = next((one for one in sorted(alphas, key=len, reverse=True) if pair.name.startswith(one)), None)
            pair.alpha = None if prefix is None else alphas[prefix]
    return found


def _place(
    module: str, states: Mapping[str, Mapping[str, Tensor]], flat: Mapping[str, Mapping[str, str]]
) -> tuple[str, str] | None:
    """The component and the parameter that `module` of an adapter names."""
    for written, component, prefix, underscored in (*PREFIXES, ("", "denoiser", "", False), ("", "model", "", False)):
        if not module.startswith(written) or component not in states:
            continue
        rest = module.removeprefix(written).replace(".processor.", ".")
        for start in _starts(component, prefix, states[component]):
            if underscored:
                for words in (f"{start}{rest}".replace(".", "_"), in_diffusers_words(rest)):
                    if words in flat[component]:
                        return component, flat[component][words]
                continue
            for candidate in _spellings(f"{start}{rest}"):
                if f"{candidate}.weight" in states[component]:
                    return component, f"{candidate}.weight"
    return None


def _starts(component: str, prefix: str, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What names of a component may begin with here: two text encoders are one component, and CLIP's own prefix was
    not always written."""
    if component != "text_encoder":
        return (prefix,)
    two = any(key.startswith("text_encoder.") for key in state)
    if two:
        return (prefix, f"{prefix}text_model.")
    return ("", "text_model.", "model.") if prefix == "text_encoder." else ()


def _spellings(module: str) -> tuple[str, ...]:
    """`module`, and what older files mean by it."""
    found = [module, f"{module}.0"]
    for old, new in CLIP_NAMES:
        if module.endswith(f"self_attn.{old}"):
            found.append(module.removesuffix(old) + new)
    return tuple(found)


def _beyond(module: str, states: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether `module` is in the last layer of a text encoder that a student does without, since it takes the output
    of the layer before."""
    match = _LAYER.match(module)
    state = states.get("text_encoder", {})
    if match is None or not module.startswith(("text_encoder.", "lora_te1_")):
        return False
    layers = {int(found[2]) for key in state if (found := re.match(r"(text_encoder\..*layers\.)(\d+)\.", key))}
    return bool(layers) and int(match[2] or match[4]) == max(layers) + 1


def _delta(pair: _Pair, weight: Tensor, name: str) -> Tensor:
    if pair.down is None or pair.up is None:
        raise EdgegenError(f"`{pair.name}` of `{name}` has one factor without the other", hint=DAMAGED_HINT)
    down, up = pair.down.float().flatten(1), pair.up.float().flatten(1)
    rank = down.shape[0]
    if up.shape[1] != rank or up.shape[0] * down.shape[1] != weight.numel() or up.shape[0] != weight.shape[0]:
        raise EdgegenError(
            f"`{pair.name}` of `{name}` is {list(pair.up.shape)} by {list(pair.down.shape)}, "
            f"and the weight is {list(weight.shape)}",
            hint=MADE_FOR_HINT,
        )
    scale = 1.0 if pair.alpha is None else pair.alpha / rank
    return scale * torch.mm(up, down).reshape(weight.shape)
