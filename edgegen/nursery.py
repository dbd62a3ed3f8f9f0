"""A process that has imported what a kind of work needs, and forks for each job: imports are paid for once.

Each job still has a process of its own, with its own memory, session and log, that takes only itself down
(`edgegen.child`). The process that forks does nothing but import and wait: it has one thread of Python and has computed
nothing, so what it forks finds no pool of threads that is not there. Linux only: elsewhere frameworks do not survive a
fork.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import select
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_POLL_S = 0.02
HOME_DIED = -9
"""Status of a job whose home is gone: it was killed with it."""


def is_possible() -> bool:
    """Whether this host forks safely."""
    return sys.platform == "linux"


class Home:
    """One such process; any thread may run jobs in it, side by side."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        argv = [sys.executable, "-P", "-m", "edgegen.nursery", str(theirs.fileno()), str(os.getpid()), *modules]
        with theirs:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=dict(environment),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self._socket = ours
        self._lock = threading.Lock()
        self._told: dict[int, queue.SimpleQueue[dict[str, int] | None]] = {}
        self._gone = False
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, module: str, job: Path, log: Path, folder: Path) -> Job:
        """Fork, and in the child call `module.main(job)`, with what it prints in `log` and `folder` as its TMPDIR."""
        answers: queue.SimpleQueue[dict[str, int] | None] = queue.SimpleQueue()
        with self._lock:
            number = len(self._told)
            self._told[number] = answers
            if self._gone:
                answers.put(None)
        request: dict[str, Any] = {"id": number, "module": module, "job": str(job), "log": str(log), "tmp": str(folder)}
        request["cwd"] = str(Path.cwd())
        with suppress(OSError), self._lock:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        first = answers.get()
        return Job(None if first is None else first["pid"], answers)

    def close(self) -> None:
        """End it; jobs that still run are killed with it."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        with self._socket.makefile("rb") as stream, suppress(OSError):
            for line in stream:
                answer = json.loads(line)
                self._told[answer["id"]].put(answer)
        with self._lock:
            self._gone = True
            for answers in self._told.values():
                answers.put(None)
        self._socket.close()


class Job:
    """A forked process; `pid` is None where its home was gone before it came to be."""

    def __init__(self, pid: int | None, answers: queue.SimpleQueue[dict[str, int] | None]) -> None:
        self.pid = pid
        self._answers = answers

    def wait(self, timeout_s: float | None) -> int:
        """Exit code, negative for a signal. subprocess.TimeoutExpired as of a Popen."""
        if self.pid is None:
            return HOME_DIED
        try:
            answer = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise subprocess.TimeoutExpired(str(self.pid), timeout_s or 0.0) from None
        return HOME_DIED if answer is None else answer["status"]


def main(arguments: Sequence[str]) -> None:
    """The home's side: import, then fork for each request until the other end is closed."""
    from edgegen.child import die_with

    link = socket.socket(fileno=int(arguments[0]))
    die_with(int(arguments[1]))
    for name in arguments[2:]:
        with suppress(Exception):  # the job imports it again, and then it is an error with a log
            importlib.import_module(name)
    running: dict[int, int] = {}
    pending = b""
    while True:
        if select.select([link], [], [], _POLL_S if running else None)[0]:
            received = link.recv(1 << 16)
            if not received:
                return
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                request = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    link.close()
                    _become(request)
                running[pid] = request["id"]
                link.sendall(json.dumps({"id": request["id"], "pid": pid}).encode() + b"\n")
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            answer = {"id": running.pop(pid), "status": os.waitstatus_to_exitcode(status)}
            link.sendall(json.dumps(answer).encode() + b"\n")


def _become(request: Mapping[str, Any]) -> None:
    """In the forked process: a session, a log and a TMPDIR of its own, then the work; never returns."""
    status = 1
    try:
        os.setsid()
        os.chdir(request["cwd"])
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for name in ("TMPDIR", "TMP", "TEMP"):
            os.environ[name] = request["tmp"]
        tempfile.tempdir = None
        sys.argv = [request["module"], request["job"]]
        status = importlib.import_module(request["module"]).main(request["job"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
