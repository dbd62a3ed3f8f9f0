"""`edgegen run` as it is typed: exit codes, what goes to stdout, and what is never overwritten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import edgegen
from edgegen.bundle.open import open_bundle
from edgegen.bundle.run import generate
from edgegen.bundle.write import write_bundle
from edgegen.cli.main import main

PROMPT = "a small red circle"


@pytest.fixture(scope="module")
def bundle(tiny_contents, tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("cli-run") / "tiny", tiny_contents)


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(edgegen.__file__).parents[1])}
    code = (
        "import sys; from edgegen.cli.main import main; code = main(); sys.exit(code or 7 * ('torch' in sys.modules))"
    )
    command = [sys.executable, "-c", code, "run", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_draws_and_prints_the_path_alone(bundle, tmp_path):
    done = run(bundle, "--prompt", PROMPT, "--seed", 5, "--steps", 1, "-o", "a.png", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "a.png\n"), done.stderr
    assert "drawn by `onnx` in 1 step" in done.stderr
    expected = generate(open_bundle(bundle), PROMPT, 5, 1).image
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    again = run(bundle, "--prompt", PROMPT, "--seed", 5, "--steps", 1, "-o", "b.png", "-q", cwd=tmp_path)
    assert again.stderr == ""
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_json_and_warnings(bundle, tmp_path):
    done = run(bundle, "--prompt", "a small dragon", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["picture"], report["backend"], report["steps"], report["size"]) == ("out.png", "onnx", 2, [16, 16])
    assert all(seconds >= 0 for seconds in report["seconds"].values()) and "denoiser.2" in report["seconds"]
    assert "dragon" in report["warnings"][0]
    assert "warning: the student does not know `dragon`" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--steps", "3"], 2, "use `--steps 1` or `--steps 2`"),
        (["--seed", "-1"], 2, "64 bits"),
        (["--backend", "sorcery"], 2, "`sorcery` is unknown"),
        (["-o", "notes.txt"], 2, "does not end in .png"),
        (["-o", "text.png"], 2, "is no PNG; it is not overwritten"),
        (["-o", "folder.png"], 2, "is a folder"),
        (["-o", "missing/out.png"], 2, "mkdir -p 'missing'"),
        (["-o", "text.png/out.png"], 2, "does not exist"),
    ],
)
def test_refusals(bundle, tmp_path, monkeypatch, capsys, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("precious")
    (tmp_path / "folder.png").mkdir()
    assert main(["run", str(bundle), "--prompt", PROMPT, *arguments]) == code
    spoken = capsys.readouterr()
    assert spoken.out == "" and said in spoken.err and "hint: " in spoken.err and "Traceback" not in spoken.err
    assert (tmp_path / "text.png").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "text.png"]


def test_a_png_is_overwritten(bundle, tmp_path):
    Image.new("RGB", (3, 3)).save(tmp_path / "out.png")
    assert main(["run", str(bundle), "--prompt", PROMPT, "-q", "-o", str(tmp_path / "out.png")]) == 0
    assert Image.open(tmp_path / "out.png").size == (16, 16)


def test_exit_codes_of_bad_bundles(tiny_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(tmp_path / "nowhere"), "--prompt", PROMPT]) == 2
    (tiny_bundle / "components/onnx/decoder.onnx").write_bytes(b"")
    assert main(["run", str(tiny_bundle), "--prompt", PROMPT]) == 1
    assert "components/onnx/decoder.onnx" in capsys.readouterr().err
    (tiny_bundle / "components/onnx/decoder.onnx").unlink()
    (tiny_bundle / "components/onnx/decoder.onnx").symlink_to("/etc/passwd")
    assert main(["run", str(tiny_bundle), "--prompt", PROMPT]) == 5
    assert not (tmp_path / "out.png").exists()
