"""Packages of several functions: real packages joined, executed by the evaluator, held against what they came from."""

import json
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from edgegen.errors import EdgegenError
from edgegen.graph.capture import capture, signature
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import LowerRequest
from edgegen.lower.coreml import BACKEND
from edgegen.lower.coreml_functions import Part, function_name, join
from edgegen.lower.mlpackage import function_path, read_program, read_spec, split_function
from edgegen.rewrite.pipeline import Pipeline
from edgegen.rewrite.registry import parse
from mlprogram import Program

WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
MODEL = "Data/com.apple.CoreML/model.mlmodel"
COMPONENTS = {"text_encoder": "encode", "denoiser": "denoise", "decoder": "decode"}


def lower(program, name, outputs, folder, precision="fp16", target="iOS18"):
    folder.mkdir(parents=True, exist_ok=True)
    request = LowerRequest(name, signature(program), outputs, precision, folder, {"minimum_deployment_target": target})
    return folder / BACKEND.lower(program, request).file


@pytest.fixture(scope="session")
def parts(tiny, tmp_path_factory):
    """The tiny student's components as packages for iOS 18: the denoiser for its two timesteps, and for the first."""
    folder = tmp_path_factory.mktemp("parts")
    made = {
        function: lower(capture(tiny.components[name]), name, tiny.components[name].outputs, folder)
        for name, function in COMPONENTS.items()
        if name != "denoiser"
    }
    denoiser = tiny.components["denoiser"]
    for name, values in (("denoise", [999.0, 499.0]), ("denoise_1", [999.0])):
        pipeline = Pipeline(parse(f"functionalise, specialise-timestep{{values={values}}}, fold-constants"))
        made[name] = lower(pipeline.run(capture(denoiser))[0], name, denoiser.outputs, folder)
    return made


@pytest.fixture(scope="session")
def joined(parts, tmp_path_factory):
    package = tmp_path_factory.mktemp("joined") / "model.mlpackage"
    return package, join([Part(function=name, package=parts[name]) for name in COMPONENTS.values()], package)


def random_inputs(program):
    generator = np.random.default_rng(0)
    return {
        one.name: generator.integers(0, 20, one.shape, dtype=np.int32)
        if one.dtype == np.int32
        else generator.standard_normal(one.shape, dtype=np.float32)
        for one in program.inputs
    } | ({"step": np.ones(1, np.int32)} if "step" in {one.name for one in program.inputs} else {})


def test_every_function_computes_what_its_part_computes(parts, joined):
    package, said = joined
    assert said.functions == ("encode", "denoise", "decode")
    for name in said.functions:
        alone, together = Program.open(parts[name]), Program.open(package, function=name)
        given = random_inputs(alone)
        for output, value in alone(given).items():
            assert np.array_equal(value, together(given)[output])
            assert np.ptp(value) > 0
    assert [one.name for one in Program.open(package).inputs] == ["input_ids"]  # the first is the default


def test_coremltools_reads_it(joined):
    package, _ = joined
    spec = read_spec(package)
    assert spec.specificationVersion == 9 and spec.description.defaultFunctionName == "encode"
    assert [one.name for one in spec.description.functions] == ["encode", "denoise", "decode"]
    program = read_program(package, spec)
    assert set(program.functions) == {"encode", "denoise", "decode"}
    assert any(operation.op_type == "conv" for operation in program.functions["decode"].operations)
    assert not any("date" in key for key in spec.description.metadata.userDefined)


def test_weights_that_functions_share_are_stored_once(parts, tmp_path):
    one, two = parts["denoise_1"], parts["denoise"]
    sizes = [(package / WEIGHTS).stat().st_size for package in (one, two)]
    package = tmp_path / "both.mlpackage"
    said = join([Part(function="denoise", package=two), Part(function="denoise_1", package=one)], package)
    size = (package / WEIGHTS).stat().st_size
    assert said.separate_bytes > 1.9 * said.weight_bytes
    # What the timestep decides is not the same in both; what one of them has twice is stored once as well.
    assert 0.9 * max(sizes) < size < 1.1 * max(sizes)
    twice = tmp_path / "twice.mlpackage"
    join([Part(function=name, package=parts["encode"]) for name in ("encode", "encode_negative")], twice)
    assert (twice / WEIGHTS).stat().st_size <= (parts["encode"] / WEIGHTS).stat().st_size


def test_no_larger_than_what_coremltools_makes_of_the_same(parts, tmp_path):
    from coremltools.models.utils import MultiFunctionDescriptor, save_multifunction

    descriptor = MultiFunctionDescriptor()
    for name in ("denoise_1", "denoise"):
        descriptor.add_function(str(parts[name]), "main", name)
    descriptor.default_function_name = "denoise_1"
    theirs, ours = tmp_path / "theirs.mlpackage", tmp_path / "ours.mlpackage"
    save_multifunction(descriptor, str(theirs))
    join([Part(function=name, package=parts[name]) for name in ("denoise_1", "denoise")], ours)
    assert (ours / WEIGHTS).stat().st_size <= (theirs / WEIGHTS).stat().st_size
    mine, other = read_spec(ours), read_spec(theirs)
    for name in ("denoise_1", "denoise"):
        assert mine.mlProgram.functions[name].opset == other.mlProgram.functions[name].opset
        given = random_inputs(Program.open(ours, function=name))
        (here,), (there,) = (Program.open(p, function=name)(given).values() for p in (ours, theirs))
        np.testing.assert_allclose(here, there, rtol=0, atol=2e-3 * np.abs(there).max())


@pytest.mark.parametrize("form", ["palette", "int4 blocks", "sparse"])
def test_compressed_weights_are_taken_as_they_are(parts, form, tmp_path):
    import coremltools as ct
    import coremltools.optimize.coreml as compression

    operations = {
        "palette": compression.OpPalettizerConfig(mode="uniform", nbits=3, weight_threshold=16),
        "int4 blocks": compression.OpLinearQuantizerConfig(
            dtype="int4", granularity="per_block", block_size=8, weight_threshold=16
        ),
        "sparse": compression.OpMagnitudePrunerConfig(target_sparsity=0.75, weight_threshold=16),
    }
    apply = {
        "palette": compression.palettize_weights,
        "int4 blocks": compression.linear_quantize_weights,
        "sparse": compression.prune_weights,
    }[form]
    whole = ct.models.MLModel(str(parts["decode"]), skip_model_load=True)
    compressed = tmp_path / "part.mlpackage"
    apply(whole, compression.OptimizationConfig(global_config=operations[form])).save(str(compressed))
    package = tmp_path / "model.mlpackage"
    named = {"decode": parts["decode"], "decode_small": compressed, "decode_again": compressed}
    join([Part(function=name, package=one) for name, one in named.items()], package)
    spec = read_spec(package)
    (block,) = spec.mlProgram.functions["decode_small"].block_specializations.values()
    assert any(operation.type.startswith("constexpr_") for operation in block.operations)
    assert (package / WEIGHTS).stat().st_size <= sum((one / WEIGHTS).stat().st_size for one in set(named.values()))
    given = random_inputs(Program.open(compressed))
    (alone,) = Program.open(compressed)(given).values()
    for name in ("decode_small", "decode_again"):
        assert np.array_equal(Program.open(package, function=name)(given)["image"], alone)
    assert not np.array_equal(Program.open(package, function="decode")(given)["image"], alone)


class Product(nn.Module):
    def __init__(self, last):
        super().__init__()
        weight = torch.linspace(-1, 1, 16 * 16).reshape(16, 16)
        weight[-1, -1] = last
        self.product = nn.Linear(16, 16)
        self.product.weight = nn.Parameter(weight)
        self.product.bias = nn.Parameter(torch.full((16,), float(last == 0)))

    def forward(self, x):
        return self.product(x)


def test_weights_that_are_almost_the_same_are_two(tmp_path):
    """The last of 256 elements is 0 in one and the smallest float16 in the other."""
    spec = (TensorSpec(name="y", shape=(1, 16)),)
    packages = []
    for index, last in enumerate((0.0, 2.0**-24)):
        program = torch.export.export(Product(last).eval(), (torch.ones(1, 16),))
        packages.append(lower(program, f"product_{index}", spec, tmp_path))
    package = tmp_path / "model.mlpackage"
    said = join([Part(function=f"f{i}", package=one) for i, one in enumerate(packages)], package)
    assert said.weight_bytes == said.separate_bytes
    given = {"x": np.eye(16, dtype=np.float32)[-1:]}
    results = [Program.open(package, function=f"f{i}")(given)["y"][0, -1] for i in range(2)]
    assert results == [1.0, 2.0**-24]


AGAIN = """
import sys
from pathlib import Path
from edgegen.lower.coreml_functions import Part, join

out, *given = sys.argv[1:]
pairs = [one.split("=", 1) for one in given]
join([Part(function=name, package=Path(path)) for name, path in pairs], Path(out))
"""


def test_two_processes_make_the_same_bytes(parts, joined, tmp_path):
    package, _ = joined
    out = tmp_path / "model.mlpackage"
    given = [f"{name}={parts[name]}" for name in COMPONENTS.values()]
    subprocess.run(
        [sys.executable, "-c", AGAIN, str(out), *given], check=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    files = sorted(path.relative_to(package) for path in package.rglob("*") if path.is_file())
    assert [str(path) for path in files] == [MODEL, WEIGHTS, "Manifest.json"]
    for name in files:
        assert (out / name).read_bytes() == (package / name).read_bytes(), name


def test_a_function_is_loaded_by_its_path(tiny, joined):
    package, _ = joined
    part = tiny.components["decoder"]
    path = function_path(package, "decode")
    assert split_function(path) == (package, "decode") and split_function(package) == (package, None)
    executable = BACKEND.load(path, part.inputs, part.outputs)
    latent = np.ones((1, 4, 8, 8), np.float32)
    with torch.no_grad():
        expected = part.module(torch.from_numpy(latent)).numpy()
    assert np.abs(executable({"latent": latent})["image"] - expected).max() < 1e-2
    executable.close()
    with pytest.raises(EdgegenError, match=r"has no function `enlarge`.*`encode`, `denoise`, `decode`"):
        BACKEND.load(function_path(package, "enlarge"), part.inputs, part.outputs)
    with pytest.raises(EdgegenError, match=r"`model.mlpackage/encode` has no `latent` among its inputs"):
        BACKEND.load(function_path(package, "encode"), part.inputs, part.outputs)


@pytest.mark.parametrize("name", ["two words", "1st", "a-b", "", "é", "a\n", "x" * 64, "../up"])
def test_names_that_no_function_can_have(parts, name, tmp_path):
    with pytest.raises(EdgegenError, match="cannot be a function"):
        join([Part(function=name, package=parts["decode"])], tmp_path / "model.mlpackage")
    with pytest.raises(EdgegenError, match="cannot be a function"):
        function_name(name)
    assert not list(tmp_path.iterdir())


def test_parts_that_cannot_be_joined(tiny, parts, joined, tmp_path):
    decoder = tiny.components["decoder"]
    old = lower(capture(decoder), "decoder", decoder.outputs, tmp_path / "old", target="iOS17")
    out = tmp_path / "model.mlpackage"
    for named, message in (
        ([("decode", old)], "specification version 8, functions need 9"),
        ([("decode", joined[0])], "no ML Program with one function"),
        ([("a", parts["decode"]), ("a", parts["encode"])], "is one already"),
        ([("a", tmp_path / "nowhere.mlpackage")], "not a readable Core ML package"),
    ):
        with pytest.raises(EdgegenError, match=message):
            join([Part(function=name, package=package) for name, package in named], out)
        assert not out.exists()


@pytest.mark.parametrize("damage", ["cut", "moved", "gone"])
def test_damaged_weights_are_found_before_anything_is_written(parts, damage, tmp_path):
    broken = tmp_path / "part.mlpackage"
    shutil.copytree(parts["decode"], broken)
    weights = broken / WEIGHTS
    content = bytearray(weights.read_bytes())
    if damage == "gone":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(content[: len(content) // 2])
    else:
        struct.pack_into("<Q", content, 64 + 16, len(content))  # where the first entry says that its bytes are
        weights.write_bytes(content)
    out = tmp_path / "model.mlpackage"
    with pytest.raises(EdgegenError, match=r"cannot be read|cut off|outside"):
        join([Part(function="decode", package=broken)], out)
    assert not out.exists()


def test_the_manifest_names_one_model(joined):
    entries = json.loads((joined[0] / "Manifest.json").read_text())["itemInfoEntries"]
    assert sorted(entry["name"] for entry in entries.values()) == ["model.mlmodel", "weights"]
