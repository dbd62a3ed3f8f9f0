"""`load`: a path becomes a `Student`. What it holds is told by its content, and none of its code runs."""

from __future__ import annotations

from pathlib import Path

from edgegen.errors import EdgegenError
from edgegen.students.archive import read_json, read_small
from edgegen.students.assembly import State, build_student, parse_config
from edgegen.students.safetensors_file import read_tensors
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


def _load_safetensors(path: Path) -> Student:
    """`X.safetensors` with `X.json` or `config.json`, and `tokenizer.json`, in the same folder."""
    candidates = [path.with_name(f"{path.stem}.json"), path.with_name("config.json")]
    config_path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if config_path is None:
        raise EdgegenError(
            f"`{path.name}` has no config: neither `{candidates[0].name}` nor `config.json` is beside it",
            hint=f"write the student's config to `{candidates[0]}`; "
            "`edgegen/students/shapes/weights/shapes.json` is an example",
        )
    config = parse_config(read_json(config_path), config_path.name)
    tokenizer_path = path.with_name("tokenizer.json")
    tokenizer = None
    if tokenizer_path.is_file():
        try:
            tokenizer = read_small(tokenizer_path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise EdgegenError(f"`{tokenizer_path}` is not UTF-8 text") from error
    state: State = {}
    for key, tensor in read_tensors([path]).items():
        component, dot, parameter = key.partition(".")
        if not dot:
            raise EdgegenError(
                f"tensor `{key}` of `{path.name}` names no component", hint="name tensors `<component>.<parameter>`"
            )
        state.setdefault(component, {})[parameter] = tensor
    return build_student(config, state, tokenizer, path.name)
