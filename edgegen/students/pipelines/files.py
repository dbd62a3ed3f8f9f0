"""Files of a folder of weights: contained in it, safetensors alone, settings checked as they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgegen.errors import EdgegenError, UnsafeError
from edgegen.students.archive import EXPORT_HINT, check_relative, read_json
from edgegen.students.safetensors_file import read_tensors

if TYPE_CHECKING:
    from torch import Tensor

SAVE_HINT = "write the folder again with `pipeline.save_pretrained(folder, safe_serialization=True)`"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DEPTHS = (
    *("num_layers", "num_hidden_layers", "n_layers", "n_refiner_layers", "layers_per_block"),
    *("transformer_layers_per_block", "block_out_channels", "decoder_layers_per_block"),
)
"""Settings that multiply the work of building a network."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One component as a folder has it: a network of `edgegen.students.architectures`, its config, its tensors."""

    architecture: str
    config: dict[str, Any]
    state: dict[str, Tensor]
    outputs: dict[str, Shape] = field(default_factory=dict)


def inside(folder: Path, relative: str) -> Path:
    """`relative` below `folder`, links followed and still inside it (or inside the Hugging Face cache it is a view
    of). UnsafeError for a link out of it, EdgegenError for what is not there.
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


def config_of(folder: Path, part: str) -> dict[str, Any]:
    """`<part>/config.json`."""
    return read_json(inside(folder, f"{part}/config.json"))


def weights(folder: Path, part: str, stem: str, wanted: Callable[[str], bool] = lambda key: True) -> dict[str, Tensor]:
    """The tensors of one network: one safetensors file (or its fp16 variant), or the shards that its index names."""
    names = {entry.name for entry in inside(folder, part).iterdir()}
    for variant in (stem, f"{stem}.fp16"):
        if f"{variant}.safetensors" in names:
            return _read(folder, part, [f"{variant}.safetensors"], wanted)
        if f"{stem}.safetensors.index{variant.removeprefix(stem)}.json" in names:
            index = read_json(inside(folder, f"{part}/{stem}.safetensors.index{variant.removeprefix(stem)}.json"))
            shards = index.get("weight_map")
            if not isinstance(shards, dict) or not shards or not all(isinstance(one, str) for one in shards.values()):
                raise EdgegenError(f"the index of `{part}` names no shards", hint=SAVE_HINT)
            for shard in set(shards.values()):
                check_relative(shard, f"a shard in the index of `{part}`")
            return _read(folder, part, sorted(set(shards.values())), wanted)
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    if pickled:
        raise UnsafeError(
            f"`{part}/{pickled[0]}` holds pickled weights, and only safetensors are read",
            hint=f"where you trust the folder: {SAVE_HINT}",
        )
    raise EdgegenError(f"`{part}` has no `{stem}.safetensors`", hint=SAVE_HINT)


def _read(folder: Path, part: str, files: list[str], wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors of these files; whose they are is said of a damaged one, since several parts have the same names."""
    try:
        return read_tensors([inside(folder, f"{part}/{one}") for one in files], wanted)
    except UnsafeError:
        raise
    except EdgegenError as error:
        raise EdgegenError(f"weights of `{part}`: {error.message}", error.hint) from error


def require(config: Mapping[str, Any], fixed: Mapping[str, tuple[Any, tuple[Any, ...]]], name: str) -> None:
    """EdgegenError for the first setting whose value is not among those allowed; `fixed` is key -> (default,
    allowed)."""
    for key, (default, allowed) in fixed.items():
        value = config.get(key, default)
        if value not in allowed or isinstance(value, bool) != any(isinstance(a, bool) and a == value for a in allowed):
            wanted = " or ".join(repr(one) for one in allowed)
            raise EdgegenError(
                f"`{key}` in `{name}` is {value!r}, and edgegen's network has {wanted}", hint=EXPORT_HINT
            )


def fits(config: Mapping[str, Any], fixed: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> bool:
    """Whether `require` would say nothing."""
    try:
        require(config, fixed, "")
    except EdgegenError:
        return False
    return True


def single(config: Mapping[str, Any], key: str, default: Any, name: str) -> int:
    """A setting that may be a number, or a list of one number repeated."""
    value = config.get(key, default)
    if isinstance(value, list) and value and all(one == value[0] for one in value):
        value = value[0]
    if type(value) is not int or value < 1:
        raise EdgegenError(f"`{key}` in `{name}` is {value!r}, not one positive number", hint=SAVE_HINT)
    return value


def sizes(config: Mapping[str, Any], key: str, default: list[int], name: str) -> list[int]:
    """A setting that is a list of positive numbers."""
    value = config.get(key, default)
    if not isinstance(value, list) or not value or not all(type(one) is int and one > 0 for one in value):
        raise EdgegenError(f"`{key}` in `{name}` is {value!r}, not a list of positive numbers", hint=SAVE_HINT)
    return value


def number(config: Mapping[str, Any], key: str, default: float, name: str) -> float:
    """A setting that is a number, or missing or null for its default."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise EdgegenError(f"`{key}` in `{name}` is {value!r}, not a number", hint=SAVE_HINT)
    return float(value)


def require_depth(config: Mapping[str, Any], tensors: int, name: str) -> None:
    """EdgegenError for a config that asks for more layers than there are tensors: it would never be done building."""

    def total(value: Any) -> int:
        if isinstance(value, list):
            return sum(map(total, value), len(value))
        return value if isinstance(value, int) else 0

    for key in DEPTHS:
        value = config.get(key, 0)
        layers = len(value) if key == "block_out_channels" and isinstance(value, list) else total(value)
        if layers > max(tensors, 1):
            raise EdgegenError(f"`{key}` in `{name}` is {value!r}, and there are only {tensors} tensors", SAVE_HINT)
