"""The host runtime against the torch reference, and everything that it has to refuse or remark on."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edgegen
from edgegen.bundle.backends import choose_backend
from edgegen.bundle.manifest import Manifest
from edgegen.bundle.noise import normal
from edgegen.bundle.open import open_bundle
from edgegen.bundle.run import Runtime, generate
from edgegen.bundle.write import write_bundle
from edgegen.errors import EdgegenError, GateError, UsageError
from edgegen.lower import requirements

PROMPT = "a small red circle left of a large blue square"


@pytest.fixture(scope="module")
def bundle(tiny_contents, tmp_path_factory):
    return open_bundle(write_bundle(tmp_path_factory.mktemp("run") / "tiny", tiny_contents))


@pytest.fixture(scope="module")
def runtime(bundle):
    with Runtime(bundle) as loaded:
        yield loaded


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_draws_what_the_student_draws(tiny, runtime, steps, seed):
    """Same noise, same schedule (with fresh noise: the tiny student samples with LCM), fp32 kernels of two runtimes."""
    from edgegen.students.sample import decoder_input, denoise

    drawn = runtime.generate(PROMPT, seed, steps)
    context = tiny.components["text_encoder"].module(tiny.tokenize([PROMPT]))
    records = list(denoise(tiny, {"context": context}, [seed], steps))
    assert np.array_equal(drawn.given, tiny.tokenize([PROMPT]).numpy())
    assert np.array_equal(drawn.noise, normal(seed, 0, (1, 4, 8, 8)))
    for mine, record in zip(drawn.latents, records, strict=True):
        np.testing.assert_allclose(mine, record.latent_out.numpy(), rtol=1e-4, atol=1e-3)
    image = tiny.components["decoder"].module(decoder_input(tiny, records[-1].latent_out)).numpy()
    np.testing.assert_allclose(drawn.decoded, image, rtol=1e-4, atol=1e-4)
    assert drawn.image.shape == (16, 16, 3) and drawn.image.dtype == np.uint8
    expected = np.rint((np.clip(image[0].astype(np.float64), -1, 1) + 1) * 127.5).transpose(1, 2, 0)
    assert np.abs(drawn.image - expected).max() <= 1


def test_prompt_seed_and_steps_all_matter_and_nothing_else(runtime):
    base = runtime.generate(PROMPT, 3)
    assert base.steps == 2, "the bundle's default"
    assert np.array_equal(base.decoded, runtime.generate(PROMPT, 3, 2).decoded)
    for other in (
        runtime.generate("a large orange triangle", 3),
        runtime.generate(PROMPT, 4),
        runtime.generate(PROMPT, 3, 1),
    ):
        assert not np.array_equal(base.decoded, other.decoded)


def test_timings_name_every_stage_in_order(runtime):
    stages = list(runtime.generate(PROMPT, 0, 2).timings)
    loads = ["load.tokenizer", "load.text_encoder", "load.denoiser", "load.decoder"]
    calls = ["tokenize", "text_encoder", "noise", "denoiser.1", "denoiser.2", "decoder", "picture"]
    assert stages == loads + calls


def test_remarks_on_the_prompt(runtime):
    assert runtime.generate(PROMPT, 0).warnings == ()
    assert runtime.generate("", 0).warnings == ()
    (unknown,) = runtime.generate("a small Dragon left of a Dragon, Red circle", 0).warnings
    assert "`Dragon`, `,`" in unknown and "Red" not in unknown
    long = "a small red circle " * 4 + "at the top"
    (cut,) = runtime.generate(long, 0).warnings
    assert "cut off" in cut and cut.count("red circle") == 1 and "at the top" in cut


@pytest.mark.parametrize("steps", [0, -1, 3, 4, 10**9])
def test_steps_that_were_not_distilled(runtime, steps):
    with pytest.raises(UsageError, match=f"not distilled for {steps} steps") as caught:
        runtime.generate(PROMPT, 0, steps)
    assert caught.value.hint == "use `--steps 1` or `--steps 2`"


def test_a_prompt_that_is_no_text(runtime):
    with pytest.raises(UsageError, match="UTF-8"):
        runtime.generate("a \udcff circle", 0)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_that_do_not_fit(runtime, seed):
    with pytest.raises(UsageError, match="64 bits"):
        runtime.generate(PROMPT, seed)


def test_generate_needs_no_torch(bundle):
    code = (
        "import sys; from pathlib import Path\n"
        "from edgegen.bundle.open import open_bundle\n"
        "from edgegen.bundle.run import generate\n"
        "drawn = generate(open_bundle(Path(sys.argv[1])), 'a red circle', 1)\n"
        "heavy = {'torch', 'onnx', 'coremltools', 'transformers'} & set(sys.modules)\n"
        "print(drawn.image.shape, sorted(heavy))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(edgegen.__file__).parents[1])}
    command = [sys.executable, "-c", code, str(bundle.root)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "(16, 16, 3) []\n"


def with_manifest(bundle, **changes):
    return dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update=changes))


def test_the_choice_of_backend(bundle):
    assert choose_backend(bundle) == "onnx"
    assert choose_backend(bundle, "onnx") == "onnx"
    with pytest.raises(UsageError, match="not asked for") as caught:
        choose_backend(bundle, "coreml")
    assert caught.value.hint == "use `--backend onnx`"
    with pytest.raises(UsageError, match="`sorcery` is unknown"):
        choose_backend(bundle, "sorcery")
    partial = with_manifest(bundle, artifacts=bundle.manifest.artifacts[:2])
    with pytest.raises(UsageError, match="no backend has all"):
        choose_backend(partial)


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML is executed on macOS")
def test_a_runtime_that_is_here_goes_before_an_evaluator(bundle, monkeypatch):
    """Artifacts that claim to be Core ML come first in the target's order; nothing but the evaluator executes them
    here."""
    claimed = tuple(one.model_copy(update={"backend": "coreml"}) for one in bundle.manifest.artifacts)
    both = with_manifest(bundle, artifacts=(*claimed, *bundle.manifest.artifacts))
    assert both.backends() == ("coreml", "onnx")
    assert choose_backend(both) == "onnx"
    assert choose_backend(both, "coreml") == "coreml"
    assert choose_backend(with_manifest(bundle, artifacts=claimed)) == "coreml"
    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name == "torch" else 1)
    with pytest.raises(UsageError, match="cannot be executed here: `coreml`: not installed: `torch`") as caught:
        choose_backend(with_manifest(bundle, artifacts=claimed))
    assert caught.value.hint == "pip install 'edgegen[coreml]'"


def test_bundles_that_do_not_fit_together(bundle):
    manifest: Manifest = bundle.manifest
    with pytest.raises(UsageError, match="single network"):
        generate(with_manifest(bundle, task="single"), PROMPT, 0)
    for missing in ("sampler", "latent", "noise", "tokenizer"):
        with pytest.raises(EdgegenError, match=f"lacks its {missing}"):
            generate(with_manifest(bundle, **{missing: None}), PROMPT, 0)
    without = {name: io for name, io in manifest.components.items() if name != "decoder"}
    with pytest.raises(EdgegenError, match="lacks its decoder"):
        generate(with_manifest(bundle, components=without), PROMPT, 0)
    wide = manifest.latent.model_copy(update={"shape": (1, 4, 9, 9)})
    with pytest.raises(EdgegenError, match="do not fit together"):
        generate(with_manifest(bundle, latent=wide), PROMPT, 0)


@pytest.mark.parametrize(
    ("key", "said"),
    [("input_scale", "component `denoiser` of backend `onnx` gave"), ("prediction", "the latent is not finite after")],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_values_that_are_not_finite_are_named(tiny_bundle, key, said):
    """Coefficients of a broken schedule drive real artifacts out of float32's range."""
    document = json.loads((tiny_bundle / "manifest.json").read_text())
    document["sampler"]["tables"]["2"][1][key] = 1e39
    (tiny_bundle / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(GateError) as caught:
        generate(open_bundle(tiny_bundle), PROMPT, 0)
    assert said in caught.value.message and "step 2 of 2" in caught.value.message
    assert caught.value.exit_code == 3 and "edgegen verify" in caught.value.hint


def test_a_tokenizer_that_is_none(tiny_bundle):
    path = tiny_bundle / "tokenizer/tokenizer.json"
    path.write_text('{"model": {}}'.ljust(path.stat().st_size))
    with pytest.raises(EdgegenError, match="tokenizer"):
        generate(open_bundle(tiny_bundle, check_hashes=False), PROMPT, 0)


def test_an_artifact_that_is_none(tiny_bundle):
    path = tiny_bundle / "components/onnx/denoiser.onnx"
    path.write_bytes(b"\x00" * path.stat().st_size)
    with pytest.raises(EdgegenError, match=r"denoiser\.onnx"):
        generate(open_bundle(tiny_bundle, check_hashes=False), PROMPT, 0)
