"""Training that can be killed: the same bits, a bad loss, an early end."""

import copy
import math

import pytest
import torch
from torch import nn

from edgegen.errors import EdgegenError
from edgegen.prune.training import Judged, Training, share


class Killed(Exception):
    pass


class Line:
    """Learn y = 3x - 1 from points drawn from the step's number, with a state that the next lesson depends on."""

    def __init__(self, module, dies_at=None, bad_at=None):
        self.module, self.dies_at, self.bad_at = module, dies_at, bad_at
        self.carried = torch.zeros(1)

    def learn(self, index):
        if index == self.dies_at:
            raise Killed
        x = torch.randn(16, 1, generator=torch.Generator().manual_seed(index)) + self.carried
        self.carried = x.mean().reshape(1)
        loss = (self.module(x) - (3 * x - 1)).square().mean()
        return loss * math.nan if index == self.bad_at else loss

    def state(self):
        return {"carried": self.carried}

    def restore(self, state):
        self.carried = state["carried"]


class Silent:
    def __init__(self):
        self.steps, self.said = 0, ""

    def advance(self):
        self.steps += 1

    def status(self, text):
        self.said = text


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))


def run(module, lessons, state=None, **more):
    shown = Silent()
    training = Training(module, lessons, 60, 2e-2, 0.9, shown, state, judge_every=20, **more)
    return training.run(), shown


def test_learns_and_says_how_it_stands():
    module = network()
    before = float(Line(copy.deepcopy(module)).learn(10_000).detach())
    course, shown = run(module, Line(module))
    assert course.step == shown.steps == 60
    assert "loss" in shown.said and "s left" in shown.said
    assert float(Line(module).learn(10_000).detach()) < before / 3


@pytest.mark.parametrize("dies_at", [25, 41, 59])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, dies_at):
    whole, cut = network(), network()
    run(whole, Line(whole))
    state = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        run(cut, Line(cut, dies_at=dies_at), state, judge=lambda: Judged(psnr_db=1.0))
    again = network()
    course, shown = run(again, Line(again), state, judge=lambda: Judged(psnr_db=1.0))
    assert course.step == 60 and shown.steps == 60
    assert len(course.judged) == 3, "judged at 20, 40 and 60, by whichever process"
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_weight_that_nothing_reads_is_kept_too(tmp_path):
    module, again = network(), network()
    for one in (module, again):
        one.add_module("unread", nn.Linear(2, 2))
    first = [Line(one[:3]) for one in (module, again)]
    first[0].dies_at = 45
    state = tmp_path / "state"
    with pytest.raises(Killed):
        run(module, first[0], state, judge=lambda: Judged(psnr_db=1.0))
    course, _ = run(again, Line(again[:3]), state, judge=lambda: Judged(psnr_db=1.0))
    assert course.step == 60
    whole = network()
    run(whole, Line(whole))
    assert torch.equal(again[0].weight, whole[0].weight)


def test_a_finished_run_is_read_and_not_run_again(tmp_path):
    module, again = network(), network()
    run(module, Line(module), tmp_path / "state")
    run(again, Line(again, dies_at=0), tmp_path / "state")
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


def test_a_damaged_state_is_refused(tmp_path):
    (tmp_path / "state").write_bytes(b"not a state")
    module = network()
    with pytest.raises(EdgegenError, match="cannot be read"):
        run(module, Line(module), tmp_path / "state")


def test_a_loss_that_is_not_finite_ends_it():
    module = network()
    with pytest.raises(EdgegenError, match="not finite at step 8") as refused:
        run(module, Line(module, bad_at=7))
    assert refused.value.hint


def test_ends_early_when_it_is_good_enough():
    module = network()
    live = []

    def judge():
        live.append([one.detach().clone() for one in module.parameters()])
        return Judged(psnr_db=10.0 * len(live), alignment=0.9)

    course, _ = run(module, Line(module), judge=judge, enough=lambda found: found.psnr_db >= 20)
    assert course.step == 40
    assert "good enough after 40 steps" in course.ended and "0.900" in course.ended
    assert all(torch.equal(a, b) for a, b in zip(live[-1], module.parameters(), strict=True)), "what was judged stays"


def test_the_rate_rises_and_falls():
    shares = [share(i, 200) for i in range(200)]
    assert shares[0] < 0.2 and max(shares) <= 1.0 and shares.index(max(shares)) < 10
    assert shares[-1] < 0.02
    assert shares[6:] == sorted(shares[6:], reverse=True)
