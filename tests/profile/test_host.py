import time
from types import SimpleNamespace

import numpy as np
import pytest

from edgegen.errors import EdgegenError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.profile.host import AlreadyTimed, ProfileReport, profile, this_host
from edgegen.verify.timed import Timed
from edgegen.verify.trajectory import Sample, Signature

X = TensorSpec(name="x", shape=(2,))
SIGNATURES = {"model": Signature((X,), (X,))}
SAMPLES = {
    "model": tuple(Sample(label, {"x": np.zeros(2, np.float32)}, {"x": np.zeros(2, np.float32)}) for label in "ab")
}


class Sleeper:
    def __init__(self, calls, seconds):
        self.calls, self.seconds = calls, seconds

    def __call__(self, inputs):
        self.calls.append("run")
        time.sleep(self.seconds)
        return dict(inputs)

    def close(self):
        self.calls.append("close")


def backend(calls, seconds=0.002, load_seconds=0.005, reason=None, fail=None):
    def load(path, inputs, outputs):
        if fail:
            raise fail
        calls.append("load")
        time.sleep(load_seconds)
        return Sleeper(calls, seconds)

    return SimpleNamespace(
        name="sleeper", distributions=("numpy", "not-installed"), not_executed_here=lambda: reason, load=load
    )


def test_times_are_those_of_the_calls(tmp_path):
    calls = []
    report = profile(backend(calls), {"model": tmp_path}, SIGNATURES, SAMPLES, warm_up=2, runs=5, loads=3)
    (part,) = report.components
    assert report.kind == "measured"
    assert set(part.runs) == {"a", "b"}
    for timing in part.runs.values():
        assert timing.samples == 5 and timing.warm_up == 2
        assert 2.0 <= timing.p10_ms <= timing.median_ms <= timing.p90_ms < 200
    assert part.run.samples == 10
    assert part.load.samples == 3 and part.load.median_ms >= 5.0 and part.first_load_ms >= 5.0
    assert calls.count("run") == 2 + 2 * 5
    assert calls.count("load") == calls.count("close") == 3
    assert report.runtimes == {"numpy": np.__version__}
    assert ProfileReport.model_validate_json(report.model_dump_json()) == report


def test_the_whole_picture_is_measured_and_not_summed(tmp_path):
    report = profile(
        backend([]), {"model": tmp_path}, SIGNATURES, SAMPLES, runs=3,
        picture=lambda loaded: [loaded["model"]({}) for _ in range(4)], picture_steps=4,
    )  # fmt: skip
    assert report.picture is not None and report.picture.median_ms >= 8.0 and report.picture_steps == 4


def test_slow_artifacts_are_called_fewer_times_but_never_fewer_than_three(tmp_path):
    calls = []
    slow = backend(calls, seconds=0.02)
    report = profile(slow, {"model": tmp_path}, SIGNATURES, SAMPLES, runs=1000, seconds_per_component=0.001, loads=1)
    assert all(timing.samples == 3 for timing in report.components[0].runs.values())


def timed(calls, times, load_seconds=0.0):
    made = Timed(Sleeper(calls, 0.0), load_seconds)
    made.calls += times
    return made


def test_what_verification_timed_long_enough_is_not_called_again(tmp_path):
    calls = []
    already = AlreadyTimed({"model": timed(calls, [9.0, 0.5, 0.6, 0.7], load_seconds=3.0)}, (2.0, 2.1, 2.2))
    report = profile(
        backend(calls), {"model": tmp_path}, SIGNATURES, SAMPLES,
        seconds_per_component=1.5, already=already, picture=lambda loaded: pytest.fail("drawn"), picture_steps=1,
    )  # fmt: skip
    (part,) = report.components
    assert part.while_verifying and part.run.median_ms == 600.0 and part.run.samples == 3 and part.run.warm_up == 1
    assert part.load.samples == 1 and part.first_load_ms == 3000.0
    assert report.picture.median_ms == 2100.0 and report.picture.samples == 3
    assert calls == ["close"]


def test_what_verification_timed_too_briefly_is_measured(tmp_path):
    calls = []
    already = AlreadyTimed({"model": timed(calls, [0.001] * 9, load_seconds=0.001)}, (0.001,) * 9)
    report = profile(
        backend(calls), {"model": tmp_path}, SIGNATURES, SAMPLES, runs=4, already=already,
        picture=lambda loaded: loaded["model"]({}), picture_steps=1,
    )  # fmt: skip
    (part,) = report.components
    assert not part.while_verifying and set(part.runs) == {"a", "b"} and part.run.samples == 8
    assert part.load.samples == 3 and part.first_load_ms == 1.0 and calls.count("load") == 2
    assert report.picture.samples == 4


def test_a_backend_that_cannot_run_here_has_no_numbers(tmp_path):
    calls = []
    report = profile(backend(calls, reason="macOS only"), {"model": tmp_path}, SIGNATURES, SAMPLES)
    assert report.not_measured_because == "macOS only"
    assert not report.components and report.picture is None and not calls


def test_what_something_else_than_the_runtime_executes_has_no_times(tmp_path):
    calls = []
    here = backend(calls)
    names = ("evaluator_missing", "evaluator", "each_value", "nodes_of_values", "value_stem")
    unused = dict.fromkeys(names, lambda *arguments: pytest.fail("asked for"))
    stand_in = SimpleNamespace(**vars(here), executed_by=lambda: "an abacus, not by Core ML", **unused)
    report = profile(stand_in, {"model": tmp_path}, SIGNATURES, SAMPLES)
    assert "executed here by an abacus, not by Core ML" in report.not_measured_because
    assert not report.components and report.picture is None and not calls


def test_an_artifact_that_does_not_load_is_an_error_with_the_reason(tmp_path):
    with pytest.raises(EdgegenError, match="profiling `sleeper` failed: ValueError: bad magic"):
        profile(backend([], fail=ValueError("bad magic")), {"model": tmp_path}, SIGNATURES, SAMPLES)


def test_the_executables_are_closed_even_when_one_breaks(tmp_path):
    calls = []

    def explode(loaded):
        raise RuntimeError("boom")

    with pytest.raises(EdgegenError, match="boom"):
        profile(backend(calls), {"model": tmp_path}, SIGNATURES, SAMPLES, runs=1, picture=explode)
    assert calls.count("load") == calls.count("close")


def test_the_host_is_named():
    host = this_host()
    assert host.cpu and host.os and host.cpus_usable >= 1
