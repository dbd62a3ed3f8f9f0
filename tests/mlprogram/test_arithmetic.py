"""`arithmetic="fp32"`: the same program with nothing rounded to fp16, to see what fp16 costs."""

import numpy as np
import pytest

from mlprogram import Program, ProgramError

THIRD = np.float32([1 / 3, 200.0])


@pytest.fixture(scope="module")
def made(packages):
    """x is cast to fp16, squared twice over (200 leaves fp16), scaled by an fp16 weight, and cast back."""

    def build(mb, given):
        half = mb.cast(x=given["x"], dtype="fp16", name="half")
        square = mb.mul(x=half, y=half, name="square")
        scaled = mb.mul(x=mb.mul(x=square, y=half, name="cube"), y=np.float16(0.1), name="scaled")
        tail = mb.slice_by_index(x=scaled, begin=[0], end=[1], name="tail")
        return {"y": mb.cast(x=tail, dtype="fp32", name="back"), "z": mb.cast(x=scaled, dtype="fp32", name="all")}

    return packages.operations(build, {"x": THIRD})


def values(path, **options):
    seen = {}
    out = Program.open(path, **options)({"x": THIRD}, lambda operation, found: seen.update({operation.name: found[0]}))
    return out, seen


def test_nothing_is_rounded_and_nothing_overflows(made):
    out, seen = values(made, arithmetic="fp32")
    assert all(value.dtype == np.float32 for value in seen.values())
    assert np.array_equal(seen["half"], THIRD)
    cube = THIRD * THIRD * THIRD
    assert np.array_equal(seen["cube"], cube) and cube[1] > 65504
    # The weight is the number in the file, which is float16.
    assert np.array_equal(seen["scaled"], cube * np.float32(np.float16(0.1)))
    assert np.array_equal(out["z"], seen["scaled"]) and np.array_equal(out["y"], seen["scaled"][:1])


def test_as_declared_the_same_program_rounds_and_overflows(made):
    out, seen = values(made)
    assert seen["half"].dtype == np.float16 and seen["half"][0] == np.float16(1 / 3) != np.float32(1 / 3)
    assert np.isinf(seen["cube"][1]) and np.isinf(out["z"][1])
    assert seen.keys() == values(made, arithmetic="fp32")[1].keys()


def test_a_network_in_fp32_arithmetic_is_torch_but_for_its_weights(packages):
    import torch
    from torch import nn

    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1)
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.half())
    made = packages.convert(module, (torch.randn(1, 3, 8, 8),), "fp16")
    assert packages.score(made) < 75 < 110 < packages.score(made, arithmetic="fp32")


def test_another_arithmetic_is_refused(made):
    with pytest.raises(ProgramError, match="arithmetic is `fp64`, known are declared and fp32"):
        Program.open(made, arithmetic="fp64")
