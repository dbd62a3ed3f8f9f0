import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from PIL import Image

import edgegen.bundle
from edgegen.bundle.open import open_bundle
from edgegen.cli.main import main
from edgegen.lower.coreml_execute import EVALUATOR
from edgegen.students.shapes.grammar import held_back
from edgegen.students.shapes.judge import shows


def build(*arguments):
    return main(["build", *map(str, arguments), "-q"])


def listed(path):
    """Every file outside reports/ and report.html -> sha256."""
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file() and not file.relative_to(path).as_posix().startswith(("reports/", "report.html"))
    }


def test_bundle_is_whole_and_says_where_everything_came_from(bundle):
    manifest = open_bundle(bundle).manifest
    schema = json.loads((Path(edgegen.bundle.__file__).parent / "manifest.schema.json").read_text())
    jsonschema.validate(json.loads((bundle / "manifest.json").read_text()), schema)
    assert [one.backend for one in manifest.artifacts] == ["onnx"] * 3
    assert all(one.executed for one in manifest.artifacts)
    assert set(manifest.declined) == {"tflite", "executorch", "coreml", "coreai"}
    assert manifest.sampler.tables.keys() == {1, 2, 4}
    assert {"torch", "onnx", "onnxruntime", "edgegen"} <= manifest.tool_versions.keys()
    assert sum(row.prediction for row in manifest.sampler.tables[4]) == pytest.approx(-1)


def test_reports_hold_the_measured_numbers(bundle):
    (parity,) = json.loads((bundle / "reports" / "parity.json").read_text()).values()
    assert parity["status"] == "passed"
    assert {part["component"] for part in parity["components"]} == {"text_encoder", "denoiser", "decoder"}
    assert min(part["sqnr_db"] for part in parity["components"]) >= 60
    assert {picture["steps"] for picture in parity["pictures"]} == {1, 2, 4}
    assert all(abs(step["ratio"] - 1) <= 0.02 for step in parity["sensitivity"])
    (profile,) = json.loads((bundle / "reports" / "profile.json").read_text()).values()
    assert profile["kind"] == "measured" and profile["measured_on"]["cpu"]
    assert all(part["run"]["median_ms"] > 0 for part in profile["components"])
    assert (bundle / "reports" / "logs" / "onnx-denoiser.log").is_file()


def test_report_opens_offline(bundle):
    page = (bundle / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert 'src="http' not in page and "<script" not in page


def test_fixtures_are_the_trajectory_that_the_sampler_table_describes(bundle):
    manifest = open_bundle(bundle).manifest
    fixture = manifest.fixtures[0]
    x = np.load(bundle / fixture.noise)
    rows = zip(manifest.sampler.tables[fixture.steps], fixture.predictions, fixture.latents, strict=True)
    for row, prediction, latent in rows:
        x = row.sample * x + row.prediction * np.load(bundle / prediction)
        np.testing.assert_allclose(x, np.load(bundle / latent), atol=1e-5)


def test_run_draws_what_the_prompt_asks(bundle, tmp_path, capsys):
    drawn = 0
    for index, scene in enumerate(held_back()[100:116]):
        path = tmp_path / f"{index}.png"
        assert main(["run", str(bundle), "--prompt", scene.prompt(), "--seed", "3", "-o", str(path), "-q"]) == 0
        assert capsys.readouterr().out.strip() == str(path)
        pixels = np.asarray(Image.open(path), dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
        drawn += shows(pixels, scene)
    assert drawn >= 12


def test_run_imports_no_torch_for_onnx(bundle, tmp_path):
    code = (
        "import sys; from edgegen.cli.main import main; "
        f"assert main(['run', {str(bundle)!r}, '--prompt', 'a circle', '-o', {str(tmp_path / 'x.png')!r}]) == 0; "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_verify_proves_a_finished_bundle_again(bundle, capsys):
    before = listed(bundle)
    assert main(["verify", str(bundle), "--json", "-q"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["backends"]["onnx"]["status"] == "passed"
    assert listed(bundle) == before


def test_verify_refuses_a_changed_artifact(bundle, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    artifact = copy / "components" / "onnx" / "denoiser.onnx"
    content = bytearray(artifact.read_bytes())
    content[len(content) // 2] ^= 0xFF
    artifact.write_bytes(bytes(content))
    assert main(["verify", str(copy), "-q"]) == 1
    assert "denoiser.onnx" in capsys.readouterr().err


def test_student_eval_takes_a_bundle_and_agrees_with_the_checkpoint(bundle, checkpoint, capsys):
    scores = []
    for subject in (bundle, checkpoint):
        assert main(["student", "eval", str(subject), "--limit", "24", "--json", "-q"]) == 0
        scores.append(json.loads(capsys.readouterr().out)["alignment"])
    assert scores[0] == pytest.approx(scores[1], abs=1 / 24 + 1e-9)


def test_same_inputs_same_bytes_and_the_cache_is_used(bundle, checkpoint, tmp_path):
    started = time.monotonic()
    assert build("--target", "linux-x86", "--output", tmp_path / "again", checkpoint) == 0
    logs = (bundle / "reports/logs/onnx-denoiser.log", tmp_path / "again/reports/logs/onnx-denoiser.log")
    # The child's own account of its time is in the log: an equal log was not written twice.
    assert logs[0].read_bytes() == logs[1].read_bytes(), time.monotonic() - started
    assert listed(bundle) == listed(tmp_path / "again")


def test_same_bytes_without_the_cache(bundle, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEGEN_CACHE_DIR", str(tmp_path / "cold"))
    assert build("--target", "linux-x86", "--output", tmp_path / "again", checkpoint) == 0
    assert listed(bundle) == listed(tmp_path / "again")


def test_two_targets_share_what_does_not_depend_on_them(build_cache, bundle, checkpoint, tmp_path):
    assert build("--target", "linux-x86,linux-arm64", "--output", tmp_path, checkpoint) == 0
    shared = "components/onnx/denoiser.onnx"
    assert (tmp_path / "linux-x86" / shared).read_bytes() == (tmp_path / "linux-arm64" / shared).read_bytes()
    assert open_bundle(tmp_path / "linux-arm64").manifest.target == "linux-arm64"


def test_dry_run_prints_the_recipe_and_writes_nothing(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["build", "--target", "iphone15", "--dry-run", "--json", str(checkpoint)]) == 0
    (recipe,) = json.loads(capsys.readouterr().out)["recipes"]
    assert [(b["name"], b["precision"]) for b in recipe["backends"]] == [("coreml", "fp16")]
    assert recipe["backends"][0]["options"] == {"minimum_deployment_target": "iOS17"}
    assert "iOS 27" in recipe["declined"]["coreai"]
    assert list(tmp_path.iterdir()) == []


def test_a_gate_that_is_not_met_is_exit_3_and_leaves_the_old_bundle_alone(
    bundle, checkpoint, tmp_path, capsys, monkeypatch
):
    place = tmp_path / "out"
    shutil.copytree(bundle, place)
    before = listed(place)
    assert (
        build(
            "--target", "linux-x86", "--require-full-delegation", "--backend", "tflite", "--output", place, checkpoint
        )
        == 3
    )
    said = capsys.readouterr().err
    assert "delegation" in said and "denoiser" in said and "hint:" in said
    assert listed(place) == before
    assert open_bundle(tmp_path / "out.failed").manifest.backends == ("tflite",)
    assert "not met" in (tmp_path / "out.failed" / "report.html").read_text()


def test_a_backend_that_fails_does_not_take_the_others_with_it(checkpoint, build_cache, tmp_path, capsys, monkeypatch):
    # No real converter fails on this student: the child is told to load a program that is not there.
    from edgegen.build import lowering

    real = lowering.lower_in_child

    def broken(backend, program, request, log, **options):
        if backend == "tflite" and request.component == "decoder":
            return real(backend, program, request, log, module="edgegen.no_such_backend", **options)
        return real(backend, program, request, log, **options)

    monkeypatch.setattr(lowering, "lower_in_child", broken)
    monkeypatch.setattr(lowering, "compiler_fingerprint", lambda: "not in any cache")
    place = tmp_path / "out"
    assert build("--target", "linux-x86", "--backend", "onnx,tflite", "--output", place, checkpoint) == 1
    said = capsys.readouterr().err
    assert "`tflite`" in said and "`decoder`" in said and "no_such_backend" in said
    assert not place.exists()
    parity = json.loads((tmp_path / "out.failed" / "reports" / "parity.json").read_text())
    assert parity["onnx"]["failed"] == [], parity["onnx"]
    assert parity["onnx"]["status"] == "passed" and parity["tflite"]["status"] == "failed"


def test_killed_at_any_moment_there_is_no_half_bundle_and_the_next_build_succeeds(bundle, checkpoint, tmp_path):
    place = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "edgegen.cli.main",
        "build",
        "--target",
        "linux-x86",
        "-o",
        str(place),
        str(checkpoint),
    ]
    for wait in (1.0, 4.0, 7.0):
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        time.sleep(wait)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if place.exists():
            open_bundle(place)
    assert build("--target", "linux-x86", "--output", place, checkpoint) == 0
    assert listed(place) == listed(bundle)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_builds_into_one_folder(checkpoint, build_cache, tmp_path, capsys):
    from edgegen.bundle.write import reserve

    with reserve(tmp_path / "out"):
        assert build("--target", "linux-x86", "--output", tmp_path / "out", checkpoint) == 1
    assert "another build" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (("--target", "iphone51"), 2, "iphone15"),
        (("--target", "linux-x86", "--backend", "coreml"), 2, "Apple"),
        (("--target", "linux-x86", "--backend", "onyx"), 2, "onnx"),
        (("--target", "linux-x86,"), 2, "empty name"),
        (("--target", "linux-x86", "--steps", "3"), 2, "--steps 4"),
        (("--target", "linux-x86", "--precision", "int4"), 2, "fp16"),
    ],
)
def test_what_cannot_be_had_is_said_before_any_work(checkpoint, tmp_path, capsys, arguments, code, said):
    assert build(*arguments, "--output", tmp_path / "out", checkpoint) == code
    error = capsys.readouterr().err
    assert said in error and "hint:" in error
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_bundle_is_not_touched(checkpoint, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert build("--target", "linux-x86", "--output", tmp_path, checkpoint) == 2
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert "hint:" in capsys.readouterr().err


def test_a_missing_extra_is_named_with_the_command_that_brings_it(checkpoint, tmp_path, capsys, monkeypatch):
    from edgegen.lower import requirements

    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    assert build("--target", "linux-x86", "--output", tmp_path / "out", checkpoint) == 2
    assert "pip install 'edgegen[onnx]'" in capsys.readouterr().err


@pytest.mark.slow
def test_smoke_runs_a_two_layer_copy_first(checkpoint, build_cache, tmp_path, capsys):
    assert main(["build", "--target", "linux-x86", "--smoke", "-o", str(tmp_path / "out"), str(checkpoint)]) == 0
    assert "smoke: passed" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_five_backends_agree_with_the_student(everything):
    manifest = open_bundle(everything).manifest
    assert manifest.backends == ("coreml", "coreai", "executorch", "onnx", "tflite")
    parity = json.loads((everything / "reports" / "parity.json").read_text())
    for name, report in parity.items():
        assert report["status"] == "passed", (name, report["failed"])
    for one in manifest.artifacts:
        specs = manifest.components[one.component]
        assert specs.inputs and specs.outputs
        assert one.executed
        evaluated = one.backend == "coreml" and sys.platform != "darwin"
        assert one.executed_by == (EVALUATOR if evaluated else None)


@pytest.mark.slow
def test_core_ml_packages_are_the_same_bytes_when_built_again(everything, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEGEN_CACHE_DIR", str(tmp_path / "cold"))
    assert build("--target", "iphone17", "--backend", "coreml", "--output", tmp_path / "again", checkpoint) == 0
    package = "components/coreml/"
    first = {name: digest for name, digest in listed(everything).items() if name.startswith(package)}
    again = {name: digest for name, digest in listed(tmp_path / "again").items() if name.startswith(package)}
    assert first and first == again
