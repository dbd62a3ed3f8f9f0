"""Identities, constants and unread inputs."""

import torch
from torch import nn

from edgegen.graph.edit import user_inputs
from edgegen.rewrite.drop_unused_inputs import DropUnusedInputs
from edgegen.rewrite.float_literals import FloatLiterals
from edgegen.rewrite.fold_constants import FoldConstants
from edgegen.rewrite.remove_identities import RemoveIdentities


class Idle(nn.Module):
    def forward(self, x):
        y = nn.functional.dropout(x.to(torch.float32), 0.3, self.training).contiguous().view(2, 8)
        return (y.clone() + 1).reshape(2, 8)


def test_calls_that_change_nothing_go(check_pass):
    gone = dict.fromkeys(("aten.dropout", "aten.view", "aten.clone", "aten.reshape", "aten.to"), 0)
    check_pass(RemoveIdentities(), Idle(), torch.randn(2, 8), after={**gone, "aten.add": 1})


class Changes(nn.Module):
    def forward(self, x):
        return x.reshape(16).expand(3, 16)


class Casts(nn.Module):
    def forward(self, x):
        return x.to(torch.float64)


def test_calls_that_change_something_stay(check_pass):
    check_pass(RemoveIdentities(), Changes(), torch.randn(2, 8), modified=False)
    check_pass(RemoveIdentities(), Casts(), torch.randn(2), after={"aten.to": 1, "aten._assert_tensor_metadata": 0})


class Trains(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, True) * 0


def test_a_dropout_that_trains_is_no_identity(check_pass):
    result = check_pass(RemoveIdentities(), Trains(), torch.randn(2, 8), modified=False)
    assert "trains" in result.declined[0].reason


class Alias(nn.Module):
    def forward(self, x):
        return (x + 1).clone()


class Squeezes(nn.Module):
    """Only the first has something to take away; ONNX refuses the other two."""

    def forward(self, x):
        return (x.squeeze(1) + 1).squeeze(1).squeeze((0, 1))


def test_a_squeeze_of_what_is_not_one_is_an_identity(check_pass):
    check_pass(RemoveIdentities(), Squeezes(), torch.randn(2, 1, 8), after={"aten.squeeze": 1})


def test_an_identity_may_feed_the_output(check_pass):
    check_pass(RemoveIdentities(), Alias(), torch.randn(3), after={"aten.clone": 0})


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return x @ (self.weight * 2).t() + torch.arange(4)


def test_what_follows_from_weights_is_computed_once(check_pass):
    gone = {"aten.mul": 0, "aten.t": 0, "aten.arange": 0}
    result = check_pass(FoldConstants(), Constant(), torch.randn(2, 3), before={"aten.mul": 1}, after=gone)
    assert len(result.program.state_dict) == 2


class Empty(nn.Module):
    """What is padded has no elements: the padding is all there is."""

    def forward(self, x):
        return x + torch.nn.functional.pad(x[:, 4:] * 2, (0, 4), value=3.0)


def test_a_value_without_elements_is_known(check_pass):
    check_pass(
        FoldConstants(), Empty(), torch.randn(2, 4), before={"aten.pad": 1}, after={"aten.pad": 0, "aten.slice": 0}
    )


class JoinsEmpty(nn.Module):
    def forward(self, x):
        return torch.cat([x, x[:, 4:] * 2], 1)


def test_a_value_without_elements_is_no_weight(check_pass):
    check_pass(FoldConstants(), JoinsEmpty(), torch.randn(2, 4), modified=False)


class Grows(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 64))

    def forward(self, x):
        return x + self.weight.expand(1024, 64).contiguous()


def test_a_file_does_not_grow_by_an_expanded_bias(check_pass):
    result = check_pass(FoldConstants(), Grows(), torch.randn(1024, 64), modified=False)
    assert "grow" in result.declined[0].reason


class Random(nn.Module):
    def forward(self, x):
        return x + 0 * torch.rand(3)


def test_random_numbers_are_no_constants(check_pass):
    result = check_pass(FoldConstants(), Random(), torch.randn(3), modified=False)
    assert "random" in result.declined[0].reason


class Whole(nn.Module):
    def forward(self, x):
        return torch.tanh(x / 3) * 3 + 1 - x


class Integers(nn.Module):
    def forward(self, x):
        return x * 3, x.float() * 16777217


def test_whole_numbers_beside_floats_are_floats(check_pass):
    result = check_pass(FloatLiterals(), Whole(), torch.randn(2, 3))
    literals = [arg for node in result.program.graph.nodes for arg in node.args if isinstance(arg, int | float)]
    assert literals == [3.0, 3.0, 1.0] and all(isinstance(one, float) for one in literals)


def test_integers_and_what_float_does_not_hold_stay(check_pass):
    check_pass(FloatLiterals(), Integers(), torch.tensor([1, 2]), modified=False)


class Unread(nn.Module):
    def forward(self, x, caption, scale):
        caption.exp()  # dead
        return x * scale


def test_inputs_that_only_dead_calls_read_go(check_pass):
    result = check_pass(DropUnusedInputs(), Unread(), torch.randn(2), torch.randn(3), torch.randn(2))
    assert [node.name for node in user_inputs(result.program)] == ["x", "scale"]


class PassesThrough(nn.Module):
    def forward(self, x, y):
        return x + 1, y


def test_an_input_that_is_an_output_is_read(check_pass):
    check_pass(DropUnusedInputs(), PassesThrough(), torch.randn(2), torch.randn(3), modified=False)
