"""A bundle of real Core ML packages where Core ML is not: executed by the evaluator, told as such, and blamed."""

import copy
import dataclasses
import gc
import hashlib
import json
import re
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgegen.bundle.backends import choose_backend
from edgegen.bundle.open import open_bundle
from edgegen.bundle.run import Runtime
from edgegen.cli.main import main
from edgegen.errors import EdgegenError, UsageError
from edgegen.lower.backend import get_backend
from edgegen.lower.coreml_execute import EVALUATOR, core_ml_is_here, open_program
from edgegen.profile.host import profile
from edgegen.students.checkpoint import save_pt
from edgegen.students.sample import condition, decoder_input, denoise
from edgegen.students.student import Student
from edgegen.verify.bundle import stored_reference, verify_bundle
from edgegen.verify.fixtures import restore
from edgegen.verify.inside import look_inside
from edgegen.verify.outcome import Outcome
from edgegen.verify.parity import load_executables, verify
from edgegen.verify.second_opinion import AGAINST_EVALUATOR, with_second_opinions
from mlprogram.package import Package

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(core_ml_is_here(), reason="Core ML itself executes there"),
]


@pytest.fixture(scope="module")
def student(tiny):
    """The tiny student with a louder cross-attention: random weights alone listen less than float16 rounds away."""
    denoiser = tiny.components["denoiser"]
    module = copy.deepcopy(denoiser.module)
    with torch.no_grad():
        for name, part in module.named_modules():
            if name.endswith("attn2.to_v"):
                part.weight.mul_(30)
    return Student(
        tiny.config,
        {**tiny.components, "denoiser": dataclasses.replace(denoiser, module=module)},
        tiny.tokenizer_json,
    )


@pytest.fixture(scope="module")
def model(student, tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "tiny.pt"
    save_pt(student, path)
    return path


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    """The tiny student for an iPhone: three packages in float16, every gate met by the evaluator."""
    folder = tmp_path_factory.mktemp("iphone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEGEN_CACHE_DIR", str(folder / "cache"))
        assert main(["build", "--target", "iphone15", "-o", str(folder / "bundle"), str(model), "-q"]) == 0
    return folder / "bundle"


@pytest.fixture
def own(bundle, tmp_path):
    """The bundle again, to break."""
    shutil.copytree(bundle, tmp_path / "own")
    return tmp_path / "own"


def edit_weight(bundle, component, change, last=False):
    """Let `change(array)` edit the weight of the component's largest linear or convolution (or its last) in the weight
    file, and make the bundle's hashes true again: what a broken converter would have written. Gives the op's name."""
    package = bundle / "components" / "coreml" / f"{component}.mlpackage"
    message = Package(package).spec.mlProgram.functions["main"]
    block = message.block_specializations[message.opset]
    weights = {}
    for operation in block.operations:
        if operation.type == "const" and "val" in operation.attributes:
            value = operation.attributes["val"]
            if value.WhichOneof("value") == "blobFileValue":
                weights[operation.outputs[0].name] = (value.blobFileValue, value.type.tensorType)
    users = [op for op in block.operations if op.type in ("linear", "conv")]
    sizes = [np.prod(shape_of(weights[op.inputs["weight"].arguments[0].name][1])) for op in users]
    user = users[-1] if last else users[int(np.argmax(sizes))]
    blob, type_ = weights[user.inputs["weight"].arguments[0].name]
    file = package / "Data/com.apple.CoreML/weights/weight.bin"
    content = bytearray(file.read_bytes())
    # The metadata of a blob: sentinel, type, size in bytes, offset of the data.
    size, offset = (int.from_bytes(content[blob.offset + at : blob.offset + at + 8], "little") for at in (8, 16))
    array = np.frombuffer(bytes(content[offset : offset + size]), np.float16).reshape(shape_of(type_)).copy()
    content[offset : offset + size] = np.ascontiguousarray(change(array)).astype(np.float16).tobytes()
    file.write_bytes(bytes(content))
    manifest = json.loads((bundle / "manifest.json").read_text())
    name = file.relative_to(bundle).as_posix()
    manifest["files"][name]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return user.outputs[0].name


def shape_of(tensor):
    return tuple(one.constant.size for one in tensor.dimensions)


def examined(bundle, student=None, dump=None):
    """What `edgegen verify --blame` finds, without its child process."""
    opened = open_bundle(bundle)
    stored = stored_reference(opened)
    reference = restore(stored.root, stored.components, stored.fixtures, (), stored.sampler, stored.latent)
    paths = {name: opened.loadable(one) for name, one in opened.artifacts("coreml").items()}
    loaded = load_executables(get_backend("coreml"), paths, reference.signatures)
    report = verify(reference, loaded, "fp16", backend="coreml")
    (report,) = look_inside(opened, [report], student, dump)
    return report, {part.component: part.blame for part in report.components}


def test_every_place_that_could_be_taken_for_a_device_names_the_evaluator(bundle):
    manifest = open_bundle(bundle).manifest
    assert {one.executed_by for one in manifest.artifacts} == {EVALUATOR}
    assert all(one.executed and one.not_executed_because is None for one in manifest.artifacts)
    report = json.loads((bundle / "reports" / "parity.json").read_text())["coreml"]
    assert report["status"] == "passed" and report["executed_by"] == EVALUATOR
    page = (bundle / "report.html").read_text()
    shown = EVALUATOR.replace("'", "&#39;")
    assert page.count(shown) >= 4  # the verdict, the parity table, each picture, and what was done differently
    assert 'id="timings"' not in page


def test_no_latency_of_core_ml_is_reported(bundle):
    measured = json.loads((bundle / "reports" / "profile.json").read_text())["coreml"]
    assert measured["components"] == [] and measured["picture"] is None
    assert EVALUATOR in measured["not_measured_because"]
    report = profile(get_backend("coreml"), {"decoder": bundle}, {}, {})
    assert report.components == () and EVALUATOR in report.not_measured_because


def test_float16_is_within_what_range_analysis_predicts(bundle):
    """The prediction is made on the lowered graph, in torch; the numbers are those of the saved package."""
    report = json.loads((bundle / "reports" / "parity.json").read_text())["coreml"]
    for part in report["components"]:
        assert part["predicted_db"] > 40
        assert part["sqnr_db"] >= part["predicted_db"] - 6.0, part
    assert not report["failed"]


def test_verify_says_who_executed_and_what_float16_sums_would_lose(bundle, capsys):
    assert main(["verify", str(bundle), "--accumulate", "fp16", "-q"]) == 0
    said = capsys.readouterr().out
    assert f"coreml was executed by {EVALUATOR}; no latency was measured" in said
    worst = float(re.search(r"fp16  passed  ([0-9.]+) dB", said)[1])
    found = dict(re.findall(r"coreml (\w+): with sums kept in float16, [^:]*: ([0-9.]+) dB", said))
    assert set(found) == {"text_encoder", "denoiser", "decoder"}
    assert 30 < min(map(float, found.values())) < worst


def test_run_draws_and_says_by_whom(bundle, student, tmp_path, capsys):
    """The picture is the student's but for float16."""
    arguments = ["run", str(bundle), "--prompt", "a small red circle", "--seed", "4", "-o", str(tmp_path / "a.png")]
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert f"drawn from `coreml` artifacts in 2 steps, executed by {EVALUATOR}" in said
    assert " ms" not in said
    pixels = np.asarray(Image.open(tmp_path / "a.png"), np.float32)
    heard = condition(student, student.given(["a small red circle"]))
    records = list(denoise(student, heard, [4], 2))
    expected = student.components["decoder"].module(decoder_input(student, records[-1].latent_out))[0]
    expected = (expected.detach().numpy().clip(-1, 1).transpose(1, 2, 0) + 1) * 127.5
    assert np.abs(pixels - expected).max() < 12


def test_without_torch_the_extra_is_named(bundle, monkeypatch):
    from edgegen.lower import requirements

    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name == "torch" else 1)
    with pytest.raises(UsageError, match="not installed: `torch`"):
        choose_backend(open_bundle(bundle), "coreml")
    _, (report,) = verify_bundle(bundle)
    assert report.status == "not_executed" and report.executed_by is None


def test_the_weights_are_let_go_when_the_runtime_is_closed(bundle):
    runtime = Runtime(open_bundle(bundle))
    executable = runtime._executables["decoder"]
    program = weakref.ref(executable._program)
    runtime.close()
    gc.collect()
    assert program() is None
    with pytest.raises(EdgegenError, match="closed"):
        executable({})


def poisoned(weight):
    weight.flat[3] = np.nan
    return weight


def transposed(weight):
    """A square matrix the wrong way round: every shape is right, and nothing is NaN."""
    return weight.reshape(*weight.shape[:2], -1).transpose(1, 0, 2).reshape(weight.shape)


def test_nan_in_a_weight_is_exit_3_and_the_op_is_named_without_a_model(own, capsys):
    name = edit_weight(own, "decoder", poisoned)
    assert main(["verify", str(own), "--blame", "-q"]) == 3
    said = capsys.readouterr().err
    assert f"`decoder` first gives NaN at `{name}`" in said
    assert "in float32 arithmetic too" in said and "--model MODEL" in said


def test_a_black_picture_is_exit_3_and_blamed_on_the_convolution(own, model, tmp_path, capsys):
    name = edit_weight(own, "decoder", np.zeros_like, last=True)
    arguments = ["verify", str(own), "--blame", "--model", str(model), "--dump", str(tmp_path / "dump"), "-q"]
    assert main([*arguments, "--json"]) == 3
    spoken = capsys.readouterr()
    (line,) = (text for text in spoken.err.splitlines() if "`decoder` first parts ways" in text)
    # The decoder ends with `x * 2 - 1`, which coremltools folds into its last convolution.
    assert f"(aten.sub.Tensor, the artifact's `{name}` (conv))" in line and "picture_psnr" in spoken.err
    said = json.loads(spoken.out)
    assert said["backends"]["coreml"]["executed_by"] == EVALUATOR
    assert "no single op falls below 40 dB" in said["blame"]["coreml"]["denoiser"]
    index = json.loads((tmp_path / "dump" / "coreml" / "decoder" / "index.json").read_text())
    (entry,) = (one for one in index["values"] if one["name"] == name)
    assert entry["sqnr_db"] < 40 and entry["op"] == "conv"
    # The folder is not written into twice: values of two runs would mix.
    assert main(arguments) == 2
    assert "is not an empty folder" in capsys.readouterr().err


def test_a_transposed_weight_is_blamed_on_its_module(own, student):
    name = edit_weight(own, "text_encoder", transposed)
    report, said = examined(own, student)
    assert report.status == "failed"
    assert f"the artifact's `{name}`" in said["text_encoder"], said
    modules = [path for path, _ in student.components["text_encoder"].module.named_modules() if path]
    assert any(f"in `{path}`" in said["text_encoder"] for path in modules)
    assert "no single op" in said["decoder"]


def test_without_a_model_a_wrong_weight_is_told_not_to_be_rounding(own):
    edit_weight(own, "denoiser", np.negative)
    report, said = examined(own)
    assert report.status == "failed"
    assert "float16 rounding breaks nothing" in said["denoiser"] and "--model MODEL" in said["denoiser"]


def test_a_value_that_leaves_float16_is_named_without_a_model(own):
    """Right in float32 arithmetic, infinite in float16: what a device would have shown first."""
    name = edit_weight(own, "text_encoder", lambda weight: weight * 0 + 60000)
    report, said = examined(own)
    assert report.status == "failed"
    assert f"`text_encoder` first parts from its own float32 arithmetic at `{name}`" in said["text_encoder"], said


def test_values_are_dumped_by_name_with_what_they_agree_to(bundle, student, tmp_path):
    report, said = examined(bundle, student, tmp_path / "dump")
    assert report.status == "passed" and "no single op falls below 40 dB" in said["denoiser"]
    folder = tmp_path / "dump" / "coreml" / "denoiser"
    index = json.loads((folder / "index.json").read_text())
    assert index["component"] == "denoiser" and index["compared_with"] == "the student in torch"
    compared = [one for one in index["values"] if "sqnr_db" in one]
    assert len(compared) > 0.9 * len(index["values"])
    for one in index["values"]:
        value = np.load(folder / one["file"], allow_pickle=False)
        assert list(value.shape) == one["shape"] and value.dtype.name == one["dtype"]
    assert {one["op"] for one in compared} >= {"conv", "matmul", "softmax", "instance_norm"}


def test_another_model_is_refused(bundle, tmp_path, capsys):
    assert main(["student", "pack", "--output", str(tmp_path / "shapes.pt"), "-q"]) == 0
    assert main(["verify", str(bundle), "--blame", "--model", str(tmp_path / "shapes.pt"), "-q"]) == 2
    assert "is not the student that" in capsys.readouterr().err


def test_options_of_blame_need_blame(bundle, tmp_path, capsys):
    assert main(["verify", str(bundle), "--dump", str(tmp_path / "dump"), "-q"]) == 2
    assert "add `--blame`" in capsys.readouterr().err
    assert not Path(tmp_path / "dump").exists()


def test_core_ml_stand_in_is_held_against_the_evaluator(bundle, monkeypatch):
    """Core ML cannot run here: a stand-in for `MLModel` computes with the evaluator, and errs by a thousandth."""
    import coremltools as ct

    from edgegen.lower import coreml

    class NotCoreML:
        def __init__(self, path, function_name=None):
            self.program = open_program(Path(path))

        def predict(self, inputs, state=None):
            return {name: value * np.float32(1.001) for name, value in self.program(inputs).items()}

    monkeypatch.setattr(coreml, "core_ml_is_here", lambda: True)
    monkeypatch.setattr(ct.models, "MLModel", NotCoreML)
    backend = get_backend("coreml")
    opened = open_bundle(bundle)
    stored = stored_reference(opened)
    reference = restore(stored.root, stored.components, stored.fixtures, (), stored.sampler, stored.latent)
    artifact = opened.artifacts("coreml")["decoder"]
    signature = reference.signatures["decoder"]
    path = opened.path(artifact.path)
    executable = backend.load(path, signature.inputs, signature.outputs)
    assert backend.executed_by() is None
    report = verify(reference, {"decoder": executable}, "fp16", backend="coreml", executed_by=backend.executed_by())
    report = with_second_opinions(report, backend, {"decoder": path}, {"decoder": executable}, reference, "fp32")
    part = next(one for one in report.components if one.component == "decoder")
    assert part.outcome is Outcome.SUCCESS and report.executed_by is None
    (also,) = part.also
    assert also.what == AGAINST_EVALUATOR and also.sqnr_db == pytest.approx(60.0, abs=0.1)
    monkeypatch.setattr(type(backend), "evaluator_missing", lambda self: ("torch",))
    alone = with_second_opinions(report, backend, {"decoder": path}, {"decoder": executable}, reference, "fp32")
    (also,) = next(one for one in alone.components if one.component == "decoder").also
    assert also.sqnr_db is None and "torch not installed" in also.what
