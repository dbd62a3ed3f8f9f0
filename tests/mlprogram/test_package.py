"""Packages that are broken or hostile: a clear error each, and nothing read outside of the package."""

import json
import os
import resource
import shutil
import struct
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlprogram import Program, ProgramError

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
GIVEN = {"x": np.ones((2, 8), np.float32)}


@pytest.fixture(scope="module")
def original(packages):
    weight = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)

    def build(mb, holders):
        value = mb.linear(x=holders["x"], weight=weight, bias=np.arange(6, dtype=np.float32))
        packed = mb.constexpr_blockwise_shift_scale(
            data=np.int8(weight * 40), scale=np.full((6, 1), 0.025, np.float32), offset=np.zeros((6, 1), np.int8)
        )
        return {"y": mb.gelu(x=value, mode="EXACT"), "z": mb.linear(x=holders["x"], weight=packed)}

    path = packages.operations(build, GIVEN)
    assert set(Program.open(path)(GIVEN)) == {"y", "z"}
    return path


@pytest.fixture
def package(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model.mlpackage")


def edit(package, change):
    """Rewrite the model's protobuf."""
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    spec.ParseFromString((package / MODEL).read_bytes())
    change(spec, next(iter(spec.mlProgram.functions["main"].block_specializations.values())))
    (package / MODEL).write_bytes(spec.SerializeToString())


def operation(block, kind):
    return next(one for one in block.operations if one.type == kind)


def stored(block):
    """The `Value` messages that lie in the weight file."""
    found = [one.attributes["val"] for one in block.operations if one.type == "const"]
    found += [
        binding.value
        for one in block.operations
        for argument in one.inputs.values()
        for binding in argument.arguments
        if binding.WhichOneof("binding") == "value"
    ]
    return [one for one in found if one.WhichOneof("value") == "blobFileValue"]


def manifest(package, change):
    path = package / "Manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def model_entry(content):
    return content["itemInfoEntries"][content["rootModelIdentifier"]]


def make_state(spec, _block):
    """The input becomes a state of its own type."""
    kind = spec.mlProgram.functions["main"].inputs[0].type
    tensor = kind.tensorType.__class__.FromString(kind.tensorType.SerializeToString())
    kind.stateType.wrappedType.tensorType.CopyFrom(tensor)


def open_shape(spec):
    kind = spec.mlProgram.functions["main"].inputs[0].type.stateType.wrappedType.tensorType
    kind.dimensions[0].unknown.variadic = False


def link_out(package, relative):
    outside = package.parent / "outside"
    shutil.move(package / relative, outside)
    (package / relative).symlink_to(outside)


def write_at(package, offset, data):
    with (package / WEIGHTS).open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def resize_weight(package, count):
    os.truncate(package / WEIGHTS, count)


BROKEN = {
    "no manifest": (lambda p: (p / "Manifest.json").unlink(), "no `Manifest.json`"),
    "a manifest that is no json": (lambda p: (p / "Manifest.json").write_text("{"), "does not say"),
    "a manifest that is deep": (lambda p: (p / "Manifest.json").write_text("[" * 100_000), "does not say"),
    "a manifest that is large": (lambda p: (p / "Manifest.json").write_text(" " * (2 << 20)), "larger than 1 MiB"),
    "a manifest of other things": (lambda p: (p / "Manifest.json").write_text("[1]"), "does not say"),
    "a manifest that is a pipe": (
        lambda p: ((p / "Manifest.json").unlink(), os.mkfifo(p / "Manifest.json")),
        "no file",
    ),
    "a model path up": (
        lambda p: manifest(p, lambda m: model_entry(m).update(path="../../../etc/passwd")),
        "leaves the package",
    ),
    "an absolute model path": (lambda p: manifest(p, lambda m: model_entry(m).update(path="/etc/passwd")), "missing"),
    "a model path that is a number": (lambda p: manifest(p, lambda m: model_entry(m).update(path=3)), "does not say"),
    "a missing model": (lambda p: (p / MODEL).unlink(), "missing"),
    "a model that is a link out": (lambda p: link_out(p, MODEL), "link that leaves"),
    "weights that are a link out": (lambda p: link_out(p, WEIGHTS), "link that leaves"),
    "a folder that is a link out": (lambda p: link_out(p, "Data"), "link that leaves"),
    "a manifest that is a link out": (lambda p: link_out(p, "Manifest.json"), "link that leaves"),
    "a model that is a device": (
        lambda p: ((p / MODEL).unlink(), os.mkfifo(p / MODEL)),
        "missing",
    ),
    "a model that is cut off": (lambda p: os.truncate(p / MODEL, 700), "cut off"),
    "an empty model": (lambda p: os.truncate(p / MODEL, 0), "model without content"),
    "a model that is noise": (lambda p: (p / MODEL).write_bytes(b"\xff" * 999), "cut off"),
    "a neural network": (lambda p: edit(p, lambda spec, _: spec.neuralNetwork.SetInParent()), "holds a neuralNetwork"),
    "a newer version": (
        lambda p: edit(p, lambda spec, _: setattr(spec, "specificationVersion", 99)),
        "specification version 99",
    ),
    "missing weights": (lambda p: (p / WEIGHTS).unlink(), "missing"),
    "empty weights": (lambda p: resize_weight(p, 0), "cannot be read"),
    "weights cut off in the header": (lambda p: resize_weight(p, 40), "cut off in its header"),
    "weights cut off": (lambda p: resize_weight(p, 200), "says bytes|outside of the file"),
    "weights of another version": (lambda p: write_at(p, 4, struct.pack("<I", 9)), "storage version 9"),
    "no sentinel": (lambda p: write_at(p, 64, b"\0\0\0\0"), "no sentinel"),
    "another type": (lambda p: write_at(p, 68, struct.pack("<I", 3)), "type code 3"),
    "another size": (lambda p: write_at(p, 72, struct.pack("<Q", 1 << 40)), "elements of fp32 were expected"),
    "data beyond the end": (lambda p: write_at(p, 80, struct.pack("<Q", 1 << 62)), "says bytes"),
    "data before the start": (lambda p: write_at(p, 80, struct.pack("<Q", 0)), "says bytes"),
    "an offset beyond the end": (
        lambda p: edit(p, lambda _, b: setattr(stored(b)[0].blobFileValue, "offset", 1 << 63)),
        "outside of the file",
    ),
    "an offset between": (
        lambda p: edit(p, lambda _, b: setattr(stored(b)[0].blobFileValue, "offset", 67)),
        "not aligned",
    ),
    "a weight file up": (
        lambda p: edit(p, lambda _, b: setattr(stored(b)[0].blobFileValue, "fileName", "@model_path/../../../x")),
        "leaves the package",
    ),
    "an absolute weight file": (
        lambda p: edit(p, lambda _, b: setattr(stored(b)[0].blobFileValue, "fileName", "/etc/passwd")),
        "not below",
    ),
    "a weight file in the root": (
        lambda p: edit(p, lambda _, b: setattr(stored(b)[0].blobFileValue, "fileName", "@model_path//etc/passwd")),
        "leaves the package",
    ),
    "a constant of another size": (
        lambda p: edit(p, lambda _, b: setattr(stored(b)[0].type.tensorType.dimensions[0].constant, "size", 7)),
        "elements of fp32 were expected",
    ),
    "a constant of any size": (
        lambda p: edit(p, lambda _, b: setattr(stored(b)[0].type.tensorType.dimensions[0].constant, "size", 1 << 31)),
        "GiB",
    ),
    "an empty constant of any size": (
        lambda p: edit(
            p,
            lambda _, b: [
                setattr(one.constant, "size", size)
                for one, size in zip(stored(b)[0].type.tensorType.dimensions, (0, (1 << 64) - 1), strict=True)
            ],
        ),
        "dimension",
    ),
    "an unknown operation": (
        lambda p: edit(p, lambda _, b: setattr(operation(b, "gelu"), "type", "mystery")),
        r"`gelu_0` \(mystery\) of `model.mlpackage` is not known",
    ),
    "control flow": (lambda p: edit(p, lambda _, b: operation(b, "gelu").blocks.add()), "control flow"),
    "an unknown parameter": (
        lambda p: edit(p, lambda _, b: operation(b, "gelu").inputs["beta"].CopyFrom(operation(b, "gelu").inputs["x"])),
        "parameter `beta` that is not known",
    ),
    "an unknown attribute": (
        lambda p: edit(
            p, lambda _, b: operation(b, "gelu").attributes["beta"].CopyFrom(operation(b, "gelu").attributes["name"])
        ),
        "parameter `beta` that is not known",
    ),
    "a missing parameter": (
        lambda p: edit(p, lambda _, b: operation(b, "gelu").inputs.pop("x")),
        "has no parameter `x`",
    ),
    "a parameter without value": (
        lambda p: edit(p, lambda _, b: operation(b, "gelu").inputs["x"].ClearField("arguments")),
        "has 0 values",
    ),
    "an empty binding": (
        lambda p: edit(p, lambda _, b: operation(b, "gelu").inputs["x"].arguments[0].Clear()),
        "without a type",
    ),
    "an unknown mode": (
        lambda p: edit(
            p,
            lambda _, b: operation_const(b, "gelu", "mode").strings.values.__setitem__(0, "GUESS"),
        ),
        "is `GUESS`, known are EXACT",
    ),
    "a value from nowhere": (
        lambda p: edit(p, lambda _, b: setattr(operation(b, "gelu").inputs["x"].arguments[0], "name", "nowhere")),
        "reads `nowhere`, which is not computed before",
    ),
    "a value of its own": (
        lambda p: edit(
            p,
            lambda _, b: setattr(
                operation(b, "gelu").inputs["x"].arguments[0], "name", operation(b, "gelu").outputs[0].name
            ),
        ),
        "not computed before",
    ),
    "a value defined twice": (
        lambda p: edit(p, lambda _, b: setattr(operation(b, "gelu").outputs[0], "name", "x")),
        "`x` of `model.mlpackage` is defined twice",
    ),
    "no output": (lambda p: edit(p, lambda _, b: operation(b, "gelu").ClearField("outputs")), "has 0 outputs"),
    "an output that is not computed": (
        lambda p: edit(p, lambda _, b: b.outputs.append("w")),
        "`w` of .* is not computed",
    ),
    "no outputs at all": (lambda p: edit(p, lambda _, b: b.ClearField("outputs")), "returns"),
    "an output that is not described": (lambda p: edit(p, lambda _, b: b.outputs.pop()), "describes other outputs"),
    "an input that is described otherwise": (
        lambda p: edit(p, lambda spec, _: spec.description.input[0].type.multiArrayType.shape.__setitem__(0, 5)),
        "is described as",
    ),
    "an image": (
        lambda p: edit(p, lambda spec, _: spec.description.input[0].type.imageType.SetInParent()),
        "is a imageType",
    ),
    "a state that is read as a value": (lambda p: edit(p, make_state), "reads `x`, which is a state"),
    "a state without a type": (
        lambda p: edit(
            p, lambda spec, _: spec.mlProgram.functions["main"].inputs[0].type.stateType.wrappedType.SetInParent()
        ),
        "without a type",
    ),
    "a state of open shape": (
        lambda p: edit(p, lambda spec, b: (make_state(spec, b), open_shape(spec))),
        "state `x` is .* whose shape is not fixed",
    ),
    "a read of what is no state": (
        lambda p: edit(
            p,
            lambda _, b: (
                setattr(operation(b, "gelu"), "type", "read_state"),
                operation(b, "read_state").inputs["input"].CopyFrom(operation(b, "read_state").inputs["x"]),
            ),
        ),
        "which is no state",
    ),
    "no function": (lambda p: edit(p, lambda spec, _: spec.mlProgram.functions.clear()), "no function `main`"),
    "no block": (
        lambda p: edit(p, lambda spec, _: setattr(spec.mlProgram.functions["main"], "opset", "CoreML99")),
        "no block",
    ),
    "a compiled model": (lambda p: (p / "coremldata.bin").write_bytes(b""), "compiled model"),
}


def operation_const(block, kind, parameter):
    name = operation(block, kind).inputs[parameter].arguments[0].name
    constant = next(one for one in block.operations if one.type == "const" and one.outputs[0].name == name)
    return constant.attributes["val"].immediateValue.tensor


@pytest.mark.parametrize("what", BROKEN)
def test_broken_package_is_refused_when_it_is_opened(package, what):
    change, message = BROKEN[what]
    change(package)
    with pytest.raises(ProgramError, match=message):
        Program.open(package)


@pytest.mark.parametrize(
    ("what", "hint"),
    {
        "no manifest": "folder itself",
        "a model path up": "trust",
        "a model that is a link out": "trust",
        "a weight file up": "trust",
        "a model that is cut off": "copy the package again",
        "weights cut off": "copy the package again",
        "data beyond the end": "copy the package again",
        "no sentinel": "copy the package again",
        "a neural network": 'convert_to="mlprogram"',
        "a newer version": "minimum_deployment_target",
        "a compiled model": "name the `.mlpackage`",
        "an unknown operation": "Core ML itself",
    }.items(),
)
def test_a_refusal_says_what_to_do(package, what, hint):
    BROKEN[what][0](package)
    with pytest.raises(ProgramError) as caught:
        Program.open(package)
    assert hint in caught.value.hint


@pytest.mark.parametrize("kind", ["file", "nothing", "compiled"])
def test_what_is_no_folder_of_a_package(tmp_path, kind):
    path = tmp_path / ("model.mlmodelc" if kind == "compiled" else "model.mlmodel")
    if kind == "file":
        path.write_bytes(b"x")
    with pytest.raises(ProgramError, match={"file": "is a file", "nothing": "cannot be opened"}.get(kind, "compiled")):
        Program.open(path)


def test_a_type_that_is_not_what_the_operation_makes(package):
    edit(
        package,
        lambda _, b: setattr(operation(b, "linear").outputs[0].type.tensorType.dimensions[1].constant, "size", 5),
    )
    program = Program.open(package)
    with pytest.raises(ProgramError, match=r"operation `linear_0` \(linear\) .* declared fp32\[2, 5\]"):
        program(GIVEN)


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"x": np.ones((2, 8), np.float32), "w": np.ones(1, np.float32)},
        {"x": np.ones((8, 2), np.float32)},
        {"x": np.ones((2, 8), np.float64)},
    ],
)
def test_inputs_that_are_not_the_programs(original, inputs):
    with pytest.raises(ProgramError, match=r"expected|takes"):
        Program.open(original)(inputs)


def test_signature(original):
    program = Program.open(original)
    assert [(one.name, one.shape, one.dtype.name) for one in program.inputs] == [("x", (2, 8), "float32")]
    assert [(one.name, one.shape) for one in program.outputs] == [("y", (2, 6)), ("z", (2, 6))]
    assert [one.type for one in program.operations] == ["linear", "gelu", "linear", "identity", "identity"]
    linear = program.operations[0]
    assert linear.inputs["x"] == ("x",) and str(linear) == "`linear_0` (linear)"
    with pytest.raises(ProgramError, match="no function `draw`"):
        Program.open(original, function="draw")
    with pytest.raises(ProgramError, match="accumulate"):
        Program.open(original, accumulate="fp8")


def test_constants_are_those_that_coremltools_reads(original):
    """Against coremltools' own front end: every constant of the file."""
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = ct.utils.load_spec(str(original))
    read = load(spec, spec.specificationVersion, file_weights_dir=str((original / WEIGHTS).parent))
    program = Program.open(original)
    seen = 0
    for one in read.functions["main"].operations:
        known = program._constants.get(one.outputs[0].name)
        if one.op_type == "const" and known is not None and not isinstance(known, str):
            np.testing.assert_array_equal(known.tensor().numpy(), one.outputs[0].val)
            seen += 1
    assert seen >= 2


def test_a_function_of_several(packages):
    import coremltools as ct

    made = {}
    for name, factor in (("double", 2), ("treble", 3)):
        made[name] = packages.operations(
            lambda mb, holders, factor=factor: {"y": mb.mul(x=holders["x"], y=np.float32(factor))}, GIVEN
        )
    description = ct.utils.MultiFunctionDescriptor()
    for name, path in made.items():
        description.add_function(str(path), "main", name)
    description.default_function_name = "double"
    path = packages.path()
    ct.utils.save_multifunction(description, str(path))
    assert Program.open(path)(GIVEN)["y"][0, 0] == 2
    assert Program.open(path, function="treble")(GIVEN)["y"][0, 0] == 3


def attempt(package):
    """Open and run: all that may come of it is a result or a `ProgramError`, in seconds and with little memory."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        Program.open(package)(GIVEN)
    except ProgramError as error:
        assert str(error)
    assert time.monotonic() - started < 30
    # In KiB on Linux; nothing here is larger than some kilobytes, and a changed shape may claim more than it has.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10


FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4)


@pytest.mark.parametrize("relative", [MODEL, WEIGHTS, "Manifest.json"])
@FUZZ
@given(changes=CHANGES, kept=st.one_of(st.just(1.0), st.floats(0, 1)))
def test_fuzz(original, tmp_path, relative, changes, kept):
    package = tmp_path / "fuzzed.mlpackage"
    if not package.exists():
        shutil.copytree(original, package)
    data = bytearray((original / relative).read_bytes())
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    (package / relative).write_bytes(data[: int(kept * len(data))])
    attempt(package)
