"""Calling a bundle of a single network: arrays in by name, arrays out by name, or a picture in and a picture out."""

from __future__ import annotations

import secrets
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgegen.bundle.backends import choose_backend
from edgegen.bundle.open import Bundle
from edgegen.errors import EdgegenError, GateError, UsageError
from edgegen.lower.backend import Array, get_backend
from edgegen.lower.chain import load_artifact
from edgegen.lower.stand_in import executed_by
from edgegen.students.config import TASKS
from edgegen.verify.trajectory import Picture

RANGES = {"0..1": (0.0, 1.0), "-1..1": (-1.0, 1.0), "0..255": (0.0, 255.0)}
"""What black and white are for a network that takes or gives pictures."""


@dataclass(frozen=True)
class Called:
    """What came out, [N, *shape] by name, and how long each of the N calls took, in seconds."""

    outputs: dict[str, Array]
    seconds: tuple[float, ...]


class Network:
    """The one component of a bundle of task `single`, loaded by one backend. A context manager.

    UsageError for a bundle that draws, or that this host cannot execute; EdgegenError for one that does not load.
    """

    def __init__(self, bundle: Bundle, backend: str | None = None) -> None:
        manifest = bundle.manifest
        if tuple(manifest.components) != TASKS["single"]:
            raise UsageError(
                f"bundle `{bundle.root}` draws, and makes its inputs itself",
                hint=f"edgegen run {shlex.quote(str(bundle.root))} --prompt TEXT",
            )
        ((name, io),) = manifest.components.items()
        self.bundle, self.inputs, self.outputs = bundle, io.inputs, io.outputs
        self.backend = choose_backend(bundle, backend)
        chosen = get_backend(self.backend)
        self.executed_by = executed_by(chosen)
        memory = manifest.memory.get(self.backend)
        self._executable = load_artifact(
            chosen,
            bundle.loadable(bundle.artifacts(self.backend)[name]),
            io.inputs,
            io.outputs,
            resident=memory is None or memory.load != "sequential",
            tiling=manifest.tilings.get(name),
        )

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executable.close()

    def call(self, inputs: Mapping[str, NDArray[Any]], called: Callable[[], None] = lambda: None) -> Called:
        """`inputs` are [N, *shape] by name. GateError for an output that is not finite, EdgegenError for one of
        another shape; `called` is told of each call."""
        count = len(next(iter(inputs.values())))
        made: dict[str, list[Array]] = {spec.name: [] for spec in self.outputs}
        seconds = []
        for index in range(count):
            given = {spec.name: inputs[spec.name][index] for spec in self.inputs}
            started = time.perf_counter()
            found = self._executable(given)
            seconds.append(time.perf_counter() - started)
            for spec in self.outputs:
                value = found[spec.name]
                if value.shape != spec.shape:
                    raise EdgegenError(f"output `{spec.name}` came as {value.shape}, not {spec.shape}")
                if not np.isfinite(value).all():
                    raise GateError(
                        f"output `{spec.name}` of backend `{self.backend}` is not finite",
                        hint=f"edgegen verify {shlex.quote(str(self.bundle.root))}",
                    )
                made[spec.name].append(value)
            called()
        return Called({name: np.stack(values) for name, values in made.items()}, tuple(seconds))

    def picture_size(self) -> tuple[int, int]:
        """Height and width of the picture that the network takes; UsageError for one that is not a picture in and a
        picture out."""
        ends = [self.inputs, self.outputs]
        if not all(len(specs) == 1 and _is_picture(specs[0].shape, specs[0].dtype) for specs in ends):
            told = ", ".join(f"`{spec.name}` {list(spec.shape)}" for specs in ends for spec in specs)
            raise UsageError(
                f"the network of `{self.bundle.root}` is not a picture [1, 3, H, W] in and a picture out: {told}",
                hint="give its inputs by name: `--inputs inputs.npz`",
            )
        height, width = self.inputs[0].shape[-2:]
        return height, width

    def picture(self, start: NDArray[np.float32], scale: tuple[float, float]) -> tuple[Picture, float]:
        """`start` [1, 3, H, W] in -1..1 through a network whose black and white are `scale` -> uint8 [h, w, 3], and
        the seconds of the call."""
        low, high = scale
        given = np.float32(low) + (start + np.float32(1.0)) * np.float32((high - low) / 2)
        called = self.call({self.inputs[0].name: given[None]})
        made = (called.outputs[self.outputs[0].name][0, 0] - low) / (high - low)
        pixels = np.clip(np.rint(made.transpose(1, 2, 0) * 255.0), 0, 255).astype(np.uint8)
        return pixels, called.seconds[0]


def _is_picture(shape: tuple[int, ...], dtype: str) -> bool:
    return len(shape) == 4 and shape[:2] == (1, 3) and dtype == "float32"


def check_arrays_path(path: Path) -> None:
    """UsageError when arrays must not or cannot be written to `path`; asked before the work starts."""
    hint = "choose another file with `-o outputs.npz`"
    if path.suffix != ".npz":
        raise UsageError(f"`{path}` does not end in .npz, and arrays are what is written", hint=hint)
    if path.is_dir() or (path.exists() and path.stat().st_size and path.read_bytes()[:2] != b"PK"):
        raise UsageError(f"`{path}` exists and is no .npz; it is not overwritten", hint=hint)
    if not path.parent.is_dir():
        raise UsageError(f"folder `{path.parent}` does not exist", hint=f"mkdir -p '{path.parent}'")


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write an `.npz`; the file appears in one rename."""
    check_arrays_path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)
        part.replace(path)
    except OSError as error:
        raise EdgegenError(f"`{path}` cannot be written: {error.strerror or error}", "choose another file") from error
    finally:
        part.unlink(missing_ok=True)
