"""Bytes flipped, cut and repeated: `load` gives a student or an EdgegenError, never anything else."""

import io
import random
import shutil
import time

import pytest
import torch
from safetensors.torch import save

from edgegen.errors import EdgegenError
from edgegen.students.load import load
from edgegen.students.shapes.family import WEIGHTS

SECONDS = 4.0
TINY = {
    "name": "tiny",
    "task": "single",
    "components": {
        "model": {
            "architecture": "tiny_decoder",
            "config": {"latent_channels": 1, "out_channels": 1, "width": 2, "num_blocks": [1]},
            "inputs": [{"name": "latent", "shape": [1, 1, 2, 2]}],
            "outputs": [{"name": "image", "shape": [1, 1, 2, 2]}],
        }
    },
}


def tiny_state():
    from edgegen.students.architectures import build_module

    torch.manual_seed(0)
    return build_module("tiny_decoder", TINY["components"]["model"]["config"]).state_dict()


def pt(folder):
    buffer = io.BytesIO()
    payload = {"format": "edgegen", "version": 1, "config": TINY, "tokenizer": None}
    torch.save({**payload, "state_dicts": {"model": tiny_state()}}, buffer)
    return buffer.getvalue()


def safetensors(folder):
    import json

    (folder / "config.json").write_text(json.dumps(TINY))
    return save({f"model.{key}": value for key, value in tiny_state().items()})


def pt2(folder):
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), buffer)
    return buffer.getvalue()


def spoil(data, source):
    """One of: a few flipped bytes, an overwritten run, a cut, a run taken out, a run repeated."""
    made, kind = bytearray(data), source.randrange(5)
    at, run = source.randrange(len(made)), source.randrange(1, 64)
    if kind == 0:
        for _ in range(source.randrange(1, 8)):
            made[source.randrange(len(made))] ^= 1 << source.randrange(8)
    elif kind == 1:
        made[at : at + run] = source.randbytes(run)
    elif kind == 2:
        del made[at:]
    elif kind == 3:
        del made[at : at + run]
    else:
        made[at:at] = made[at : at + run]
    return bytes(made)


@pytest.mark.parametrize("make", [pt, safetensors, pt2], ids=["pt", "safetensors", "pt2"])
def test_spoiled_bytes_end_in_a_student_or_an_error(make, tmp_path):
    whole = make(tmp_path)
    path = tmp_path / "model.bin"
    path.write_bytes(whole)
    assert load(path).config.task == "single"

    source, outcomes, end = random.Random(0), {"loaded": 0, "refused": 0}, time.monotonic() + SECONDS
    while time.monotonic() < end:
        path.write_bytes(spoil(whole, source))
        try:
            load(path)
            outcomes["loaded"] += 1
        except EdgegenError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 20, outcomes


def test_spoiled_tokenizers_end_in_a_student_or_an_error(tmp_path):
    for name in ("shapes.json", "shapes.safetensors"):
        shutil.copy(WEIGHTS.with_name(name), tmp_path / name)
    from edgegen.students.assembly import check_tokenizer

    whole, source, refused = WEIGHTS.with_name("tokenizer.json").read_bytes(), random.Random(0), 0
    for _ in range(300):
        try:
            check_tokenizer(spoil(whole, source).decode("utf-8", errors="replace"), "tokenizer.json", 16)
        except EdgegenError:
            refused += 1
    assert refused > 20
