"""Kernels that onnxruntime has for what the exporter writes in parts: found, equal, and left alone else."""

from collections import Counter

import onnx
import pytest
import torch
from torch import nn

from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import LowerRequest
from edgegen.lower.onnx import BACKEND
from edgegen.verify.metrics import sqnr_db


class Attention(nn.Module):
    """12 tokens of 32 channels look at 5 others, in 4 heads."""

    def __init__(self, mask=False, scale=1.0):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(32, 32) for _ in range(3))
        self.mask, self.scale = mask, scale

    def forward(self, x, other):
        q = self.to_q(x).reshape(12, 4, 8).permute(1, 0, 2)
        k = self.to_k(other).reshape(5, 4, 8).permute(1, 2, 0)
        v = self.to_v(other).reshape(5, 4, 8).permute(1, 0, 2)
        scores = torch.bmm(q, k)
        if self.mask:
            scores = scores + torch.arange(5.0)
        if self.scale != 1.0:
            scores = scores * self.scale
        return torch.bmm(scores.softmax(-1), v).permute(1, 0, 2).reshape(1, 12, 32)


class Norm(nn.Module):
    """A group norm behind which nothing, or a second reader of what it scales."""

    def __init__(self, twice=False):
        super().__init__()
        self.norm = nn.GroupNorm(4, 16)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.twice = twice

    def forward(self, x):
        if not self.twice:
            return self.norm(x)
        scaled = torch.nn.functional.group_norm(x, 4) * self.norm.weight[:, None, None]
        return scaled + self.norm.bias[:, None, None] + scaled.relu()


def lowered(module, inputs, folder, precision="fp32"):
    torch.manual_seed(0)
    module = module.eval()
    with torch.no_grad():
        program = torch.export.export(module, inputs)
        expected = module(*inputs)
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"][-len(inputs) :]
    specs = tuple(TensorSpec(name=n, shape=tuple(v.shape), dtype="float32") for n, v in zip(names, inputs, strict=True))
    out = (TensorSpec(name="y", shape=tuple(expected.shape), dtype="float32"),)
    result = BACKEND.lower(program, LowerRequest("part", specs, out, precision, folder))
    ops = Counter(node.op_type for node in onnx.load(str(folder / result.file)).graph.node)
    run = BACKEND.load(folder / result.file, specs, out)
    value = run({n: v.numpy() for n, v in zip(names, inputs, strict=True)})["y"]
    run.close()
    return ops, sqnr_db(expected.numpy(), value)


TOKENS = (torch.randn(1, 12, 32), torch.randn(1, 5, 32))


def test_attention_is_one_kernel(tmp_path):
    ops, parity = lowered(Attention(), TOKENS, tmp_path)
    assert ops["MultiHeadAttention"] == 1 and not ops["Softmax"] and not ops["Transpose"]
    assert parity > 110


@pytest.mark.parametrize("options", [{"mask": True}, {"scale": 0.5}])
def test_attention_with_something_between_is_left(options, tmp_path):
    ops, parity = lowered(Attention(**options), TOKENS, tmp_path)
    assert ops["Softmax"] == 1 and not ops["MultiHeadAttention"]
    assert parity > 110


def test_float16_attention_is_left(tmp_path):
    ops, _ = lowered(Attention().half().float(), TOKENS, tmp_path, "fp16")
    assert ops["Softmax"] == 1 and not ops["MultiHeadAttention"]


def test_scale_and_shift_of_a_norm_are_one_pass(tmp_path):
    ops, parity = lowered(Norm(), (torch.randn(1, 16, 6, 6),), tmp_path)
    assert ops["BatchNormalization"] == 1 and not ops["Mul"] and not ops["Add"]
    assert parity > 110


def test_a_scaled_norm_that_others_read_is_left(tmp_path):
    ops, parity = lowered(Norm(twice=True), (torch.randn(1, 16, 6, 6),), tmp_path)
    assert ops["Mul"] == 1  # the norm's own scale, of ones, is another
    assert parity > 110
