"""Large fp16 values are computed in pieces: the same numbers, and little memory."""

import numpy as np
import pytest
import torch

from mlprogram import pieces
from mlprogram.kernel import KERNELS

G = torch.Generator().manual_seed(0)


def half(*shape):
    return torch.randn(*shape, generator=G).half()


CASES = {
    "add": {"x": half(1, 6, 5, 7), "y": half(1, 6, 1, 7)},
    "mul": {"x": half(1, 6, 5, 7), "y": torch.tensor(0.3, dtype=torch.float16)},
    "gelu": {"x": half(4, 9)},
    "softmax": {"x": half(3, 5, 7), "axis": -1},
    "softmax over the first axis": {"x": half(3, 5, 7), "axis": 0},
    "matmul": {"x": half(1, 6, 5, 8), "y": half(1, 6, 8, 3)},
    "matmul turned": {"x": half(6, 5, 8), "y": half(6, 3, 8), "transpose_y": True},
    "matmul of a broadcast": {"x": half(6, 5, 8), "y": half(1, 8, 3)},
    "matmul of matrices": {"x": half(5, 8), "y": half(8, 3)},
}
# What has no axis along which it falls apart.
WHOLE = {"matmul of a broadcast", "matmul of matrices"}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1, 16])
def test_pieces_make_the_whole(monkeypatch, name, size):
    op, arguments = name.split()[0], CASES[name]
    kernel = KERNELS[op]
    calls = []
    monkeypatch.setattr(pieces, "PIECE", size)
    counted = type(kernel)(
        lambda **given: (calls.append(1), kernel.function(**given))[1],
        kernel.parameters,
        kernel.arithmetic,
        kernel.alike,
        kernel.accumulates,
    )
    found = pieces.in_pieces(op, counted, arguments)
    wide = {key: one.float() if isinstance(one, torch.Tensor) else one for key, one in arguments.items()}
    np.testing.assert_array_equal(found.half().numpy(), kernel.function(**wide).half().numpy())
    assert (len(calls) == 1) == (name in WHOLE)


def test_small_values_and_fp32_stay_whole():
    assert pieces._axis("add", {}, {"x": half(4, 4)}) is None
    assert pieces._axis("add", {}, {"x": torch.zeros(4, 1 << 20)}) is None
    assert pieces._axis("add", {}, {"x": torch.zeros(4, 1 << 20, dtype=torch.float16)}) == (0, 4 << 20)
    assert pieces._axis("layer_norm", {}, {"x": torch.zeros(4, 1 << 20, dtype=torch.float16)}) is None
