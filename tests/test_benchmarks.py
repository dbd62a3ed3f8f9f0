"""What the benchmarks under `tools/` share."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

TOOLS = str(Path(__file__).parents[1] / "tools")


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module


def test_calls_are_made_in_turns_and_the_first_do_not_count(tool, monkeypatch):
    turns = tool("turns")
    now, order = [0.0], []
    monkeypatch.setattr(turns.time, "perf_counter", lambda: now[0])

    def call(name, seconds, first):
        def made():
            order.append(name)
            now[0] += first if order.count(name) <= turns.WARM_UP else seconds

        return made

    assert turns.in_turns([call("a", 1.0, 100.0), call("b", 2.0, 50.0)], 4) == [1.0, 2.0]
    assert order == ["a", "b"] * (turns.WARM_UP + 4)


def test_the_head_of_a_table_names_no_path_of_this_machine(tool, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools/bench_int8.py", "--nncf-python", "/somewhere/env/bin/python"])
    said = tool("turns").settings_of(["onnx"], 2, repeats="3 calls")
    assert said["command"] == "python tools/bench_int8.py --nncf-python python"
    assert said["repeats"] == "3 calls" and "onnxruntime" in said["versions"]


def test_a_table_says_why_an_artifact_has_no_numbers(tool):
    rows = tool("int8_rows")
    made = rows.Row(model="S64", backend="onnx", row="plain fp32", megabytes=50.0, sqnr_db=110.0, ms=2.0, to_fp32=1.0)
    missing = rows.Row(model="S64", backend="onnx", row="NNCF", note="not measured: NNCF not installed")
    text = rows.markdown("INT8", {"threads": "2"}, [made, missing]).splitlines()
    assert text[0] == "# INT8" and "- threads: 2" in text and "## S64 on onnx" in text
    assert "| plain fp32 | 50.0 | 110.0 | 2.0 | 1.0 | - | - |  |" in text
    assert "| NNCF | - | - | - | - | - | - | not measured: NNCF not installed |" in text


def test_a_network_alone_is_judged_on_what_nothing_was_calibrated_on(tool, monkeypatch):
    subjects = tool("subjects")
    tiny = subjects.UNetConfig(
        sample_size=8, block_out_channels=(32, 64), cross_attention=(False, True), num_heads=4, cross_attention_dim=16
    )
    monkeypatch.setattr(subjects, "SMALL", tiny)
    (subject,) = subjects.subjects("S64", ())
    assert len(subject.part.samples()) == len(subject.calibration) == subjects.CALLS["S64"]
    for given, own in zip(subject.calibration, subject.part.samples(), strict=True):
        assert all((given[spec.name] == one).all() for spec, one in zip(subject.part.inputs, own, strict=True))
        assert not (given["latent"] == subject.held_out[0]["latent"]).all()
    assert tuple(subject.module(*subject.example).shape) == (1, 4, 8, 8)
