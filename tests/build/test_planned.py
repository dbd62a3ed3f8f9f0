"""Builds by a precision plan, as they are typed: the bundle and its proof, what one changed line costs, refusals."""

import copy
import dataclasses
import hashlib
import json
import shutil

import onnx
import pytest
import torch
from onnx import numpy_helper

from edgegen.bundle.open import MANIFEST, open_bundle
from edgegen.cache import Cache
from edgegen.cli.main import main
from edgegen.graph.edit import weights
from edgegen.precision.canonical import canonical_passes, canonical_programs, timesteps_of
from edgegen.precision.file import load_plan, write_plan
from edgegen.precision.options import PlanOptions
from edgegen.precision.plan import ComponentPlan
from edgegen.precision.planner import make_plan
from edgegen.precision.repair.tensors import save
from edgegen.precision.sites import sites
from edgegen.students.checkpoint import save_pt
from edgegen.students.student import Student
from edgegen.targets import load_target
from tests.silent import Silent

QUICK = {"samples": 1, "judged": 4, "projections": 1, "confirmed": 1, "spread": 2}
COMPONENTS = ("text_encoder", "denoiser", "decoder")


@pytest.fixture(scope="module")
def student(tiny):
    """The tiny student, made to listen to its prompt: what random weights hear of it drowns in int8's noise."""
    denoiser = tiny.components["denoiser"]
    module = copy.deepcopy(denoiser.module)
    with torch.no_grad():
        for name, part in module.named_modules():
            if name.endswith("attn2.to_v"):
                part.weight.mul_(30)
    parts = {**tiny.components, "denoiser": dataclasses.replace(denoiser, module=module)}
    return Student(tiny.config, parts, tiny.tokenizer_json)


@pytest.fixture(scope="module")
def model(student, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.pt"
    save_pt(student, path)
    return path


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """The cache of every build here."""
    folder = tmp_path_factory.mktemp("cache")
    patch = pytest.MonkeyPatch()
    patch.setenv("EDGEGEN_CACHE_DIR", str(folder))
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def plan(student, cached, tmp_path_factory):
    """File of a plan for two runtimes: int8 arithmetic in every component by the planner's ranges, and one bias mended.

    Which ops is chosen here: those that keep the student near its float self, where two runtimes repeat each other.
    """
    backends = ("onnx", "tflite")
    programs = canonical_programs(student, backends)
    options = PlanOptions(**QUICK, precisions=("w8a8",), min_psnr=40.0, max_conditioning=0.2, repairs=False)
    made = make_plan(student, load_target("linux-x86"), backends, options, Cache(cached), Silent(), programs).plan
    made = changed(made, lambda part, key, op: op.model_copy(update={"precision": chosen(part, key)}))
    path = tmp_path_factory.mktemp("plan") / "tiny.toml"
    held, known = weights(programs["decoder"]), {node.name: node for node in programs["decoder"].graph.nodes}
    last = known[sites(programs["decoder"])["layers.6"].node]
    mended = {f"decoder/{last.name}:2": held[last.args[2].name] + 1e-4}
    write_plan(path, made.model_copy(update={"tensors_sha256": save(path.with_suffix(".safetensors"), mended)}))
    return path


@pytest.fixture
def another(plan, tmp_path):
    """A function that writes the plan with its text as `change` has it, its tensors beside it."""

    def write(change):
        path = tmp_path / "plan.toml"
        path.write_text(change(plan.read_text()))
        shutil.copyfile(plan.with_suffix(".safetensors"), path.with_suffix(".safetensors"))
        return path

    return write


def chosen(component, key):
    gentle = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "ff.net.0.proj#1", "ff.net.0.proj#2")
    float_ones = {"text_encoder": (), "decoder": ("layers.4",)}
    kept = key.endswith(gentle) if component == "denoiser" else key not in float_ones[component]
    return "w8a8" if kept else "fp32"


def changed(plan, change):
    """`plan` with its ops as `change(component, key, op)` has them."""
    parts = {
        name: part.model_copy(update={"ops": {key: change(name, key, op) for key, op in part.ops.items()}})
        for name, part in plan.components.items()
    }
    return plan.model_copy(update={"components": parts})


def floating(op):
    return op.model_copy(update={"precision": "fp32"})


def build(model, output, *arguments, target="linux-x86"):
    return main(["build", "--target", target, "--output", str(output), *map(str, arguments), str(model), "-q"])


@pytest.fixture(scope="module")
def built(model, plan, tmp_path_factory):
    """What `edgegen build --plan` makes with both runtimes."""
    path = tmp_path_factory.mktemp("bundles") / "linux"
    assert build(model, path, "--plan", plan) == 0
    return path


def lowered(cached):
    """Entries of the cache that are lowered components."""
    return {path.name for path in cached.glob("*/entries/lower-*")}


def counts(part: ComponentPlan):
    return {precision: [op.precision for op in part.ops.values()].count(precision) for precision in ("w8a8", "fp32")}


def test_the_bundle_carries_its_plan_and_what_the_plan_computes(built, plan, student):
    bundle, asked = open_bundle(built), load_plan(plan)
    said = bundle.manifest.plan
    assert load_plan(built / said.path) == asked
    assert (built / said.tensors).read_bytes() == plan.with_suffix(".safetensors").read_bytes()
    assert {said.path, said.tensors} <= set(bundle.manifest.files), "hashed like every other file"
    assert said.predicted == asked.predicted
    assert set(said.bounds) == set(bundle.manifest.planned) == set(COMPONENTS)
    for name, bound in said.bounds.items():
        assert bound.stability_db > bound.float_db - 6 and 20 < bound.float_db < 90, (name, bound)
        assert bound.asked_db == 60.0, "float32 between its codes"
        assert said.canonical[name] == canonical_passes(name, timesteps_of(student), ("onnx", "tflite")).specs()
    samples = {name: len(calls) for name, calls in bundle.manifest.planned.items()}
    assert samples["denoiser"] > samples["decoder"] >= 2
    for calls in bundle.manifest.planned.values():
        assert all((built / file).is_file() for call in calls for file in call.values())
    assert bundle.manifest.gates.picture_psnr_db["plan"] == 40.0, "what the plan was asked for"


def test_each_artifact_has_the_int8_ops_of_its_plan(built, plan):
    asked = load_plan(plan)
    for one in open_bundle(built).manifest.artifacts:
        wanted = counts(asked.components[one.component])
        assert {key: one.compressed.get(key, 0) for key in wanted} == wanted
        truly = one.details["int8_ops"]  # counted in the file; tflite's by kind, as `3 CONV_2D, 2 FULLY_CONNECTED`
        assert sum(int(part.split()[0]) for part in truly.split(", ")) >= wanted["w8a8"], (one.backend, truly)


def test_artifacts_are_held_to_the_plan(built):
    for report in json.loads((built / "reports" / "parity.json").read_text()).values():
        assert report["status"] == "passed" and report["precision"] == "plan"
        for part in report["components"]:
            assert part["required_db"] <= 60.0 and float(part["sqnr_db"]) >= part["required_db"]
            assert part["float_db"] >= part["required_float_db"] > 20
    page = (built / "report.html").read_text()
    assert "w8a8" in page


def test_a_bundle_proves_itself_without_model_plan_or_cache(built, tmp_path, monkeypatch, capsys):
    alone = tmp_path / "alone"
    shutil.copytree(built, alone)
    monkeypatch.setenv("EDGEGEN_CACHE_DIR", str(tmp_path / "empty"))
    assert main(["verify", str(alone), "--json", "-q"]) == 0
    said = json.loads(capsys.readouterr().out)
    found = {name: (one["status"], one["precision"]) for name, one in said["backends"].items()}
    assert found == {"onnx": ("passed", "plan"), "tflite": ("passed", "plan")}, "held to the gates of plans"


def test_blame_holds_artifacts_against_what_their_plan_computes(built, model, tmp_path, capsys):
    """Against the float graph the values behind the first int8 op would be at 40 dB."""
    asked = ["--backend", "onnx", "--blame", "--model", str(model), "--dump", str(tmp_path / "dump")]
    assert main(["verify", str(built), *asked, "--json", "-q"]) == 0
    said = json.loads(capsys.readouterr().out)["blame"]["onnx"]
    for name in ("text_encoder", "decoder"):
        assert "no single op falls below 35 dB" in said[name], said[name]
        index = json.loads((tmp_path / "dump" / "onnx" / name / "index.json").read_text())
        assert index["compared_with"] == "the student as planned, in torch"
        found = [float(one["sqnr_db"]) for one in index["values"] if "sqnr_db" in one]
        assert len(found) > 10 and min(found) > 60, min(found)


def test_one_line_changed_lowers_one_component_again(built, model, another, cached, tmp_path):
    def one_line(text):
        head, mark, rest = text.partition("[components.decoder.ops")
        return head + mark + rest.replace('precision = "w8a8"', 'precision = "fp32"', 1)

    path = another(one_line)
    before = lowered(cached)
    assert build(model, tmp_path / "out", "--plan", path, "--backend", "onnx") == 0
    assert len(lowered(cached) - before) == 1
    for name, again in open_bundle(tmp_path / "out").artifacts("onnx").items():
        first = open_bundle(built).artifacts("onnx")[name]
        same = (tmp_path / "out" / again.path).read_bytes() == (built / first.path).read_bytes()
        assert same == (name != "decoder")
        assert again.compressed["w8a8"] == first.compressed["w8a8"] - (name == "decoder")


def test_ranges_that_clip_the_picture_are_exit_3(built, model, another, tmp_path, capsys):
    """The artifact does what the plan says: it is the plan that does not keep what was asked of it."""

    def clip(component, key, op):
        if component != "decoder" or op.output is None:
            return op
        output = op.output.model_copy(update={"low": op.output.low / 16, "high": op.output.high / 16})
        return op.model_copy(update={"output": output})

    path = another(lambda text: text)
    write_plan(path, changed(load_plan(path), clip))
    assert build(model, tmp_path / "out", "--plan", path, "--backend", "onnx") == 3
    said = capsys.readouterr().err
    assert "picture_psnr" in said and "sqnr " not in said
    assert not (tmp_path / "out").exists() and (tmp_path / "out.failed" / "plan.toml").is_file()


def test_an_artifact_that_computes_something_else_is_exit_3(built, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(built, broken)
    bundle = open_bundle(built)
    artifact = bundle.artifacts("onnx")["decoder"].path
    network = onnx.load(broken / artifact)
    quantizers = {node.input[1] for node in network.graph.node if node.op_type == "QuantizeLinear"}
    scale = next(one for one in network.graph.initializer if one.name in quantizers)
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 0.25, scale.name))
    onnx.save(network, broken / artifact)
    document = json.loads((broken / MANIFEST).read_text())
    content = (broken / artifact).read_bytes()
    entry = document["files"][artifact]
    entry |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (broken / MANIFEST).write_text(json.dumps(document))
    assert main(["verify", str(broken), "--backend", "onnx", "-q"]) == 3
    said = capsys.readouterr().err
    assert "sqnr" in said and "decoder" in said and "text_encoder" not in said


def text_with(*changes):
    def made(text):
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        return text

    return made


REFUSED = [
    ("another model", text_with(('student_sha256 = "', 'student_sha256 = "0')), (), "plan was made for `tiny` (0"),
    ("another target", text_with(('target = "linux-x86"', 'target = "rpi5"')), (), "--target rpi5"),
    ("unknown op", text_with(('ops."layers.0"]', 'ops."layer.0"]')), (), "no such op; nearest: `layers.0`"),
    ("not native", text_with(('precision = "w8a8"', 'precision = "w8"')), (), "w8 is refused: `onnx` executes fp32"),
    ("two precisions", text_with(), ("--precision", "fp32"), "`--precision fp32` another"),
    ("not its backend", text_with(), ("--backend", "coreml"), "does not run `coreml`"),
]


@pytest.mark.parametrize(("change", "arguments", "said"), [pytest.param(*one[1:], id=one[0]) for one in REFUSED])
def test_a_plan_that_does_not_fit_is_exit_2_before_any_work(model, another, tmp_path, capsys, change, arguments, said):
    assert build(model, tmp_path / "out", "--plan", another(change), *arguments) == 2
    error = capsys.readouterr().err
    assert said in error and "hint:" in error
    assert sorted(one.name for one in tmp_path.iterdir()) == ["plan.safetensors", "plan.toml"]


def test_a_plan_without_its_tensors_is_exit_2(model, another, tmp_path, capsys):
    path = another(lambda text: text)
    path.with_suffix(".safetensors").unlink()
    assert build(model, tmp_path / "out", "--plan", path) == 2
    said = capsys.readouterr().err
    assert "tensors are not beside it: `plan.safetensors`" in said and "hint:" in said
    path.with_suffix(".safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert build(model, tmp_path / "out", "--plan", path) == 1
    assert "`plan.safetensors` is not the file that the plan was made with" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dry_run_sums_the_plan_up(model, plan, capsys):
    assert main(["build", "--target", "linux-x86", "--plan", str(plan), "--dry-run", str(model)]) == 0
    said = capsys.readouterr().out
    ops = load_plan(plan).components["decoder"]
    assert f"{counts(ops)['w8a8']} w8a8, the rest fp32" in said
    assert "build    onnx plan" in said and "build    tflite plan" in said
    assert "gates    plan: SQNR >= 35 dB, picture >= 40 dB" in said


@pytest.fixture(scope="module")
def palettes(plan, model, tmp_path_factory):
    """Weights compressed in each way that Core ML reads, built for a phone and executed by the evaluator."""
    folder = tmp_path_factory.mktemp("phone")
    forms = [{"precision": "w8"}, {"precision": "w6", "form": "palette"}, {"precision": "w8", "form": "palette"}]
    asked, parts = load_plan(plan), {}
    for name, part in asked.components.items():
        # A plan for Core ML is of another graph: its upsamplings are no phases.
        ops = {key: floating(op).model_copy(update={"weights": 0}) for key, op in part.ops.items()}
        weighted = [key for key, op in ops.items() if op.op != "matmul"]
        ops |= {key: ops[key].model_copy(update=forms[i % len(forms)]) for i, key in enumerate(weighted)}
        parts[name] = part.model_copy(update={"ops": ops})
    phone = load_target("iphone16pro")
    update = {"target": phone.name, "target_sha256": phone.sha256, "backends": ("coreml",), "components": parts}
    update |= {"budget": {"min_psnr": 25.0, "max_conditioning": 0.2}, "tensors_sha256": None}
    write_plan(folder / "plan.toml", asked.model_copy(update=update))
    code = build(model, folder / "phone", "--plan", folder / "plan.toml", target=phone.name)
    return code, folder / "phone"


def test_core_ml_packages_hold_palettes(palettes, built):
    code, path = palettes
    assert code == 0
    bundle = open_bundle(path)
    assert load_plan(path / "plan.toml").backends == ("coreml",)
    for name, one in bundle.artifacts("coreml").items():
        assert one.executed and one.details["int8_ops"] == "0"
        assert int(one.details["compressed_weights"]) == sum(n for key, n in one.compressed.items() if key != "fp32")
        assert {"w8", "w6"} <= set(one.compressed)
        whole = sum(file.stat().st_size for file in (path / one.path).rglob("*") if file.is_file())
        assert whole == one.bytes, name
