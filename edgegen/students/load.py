"""`load`: a path becomes a `Student`. What it holds is told by its content, and none of its code runs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from edgegen.errors import EdgegenError
from edgegen.students.archive import read_json, read_small
from edgegen.students.assembly import State, build_student, parse_config
from edgegen.students.safetensors_file import read_header, read_tensors
from edgegen.students.sniff import Kind, sniff
from edgegen.students.student import Student

FIT_HINT = "write config, tokenizer and weights again from one training run: `edgegen student pack --help`"


def load(path: Path) -> Student:
    """The student at `path`: an edgegen `.pt`, `.safetensors` with its config, a diffusers folder or a checked `.pt2`.

    Components come in eval mode, in fp32, without gradients. Raises UnsafeError for input that would run code or leave
    its folder, EdgegenError for input that is broken, unknown or larger than memory; both say how to convert it.
    """
    try:
        return _load(Path(path))
    except EdgegenError as error:
        error.hint = error.hint or FIT_HINT
        raise


def _load(path: Path) -> Student:
    kind, archive = sniff(path)
    if kind is Kind.SAFETENSORS:
        return _load_safetensors(path)
    if kind is Kind.DIFFUSERS:
        from edgegen.students.diffusers_folder import load_folder

        return load_folder(path)
    assert archive is not None
    if kind is Kind.EXPORTED_PROGRAM:
        from edgegen.students.exported_program import load_pt2

        return load_pt2(archive)
    from edgegen.students.checkpoint import load_pt

    return load_pt(archive)


def load_with_config(path: Path, config_path: Path) -> Student:
    """The student whose tensors are at `path`, a `.safetensors` or a plain state dict, and whose config is elsewhere.

    Tensors are named `<component>.<parameter>` or nested by component; `tokenizer.json` is beside the config. The
    errors of `load`.
    """
    return _with_config(path.name, tensors_of(path, hint="leave `--config` out"), config_path)


def tensors_of(path: Path, hint: str | None = None) -> dict[str, object]:
    """What a `.safetensors` or a plain state dict holds, by name; the errors of `load`."""
    kind, archive = sniff(path)
    if kind is Kind.SAFETENSORS:
        return dict(read_tensors([path]))
    if kind is not Kind.TORCH_ZIP or archive is None:
        raise EdgegenError(f"`{path.name}` is no file of tensors", hint=hint)
    from edgegen.students.checkpoint import read_plain

    payload = read_plain(archive)
    if not isinstance(payload, dict):
        raise EdgegenError(f"`{path.name}` holds a {type(payload).__name__}, not a state dict")
    return payload


def _load_safetensors(path: Path) -> Student:
    """`X.safetensors` with `X.json` or `config.json`, and `tokenizer.json`, in the same folder."""
    candidates = [path.with_name(f"{path.stem}.json"), path.with_name("config.json")]
    config_path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if config_path is None:
        raise EdgegenError(
            f"`{path.name}` has no config: neither `{candidates[0].name}` nor `config.json` is beside it",
            hint=_what_it_is(path)
            or f"write the student's config to `{candidates[0]}`; "
            "`edgegen/students/shapes/weights/shapes.json` is an example",
        )
    return _with_config(path.name, read_tensors([path]), config_path)


def _what_it_is(path: Path) -> str | None:
    """How files that are published without a config become a student: adapters, a whole pipeline in one file, a UNet
    alone. None for any other."""
    keys = read_header(path).keys()
    quoted = shlex.quote(str(path))
    if keys and all(".lora" in key or "_lora" in key or key.endswith(".alpha") for key in keys):
        return f"it holds adapters: `edgegen build FOLDER --lora {quoted} --target ...`, with the model they are for"
    if any(key.startswith("model.diffusion_model.") for key in keys):
        larger = any(key.startswith("conditioner.embedders.1.") for key in keys)
        pipeline = "StableDiffusionXLPipeline" if larger else "StableDiffusionPipeline"
        return (
            f'it is a whole pipeline in one file: `python -c "import diffusers; diffusers.{pipeline}'
            f".from_single_file({str(path)!r}).save_pretrained('folder', safe_serialization=True)\"`, then name "
            "`folder`"
        )
    if {"conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight"} <= keys:
        return (
            "it is a UNet alone: copy it to `unet/diffusion_pytorch_model.safetensors` in the folder of its pipeline, "
            "and name the folder"
        )
    return None


def _with_config(name: str, tensors: Mapping[str, object], config_path: Path) -> Student:
    config = parse_config(read_json(config_path), config_path.name)
    tokenizer_path = config_path.with_name("tokenizer.json")
    tokenizer = None
    if tokenizer_path.is_file():
        try:
            tokenizer = read_small(tokenizer_path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise EdgegenError(f"`{tokenizer_path}` is not UTF-8 text") from error
    state: State = {}
    for key, value in tensors.items():
        component, dot, parameter = str(key).partition(".")
        parts = {parameter: value} if dot else value
        if not isinstance(parts, dict) or not all(isinstance(tensor, Tensor) for tensor in parts.values()):
            raise EdgegenError(
                f"`{key}` of `{name}` is no tensor of a component", hint="name tensors `<component>.<parameter>`"
            )
        state.setdefault(component, {}).update(parts)
    return build_student(config, state, tokenizer, name)
