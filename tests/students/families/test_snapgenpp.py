"""SnapGen++: sizes beside the paper's, and its sparse attention against the formulas written out with masks."""

import pytest
import torch
import torch.nn.functional as F

from edgegen.graph.capture import capture
from edgegen.graph.count import count
from edgegen.graph.evaluate import evaluate
from edgegen.rewrite.pipeline import Pipeline
from edgegen.rewrite.presets import canonical
from edgegen.students.families.registry import config_of, new, parameters
from edgegen.students.networks.snapgenpp_dit import SnapGenPlusConfig, SparseAttention
from edgegen.students.sample import draw


@pytest.fixture(scope="module")
def tiny():
    return new("snapgenpp", "tiny", seed=3)


def attention(num_blocks=4, radius=1):
    torch.manual_seed(0)
    config = SnapGenPlusConfig(sample_size=16, hidden_size=32, head_dim=8, num_blocks=num_blocks, radius=radius)
    return SparseAttention(config).eval()


@pytest.mark.parametrize(
    ("size", "exact", "published", "within"),
    [
        ("full", 1_656_672_848, 1.6e9, 0.04),
        ("small-0.4b", 439_026_992, 429e6, 0.025),
        ("tiny-0.3b", 256_276_968, 0.25e9, 0.2),
    ],
)
def test_sizes_beside_the_papers(size, exact, published, within):
    found = parameters(config_of("snapgenpp", size))
    assert found["denoiser"] == exact
    assert exact == pytest.approx(published, rel=within)


def test_macs_at_1024_pixels(full_size_macs):
    assert full_size_macs(config_of("snapgenpp", "small-0.4b"), "denoiser") == 1_461_493_956_608


@torch.no_grad()
@pytest.mark.parametrize(("num_blocks", "radius"), [(4, 1), (8, 2), (4, 2), (2, 1)])
def test_neighbouring_blocks_are_what_a_mask_would_leave(num_blocks, radius):
    layer = attention(num_blocks, radius)
    q, k, v = torch.randn(2, 4, 64, 8), torch.randn(2, 2, 64, 8), torch.randn(2, 2, 64, 8)
    block = torch.arange(64) // (64 // num_blocks)
    mask = (block[:, None] - block[None]).abs() <= radius
    shared = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    found = layer._neighbourhood(q, k, v)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, *shared, attn_mask=mask), atol=1e-6, rtol=0)
    if not mask.all():
        assert (found - F.scaled_dot_product_attention(q, *shared)).abs().max() > 1e-2


@torch.no_grad()
def test_compressed_keys_are_one_for_four_and_each_head_its_own():
    layer = attention()
    h = torch.randn(1, 2, 64, 8)
    small = layer._compress(layer.compress_k, h)
    assert small.shape == (1, 2, 16, 8)
    # Token 9 of 16 lies at row 2, column 1 of 4x4: it reads rows 4 and 5, columns 2 and 3 of 8x8.
    window = h[0, 1].reshape(8, 8, 8)[4:6, 2:4].permute(2, 0, 1)
    weight, bias = layer.compress_k.weight[8:16], layer.compress_k.bias[8:16]
    torch.testing.assert_close(small[0, 1, 9], (weight * window).sum(dim=(1, 2, 3)) + bias, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_gate_goes_from_near_to_far():
    layer = attention()
    x = torch.randn(1, 64, 32)
    layer.gate.weight.zero_()
    near, far = (layer.gate.bias.fill_(value) is not None and layer(x, x) for value in (-40.0, 40.0))
    q, k, v = layer.project(x, x, None)
    local = layer.to_out(layer._neighbourhood(q, k, v).transpose(1, 2).flatten(2))
    compressed = (layer._compress(conv, h) for conv, h in ((layer.compress_k, k), (layer.compress_v, v)))
    wide = layer.to_out(layer.attend(q, *compressed).transpose(1, 2).flatten(2))
    torch.testing.assert_close(near, local, atol=1e-6, rtol=0)
    torch.testing.assert_close(far, wide, atol=1e-6, rtol=0)
    assert (near - far).abs().max() > 1e-2


def test_an_untrained_student_draws_something_else_for_another_prompt(tiny):
    one, other = draw(tiny, ["a red house by the sea", "a cat"], [1, 1], 4)
    assert one.shape == (3, 128, 128)
    assert one.std() > 0.02 and (one - other).std() > 0.02 * one.std()


@torch.no_grad()
def test_the_canonical_passes_keep_its_numbers(tiny):
    part = tiny.components["denoiser"]
    program = capture(part)
    assert count(program).parameters == sum(value.numel() for value in part.module.parameters())
    latent, _, context = part.example_inputs()
    made, _ = Pipeline(canonical.passes((750.0,))).run(program)
    wanted = part.module(latent, torch.tensor([750.0]), context)
    (found,) = evaluate(made, {"latent": latent, "context": context})
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.slow
def test_onnxruntime_computes_what_torch_does(tiny, onnxruntime_quality):
    assert onnxruntime_quality(tiny, "denoiser") >= 100
