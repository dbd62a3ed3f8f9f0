"""Stateful packages: a buffer that a call changes, kept by the program, held against torch over several calls."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from edgegen.errors import EdgegenError, UsageError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import LowerRequest
from edgegen.lower.coreml import BACKEND
from edgegen.lower.coreml_functions import Part, join
from edgegen.lower.mlpackage import function_path, read_spec, states
from mlprogram import Program, ProgramError

IOS18 = {"minimum_deployment_target": "iOS18"}
LATENT = (TensorSpec(name="noise", shape=(1, 4, 8, 8)), TensorSpec(name="fresh", shape=(1,)))
AFTER = (TensorSpec(name="after", shape=(1, 4, 8, 8)),)


class Loop(nn.Module):
    """A sampling loop that keeps its latent: a call is one step, the first one (`fresh` 1) begins from `noise`."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 4, 3, padding=1))
        self.register_buffer("latent", torch.zeros(1, 4, 8, 8))

    def forward(self, noise, fresh):
        x = fresh * noise + (1 - fresh) * self.latent
        x = x - 0.25 * self.inner(x)
        self.latent.copy_(x)
        return x * 1.0


class Adder(nn.Module):
    def __init__(self, buffer):
        super().__init__()
        self.register_buffer("kept", buffer)

    def forward(self, x):
        self.kept.add_(x.to(self.kept.dtype))
        return self.kept.float() * 2


def export(module, *arguments):
    with torch.no_grad():
        return torch.export.export(module.eval(), arguments)


@pytest.fixture(scope="module")
def loop():
    torch.manual_seed(3)
    return Loop()


@pytest.fixture(scope="module")
def program(loop):
    return export(loop, torch.zeros(1, 4, 8, 8), torch.ones(1))


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def made(request, program, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"state_{request.param}")
    lowered = BACKEND.lower(program, LowerRequest("denoiser", LATENT, AFTER, request.param, folder, IOS18))
    return request.param, folder / lowered.file, lowered


def calls():
    generator = np.random.default_rng(5)
    noise = generator.standard_normal((1, 4, 8, 8), dtype=np.float32)
    return [{"noise": noise, "fresh": np.array([float(i == 0)], np.float32)} for i in range(4)]


def in_torch(loop):
    loop = copy.deepcopy(loop)  # the exported program has the very same buffer
    with torch.no_grad():
        return [loop(*(torch.from_numpy(one[key]) for key in ("noise", "fresh"))).numpy().copy() for one in calls()]


def test_four_calls_are_four_steps_in_torch(loop, made):
    precision, package, lowered = made
    assert lowered.details["states"] == "latent" and "float16" in lowered.notes[0]
    assert states(read_spec(package), package) == ("latent",)
    expected = in_torch(loop)
    executable = BACKEND.load(package, LATENT, AFTER)
    found = [executable(one)["after"] for one in calls()]
    for step, (want, have) in enumerate(zip(expected, found, strict=True)):
        error = np.abs(want - have).max() / np.abs(want).max()
        # A state is float16: the first step is as exact as the arithmetic, what follows as float16.
        assert error < (1e-5 if precision == "fp32" and not step else 4e-3), (precision, step)
    assert np.abs(found[-1] - found[0]).max() > 0.1, "it does go on"
    again = [executable(one)["after"] for one in calls()]
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True)), "`fresh` begins anew"
    executable.close()


def test_the_state_can_be_read_and_is_the_programs_own(made):
    _, package, _ = made
    program = Program.open(package)
    assert [one.name for one in program.states] == ["latent"]
    state, other = program.make_state(), program.make_state()
    first, second = calls()[:2]
    after = program(first, state=state)["after"]
    program(second, state=state)
    one = program(second, state=other)["after"]
    assert not np.array_equal(after, one), "a state of its own begins as zeros"
    with pytest.raises(ProgramError, match="was given no state"):
        program(first)


def test_functions_of_one_package_keep_a_state_each(made, tmp_path):
    _, package, _ = made
    both = tmp_path / "model.mlpackage"
    said = join([Part(function=name, package=package) for name in ("denoise", "denoise_other")], both)
    assert said.separate_bytes == 2 * said.weight_bytes
    loaded = [BACKEND.load(function_path(both, name), LATENT, AFTER) for name in said.functions]
    alone = BACKEND.load(package, LATENT, AFTER)
    first, second = calls()[:2]
    loaded[0](first)
    alone(first)
    assert np.array_equal(loaded[0](second)["after"], alone(second)["after"])
    assert not np.array_equal(loaded[0](second)["after"], loaded[1](second)["after"]), "nothing crosses over"
    for one in (*loaded, alone):
        one.close()


AGAIN = """
import sys, torch
from pathlib import Path
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import LowerRequest
from edgegen.lower.coreml import BACKEND

path, out, precision, inputs, outputs = sys.argv[1:]
specs = [tuple(TensorSpec.model_validate_json(line) for line in text.splitlines()) for text in (inputs, outputs)]
options = {"minimum_deployment_target": "iOS18"}
BACKEND.lower(torch.export.load(path), LowerRequest("denoiser", *specs, precision, Path(out), options))
"""


def test_made_again_the_bytes_are_the_same(program, made, tmp_path):
    """fp32 by this process, where much was converted in between; fp16 by another one."""
    precision, package, _ = made
    if precision == "fp32":
        BACKEND.lower(program, LowerRequest("denoiser", LATENT, AFTER, precision, tmp_path, IOS18))
    else:
        torch.export.save(program, tmp_path / "program.pt2")
        lines = ["\n".join(spec.model_dump_json() for spec in specs) for specs in (LATENT, AFTER)]
        arguments = [str(tmp_path / "program.pt2"), str(tmp_path), precision, *lines]
        environment = {**os.environ, "PYTHONHASHSEED": "11"}
        done = subprocess.run(
            [sys.executable, "-c", AGAIN, *arguments], check=False, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
    files = sorted(path.relative_to(package) for path in package.rglob("*") if path.is_file())
    assert len(files) == 3
    for name in files:
        assert (tmp_path / package.name / name).read_bytes() == (package / name).read_bytes(), name


def test_what_a_state_cannot_hold_is_refused(program, tmp_path):
    with pytest.raises(UsageError, match=r"keeps `latent` between calls, and states came with iOS 18") as caught:
        BACKEND.lower(program, LowerRequest("denoiser", LATENT, AFTER, "fp32", tmp_path))
    assert "minimum_deployment_target" in caught.value.hint
    spec = (TensorSpec(name="x", shape=(1, 4)),)
    for buffer, message in (
        (torch.ones(1, 4), "does not begin as zeros"),
        (torch.zeros(1, 4, dtype=torch.int32), "as int32; a state is float16"),
    ):
        adder = export(Adder(buffer), torch.zeros(1, 4))
        with pytest.raises(EdgegenError, match=message):
            BACKEND.lower(adder, LowerRequest("part", spec, spec, "fp32", tmp_path, IOS18))
    assert not list(tmp_path.iterdir())
