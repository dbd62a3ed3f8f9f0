"""Fixtures shared by the whole suite: the shipped student is loaded once, artifacts are lowered once."""

import pytest


@pytest.fixture(scope="session")
def shapes():
    """The shipped student, as `load` gives it."""
    from edgegen.students.load import load
    from edgegen.students.shapes.family import WEIGHTS

    return load(WEIGHTS)


@pytest.fixture(scope="session")
def tiny():
    """A text-to-image student of three small networks with random weights and the shipped tokenizer."""
    import torch

    from edgegen.students.architectures import build_module
    from edgegen.students.config import StudentConfig
    from edgegen.students.shapes.family import WEIGHTS
    from edgegen.students.student import Component, Student

    def spec(name, *shape, dtype="float32"):
        return {"name": name, "shape": shape, "dtype": dtype}

    text = {"vocab_size": 28, "max_position_embeddings": 16, "hidden_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "intermediate_size": 64}
    unet = {"sample_size": 8, "block_out_channels": (16, 32), "cross_attention": (False, True), "num_heads": 2}
    unet |= {"cross_attention_dim": 32, "norm_num_groups": 8}
    context, latent = spec("context", 1, 16, 32), spec("latent", 1, 4, 8, 8)
    parts = {
        "text_encoder": ("clip_text", text, [spec("input_ids", 1, 16, dtype="int32")], [context]),
        "denoiser": ("unet", unet, [latent, spec("timestep", 1), context], [spec("prediction", 1, 4, 8, 8)]),
        "decoder": ("tiny_decoder", {"width": 8, "num_blocks": (1, 1)}, [latent], [spec("image", 1, 3, 16, 16)]),
    }
    times = {1: (999.0,), 2: (999.0, 499.0)}
    config = StudentConfig.model_validate(
        {
            "name": "tiny",
            "task": "text-to-image",
            "components": {
                name: {"architecture": kind, "config": settings, "inputs": inputs, "outputs": outputs}
                for name, (kind, settings, inputs, outputs) in parts.items()
            },
            "sampler": {"scheduler": "lcm", "prediction_type": "epsilon", "times": times, "default_steps": 2},
            "latent": {"shape": (1, 4, 8, 8), "scale": 0.8, "shift": 0.1},
            "example_prompts": ("a small red circle",),
        }
    )
    torch.manual_seed(0)
    components = {
        name: Component(name, build_module(part.architecture, dict(part.config)), part.inputs, part.outputs)
        for name, part in config.components.items()
    }
    return Student(config, components, WEIGHTS.with_name("tokenizer.json").read_text())


@pytest.fixture(scope="session")
def tiny_contents(tiny, tmp_path_factory):
    """What a build would hand to the bundle writer: the tiny student lowered to ONNX by the real backend."""
    from edgegen.bundle.manifest import Artifact, ComponentIO, Gates, Manifest, NoiseSpec, SamplerTable
    from edgegen.bundle.write import BundleContents
    from edgegen.graph.capture import capture
    from edgegen.lower.backend import LowerRequest, get_backend

    artifacts, folders = [], []
    for name, part in tiny.components.items():
        folder = tmp_path_factory.mktemp(name)
        request = LowerRequest(name, part.inputs, part.outputs, "fp32", folder)
        lowered = get_backend("onnx").lower(capture(part), request)
        folders.append(("onnx", folder))
        artifacts.append(
            Artifact(
                backend="onnx",
                component=name,
                path=f"components/onnx/{lowered.file}",
                precision="fp32",
                bytes=(folder / lowered.file).stat().st_size,
                delegation=lowered.delegation,
                executed=True,
            )
        )
    sampler = tiny.config.sampler
    tables = {steps: sampler.table(steps) for steps in sampler.times}
    manifest = Manifest(
        name="tiny",
        task="text-to-image",
        student_sha256=tiny.fingerprint,
        target="linux-x86",
        target_sha256="0" * 64,
        options={"steps": "2"},
        tool_versions={"edgegen": "0"},
        components={name: ComponentIO(inputs=p.inputs, outputs=p.outputs) for name, p in tiny.components.items()},
        artifacts=tuple(artifacts),
        backends=("coreml", "onnx"),
        declined={"coreml": "not asked for"},
        sampler=SamplerTable(config=sampler, default_steps=sampler.default_steps, tables=tables),
        latent=tiny.config.latent,
        noise=NoiseSpec(),
        tokenizer="tokenizer/tokenizer.json",
        example_prompts=tiny.config.example_prompts,
        gates=Gates(sqnr_db={"fp32": 60.0}, picture_psnr_db={"fp32": 45.0}, sensitivity_tolerance=0.02),
        files={},
    )
    return BundleContents(
        manifest=manifest,
        artifacts=folders,
        files={"tokenizer/tokenizer.json": tiny.tokenizer_json},
        reports={"parity.json": {"sqnr_db": float("inf")}, "onnx.log": "said nothing\n"},
        report_html="<!doctype html><title>tiny</title>",
    )


@pytest.fixture
def tiny_bundle(tiny_contents, tmp_path):
    """A bundle of the tiny student of one's own, to break."""
    from edgegen.bundle.write import write_bundle

    return write_bundle(tmp_path / "tiny", tiny_contents)


@pytest.fixture(scope="session")
def film():
    """A student that starts from a picture and makes a video, with a scalar beside it."""
    from tests.film import student

    return student()
