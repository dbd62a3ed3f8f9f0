"""How fast artifacts load and run on this host: measured, never estimated. Imports no torch."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from edgegen.cores import cores
from edgegen.errors import EdgegenError
from edgegen.graph.tiles import Tiling
from edgegen.lower.backend import Array, Backend, Executable
from edgegen.lower.chain import load_artifact
from edgegen.lower.stand_in import executed_by
from edgegen.verify.timed import Timed
from edgegen.verify.trajectory import Sample, Signature


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Host(_Model):
    """Where a number was measured."""

    cpu: str
    machine: str
    os: str
    python: str
    cpus_usable: int
    threads: str
    """What limits the runtime's threads, as far as this process knows."""
    load_average: float | None
    """Over the last minute, before measuring: above `cpus_usable` the times are those of a busy machine."""


class Timing(_Model):
    """Milliseconds of wall time over `samples` calls, after `warm_up` calls that were not counted."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    samples: int
    warm_up: int


class ComponentProfile(_Model):
    """One artifact: loading it (first from a cold start of the runtime, median of all), and one call of each input."""

    component: str
    first_load_ms: float
    load: Timing
    runs: dict[str, Timing]
    """By the label of the input that was run: the prompt, or the prompt and the step."""
    run: Timing
    """Over all of `runs` together."""
    while_verifying: bool = False
    """Timed on the calls that verification made anyway, with other inputs of the same shapes: the artifact is slow."""


class ProfileReport(_Model):
    """One backend on this host. `kind` says that nothing in it is estimated."""

    kind: Literal["measured"] = "measured"
    backend: str
    measured_on: Host
    runtimes: dict[str, str]
    """Distribution -> version."""
    components: tuple[ComponentProfile, ...] = ()
    picture: Timing | None = None
    """The whole compiled loop for one prompt, prompt ids to pixels, with `picture_steps` steps."""
    picture_steps: int | None = None
    not_measured_because: str | None = None


@dataclass(frozen=True)
class AlreadyTimed:
    """What verification has loaded and timed: every component, and whole pictures of the step count that is asked
    for."""

    executables: Mapping[str, Timed]
    picture_seconds: Sequence[float] = ()


VERIFYING = "while verifying"
"""Label of the calls that verification made."""


def this_host() -> Host:
    """Describe the machine this process runs on."""
    limit = os.environ.get("OMP_NUM_THREADS")
    return Host(
        cpu=_cpu_model(),
        machine=platform.machine(),
        os=_os_name(),
        python=platform.python_version(),
        cpus_usable=cores(),
        threads=f"OMP_NUM_THREADS={limit}" if limit else "the runtime's default",
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    )


def profile(
    backend: Backend,
    artifacts: Mapping[str, Path],
    signatures: Mapping[str, Signature],
    samples: Mapping[str, Sequence[Sample]],
    *,
    picture: Callable[[Mapping[str, Executable]], object] | None = None,
    picture_steps: int | None = None,
    warm_up: int = 2,
    runs: int = 20,
    loads: int = 3,
    seconds_per_component: float = 5.0,
    tilings: Mapping[str, Tiling] | None = None,
    already: AlreadyTimed | None = None,
) -> ProfileReport:
    """Measure every artifact of one backend: load times, then `runs` calls of each sample.

    Before them come `warm_up` calls (at least one) that are not counted. A component that is slow is called fewer
    times, at least 3 a sample, to stay near `seconds_per_component`, and loaded fewer times for the same reason.
    `picture` draws one picture with the loaded executables; `tilings` has the components whose artifact computes one
    tile. Of what `already` timed for that long or longer nothing is measured again but for what it lacks; its
    executables are used, and may be closed here or by the caller. A backend that this host cannot execute,
    or that something else than its runtime executes here, gives a report that says so and holds no time. EdgegenError
    when an artifact does not load or run.
    """
    report = ProfileReport(backend=backend.name, measured_on=this_host(), runtimes=runtime_versions(backend))
    reason = backend.not_executed_here()
    if reason is not None:
        return report.model_copy(update={"not_measured_because": reason})
    evaluator = executed_by(backend)
    if evaluator is not None:
        why = f"executed here by {evaluator}: the time that takes is nobody's latency"
        return report.model_copy(update={"not_measured_because": why})
    warm_up = max(warm_up, 1)
    measured: list[ComponentProfile] = []
    loaded: dict[str, Executable] = {}
    try:
        for name, path in artifacts.items():
            known = already.executables[name] if already is not None else None
            times = []
            if known is not None:
                loaded[name], times = known, [known.load_seconds]
            while len(times) < loads and sum(times) < seconds_per_component:
                if times:
                    loaded.pop(name).close()
                started = time.perf_counter()
                loaded[name] = load_artifact(
                    backend, path, signatures[name].inputs, signatures[name].outputs, tiling=(tilings or {}).get(name)
                )
                times.append(time.perf_counter() - started)
            warm = [] if known is None else known.calls[1:]
            enough = _enough(warm, seconds_per_component)
            if enough:
                by_label = {VERIFYING: warm}
            else:
                by_label = _runs(loaded[name], samples[name], warm_up, runs, seconds_per_component)
            together = [value for values in by_label.values() for value in values]
            measured.append(
                ComponentProfile(
                    component=name,
                    first_load_ms=round(times[0] * 1e3, 4),
                    load=_timing(times, 0),
                    runs={label: _timing(values, 1 if enough else warm_up) for label, values in by_label.items()},
                    run=_timing(together, 1 if enough else warm_up),
                    while_verifying=enough,
                )
            )
        drawn = () if already is None else already.picture_seconds
        whole = None
        if picture is not None and _enough(drawn, seconds_per_component):
            whole = _timing(drawn, 0)  # every component had been called by then
        elif picture is not None:
            whole = _whole(picture, loaded, runs, seconds_per_component)
    except EdgegenError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise EdgegenError(f"profiling `{backend.name}` failed: {type(error).__name__}: {text}") from error
    finally:
        for executable in loaded.values():
            executable.close()
    update = {"components": tuple(measured), "picture": whole, "picture_steps": picture_steps if whole else None}
    return report.model_copy(update=update)


def runtime_versions(backend: Backend) -> dict[str, str]:
    """Installed versions of the distributions that a backend consists of; those that are not installed are left out."""
    found = {}
    for name in backend.distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _runs(
    executable: Executable, samples: Sequence[Sample], warm_up: int, runs: int, seconds: float
) -> dict[str, list[float]]:
    feeds: list[Mapping[str, Array]] = [sample.inputs for sample in samples]
    for _ in range(warm_up):
        started = time.perf_counter()
        executable(feeds[0])
        once = time.perf_counter() - started
    rounds = max(3, min(runs, int(seconds / max(once * len(feeds), 1e-9))))
    taken: dict[str, list[float]] = {sample.label: [] for sample in samples}
    # Samples take turns, so that a disturbance of the machine falls on all of them alike.
    for _ in range(rounds):
        for sample, feed in zip(samples, feeds, strict=True):
            started = time.perf_counter()
            executable(feed)
            taken[sample.label].append(time.perf_counter() - started)
    return taken


def _enough(seconds: Sequence[float], at_least: float) -> bool:
    return len(seconds) >= 3 and sum(seconds) >= at_least


def _whole(
    picture: Callable[[Mapping[str, Executable]], object],
    executables: Mapping[str, Executable],
    runs: int,
    seconds: float,
) -> Timing:
    started = time.perf_counter()
    picture(executables)
    once = time.perf_counter() - started
    taken = []
    for _ in range(max(3, min(runs, int(seconds / max(once, 1e-9))))):
        started = time.perf_counter()
        picture(executables)
        taken.append(time.perf_counter() - started)
    return _timing(taken, 1)


def _timing(seconds: Sequence[float], warm_up: int) -> Timing:
    p10, median, p90 = (round(float(value) * 1e3, 4) for value in np.percentile(seconds, [10, 50, 90]))
    return Timing(median_ms=median, p10_ms=p10, p90_ms=p90, samples=len(seconds), warm_up=warm_up)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model") and value.strip():
                return " ".join(value.split())
    return platform.processor() or platform.machine() or "unknown"


def _os_name() -> str:
    if platform.system() == "Linux":
        try:
            release = platform.freedesktop_os_release()
            return f"{release.get('PRETTY_NAME', 'Linux')}, kernel {platform.release()}"
        except OSError:
            return f"Linux, kernel {platform.release()}"
    return platform.platform(terse=True)
