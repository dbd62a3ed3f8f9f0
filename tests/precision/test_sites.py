"""Every op of a plan is found again in every backend's graph."""

import pytest
import torch
from torch import nn

from edgegen.errors import EdgegenError, UsageError
from edgegen.graph.edit import made_by
from edgegen.lower.backend import BACKENDS
from edgegen.precision.canonical import canonical_passes
from edgegen.precision.plan import ComponentPlan, OpPlan, Range
from edgegen.precision.sites import resolve, sites
from edgegen.rewrite.choose import shape_preset
from edgegen.rewrite.linear_to_conv1x1 import LinearToConv1x1
from edgegen.rewrite.pipeline import Pipeline
from edgegen.rewrite.split_chunked_linear import SplitChunkedLinear


def everything(program, precision="w8", **ranges):
    ops = {key: OpPlan(op=site.kind, precision=precision, **ranges) for key, site in sites(program).items()}
    return ComponentPlan(float_precision="fp32", ops=ops)


def check_all_found(program, backend):
    shaped, _ = Pipeline(shape_preset(backend)).run(program)
    plan = everything(program, "w8a8", input=Range(low=-1, high=1), output=Range(low=-2, high=4))
    found = resolve(shaped, plan, program)
    calls = {node.name: node for node in shaped.graph.nodes}
    assert len(found) == len(plan.ops)
    for name, op in found.items():
        node = calls[name]
        assert ("linear" if "linear" in str(node.target) else "conv") == op.op
        assert not any("norm" in one and one != "fold-norm-affine" for one in made_by(node))
        assert "norm" not in str(node.args[1].target).replace("with_norm", "").split("_")[-1]
    scaled = [op.output.high / 4 for op in found.values() if op.output.high != 4]
    return shaped, found, scaled


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("component", ["text_encoder", "denoiser", "decoder"])
def test_the_shipped_student(shapes_programs, component, backend):
    _, found, scaled = check_all_found(shapes_programs[component], backend)
    assert len(found) == {"text_encoder": 12, "denoiser": 110, "decoder": 19}[component]
    assert not scaled, "the scale of the scores is in the canonical weights"


def test_ranges_follow_a_weight_that_a_pass_scaled(shapes):
    from edgegen.graph.capture import capture

    canonical = [one for one in canonical_passes("denoiser", (999.0,)).passes if one.name != "fold-attention-scale"]
    program, _ = Pipeline(tuple(canonical)).run(capture(shapes.components["denoiser"]))
    # The scale of the scores went into to_q of 12 attentions, or to_k.
    _, _, scaled = check_all_found(program, "onnx")
    assert len(scaled) == 12
    assert sorted({round(one, 4) for one in scaled}) == [round(32**-0.5, 4), round(24**-0.5, 4)]


@pytest.mark.slow
def test_a_larger_unet():
    from edgegen.students.networks.unet import UNet, UNetConfig

    torch.manual_seed(0)
    # Three levels with attention, narrow: sites are a matter of structure.
    config = UNetConfig(sample_size=16, block_out_channels=(32, 64, 128), num_heads=8, cross_attention_dim=64)
    given = (torch.randn(1, 4, 16, 16), torch.tensor([999.0]), torch.randn(1, 77, 64))
    captured = torch.export.export(UNet(config).eval(), given)
    program, _ = canonical_passes("denoiser", (999.0,)).run(captured)
    for backend in BACKENDS:
        _, found, _ = check_all_found(program, backend)
        assert len(found) == 110


def test_keys_are_module_paths_numbered_where_a_module_makes_several(shapes_programs):
    found = sites(shapes_programs["denoiser"])
    assert found["conv_in"].kind == "conv" and found["conv_in"].shape == (64, 6, 3, 3)
    path = "up_blocks.0.attentions.1.transformer_blocks.0"
    parts = [found[f"{path}.ff.net.0.proj#{number}"] for number in (1, 2)]  # the two halves of a gated projection
    assert all(part.kind == "linear" and part.shape == (512, 128) for part in parts)
    assert found[f"{path}.attn1.to_q"].macs == 16 * 128 * 128
    assert next(iter(found)) == "conv_in" and list(found)[-1] == "conv_out"


def test_macs_of_a_component_are_those_of_its_sites(shapes_programs):
    from edgegen.graph.count import count

    assert (
        sum(site.macs for site in sites(shapes_programs["decoder"]).values()) == count(shapes_programs["decoder"]).macs
    )


class Odd(nn.Module):
    """A module that is called twice, a product of two computed values, and weights of every kind."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.up = nn.ConvTranspose2d(4, 6, 2, 2)
        self.line = nn.Conv1d(5, 3, 3)
        self.fused = nn.Linear(8, 24)

    def forward(self, x, image):
        x = self.body(self.body(x))
        a, b, c = self.fused(x).chunk(3, -1)
        return (a @ b.transpose(1, 2)) @ c, self.up(image), self.line(x)


@pytest.fixture(scope="module")
def odd():
    torch.manual_seed(0)
    captured = torch.export.export(Odd().eval(), (torch.randn(2, 5, 8), torch.randn(1, 4, 6, 6)))
    return Pipeline((SplitChunkedLinear(),)).run(captured)[0]


def test_sites_of_every_kind(odd):
    found = sites(odd)
    kinds = {key: site.kind for key, site in found.items()}
    assert kinds == {
        **{f"body.0#{n}": "linear" for n in (1, 2)},
        **{f"fused#{n}": "linear" for n in (1, 2, 3)},
        **{f"matmul#{n}": "matmul" for n in (1, 2)},
        "up": "conv",
        "line": "conv",
    }
    assert found["up"].axis == 1 and found["line"].axis == 0
    assert found["body.0#1"].weight == found["body.0#2"].weight
    assert found["matmul#1"].weight is None and found["matmul#1"].weights == 0


def test_parts_of_one_module_are_told_apart_by_their_weights_and_shared_ones_by_their_order(odd):
    ops = {key: OpPlan(op=site.kind, precision="fp32") for key, site in sites(odd).items()}
    for number, precision in ((1, "w8"), (3, "w4")):
        ops[f"fused#{number}"] = OpPlan(op="linear", precision=precision)
    ops["body.0#2"] = OpPlan(op="linear", precision="w8")
    plan = ComponentPlan(float_precision="fp32", ops=ops)
    before = {site.node: key for key, site in sites(odd).items()}
    shaped = LinearToConv1x1(where="everywhere")(odd).program
    found = resolve(shaped, plan, odd)
    assert {before[name]: op.precision for name, op in resolve(odd, plan, odd).items()} == {
        key: op.precision for key, op in ops.items()
    }
    kinds = [(op.op, op.precision) for op in found.values() if op.precision != "fp32"]
    assert kinds == [("conv", "w8"), ("conv", "w8"), ("conv", "w4")]


@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_weights_on_their_grid_are_recognised_by_the_float_graph(shapes, precision):
    from edgegen.graph.capture import capture
    from edgegen.precision.quantize import settled

    canonical = [one for one in canonical_passes("text_encoder", ()).passes if one.name != "fold-attention-scale"]
    program, _ = Pipeline(tuple(canonical)).run(capture(shapes.components["text_encoder"]))
    ranges = {"input": Range(low=-1, high=1), "output": Range(low=-2, high=4)}
    plan = everything(program, precision, **ranges)
    start = settled(program, plan)
    shaped, _ = Pipeline(shape_preset("onnx")).run(start)
    loose, strict = (resolve(shaped, plan, one) for one in (program, start))
    assert list(loose) == list(strict)
    for name in loose:
        assert loose[name].output.high == pytest.approx(strict[name].output.high, rel=0.02)
    assert sum(op.output.high < 1 for op in loose.values()) == 2


def test_a_saved_graph_has_the_same_sites(odd, tmp_path):
    torch.export.save(odd, tmp_path / "odd.pt2")
    loaded = torch.export.load(tmp_path / "odd.pt2")
    assert {key: site.kind for key, site in sites(loaded).items()} == {k: s.kind for k, s in sites(odd).items()}


def test_an_op_that_is_not_there_is_refused_with_the_nearest(odd):
    plan = ComponentPlan(float_precision="fp32", ops={"fused#4": OpPlan(op="linear", precision="w8")})
    with pytest.raises(UsageError, match="names op `fused#4`, which this graph does not have") as refused:
        resolve(odd, plan, odd)
    assert "`fused#" in refused.value.hint
    plan = ComponentPlan(float_precision="fp32", ops={"up": OpPlan(op="linear", precision="w8")})
    with pytest.raises(UsageError, match="`up` is a linear, and it is a conv"):
        resolve(odd, plan, odd)


def test_an_op_that_a_pass_lost_is_an_error(odd, shapes_programs):
    plan = ComponentPlan(float_precision="fp32", ops={"up": OpPlan(op="conv", precision="w8")})
    with pytest.raises(EdgegenError, match="`up` of the plan is nowhere in the graph"):
        resolve(shapes_programs["text_encoder"], plan, odd)
