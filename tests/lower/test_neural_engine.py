"""The lint of saved packages for the Neural Engine, what else is read of them, and `edgegen inspect` on both."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgegen.cli.inspect import command
from edgegen.errors import EdgegenError
from edgegen.inspect import inspect_bundle, inspect_path
from edgegen.lower.neural_engine import SEVERITIES, habits, lint
from edgegen.lower.package_facts import is_package, package_facts

pytest.importorskip("coremltools")
MODEL = "Data/com.apple.CoreML/model.mlmodel"


def save(build, shapes, path, target="iOS18", states=()):
    """A program of fp16 operations: `build(mb, placeholders)` returns what it gives, by name."""
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, types
    from coremltools.converters.mil.mil import Program as MilProgram

    program = MilProgram()
    holders = {name: mb.placeholder(shape, dtype=types.fp16) for name, shape in shapes.items()}
    holders |= {name: mb.state_tensor_placeholder(shape, dtype=types.fp16) for name, shape in states}
    with Function(holders, opset_version=ct.target[target]) as function:
        results = build(mb, function.inputs)
        function.set_outputs([mb.identity(x=value, name=name) for name, value in results.items()])
    program.add_function("main", function)
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target[target],
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.save(str(path))
    return path


HALF = np.float16
RNG = np.random.default_rng(0)


def weight(*shape):
    return RNG.standard_normal(shape).astype(HALF)


def clean(mb, holders):
    """What the Neural Engine likes: rank 4, channels first, fp16, rows of 64 bytes."""
    value = mb.conv(x=holders["x"], weight=weight(8, 4, 1, 1), name="mix")
    return {"y": mb.silu(x=value)}


def guilty(mb, holders):
    """At least one operation for each rule about operations."""
    x = holders["x"]
    six = mb.reshape(x=x, shape=[2, 2, 4, 2, 32], name="six")  # of rank 6 once it is saved: coremltools makes none
    narrow = mb.reshape(x=mb.tile(x=x, reps=[1, 8, 8, 1]), shape=[1, 65536, 1], name="narrow")
    wide = mb.exp(x=mb.cast(x=x, dtype="fp32"), name="wide")
    far = mb.conv(x=x, weight=weight(4, 4, 3, 3), dilations=[2, 2], pad_type="same", name="far")
    mask = np.triu(np.full((8, 32), -np.inf, HALF), 1)
    masked = mb.add(x=x, y=mask, name="masked")
    flat = mb.reshape(x=x, shape=[32, 32])
    linear = mb.linear(x=flat, weight=weight(16, 32), name="flat")
    places = mb.cast(x=mb.reduce_argmax(x=flat, axis=-1), dtype="int32")
    picked = mb.gather(x=flat, indices=mb.add(x=places, y=np.int32(0), name="places"), axis=0, name="picked")
    codes = mb.quantize(input=x, scale=HALF(0.1), output_dtype="int8", name="codes")
    turned = x
    for at in range(6):
        turned = mb.transpose(x=turned, perm=[0, 1, 3, 2], name=f"turn{at}")
    return {
        "six_y": mb.reshape(x=six, shape=[32, 32]),
        "narrow_y": narrow,
        "wide_y": mb.cast(x=wide, dtype="fp16"),
        "far_y": far,
        "masked_y": masked,
        "linear_y": linear,
        "picked_y": picked,
        "codes_y": mb.dequantize(input=codes, scale=HALF(0.1)),
        "turned_y": turned,
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linted")
    shapes = {"x": (1, 4, 8, 32)}
    packages = {
        "clean": save(clean, shapes, folder / "clean.mlpackage"),
        "guilty": save(guilty, shapes, folder / "guilty.mlpackage"),
    }
    edit(packages["guilty"], deepen)
    return packages


def deepen(_, block):
    kind = (
        next(one for one in block.operations if one.outputs and one.outputs[0].name == "six").outputs[0].type.tensorType
    )
    kind.rank = 6
    kind.dimensions.add().constant.size = 1


def found(report, rule, op=""):
    (one,) = [one for one in report.findings if one.rule == rule and (not op or one.op == op)]
    return one


def test_a_program_that_is_well_has_no_findings(saved):
    report = lint(saved["clean"])
    assert report.findings == () and report.operations == 3
    assert report.details() == {"neural_engine_lint": "nothing found"} and report.notes() == ()
    assert "not measurements" in report.caveat


@pytest.mark.parametrize(
    ("rule", "op", "severity", "operations", "detail"),
    [
        ("rank", "reshape", "leaves", ["six"], "rank 6"),
        ("alignment", "reshape", "slows", ["narrow"], "rows of 2 bytes take 64"),
        ("dtype", "exp", "leaves", ["wide"], "fp32[1, 4, 8, 32]"),
        ("dilation", "conv", "leaves", ["far"], "dilations [2, 2]"),
        ("mask", "add", "breaks", ["masked"], "down to -inf"),
        ("linear", "linear", "slows", ["flat"], "fp16[32, 16]"),
        ("integers", "add", "leaves", ["places"], ""),
        ("op", "gather", "leaves", ["picked"], ""),
        ("int8-activations", "quantize", "slows", ["codes"], ""),
        ("transposes", "transpose", "slows", [f"turn{at}" for at in range(6)], "6 for 2 products"),
    ],
)
def test_a_habit_is_found_where_it_is(saved, rule, op, severity, operations, detail):
    one = found(lint(saved["guilty"]), rule, op)
    assert one.severity == severity and detail in one.places[0].detail
    assert set(operations) <= {place.operation for place in one.places}
    assert all(place.function == "main" for place in one.places)
    assert one.reason and one.advice and one.reference and one.known in ("documented", "reported", "assumed")


def test_findings_are_in_order_and_told(saved):
    report = lint(saved["guilty"], modules={"picked": "text.embedding", "turn0": "block.attention"})
    order = [SEVERITIES.index(one.severity) for one in report.findings]
    assert order == sorted(order) and set(order) == {0, 1, 2}
    assert sum(report.counts().values()) == sum(len(one.places) for one in report.findings)
    assert [part.split()[1] for part in report.details()["neural_engine_lint"].split(", ")] == list(SEVERITIES)
    gather = found(report, "op", "gather")
    assert gather.places[0].module == "text.embedding" and "`text.embedding`" in gather.line()
    assert len(report.notes()) == sum(one.severity != "slows" for one in report.findings)
    assert found(report, "transposes").places[0].module == "block.attention"
    assert type(report).model_validate_json(report.model_dump_json()) == report


def test_every_rule_of_the_list_has_a_check(saved, tmp_path, monkeypatch):
    """Those about operations are in `guilty`; shapes, weight files and control flow are met here."""
    from edgegen.lower import neural_engine

    met = {one.rule for one in lint(saved["guilty"]).findings} - {"op"}
    opened = shutil.copytree(saved["clean"], tmp_path / "opened.mlpackage")
    edit(opened, lambda spec, _: spec.mlProgram.functions["main"].inputs[0].type.tensorType.dimensions[0].Clear())
    edit(
        opened,
        lambda spec, _: setattr(
            spec.mlProgram.functions["main"].inputs[0].type.tensorType.dimensions[0].unknown, "variadic", False
        ),
    )
    edit(opened, lambda _, block: setattr(operation(block, "silu"), "type", "while_loop"))
    small = habits()
    monkeypatch.setattr(
        neural_engine,
        "habits",
        lambda: small.model_copy(update={"limits": small.limits.model_copy(update={"weight_file_bytes": 64})}),
    )
    report = lint(opened)
    assert found(report, "dynamic-shape").places[0].operation == "x"
    assert found(report, "control-flow").op == "while_loop"
    assert found(report, "weight-file").places[0].operation == "weights/weight.bin"
    assert met | {"dynamic-shape", "control-flow", "weight-file"} == set(small.rules)


def edit(package, change):
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    spec.ParseFromString((package / MODEL).read_bytes())
    change(spec, next(iter(spec.mlProgram.functions["main"].block_specializations.values())))
    (package / MODEL).write_bytes(spec.SerializeToString())


def operation(block, kind):
    return next(one for one in block.operations if one.type == kind)


def test_an_unknown_operation_is_listed(saved, tmp_path):
    """The evaluator refuses it; whoever reads a package wants to see it."""
    package = shutil.copytree(saved["clean"], tmp_path / "odd.mlpackage")
    edit(package, lambda _, block: setattr(operation(block, "silu"), "type", "mystery"))
    (function,) = package_facts(package).functions
    assert function.operations == {"conv": 1, "mystery": 1, "identity": 1}


def test_facts_of_a_package(saved):
    facts = package_facts(saved["clean"])
    (function,) = facts.functions
    assert (facts.specification_version, facts.operation_sets, function.name) == (9, ("CoreML8",), "main")
    assert [(one.name, one.dtype, one.shape) for one in function.inputs] == [("x", "fp16", (1, 4, 8, 32))]
    assert [(one.name, one.shape) for one in function.outputs] == [("y", (1, 8, 8, 32))]
    assert function.computes == {"fp16": 3} and function.states == ()
    (weights,) = facts.weights
    assert (weights.kind, weights.tensors, weights.elements, weights.bytes) == ("fp16", 1, 32, 64)
    assert facts.weight_files == {"weights/weight.bin": 192}
    assert package_facts(saved["clean"] / "main") == facts
    with pytest.raises(EdgegenError, match="no function `draw`"):
        lint(saved["clean"] / "draw")


def test_facts_of_states_and_compressed_weights(tmp_path):
    def build(mb, holders):
        codes = np.arange(64, dtype=np.int8).reshape(8, 8, 1, 1)
        scale = np.full((8, 1, 1, 1), 0.5, HALF)
        packed = mb.constexpr_blockwise_shift_scale(data=codes, scale=scale, name="packed")
        kept = mb.read_state(input=holders["kept"])
        value = mb.conv(x=mb.add(x=holders["x"], y=kept), weight=packed)
        mb.coreml_update_state(state=holders["kept"], value=value)
        return {"y": value}

    path = save(build, {"x": (1, 8, 4, 32)}, tmp_path / "kept.mlpackage", states=[("kept", (1, 8, 4, 32))])
    facts = package_facts(path)
    assert [(one.name, one.dtype) for one in facts.functions[0].states] == [("kept", "fp16")]
    assert [one.name for one in facts.functions[0].inputs] == ["x"]
    (weights,) = [one for one in facts.weights if one.kind.startswith("constexpr")]
    assert (weights.elements, weights.bytes) == (64, 64 + 8 * 2)
    shown = CliRunner().invoke(command, [str(path)], catch_exceptions=False)
    assert "keeps kept fp16[1, 8, 4, 32] between calls" in shown.stdout


def test_inspect_reads_a_package(saved):
    shown = CliRunner().invoke(command, [str(saved["guilty"])], catch_exceptions=False)
    assert shown.exit_code == 0
    for text in (
        "Core ML package guilty.mlpackage: specification 9",
        "main: x fp16[1, 4, 8, 32] -> ",
        "they give fp16",
        "weights/weight.bin: ",
        "breaks: add x1 (fp16[8, 32] down to -inf",
        "not measurements",
        "mask with -6e4",
    ):
        assert text in shown.stdout, text
    asked = CliRunner().invoke(command, [str(saved["guilty"]), "--json"], catch_exceptions=False)
    assert json.loads(asked.stdout) == inspect_path(saved["guilty"]).model_dump(mode="json")


def test_what_is_no_package_is_refused_with_what_to_do(saved, tmp_path):
    broken = shutil.copytree(saved["clean"], tmp_path / "broken.mlpackage")
    (broken / MODEL).write_bytes((broken / MODEL).read_bytes()[:200])
    compiled = tmp_path / "model.mlmodelc"
    compiled.mkdir()
    file = tmp_path / "model.mlmodel"
    file.write_bytes(b"x")
    for path, message, hint in (
        (broken, "cut off", "copy the package again"),
        (compiled, "compiled model", "name the `.mlpackage`"),
        (file, "is a file", "folder itself"),
    ):
        assert is_package(path)
        with pytest.raises(EdgegenError, match=message) as caught:
            inspect_path(path)
        assert hint in caught.value.hint


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
    kept=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_any_model_is_read_or_refused(saved, tmp_path, changes, kept):
    package = tmp_path / "fuzzed.mlpackage"
    if not package.exists():
        shutil.copytree(saved["guilty"], package)
    data = bytearray((saved["guilty"] / MODEL).read_bytes())
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    (package / MODEL).write_bytes(data[: int(kept * len(data))])
    try:
        facts = package_facts(package)
    except EdgegenError as error:
        assert str(error)
    else:
        assert json.loads(facts.model_dump_json())


def test_a_bundle_without_core_ml_has_no_packages(tiny_bundle):
    assert all(one.package is None for one in inspect_bundle(tiny_bundle).artifacts)


def test_a_bundle_shows_its_packages(saved, tiny_bundle, monkeypatch):
    from edgegen.bundle.open import Bundle

    first = inspect_bundle(tiny_bundle).artifacts[0]
    place = tiny_bundle / "components" / "coreml"
    place.mkdir()
    shutil.copytree(saved["guilty"], place / "model.mlpackage")
    original = tiny_bundle / "manifest.json"
    manifest = json.loads(original.read_text())
    for one in manifest["artifacts"]:
        if one["component"] == first.component:
            one |= {"backend": "coreml", "path": "components/coreml/model.mlpackage"}
    changed = type(_manifest(tiny_bundle)).model_validate(manifest)
    monkeypatch.setattr("edgegen.bundle.open.open_bundle", lambda path: Bundle(tiny_bundle, changed))
    found = inspect_bundle(tiny_bundle)
    (package,) = [one.package for one in found.artifacts if one.package is not None]
    assert package.name == "model.mlpackage" and package.lint.findings == lint(saved["guilty"]).findings
    shown = CliRunner().invoke(command, [str(tiny_bundle)], catch_exceptions=False)
    assert "Neural Engine: " in shown.stdout and "breaks: add x1" in shown.stdout


def _manifest(path):
    from edgegen.bundle.open import open_bundle

    return open_bundle(path).manifest
