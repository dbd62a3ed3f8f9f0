"""Every pipeline that is read draws here what it draws in diffusers: from prompt, steps and noise the same picture."""

import json
import sys

import numpy as np
import pytest
import torch

from edgegen.build.graphs import Graphs
from edgegen.errors import EdgegenError, UnsafeError, UsageError
from edgegen.lower.backend import LowerRequest, get_backend
from edgegen.rewrite.choose import canonical_preset, shape_preset
from edgegen.rewrite.pipeline import Pipeline
from edgegen.students.load import load
from edgegen.students.sample import draw, initial_noise
from edgegen.students.source import Source

NAMES = ["sd", "lcm", "sdxl", "sd3", "sana-sprint", "pixart-alpha", "pixart-sigma", "z-image"]
PROMPTS = ["a red car on the street", "a blue house by the sea of the cat"]


@pytest.fixture(scope="session")
def students(saved):
    known = {}

    def get(name):
        if name not in known:
            known[name] = load(saved(name)[2])
        return known[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_is_diffusers_own(name, saved, students, monkeypatch):
    pipeline, call, _ = saved(name)
    student = students(name)
    assert student.config.sampler is not None
    steps, drawn = 4, []
    noisy = any(step.noise for step in student.config.sampler.table(steps))

    def fresh(shape, **_):
        drawn.append(shape)
        return initial_noise(student, [7], stream=len(drawn))

    if noisy:  # between steps: the streams of every runtime in place of torch's own
        monkeypatch.setattr(sys.modules[type(pipeline.scheduler).__module__], "randn_tensor", fresh)
    pictures = []
    for prompt in PROMPTS:
        drawn.clear()
        noise = initial_noise(student, [7])
        with torch.no_grad():
            theirs = pipeline(prompt=prompt, num_inference_steps=steps, latents=noise, output_type="pt", **call)[0]
        ours = (draw(student, [prompt], [7], steps) / 2 + 0.5).clamp(0, 1)
        assert theirs.std() > 0.01 and bool(drawn) == noisy
        torch.testing.assert_close(ours, theirs.float(), atol=2e-4, rtol=0)
        pictures.append(ours)
    assert (pictures[0] - pictures[1]).abs().max() > 1e-5, "a picture that no prompt moves would agree with any"


@pytest.mark.parametrize(("name", "scale"), [("lcm", 3.0), ("sana-sprint", 2.0)])
def test_another_guidance_is_diffusers_own(name, scale, saved, students, caplog):
    pipeline, call, folder = saved(name)
    student = Source(guidance=scale).open(folder)
    assert "told its guidance" in caplog.text
    noise = initial_noise(student, [7])
    with torch.no_grad():
        theirs = pipeline(
            prompt=PROMPTS[0],
            num_inference_steps=1,
            latents=noise,
            output_type="pt",
            **{**call, "guidance_scale": scale},
        )[0]
    ours = (draw(student, PROMPTS[:1], [7], 1) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours, theirs.float(), atol=2e-4, rtol=0)
    default = students(name)
    assert (draw(default, PROMPTS[:1], [7], 1) - 2 * ours + 1).abs().max() > 1e-4
    assert student.components["denoiser"].fingerprint != default.components["denoiser"].fingerprint


def test_a_network_that_is_told_no_guidance_takes_none(saved):
    with pytest.raises(UsageError, match="not told a guidance") as caught:
        Source(guidance=2.0).open(saved("sd")[2])
    assert "--guidance" in caught.value.hint


def test_a_missing_package_is_told_how_to_be_installed(saved, monkeypatch):
    folder = saved("sd3")[2]
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(EdgegenError, match="SD3Transformer2DModel") as caught:
        load(folder)
    assert "edgegen[diffusers]" in caught.value.hint


def test_the_decoder_of_a_large_autoencoder_is_said_to_cost(saved, caplog, monkeypatch):
    monkeypatch.setattr("edgegen.students.diffusers_folder.LARGE", 1000)
    load(saved("sd")[2])
    assert "AutoencoderTiny" in caplog.text


@pytest.mark.parametrize(
    ("name", "file", "change", "said"),
    [
        ("sd3", "model_index.json", {"text_encoder_3": ["transformers", "T5EncoderModel"]}, "text_encoder_3"),
        ("sdxl", "model_index.json", {"text_encoder": [None, None]}, "text_encoder"),
        ("sana-sprint", "model_index.json", {"text_encoder": ["transformers", "LlamaModel"]}, "LlamaModel"),
        ("sana-sprint", "transformer/config.json", {"a_new_setting": 1}, "a_new_setting"),
        ("sana-sprint", "transformer/config.json", {"num_layers": 10**9}, "num_layers"),
        ("sana-sprint", "transformer/config.json", {"qk_norm": None}, "norm_"),
        ("sd3", "transformer/config.json", {"pos_embed_max_size": 10**6}, "pos_embed_max_size"),
        ("pixart-alpha", "transformer/config.json", {"sample_size": 10**6}, "sample_size"),
        ("sana-sprint", "text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("sd", "vae/config.json", {"latents_mean": [0.1, 0.1, 0.1, 0.1]}, "latents_mean"),
        ("sd", "vae/config.json", {"block_out_channels": [8, 24]}, "decoder"),
        ("z-image", "vae/config.json", {"sample_size": 15}, "sample_size"),
        ("z-image", "transformer/config.json", {"siglip_feat_dim": 4}, "siglip_feat_dim"),
    ],
)
def test_what_has_no_place_is_named(name, file, change, said, copied, edit):
    folder = copied(name)
    edit(folder / file, **change)
    with pytest.raises(EdgegenError) as caught:
        load(folder)
    assert said in caught.value.message
    assert caught.value.hint
    if said == "text_encoder_3":
        assert "text_encoder_3=None" in caught.value.hint


@pytest.mark.parametrize("part", ["text_encoder_2/model.safetensors", "tokenizer_2/tokenizer.json", "vae/config.json"])
def test_links_out_of_the_folder_are_refused_in_every_part(part, copied, tmp_path):
    folder = copied("sdxl")
    (folder / part).rename(tmp_path / "outside")
    (folder / part).symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafeError, match="outside the folder"):
        load(folder)


def test_pickled_and_sharded_weights(copied, students):
    from safetensors.torch import load_file, save_file

    folder = copied("sd3")
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / "transformer" / shard)
    path.unlink()
    index = {"weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert load(folder).fingerprint == students("sd3").fingerprint
    for file in folder.glob("transformer/*.safetensors*"):
        file.unlink()
    torch.save(tensors, folder / "transformer/diffusion_pytorch_model.bin")
    with pytest.raises(UnsafeError, match="pickled"):
        load(folder)


def test_an_adapter_in_the_folder_is_merged_aloud(copied, students, caplog):
    from safetensors.torch import save_file

    folder, before = copied("sana-sprint"), students("sana-sprint").components["denoiser"].module.state_dict()
    module = "transformer_blocks.1.attn2.to_v"
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    factors = {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}
    save_file(factors, folder / "pytorch_lora_weights.safetensors")
    after = load(folder).components["denoiser"].module.state_dict()
    torch.testing.assert_close(after[f"{module}.weight"], before[f"{module}.weight"] + up @ down)
    assert "adapter" in caplog.text


LOWERED = [
    # One of each kind of network; a UNet and Gemma are left to whole builds, being slow to lower.
    ("sd", "decoder"),
    ("sdxl", "text_encoder"),
    ("sd3", "denoiser"),
    ("sana-sprint", "denoiser"),
    ("sana-sprint", "decoder"),
    ("pixart-alpha", "text_encoder"),
    ("pixart-alpha", "denoiser"),
    ("z-image", "text_encoder"),
    ("z-image", "denoiser"),
]


@pytest.mark.parametrize(("name", "part"), LOWERED, ids=["-".join(one) for one in LOWERED])
def test_every_kind_of_network_runs_in_onnxruntime(name, part, students, tmp_path):
    student = students(name)
    ids = student.tokenize(PROMPTS[:1])
    known = {"input_ids": ids, "latent": torch.randn(student.config.latent.shape)}
    known |= {"timestep": torch.tensor([student.config.sampler.table(4)[1].timestep])}
    if part == "denoiser":
        known |= student.components["text_encoder"].call(known)
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
        noise = (found[key] - wanted.numpy()).astype(np.float64)
        assert (noise**2).sum() < 1e-10 * (wanted.numpy().astype(np.float64) ** 2).sum()
