"""A folder written by diffusers and transformers themselves draws the same here as there."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from edgegen.errors import EdgegenError
from edgegen.students.load import load
from edgegen.students.networks.unet import UNet
from edgegen.students.schedulers import FlowSpacing, sampler_from
from edgegen.students.shapes.family import WEIGHTS
from edgegen.students.student import Component, Student

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

spec = importlib.util.spec_from_file_location(
    "diffusers_configs", Path(__file__).parents[1] / "attacks/diffusers_configs.py"
)
configs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(configs)

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def plain(shapes):
    """The demo student without its two coordinate channels, which a diffusers folder has no words for."""
    part = shapes.components["denoiser"]
    denoiser = UNet(part.module.config.model_copy(update={"coordinates": False})).eval().requires_grad_(False)
    weights = part.module.state_dict()
    weights["conv_in.weight"] = weights["conv_in.weight"][:, :4].clone()
    denoiser.load_state_dict(weights)
    component = Component(part.name, denoiser, part.inputs, part.outputs)
    return Student(shapes.config, {**shapes.components, "denoiser": component}, shapes.tokenizer_json)


@pytest.fixture(scope="module")
def theirs(plain):
    """diffusers' and transformers' own networks, with the weights of that student in them."""
    state = {name: component.module.state_dict() for name, component in plain.components.items()}
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**configs.TEXT))
    wanted = text.state_dict()
    own = {key if key in wanted else key.removeprefix("text_model."): v for key, v in state["text_encoder"].items()}
    missing, unexpected = text.load_state_dict(own, strict=False)
    assert not unexpected
    assert all(key.endswith("position_ids") for key in missing)
    unet = diffusers.UNet2DConditionModel(**configs.UNET)
    unet.load_state_dict(state["denoiser"])
    vae = diffusers.AutoencoderTiny(**configs.VAE)
    vae.decoder.load_state_dict(state["decoder"])
    return {"text_encoder": text.eval(), "unet": unet.eval(), "vae": vae.eval()}


@pytest.fixture(scope="module")
def saved(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers") / "Tiny Shapes"
    for name, module in theirs.items():
        module.save_pretrained(folder / name, safe_serialization=True)
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    (folder / "tokenizer").mkdir()
    shutil.copy(WEIGHTS.with_name("tokenizer.json"), folder / "tokenizer/tokenizer.json")
    (folder / "model_index.json").write_text(json.dumps(configs.INDEX))
    return folder


@pytest.fixture(scope="module")
def student(saved):
    return load(saved)


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder):
    with pytest.raises(EdgegenError) as caught:
        load(folder)
    assert caught.value.hint
    return caught.value


@torch.no_grad()
def test_networks_agree_with_diffusers(student, theirs):
    generator = torch.Generator().manual_seed(1)
    ids = student.tokenize(["a small red circle left of a large blue square"])
    context = student.components["text_encoder"].module(ids)
    torch.testing.assert_close(context, theirs["text_encoder"](ids.long())[0], atol=TOLERANCE, rtol=0)
    latent = torch.randn(1, 4, 16, 16, generator=generator)
    for timestep in (999.0, 500.0, 1.0):
        moment = torch.tensor([timestep])
        found = student.components["denoiser"].module(latent, moment, context)
        wanted = theirs["unet"](latent, moment, context).sample
        assert wanted.std() > 10 * TOLERANCE, "an output without contrast would agree with anything"
        torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)
    picture = student.components["decoder"].module(3 * latent)
    torch.testing.assert_close(picture, theirs["vae"].decode(3 * latent).sample, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_the_shipped_denoiser_is_diffusers_own_unet_with_coordinates_beside_the_latent(shapes):
    ours = shapes.components["denoiser"].module
    unet = diffusers.UNet2DConditionModel(**{**configs.UNET, "in_channels": 6}).eval()
    unet.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(1)
    latent, context = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 16, 128, generator=generator)
    wanted = unet(torch.cat([latent, ours.coordinates], dim=1), torch.tensor([750.0]), context).sample
    assert wanted.std() > 10 * TOLERANCE
    torch.testing.assert_close(ours(latent, torch.tensor([750.0]), context), wanted, atol=TOLERANCE, rtol=0)


def test_the_folder_is_the_student_that_was_saved(student, plain):
    assert student.config.name == "tiny-shapes"
    for name, component in plain.components.items():
        found = student.components[name]
        assert found.inputs == component.inputs
        assert found.outputs == component.outputs
        for key, tensor in component.module.state_dict().items():
            assert torch.equal(found.module.state_dict()[key], tensor)


def test_no_diffusers_import_is_needed(saved):
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from edgegen.students.load import load; load(Path(sys.argv[1]));"
        "sys.exit(any(m.partition('.')[0] in ('diffusers', 'transformers') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(saved)], check=False).returncode == 0


@pytest.mark.parametrize("prefixed", [True, False])
def test_text_encoder_names_of_both_generations(folder, student, prefixed):
    from safetensors.torch import load_file, save_file

    path = folder / "text_encoder/model.safetensors"
    tensors = {key.removeprefix("text_model."): value for key, value in load_file(path).items()}
    save_file({f"text_model.{key}" if prefixed else key: value for key, value in tensors.items()}, path)
    assert load(folder).components["text_encoder"].fingerprint == student.components["text_encoder"].fingerprint


def test_shards_and_linear_projections(folder, student):
    from safetensors.torch import load_file, save_file

    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for key, value in tensors.items():
        if key.endswith(("proj_in.weight", "proj_out.weight")):
            tensors[key] = value.flatten(1).clone()
    edit(folder / "unet/config.json", use_linear_projection=True)
    names = sorted(tensors)
    halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for shard, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, folder / "unet" / shard)
    path.unlink()
    weight_map = {key: shard for shard, keys in halves.items() for key in keys}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert load(folder).components["denoiser"].fingerprint == student.components["denoiser"].fingerprint


@pytest.mark.parametrize("kept", [0, 1000])
def test_a_damaged_file_is_told_from_its_namesakes(folder, kept):
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(EdgegenError, match=r"weights of `vae`: .*(empty|cut off|holds)") as caught:
        load(folder)
    assert "sha256" in caught.value.hint


def test_a_view_of_the_hub_cache_is_contained(folder, student, tmp_path):
    """In the cache, a snapshot is a folder of links to blobs beside it."""
    cache = tmp_path / "models--someone--shapes"
    snapshot = cache / "snapshots" / "Tiny Shapes"
    (cache / "blobs").mkdir(parents=True)
    for index, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        path.rename(cache / "blobs" / str(index))
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(cache / "blobs" / str(index))
    assert load(snapshot).fingerprint == student.fingerprint


def test_a_tokenizer_without_padding_is_given_the_pipelines(folder, student):
    path = folder / "tokenizer/tokenizer.json"
    edit(path, padding=None, truncation=None)
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    prompts = ["a red circle", "a " * 50]
    assert torch.equal(load(folder).tokenize(prompts), student.tokenize(prompts))


def test_a_missing_tokenizer_is_told_how_to_be_made(folder):
    (folder / "tokenizer/tokenizer.json").unlink()
    assert "merges.txt" in refusal(folder).hint


@pytest.mark.parametrize(
    ("file", "change", "key"),
    [
        ("unet", {"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block"),
        ("unet", {"transformer_layers_per_block": 2}, "transformer_blocks.1"),
        ("unet", {"layers_per_block": 100000}, "layers_per_block"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("unet", {"addition_embed_type": "image"}, "addition_embed_type"),
        ("unet", {"act_fn": "os.system"}, "os.system"),
        ("unet", {"down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"]}, "down_block_types"),
        ("unet", {"up_block_types": ["UpBlock2D", "UpBlock2D", "UpBlock2D"]}, "up_block_types"),
        ("unet", {"a_new_setting": 1}, "a_new_setting"),
        ("unet", {"block_out_channels": [32, 96, 128]}, "conv_in"),
        ("vae", {"act_fn": "os.system"}, "act_fn"),
        ("vae", {"decoder_block_out_channels": [48, 48, 64]}, "decoder"),
        ("vae", {"upsampling_scaling_factor": 4}, "upsampling_scaling_factor"),
        ("vae", {"scaling_factor": 0}, "scaling_factor"),
        ("text_encoder", {"hidden_act": "relu"}, "hidden_act"),
        ("text_encoder", {"layer_norm_eps": 1e-6}, "layer_norm_eps"),
        ("text_encoder", {"hidden_size": "128"}, "hidden_size"),
    ],
)
def test_what_cannot_be_represented_is_named(folder, file, change, key):
    edit(folder / file / "config.json", **change)
    assert key in refusal(folder).message


@torch.no_grad()
@pytest.mark.parametrize(
    ("file", "change", "component", "architecture"),
    [
        ("unet", {"flip_sin_to_cos": False}, "denoiser", "diffusers_unet"),
        ("unet", {"norm_eps": 0.1}, "denoiser", "diffusers_unet"),
        ("unet", {"attention_head_dim": [4, 8, 16]}, "denoiser", "diffusers_unet"),
        ("vae", {"act_fn": "silu"}, "decoder", "diffusers_decoder"),
    ],
)
def test_what_our_own_networks_have_not_is_diffusers_class(folder, theirs, file, change, component, architecture):
    edit(folder / file / "config.json", **change)
    read = load(folder)
    assert read.config.components[component].architecture == architecture
    kind = diffusers.UNet2DConditionModel if file == "unet" else diffusers.AutoencoderTiny
    wanted = kind(**{**(configs.UNET if file == "unet" else configs.VAE), **change}).eval()
    wanted.load_state_dict(theirs[file].state_dict())
    latent, context = torch.randn(1, 4, 16, 16), torch.randn(1, 16, 128)
    if file == "unet":
        found = read.components["denoiser"].module(latent, torch.tensor([500.0]), context)
        truth, before = (one(latent, torch.tensor([500.0]), context).sample for one in (wanted, theirs["unet"]))
    else:
        found = read.components["decoder"].module(latent)
        truth, before = (one.decode(latent).sample for one in (wanted, theirs["vae"]))
    torch.testing.assert_close(found, truth, atol=TOLERANCE, rtol=0)
    assert (truth - before).abs().max() > 10 * TOLERANCE, "a setting that changes nothing proves nothing"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"vae": ["diffusers", "AutoencoderOobleck"]}, "AutoencoderOobleck"),
        ({"unet": ["os", "system"]}, "system"),
        ({"_class_name": "FluxPipeline"}, "FluxPipeline"),
        ({"text_encoder_2": ["transformers", "T5EncoderModel"]}, "T5EncoderModel"),
    ],
)
def test_classes_outside_the_list_are_named(folder, change, found):
    edit(folder / "model_index.json", **change)
    assert found in refusal(folder).message


def test_a_safety_checker_is_left_out_aloud(folder, caplog):
    edit(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    load(folder)
    assert "safety_checker" in caplog.text


# Samplers

VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def sample_theirs(scheduler, steps, model):
    """diffusers' own loop, with `model` for a network."""
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    generator = torch.Generator().manual_seed(7)
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        noisy = (diffusers.LCMScheduler, diffusers.EulerAncestralDiscreteScheduler)
        extra = {"generator": generator} if isinstance(scheduler, noisy) else {}
        extra |= {"eta": 0.0} if isinstance(scheduler, diffusers.TCDScheduler) else {}
        x = scheduler.step(model(given, float(t)), t, x, **extra).prev_sample
    return x


def sample_ours(table, model):
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    for step in table:
        prediction = model(step.input_scale * x, step.timestep)
        x = step.sample * x + step.prediction * prediction
        if step.noise:
            x = x + step.noise * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x


def network(x, t):
    return torch.tanh(x * 0.7 + x.flip(-1) * 0.2) + t / 2000


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(**VP, clip_sample=False, timestep_spacing="trailing"),
        diffusers.DDIMScheduler(**VP, clip_sample=False, steps_offset=1, set_alpha_to_one=False),
        diffusers.DDIMScheduler(**VP, clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing"),
        diffusers.DDIMScheduler(clip_sample=False, prediction_type="sample"),
        diffusers.LCMScheduler(),
        diffusers.LCMScheduler(prediction_type="v_prediction", original_inference_steps=100),
        diffusers.EulerDiscreteScheduler(**VP, timestep_spacing="trailing"),
        diffusers.EulerDiscreteScheduler(**VP, timestep_spacing="leading", steps_offset=1),
        diffusers.EulerDiscreteScheduler(**VP, timestep_spacing="linspace", prediction_type="v_prediction"),
        diffusers.EulerDiscreteScheduler(**VP, timestep_spacing="trailing", prediction_type="sample"),
        diffusers.EulerAncestralDiscreteScheduler(**VP, timestep_spacing="trailing"),
        diffusers.EulerAncestralDiscreteScheduler(**VP, timestep_spacing="leading", steps_offset=1),
        diffusers.TCDScheduler(**VP),
        diffusers.DEISMultistepScheduler(**VP),
        diffusers.DEISMultistepScheduler(**VP, solver_order=1),
        diffusers.DEISMultistepScheduler(**VP, solver_order=1, timestep_spacing="leading", steps_offset=1),
        diffusers.DEISMultistepScheduler(**VP, timestep_spacing="trailing", prediction_type="v_prediction"),
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
    ids=lambda s: type(s).__name__,
)
def test_samplers_agree_with_diffusers(scheduler):
    config = json.loads(scheduler.to_json_string())
    sampler = sampler_from(config, "scheduler_config.json")
    for steps in sampler.times:
        wanted = sample_theirs(scheduler, steps, network)
        found = sample_ours(sampler.table(steps), network)
        assert wanted.std() > 0.1
        torch.testing.assert_close(found, wanted.double(), atol=2e-3, rtol=2e-4)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_scm_is_what_the_sana_sprint_pipeline_does(steps):
    """Its pipeline turns latents, time and prediction around the scheduler, and ends at the denoised latent."""
    scheduler = diffusers.SCMScheduler(sigma_data=0.5)
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents, generator = start * 0.5, torch.Generator().manual_seed(7)
    for t in scheduler.timesteps[:-1]:
        time = torch.sin(t) / (torch.cos(t) + torch.sin(t))
        size = torch.sqrt(time**2 + (1 - time) ** 2)
        given = latents / 0.5 * size
        said = network(given, 1000 * float(time))
        said = ((1 - 2 * time) * given + (1 - 2 * time + 2 * time**2) * said) / size * 0.5
        latents, denoised = scheduler.step(said, t, latents, generator=generator, return_dict=False)
    sampler = sampler_from(json.loads(scheduler.to_json_string()), "scheduler_config.json")
    x, generator = start, torch.Generator().manual_seed(7)
    for step in sampler.table(steps):
        x = step.sample * x + step.prediction * network(step.input_scale * x, 1000 * step.timestep)
        x = x + step.noise * torch.randn(x.shape, generator=generator)
    torch.testing.assert_close(x, denoised / 0.5, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_shift_that_depends_on_the_size_is_folded(kind):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    config = json.loads(scheduler.to_json_string())
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (1024 - 256)
    for even in (False, True):
        sampler = sampler_from(config, "scheduler_config.json", FlowSpacing(even, 1024))
        for steps, times in sampler.times.items():
            given = {"sigmas": [1 - i / steps for i in range(steps)]} if even else {"num_inference_steps": steps}
            scheduler.set_timesteps(**given, mu=mu)
            torch.testing.assert_close(torch.tensor(times), scheduler.sigmas[:-1], atol=1e-6, rtol=1e-5)


def test_few_steps_that_start_late_are_said(caplog):
    config = {"_class_name": "EulerDiscreteScheduler", **VP}
    sampler_from({**config, "timestep_spacing": "trailing"}, "scheduler_config.json")
    assert not caplog.records
    sampler_from({**config, "timestep_spacing": "leading", "steps_offset": 1}, "scheduler_config.json")
    assert "751 of 1000" in caplog.text and "trailing" in caplog.text


def test_sdxs_ends_at_the_first_alpha_bar():
    """x0 = 14.642586 x - 14.579274 eps for SDXS's single DEIS step, not the naive 14.648814 / 14.614641."""
    config = {"_class_name": "DEISMultistepScheduler", **VP}
    (step,) = sampler_from(config, "scheduler_config.json").table(1)
    assert step.timestep == 999
    assert step.sample == pytest.approx(14.642586, rel=1e-5)
    assert step.prediction == pytest.approx(-14.579274, rel=1e-5)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"_class_name": "DDIMScheduler"}, "clip_sample"),
        ({"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "sigma_min"}, "final_sigmas_type"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"_class_name": "EulerAncestralDiscreteScheduler", "prediction_type": "sample"}, "sample"),
        ({"_class_name": "EulerDiscreteScheduler", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"_class_name": "DDIMScheduler", "clip_sample": False, "timestep_spacing": "linspace"}, "linspace"),
        ({"_class_name": "DDIMScheduler", "clip_sample": False, "beta_schedule": "squaredcos_cap_v2"}, "fit"),
        ({"_class_name": "DDIMScheduler", "clip_sample": False, "num_train_timesteps": "many"}, "many"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "DPMSolverMultistepScheduler"),
        ({"_class_name": "UniPCMultistepScheduler"}, "UniPCMultistepScheduler"),
        ({}, "None"),
    ],
)
def test_samplers_that_a_table_cannot_follow_are_refused(config, key):
    with pytest.raises(EdgegenError) as caught:
        sampler_from(config, "scheduler_config.json")
    assert key in caught.value.message
    assert caught.value.hint
