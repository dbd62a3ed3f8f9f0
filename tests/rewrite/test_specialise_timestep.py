"""The time path becomes constants or a table; what else reads the timestep is left alone."""

import pytest
import torch
from torch import nn

from edgegen.errors import EdgegenError
from edgegen.graph.edit import user_inputs
from edgegen.rewrite.base import census
from edgegen.rewrite.specialise_timestep import SpecialiseTimestep
from edgegen.students.networks.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    sample_size=8,
    block_out_channels=(16, 32),
    cross_attention=(False, True),
    num_heads=2,
    cross_attention_dim=32,
    norm_num_groups=8,
)
TIME_OPS = {"aten.cos": 0, "aten.sin": 0, "aten.exp": 0, "aten.arange": 0}


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(0)
    return torch.randn(1, 4, 8, 8), torch.tensor([999.0]), torch.randn(1, 6, 32)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet(CONFIG)


def test_one_timestep_becomes_constants(check_pass, unet, inputs):
    before = {"aten.cos": 1, "aten.sin": 1}
    result = check_pass(SpecialiseTimestep((999.0,)), unet, *inputs, before=before, after=TIME_OPS)
    assert [node.name for node in user_inputs(result.program)] == ["latent", "context"]
    gone = 2 + sum("time_emb_proj" in name for name, _ in unet.named_modules())
    assert census(result.program)["aten.linear"] == sum(isinstance(m, nn.Linear) for m in unet.modules()) - gone
    assert not any("time_emb" in name for name in result.program.state_dict)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_several_become_one_table_indexed_by_the_step(check_pass, unet, inputs, step):
    values = (999.0, 500.0, 250.5)
    latent, _, context = inputs
    result = check_pass(
        SpecialiseTimestep(values),
        unet,
        latent,
        torch.tensor([values[step]]),
        context,
        renamed={"step": torch.tensor([step], dtype=torch.int32)},
        after={**TIME_OPS, "aten.embedding": 1},
    )
    assert [node.name for node in user_inputs(result.program)] == ["latent", "step", "context"]


class Adaptive(nn.Module):
    """adaLN-single: one projection, learned per-block tables, six parts a block."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 48)
        self.table = nn.Parameter(torch.randn(2, 6, 8))

    def forward(self, x, timestep):
        features = torch.cat([(timestep[:, None] * torch.arange(4)).cos(), timestep[:, None].expand(-1, 4)], 1)
        shared = self.project(torch.nn.functional.silu(features)).view(-1, 6, 8)
        for block in range(2):
            shift, scale, gate, *_ = (self.table[block] + shared).chunk(6, dim=1)
            x = x + gate * torch.tanh(x * (1 + scale) + shift)
        return x


def test_tables_of_adaptive_norms_are_part_of_the_path(check_pass):
    result = check_pass(
        SpecialiseTimestep((0.7, 0.2)),
        Adaptive(),
        torch.randn(1, 5, 8),
        torch.tensor([0.2]),
        renamed={"step": torch.tensor([1], dtype=torch.int32)},
        after={"aten.linear": 0, "aten.silu": 0, "aten.cos": 0, "aten.chunk": 0},
    )
    assert census(result.program)["aten.slice"] == 6


class ReadsTimeItself(nn.Module):
    def forward(self, x, timestep):
        return x * timestep + timestep.cos()


class OnlyTime(nn.Module):
    def forward(self, x, timestep):
        return x + 1, timestep.cos() * 2


@pytest.mark.parametrize("module", [ReadsTimeItself(), OnlyTime()])
def test_declines_what_it_cannot_fold(check_pass, module):
    one = SpecialiseTimestep((999.0,))
    result = check_pass(one, module, torch.randn(1, 3), torch.tensor([999.0]), modified=False)
    assert "time path" in result.declined[0].reason


def test_a_student_without_timestep_stays(check_pass):
    check_pass(SpecialiseTimestep((999.0,)), nn.Linear(3, 3), torch.randn(1, 3), modified=False)


class FeedsOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, timestep):
        return x, x + self.linear(timestep[:, None].expand(-1, 4).cos())


def test_a_folded_value_may_feed_the_last_op(check_pass):
    check_pass(SpecialiseTimestep((3.0,)), FeedsOutput(), torch.randn(1, 4), torch.tensor([3.0]))


@pytest.mark.parametrize("values", [(), (1.0, 1.0)])
def test_timesteps_are_distinct_and_there(unet, inputs, values):
    with pytest.raises(EdgegenError, match="distinct"):
        SpecialiseTimestep(values)(torch.export.export(unet.eval(), inputs))
