"""Quantized graphs in ONNX: which ops onnxruntime takes in integers, and whether the numbers are the reference's."""

import re

import pytest
import torch
from torch import nn

from edgegen.errors import EdgegenError, UsageError
from edgegen.graph.edit import user_inputs
from edgegen.graph.evaluate import evaluate
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower import onnx_quantize
from edgegen.lower.backend import LowerRequest
from edgegen.lower.onnx import BACKEND
from edgegen.lower.onnx_optimised import optimised_graph
from edgegen.precision.plan import OpPlan, Range
from edgegen.precision.quantize import quantized, tail
from edgegen.precision.sites import sites
from edgegen.rewrite.to_half import ToHalf
from edgegen.verify.metrics import sqnr_db


class Small(nn.Module):
    """What a denoiser has: an output that several read, strides, a 1x1 shortcut, a relu, attention, linears of two
    ranks with and without a bias."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 32, 3, padding=1)
        self.down = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(32, 64, 1)
        self.conv = nn.Conv2d(32, 64, 3, padding=1)
        self.norm = nn.LayerNorm(64)
        self.to_q, self.to_k = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.to_v, self.to_out = nn.Linear(64, 64), nn.Linear(64, 64)
        self.gate = nn.Linear(32, 64)
        self.up = nn.ConvTranspose2d(64, 16, 4, 2, 1)
        self.conv_out = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, latent, condition):
        x = self.conv_in(latent)
        h = self.down(nn.functional.silu(x))
        h = self.conv(torch.relu(h)) + self.shortcut(h) + self.down(x.roll(1, 2)).repeat(1, 2, 1, 1)
        tokens = self.norm(h.flatten(2).transpose(1, 2))
        scores = torch.bmm(self.to_q(tokens), self.to_k(tokens).transpose(1, 2)) / 8
        tokens = tokens + self.to_out(torch.bmm(scores.softmax(-1), self.to_v(tokens)))
        tokens = tokens * self.gate(condition)[:, None]
        return self.conv_out(self.up(tokens.transpose(1, 2).reshape(1, 64, 8, 8)))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(3)
    inputs = [{"latent": torch.randn(1, 4, 16, 16), "condition": torch.randn(1, 32)} for _ in range(3)]
    with torch.no_grad():
        return torch.export.export(Small().eval(), tuple(inputs[0].values())), inputs


def _plan(program, inputs, choose):
    """Call -> how it is computed: `choose(site)` says the precision, None for float; ranges are those of `inputs`."""
    seen = {}

    def note(name, value):
        if torch.is_tensor(value) and value.is_floating_point():
            low, high = seen.get(name, (0.0, 0.0))
            seen[name] = (min(low, value.min().item()), max(high, value.max().item()))

    for one in inputs:
        evaluate(program, one, lambda node, value: note(node.name, value))
        for name, value in one.items():
            note(name, value)
    calls, ops = {node.name: node for node in program.graph.nodes}, {}
    for site in sites(program).values():
        chosen = choose(site)
        if chosen is None:
            continue
        node = calls[site.node]
        names = {"input": node.args[0].name, "output": tail(node).name}
        names |= {"other": node.args[1].name} if site.kind == "matmul" else {}
        fields = chosen if isinstance(chosen, dict) else {"precision": chosen}
        ranges = {key: Range(low=seen[name][0], high=seen[name][1]) for key, name in names.items() if key not in fields}
        ops[site.node] = OpPlan(op=site.kind, **fields, **ranges)
    return ops


def _request(program, ops, folder, precision="fp32"):
    specs = tuple(
        TensorSpec(name=node.name, shape=tuple(node.meta["val"].shape), dtype="float32")
        for node in user_inputs(program)
    )
    return LowerRequest(
        "denoiser",
        specs,
        (TensorSpec(name="prediction", shape=(1, 4, 16, 16), dtype="float32"),),
        precision,
        folder,
        quantized=ops,
    )


def _lowered(small, choose, folder):
    program, inputs = small
    ops = _plan(program, inputs, choose)
    graph, request = quantized(program, ops), _request(program, ops, folder)
    result = BACKEND.lower(graph, request)
    run = BACKEND.load(folder / result.file, request.inputs, request.outputs)
    values = run({name: value.numpy() for name, value in inputs[0].items()})["prediction"]
    run.close()
    expected, whole = (evaluate(one, inputs[0])[0].numpy() for one in (graph, program))
    return result, ops, sqnr_db(expected, values), sqnr_db(whole, values), sqnr_db(whole, expected)


def test_every_op_of_a_static_plan_runs_in_integers(small, tmp_path):
    result, ops, parity, quality, reference = _lowered(
        small, lambda site: None if "up" in site.key else "w8a8", tmp_path
    )
    assert len(ops) == 13 and result.details["int8_ops"] == "13"
    assert result.details["compressed_weights"] == "11"
    found = [node.op_type for node in optimised_graph(tmp_path / result.file).node]
    assert {"QLinearConv", "QLinearMatMul"} <= set(found)
    assert not {"Conv", "MatMul", "Gemm"} & set(found)
    assert parity >= 35 and quality >= reference - 1


def test_linears_without_codes_of_their_output_give_float(small, tmp_path):
    """With and without a bias; convolutions and products of activations keep theirs."""
    bare = {"precision": "w8a8", "output": None}
    result, ops, parity, quality, reference = _lowered(
        small, lambda site: bare if site.kind == "linear" else None, tmp_path
    )
    assert len(ops) == 5 and result.details["int8_ops"] == "5"
    found = [node.op_type for node in optimised_graph(tmp_path / result.file).node]
    assert found.count("MatMulIntegerToFloat") == 5
    assert "QLinearMatMul" not in found
    assert parity >= 60 and quality >= reference - 1
    (tmp_path / "coded").mkdir()
    _, _, _, coded, _ = _lowered(small, lambda site: "w8a8" if site.kind == "linear" else None, tmp_path / "coded")
    assert quality > coded


def test_what_a_kernel_does_not_take_is_an_error_that_names_the_op(small, tmp_path):
    with pytest.raises(EdgegenError, match=r"`denoiser`.*float compute.* 1 of 14 .*`conv_transpose2d`"):
        _lowered(small, lambda site: "w8a8", tmp_path)


def test_int8_activations_are_why_codes_are_unsigned(small, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_quantize, "_unsigned", lambda model: None)
    with pytest.raises(EdgegenError, match=r"keeps float compute between quantize and dequantize"):
        _lowered(small, lambda site: None if "up" in site.key else "w8a8", tmp_path)


def test_dynamic_linears_have_a_range_for_each_row(small, tmp_path):
    result, ops, parity, quality, reference = _lowered(
        small, lambda site: None if site.kind == "conv" else "w8a8-dynamic", tmp_path
    )
    assert len(ops) == 7 and result.details["int8_ops"] == "7"
    found = [node.op_type for node in optimised_graph(tmp_path / result.file).node]
    # The products of two computed values may end in a multiplication of their own.
    assert found.count("MatMulIntegerToFloat") >= 5
    assert not {"MatMul"} & set(found)
    assert parity >= 35 and quality >= reference - 1


def test_compressed_weights_decode_to_the_reference(small, tmp_path):
    def choose(site):
        if site.key == "conv_in":
            return {"precision": "w8"}
        return {"precision": "w4", "group": 0 if site.key == "up" else 16} if site.kind != "matmul" else None

    result, ops, parity, _, reference = _lowered(small, choose, tmp_path)
    assert result.details["int8_ops"] == "0" and result.details["compressed_weights"] == str(len(ops))
    assert result.details["opset"] == "21"
    # Not exact: onnxruntime multiplies four-bit weights with codes of the activations.
    assert parity >= 50 and reference < 35


def test_bytes_follow_the_plan_and_are_the_same_twice(small, tmp_path):
    sizes = {}
    for name, precision in (("w8", "w8"), ("w4", "w4")):
        folder = tmp_path / name
        folder.mkdir()
        _lowered(small, lambda site, p=precision: p if site.kind != "matmul" else None, folder)
        sizes[name] = (folder / "denoiser.onnx").stat().st_size
    weights = sum(p.numel() for name, p in Small().named_parameters() if p.dim() > 1)
    assert weights < sizes["w8"] < 1.5 * weights
    assert sizes["w8"] - sizes["w4"] == pytest.approx(0.5 * weights, rel=0.1)
    again = tmp_path / "again"
    again.mkdir()
    _lowered(small, lambda site: "w4" if site.kind != "matmul" else None, again)
    assert (again / "denoiser.onnx").read_bytes() == (tmp_path / "w4" / "denoiser.onnx").read_bytes()


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (OpPlan(op="linear", precision="w6", form="palette"), "no kernel for palettes"),
        (OpPlan(op="conv", precision="w8a8-dynamic"), "ConvInteger"),
    ],
)
def test_what_would_be_emulated_is_refused(small, tmp_path, op, reason):
    program, _ = small
    with pytest.raises(UsageError, match=reason):
        BACKEND.lower(program, _request(program, {"linear": op}, tmp_path))


def test_integers_between_float16_values_are_refused(small, tmp_path):
    program, _ = small
    op = OpPlan(op="linear", precision="w8a8-dynamic")
    with pytest.raises(UsageError, match="float16"):
        BACKEND.lower(program, _request(program, {"linear": op}, tmp_path, "fp16"))


def test_weights_of_a_float16_graph_are_compressed_too(small, tmp_path):
    program, inputs = small
    half = ToHalf()(program).program
    ops = {
        site.node: OpPlan(op=site.kind, precision="w4" if site.key.startswith("to_") else "w8")
        for site in sites(half).values()
        if site.kind != "matmul"
    }
    graph, request = quantized(half, ops), _request(half, ops, tmp_path, "fp16")
    result = BACKEND.lower(graph, request)
    assert result.details["compressed_weights"] == "12"
    run = BACKEND.load(tmp_path / result.file, request.inputs, request.outputs)
    values = run({name: value.numpy() for name, value in inputs[0].items()})["prediction"]
    run.close()
    assert sqnr_db(evaluate(graph, inputs[0])[0].numpy(), values) > 40


def test_an_op_that_is_not_in_the_graph_is_named(small, tmp_path):
    program, _ = small
    with pytest.raises(EdgegenError, match=re.escape("`linear_99` is not found again")):
        BACKEND.lower(program, _request(program, {"linear_99": OpPlan(op="linear", precision="w8")}, tmp_path))
