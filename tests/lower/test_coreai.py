"""The Core AI backend on the shapes student, executed by Core AI's own CPU runtime."""

import asyncio
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from edgegen.errors import EdgegenError
from edgegen.graph.capture import capture
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower import coreai
from edgegen.lower.backend import LowerRequest
from edgegen.lower.worker import lower_in_child
from edgegen.rewrite.to_half import ToHalf

BACKEND = coreai.BACKEND
pytestmark = pytest.mark.skipif(BACKEND.not_executed_here() is not None, reason="no wheel of coreai-core for this host")
COMPONENTS = ("text_encoder", "denoiser", "decoder")
AGAIN = """
import sys, torch
from pathlib import Path
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import LowerRequest, get_backend
from edgegen.rewrite.to_half import ToHalf

name, program, out, inputs, outputs, precision = sys.argv[1:]
specs = [tuple(TensorSpec.model_validate_json(line) for line in text.splitlines()) for text in (inputs, outputs)]
get_backend(name).lower(torch.export.load(program), LowerRequest("again", *specs, precision, Path(out)))
"""


@pytest.fixture(scope="session")
def assets(lowering, tmp_path_factory):
    folders = {precision: tmp_path_factory.mktemp(f"coreai_{precision}") for precision in BACKEND.precisions}
    made = {}
    for name in COMPONENTS:
        for precision in BACKEND.precisions:
            made[name, precision] = lowering.lower(BACKEND, folders[precision], name, precision)
    return made


@pytest.fixture
def decoder(lowering, assets):
    part = lowering.parts["decoder"]
    executable = BACKEND.load(assets["decoder", "fp32"].path, part.inputs, part.outputs)
    yield executable
    executable.close()


@pytest.mark.parametrize(("precision", "floor"), [("fp32", 100.0), ("fp16", 40.0)])
@pytest.mark.parametrize("name", COMPONENTS)
def test_it_computes_what_torch_computes(lowering, assets, name, precision, floor):
    part, asset = lowering.parts[name], assets[name, precision]
    executable = BACKEND.load(asset.path, part.inputs, part.outputs)
    try:
        outputs = executable(lowering.inputs[name])
    finally:
        executable.close()
    (spec,) = part.outputs
    assert list(outputs) == [spec.name]
    value = outputs[spec.name]
    assert (value.shape, value.dtype) == (spec.shape, np.float32)
    quality = lowering.sqnr(lowering.expected[name], value)
    print(f"{name} {precision}: {quality:.1f} dB")
    assert quality >= floor


@pytest.mark.parametrize("name", COMPONENTS)
def test_half_precision_halves_the_asset_and_is_half(assets, name):
    full, half = ((assets[name, p].path / "main.mlirb").stat().st_size for p in ("fp32", "fp16"))
    assert 0.45 < half / full < 0.6
    assert "Float16" in assets[name, "fp16"].result.details["compute_types"]
    assert "Float16" not in assets[name, "fp32"].result.details["compute_types"]


def test_delegation_is_not_claimed(assets):
    delegation = assets["denoiser", "fp16"].result.delegation
    assert not delegation.known and not delegation.full
    assert delegation.total_ops > 500
    assert "device" in delegation.note


def test_asset_tells_neither_when_nor_where(assets):
    path = assets["text_encoder", "fp32"].path
    assert {p.name for p in path.iterdir()} == {"main.mlirb", "main.hash", "metadata.json"}
    assert b"reation" not in (path / "metadata.json").read_bytes()
    code = (path / "main.mlirb").read_bytes()
    assert b"site-packages" not in code and b".py" not in code
    assert hashlib.sha256(code).digest() == (path / "main.hash").read_bytes()


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tiny, tmp_path, capfd):
    """The worker's child, and a process with another hash seed that is given the same program."""
    part = tiny.components["denoiser"]
    program = ToHalf()(capture(part)).program
    folders = [tmp_path / "worker", tmp_path / "other"]
    folders[1].mkdir()
    request = LowerRequest("again", part.inputs, part.outputs, "fp16", folders[0])
    lowered = lower_in_child("coreai", program, request, tmp_path / "log.txt")
    assert capfd.readouterr().out == ""  # what the converter says is in the log
    assert lowered.file == f"again{BACKEND.suffix}"
    torch.export.save(program, tmp_path / "program.pt2")
    specs = ["\n".join(s.model_dump_json() for s in side) for side in (part.inputs, part.outputs)]
    subprocess.run(
        [sys.executable, "-c", AGAIN, "coreai", str(tmp_path / "program.pt2"), str(folders[1]), *specs, "fp16"],
        env=os.environ | {"PYTHONHASHSEED": "2"},
        check=True,
        capture_output=True,
    )
    trees = [
        {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        for folder in folders
    ]
    assert len(trees[0]) == 3
    assert trees[0] == trees[1]


def test_results_are_the_callers_own(decoder, lowering):
    inputs = lowering.inputs["decoder"]
    first = decoder(inputs)["image"]
    kept = first.copy()
    second = decoder({"latent": np.zeros_like(inputs["latent"])})["image"]
    assert np.array_equal(first, kept) and not np.array_equal(first, second)
    first[:] = 0  # writable
    assert np.array_equal(decoder(inputs)["image"], kept)


def test_non_contiguous_input_is_taken_as_it_reads(decoder, lowering):
    latent = lowering.inputs["decoder"]["latent"]
    strided = np.ascontiguousarray(latent.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)
    assert not strided.flags.c_contiguous
    assert np.array_equal(decoder({"latent": strided})["image"], decoder({"latent": latent})["image"])


def test_it_works_inside_an_event_loop_and_from_threads(decoder, lowering):
    inputs = lowering.inputs["decoder"]
    wanted = decoder(inputs)["image"]

    async def call():
        return decoder(inputs)["image"]

    assert np.array_equal(asyncio.run(call()), wanted)
    with ThreadPoolExecutor(4) as pool:
        assert all(np.array_equal(got["image"], wanted) for got in pool.map(decoder, [inputs] * 8))


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "without its input `latent`"),
        ({"latent": np.zeros((1, 4, 16, 16), np.float32), "noise": np.zeros(1, np.float32)}, "no input `noise`"),
        ({"latent": np.zeros((1, 4, 8, 8), np.float32)}, r"is float32\[1, 4, 8, 8\], expected float32\[1, 4, 16, 16\]"),
        ({"latent": np.zeros((1, 4, 16, 16), np.float64)}, r"is float64\[1, 4, 16, 16\], expected float32"),
    ],
)
def test_wrong_inputs_are_refused(decoder, inputs, said):
    with pytest.raises(EdgegenError, match=said):
        decoder(inputs)


def test_closing_ends_thread_and_calls(lowering, assets):
    part = lowering.parts["decoder"]
    before = threading.active_count()
    executable = BACKEND.load(assets["decoder", "fp32"].path, part.inputs, part.outputs)
    executable(lowering.inputs["decoder"])
    executable.close()
    executable.close()
    assert threading.active_count() == before
    with pytest.raises(EdgegenError, match="closed"):
        executable(lowering.inputs["decoder"])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("truncated", "damaged"),
        ("flipped", "damaged"),
        ("no program", "it has no `main.mlirb`"),
        ("no hash", "it has no `main.hash`"),
        ("not there", "it has no `main.mlirb`"),
        ("metadata", "cannot be loaded"),
        ("noise with its hash", "cannot be loaded"),
        ("half with its hash", "cannot be loaded"),
    ],
)
def test_a_damaged_asset_is_told(lowering, assets, tmp_path, damage, said):
    part, path = lowering.parts["decoder"], tmp_path / "decoder.aimodel"
    shutil.copytree(assets["decoder", "fp32"].path, path)
    program, digest = path / "main.mlirb", path / "main.hash"
    code = program.read_bytes()
    if damage == "truncated":
        program.write_bytes(code[:-100])
    elif damage == "flipped":
        program.write_bytes(code[:5000] + bytes([code[5000] ^ 1]) + code[5001:])
    elif damage == "no program":
        program.unlink()
    elif damage == "no hash":
        digest.unlink()
    elif damage == "not there":
        shutil.rmtree(path)
    elif damage == "metadata":
        (path / "metadata.json").write_text("{")
    else:
        code = os.urandom(4096) if damage == "noise with its hash" else code[: len(code) // 2]
        program.write_bytes(code)
        digest.write_bytes(hashlib.sha256(code).digest())
    before = threading.active_count()
    with pytest.raises(EdgegenError, match=r"`decoder\.aimodel`.*" + said):
        BACKEND.load(path, part.inputs, part.outputs)
    assert threading.active_count() == before


def test_other_specs_than_the_assets_are_refused(lowering, assets):
    part, path = lowering.parts["decoder"], assets["decoder", "fp32"].path
    wrong = (TensorSpec(name="image", shape=(1, 3, 32, 32)),)
    with pytest.raises(EdgegenError, match=r"`image` as float32\[1, 3, 64, 64\] among its outputs"):
        BACKEND.load(path, part.inputs, wrong)
    with pytest.raises(EdgegenError, match="no `z` among its inputs"):
        BACKEND.load(path, (TensorSpec(name="z", shape=(1, 4, 16, 16)),), part.outputs)


class Unknown(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


def test_an_operation_that_core_ai_lacks_is_named(tmp_path):
    program = torch.export.export(Unknown(), (torch.ones(3),))
    x, y = (TensorSpec(name=name, shape=(3,)) for name in "xy")
    with pytest.raises(EdgegenError, match=r"`part` cannot be lowered to Core AI: .*bessel_j0"):
        BACKEND.lower(program, LowerRequest("part", (x,), (y,), "fp32", tmp_path))
    assert not (tmp_path / "part.aimodel").exists()


def test_a_host_without_a_wheel_is_told(lowering, assets, monkeypatch):
    monkeypatch.setattr(coreai.platform, "machine", lambda: "riscv64")
    assert "linux riscv64" in BACKEND.not_executed_here()
    part = lowering.parts["decoder"]
    with pytest.raises(EdgegenError, match="cannot be executed on this host"):
        BACKEND.load(assets["decoder", "fp32"].path, part.inputs, part.outputs)
