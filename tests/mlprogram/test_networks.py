"""Networks as coremltools converts them, against torch."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlprogram import Program


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Block(nn.Module):
    """What a transformer student is made of: RMSNorm, attention, linear attention, conv3d, pixel_shuffle, adaLN."""

    def __init__(self, width=32):
        super().__init__()
        self.patch = nn.Conv2d(4, width, 2, 2)
        self.norm = RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, 2 * width)
        self.temporal = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0), groups=4)
        self.out = nn.Conv2d(width, 16, 3, padding=1)

    def forward(self, x, condition):
        h = self.patch(x)
        n, c, rows, columns = h.shape
        t = h.flatten(2).transpose(1, 2)
        scale, shift = self.mix(F.silu(condition)).unsqueeze(1).chunk(2, dim=-1)
        q, k, v = (one.unflatten(-1, (4, -1)).transpose(1, 2) for one in self.qkv(self.norm(t)).chunk(3, dim=-1))
        t = t + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) * (1 + scale) + shift
        q, k = F.relu(q), F.relu(k)
        linear = q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-4)
        t = t + linear.transpose(1, 2).flatten(2)
        h = t.transpose(1, 2).reshape(n, c, rows, columns)
        h = h + self.temporal(torch.stack([h, h.roll(1, -1), h.flip(-2)], 2)).mean(2)
        return F.pixel_shuffle(self.out(h), 2)


class Decoder(nn.Module):
    """What a decoder is made of: upsampling by repetition, by interpolation and by transposed convolution."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.up = nn.ConvTranspose2d(16, 8, 4, 2, 1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.again = nn.ConvTranspose2d(8, 8, 3, 2, 1, output_padding=1, groups=2)
        self.last = nn.Conv2d(8, 3, 3, padding=1, padding_mode="reflect")

    def forward(self, x):
        h = F.interpolate(F.gelu(self.norm(self.first(torch.tanh(x / 3) * 3))), scale_factor=2.0, mode="nearest")
        h = F.leaky_relu(self.depth(F.hardswish(self.up(h))), 0.1)
        h = F.interpolate(self.again(h), size=(60, 44), mode="bilinear") + 0.5
        return torch.clamp(self.last(F.avg_pool2d(h, 2)), -1, 1)


class Text(nn.Module):
    """What a text encoder is made of: embeddings, a causal mask, LayerNorm, one place read by index."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(40, 24), nn.Embedding(8, 24)
        self.norm, self.qkv, self.mlp = nn.LayerNorm(24), nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, ids):
        h = self.words(ids) + self.places(torch.arange(8))
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        mask = torch.full((8, 8), -6e4).triu(1)
        h = h + torch.softmax(q @ k.transpose(1, 2) / math.sqrt(24) + mask, -1) @ v
        h = h + self.mlp(torch.sigmoid(1.702 * h) * h)
        return h, h[torch.arange(1), ids.argmax(-1)]


def arguments(name):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    if name == "block":
        return Block(), (normal(1, 4, 8, 8), normal(1, 32))
    if name == "decoder":
        return Decoder(), (normal(1, 4, 8, 6),)
    return Text(), (torch.randint(0, 40, (1, 8), generator=generator),)


@pytest.fixture(scope="session")
def network(packages):
    made = {}

    def make(name, precision, target="iOS17"):
        key = (name, precision, target)
        if key not in made:
            torch.manual_seed(0)
            made[key] = packages.convert(*arguments(name), precision, target)
        return made[key]

    return make


@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
@pytest.mark.parametrize("name", ["block", "decoder", "text"])
def test_fp32_is_torch(packages, network, name, target):
    assert packages.score(network(name, "fp32", target)) > 110


@pytest.mark.parametrize("name", ["block", "decoder", "text"])
def test_fp16_is_near_torch_and_loses_more_when_it_accumulates_in_fp16(packages, network, name):
    made = network(name, "fp16")
    once, always = packages.score(made), packages.score(made, accumulate="fp16")
    assert 50 < once < 90
    assert 40 < always < once


def test_every_value_has_the_type_that_the_program_says_and_watch_sees_it(network):
    made = network("block", "fp16")
    program = Program.open(made.path)
    seen = []

    def watch(operation, values):
        for (name, type), value in zip(operation.outputs, values, strict=True):
            assert type.admits(value.shape) and value.dtype == type.element.numpy
            seen.append((operation.type, name))

    plain = program(made.given)
    watched = program(made.given, watch)
    assert all(np.array_equal(plain[name], watched[name]) for name in plain)
    assert [kind for kind, _ in seen if kind != "split"] == [o.type for o in program.operations if o.type != "split"]
    assert {type.element.name for o in program.operations for _, type in o.outputs} >= {"fp16", "fp32"}


def test_outputs_are_the_callers_own(network):
    made = network("decoder", "fp32")
    program = Program.open(made.path)
    first = program(made.given)
    kept = {name: value.copy() for name, value in first.items()}
    for value in first.values():
        value += 1
    second = program(made.given)
    assert all(np.array_equal(second[name], kept[name]) for name in kept)


@pytest.mark.parametrize("kind", ["plain", "p4"])
def test_memory_for_decompressed_weights_is_bounded(packages, network, kind):
    """Weights that lie in the file as they are stay there; decompressed ones are kept up to twice the file."""
    if kind == "plain":
        made = network("block", "fp16")
    else:
        module = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(4)))
        made = packages.convert(module, (torch.randn(1, 32, 4, 4),), "fp16", "iOS17", compress("p4"))
    program = Program.open(made.path)
    first = program(made.given)["y0"]
    held = sum(one.numel() * one.element_size() for one in program._kept.values())
    stored = (made.path / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    assert held == 0 if kind == "plain" else 0.5 * stored < held <= 2 * stored
    assert np.array_equal(program(made.given)["y0"], first)


def compress(kind):
    import coremltools.optimize.coreml as cto

    def change(model):
        if kind == "w8":
            options = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=64)
            return cto.linear_quantize_weights(model, cto.OptimizationConfig(global_config=options))
        if kind == "w4 blocks":
            options = cto.OpLinearQuantizerConfig(
                mode="linear", dtype="uint4", granularity="per_block", block_size=8, weight_threshold=64
            )
            return cto.linear_quantize_weights(model, cto.OptimizationConfig(global_config=options))
        if kind == "sparse":
            options = cto.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=64)
            return cto.prune_weights(model, cto.OptimizationConfig(global_config=options))
        options = cto.OpPalettizerConfig(nbits=int(kind[1]), weight_threshold=64)
        if kind.endswith("groups"):
            options.granularity, options.group_size = "per_grouped_channel", 8
        return cto.palettize_weights(model, cto.OptimizationConfig(global_config=options))

    return change


def reference(model):
    """Every weight decompressed by coremltools itself: the same program with plain constants."""
    import coremltools.optimize.coreml as cto

    return cto.decompress_weights(model)


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("w8", "iOS16"),
        ("w8", "iOS18"),
        ("w4 blocks", "iOS18"),
        ("p4", "iOS16"),
        ("p6", "iOS17"),
        ("p8", "iOS16"),
        ("p4 groups", "iOS18"),
        ("p3", "iOS18"),
        ("sparse", "iOS16"),
        ("sparse", "iOS18"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_compressed_weights_are_what_coremltools_decompresses(packages, kind, target, precision):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(4, 16, 3), nn.GELU(), nn.Conv2d(16, 8, 1), nn.Flatten(2), nn.Linear(36, 24))
    given = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)),)
    made = packages.convert(module, given, precision, target, compress(kind))
    path = packages.path()
    reference(made.model).save(str(path))
    program, plain = Program.open(made.path), Program.open(path)
    assert any(one.startswith("constexpr_") for one in _constant_operations(made.path)), "nothing was compressed"
    assert not any(one.startswith("constexpr_") for one in _constant_operations(path))
    assert np.array_equal(program(made.given)["y0"], plain(made.given)["y0"])
    assert packages.score(made) > 5


def _constant_operations(path):
    import coremltools as ct

    functions = ct.utils.load_spec(str(path)).mlProgram.functions
    return {o.type for f in functions.values() for b in f.block_specializations.values() for o in b.operations}


def test_quantized_activations_are_those_of_torchs_quantized_graph(packages):
    """W8A8 from PT2E: `quantize`, `dequantize` and integer weights, every step on the same side of every half."""
    quantizer = pytest.importorskip("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.Flatten(2), nn.Linear(36, 24))
    given = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)),)
    scheme = quantizer.get_symmetric_quantization_config(is_per_channel=True)
    prepared = prepare_pt2e(
        torch.export.export(module.eval(), given).module(), quantizer.XNNPACKQuantizer().set_global(scheme)
    )
    prepared(*given)
    quantized = convert_pt2e(prepared)
    quantized.eval = lambda: quantized
    with torch.no_grad():
        expected = module(*given).numpy()
    made = packages.convert(quantized, given)
    program = Program.open(made.path)
    kinds = [one.type for one in program.operations]
    assert kinds.count("quantize") == kinds.count("dequantize") == 4
    assert "constexpr_affine_dequantize" in _constant_operations(made.path)
    assert packages.score(made) > 110
    assert 25 < packages.sqnr(expected, program(made.given)["y0"]) < 60
