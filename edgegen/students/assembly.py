"""From checked data to a `Student`: config, tokenizer and tensors are held against each other before memory is
spent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from edgegen.errors import EdgegenError
from edgegen.students.architectures import build_module
from edgegen.students.archive import DAMAGED_HINT, require_memory
from edgegen.students.config import ComponentConfig, StudentConfig
from edgegen.students.dataflow import check_flow
from edgegen.students.reduce import reduce
from edgegen.students.student import DTYPES, Student, assemble

State = dict[str, dict[str, Tensor]]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_TOKENIZER_BYTES = 64 << 20
MAX_TRAIN_TIMESTEPS = 100_000
MAX_STEPS = 1000


def parse_config(data: Mapping[str, Any], name: str) -> StudentConfig:
    """A `StudentConfig` from plain data; EdgegenError names the first key that does not fit."""
    try:
        config = StudentConfig.model_validate(dict(data))
    except (ValidationError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise EdgegenError(f"config of `{name}` is nested too deeply") from error
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "its top level"
        raise EdgegenError(
            f"config of `{name}` does not fit at `{where}`: {first['msg']}",
            hint="compare with `edgegen/students/shapes/weights/shapes.json`",
        ) from error
    check_flow(config, name)
    _check_sampler(config, name)
    return config


def _check_sampler(config: StudentConfig, name: str) -> None:
    sampler = config.sampler
    if sampler is None:
        return
    try:
        if not 2 <= sampler.num_train_timesteps <= MAX_TRAIN_TIMESTEPS:
            raise ValueError(f"num_train_timesteps {sampler.num_train_timesteps} is not in 2..{MAX_TRAIN_TIMESTEPS}")
        if not 1 <= max(sampler.times) <= MAX_STEPS or min(sampler.times) < 1:
            raise ValueError(f"steps must be in 1..{MAX_STEPS}")
        low = min(itertools.chain.from_iterable(sampler.times.values()))
        if not low >= 0:
            raise ValueError(f"time {low} is not a time")
        numbers = [value for steps in sampler.times for row in sampler.table(steps) for _, value in row]
        if not all(math.isfinite(value) for value in numbers):
            raise ValueError("its coefficients are not finite")
    except (ValueError, IndexError, ZeroDivisionError, OverflowError) as error:
        raise EdgegenError(f"sampler of `{name}` cannot be tabulated: {error}") from error


def check_tokenizer(text: str | None, name: str, length: int | None = None) -> None:
    """EdgegenError when a `tokenizer.json` is missing, cannot be read, or gives other than `length` ids."""
    if text is None:
        raise EdgegenError(
            f"`{name}` has no tokenizer, and task text-to-image needs one",
            hint="put `tokenizer.json` beside the weights; from vocab.json and merges.txt it is made by "
            "`transformers.CLIPTokenizerFast.from_pretrained(folder).backend_tokenizer.save('tokenizer.json')`",
        )
    if len(text) > MAX_TOKENIZER_BYTES:
        raise EdgegenError(f"tokenizer of `{name}` is larger than {MAX_TOKENIZER_BYTES >> 20} MiB")
    from tokenizers import Tokenizer

    try:
        lengths = {len(encoded.ids) for encoded in Tokenizer.from_str(text).encode_batch(["a", "a " * 1000])}
    except BaseException as error:
        # A panic inside the Rust library derives from BaseException alone; everything else of that kind is not ours.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise EdgegenError(f"tokenizer of `{name}` cannot be read: {reason}", hint=DAMAGED_HINT) from error
    if length is not None and lengths != {length}:
        raise EdgegenError(
            f"tokenizer of `{name}` gives {sorted(lengths)} ids where the text encoder takes {length}",
            hint=f"set padding and truncation to {length} in `tokenizer.json`",
        )


def check_tensors(state: Mapping[str, Mapping[str, Any]], name: str) -> None:
    """EdgegenError unless every value is a plain dense CPU tensor of a floating type."""
    for component, tensors in state.items():
        for key, tensor in tensors.items():
            where = f"`{component}.{key}` of `{name}`"
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
                raise EdgegenError(f"{where} is not a plain dense tensor")
            if tensor.dtype not in FLOATS:
                raise EdgegenError(
                    f"{where} is {str(tensor.dtype).removeprefix('torch.')}, not float32, float16 or bfloat16",
                    hint="save the weights before quantization",
                )
            if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
                raise EdgegenError(f"{where} claims more elements than the file holds")


def build_student(config: StudentConfig, state: State, tokenizer_json: str | None, name: str) -> Student:
    """Assemble a student whose parts were proven to fit: strict names and shapes, enough memory, finite weights."""
    if config.conditioning == "text_encoder":
        check_tokenizer(tokenizer_json, name, config.components["text_encoder"].inputs[0].shape[-1])
    check_tensors(state, name)
    extra = [component for component in state if component not in config.components]
    if extra:
        raise EdgegenError(f"`{name}` holds weights for `{extra[0]}`, which its config does not name")
    needed, largest = 0, 0
    for component, part in config.components.items():
        if component not in state:
            raise EdgegenError(f"`{name}` has no weights for component `{component}`")
        built = _rehearse(component, part, state[component], name)
        needed += built
        largest = max(largest, built if any(t.dtype != torch.float32 for t in state[component].values()) else 0)
    require_memory(needed + largest, name)
    student = assemble(config, state, tokenizer_json)
    for made in student.components.values():
        require_finite(made.name, made.module, name)
    return student


def _rehearse(component: str, part: ComponentConfig, tensors: Mapping[str, Tensor], name: str) -> int:
    """Build and run the network on torch's meta device, where shapes exist and memory is not used; its bytes in
    fp32.
    """
    for key in ("num_hidden_layers", "layers_per_block", "num_blocks", "block_out_channels"):
        value = part.config.get(key, 0)
        layers = sum(_count(v) for v in value) if key == "num_blocks" and isinstance(value, list | tuple) else value
        count = len(layers) if isinstance(layers, list | tuple) else _count(layers)
        if count > len(tensors):
            raise EdgegenError(
                f"config of component `{component}` in `{name}` asks for `{key}` {count}, "
                f"and there are only {len(tensors)} tensors"
            )
    try:
        with torch.device("meta"):
            module = build_module(part.architecture, part.config)
            if part.pruning is not None:
                module = reduce(module, part.pruning, weights=False)
    except EdgegenError as error:
        if part.pruning is not None:
            raise EdgegenError(f"component `{component}` of `{name}`: {error.message}", error.hint) from error
        raise
    except Exception as error:  # any constructor may refuse sizes in its own way
        raise EdgegenError(f"config of component `{component}` in `{name}` cannot be built: {error}") from error
    _match(component, module, tensors, name)
    inputs = [torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device="meta") for spec in part.inputs]
    try:
        with torch.no_grad():
            made = module(*inputs)
    except Exception as error:  # a network raises what its first unfit operation raises
        reason = " ".join(str(error).split())[:200]
        raise EdgegenError(f"component `{component}` of `{name}` does not take its stated inputs: {reason}") from error
    outputs = (made,) if isinstance(made, Tensor) else tuple(made)
    shapes = [tuple(output.shape) for output in outputs]
    if shapes != [spec.shape for spec in part.outputs]:
        raise EdgegenError(
            f"component `{component}` of `{name}` gives {shapes}, and its config says "
            f"{[spec.shape for spec in part.outputs]}"
        )
    return sum(4 * t.numel() for t in itertools.chain(module.parameters(), module.buffers()))


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _match(component: str, module: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unknown:
        first = f"`{missing[0]}` is missing" if missing else f"`{unknown[0]}` is not part of the network"
        raise EdgegenError(
            f"weights of component `{component}` in `{name}` do not fit its config: {first} "
            f"({len(missing)} missing, {len(unknown)} unknown)"
        )
    for key, shape in wanted.items():
        if found[key] != shape:
            raise EdgegenError(
                f"weights of component `{component}` in `{name}` do not fit its config: "
                f"`{key}` is {found[key]}, expected {shape}"
            )


def require_finite(component: str, module: nn.Module, name: str) -> None:
    """EdgegenError when a weight is NaN or infinite: nothing that such a network draws can be verified."""
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor.detach())
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise EdgegenError(
                    f"`{component}.{key}` of `{name}` holds NaN or infinite weights",
                    hint="save the checkpoint from before training diverged, or in float32",
                )
