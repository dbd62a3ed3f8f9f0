"""Two networks of equal weights that compute different things never share a fingerprint."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgegen.graph.tensor_spec import TensorSpec
from edgegen.students.networks.clip_text import ClipTextConfig, ClipTextEncoder
from edgegen.students.settings import settings
from edgegen.students.student import Component

SPEC = (TensorSpec(name="x", shape=(1, 4)),)


class Net(nn.Module):
    def __init__(self, act=F.gelu, scale: float = 1.0, table: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        nn.init.ones_(self.linear.weight)
        self.act, self.scale = act, scale
        self.register_buffer("table", torch.full((4,), table), persistent=False)

    def forward(self, x):
        return self.act(self.linear(x)) * self.scale + self.table


def of(module: nn.Module) -> str:
    return Component("model", module, SPEC, SPEC).fingerprint


@pytest.mark.parametrize(
    "other",
    [Net(F.relu), Net(partial(F.gelu, approximate="tanh")), Net(scale=2.0), Net(table=1.0)],
    ids=["function", "partial", "number", "buffer that is not saved"],
)
def test_what_is_not_printed_counts(other):
    assert str(other) == str(Net())
    assert of(other) != of(Net())


def test_equal_networks_are_equal_in_training_too():
    assert of(Net()) == of(Net().train()) == of(Net().eval())


def test_the_activation_of_a_text_encoder_counts():
    """Two families' small students had equal weights and another GELU: one was given the other's artifact."""
    made = {}
    for act in ("gelu", "quick_gelu"):
        torch.manual_seed(0)
        config = ClipTextConfig(
            vocab_size=64,
            max_position_embeddings=8,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            hidden_act=act,
        )
        made[act] = of(ClipTextEncoder(config))
    assert made["gelu"] != made["quick_gelu"]


def test_the_same_in_every_process():
    code = (
        "from edgegen.students.families.registry import new;"
        "from edgegen.students.settings import settings; import hashlib;"
        "print(hashlib.sha256('\\n'.join(l for p in new('sd-turbo', 'tiny').components.values()"
        " for l in settings(p.module)).encode()).hexdigest())"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


def test_no_addresses():
    assert not any(" at 0x" in line for line in settings(Net(lambda x: x)))
