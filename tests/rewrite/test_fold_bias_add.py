"""Constants around a product go into its weight and bias."""

import pytest
import torch
from torch import nn

from edgegen.rewrite.fold_bias_add import FoldBiasAdd
from edgegen.rewrite.specialise_timestep import SpecialiseTimestep
from edgegen.students.networks.unet import ResnetBlock

ARITHMETIC = dict.fromkeys(("aten.add", "aten.sub", "aten.mul", "aten.div"), 0)
X = torch.randn(2, 4, 5, 5)


class Around(nn.Module):
    """`build` says what is done to the product; `self.c` is a constant of one value a feature."""

    def __init__(self, product, build, shape=(1, 6, 1, 1)):
        super().__init__()
        self.product, self.build = product, build
        self.c = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x):
        return self.build(self.product(x), self.c)


CONV = lambda **options: nn.Conv2d(4, 6, 3, **options)  # noqa: E731
FOLDS = {
    "add": lambda h, c: h + c,
    "add, constant first": lambda h, c: c + h,
    "add with a factor": lambda h, c: torch.add(h, c, alpha=-3),
    "sub": lambda h, c: h - c,
    "sub, constant first": lambda h, c: c - h,
    "mul": lambda h, c: h * c,
    "div": lambda h, c: h / c,
    "numbers, several": lambda h, c: h * 2 - 1,
    "both": lambda h, c: (h + c) * c + 3.0,
}


@pytest.mark.parametrize("build", FOLDS.values(), ids=FOLDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_of_a_convolution_that_feeds_the_output(check_pass, build, bias, transposed):
    product = nn.ConvTranspose2d(4, 6, 4, 2, 1, bias=bias) if transposed else CONV(bias=bias)
    check_pass(FoldBiasAdd(), Around(product, build), X, after=ARITHMETIC)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (1, 1, 6), ()])
def test_of_a_linear(check_pass, shape):
    module = Around(nn.Linear(5, 6), lambda h, c: nn.functional.relu(h[:, 0] * 0) + 0, shape)
    module.build = lambda h, c: nn.functional.relu((h + c) * c)
    check_pass(FoldBiasAdd(), module, torch.randn(2, 3, 5), after=ARITHMETIC)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = ResnetBlock(4, 4, 8, 2)

    def forward(self, x, timestep):
        return self.block(x, timestep[:, None].expand(-1, 8).cos())


def test_of_a_time_projection_at_one_timestep(check_pass):
    x, time = torch.randn(1, 4, 5, 5), torch.tensor([3.0])
    program = check_pass(SpecialiseTimestep((3.0,)), Block(), x, time).program
    check_pass(FoldBiasAdd(), program, x, before={"aten.add": 2}, after={"aten.add": 1})


class ReadTwice(Around):
    def forward(self, x):
        h = self.product(x)
        return h + self.c, h


class Tied(Around):
    def forward(self, x):
        return self.product(x) * 2 + nn.functional.conv2d(x, self.product.weight)


class Computed(Around):
    def forward(self, x):
        return nn.functional.conv2d(x, self.product.weight * x.mean()) * 2


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (ReadTwice(CONV(), None), "something else reads"),
        (Tied(CONV(bias=False), None), "another call"),
        (Computed(CONV(), None), "computed"),
        (Around(CONV(), lambda h, c: h + c, (3, 3)), "not one value a feature"),
        (Around(CONV(), lambda h, c: h + c, (2, 1, 1, 1)), "not one value a feature"),
        (Around(CONV(), lambda h, c: h + c, (2, 1, 6, 1, 1)), "the result is"),
        (Around(CONV(), lambda h, c: c / h), "divides the constant"),
        (Around(CONV(), lambda h, c: h * 1e38 + h.dim()), "not finite"),
        (Around(nn.ConvTranspose2d(4, 6, 2, groups=2), lambda h, c: h * c), "grouped"),
    ],
)
def test_declines(check_pass, module, reason):
    if "finite" in reason:
        nn.init.constant_(module.product.weight, 1e3)
    if isinstance(module.build, type(FOLDS["add"])) and module.c.dim() == 5:
        module.c.data = module.c.data[:1].expand(2, -1, -1, -1, -1).clone()
    result = check_pass(FoldBiasAdd(), module, X, modified=False)
    assert reason in result.declined[0].reason


def test_a_sum_of_two_products_is_no_match(check_pass):
    module = Around(CONV(), lambda h, c: h + h.relu())
    assert not check_pass(FoldBiasAdd(), module, X, modified=False).declined
