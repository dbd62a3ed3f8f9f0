"""Checks that several families go through: work at full size without memory, and onnxruntime against torch."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture(scope="session")
def full_size_macs():
    """Multiply-accumulates of one component of a config, by torch's own counter on the meta device."""
    from edgegen.students.architectures import build_module
    from edgegen.students.student import DTYPES

    def macs(config, name):
        part = config.components[name]
        with torch.device("meta"):
            module = build_module(part.architecture, part.config)
        inputs = [torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device="meta") for spec in part.inputs]
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            module(*inputs)
        return counter.get_total_flops() // 2

    return macs


@pytest.fixture
def onnxruntime_quality(tmp_path):
    """Signal to noise in dB, the least over the outputs, of a student's component lowered to ONNX by its preset."""
    pytest.importorskip("onnxruntime")
    from edgegen.graph.capture import capture, signature
    from edgegen.lower.backend import LowerRequest
    from edgegen.lower.onnx import BACKEND
    from edgegen.rewrite.pipeline import Pipeline
    from edgegen.rewrite.presets import canonical, onnx

    @torch.no_grad()
    def quality(student, name):
        part = student.components[name]
        given = dict(zip([spec.name for spec in part.inputs], part.example_inputs(), strict=True))
        if name == "text_encoder":
            given["input_ids"] = student.tokenize(["a red house by the sea"])
        times = (student.config.sampler.timesteps()[0],) if name == "denoiser" else ()
        if times:
            given["timestep"] = torch.tensor(times)
        wanted = part.module(*given.values())
        wanted = [wanted] if isinstance(wanted, torch.Tensor) else wanted
        program, _ = Pipeline((*canonical.passes(times), *onnx.passes())).run(capture(part))
        specs = signature(program)
        result = BACKEND.lower(program, LowerRequest(name, specs, part.outputs, "fp32", tmp_path))
        executable = BACKEND.load(tmp_path / result.file, specs, part.outputs)
        found = executable({spec.name: given[spec.name].numpy() for spec in specs})
        executable.close()
        signals = [value.numpy() for value in wanted]
        noises = [signal - found[spec.name] for signal, spec in zip(signals, part.outputs, strict=True)]
        return min(
            10 * np.log10(np.square(signal).sum() / np.square(noise).sum())
            for signal, noise in zip(signals, noises, strict=True)
        )

    return quality
