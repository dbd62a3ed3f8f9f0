"""How a runtime cuts a graph, foreseen; held against real lowerings where a number is claimed."""

import tomllib
from typing import get_args

import pytest
import torch
from torch import nn

from edgegen.graph.capture import capture
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import LowerRequest, get_backend
from edgegen.rewrite.forecast import CONDITIONS, HOST_DELEGATES, forecast
from edgegen.targets.model import Condition, Delegate
from edgegen.targets.read import data_folder, load_delegate
from tests.rewrite.conftest import export

F = nn.functional


def spec(name, value):
    return TensorSpec(name=name, shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."))


def fact(program, backend, folder, *inputs):
    names = program.graph_signature.user_inputs
    specs = tuple(spec(name, value) for name, value in zip(names, inputs, strict=True))
    made = program.module()(*inputs)
    return (
        get_backend(backend).lower(program, LowerRequest("net", specs, (spec("out", made),), "fp32", folder)).delegation
    )


class Mixed(nn.Module):
    """One of each of what cuts, between convolutions, and branches that run past the cuts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(5))
        self.group = nn.GroupNorm(2, 8)
        self.layer = nn.LayerNorm(16)

    def forward(self, x):
        first = self.conv[0](x)
        x = self.group(first) * 2
        x = self.conv[1](F.silu(x)).view(1, 2, 4, 16)
        x = F.scaled_dot_product_attention(x, x, x)
        x = self.layer(x).view(1, 8, 4, 4)
        a, b = self.conv[2](x).chunk(2, dim=1)
        x = self.conv[3](torch.cat([a * b, b], 1)) + first
        x = self.conv[4](F.interpolate(x, scale_factor=2.0))
        return torch.where(x > 0, x, x.exp())


@pytest.mark.slow
def test_executorch_cuts_where_it_was_said_to(tmp_path):
    pytest.importorskip("executorch")
    x = torch.randn(1, 8, 4, 4)
    program = export(Mixed(), x)
    text = str(program.graph)
    foreseen = forecast(program, "executorch")
    assert str(program.graph) == text
    counted = fact(program, "executorch", tmp_path, x)
    assert foreseen.pieces == counted.pieces and foreseen.off_by(counted) == 0
    assert foreseen.delegated_ops == counted.delegated_ops
    assert len(foreseen.outside) == sum(counted.undelegated.values())
    outside = {one.op: one for one in foreseen.outside}
    norm = outside["aten.native_group_norm.default"]
    assert (norm.node, norm.module, norm.cuts) == ("group_norm", "group", True)
    assert "25 of the 76" in norm.reason
    assert outside["aten.logical_not.default"].node == "scaled_dot_product_attention"
    assert not outside["aten._to_copy.default"].cuts and "whole number" in outside["aten._to_copy.default"].reason
    assert not foreseen.full


@pytest.mark.slow
def test_tflite_cuts_where_it_was_said_to(tmp_path):
    pytest.importorskip("litert_torch")
    x = torch.randn(1, 8, 4, 4)
    program = export(Mixed(), x)
    foreseen, counted = forecast(program, "tflite"), fact(program, "tflite", tmp_path, x)
    assert foreseen.pieces == 3
    assert foreseen.off_by(counted) in (0, -1)  # the output is turned channels first behind the last cut
    assert {one.op for one in foreseen.outside} == {
        "aten.native_group_norm.default",  # its scale is all ones
        "aten.upsample_nearest2d.vec",
        "aten.gt.Scalar",
        "aten.where.self",
    }


def test_a_trained_group_norm_does_not_cut_tflite():
    net = Mixed()
    nn.init.uniform_(net.group.weight, 0.5, 1.5)
    found = forecast(export(net, torch.randn(1, 8, 4, 4)), "tflite")
    assert "aten.native_group_norm.default" not in {one.op for one in found.outside}


def test_the_demo_decoder_as_it_was_lowered(shapes):
    program = capture(shapes.components["decoder"])
    found = forecast(program, "executorch")
    assert (found.pieces, found.delegated_ops) == (3, 45)
    assert (
        sorted(one.op for one in found.outside) == ["aten._to_copy.default"] * 4 + ["aten.upsample_nearest2d.vec"] * 2
    )
    assert forecast(program, "tflite").pieces == 3


class Branches(nn.Module):
    """Two branches that do not meet inside: one delegate holds both, whatever stands between."""

    def forward(self, x):
        return torch.flip(x.relu(), [0]).tanh(), x.sigmoid()


def test_what_can_be_merged_without_a_cycle_is():
    found = forecast(export(Branches(), torch.randn(2, 2)), "executorch")
    assert found.pieces == 2 and found.delegated_ops == 3
    (flip,) = found.outside
    assert flip.cuts and flip.op == "aten.flip.default"


class AtTheEnd(nn.Module):
    def forward(self, x, ids):
        return (x.relu() + x[:, ids].sum()).flip(0)


def test_what_stands_at_an_end_cuts_nothing():
    found = forecast(export(AtTheEnd(), torch.randn(2, 3), torch.tensor([1])), "executorch")
    ends = {one.op: one.cuts for one in found.outside}
    assert not ends["aten.flip.default"] and not ends["aten.index.Tensor"] and found.pieces == 1


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x):
        return self.conv(x).relu().mean((2, 3), keepdim=True)


def test_one_piece_is_full():
    assert forecast(export(Plain(), torch.randn(1, 3, 8, 8)), "executorch").full


class Dtypes(nn.Module):
    def forward(self, x):
        return F.gelu(x.half()).float() + x.mean(1, keepdim=True)


def test_conditions_are_told():
    found = forecast(export(Dtypes(), torch.randn(2, 3)), "executorch")
    reasons = {(one.op, one.reason) for one in found.outside}
    assert ("aten.gelu.default", "taken only with: not fp16") in reasons
    assert ("aten.mean.dim", "taken only with: spatial axes") in reasons
    assert ("aten._to_copy.default", "taken only with: same dtype") in reasons


class Timed(nn.Module):
    def forward(self, x, timestep):
        return x.view(1, 1, 1, 1, 1, -1).cos().flatten() * timestep.cos()


def test_devices_that_decide_for_themselves():
    program = export(Timed(), torch.randn(4), torch.randn(1))
    for backend in ("coreml", "coreai"):
        found = forecast(program, backend)
        assert found.pieces is None and "on the device" in found.note
        assert "cos_1" in {one.node for one in found.outside}
    assert {one.node for one in forecast(program, "coreml").outside} == {"view", "cos", "flatten", "cos_1"}
    assert forecast(program, "onnx").full
    with pytest.raises(KeyError):
        forecast(program, "unknown")


def test_a_delegate_of_which_nothing_is_known():
    delegate = Delegate(name="other", title="Another", runtime="tflite")
    found = forecast(export(Plain(), torch.randn(1, 3, 8, 8)), "tflite", delegate)
    assert found.pieces is None and found.note and not found.full


def test_what_delegates_take_is_written_in_ops_that_exist():
    assert set(CONDITIONS) == set(get_args(Condition))
    for name in HOST_DELEGATES.values():
        assert load_delegate(name).takes is not None
    for path in (data_folder() / "delegates").glob("*.toml"):
        takes = tomllib.loads(path.read_text()).get("takes")
        names = [one["op"] for one in takes["ops"]] if takes else []
        assert len(set(names)) == len(names)
        for name in names:
            if name != "*":
                _, op, overload = name.split(".")
                assert isinstance(getattr(getattr(torch.ops.aten, op), overload), torch._ops.OpOverload)
