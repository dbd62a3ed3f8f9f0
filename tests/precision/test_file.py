"""Plan files: what is written is read again exactly, and what nobody should have written is refused with its key."""

import json
import os
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgegen.precision.file import SIZE_LIMIT, PlanFileError, load_plan, plan_text, write_plan
from edgegen.precision.plan import Calibration, ComponentPlan, FrontPoint, OpPlan, PrecisionPlan, Range


def plan(**ops):
    made = ops or {
        "up.0.conv": OpPlan(
            op="conv",
            precision="w8a8",
            input=Range(low=-1.5, high=0.1),
            output=Range(low=-0.30000000000000004, high=7.0),
            step_inputs=(Range(low=-1.0, high=0.1), Range(low=-1.5, high=0.0)),
            weights=864,
            macs=55296,
        ),
        "up.0.proj#2": OpPlan(op="linear", precision="w4", form="palette", group=8, weights=64, macs=64),
        "quote\"dot.'é": OpPlan(op="linear", precision="fp32"),
    }
    return PrecisionPlan(
        student="toy",
        student_sha256="a" * 64,
        target="linux-x86",
        target_sha256="b" * 64,
        backends=("onnx", "tflite"),
        components={
            "denoiser": ComponentPlan(float_precision="fp32", ops=made),
            "decoder": ComponentPlan(float_precision="fp16"),
        },
        calibration=Calibration(prompts=8, seed=3, steps=(1, 4), sha256="c" * 64),
        repairs=("bias",),
        tensors_sha256="d" * 64,
        sampler={4: ((1.0, 0.99), (1.0, 1.0), (1.0, 1.01), (1.0, 1.0))},
        front=(FrontPoint(latency_ratio=0.3, bytes=7, picture_psnr_db=31.0),),
        budget={"min_psnr": 30.0},
        predicted={"picture_psnr_db": 31.25, "latency_ratio_estimated.onnx": 0.4},
    )


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_what_is_written_is_read_again(tmp_path, suffix):
    path = tmp_path / f"plan.{suffix}"
    write_plan(path, plan(), {("denoiser", "up.0.conv"): "alone w8a8 52.1 dB\nprecision = 'fp16'"})
    assert load_plan(path) == plan()
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    assert list(load_plan(path).components["denoiser"].ops) == list(plan().components["denoiser"].ops)


finite = st.floats(allow_nan=False, allow_infinity=False)
ranges = st.tuples(finite, finite).map(lambda ends: Range(low=min(ends), high=max(ends)))
some_op = st.one_of(
    st.builds(OpPlan, op=st.just("conv"), precision=st.just("w8a8"), input=ranges, output=ranges, macs=st.integers(0)),
    st.builds(OpPlan, op=st.just("matmul"), precision=st.just("w8a8-dynamic"), other=ranges),
    st.builds(OpPlan, op=st.just("linear"), precision=st.sampled_from(["w8", "w4"]), group=st.integers(0, 64)),
)
names = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, some_op, min_size=1, max_size=4))
def test_any_plan_is_read_again_from_its_text(tmp_path_factory, ops):
    folder = tmp_path_factory.mktemp("plans")
    for suffix in ("toml", "json"):
        write_plan(folder / f"a.{suffix}", plan(**ops))
        assert load_plan(folder / f"a.{suffix}") == plan(**ops)


def test_the_text_is_in_order_and_says_what_a_person_needs():
    text = plan_text(plan(), {("denoiser", "up.0.conv"): "alone w8a8 52.1 dB"})
    assert text == plan_text(plan(), {("denoiser", "up.0.conv"): "alone w8a8 52.1 dB"})
    assert '[components.denoiser.ops."up.0.conv"]\nop = "conv"\nprecision = "w8a8" # alone w8a8 52.1 dB\n' in text
    assert "weights = 864\nmacs = 55296\n" in text
    assert text.index("up.0.conv") < text.index("up.0.proj#2")
    assert text.startswith("# ")


def test_one_line_changed_is_a_valid_plan(tmp_path):
    path = tmp_path / "plan.toml"
    write_plan(path, plan())
    path.write_text(path.read_text().replace('precision = "w8a8"', 'precision = "fp32"', 1))
    found = load_plan(path)
    assert found.components["denoiser"].ops["up.0.conv"].precision == "fp32"
    assert found.components["denoiser"].ops["up.0.conv"].input == Range(low=-1.5, high=0.1)


CHANGES = [
    ('precision = "w8a8"', 'precision = "w7"', ".precision: input should be"),
    ('precision = "w8a8"', "precision = 8", ".precision: input should be"),
    ('precision = "w8a8"', 'precision = "w8a8"\ncolour = "red"', ".colour: unknown key"),
    ('op = "conv"', "", ".op: is missing"),
    ("input = {low = -1.5, high = 0.1}", "", "w8a8 wants the ranges"),
    ("low = -1.5, high = 0.1", "low = nan, high = 0.1", "input.low: nan is not a finite number"),
    ("low = -1.5, high = 0.1", "low = -1.5, high = inf", "input.high: inf is not a finite number"),
    ("low = -1.5, high = 0.1", "low = 1.5, high = 0.1", "low 1.5 is above high 0.1"),
    ("low = -1.5, high = 0.1", 'low = "-1.5", high = 0.1', "input.low: input should be a valid number"),
    ("low = -1.5, high = 0.1", "low = 1979-05-27, high = 0.1", "input.low: a date has no place in a plan"),
    ("weights = 864", "weights = 864.5", ".weights: input should be a valid integer"),
    ("weights = 864", "weights = true", ".weights: input should be a valid integer"),
    ("group = 8", "group = -8", ".group: input should be greater"),
    ('student = "toy"', "", ":student: is missing"),
    ("schema_version = 2", "schema_version = 1", ":schema_version: 1 is of an earlier edgegen"),
    ("schema_version = 2", "schema_version = 3", ":schema_version: input should be 2"),
    ('float_precision = "fp32"', 'float_precision = "w8"', ".float_precision: input should be"),
    ('form = "palette"', 'form = "affine"\noutput = 3', ".output: "),
]


@pytest.mark.parametrize(("old", "new", "message"), CHANGES)
def test_what_is_wrong_is_named_with_file_and_key(tmp_path, old, new, message):
    path = tmp_path / "plan.toml"
    write_plan(path, plan())
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(PlanFileError) as caught:
        load_plan(path)
    assert caught.value.exit_code == 2 and caught.value.hint
    assert all(line.startswith(f"{path}:") for line in caught.value.problems)
    assert any(message in line for line in caught.value.problems), caught.value.problems


HOSTILE = {
    "empty": b"",
    "no toml": b"{]",
    "not text": b"\xff\xfe\x00",
    "nested without end": b"a = " + b"[" * 100_000,
    "nested tables": b"[" + b"a." * 5_000 + b"a]",
    "huge number": b"schema_version = " + b"9" * 10_000,
    "key twice": b'student = "a"\nstudent = "b"',
    "too large": b"#" * (SIZE_LIMIT + 1),
}


@pytest.mark.parametrize("suffix", ["toml", "json"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(tmp_path, name, suffix):
    path = tmp_path / f"plan.{suffix}"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(PlanFileError, match="plan"):
        load_plan(path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo.toml")
    for name in (tmp_path / "fifo.toml", tmp_path, tmp_path / "absent.toml"):
        with pytest.raises(PlanFileError):
            load_plan(name)


def test_json_with_infinity_and_deep_nesting_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    write_plan(path, plan())
    data = json.loads(path.read_text())
    data["components"]["denoiser"]["ops"]["up.0.conv"]["input"]["low"] = float("-inf")
    path.write_text(json.dumps(data))
    with pytest.raises(PlanFileError, match="-inf is not a finite number"):
        load_plan(path)
    path.write_text("[" * 100_000)
    with pytest.raises(PlanFileError):
        load_plan(path)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "plan.toml"
    write_plan(path, plan())
    before = path.read_text()
    with pytest.raises(UnicodeEncodeError):
        write_plan(path, plan(), {("denoiser", "up.0.conv"): "\udcff"})
    assert path.read_text() == before and len(list(tmp_path.iterdir())) == 1
    assert tomllib.loads(before)["student"] == "toy"
