"""`edgegen tune` on the tiny student: its front, its recipes, and what it refuses. Kernel times are made up here, so
that nothing is lowered; `test_bench` times real ones."""

import json
from pathlib import Path

import pytest

from edgegen.cli.main import main
from edgegen.errors import UsageError
from edgegen.graph.capture import capture
from edgegen.graph.count import count
from edgegen.prune import assemble, target_speed
from edgegen.prune.recipe import follow, read_recipe
from edgegen.students.checkpoint import save_pt
from edgegen.students.load import load


def made_up(backend, points, cache, progress):
    return {one: 0.001 + 1e-5 * one.read * one.written for one in points}


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory):
    """The folder of one run, the model that it was of, and what it said."""
    folder = tmp_path_factory.mktemp("tune")
    save_pt(tiny, folder / "tiny.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "times", made_up)
        patch.setattr(target_speed, "times", made_up)
        patch.setenv("EDGEGEN_CACHE_DIR", str(folder / "cache"))
        yield folder, folder / "tiny.pt"


def run(capsys, *args):
    code = main(["tune", *args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def arguments(tuned):
    folder, model = tuned
    fixed = [str(model), "--target", "linux-x86", "--backend", "tflite", "--samples", "2", "-o", str(folder / "out")]
    return [*fixed, "--points", "4", "--min-psnr", "0"]


def test_the_front_is_walked_and_its_best_points_are_recipes(tuned, arguments, capsys):
    folder, model = tuned
    code, out, err = run(capsys, *arguments, "--precision-set", "w8a8,w8", "--json")
    assert code == 0, err
    said = json.loads(out)
    shares = [one["estimated"]["latency tflite"] for one in said["front"]]
    assert shares == sorted(shares)
    assert shares[0] < 0.5
    assert any(one["compressed_ops"] for one in said["front"])  # precisions and widths are chosen together
    assert said["recipes"]
    tiny = load(model)
    for path in said["recipes"]:
        recipe = read_recipe(folder / "out" / path.rsplit("/", 1)[-1])
        left = load((folder / "out" / path.rsplit("/", 1)[-1]).with_suffix(".pt"))
        assert follow(recipe, tiny).fingerprint == left.fingerprint
        whole = sum(
            count(capture(part)).macs * (2 if name == "denoiser" else 1) for name, part in tiny.components.items()
        )
        now = sum(
            count(capture(part)).macs * (2 if name == "denoiser" else 1) for name, part in left.components.items()
        )
        assert recipe.estimated["macs"] == pytest.approx(now / whole)


def test_the_table_says_what_is_estimated(arguments, capsys):
    code, out, err = run(capsys, *arguments, "--precision-set", "none")
    assert code == 0, err
    assert "latency is estimated" in out
    assert "ms on linux-x86 with tflite (estimated; kernels timed on this machine" in out


def test_a_budget_that_nothing_keeps_to_names_what_binds_and_the_nearest(arguments, capsys):
    code, out, err = run(capsys, *arguments, "--precision-set", "none", "--max-latency", "1%", "--max-macs", "90%")
    assert (code, out) == (3, "")
    assert "latency tflite" in err
    assert "binds" in err
    assert "the nearest that there is" in err
    assert "hint: allow latency tflite" in err


def test_milliseconds_of_a_target_of_unknown_speed_are_refused(tuned, capsys):
    _, model = tuned
    code, _, err = run(capsys, str(model), "--target", "rpi5", "--precision-set", "none", "--max-latency", "20ms")
    assert code == 2
    assert "nobody has measured how fast target `rpi5`" in err
    assert "--max-latency 0.6x" in err


@pytest.mark.parametrize("workers", ["nowhere", "loky=tcp://127.0.0.1:1", "dask=tcp://127.0.0.1:1"])
def test_workers_that_joblib_does_not_have_are_refused(arguments, workers, capsys):
    code, out, err = run(capsys, *arguments, "--precision-set", "none", "--parallel", workers)
    assert (code, out) == (2, "")
    assert f"joblib cannot work with `{workers}`" in err
    assert "leave `--parallel` out" in err


def test_a_recipe_is_followed_and_healed(tuned, capsys):
    folder, model = tuned
    path = next((folder / "out").glob("tiny-*.json"))
    left = load(path.with_suffix(".pt"))
    call = [
        "prune",
        str(model),
        "--target",
        "linux-x86",
        "--backend",
        "tflite",
        "--recipe",
        str(path),
        "--samples",
        "2",
    ]
    code = main([*call, "-o", str(folder / "cut.pt"), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert json.loads(captured.out)["sha256"] == left.fingerprint == load(folder / "cut.pt").fingerprint
    before, after = json.loads(captured.out)["latency_ms_estimated"]["tflite"]
    assert after < before
    assert main([*call, "-o", str(folder / "healed.pt"), "--heal", "3", "--heal-batch", "2", "-q"]) == 0
    capsys.readouterr()
    healed = load(folder / "healed.pt")
    assert healed.config == left.config
    assert healed.components["denoiser"].fingerprint != left.components["denoiser"].fingerprint
    for more, why in (
        (["--max-macs", "60%"], "so does another option"),
        (["--component", "decoder"], "so does another option"),
        (["--target", "rpi5"], "made for target `linux-x86`, not for `rpi5`"),
    ):
        assert main([*call, *more, "-o", str(folder / "no.pt")]) == 2
        assert why in capsys.readouterr().err
    stray = json.loads(path.read_text())
    stray["prunings"]["nose"] = stray["prunings"].popitem()[1]
    path.with_name("stray.json").write_text(json.dumps(stray))
    assert main([*call, "--recipe", str(path.with_name("stray.json"))]) == 2
    assert "cuts component `nose`, which `tiny` does not have" in capsys.readouterr().err


def test_a_plan_costs_no_more_than_the_precisions_of_its_recipe(tuned, arguments, capsys):
    folder, _ = tuned
    code, out, err = run(capsys, *arguments, "--precision-set", "w8a8,w8", "--json", "-o", str(folder / "priced"))
    assert code == 0, err
    recipes = [Path(one) for one in json.loads(out)["recipes"]]
    path = next(one for one in recipes if any(json.loads(one.read_text())["precisions"].values()))
    left, plan = str(path.with_suffix(".pt")), folder / "tiny.plan.toml"
    call = ["plan", left, "--target", "linux-x86", "--no-repairs", "-o", str(plan), "-q", "--json"]
    assert main([*call, "--recipe", str(path)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["backends"] == ["tflite"]
    compressed = sum(n for counts in said["counts"].values() for one, n in counts.items() if one != "fp32")
    assert compressed
    dearer = json.loads(path.read_text()) | {"precisions": {}}
    path.with_name("float.json").write_text(json.dumps(dearer))
    for more, why in (
        (["--recipe", str(path), "--max-size", "30%"], "so does another option"),
        (["--recipe", str(path), "--backend", "onnx"], "made for tflite, not for `onnx`"),
        (["--recipe", str(path.with_name("float.json"))], "has no precisions"),
    ):
        assert main([*call, *more]) == 2
        assert why in capsys.readouterr().err
    assert main(["plan", str(folder / "tiny.pt"), *call[2:], "--recipe", str(path)]) == 2
    assert "is not what the recipe leaves of it" in capsys.readouterr().err


def test_a_recipe_of_another_student_is_refused(tuned, shapes):
    folder, _ = tuned
    recipe = read_recipe(next((folder / "out").glob("tiny-*.json")))
    with pytest.raises(UsageError, match="made for `tiny`"):
        follow(recipe, shapes)
    (folder / "broken.json").write_text('{"student": 3}')
    with pytest.raises(UsageError, match="does not fit at"):
        read_recipe(folder / "broken.json")
