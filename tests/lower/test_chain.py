"""A component in several files draws what it draws in one, whoever lowers and executes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgegen.errors import EdgegenError
from edgegen.graph.evaluate import evaluate
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import LowerRequest, get_backend
from edgegen.lower.chain import INDEX, artifact_files, load_artifact, lower_chain, read_chain

SPECS = tuple(TensorSpec(name=name, shape=shape) for name, shape in (("latent", (1, 4, 8, 8)), ("timestep", (1,))))
PREDICTION = (TensorSpec(name="prediction", shape=(1, 4, 8, 8)),)


class Small(torch.nn.Module):
    """Three levels with a skip from the first to the last, and a timestep that each reads."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.times = torch.nn.ModuleList(torch.nn.Linear(1, 4) for _ in range(3))

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = first = self.convs[0](latent)
        for conv, time in zip(self.convs, self.times, strict=True):
            x = torch.relu(conv(x) + time(timestep)[:, None, None].expand(4, 8, 8)) + first
        return x


@pytest.fixture(scope="module")
def small() -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(Small().eval(), tuple(torch.zeros(spec.shape) for spec in SPECS))


@pytest.fixture(scope="module")
def given() -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(1)
    return {spec.name: torch.randn(spec.shape, generator=generator).numpy() for spec in SPECS}


def chained(folder: Path, backend: str, program: torch.export.ExportedProgram, parts: int = 2) -> Path:
    request = LowerRequest("denoiser", SPECS, PREDICTION, "fp32", folder / "out")
    request.out_dir.mkdir()
    lowered = lower_chain(backend, program, request, folder / "log.txt", parts)
    assert lowered.details["parts"] == str(parts)
    return request.out_dir / lowered.file


@pytest.mark.parametrize("backend", ["onnx", "tflite", "executorch", "coreml", "coreai"])
def test_parts_compute_what_the_whole_does(tmp_path, backend, small, given):
    path = chained(tmp_path, backend, small)
    (expected,) = evaluate(small, {name: torch.from_numpy(value) for name, value in given.items()})
    for resident in (True, False):
        loaded = load_artifact(get_backend(backend), path, SPECS, PREDICTION, resident=resident)
        out = loaded(given)
        loaded.close()
        assert list(out) == ["prediction"]
        error = np.square(out["prediction"] - expected.numpy()).sum() / expected.square().sum().item()
        assert error < 1e-8


def test_a_chain_is_what_its_index_says(tmp_path, small):
    path = chained(tmp_path, "onnx", small, parts=3)
    chain = read_chain(path)
    assert [file.name for file in artifact_files(path)] == [link.file for link in chain.links]
    assert len(chain.links) == 3
    assert chain.links[-1].outputs == PREDICTION
    chain_files = {file.name for file in path.iterdir()}
    assert chain_files == {INDEX, *(link.file for link in chain.links)}


@pytest.mark.parametrize(
    "text, message",
    [
        ("{}", "no index of a chain"),
        ('{"links": []}', "no index of a chain"),
        ('{"links": [%s, %s]}' % (('{"file": "../x", "inputs": [], "outputs": []}',) * 2), "no index of a chain"),
        ('{"links": [%s, %s]}' % (('{"file": "absent", "inputs": [], "outputs": []}',) * 2), "which is not there"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(EdgegenError, match=message):
        read_chain(tmp_path)
