"""A checkpoint of several sizes: each target gets the largest that fits it, and every bundle says why."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from edgegen.bundle.open import open_bundle
from edgegen.cache import Cache
from edgegen.cli.main import main
from edgegen.graph.capture import capture
from edgegen.precision.file import write_plan
from edgegen.precision.options import PlanOptions
from edgegen.precision.planner import make_plan
from edgegen.prune.elastic import at_level, with_levels
from edgegen.prune.find import spaces
from edgegen.prune.importance import magnitude
from edgegen.prune.ratio import by_ratio
from edgegen.prune.space import to_pruning
from edgegen.students.checkpoint import save_pt
from edgegen.students.config import StudentConfig
from edgegen.students.student import Student
from edgegen.targets.read import target_path
from edgegen.verify.inside import load_model
from tests.build.test_memory import model as wide  # noqa: F401
from tests.silent import Silent

CEILING = 1_700_000


@pytest.fixture(scope="module")
def elastic(wide, tmp_path_factory):  # noqa: F811
    """The wide tiny student with a decoder of 32 channels, of 16 and of 8: most of its memory is that decoder's."""
    from edgegen.students.load import load

    path = tmp_path_factory.mktemp("elastic") / "elastic.pt"
    save_pt(with_sizes(load(wide), "decoder"), path)
    return path


def with_sizes(student, name):
    """Three sizes of its component `name`, a convolutional decoder: units go by magnitude."""
    part = student.components[name]
    found = spaces(capture(part))
    ranks = {space: units.tolist() for space, units in magnitude(part, found).items()}
    levels = {"large": {}}
    for level, ratio in (("medium", 0.5), ("small", 0.75)):
        levels[level] = {name: to_pruning(found, by_ratio(found, ranks, ratio))}
    return with_levels(student, levels)


@pytest.fixture(scope="module")
def lone(wide, tmp_path_factory):  # noqa: F811
    """The decoder as a student of one network: few kernels are to be timed. In one size, and in three."""
    from edgegen.students.load import load

    student = load(wide)
    part = student.components["decoder"]
    config = StudentConfig(name="lone", task="single", components={"model": student.config.components["decoder"]})
    alone = Student(config, {"model": dataclasses.replace(part, name="model")})
    folder = tmp_path_factory.mktemp("lone")
    save_pt(alone, folder / "one.pt")
    save_pt(with_sizes(alone, "model"), folder / "three.pt")
    return folder / "one.pt", folder / "three.pt"


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """This machine's target with less memory for an app."""
    text = target_path("linux-x86").read_text()
    text = text.replace('name = "linux-x86"', 'name = "small-box"', 1).replace("8_589_934_592", str(CEILING))
    path = tmp_path_factory.mktemp("targets") / "small-box.toml"
    path.write_text(text)
    return path


def said(capsys, *args):
    capsys.readouterr()
    code = main(["build", *map(str, args)])
    return code, capsys.readouterr()


def recipe(capsys, *args):
    code, out = said(capsys, *args, "--dry-run", "--json", "-q")
    assert code == 0, out.err
    (one,) = json.loads(out.out)["recipes"]
    return one


@pytest.fixture(scope="module")
def bundles(build_cache, elastic, box, tmp_path_factory):
    """One command, two targets."""
    folder = tmp_path_factory.mktemp("bundles")
    assert main(["build", "--target", f"linux-x86,{box}", str(elastic), "-o", str(folder), "-q"]) == 0
    return open_bundle(folder / "linux-x86"), open_bundle(folder / "small-box")


def test_each_target_gets_the_largest_that_fits_its_memory(elastic, bundles):
    from edgegen.students.load import load

    roomy, small = bundles
    assert roomy.manifest.level.name == "large"
    assert not any(one.passed_over for one in roomy.manifest.level.levels)
    choice = small.manifest.level
    assert choice.name == small.manifest.options["level"] != "large"
    assert [one.name for one in choice.levels] == ["large", "medium", "small"]
    assert "tiles" in choice.levels[0].passed_over[0]
    chosen = next(one for one in choice.levels if one.name == choice.name)
    assert not chosen.passed_over
    assert chosen.memory_bytes_estimated["onnx"] == small.manifest.memory["onnx"].peak_bytes <= 0.8 * CEILING
    assert small.manifest.tilings == {}
    student = load(elastic)
    for bundle in bundles:
        assert bundle.manifest.student_sha256 == at_level(student, bundle.manifest.level.name).fingerprint
        assert load_model(elastic, bundle).fingerprint == bundle.manifest.student_sha256


def test_the_report_says_what_was_passed_over(bundles):
    text = (bundles[1].root / "report.html").read_text()
    assert 'id="level"' in text and "passed over" in text and "in tiles" in text


def test_a_share_of_latency_picks_the_largest_within_it(build_cache, lone, capsys):
    elastic = lone[1]
    everything = recipe(capsys, elastic, "--target", "linux-x86", "--max-latency", "1x")["level"]
    assert everything["name"] == "large"
    shares = [one["latency_share_estimated"]["onnx"] for one in everything["levels"]]
    assert shares[0] == 1 > shares[1] > shares[2]
    times = [one["latency_ms_estimated"]["onnx"] for one in everything["levels"]]
    assert times[1] / times[0] == pytest.approx(shares[1], abs=1e-3)
    between = (shares[0] + shares[1]) / 2
    found = recipe(capsys, elastic, "--target", "linux-x86", "--max-latency", f"{between:.6f}x")["level"]
    assert found["name"] == "medium"
    assert "of the largest level's (estimated)" in found["levels"][0]["passed_over"][0]
    milliseconds = (times[1] + times[2]) / 2
    found = recipe(capsys, elastic, "--target", "linux-x86", "--max-latency", f"{milliseconds:.6f}ms")["level"]
    assert found["name"] == "small" and len(found["levels"][1]["passed_over"]) == 1
    assert found["latency_source"].startswith("kernels timed on this machine with onnx, scaled by")
    code, out = said(capsys, elastic, "--target", "linux-x86", "--dry-run", "--max-latency", "0.01x")
    assert code == 3 and "no level of `lone` fits `linux-x86`" in out.err and "the nearest is `small`" in out.err
    assert out.err.count("0.01 are allowed") == 3
    code, out = said(
        capsys, elastic, "--target", "linux-x86", "--dry-run", "--level", "large", "--max-latency", f"{between:.6f}x"
    )
    assert code == 3 and "level `large` of `lone` does not fit" in out.err


def test_a_level_that_is_named_is_taken(build_cache, elastic, box, capsys):
    found = recipe(capsys, elastic, "--target", box, "--level", "large")["level"]
    assert found["name"] == "large" and found["why"] == "by `--level large`" and len(found["levels"]) == 1
    code, out = said(capsys, elastic, "--target", box, "--level", "huge")
    assert code == 2 and "no level `huge`" in out.err


def test_memory_that_no_level_fits_is_exit_3_with_figures(build_cache, elastic, capsys):
    code, out = said(capsys, elastic, "--target", "linux-x86", "--dry-run", "--max-memory", "20kB")
    assert code == 3
    assert out.err.count("memory with onnx: component") == 3


def test_milliseconds_of_a_device_that_nobody_timed_are_refused(elastic, capsys):
    code, out = said(capsys, elastic, "--target", "pixel8", "--dry-run", "--max-latency", "20ms")
    assert code == 2 and "nobody has measured" in out.err and "`--max-latency 0.6x`" in out.err


def test_a_student_of_one_size_is_held_against_milliseconds(build_cache, lone, capsys):
    model = lone[0]
    found = recipe(capsys, model, "--target", "linux-x86", "--max-latency", "1000ms")["level"]
    assert found["name"] is None and found["levels"][0]["latency_ms_estimated"]["onnx"] > 0
    assert recipe(capsys, model, "--target", "linux-x86")["level"] is None
    code, out = said(capsys, model, "--target", "linux-x86", "--dry-run", "--max-latency", "0.001ms")
    assert code == 3 and "0.001 ms are allowed" in out.err
    assert "`edgegen prune MODEL --target linux-x86 --max-latency 0.001ms -o small.pt`" in out.err
    code, out = said(capsys, model, "--target", "linux-x86", "--dry-run", "--max-latency", "0.6x")
    assert code == 2 and "is a share of its own" in out.err
    code, out = said(capsys, model, "--target", "linux-x86", "--dry-run", "--level", "small")
    assert code == 2 and "has one size" in out.err


def test_a_plan_says_which_level_it_is_of(build_cache, elastic, tmp_path, capsys):
    from edgegen.students.load import load
    from edgegen.targets import load_target

    student = load(elastic)
    options = PlanOptions(precisions=("w8",), samples=1, judged=4, projections=1, confirmed=1, spread=2, repairs=False)
    planned = make_plan(
        at_level(student, "medium"), load_target("linux-x86"), ("tflite",), options, Cache(None), Silent()
    )
    path = Path(tmp_path) / "plan.toml"
    write_plan(path, planned.plan)
    found = recipe(capsys, elastic, "--target", "linux-x86", "--plan", path)
    assert found["level"]["name"] == "medium" and "was made for" in found["level"]["why"]
    code, out = said(capsys, elastic, "--target", "linux-x86", "--dry-run", "--plan", path, "--level", "small")
    assert code != 0 and "the plan was made for" in out.err
    stranger = planned.plan.model_copy(update={"student_sha256": "0" * 64})
    write_plan(path, stranger)
    code, out = said(capsys, elastic, "--target", "linux-x86", "--dry-run", "--plan", path)
    assert code == 2 and "is no level of this checkpoint" in out.err


def test_a_plan_wants_to_know_which_level(elastic, capsys):
    assert main(["plan", str(elastic), "--target", "linux-x86"]) == 2
    assert "use `--level large`, `--level medium`, `--level small`" in capsys.readouterr().err
