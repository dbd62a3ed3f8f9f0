"""Repaired tensors in a file: a byte each where they lie on a grid, and the same numbers when they are read."""

import pytest
import torch

from edgegen.errors import EdgegenError
from edgegen.precision.encode import encode_weight
from edgegen.precision.plan import OpPlan
from edgegen.precision.repair.stored import packed, unpacked
from edgegen.precision.repair.tensors import load, save

W8, W6 = OpPlan(op="conv", precision="w8"), OpPlan(op="conv", precision="w6", form="palette")


def tensors():
    generator = torch.Generator().manual_seed(0)
    conv, transposed = (torch.randn(shape, generator=generator) for shape in ((24, 16, 3, 3), (16, 24, 2, 2)))
    return {
        "decoder/conv2d:1": encode_weight(conv, W8).decode(),
        "decoder/conv_transpose2d:1": encode_weight(transposed, W8, 1).decode(),
        "denoiser/linear:1": encode_weight(torch.randn(64, 64, generator=generator), W6).decode(),
        "denoiser/linear_1:1": torch.randn(8, 8, generator=generator),
        "denoiser/linear_1:2": torch.randn(8, generator=generator),
    }


def test_what_is_read_is_what_was_written_and_a_quarter_of_it(tmp_path):
    made = tensors()
    sha = save(tmp_path / "plan.safetensors", made)
    found = load(tmp_path / "plan.safetensors", sha)
    assert set(found) == set(made)
    for name, value in made.items():
        assert found[name].dtype is torch.float32 and torch.equal(found[name], value), name
    whole = 4 * sum(value.numel() for value in made.values())
    assert (tmp_path / "plan.safetensors").stat().st_size < 0.37 * whole  # with the names, which are long here
    kinds = {name: value.dtype for name, value in packed(made).items() if name.endswith("|codes")}
    assert sorted(map(str, kinds.values())) == ["torch.int8", "torch.int8", "torch.uint8"]


def test_a_zero_of_the_other_sign_does_not_keep_a_weight_from_its_codes():
    value = tensors()["decoder/conv2d:1"]
    value[value == 0] = -0.0
    assert set(packed({"a:1": value})) == {"a:1|codes", "a:1|scales"}


def test_tensors_as_they_were_written_before_are_read():
    plain = {"a:1": torch.randn(4, 4)}
    assert unpacked(plain) == plain


@pytest.mark.parametrize(
    "change",
    [
        {"a:1|scales": torch.ones(3, 1)},
        {"a:1|scales": torch.ones(4)},
        {"a:1|codes": torch.zeros(4, 4, dtype=torch.uint8)},
        {"a:1|table": torch.ones(4)},
        {"a:1|code": torch.ones(4)},
        {"b:1|scales": torch.ones(4)},
    ],
)
def test_parts_that_do_not_fit_are_an_error(change):
    held = {"a:1|codes": torch.zeros(4, 4, dtype=torch.int8), "a:1|scales": torch.ones(4, 1)}
    assert set(unpacked(held)) == {"a:1"}
    with pytest.raises(EdgegenError, match="repaired tensor"):
        unpacked({**held, **change})
    places = {"a:1|codes": torch.full((2, 2), 9, dtype=torch.uint8), "a:1|table": torch.ones(4)}
    with pytest.raises(EdgegenError, match="cannot be made of its codes"):
        unpacked(places)
