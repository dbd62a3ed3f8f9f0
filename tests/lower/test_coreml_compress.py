"""Precision plans in Core ML packages: the numbers in the file, what they compute, what is refused."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from edgegen.errors import EdgegenError, UsageError
from edgegen.graph.capture import capture
from edgegen.graph.edit import weights
from edgegen.graph.evaluate import evaluate
from edgegen.lower.coreml import BACKEND
from edgegen.lower.mlpackage import read_program, read_spec
from edgegen.precision.encode import encode_weight
from edgegen.precision.quantize import quantized
from edgegen.precision.sites import sites
from edgegen.rewrite.choose import shape_preset
from edgegen.rewrite.pipeline import Pipeline
from mlprogram import Program
from tests.lower.compressible import INPUT, OF_WEIGHTS, OUTPUT, SITES, VARIANTS, all_in, net, plan, quantize

TARGETS = {  # the first that holds each
    "w8": "iOS16",
    "palette 4": "iOS16",
    "palette 6": "iOS16",
    "palette 8": "iOS16",
    "w8a8": "iOS17",
    "w8 groups": "iOS18",
    "w4": "iOS18",
    "w4 groups": "iOS18",
    "palette 4 groups": "iOS18",
}
FORMS = {
    ("w8", "iOS16"): "constexpr_affine_dequantize",
    ("w8a8", "iOS17"): "constexpr_affine_dequantize",
    ("palette 4", "iOS18"): "constexpr_lut_to_dense",
    ("w8a8", "iOS18"): "constexpr_blockwise_shift_scale",
    ("w4 groups", "iOS18"): "constexpr_blockwise_shift_scale",
}


def lower(made, folder, precision="fp32", target="iOS18"):
    request = made.request(folder, precision, minimum_deployment_target=target)
    result = BACKEND.lower(made.program, request)
    return result, folder / result.file


def operations(path):
    return read_program(path, read_spec(path)).functions["main"].operations


@pytest.mark.parametrize("variant", TARGETS)
def test_a_package_computes_what_the_fake_quant_reference_does(variant, tmp_path):
    made = quantize(*net(), all_in(variant))
    result, path = lower(made, tmp_path, target=TARGETS[variant])
    value = Program.open(path)(made.inputs)["y"]
    assert made.sqnr(value) >= (60 if variant in OF_WEIGHTS else 35)
    int8 = SITES if variant == "w8a8" else 0
    assert result.details["int8_ops"] == str(int8) and result.details["compressed_weights"] == "6"
    assert (
        int(result.details["weight_bytes"]) == path.joinpath("Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    )


@pytest.mark.parametrize(("variant", "target"), FORMS)
def test_the_form_is_that_of_the_target(variant, target, tmp_path):
    _, path = lower(quantize(*net(), all_in(variant)), tmp_path, target=target)
    kinds = {one.op_type for one in operations(path) if one.op_type.startswith("constexpr_")}
    assert kinds == {FORMS[variant, target]}


@pytest.mark.parametrize("variant", ["w8", "w4 groups", "palette 4 groups", "palette 6"])
def test_the_numbers_in_the_file_are_the_plans(variant, tmp_path):
    program, inputs = net()
    made = quantize(program, inputs, all_in(variant))
    _, path = lower(made, tmp_path)
    held, found = weights(program), {}
    for one in operations(path):
        if one.op_type == "constexpr_lut_to_dense":
            found[one.indices.val.astype(np.int16).tobytes()] = one.lut.val
        elif one.op_type == "constexpr_blockwise_shift_scale":
            found[one.data.val.astype(np.int16).tobytes()] = one.scale.val
    assert len(found) == 6
    for site in sites(program).values():
        if site.weight is not None:
            encoded = encode_weight(held[site.weight], made.ops[site.node], site.axis)
            numbers = found[encoded.codes.numpy().astype(np.int16).tobytes()]
            wanted = encoded.scales if encoded.tables is None else encoded.tables
            moved = wanted if encoded.tables is not None or site.axis == 0 or wanted.dim() == 1 else wanted.T
            assert numbers.dtype == np.float32 and np.array_equal(numbers.ravel(), moved.numpy().ravel())


def test_two_conversions_give_the_same_bytes(tmp_path):
    def mixed(site):
        return all_in(["w8", "palette 4 groups", "w8a8", "w4"][len(site.key) % 4])(site)

    made = quantize(*net(), mixed)
    digests = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        _, path = lower(made, folder, "fp16")
        files = sorted(one for one in path.rglob("*") if one.is_file())
        digests.append([(one.name, hashlib.sha256(one.read_bytes()).hexdigest()) for one in files])
    assert digests[0] == digests[1] and len(digests[0]) == 3


@pytest.mark.parametrize(("variant", "floor"), [("palette 6", 60), ("w4 groups", 60), ("w8a8", 35)])
def test_half_precision_with_an_island(variant, floor, tmp_path):
    made = quantize(*net(), all_in(variant))
    request = made.request(tmp_path, "fp16", minimum_deployment_target="iOS18")
    result = BACKEND.lower(made.program, replace(request, islands=("gelu", "conv2d_2")))
    path = tmp_path / result.file
    assert made.sqnr(Program.open(path)(made.inputs)["y"]) >= floor
    dtypes = [one.weight.dtype.__name__ for one in operations(path) if one.op_type == "conv"]
    assert sorted(dtypes) == ["fp16", "fp16", "fp32"]  # the island has its weight in float32
    assert [one.x.dtype.__name__ for one in operations(path) if one.op_type == "gelu"] == ["fp32"]


@pytest.mark.parametrize(
    ("variant", "target", "why"),
    [
        ("w8a8-dynamic", "iOS18", "ranges found at run time"),
        ("w8a8", "iOS16", "from iOS 17"),
        ("w4", "iOS17", "w4 with scales"),
        ("w8 groups", "iOS17", "a scale for every 4 channels"),
        ("palette 4 groups", "iOS17", "a table for every 4 channels"),
    ],
)
def test_what_the_target_cannot_hold_is_refused(variant, target, why, tmp_path):
    with pytest.raises(UsageError, match=why) as raised:
        lower(quantize(*net(), all_in(variant)), tmp_path, target=target)
    assert raised.value.hint and not list(tmp_path.iterdir())


def test_float_compute_between_quantize_and_dequantize_is_an_error(tmp_path):
    """The graph says less than the plan: an op whose input nothing quantizes."""
    program, inputs = net()
    ops = plan(program, inputs, all_in("w8a8"))
    fewer = quantized(program, {name: one for name, one in ops.items() if name != "conv2d_1"})
    request = quantize(program, inputs, all_in("w8a8")).request(tmp_path)
    with pytest.raises(EdgegenError, match="`conv2d_1` is planned as w8a8"):
        BACKEND.lower(quantized(fewer, {"conv2d_1": ops["conv2d_1"].model_copy(update={"precision": "w8"})}), request)


def test_a_weight_that_is_not_on_its_grid_is_an_error(tmp_path):
    program, inputs = net()
    made = quantize(program, inputs, all_in("palette 4"))
    with pytest.raises(EdgegenError, match="changed the weight"):
        BACKEND.lower(program, made.request(tmp_path))


def test_one_weight_that_two_calls_read_is_stored_once(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.out = nn.ConvTranspose2d(4, 3, 2, 2)

        def forward(self, x):
            return self.out(torch.relu(self.conv(self.conv(x))))

    torch.manual_seed(0)
    x = torch.randn(INPUT.shape)
    made = quantize(torch.export.export(Twice().eval(), (x,)), {"x": x}, all_in("w8"))
    result, path = lower(made, tmp_path)
    assert result.details["compressed_weights"] == "3"
    assert sum(one.op_type == "constexpr_blockwise_shift_scale" for one in operations(path)) == 2
    assert made.sqnr(Program.open(path)(made.inputs)[OUTPUT.name]) >= 60


@pytest.mark.parametrize("name", ["text_encoder", "decoder"])
def test_components_in_the_form_of_the_neural_engine(lowering, name, tmp_path):
    """The preset makes 1x1 convolutions of linears and moves axes; a third of the ops in each of three precisions."""
    part = lowering.parts[name]
    program, _ = Pipeline(shape_preset("coreml")).run(capture(part))
    inputs = {key: torch.from_numpy(value) for key, value in lowering.inputs[name].items()}
    order = [site.key for site in sites(program).values()]

    def thirds(site):
        return all_in(["w8a8", "palette 4", "w8"][order.index(site.key) % 3])(site)

    made = quantize(program, inputs, thirds)
    request = lowering.request(part, "fp32", tmp_path, quantized=made.ops)
    result = BACKEND.lower(made.program, request)
    (output,) = part.outputs
    value = Program.open(tmp_path / result.file)(lowering.inputs[name])[output.name]
    assert made.sqnr(value) >= 35
    (plain,) = evaluate(program, inputs)
    assert not np.array_equal(plain.numpy(), made.reference)
    counts = [one.precision for one in made.ops.values()]
    products = sum(one.op == "matmul" for one in made.ops.values())
    assert len(counts) >= 12 and result.details["compressed_weights"] == str(len(counts) - products)
    assert result.details["int8_ops"] == str(counts.count("w8a8"))


def test_variants_are_all_tested():
    assert set(TARGETS) | {"w8a8-dynamic"} == set(VARIANTS)
