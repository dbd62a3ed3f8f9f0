"""A student that starts from a picture, from checkpoint to video, with the command line as people type it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from edgegen.bundle.film import check_film_path
from edgegen.bundle.open import open_bundle
from edgegen.bundle.run import Runtime
from edgegen.bundle.start_picture import read_start_picture
from edgegen.cli.main import main
from edgegen.errors import UsageError
from edgegen.students.checkpoint import save_pt
from edgegen.students.sample import condition, decode, decoder_input, denoise
from edgegen.verify.bundle import stored_reference


@pytest.fixture(scope="module")
def bundle(build_cache, film, tmp_path_factory):
    folder = tmp_path_factory.mktemp("film")
    save_pt(film, folder / "film.pt")
    assert main(["build", "--target", "linux-x86", "-o", str(folder / "film"), str(folder / "film.pt"), "-q"]) == 0
    return folder / "film"


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("start") / "start.png"
    pixels = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_bundle_holds_the_example_pictures_and_pairs_of_them(bundle, film):
    manifest = open_bundle(bundle).manifest
    assert manifest.task == "image-to-video" and manifest.tokenizer is None
    assert manifest.conditions == {"flow_score": 1.0}
    first, second, other_count = manifest.fixtures
    assert (first.prompt, second.prompt) == ("example picture 1", "example picture 2")
    assert (first.steps, other_count.steps) == (2, 1)
    assert first.inputs.keys() == {"image"} and first.conditioning.keys() == {"image_latent"}
    given = np.load(bundle / first.inputs["image"])
    assert np.array_equal(given, film.given(["example picture 1"]).numpy())
    assert first.other is not None and first.other.prompt == "example picture 2"
    restored = stored_reference(open_bundle(bundle)).restored()
    assert restored.trajectories[0].conditioning.keys() == {"image_latent", "flow_score"}
    assert {len(restored.samples[name]) for name in ("image_encoder", "denoiser", "decoder")} == {2, 5, 3}


def test_reports_measure_videos_by_their_worst_frame(bundle):
    (parity,) = json.loads((bundle / "reports" / "parity.json").read_text()).values()
    assert parity["status"] == "passed" and len(parity["pictures"]) == 3
    assert min(one["psnr_db"] for one in parity["pictures"]) >= 45
    assert len(parity["sensitivity"]) == 4
    assert all(abs(one["ratio"] - 1) <= 0.02 and not one["degenerate"] for one in parity["sensitivity"])
    page = (bundle / "report.html").read_text()
    assert "Videos" in page and "worst frame" in page and "look at its picture" in page


def test_verify_needs_nothing_but_the_bundle(bundle, capsys):
    assert main(["verify", str(bundle), "--json", "-q"]) == 0
    assert "passed" in capsys.readouterr().out


@pytest.mark.parametrize("score", [1.0, 4.0])
def test_draws_what_the_student_draws(bundle, film, picture, score):
    given, remarks = read_start_picture(picture, 64, 64)
    assert "cut to it around its middle" in remarks[0]
    with Runtime(open_bundle(bundle)) as runtime:
        drawn = runtime.generate(given, 7, 2, {"flow_score": score})
    heard = condition(film, torch.from_numpy(given), {"flow_score": score})
    *_, last = denoise(film, heard, [7], 2)
    expected = decode(film, decoder_input(film, last.latent_out)).numpy()
    np.testing.assert_allclose(drawn.decoded, expected, rtol=1e-3, atol=1e-3)
    assert drawn.frames.shape == (9, 64, 64, 3) and drawn.image.shape == (64, 6 * 64, 3)
    assert drawn.conditions == {"flow_score": score}


def test_a_scalar_changes_what_is_drawn(bundle, picture):
    given, _ = read_start_picture(picture, 64, 64)
    with Runtime(open_bundle(bundle)) as runtime:
        base = runtime.generate(given, 7)
        assert np.array_equal(base.decoded, runtime.generate(given, 7, None, {"flow_score": 1.0}).decoded)
        assert not np.array_equal(base.decoded, runtime.generate(given, 7, None, {"flow_score": 4.0}).decoded)
        assert not np.array_equal(base.decoded, runtime.generate(-given, 7).decoded)


@pytest.mark.parametrize("suffix", ["gif", "webp", "mp4"])
def test_writes_every_frame(bundle, picture, suffix, tmp_path, capsys):
    path = tmp_path / f"out.{suffix}"
    arguments = ["run", str(bundle), "--image", str(picture), "--fps", "10", "-o", str(path), "--json"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "denoise, step by step 2/2" in said.err and "write, frame by frame 9/9" in said.err
    report = json.loads(said.out)
    assert (report["frames"], report["size"], report["conditions"]) == (9, [64, 64], {"flow_score": 1.0})
    if suffix == "mp4":
        av = pytest.importorskip("av")
        with av.open(str(path)) as container:
            assert container.streams.video[0].average_rate == 10
            found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    else:
        with Image.open(path) as opened:
            found = []
            for index in range(opened.n_frames):
                opened.seek(index)
                assert suffix == "webp" or opened.info["duration"] == 100
                found.append(np.asarray(opened.convert("RGB")))
    assert len(found) == 9 and {one.shape for one in found} == {(64, 64, 3)}
    with Runtime(open_bundle(bundle)) as runtime:
        drawn = runtime.generate(read_start_picture(picture, 64, 64)[0], 0)
    # Colour is stored at half the size, and this student's videos are coloured noise: brightness is what stays.
    grey, wanted = (np.stack([one.mean(axis=2) for one in frames]) for frames in (found, drawn.frames))
    away = np.abs(grey[:, None] - wanted[None]).mean(axis=(2, 3))
    assert away.argmin(axis=1).tolist() == list(range(9)), "the right frames in the right order"
    assert away.diagonal().max() < 8


def test_a_png_shows_six_frames_side_by_side(bundle, picture, tmp_path):
    path = tmp_path / "out.png"
    assert main(["run", str(bundle), "--image", str(picture), "-o", str(path), "-q"]) == 0
    with Image.open(path) as opened:
        assert opened.size == (6 * 64, 64)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "a cat"], "--image FILE"),
        (["--image", "start.png", "--prompt", "a cat"], "exclude each other"),
        ([], "--image"),
        (["--image", "no.png"], "does not exist"),
        (["--image", "start.png", "--condition", "speed=1"], "`flow_score`"),
        (["--image", "start.png", "--condition", "flow_score"], "NAME=VALUE"),
        (["--image", "start.png", "--condition", "flow_score=nan"], "no number"),
        (["--image", "start.png", "-o", "out.jpg"], ".gif"),
        (["--image", "start.png", "--fps", "1000"], "--fps"),
        (["--image", "text.png"], "no picture"),
    ],
)
def test_what_cannot_be_is_a_usage_error(bundle, picture, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "start.png").write_bytes(picture.read_bytes())
    (tmp_path / "text.png").write_text("no picture at all")
    assert main(["run", str(bundle), *arguments, "-q"]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("out.*"))


def test_a_picture_for_a_student_of_text(tiny_bundle, picture, capsys):
    assert main(["run", str(tiny_bundle), "--image", str(picture), "-q"]) == 2
    assert "--prompt TEXT" in capsys.readouterr().err


def test_mp4_without_its_library_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("edgegen.bundle.film.find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        check_film_path(tmp_path / "out.mp4")
    assert "pip install 'edgegen[video]'" in (caught.value.hint or "")
