"""A build below a ceiling: loaded in turn, cut into parts, drawn in tiles; and the picture is the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgegen.bundle.open import open_bundle
from edgegen.bundle.run import Runtime
from edgegen.cli.main import main
from edgegen.students.architectures import build_module
from edgegen.students.checkpoint import save_pt
from edgegen.students.config import StudentConfig
from edgegen.students.student import Component, Student

PROMPT = "a small red circle"


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """The tiny student with a larger picture and a wider decoder: most of its memory is the decoder's values."""
    settings = tiny.config.model_dump()
    latent = (1, 4, 40, 40)
    parts = settings["components"]
    parts["denoiser"]["config"]["sample_size"] = 40
    parts["decoder"]["config"]["width"] = 32
    for part, ends in (("denoiser", ("inputs", "outputs")), ("decoder", ("inputs",))):
        for end in ends:
            for spec in parts[part][end]:
                spec["shape"] = latent if len(spec["shape"]) == 4 else spec["shape"]
    parts["decoder"]["outputs"][0]["shape"] = (1, 3, 80, 80)
    settings["latent"]["shape"] = latent
    config = StudentConfig.model_validate(settings)
    torch.manual_seed(0)
    components = {
        name: Component(name, build_module(part.architecture, dict(part.config)), part.inputs, part.outputs)
        for name, part in config.components.items()
    }
    path = tmp_path_factory.mktemp("large") / "model.pt"
    save_pt(Student(config, components, tiny.tokenizer_json), path)
    return path


def built(model, path, *options):
    assert main(["build", "--target", "linux-x86", *options, "-o", str(path), str(model), "-q"]) == 0
    return open_bundle(path)


@pytest.fixture(scope="module")
def whole(build_cache, model, tmp_path_factory):
    return built(model, tmp_path_factory.mktemp("memory") / "whole")


@pytest.fixture(scope="module")
def small(build_cache, model, tmp_path_factory):
    return built(model, tmp_path_factory.mktemp("memory") / "small", "--max-memory", "1500kB")


def test_what_fits_is_left_as_it_is(whole):
    manifest = whole.manifest
    assert manifest.tilings == {}
    assert manifest.memory["onnx"].load == "together"
    assert {one.parts for one in manifest.artifacts} == {1}


def test_below_a_ceiling_the_plan_says_what_it_chose_and_why(small):
    plan = small.manifest.memory["onnx"]
    assert plan.load == "sequential"
    assert plan.peak_bytes <= plan.ceiling_bytes == 1_500_000
    said = " ".join(plan.why)
    assert "each is loaded, run and let go" in said and "tiles of" in said and "`--max-memory`" in said
    tiling = small.manifest.tilings["decoder"]
    assert tiling.count > 1 and tiling.seam < 0.1
    assert any(one.parts > 1 for one in small.manifest.artifacts)


def test_it_draws_the_same_picture(whole, small):
    with Runtime(whole) as one, Runtime(small) as other:
        expected, drawn = one.generate(PROMPT, 3), other.generate(PROMPT, 3)
    grey_levels = np.abs(np.clip(expected.decoded, -1, 1) - np.clip(drawn.decoded, -1, 1)).max() * 127.5
    assert grey_levels < 1
    assert expected.decoded.std() > 0.01
    assert {"load.text_encoder", "load.denoiser", "load.decoder"} <= drawn.timings.keys()


def test_a_bundle_in_parts_and_tiles_verifies_again(small, capsys):
    assert main(["verify", str(small.root), "--blame"]) == 0


def test_a_ceiling_that_nothing_meets_is_refused_with_figures(build_cache, model, tmp_path, capsys):
    arguments = ["build", "--target", "linux-x86", "--max-memory", "100kB", "-o", str(tmp_path / "b"), str(model)]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "needs" in said and "KiB are there" in said and "hint:" in said
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("value", ["0", "-1", "many", "5 parsecs", "3%"])
def test_a_ceiling_that_is_no_amount_is_a_usage_error(model, value, capsys):
    assert main(["build", "--target", "linux-x86", f"--max-memory={value}", str(model)]) == 2
    assert "is not bytes as" in capsys.readouterr().err
