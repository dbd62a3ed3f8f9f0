"""Find and read target files: those that ship with edgegen by name, a user's own by path. Trusts none of them."""

from __future__ import annotations

import os
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from edgegen import files
from edgegen.errors import UsageError
from edgegen.files import shipped
from edgegen.targets.model import Chipset, Delegate, Device, Runtime, Target

SIZE_LIMIT = 256 * 1024
"""Bytes; the largest shipped file has a few thousand."""
Kind = TypeVar("Kind", bound=BaseModel)


class TargetFileError(UsageError):
    """A target file is not one; `problems` has a line `file:key: message` for each thing that is wrong."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems), hint="`edgegen targets show iphone15 --toml` prints one to start from")
        self.problems = problems


def data_folder() -> Path:
    """`targets/` of the checkout, or its copy in the installed package."""
    return shipped("targets", "chipsets", "the target files")


def list_targets() -> tuple[str, ...]:
    """Names of the devices that ship, sorted."""
    return tuple(sorted(path.stem for path in data_folder().glob("*.toml")))


def load_target(name: str | os.PathLike[str]) -> Target:
    """A shipped device by name, or any file by path (something that ends in `.toml` or has a slash in it).

    A file's chipset and delegates are looked for in `chipsets/` and `delegates/` beside it, then among those that ship.
    UsageError names what is wrong; for an unknown name, the nearest known ones.
    """
    return read_target(target_path(name))


def target_path(name: str | os.PathLike[str]) -> Path:
    """The file that `load_target(name)` reads."""
    text = os.fspath(name)
    if text.endswith(".toml") or "/" in text or os.sep in text:
        return Path(text)
    known = list_targets()
    if text not in known:
        near = get_close_matches(text.lower(), known, n=3, cutoff=0.5)
        nearest = f"; nearest: {', '.join(f'`{name}`' for name in near)}" if near else ""
        raise UsageError(f"target `{text}` is unknown{nearest}", hint="edgegen targets list")
    return data_folder() / f"{text}.toml"


def validate(path: Path) -> None:
    """TargetFileError unless `path` is a device with all that it refers to, or a chipset, or a delegate by itself."""
    kind = _kind(_parsed(path))
    if kind is Device:
        read_target(path)
    else:
        _read(path, kind)


def _kind(data: dict[str, Any]) -> type[Device] | type[Chipset] | type[Delegate]:
    """Which of the three a file means to be: by the key that only that one requires."""
    if "accelerators" in data:
        return Chipset
    return Delegate if "runtime" in data else Device


def read_target(path: Path) -> Target:
    """The device file at `path` with all it refers to; TargetFileError lists all problems of the first bad file."""
    device = _read(path, Device)
    chipset = _read(_referred(path, "chipset", "chipsets", device.chipset), Chipset, device.chipset)
    delegates = tuple(_delegates(path, index, runtime) for index, runtime in enumerate(device.runtimes))
    return Target(device, chipset, delegates)


def load_delegate(name: str) -> Delegate:
    """A delegate that ships, by name; KeyError when there is none."""
    paths = {path.stem: path for path in (data_folder() / "delegates").glob("*.toml")}
    return _read(paths[name], Delegate, name)


def _delegates(path: Path, index: int, runtime: Runtime) -> tuple[Delegate, ...]:
    found = []
    for position, name in enumerate(runtime.delegates):
        key = f"runtimes[{index}].delegates[{position}]"
        delegate = _read(_referred(path, key, "delegates", name), Delegate, name)
        if delegate.runtime != runtime.backend:
            raise TargetFileError(
                [f"{path}:{key}: `{name}` is a delegate of {delegate.runtime}, not of {runtime.backend}"]
            )
        found.append(delegate)
    return tuple(found)


def read_text(path: Path) -> str:
    """A target file's text; TargetFileError when it is no regular file, too large, or not UTF-8."""
    try:
        return files.read_text(path, SIZE_LIMIT)
    except UsageError as error:
        raise TargetFileError([error.message]) from error


def _parsed(path: Path) -> dict[str, Any]:
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TargetFileError([f"{path}: {error}"]) from error
    except (RecursionError, ValueError) as error:  # nesting without end; an integer of ten thousand digits
        raise TargetFileError([f"{path}: is not TOML that can be read ({type(error).__name__})"]) from error


def _read(path: Path, kind: type[Kind], expected_name: str | None = None) -> Kind:
    try:
        made = kind.model_validate(_parsed(path))
    except ValidationError as error:
        raise TargetFileError([_problem(path, dict(problem)) for problem in error.errors()]) from error
    name = getattr(made, "name", None)
    if expected_name is not None and name != expected_name:
        raise TargetFileError([f"{path}:name: is `{name}`, and the file is called `{expected_name}`"])
    return made


def _referred(path: Path, key: str, folder: str, name: str) -> Path:
    # `name` matches the pattern of Name: no slash, no dot.
    for candidate in (path.parent / folder / f"{name}.toml", data_folder() / folder / f"{name}.toml"):
        if candidate.is_file():
            return candidate
    known = sorted(found.stem for found in (data_folder() / folder).glob("*.toml"))
    near = get_close_matches(name, known, n=3, cutoff=0.4) or known
    raise TargetFileError([f"{path}:{key}: `{name}` is unknown; nearest: {', '.join(f'`{n}`' for n in near)}"])


def _problem(path: Path, problem: dict[str, Any]) -> str:
    key = ""
    for part in problem["loc"]:
        key += f"[{part}]" if isinstance(part, int) else f".{part}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "unknown key"
    elif problem["type"] == "missing":
        message = "is missing"
    return f"{path}:{key.lstrip('.') or '(file)'}: {message[:1].lower() + message[1:]}"
