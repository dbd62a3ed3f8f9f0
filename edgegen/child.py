"""Work in a child process: what crashes, hangs or eats the memory takes only itself down.

The parent writes a job (a pydantic model) into a private folder, starts `python -m MODULE job.json`, keeps everything
the child prints in a log, and reads a result (another model) back. The child dies with the parent.
"""

from __future__ import annotations

import ctypes
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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

import edgegen
from edgegen import errors
from edgegen.cores import cores
from edgegen.errors import EdgegenError
from edgegen.nursery import Home, Job

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_STOP_GRACE_S = 10.0

Given = TypeVar("Given", bound=BaseModel)
Made = TypeVar("Made", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Envelope(_Strict):
    """What the child is told beside its job (`payload`, JSON)."""

    payload: str
    result: str
    parent: int
    memory_limit_bytes: int | None


class _Failure(_Strict):
    """An exception of the child's work, `type` by its class name; `hint` only from errors of our own."""

    type: str
    message: str
    hint: str | None
    out_of_memory: bool


class _Outcome(_Strict):
    made: str | None = None
    failure: _Failure | None = None


def run_child(
    module: str,
    job: BaseModel,
    result_type: type[Made],
    log: Path,
    name: str,
    *,
    timeout_s: float | None = None,
    memory_limit_bytes: int | None = None,
    parent_folder: Path | None = None,
    home: Home | None = None,
) -> Made:
    """Run `python -m module` on `job` and return what it made.

    `log` receives what the child prints and is kept, on success too. `timeout_s` is wall time. `memory_limit_bytes`
    bounds the child's data segment (Linux: private writable memory). The private folder, which is also the child's
    TMPDIR, is made in `parent_folder`. With `home` the child is forked from it instead of started anew. EdgegenError
    (or the subclass that the child raised) begins with `name` and names cause and log.
    """
    private = Path(tempfile.mkdtemp(prefix=".edgegen-child-", dir=parent_folder)).resolve()
    try:
        result = private / "result.json"
        envelope = _Envelope(
            payload=job.model_dump_json(),
            result=str(result),
            parent=os.getpid() if home is None else home.pid,
            memory_limit_bytes=memory_limit_bytes,
        )
        (private / "job.json").write_text(envelope.model_dump_json())
        (private / "tmp").mkdir()
        code = _run(module, private, log, timeout_s, name, home)
        return _read(result, result_type, code, name, log, memory_limit_bytes)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def child_main(path: str, job_type: type[Given], work: Callable[[Given], BaseModel]) -> int:
    """The child's side: do `work` on the job that `run_child` wrote to `path`, and leave the result for the parent."""
    envelope = _Envelope.model_validate_json(Path(path).read_bytes())
    die_with(envelope.parent)
    if envelope.memory_limit_bytes is not None:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = envelope.memory_limit_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    started = time.perf_counter()
    try:
        outcome = _Outcome(made=work(job_type.model_validate_json(envelope.payload)).model_dump_json())
    except Exception as error:  # the parent raises it again, with the log's name
        traceback.print_exc()
        outcome = _Outcome(failure=_failure(error))
    written = Path(envelope.result).with_suffix(".part")
    written.write_text(outcome.model_dump_json())
    written.replace(envelope.result)
    facts = {"seconds": round(time.perf_counter() - started, 2), "peak_mib": round(peak_bytes() / 2**20)}
    sys.stderr.write(f"edgegen-child {json.dumps(facts)}\n")
    return 0 if outcome.failure is None else 1


def peak_bytes() -> int:
    """The most that lay in this process's memory at once, mapped files included.

    On Linux not from getrusage: what the parent held when it started this process counts there too.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def leave(status: int) -> None:
    """End the child at once: the result is written, a runtime that crashes while Python shuts down has no say any
    more."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def environment() -> dict[str, str]:
    """This process's environment for a child: a fixed hash seed and no more threads than cores we may use."""
    env = dict(os.environ)
    root = Path(edgegen.__file__).resolve().parent.parent
    if root.name not in ("site-packages", "dist-packages"):  # run from a checkout
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), env.get("PYTHONPATH"))))
    most = cores()
    asked = env.get("OMP_NUM_THREADS", "")
    env["OMP_NUM_THREADS"] = str(min(most, int(asked)) if asked.isdecimal() and int(asked) else most)
    # Converters iterate over sets of names; one hash seed makes their order, and so the artifact, repeatable.
    env |= {"PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    return env


def _run(module: str, private: Path, log: Path, timeout_s: float | None, name: str, home: Home | None) -> int:
    # -P: the folder that the user stands in is never searched for modules.
    argv = [sys.executable, "-P", "-m", module, str(private / "job.json")]
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        stream = log.open("wb")
    except OSError as error:
        raise EdgegenError(f"{name}: log `{log}` cannot be written: {error.strerror}") from error
    if home is not None:
        stream.close()
        job = home.start(module, private / "job.json", log, private / "tmp")
        return _wait(job.wait, lambda: _kill_job(job), job.pid, log, timeout_s, name)
    with (
        stream,
        subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment() | dict.fromkeys(("TMPDIR", "TMP", "TEMP"), str(private / "tmp")),
            start_new_session=True,
        ) as child,
    ):
        return _wait(child.wait, lambda: _kill(child), child.pid, log, timeout_s, name)


def _wait(
    wait: Callable[[float | None], int],
    kill: Callable[[], None],
    group: int | None,
    log: Path,
    timeout_s: float | None,
    name: str,
) -> int:
    """The exit code of a child in a session of its own, which is ended whatever happens here."""
    try:
        return wait(timeout_s)
    except subprocess.TimeoutExpired as error:
        kill()
        raise EdgegenError(
            f"{name} did not finish within {timeout_s:g} s and was stopped; log `{log}`",
            hint="allow more time, or look at the end of the log for what it was doing",
        ) from error
    except BaseException:  # KeyboardInterrupt above all: the child has its own session and would live on
        kill()
        raise
    finally:
        if group is not None:
            _kill_group(group)  # whatever the child itself started


def _kill(child: subprocess.Popen[bytes]) -> None:
    _kill_group(child.pid)
    child.wait(_STOP_GRACE_S)


def _kill_job(job: Job) -> None:
    if job.pid is not None:
        _kill_group(job.pid)
        with suppress(subprocess.TimeoutExpired):
            job.wait(_STOP_GRACE_S)


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # gone; macOS answers EPERM for a group of zombies
        return


def _read(result: Path, result_type: type[Made], code: int, name: str, log: Path, limit: int | None) -> Made:
    """The child's result, or its end told as an EdgegenError."""
    look = f"read the log `{log}`"
    if code < 0:
        raise EdgegenError(f"{name} {_signal_text(-code, limit)}; log `{log}`", hint=look)
    try:
        parsed = _Outcome.model_validate_json(result.read_bytes())
        if parsed.failure is not None:
            raise _as_error(parsed.failure, name, log, limit)
        if code == 0 and parsed.made is not None:
            return result_type.model_validate_json(parsed.made)
    except FileNotFoundError as error:
        raise EdgegenError(f"{name} exited with code {code} and no result: {_last_line(log)}", hint=look) from error
    except ValidationError as error:
        raise EdgegenError(
            f"{name} exited with code {code} and an unreadable result; log `{log}`", hint=look
        ) from error
    raise EdgegenError(f"{name} exited with code {code}: {_last_line(log)}; log `{log}`", hint=look)


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
            hint="use a machine with more memory, or build fewer targets at once",
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


def die_with(parent: int) -> None:
    """Linux: SIGKILL this process when its parent goes; at once when it went before we asked."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    if os.getppid() != parent:
        os._exit(1)


def _failure(error: Exception) -> _Failure:
    text = [line.strip() for line in str(error).splitlines() if line.strip()]
    own = isinstance(error, EdgegenError)
    return _Failure(
        type=type(error).__name__,
        message=error.message if isinstance(error, EdgegenError) else (text[-1][:500] if text else "no message"),
        hint=error.hint if isinstance(error, EdgegenError) else None,
        out_of_memory=not own and (isinstance(error, MemoryError) or "can't allocate memory" in str(error)),
    )
