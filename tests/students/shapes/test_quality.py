"""What the shipped student can do, uncompiled, and what careless compression costs it: its contract."""

import copy
import functools

import pytest
import torch
from torch import nn

from edgegen.students.networks.tiny_decoder import Block
from edgegen.students.sample import draw_many
from edgegen.students.shapes.evaluate import evaluate
from edgegen.students.student import Component, Student


def score(student, steps, limit=None):
    return evaluate(functools.partial(draw_many, student, steps=steps), steps, limit)


@pytest.fixture(scope="module")
def four_steps(shapes):
    return score(shapes, 4)


@pytest.mark.slow
def test_alignment_at_four_steps(four_steps):
    assert four_steps.prompts >= 400
    assert four_steps.one_object >= 0.97
    assert four_steps.two_objects >= 0.80


@pytest.mark.slow
def test_alignment_at_one_step(shapes):
    report = score(shapes, 1)
    assert report.one_object >= 0.90
    assert report.two_objects >= 0.65


@pytest.mark.slow
def test_two_steps_are_served_by_the_same_checkpoint(shapes):
    report = score(shapes, 2, limit=216)
    assert report.one_object >= 0.90
    assert report.two_objects >= 0.65


@pytest.mark.slow
def test_shuffled_prompts_fall_to_chance(four_steps):
    assert four_steps.shuffled <= 0.02


@pytest.mark.slow
def test_a_student_that_ignores_its_prompt_scores_chance(shapes):
    text = shapes.components["text_encoder"]

    class Deaf(nn.Module):
        def forward(self, ids):
            return text.module(torch.zeros_like(ids))

    deaf = Component(text.name, Deaf(), text.inputs, text.outputs)
    report = score(Student(shapes.config, {**shapes.components, "text_encoder": deaf}, shapes.tokenizer_json), 4, 108)
    assert report.alignment <= 0.03


class WholeInt8(nn.Module):
    """Naive post-training quantization: per-tensor, symmetric, min-max of each single call, every conv and linear."""

    def __init__(self, inner):
        super().__init__()
        self.inner = copy.deepcopy(inner)
        self.inner.weight.data = self.fake(self.inner.weight.data)

    @staticmethod
    def fake(x):
        scale = x.abs().max().clamp(min=1e-12) / 127
        return (x / scale).round().clamp(-128, 127) * scale

    def forward(self, x):
        return self.fake(self.inner(self.fake(x)))


def quantized(module):
    module = copy.deepcopy(module)
    for name, child in list(module.named_modules()):
        if isinstance(child, (nn.Conv2d, nn.Linear)):
            parent = module.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], WholeInt8(child))
    return module


def with_planted_outlier(decoder, factor=256.0):
    """The same function, with one channel between two convolutions `factor` times as large; ReLU lets scale pass.

    The reverse of the equalisation of Nagel et al. 2019 (arXiv 1906.04721): what large networks grow by themselves.
    """
    decoder = copy.deepcopy(decoder)
    for block in decoder.modules():
        if isinstance(block, Block):
            first, second = block.conv[0], block.conv[2]
            channel = second.weight.abs().sum(dim=(0, 2, 3)).argmax()
            first.weight.data[channel] *= factor
            first.bias.data[channel] *= factor
            second.weight.data[:, channel] /= factor
    return decoder


def replaced(student, name, module):
    part = student.components[name]
    return Student(
        student.config,
        {**student.components, name: Component(name, module, part.inputs, part.outputs)},
        student.tokenizer_json,
    )


@pytest.mark.slow
def test_careless_compression_costs_points(shapes):
    decoder = with_planted_outlier(shapes.components["decoder"].module)
    planted = replaced(shapes, "decoder", decoder)
    whole = score(shapes, 4, limit=108).alignment
    # The planted outlier changes nothing by itself, which a few pictures show.
    latent = torch.randn(4, *shapes.config.latent.shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(decoder(latent), shapes.components["decoder"].module(latent), atol=1e-3, rtol=0)
    careless = planted
    for name in planted.components:
        careless = replaced(careless, name, quantized(planted.components[name].module))
    assert score(careless, 4, limit=108).alignment <= whole - 0.05
