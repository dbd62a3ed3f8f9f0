"""Precision plans in Core AI assets, executed by Core AI's own runtime: the same numbers, refusals, counts."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

from edgegen.errors import EdgegenError, UsageError
from edgegen.graph.capture import capture
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import LowerRequest
from edgegen.lower.coreai import BACKEND, PROGRAM
from edgegen.lower.coreai_read import computed, packed, saved_module
from edgegen.lower.stored_weight import stored_weights
from edgegen.precision.plan import OpPlan, Range
from edgegen.precision.quantize import quantized
from edgegen.precision.sites import sites
from edgegen.rewrite.choose import shape_preset
from edgegen.rewrite.pipeline import Pipeline
from edgegen.rewrite.to_half import ToHalf
from tests.lower.compressible import INPUT, OF_WEIGHTS, OUTPUT, SITES, VARIANTS, all_in, net, plan, quantize

STATIC = [name for name in VARIANTS if name != "w8a8-dynamic"]


def lower(made, folder, precision="fp32"):
    result = BACKEND.lower(made.program, made.request(folder, precision))
    return result, folder / result.file


def run(path, inputs):
    executable = BACKEND.load(path, (INPUT,), (OUTPUT,))
    try:
        return executable(inputs)[OUTPUT.name]
    finally:
        executable.close()


@pytest.mark.parametrize("variant", STATIC)
def test_an_asset_computes_what_the_fake_quant_reference_does(variant, tmp_path):
    made = quantize(*net(), all_in(variant))
    result, path = lower(made, tmp_path)
    assert made.sqnr(run(path, made.inputs)) >= (60 if variant in OF_WEIGHTS else 35)
    int8 = SITES if variant == "w8a8" else 0
    assert result.details["int8_ops"] == str(int8) and result.details["compressed_weights"] == "6"
    assert int(result.details["weight_bytes"]) < (path / PROGRAM).stat().st_size


@pytest.mark.parametrize(("variant", "floor"), [("palette 4 groups", 60), ("w4 groups", 55), ("w8a8", 35)])
def test_half_precision(variant, floor, tmp_path):
    program, inputs = net()
    made = quantize(ToHalf()(program).program, inputs, all_in(variant))
    result, path = lower(made, tmp_path, "fp16")
    assert made.sqnr(run(path, made.inputs)) >= floor
    assert "Float16" in result.details["compute_types"] and result.details["compressed_weights"] == "6"


@pytest.mark.parametrize(
    ("variant", "element", "expression"),
    [
        ("w8", "si8", "blockwise_shift_scale"),
        ("w4 groups", "si4", "blockwise_shift_scale"),
        ("palette 4", "ui4", "lut_to_dense"),
        ("palette 6", "ui6", "lut_to_dense"),
    ],
)
def test_the_codes_in_the_file_are_the_plans(variant, element, expression, tmp_path):
    program, inputs = net()
    made = quantize(program, inputs, all_in(variant))
    _, path = lower(made, tmp_path)
    code = (path / PROGRAM).read_bytes()
    stored = stored_weights(made.program, made.ops)
    assert len(stored) == 6 and all(packed(one) in code for one in stored.values())
    module = saved_module(path)
    shapes = sorted(one.codes[1] for one in computed(module) if one.codes and one.codes[0] == element)
    assert shapes == sorted(one.codes.shape for one in stored.values())
    numbers = []
    for operation in module.body.operations[0].regions[0].blocks[0].operations:
        if operation.name == f"coreai.{expression}":
            numbers.append(np.array(operation.operands[1].owner.attributes["value"]).tobytes())
    wanted = [(one.tables if one.scales is None else one.scales).tobytes() for one in stored.values()]
    assert sorted(numbers) == sorted(wanted)


def test_two_conversions_give_the_same_bytes(tmp_path):
    def mixed(site):
        return all_in(["w8", "palette 4 groups", "w8a8", "w4"][len(site.key) % 4])(site)

    made = quantize(*net(), mixed)
    programs = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        programs.append((lower(made, folder)[1] / PROGRAM).read_bytes())
    assert programs[0] == programs[1]


def test_dynamic_ranges_are_refused(tmp_path):
    with pytest.raises(UsageError, match="scales that are constants") as raised:
        lower(quantize(*net(), all_in("w8a8-dynamic")), tmp_path)
    assert raised.value.hint and not list(tmp_path.iterdir())


def test_float_compute_between_quantize_and_dequantize_is_an_error(tmp_path):
    """The graph says less than the plan: an op that has int8 weights and float values."""
    program, inputs = net()
    made = quantize(program, inputs, all_in("w8a8"))
    less = {**made.ops, "conv2d_1": made.ops["conv2d_1"].model_copy(update={"precision": "w8"})}
    with pytest.raises(EdgegenError, match=re.escape("`conv2d_1` is planned as w8a8: float compute")):
        BACKEND.lower(quantized(program, less), made.request(tmp_path))


def test_a_weight_that_is_not_in_the_file_is_an_error(tmp_path):
    """The graph has the weights of another plan."""
    program, inputs = net()
    made = quantize(program, inputs, all_in("w8"))
    wanted = plan(program, inputs, all_in("w8"))
    _, path = lower(made, tmp_path)
    from edgegen.lower.coreai_read import count_compressed

    stored = stored_weights(made.program, wanted)
    name = next(iter(stored))
    stored[name] = type(stored[name])(8, -stored[name].codes, stored[name].scales)
    with pytest.raises(EdgegenError, match=f"codes of the weight of `{name}`"):
        count_compressed(saved_module(path), (path / PROGRAM).read_bytes(), wanted, stored, "the file")


def test_another_op_of_the_same_shape_does_not_count():
    """Two convolutions of one shape, one int8 as planned, one only compressed; the plan has them the other way."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(4, 4, 3, padding=1)
    )
    program = torch.export.export(module.eval(), (torch.randn(1, 4, 8, 8),))
    first, second = (site.node for site in sites(program).values())
    wide = {"input": Range(low=-4.0, high=4.0), "output": Range(low=-4.0, high=4.0)}
    op = {name: OpPlan(op="conv", precision=name, **wide) for name in ("w8a8", "w8")}
    there, asked = {first: op["w8a8"], second: op["w8"]}, {first: op["w8"], second: op["w8a8"]}
    from edgegen.lower.coreai_read import count_compressed

    def weighed(ops):
        graph = quantized(program, ops)
        return graph, stored_weights(graph, ops)

    spec = TensorSpec(name="x", shape=(1, 4, 8, 8), dtype="float32")
    out = spec.model_copy(update={"name": "y"})
    with TemporaryDirectory() as folder:
        BACKEND.lower(weighed(there)[0], LowerRequest("part", (spec,), (out,), "fp32", Path(folder), quantized=there))
        path = Path(folder) / "part.aimodel"
        module, code = saved_module(path), (path / PROGRAM).read_bytes()
    assert count_compressed(module, code, there, weighed(there)[1], "it")["int8_ops"] == "1"
    with pytest.raises(EdgegenError, match=r"`conv2d(_1)?` is planned as"):
        count_compressed(module, code, asked, weighed(asked)[1], "it")


@pytest.mark.parametrize("name", ["text_encoder", "decoder"])
def test_components_in_the_form_of_the_preset(lowering, name, tmp_path):
    part = lowering.parts[name]
    program, _ = Pipeline(shape_preset("coreai")).run(capture(part))
    inputs = {key: torch.from_numpy(value) for key, value in lowering.inputs[name].items()}
    order = [site.key for site in sites(program).values()]

    def thirds(site):
        return all_in(["w8a8", "palette 4", "w8"][order.index(site.key) % 3])(site)

    made = quantize(program, inputs, thirds)
    result = BACKEND.lower(made.program, lowering.request(part, "fp32", tmp_path, quantized=made.ops))
    (output,) = part.outputs
    value = lowering.run(BACKEND, tmp_path / result.file, name)[output.name]
    assert made.sqnr(value) >= 35
    counts = [one.precision for one in made.ops.values()]
    assert result.details["compressed_weights"] == str(len(counts) - sum(o.op == "matmul" for o in made.ops.values()))
    assert result.details["int8_ops"] == str(counts.count("w8a8"))
