"""The Core ML backend on the shapes student: structure, constants, names, bytes, and numbers by the evaluator."""

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from edgegen.errors import EdgegenError, UsageError
from edgegen.graph.capture import capture
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import BACKENDS, LowerRequest, get_backend
from edgegen.lower.coreml import BACKEND
from edgegen.lower.coreml_execute import EVALUATOR
from edgegen.lower.mlpackage import operations, read_program, read_spec, signature, write_package
from edgegen.lower.stand_in import executed_by
from edgegen.lower.worker import lower_in_child

COMPONENTS = ("text_encoder", "denoiser", "decoder")
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
AGAIN = """
import sys, torch
from pathlib import Path
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import LowerRequest, get_backend

name, program, out, inputs, outputs, precision = sys.argv[1:]
specs = [tuple(TensorSpec.model_validate_json(line) for line in text.splitlines()) for text in (inputs, outputs)]
get_backend(name).lower(torch.export.load(program), LowerRequest("again", *specs, precision, Path(out)))
"""


def lower(module, arguments, inputs, outputs, folder, precision="fp32", **options):
    program = torch.export.export(module.eval(), arguments)
    request = LowerRequest("part", inputs, outputs, precision, folder, options)
    before = program.graph_module.code
    file = BACKEND.lower(program, request).file
    assert program.graph_module.code == before  # other backends take the same program
    return folder / file


def spec(name, *shape, dtype="float32"):
    return TensorSpec(name=name, shape=shape, dtype=dtype)


@pytest.fixture(scope="session")
def packages(lowering, tmp_path_factory):
    made = {}
    for precision in BACKEND.precisions:
        folder = tmp_path_factory.mktemp(f"coreml_{precision}")
        for name in COMPONENTS:
            part = lowering.parts[name]
            request = LowerRequest(name, part.inputs, part.outputs, precision, folder)
            result = BACKEND.lower(capture(part), request)
            path = folder / result.file
            model = read_spec(path)
            program = read_program(path, model)
            made[name, precision] = SimpleNamespace(path=path, result=result, spec=model, program=program)
    return made


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", COMPONENTS)
def test_signature_is_the_specs_and_names_are_the_same_in_both_precisions(lowering, packages, name, precision):
    package, part = packages[name, precision], lowering.parts[name]
    assert signature(package.spec, package.path) == (list(part.inputs), list(part.outputs))
    assert package.spec.specificationVersion == 8  # iOS 17
    assert package.result.details["minimum_deployment_target"] == "iOS17"
    assert package.result.delegation.total_ops == operations(package.program).total() > 20
    assert not package.result.delegation.known and "macOS" in package.result.delegation.note


@pytest.mark.parametrize("name", COMPONENTS)
def test_half_precision_halves_the_weights(packages, name):
    full, half = ((packages[name, p].path / WEIGHTS).stat().st_size for p in ("fp32", "fp16"))
    assert 0.49 < half / full < 0.56


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", COMPONENTS)
def test_every_layer_is_there_with_its_weights(lowering, packages, name, precision):
    module, package = lowering.parts[name].module, packages[name, precision]
    census = operations(package.program)
    layers = {kind: [m for m in module.modules() if isinstance(m, kind)] for kind in (nn.Conv2d, nn.Linear)}
    assert census["conv"] == len(layers[nn.Conv2d])
    assert census["linear"] == len(layers[nn.Linear])
    used = {}
    for operation in package.program.functions["main"].operations:
        if operation.op_type in ("conv", "linear"):
            value = operation.weight.val
            used.setdefault(value.shape, []).append(value)
            assert value.dtype == (np.float16 if precision == "fp16" else np.float32)
    for layer in layers[nn.Conv2d] + layers[nn.Linear]:
        weight = layer.weight.detach().numpy()
        if name == "decoder" and layer is layers[nn.Conv2d][-1]:
            weight = weight * 2  # the decoder ends with `x * 2 - 1`, which coremltools folds into its last convolution
        weight = weight.astype(np.float16 if precision == "fp16" else np.float32)
        assert any(np.array_equal(weight, value) for value in used[weight.shape])


def test_angles_of_the_timestep_stay_in_float32(packages):
    package = packages["denoiser", "fp16"]
    dtypes = {"angle": set(), "conv": set()}
    for operation in package.program.functions["main"].operations:
        if operation.op_type in ("sin", "cos"):
            source = operation.x.op
            dtypes["angle"] |= {operation.x.dtype.__name__, source.x.dtype.__name__, source.y.dtype.__name__}
        if operation.op_type == "conv":
            dtypes["conv"].add(operation.x.dtype.__name__)
    assert dtypes == {"angle": {"fp32"}, "conv": {"fp16"}}
    kept = {
        key: [note for note in one.result.notes if note.startswith("kept in float32")] for key, one in packages.items()
    }
    (note,) = kept["denoiser", "fp16"]
    assert "cos" in note and "sin" in note
    assert kept["text_encoder", "fp16"] == kept["denoiser", "fp32"] == []


def test_manifest_points_at_what_is_there(packages):
    package = packages["decoder", "fp16"].path
    manifest = json.loads((package / "Manifest.json").read_text())
    assert manifest["rootModelIdentifier"] in manifest["itemInfoEntries"]
    assert {entry["path"] for entry in manifest["itemInfoEntries"].values()} == {
        "com.apple.CoreML/model.mlmodel",
        "com.apple.CoreML/weights",
    }
    assert all(uuid.UUID(identifier).version == 5 for identifier in manifest["itemInfoEntries"])
    found = {p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file()}
    assert found == {"Manifest.json", MODEL, WEIGHTS}


def test_metadata_says_what_made_it_and_not_when_or_where(packages):
    package = packages["decoder", "fp16"]
    keys = set(package.spec.description.metadata.userDefined)
    assert "com.github.apple.coremltools.version" in keys
    assert not any("date" in key for key in keys)
    assert b"site-packages" not in (package.path / MODEL).read_bytes()


def test_coremltools_opens_the_package(packages):
    import coremltools as ct

    model = ct.models.MLModel(str(packages["decoder", "fp32"].path), skip_model_load=True)
    assert [f.name for f in model.get_spec().description.output] == ["image"]


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tiny, tmp_path, capfd):
    """The worker's child, and a process with another hash seed that is given the same program."""
    part = tiny.components["text_encoder"]
    program = capture(part)
    folders = [tmp_path / "worker", tmp_path / "other"]
    folders[1].mkdir()
    request = LowerRequest("again", part.inputs, part.outputs, "fp16", folders[0])
    lowered = lower_in_child("coreml", program, request, tmp_path / "log.txt")
    assert capfd.readouterr().out == ""  # what the converter says is in the log
    assert lowered.file == f"again{BACKEND.suffix}"
    torch.export.save(program, tmp_path / "program.pt2")
    specs = ["\n".join(s.model_dump_json() for s in side) for side in (part.inputs, part.outputs)]
    subprocess.run(
        [sys.executable, "-c", AGAIN, "coreml", str(tmp_path / "program.pt2"), str(folders[1]), *specs, "fp16"],
        env=os.environ | {"PYTHONHASHSEED": "2"},
        check=True,
        capture_output=True,
    )
    trees = [
        {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        for folder in folders
    ]
    assert len(trees[0]) == 3
    assert trees[0] == trees[1]


@pytest.mark.parametrize(("target", "version"), [("iOS16", 7), ("iOS17", 8), ("iOS18", 9), ("iOS26", 10)])
def test_deployment_target_decides_the_specification(tmp_path, target, version):
    x, y = spec("x", 1, 3, 8, 8), spec("y", 1, 4, 8, 8)
    module = nn.Conv2d(3, 4, 3, padding=1)
    path = lower(module, (torch.randn(1, 3, 8, 8),), (x,), (y,), tmp_path, minimum_deployment_target=target)
    assert read_spec(path).specificationVersion == version


@pytest.mark.parametrize("target", ["iOS15", "ios17", "", "__class__"])
def test_unknown_deployment_target_is_refused(tmp_path, target):
    with pytest.raises(UsageError, match="minimum_deployment_target") as caught:
        lower(nn.ReLU(), (torch.ones(2),), (spec("x", 2),), (spec("y", 2),), tmp_path, minimum_deployment_target=target)
    assert "`iOS17`" in caught.value.hint


class Crossed(nn.Module):
    """Its values have, inside, the names that the specs give to other ends."""

    def forward(self, a, b):
        cos = a.cos()
        return cos + b.relu()


def test_names_of_specs_win_over_names_inside(tmp_path):
    inputs, outputs = (spec("b", 3), spec("a", 3)), (spec("cos", 3),)
    path = lower(Crossed(), (torch.ones(3), torch.ones(3)), inputs, outputs, tmp_path)
    model = read_spec(path)
    assert signature(model, path) == (list(inputs), list(outputs))
    by_type = {op.op_type: op for op in read_program(path, model).functions["main"].operations}
    assert by_type["cos"].x.name == "b"  # the first argument, whatever it was called
    assert by_type["relu"].x.name == "a"
    assert by_type["add"].outputs[0].name == "cos"


class Alias(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, x):
        return x + self.table[:3].to(x.dtype)


def test_no_ops_of_export_do_not_stop_it(tmp_path):
    path = lower(Alias(), (torch.ones(3),), (spec("x", 3),), (spec("y", 3),), tmp_path)
    assert operations(read_program(path, read_spec(path))) == {"add": 1}


@pytest.mark.parametrize(
    ("inputs", "outputs", "said"),
    [
        ((spec("x", 4),), (spec("y", 3),), r"`x` as float32\[3\] among its inputs, expected float32\[4\]"),
        ((spec("x", 3),), (spec("y", 9),), r"`y` as float32\[3\] among its outputs, expected float32\[9\]"),
        ((spec("x", 3), spec("z", 3)), (spec("y", 3),), "graph has 1 inputs, the specs name 2"),
    ],
)
def test_a_product_that_is_not_the_specs_is_refused(tmp_path, inputs, outputs, said):
    with pytest.raises(EdgegenError, match=said):
        lower(nn.ReLU(), (torch.ones(3),), inputs, outputs, tmp_path)


class Unknown(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


def test_an_operation_that_core_ml_lacks_is_named(tmp_path):
    with pytest.raises(EdgegenError, match=r"`part` cannot be lowered to Core ML: .*bessel_j0"):
        lower(Unknown(), (torch.ones(3),), (spec("x", 3),), (spec("y", 3),), tmp_path)


def test_package_written_from_a_spec_reads_back_equal(packages, tmp_path):
    package = packages["decoder", "fp32"]
    written = type(package.spec)()
    written.CopyFrom(package.spec)
    written.description.metadata.userDefined["com.github.apple.coremltools.conversion_date"] = "2001-01-01"
    write_package(written, (package.path / WEIGHTS).parent, tmp_path / "copy.mlpackage")
    for file in ("Manifest.json", MODEL, WEIGHTS):
        assert (tmp_path / "copy.mlpackage" / file).read_bytes() == (package.path / file).read_bytes()


@pytest.mark.parametrize(
    "damage", ["no manifest", "half a manifest", "half a model", "no model", "no weights", "empty"]
)
def test_a_damaged_package_is_told(packages, tmp_path, damage):
    path = tmp_path / "decoder.mlpackage"
    shutil.copytree(packages["decoder", "fp32"].path, path)
    manifest, model = path / "Manifest.json", path / MODEL
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_bytes(manifest.read_bytes()[:100])
    elif damage == "half a model":
        model.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
    elif damage == "no model":
        model.unlink()
    elif damage == "no weights":
        (path / WEIGHTS).unlink()
    else:
        shutil.rmtree(path)
        path.mkdir()
    with pytest.raises(EdgegenError, match=r"`decoder\.mlpackage`"):
        read_program(path, read_spec(path))


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML executes there")
@pytest.mark.parametrize(("precision", "floor"), [("fp32", 90), ("fp16", 40)])
@pytest.mark.parametrize("name", COMPONENTS)
def test_where_core_ml_is_not_the_evaluator_executes_and_is_named(lowering, packages, name, precision, floor):
    assert BACKEND.not_executed_here() is None
    assert executed_by(BACKEND) == EVALUATOR and "not by Core ML" in EVALUATOR
    lowering.check_parity(BACKEND, packages[name, precision].path, name, floor)


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML executes there")
def test_wrong_calls_and_foreign_specs_of_the_evaluator(lowering, packages):
    lowering.check_wrong_calls(BACKEND, packages["denoiser", "fp32"].path)
    lowering.check_foreign_specs(BACKEND, packages["decoder", "fp32"].path)


def test_only_core_ml_has_a_stand_in():
    assert {name for name in BACKENDS if executed_by(get_backend(name)) is not None} <= {"coreml"}


def test_importing_the_backend_imports_no_converter():
    code = "import sys, edgegen.lower.coreml; print({'torch', 'coremltools'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.strip() == "set()"
