"""A folder whose student makes a picture larger: the picture is diffusers' own, and what has no place is named."""

import pytest
import torch

from edgegen.build.graphs import Graphs
from edgegen.errors import EdgegenError
from edgegen.lower.backend import LowerRequest, get_backend
from edgegen.rewrite.choose import canonical_preset, shape_preset
from edgegen.rewrite.pipeline import Pipeline
from edgegen.students.load import load
from edgegen.students.networks.diffusers_decoder import nearest_codes
from edgegen.students.sample import draw, initial_noise

NAMES = ["example picture 1", "example picture 2"]


@pytest.fixture(scope="module")
def student(saved):
    return load(saved("super-resolution")[2])


@pytest.mark.parametrize("steps", [1, 4])
def test_the_picture_is_diffusers_own(steps, saved, student, monkeypatch):
    from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion_superresolution as upstream

    pipeline, _, _ = saved("super-resolution")
    noise = initial_noise(student, [7])
    monkeypatch.setattr(upstream, "randn_tensor", lambda *args, **more: noise.clone())
    pictures = []
    for name in NAMES:
        theirs = pipeline(image=student.given([name]), num_inference_steps=steps, output_type="pt").images
        ours = (draw(student, [name], [7], steps) / 2 + 0.5).clamp(0, 1)
        assert ours.shape == (1, 3, 16, 16) and theirs.std() > 0.01
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
        pictures.append(ours)
    assert (pictures[0] - pictures[1]).abs().max() > 1e-3, "a result that no picture moves would agree with any"


def test_the_picture_is_read_once(student):
    assert student.config.task == "image-to-image" and student.tokenizer_json is None
    assert list(student.components) == ["image_encoder", "denoiser", "decoder"]
    assert [spec.name for spec in student.components["denoiser"].inputs] == ["latent", "timestep", "features"]
    assert student.components["image_encoder"].outputs[0].shape == (1, 16, 8, 8)


def test_the_nearest_code_is_taken_everywhere():
    latent, codes = torch.randn(1, 3, 5, 4), torch.randn(9, 3)
    flat = latent.permute(0, 2, 3, 1).reshape(-1, 3)
    wanted = codes[torch.cdist(flat, codes).argmin(dim=1)].reshape(1, 5, 4, 3).permute(0, 3, 1, 2)
    assert torch.equal(nearest_codes(latent, codes), wanted)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("unet/config.json", {"in_channels": 7}, "in_channels"),
        ("unet/config.json", {"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "SkipDownBlock2D"),
        ("unet/config.json", {"num_class_embeds": 10}, "num_class_embeds"),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block"),
        ("unet/config.json", {"sample_size": None}, "sample_size"),
        ("vqvae/config.json", {"norm_type": "spatial"}, "norm_type"),
        ("vqvae/config.json", {"num_vq_embeddings": 33}, "quantize.embedding.weight"),
        ("scheduler/scheduler_config.json", {"_class_name": "EulerDiscreteScheduler"}, "scales"),
        ("model_index.json", {"vqvae": ["diffusers", "AutoencoderKL"]}, "AutoencoderKL"),
        ("model_index.json", {"unet": [None, None]}, "unet"),
    ],
)
def test_what_has_no_place_is_named(file, change, said, copied, edit):
    folder = copied("super-resolution")
    edit(folder / file, **change)
    with pytest.raises(EdgegenError) as caught:
        load(folder)
    assert said in caught.value.message and caught.value.hint


@pytest.mark.parametrize("part", ["image_encoder", "denoiser", "decoder"])
def test_every_network_runs_in_onnxruntime(part, student, tmp_path):
    known = {"image": student.given(NAMES[:1]), "latent": initial_noise(student, [1])}
    known |= {"timestep": torch.tensor([student.config.sampler.table(4)[1].timestep])}
    known |= student.components["image_encoder"].call(known)
    component = student.components[part]
    graph = Graphs().shaped(component, Pipeline(canonical_preset(part, ())), Pipeline(shape_preset("onnx")))
    inputs, outputs = graph.signature.inputs, graph.signature.outputs
    backend = get_backend("onnx")
    made = backend.lower(
        graph.program, LowerRequest(part, inputs=inputs, outputs=outputs, precision="fp32", out_dir=tmp_path)
    )
    found = backend.load(tmp_path / made.file, inputs, outputs)(
        {spec.name: known[spec.name].numpy() for spec in inputs}
    )
    for key, wanted in component.call(known).items():
        torch.testing.assert_close(torch.from_numpy(found[key]), wanted, atol=1e-4, rtol=1e-4)
