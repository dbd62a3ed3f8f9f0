"""`edgegen inspect` on a model and on a bundle, with and without a target."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from edgegen.cli.inspect import command
from edgegen.errors import EdgegenError, UsageError
from edgegen.inspect import inspect_bundle, inspect_student
from edgegen.lower.backend import BACKENDS
from edgegen.targets import load_target


def invoke(*arguments: object):
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def on_iphone(tiny):
    return inspect_student(tiny, load_target("iphone15"))


def test_a_model_is_counted(tiny, on_iphone):
    assert on_iphone.counted and on_iphone.kind == "model"
    for name, part in tiny.components.items():
        facts = on_iphone.components[name]
        assert facts.parameters == sum(p.numel() for p in part.module.parameters())
        assert facts.parameter_bytes == 4 * facts.parameters
        assert sum(facts.macs_by_op.values()) == facts.macs > 0
    assert on_iphone.components["decoder"].ops["aten.conv2d"] == 9
    assert set(on_iphone.sampler) == {1, 2} and on_iphone.default_steps == 2
    assert on_iphone.sampler[2] == tiny.config.sampler.table(2)


def test_what_a_target_would_refuse(on_iphone):
    target = load_target("iphone15")
    facts = {one.backend: one for one in on_iphone.backends}
    assert tuple(facts) == BACKENDS
    for name, one in facts.items():
        assert (one.denied is None) == (name in target.backends)
        if name in target.backends:
            denied = {denial.op for denial in target.backend(name).denied_ops}
            assert {refusal.op for refusal in one.refusals} <= denied
    refusals = [refusal for one in on_iphone.backends for refusal in one.refusals]
    sines = [refusal for refusal in refusals if refusal.op == "aten.sin"]
    assert sines and all(refusal.component == "denoiser" and refusal.count == 1 for refusal in sines)
    assert all(refusal.reason and refusal.reference for refusal in refusals)


def test_a_bundle_is_listed_and_not_counted(tiny_bundle):
    found = inspect_bundle(tiny_bundle)
    assert not found.counted and {one.component for one in found.artifacts} == set(found.components)
    shown = invoke(tiny_bundle)
    assert shown.exit_code == 0
    assert f"onnx fp32: {found.artifacts[0].bytes:,} bytes, executed when built" in shown.stdout
    assert "coreml: not in this bundle: not asked for" in shown.stdout
    assert "sampler, 2 steps (default)" in shown.stdout
    assert "built for linux-x86" in shown.stdout and "backends" not in shown.stdout
    asked = inspect_bundle(tiny_bundle, load_target("iphone15"))
    assert (asked.built_for, asked.target) == ("linux-x86", "iphone15")
    assert "inspect the model" in shown.stderr
    assert invoke(tiny_bundle, "-q").stderr == ""


def test_json_is_the_whole_inspection(tiny_bundle):
    shown = invoke(tiny_bundle, "--json")
    assert json.loads(shown.stdout) == inspect_bundle(tiny_bundle).model_dump(mode="json")


def test_the_shipped_model_by_its_path(shapes):
    from edgegen.students.shapes.family import WEIGHTS

    shown = invoke(WEIGHTS, "--target", "linux-x86")
    assert shown.exit_code == 0
    parameters = sum(p.numel() for part in shapes.components.values() for p in part.module.parameters())
    assert f"together: {parameters:,} parameters" in shown.stdout
    assert "backends on linux-x86" in shown.stdout and "coreml: refused" in shown.stdout


def test_refusals(tmp_path, tiny_bundle):
    with pytest.raises(UsageError, match="does not exist"):
        invoke(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="iphone99"):
        invoke(tiny_bundle, "--target", "iphone99")
    (tmp_path / "junk.pt").write_text("junk")
    with pytest.raises(EdgegenError, match=r"junk\.pt"):
        invoke(tmp_path / "junk.pt")
