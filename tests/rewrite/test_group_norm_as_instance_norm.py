"""GroupNorm as instance normalisation of its groups."""

import pytest
import torch
from torch import nn

from edgegen.rewrite.group_norm_as_instance_norm import GroupNormAsInstanceNorm


def norm(affine=True, groups=2, channels=6):
    torch.manual_seed(0)
    module = nn.GroupNorm(groups, channels, eps=1e-3, affine=affine)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize(("affine", "calls"), [(True, 1), (False, 0)])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_groups_are_images(check_pass, affine, calls, groups):
    x = torch.randn(2, 6, 3, 5) * 4 + 50
    after = {"aten.group_norm": 0, "aten.instance_norm": 1, "aten.mul": calls, "aten.add": calls}
    result = check_pass(GroupNormAsInstanceNorm(), norm(affine, groups), x, before={"aten.group_norm": 1}, after=after)
    assert all(node.meta["val"].dim() <= 4 for node in result.program.graph.nodes if node.op == "call_function")


class ComputedScale(nn.Module):
    def forward(self, x, scale):
        return nn.functional.group_norm(x, 2, scale.exp())


def test_declines(check_pass):
    result = check_pass(GroupNormAsInstanceNorm(), norm(), torch.randn(2, 6, 5), modified=False)
    assert "3 axes" in result.declined[0].reason
    inputs = torch.randn(1, 6, 3, 3), torch.randn(6)
    result = check_pass(GroupNormAsInstanceNorm(), ComputedScale(), *inputs, modified=False)
    assert "computed" in result.declined[0].reason
