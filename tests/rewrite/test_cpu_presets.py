"""What the presets for TFLite and onnxruntime make of a small UNet."""

from collections import Counter

import numpy as np
import pytest
import torch

from edgegen.graph.evaluate import evaluate
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import LowerRequest
from edgegen.rewrite.base import census
from edgegen.rewrite.pipeline import Pipeline
from edgegen.rewrite.presets import canonical, onnx, tflite
from edgegen.students.networks.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    sample_size=8,
    block_out_channels=(16, 32),
    cross_attention=(False, True),
    num_heads=2,
    cross_attention_dim=32,
    norm_num_groups=8,
)
WHOLE = ("group_norm", "layer_norm", "scaled_dot_product_attention", "upsample_nearest2d", "chunk")


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(0)
    return {"latent": torch.randn(1, 4, 8, 8), "context": torch.randn(1, 6, 32)}


@pytest.fixture(scope="module")
def program(inputs):
    torch.manual_seed(0)
    unet = UNet(CONFIG).eval()
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "norm" in name:  # ones and zeros would let an affine be left out
                weight.add_(0.2 * torch.randn_like(weight))
    captured = torch.export.export(unet, (inputs["latent"], torch.tensor([999.0]), inputs["context"]))
    return Pipeline(canonical.passes((999.0,))).run(captured)[0]


@pytest.mark.parametrize(
    ("preset", "left"), [(tflite, ()), (onnx, ("group_norm", "layer_norm"))], ids=["tflite", "onnx"]
)
def test_same_numbers_and_nothing_left_whole_that_should_not_be(program, inputs, preset, left):
    made, _ = Pipeline(preset.passes()).run(program)
    (before,), (after,) = evaluate(program, inputs), evaluate(made, inputs)
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()
    ops = census(made)
    assert {name for name in WHOLE if ops[f"aten.{name}"]} == set(left)


def lowered(backend, program, inputs, folder):
    (output,) = evaluate(program, inputs)
    specs = tuple(TensorSpec(name=k, shape=tuple(v.shape), dtype="float32") for k, v in inputs.items())
    out = (TensorSpec(name="prediction", shape=tuple(output.shape), dtype="float32"),)
    request = LowerRequest(component="denoiser", inputs=specs, outputs=out, precision="fp32", out_dir=folder)
    result = backend.lower(program, request)
    executable = backend.load(folder / result.file, specs, out)
    found = executable({k: v.numpy() for k, v in inputs.items()})["prediction"]
    executable.close()
    noise = np.square(output.numpy() - found).sum()
    return result, 10 * np.log10(np.square(output.numpy()).sum() / noise)


@pytest.mark.slow
def test_tflite_is_one_delegate_of_fewer_operators(program, inputs, tmp_path):
    pytest.importorskip("litert_torch")
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    from edgegen.lower.tflite import BACKEND

    def operators(file):
        resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        interpreter = Interpreter(model_path=str(file), experimental_op_resolver_type=resolver)
        return Counter(op["op_name"] for op in interpreter._get_ops_details())

    plain, _ = lowered(BACKEND, program, inputs, tmp_path)
    before = operators(tmp_path / plain.file)
    made, _ = Pipeline(tflite.passes()).run(program)
    result, quality = lowered(BACKEND, made, inputs, tmp_path)
    after = operators(tmp_path / result.file)
    assert not result.notes, "some of it was decomposed as a whole"
    assert result.delegation.pieces == 1 and not result.delegation.undelegated
    assert "BROADCAST_TO" not in after and after.total() <= 0.62 * before.total()
    assert quality >= 100


@pytest.mark.slow
def test_onnx_runs_it(program, inputs, tmp_path):
    pytest.importorskip("onnxruntime")
    from edgegen.lower.onnx import BACKEND

    _, quality = lowered(BACKEND, Pipeline(onnx.passes()).run(program)[0], inputs, tmp_path)
    assert quality >= 100
