"""`edgegen plan` as it is typed."""

import json
import re
import tomllib

import pytest
from click.testing import CliRunner

from edgegen.cli.main import cli, main
from edgegen.errors import EdgegenError, GateError


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    from edgegen.students.checkpoint import save_pt

    path = tmp_path_factory.mktemp("model") / "tiny.pt"
    save_pt(tiny, path)
    return path


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def typed(model, cached, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEGEN_CACHE_DIR", str(cached))
    monkeypatch.chdir(tmp_path)

    def run(*args):
        base = ["plan", str(model), "--target", "linux-x86", "--backend", "tflite,onnx"]
        return CliRunner().invoke(cli, [*base, *args])

    return run


def test_a_plan_is_written_and_summed_up(typed, tmp_path):
    shown = typed()
    assert shown.exit_code == 0, shown.output
    assert "rank correlation" in shown.stdout and "(estimated)" in shown.stdout and "measured in torch" in shown.stdout
    assert re.search(r"at the worst step of \d+ pairs of them; other prompts stay within [\d.]+%", shown.stdout)
    assert "calibrate" in shown.stderr and "sensitivity" in shown.stderr
    found = tomllib.loads((tmp_path / "tiny-linux-x86.plan.toml").read_text())
    assert found["backends"] == ["onnx", "tflite"]
    assert found["predicted"]["picture_psnr_db"] >= 30.0


def test_json_is_data_alone(typed, tmp_path):
    shown = typed("--max-size", "50%", "--json", "-q", "-o", "deep/mine.json")
    assert shown.exit_code == 0, shown.output
    said = json.loads(shown.stdout)
    assert shown.stderr == ""
    assert said["path"] == "deep/mine.json" and said["predicted"]["bytes_ratio"] <= 0.5
    assert -1 <= said["rank_correlation"] <= 1
    assert {"latency_ratio", "bytes", "picture_psnr_db"} == set(said["front"][0])
    assert json.loads((tmp_path / "deep" / "mine.json").read_text())["predicted"] == said["predicted"]


def test_an_infeasible_budget_is_exit_three_with_what_can_be_typed(typed, tmp_path):
    shown = typed("--max-size", "1kB", "--min-psnr", "30")
    assert isinstance(shown.exception, GateError)
    assert "size <= 1,000 bytes binds" in shown.exception.message
    assert re.search(r"`--max-size \d+`", shown.exception.hint)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max-latency", "fast"], "is not a share of fp32's latency"),
        (["--max-latency", "0"], "is not a share"),
        (["--max-latency", "20s"], "is not a share"),
        (["--max-size", "3 parsecs"], "is not bytes"),
        (["--min-psnr", "-3"], "is not in the range"),
        (["--min-alignment", "90"], "is not in the range"),
        (["--precision-set", "w8a8,,w8"], "an empty name"),
        (["--minimise", "fun"], "is not one of"),
    ],
)
def test_options_that_say_nothing_are_exit_two(typed, args, message):
    shown = typed(*args)
    assert shown.exit_code == 2
    assert message in shown.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--backend", "coreml"], "does not run `coreml`"),
        (["--backend", "tensorrt"], "`tensorrt` is unknown"),
        (["--precision-set", "w4"], "does not execute w4"),
        (["--calibration", "absent.txt"], "cannot be read"),
    ],
)
def test_what_cannot_be_had_is_exit_two(typed, args, message):
    error = typed(*args).exception
    assert isinstance(error, EdgegenError) and error.exit_code == 2
    assert message in error.message


def test_too_few_prompts_are_refused(typed, tmp_path):
    (tmp_path / "few.txt").write_text("a small red circle\n" * 20)
    error = typed("--calibration", "few.txt").exception
    assert "different prompts" in error.message and error.exit_code == 2


def test_every_prompt_is_checked_before_anything_is_computed(typed, tmp_path):
    """Also one at the end, which no range comes from: those judge the plan."""
    lines = [f"a small {colour} {shape} in the center" for colour in ("red", "blue") for shape in ("circle", "square")]
    (tmp_path / "odd.txt").write_text(
        "\n".join([*lines, *(one.replace("small", "large") for one in lines), "zq wv kx"])
    )
    shown = typed("--calibration", "odd.txt")
    assert "prompt 9, 'zq wv kx': the student's tokenizer does not know" in shown.exception.message
    assert "capture" not in shown.stderr


def test_a_missing_model_is_an_error(tmp_path, capsys):
    assert main(["plan", str(tmp_path / "no.pt"), "--target", "linux-x86"]) in (1, 2)
    assert "no.pt" in capsys.readouterr().err
