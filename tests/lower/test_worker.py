"""Lowering in a child process, with real processes and small backends that misbehave on request."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import edgegen
from edgegen.child import environment
from edgegen.errors import EdgegenError, UsageError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import LowerRequest
from edgegen.lower.worker import lower_in_child
from edgegen.nursery import Home

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="nothing is forked elsewhere")
BACKEND = """
import ctypes, json, os, signal, subprocess, sys, tempfile, time
from pathlib import Path
import torch
from edgegen.errors import UsageError
from edgegen.lower.backend import Delegation, Lowered

class Backend:
    def lower(self, program, request):
        do = request.options["do"]
        print("said on stdout", flush=True)
        print("said on stderr", file=sys.stderr, flush=True)
        (request.out_dir / "pid").write_text(str(os.getpid()))
        if do == "raise":
            raise ValueError("a first line\\nand the last one")
        if do == "usage":
            raise UsageError("option `x` is unknown", hint="choose `y`")
        if do == "segv":
            ctypes.string_at(0)
        if do == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if do == "exit":
            os._exit(7)
        if do == "garble":
            (Path(sys.argv[1]).parent / "result.json").write_text("{broken")
            os._exit(0)
        if do == "memory":
            bytearray(16 * 2**30)
        if do == "hang":
            below = subprocess.Popen(["sleep", "600"])
            (request.out_dir / "below").write_text(str(below.pid))
            (request.out_dir / "ready").touch()
            time.sleep(600)
        file = {"missing": "missing.bin", "escape": "../pid"}.get(do, "made.json")
        facts = {
            "sum": float(program.module()(torch.ones(2, 3)).sum()),
            "hash_seed": os.environ["PYTHONHASHSEED"],
            "threads": torch.get_num_threads(),
            "tmp": tempfile.mkstemp()[1],
            "cwd_searched": "" in sys.path or os.getcwd() in sys.path,
            "precision": request.precision,
            "specs": [request.inputs[0].name, request.outputs[0].name],
        }
        (request.out_dir / "made.json").write_text(json.dumps(facts))
        return Lowered(file=file, delegation=Delegation(delegate="none", known=True), details={"a": "b"}, notes=("n",))

BACKEND = Backend()
"""
SPEC = (TensorSpec(name="x", shape=(2, 3)),)
OUT = (TensorSpec(name="y", shape=(2, 3)),)


class Doubled(torch.nn.Module):
    def forward(self, x):
        return x * 2


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A process that forks for each job, as a build has one for each converter."""
    modules = tmp_path_factory.mktemp("modules")
    (modules / "fake_backend.py").write_text(BACKEND)
    path = os.pathsep.join([str(modules), str(Path(edgegen.__file__).parents[1])])
    made = Home(
        ("torch", "torch.export", "edgegen.lower.worker", "no_such_module"), environment() | {"PYTHONPATH": path}
    )
    yield made
    made.close()


@pytest.fixture
def forked(home, tmp_path):
    program = torch.export.export(Doubled(), (torch.ones(2, 3),))

    def run(do, **options):
        request = LowerRequest("part", SPEC, OUT, "fp16", tmp_path / "out", {"do": do})
        log = tmp_path / "logs" / "x.log"
        return lower_in_child("fake", program, request, log, module="fake_backend", home=home, **options)

    return run


@pytest.fixture
def child(tmp_path, monkeypatch):
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "fake_backend.py").write_text(BACKEND)
    monkeypatch.setenv("PYTHONPATH", str(modules))
    program = torch.export.export(Doubled(), (torch.ones(2, 3),))

    def run(do, **options):
        request = LowerRequest("part", SPEC, OUT, "fp16", tmp_path / "out", {"do": do})
        return lower_in_child("fake", program, request, tmp_path / "logs" / "x.log", module="fake_backend", **options)

    return run


def gone(pid, within=10.0):
    """Whether process `pid` ends (or is a zombie nobody has to wait for) in time."""
    limit = time.monotonic() + within
    while time.monotonic() < limit:
        stat = Path(f"/proc/{pid}/stat")
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_result_log_and_surroundings(child, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    _surrounded(child, tmp_path, monkeypatch)


@LINUX
def test_result_log_and_surroundings_of_a_forked_child(forked, tmp_path, monkeypatch):
    _surrounded(forked, tmp_path, monkeypatch)


def _surrounded(child, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lowered = child("work")
    assert (lowered.file, lowered.details, lowered.notes) == ("made.json", {"a": "b"}, ("n",))
    facts = json.loads((tmp_path / "out" / "made.json").read_text())
    assert facts["sum"] == 12.0  # the program that arrived is the program that was sent
    assert (facts["precision"], facts["specs"], facts["hash_seed"]) == ("fp16", ["x", "y"], "0")
    assert 1 <= facts["threads"] <= len(os.sched_getaffinity(0))
    assert not facts["cwd_searched"]
    assert Path(facts["tmp"]).is_relative_to(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "made.json",
        "pid",
    ]  # private folder and TMPDIR went
    log = (tmp_path / "logs" / "x.log").read_text()
    assert "said on stdout" in log and "said on stderr" in log and '"peak_mib"' in log


@pytest.mark.parametrize(
    ("do", "options", "said"),
    [
        ("raise", {}, "ValueError: and the last one"),
        ("segv", {}, "SIGSEGV"),
        ("kill", {}, "SIGKILL): most likely the machine ran out of memory"),
        ("exit", {}, "exited with code 7 and no result: its last line is `said on stderr`"),
        ("garble", {}, "unreadable result"),
        ("missing", {}, "without the artifact `missing.bin`"),
        ("escape", {}, "without the artifact `../pid`"),
        ("memory", {"memory_limit_bytes": 4 * 2**30}, "ran out of memory (limit 4096 MiB)"),
    ],
)
def test_each_way_to_fail_is_told(child, tmp_path, do, options, said):
    _fails(child, tmp_path, do, options, said)


@LINUX
@pytest.mark.parametrize(
    ("do", "options", "said"),
    [
        ("raise", {}, "ValueError: and the last one"),
        ("segv", {}, "SIGSEGV"),
        ("garble", {}, "unreadable result"),
        ("memory", {"memory_limit_bytes": 4 * 2**30}, "ran out of memory (limit 4096 MiB)"),
    ],
)
def test_a_forked_child_takes_only_itself_down(forked, tmp_path, do, options, said):
    _fails(forked, tmp_path, do, options, said)
    assert forked("work").file == "made.json"


@LINUX
def test_a_home_that_ends_takes_its_jobs_along(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "fake_backend.py").write_text(BACKEND)
    home = Home(("torch",), environment())
    program = torch.export.export(Doubled(), (torch.ones(2, 3),))

    def start(do):
        request = LowerRequest("part", SPEC, OUT, "fp16", tmp_path / "out", {"do": do})
        return lower_in_child("fake", program, request, tmp_path / "x.log", module="fake_backend", home=home)

    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(start, "hang")
        limit = time.monotonic() + 60
        while not (tmp_path / "out" / "ready").exists():
            assert time.monotonic() < limit, "the child never started"
            time.sleep(0.05)
        home.close()
        with pytest.raises(EdgegenError, match="was killed"):
            hanging.result()
    assert gone((tmp_path / "out" / "pid").read_text())
    assert gone((tmp_path / "out" / "below").read_text())
    with pytest.raises(EdgegenError, match="was killed"):
        start("work")


def _fails(child, tmp_path, do, options, said):
    with pytest.raises(EdgegenError) as caught:
        child(do, **options)
    message = caught.value.message
    assert said in message
    assert message.startswith("backend `fake` on component `part`")
    assert caught.value.hint
    assert "x.log" in message or "x.log" in caught.value.hint
    assert not list((tmp_path / "out").glob(".edgegen*"))
    assert "said on stdout" in (tmp_path / "logs" / "x.log").read_text()


def test_our_own_errors_keep_class_and_hint(child):
    with pytest.raises(UsageError, match="option `x` is unknown") as caught:
        child("usage")
    assert caught.value.hint == "choose `y`"


@pytest.mark.slow
def test_timeout_ends_child_and_grandchild(child, tmp_path):
    with pytest.raises(EdgegenError, match="did not finish within 15 s"):
        child("hang", timeout_s=15)
    assert gone((tmp_path / "out" / "pid").read_text())
    assert gone((tmp_path / "out" / "below").read_text())
    assert not list((tmp_path / "out").glob(".edgegen*"))


def test_a_log_that_cannot_be_written_is_refused(child, tmp_path):
    (tmp_path / "logs").write_text("a file where the folder of logs should be")
    with pytest.raises(EdgegenError, match=r"log `.*` cannot be written"):
        child("work")


PARENT = """
import sys, torch
from pathlib import Path
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import LowerRequest
from edgegen.lower.worker import lower_in_child

class Doubled(torch.nn.Module):
    def forward(self, x):
        return x * 2

if __name__ == "__main__":
    out = Path(sys.argv[1])
    program = torch.export.export(Doubled(), (torch.ones(2, 3),))
    x, y = (TensorSpec(name=name, shape=(2, 3)) for name in "xy")
    request = LowerRequest("part", (x,), (y,), "fp32", out, {"do": "hang"})
    lower_in_child("fake", program, request, out.parent / "x.log", module="fake_backend")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a parent killed with SIGKILL takes its child along on Linux only")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_child_ends_with_its_parent(tmp_path, number):
    (tmp_path / "fake_backend.py").write_text(BACKEND)
    (tmp_path / "parent.py").write_text(PARENT)
    out = tmp_path / "out"
    root = Path(edgegen.__file__).parents[1]
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py"), str(out)],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        # A suite started in the background of a shell has SIGINT ignored, and would hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as parent:
        try:
            limit = time.monotonic() + 60
            while not (out / "ready").exists():
                assert parent.poll() is None and time.monotonic() < limit, "the child never started"
                time.sleep(0.05)
            parent.send_signal(number)
            _, errors = parent.communicate(timeout=20)
        finally:
            parent.kill()
    assert gone((out / "pid").read_text())
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
        assert gone((out / "below").read_text())
        assert not list(out.glob(".edgegen*"))
    else:
        os.kill(int((out / "below").read_text()), signal.SIGKILL)  # ours to end: nobody else is left


def test_graphs_are_handed_over_by_several_threads_at_once(tmp_path):
    """torch's writer registers a reducer for the whole process and refuses to find another thread's."""
    from edgegen.lower.worker import _save

    layers = [torch.nn.Linear(32, 32) for _ in range(20)]
    program = torch.export.export(torch.nn.Sequential(*layers).eval(), (torch.randn(1, 32),))
    with ThreadPoolExecutor(6) as pool:
        paths = [tmp_path / str(place) / "program.pt2" for place in range(12)]
        for path in paths:
            path.parent.mkdir()
        for done in [pool.submit(_save, program, path, "a backend") for path in paths]:
            done.result()
    assert all(path.stat().st_size for path in paths)
