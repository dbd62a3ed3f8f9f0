"""Lowering in a child process: a converter that crashes, hangs or eats the memory takes only itself down.

The parent writes the program as a `.pt2` of its own making in a private folder, starts `python -m edgegen.lower.worker
job.json`, keeps everything the child prints in a log, and reads a result back. The child dies with the parent.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

import edgegen
from edgegen import errors
from edgegen.errors import EdgegenError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import Lowered, LowerRequest, Precision

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_STOP_GRACE_S = 10.0


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Job(_Strict):
    """What the child is told; `module` exposes the backend as `BACKEND`."""

    module: str
    program: str
    result: str
    component: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: Precision
    out_dir: str
    options: dict[str, str]
    parent: int
    memory_limit_bytes: int | None


class _Failure(_Strict):
    """An exception of the converter, `type` by its class name; `hint` only from errors of our own."""

    type: str
    message: str
    hint: str | None
    out_of_memory: bool


class _Result(_Strict):
    lowered: Lowered | None = None
    failure: _Failure | None = None


def lower_in_child(
    backend: str,
    program: ExportedProgram,
    request: LowerRequest,
    log: Path,
    timeout_s: float | None = None,
    memory_limit_bytes: int | None = None,
    *,
    module: str | None = None,
) -> Lowered:
    """Lower `program` with `backend` in a child process; the artifact appears in `request.out_dir`.

    `log` receives what the child prints and is kept, on success too. `timeout_s` is wall time. `memory_limit_bytes`
    bounds the child's data segment (Linux: private writable memory). `module` names a module with another `BACKEND`.
    EdgegenError (or the class that the backend raised) names backend, component, cause and log.
    """
    import torch

    name = f"backend `{backend}` on component `{request.component}`"
    try:
        request.out_dir.mkdir(parents=True, exist_ok=True)
        # Inside out_dir: on the disk that must hold the artifact anyway, and swept with it when this process is killed.
        private = Path(tempfile.mkdtemp(prefix=".edgegen-lower-", dir=request.out_dir)).resolve()
    except OSError as error:
        raise EdgegenError(f"{name}: folder `{request.out_dir}` cannot be written: {error.strerror}") from error
    try:
        job = _Job(
            module=module or f"edgegen.lower.{backend}",
            program=str(private / "program.pt2"),
            result=str(private / "result.json"),
            component=request.component,
            inputs=request.inputs,
            outputs=request.outputs,
            precision=request.precision,
            out_dir=str(request.out_dir.resolve()),
            options=dict(request.options),
            parent=os.getpid(),
            memory_limit_bytes=memory_limit_bytes,
        )
        try:
            torch.export.save(program, job.program)
            (private / "job.json").write_text(job.model_dump_json())
            (private / "tmp").mkdir()
        except (OSError, RuntimeError) as error:  # RuntimeError is what torch's writer makes of a full disk
            raise EdgegenError(f"{name}: the program cannot be written to `{private}`: {error}") from error
        code = _run(private, log, timeout_s, name)
        return _read(Path(job.result), code, request, name, log, memory_limit_bytes)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _environment(private: Path) -> dict[str, str]:
    """The parent's environment with its own TMPDIR, a fixed hash seed and no more threads than cores we may use."""
    env = dict(os.environ)
    root = Path(edgegen.__file__).resolve().parent.parent
    if root.name not in ("site-packages", "dist-packages"):  # run from a checkout
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), env.get("PYTHONPATH"))))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = env.get("OMP_NUM_THREADS", "")
    env["OMP_NUM_THREADS"] = str(min(cores, int(asked)) if asked.isdecimal() and int(asked) else cores)
    # Converters iterate over sets of names; one hash seed makes their order, and so the artifact, repeatable.
    env |= {"PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    return env | dict.fromkeys(("TMPDIR", "TMP", "TEMP"), str(private / "tmp"))


def _run(private: Path, log: Path, timeout_s: float | None, name: str) -> int:
    # -P: the folder that the user stands in is never searched for modules.
    argv = [sys.executable, "-P", "-m", "edgegen.lower.worker", str(private / "job.json")]
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        stream = log.open("wb")
    except OSError as error:
        raise EdgegenError(f"{name}: log `{log}` cannot be written: {error.strerror}") from error
    with (
        stream,
        subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=_environment(private),
            start_new_session=True,
        ) as child,
    ):
        try:
            return child.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            _kill(child)
            raise EdgegenError(
                f"{name} did not finish within {timeout_s:g} s and was stopped; log `{log}`",
                hint="allow more time, or look at the end of the log for what it was doing",
            ) from error
        except BaseException:  # KeyboardInterrupt above all: the converter has its own session and would live on
            _kill(child)
            raise
        finally:
            _kill_group(child.pid)  # whatever the converter itself started


def _kill(child: subprocess.Popen[bytes]) -> None:
    _kill_group(child.pid)
    child.wait(_STOP_GRACE_S)


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # gone; macOS answers EPERM for a group of zombies
        return


def _read(result: Path, code: int, request: LowerRequest, name: str, log: Path, limit: int | None) -> Lowered:
    """The child's result, or its end told as an EdgegenError."""
    look = f"read the log `{log}`"
    if code < 0:
        raise EdgegenError(f"{name} {_signal_text(-code, limit)}; log `{log}`", hint=look)
    try:
        parsed = _Result.model_validate_json(result.read_bytes())
    except FileNotFoundError as error:
        raise EdgegenError(f"{name} exited with code {code} and no result: {_last_line(log)}", hint=look) from error
    except ValidationError as error:
        raise EdgegenError(
            f"{name} exited with code {code} and an unreadable result; log `{log}`", hint=look
        ) from error
    if parsed.failure is not None:
        raise _as_error(parsed.failure, name, log, limit)
    lowered = parsed.lowered
    if code != 0 or lowered is None:
        raise EdgegenError(f"{name} exited with code {code}: {_last_line(log)}; log `{log}`", hint=look)
    file = PurePosixPath(lowered.file)
    if file.is_absolute() or ".." in file.parts or not file.parts or not (request.out_dir / file).exists():
        raise EdgegenError(f"{name} reported success without the artifact `{lowered.file}`; log `{log}`", hint=look)
    return lowered


def _signal_text(number: int, limit: int | None) -> str:
    try:
        signal_name = signal.Signals(number).name
    except ValueError:
        signal_name = f"signal {number}"
    if number == signal.SIGKILL:
        return "was killed (SIGKILL): most likely the machine ran out of memory"
    if number == signal.SIGABRT and limit is not None:
        return f"aborted (SIGABRT), perhaps at its memory limit of {limit / 2**20:.0f} MiB"
    return f"crashed ({signal_name})"


def _as_error(failure: _Failure, name: str, log: Path, limit: int | None) -> EdgegenError:
    if failure.out_of_memory:
        bound = "" if limit is None else f" (limit {limit / 2**20:.0f} MiB)"
        return EdgegenError(
            f"{name} ran out of memory{bound}: {failure.message}; log `{log}`",
            hint="lower on a machine with more memory, or build fewer targets at once",
        )
    own = getattr(errors, failure.type, None)
    if isinstance(own, type) and issubclass(own, EdgegenError):
        return own(f"{name} failed: {failure.message}; log `{log}`", hint=failure.hint)
    return EdgegenError(
        f"{name} failed: {failure.type}: {failure.message}; log `{log}`", hint=f"read the traceback in `{log}`"
    )


def _last_line(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 4096))
        lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
    return f"its last line is `{lines[-1][:300]}`" if lines else "it printed nothing"


def main(argv: list[str]) -> int:
    """The child: lower what `argv[0]` (a job file of `lower_in_child`) says, and write the result beside it."""
    job = _Job.model_validate_json(Path(argv[0]).read_bytes())
    _die_with(job.parent)
    if job.memory_limit_bytes is not None:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        soft = job.memory_limit_bytes if hard == resource.RLIM_INFINITY else min(job.memory_limit_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    started = time.perf_counter()
    try:
        result = _Result(lowered=_lower(job))
    except Exception as error:  # the parent raises it again, with the log's name
        traceback.print_exc()
        result = _Result(failure=_failure(error))
    written = Path(job.result).with_suffix(".part")
    written.write_text(result.model_dump_json())
    written.replace(job.result)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    facts: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 2), "peak_mib": round(peak)}
    sys.stderr.write(f"edgegen-lower {json.dumps(facts)}\n")
    return 0 if result.failure is None else 1


def _die_with(parent: int) -> None:
    """Linux: SIGKILL this process when its parent goes; at once when it went before we asked."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    if os.getppid() != parent:
        os._exit(1)


def _lower(job: _Job) -> Lowered:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    backend = import_module(job.module).BACKEND
    program = torch.export.load(job.program)
    request = LowerRequest(
        component=job.component,
        inputs=job.inputs,
        outputs=job.outputs,
        precision=job.precision,
        out_dir=Path(job.out_dir),
        options=job.options,
    )
    gc.disable()  # converters make and keep many small objects: collecting costs a sixth of the time and frees nothing
    try:
        lowered: Lowered = backend.lower(program, request)
    finally:
        gc.enable()
    return lowered


def _failure(error: Exception) -> _Failure:
    text = [line.strip() for line in str(error).splitlines() if line.strip()]
    own = isinstance(error, EdgegenError)
    return _Failure(
        type=type(error).__name__,
        message=error.message if isinstance(error, EdgegenError) else (text[-1][:500] if text else "no message"),
        hint=error.hint if isinstance(error, EdgegenError) else None,
        out_of_memory=not own and (isinstance(error, MemoryError) or "can't allocate memory" in str(error)),
    )


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the result is written: a runtime that crashes while Python shuts down has no say any more
