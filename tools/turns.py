"""What the benchmarks share: what they were run on, and artifacts that are called in turns."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

from torch import Tensor
from torch.export import ExportedProgram

from edgegen.graph.capture import signature
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import LowerRequest, get_backend
from edgegen.profile.host import runtime_versions, this_host

WARM_UP = 3
"""Turns that do not count."""
PAUSE = 0.004
"""Seconds that are enough for `in_turns`: onnxruntime's threads wait for a millisecond or two before they sleep."""


P = ParamSpec("P")
T = TypeVar("T")


def on_cores(count: int, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """What `function` gives in a process of its own that has `count` cores: some runtimes make their threads once."""
    with ProcessPoolExecutor(1, get_context("spawn"), keep_to, (count,)) as pool:
        return pool.submit(function, *arguments, **named).result()


def keep_to(count: int) -> None:
    """This process on `count` of its cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def settings_of(backends: Sequence[str], threads: int, **more: str) -> dict[str, str]:
    """For the head of a table: how it was made, on what, with which versions; `more` is what else to say."""
    host = this_host()
    versions = {"torch": metadata.version("torch"), "numpy": metadata.version("numpy")}
    for name in backends:
        versions.update(runtime_versions(get_backend(name)))
    return {
        "command": "python " + " ".join(Path(one).name if Path(one).is_absolute() else one for one in sys.argv),
        "cpu": host.cpu,
        "system": f"{host.os}, Python {platform.python_version()}",
        "threads": str(threads),
        **more,
        "load average at the start": str(host.load_average),
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
    }


def in_turns(
    calls: Sequence[Callable[[], object]], repeats: int, *, in_a_row: int = 1, pause: float = 0.0
) -> list[float]:
    """Median seconds of each: one call of every one, then again, so that a busy machine slows all of them down.

    `in_a_row`: so many calls of one make its turn, whose mean counts. `pause`: seconds before each turn, in which the
    threads stop that a runtime leaves waiting for more work; without it they take time from the next.
    """
    return [statistics.median(times) for times in turns(calls, repeats, in_a_row=in_a_row, pause=pause)]


def turns(
    calls: Sequence[Callable[[], object]], repeats: int, *, in_a_row: int = 1, pause: float = 0.0
) -> list[list[float]]:
    """As `in_turns`, every turn that counts."""
    taken: list[list[float]] = [[] for _ in calls]
    for turn in range(WARM_UP + repeats):
        for place, call in enumerate(calls):
            if pause:
                time.sleep(pause)
            started = time.perf_counter()
            for _ in range(in_a_row):
                call()
            if turn >= WARM_UP:
                taken[place].append((time.perf_counter() - started) / in_a_row)
    return taken


def request_of(program: ExportedProgram, folder: Path) -> LowerRequest:
    """What a backend is told of a graph that is lowered for itself, in fp32; outputs are `output_0`, `output_1`, ..."""
    (values,) = program.graph.output_node().args
    outputs = tuple(_spec(f"output_{place}", value.meta["val"]) for place, value in enumerate(values))
    return LowerRequest("benchmark", signature(program), outputs, "fp32", folder)


def _spec(name: str, value: Tensor) -> TensorSpec:
    dtype = str(value.dtype).removeprefix("torch.")
    return TensorSpec.model_validate({"name": name, "shape": tuple(value.shape), "dtype": dtype})
