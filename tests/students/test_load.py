"""Good inputs come back as they were; broken ones end in an EdgegenError that says what to do."""

import json
import os
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgegen.errors import EdgegenError, UnsafeError
from edgegen.graph.capture import capture
from edgegen.students import archive
from edgegen.students.checkpoint import save_pt
from edgegen.students.load import load
from edgegen.students.shapes.family import WEIGHTS


@pytest.fixture(scope="module")
def checkpoint(shapes, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    save_pt(shapes, path)
    return path


@pytest.fixture
def folder(tmp_path):
    """`shapes.safetensors` with its config and tokenizer, free to be spoiled."""
    for name in ("shapes.safetensors", "shapes.json", "tokenizer.json"):
        shutil.copy(WEIGHTS.with_name(name), tmp_path / name)
    return tmp_path


class TwoOutputs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("table", torch.arange(4.0))
        self.constant = torch.ones(4)

    def forward(self, x, index):
        with torch.no_grad():
            y = self.linear(x)
        return self.norm(y) + self.table + self.constant, y.chunk(2, 1)[0] + index


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("exported") / "Two Outputs.pt2"
    inputs = (torch.randn(2, 4), torch.ones(2, 1, dtype=torch.int32))
    torch.export.save(torch.export.export(TwoOutputs().eval(), inputs), path)
    return path


def refused(path, error=EdgegenError):
    with pytest.raises(EdgegenError) as caught:
        load(path)
    assert type(caught.value) is error, caught.value.message
    assert caught.value.hint
    return caught.value.message


def weights(student):
    return {
        f"{name}.{key}": tensor
        for name, component in student.components.items()
        for key, tensor in component.module.state_dict().items()
    }


# What is accepted


def test_safetensors_gives_the_bytes_of_the_file(shapes):
    stored = load_file(WEIGHTS)
    found = weights(shapes)
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[key], stored[key].float()) for key in stored)
    assert not any(component.module.training for component in shapes.components.values())
    assert shapes.tokenize(["a large red circle"]).shape == (1, 16)


def test_pt_roundtrip_is_bit_equal(shapes, checkpoint):
    assert load(checkpoint).fingerprint == shapes.fingerprint


def test_save_pt_writes_the_same_bytes_twice_and_leaves_nothing_else(shapes, checkpoint, tmp_path):
    path = tmp_path / "other-name.pt"
    path.write_text("what was here before")
    save_pt(shapes, path)
    assert path.read_bytes() == checkpoint.read_bytes()
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) & 0o444


def test_save_pt_into_a_missing_folder_fails_clearly(shapes, tmp_path):
    with pytest.raises(EdgegenError, match="cannot be written"):
        save_pt(shapes, tmp_path / "missing" / "model.pt")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt2", "model.bin", "model"])
def test_pt_is_known_by_its_content(shapes, checkpoint, tmp_path, name):
    shutil.copy(checkpoint, tmp_path / name)
    assert load(tmp_path / name).fingerprint == shapes.fingerprint


def test_safetensors_is_known_by_its_content(shapes, folder):
    (folder / "shapes.safetensors").rename(folder / "shapes.pt")
    assert load(folder / "shapes.pt").fingerprint == shapes.fingerprint


def test_config_json_serves_where_no_config_has_the_name_of_the_weights(shapes, folder):
    (folder / "shapes.json").rename(folder / "config.json")
    assert load(folder / "shapes.safetensors").fingerprint == shapes.fingerprint


def test_half_precision_weights_come_up_in_fp32(folder, shapes):
    halved = {key: tensor.half() for key, tensor in load_file(WEIGHTS).items()}
    save_file(halved, folder / "shapes.safetensors")
    found = weights(load(folder / "shapes.safetensors"))
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert all(torch.equal(found[key], halved[key].float()) for key in halved)


def test_pt2_computes_what_was_exported(exported):
    student = load(exported)
    component = student.components["model"]
    assert student.config.task == "single"
    assert student.config.name == "two-outputs"
    assert [(spec.name, spec.shape, spec.dtype) for spec in component.inputs] == [
        ("x", (2, 4), "float32"),
        ("index", (2, 1), "int32"),
    ]
    inputs = component.example_inputs()
    expected = torch.export.load(exported).module()(*inputs)
    for found, wanted, spec in zip(component.module(*inputs), expected, component.outputs, strict=True):
        assert torch.equal(found, wanted)
        assert tuple(found.shape) == spec.shape


def test_pt2_can_be_captured_again(exported):
    component = load(exported).components["model"]
    inputs = component.example_inputs()
    again = capture(component).module()(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(again, component.module(*inputs), strict=True))


def test_pt2_keeps_module_paths_for_provenance(exported):
    inner = load(exported).components["model"].module.inner
    stacks = [str(node.meta.get("nn_module_stack")) for node in inner.graph.nodes if "batch_norm" in str(node.target)]
    assert stacks
    assert all("norm" in stack for stack in stacks)


def test_a_component_of_the_demo_student_travels_as_pt2(shapes, tmp_path):
    decoder = shapes.components["decoder"]
    torch.export.save(capture(decoder), tmp_path / "decoder.pt2")
    student = load(tmp_path / "decoder.pt2")
    inputs = decoder.example_inputs()
    assert torch.equal(student.components["model"].module(*inputs), decoder.module(*inputs))


def test_an_exported_program_cannot_be_packed(exported, tmp_path):
    with pytest.raises(EdgegenError, match="exported_program"):
        save_pt(load(exported), tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


# What is refused


def test_missing_path(tmp_path):
    assert "does not exist" in refused(tmp_path / "nothing.pt")


def test_empty_file(tmp_path):
    (tmp_path / "model.pt").touch()
    assert "is empty" in refused(tmp_path / "model.pt")


def test_folder_that_is_not_diffusers_names_the_file_within(folder):
    with pytest.raises(EdgegenError) as caught:
        load(folder)
    assert "shapes.safetensors" in caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(folder):
    (folder / "shapes.safetensors").chmod(0)
    assert "cannot be read" in refused(folder / "shapes.safetensors")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.pt")
    assert "neither a file nor a folder" in refused(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"GGUF" + bytes(100), "GGUF"),
        (b"\x1c\0\0\0TFL3" + bytes(100), "TFLite"),
        (b'{"a": 1}', "text file"),
        (b"PK", "truncated"),
        (bytes(range(256)), "none of the formats"),
        ((10**6).to_bytes(8, "little") + b'{"a"', "cut off"),
    ],
)
def test_other_formats_are_named(tmp_path, content, found):
    (tmp_path / "model.pt").write_bytes(content)
    assert found in refused(tmp_path / "model.pt")


def test_a_plain_state_dict_is_told_how_to_be_packed(tmp_path):
    torch.save({"linear.weight": torch.ones(2, 2)}, tmp_path / "model.pt")
    with pytest.raises(EdgegenError) as caught:
        load(tmp_path / "model.pt")
    assert caught.value.exit_code == 1
    assert "edgegen student pack" in caught.value.hint


def test_an_optimizer_checkpoint_with_numpy_inside_is_refused(tmp_path):
    import numpy as np

    torch.save({"weight": torch.ones(2), "loss": np.float64(1.0)}, tmp_path / "model.pt")
    assert "numpy" in refused(tmp_path / "model.pt", UnsafeError)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda p: p.update(version=2), "version"),
        (lambda p: p.update(config=None), "config"),
        (lambda p: p.update(tokenizer=None), "tokenizer"),
        (lambda p: p.update(tokenizer="{"), "tokenizer"),
        (lambda p: p.update(tokenizer=7), "tokenizer"),
        (lambda p: p.update(state_dicts=[]), "state_dicts"),
        (lambda p: p["state_dicts"].pop("decoder"), "decoder"),
        (lambda p: p["state_dicts"].update(other={"a": torch.ones(1)}), "other"),
        (lambda p: p["state_dicts"]["decoder"].popitem(), "missing"),
        (lambda p: p["state_dicts"]["decoder"].update(extra=torch.ones(1)), "unknown"),
        (lambda p: p["state_dicts"]["decoder"].update({"layers.0.bias": torch.ones(3)}), "expected"),
        (lambda p: p["state_dicts"]["decoder"].update({"layers.0.bias": torch.full((48,), float("nan"))}), "NaN"),
        (lambda p: p["state_dicts"]["decoder"].update({"layers.0.bias": torch.full((48,), float("inf"))}), "NaN"),
        (lambda p: p["state_dicts"]["decoder"].update({"layers.0.bias": torch.ones(48, dtype=torch.int8)}), "int8"),
        (lambda p: p["state_dicts"]["decoder"].update({"layers.0.bias": "text"}), "plain dense tensor"),
        (lambda p: p["config"].update(extra=1), "extra"),
        (lambda p: p["config"]["sampler"].update(num_train_timesteps=10**12), "sampler"),
        (lambda p: p["config"]["sampler"].update(default_steps=3), "default_steps"),
        (lambda p: p["config"]["components"]["denoiser"]["config"].update(norm_num_groups=7), "cannot be built"),
        (lambda p: p["config"]["components"]["denoiser"]["config"].update(layers_per_block=10**9), "only"),
        (lambda p: p["config"]["components"]["text_encoder"]["config"].update(num_hidden_layers=10**9), "only"),
        (lambda p: p["config"]["components"]["decoder"]["config"].update(num_blocks=[10**9]), "only"),
        (lambda p: p["config"]["components"]["decoder"]["config"].update(width=10**9), "cannot be built"),
        (lambda p: p["config"]["components"]["decoder"]["config"].update(width=10**4), "expected"),
        (lambda p: p["config"]["components"]["decoder"].update(architecture="os.system"), "os.system"),
        (lambda p: p["config"]["components"]["decoder"]["outputs"][0].update(shape=[1, 3, 8, 8]), "gives"),
        (lambda p: p["config"]["components"]["decoder"]["inputs"][0].update(shape=[1, 3, 16, 16]), "not the latent"),
        (lambda p: p["config"]["components"].pop("decoder"), "components"),
    ],
)
def test_a_checkpoint_that_does_not_fit_itself(checkpoint, tmp_path, change, found):
    payload = torch.load(checkpoint, weights_only=True)
    change(payload)
    torch.save(payload, tmp_path / "model.pt")
    assert found in refused(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[1]", "object"),
        (b"\xff\xfe", "JSON"),
        (b'{"name": NaN}', "NaN"),
        (b'{"a":' * 100_000, "JSON"),
        (b'{"name": "x"}', "config"),
    ],
)
def test_bad_config_json(folder, content, found):
    (folder / "shapes.json").write_bytes(content)
    assert found in refused(folder / "shapes.safetensors")


def test_safetensors_without_config_says_where_it_belongs(folder):
    (folder / "shapes.json").unlink()
    assert "config.json" in refused(folder / "shapes.safetensors")


def test_safetensors_without_tokenizer_says_how_to_make_one(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(EdgegenError) as caught:
        load(folder / "shapes.safetensors")
    assert "merges.txt" in caught.value.hint


def test_a_tokenizer_of_another_length_is_refused(folder):
    document = json.loads((folder / "tokenizer.json").read_text())
    document["padding"] = None
    (folder / "tokenizer.json").write_text(json.dumps(document))
    assert "ids where the text encoder takes 16" in refused(folder / "shapes.safetensors")


def test_truncated_safetensors(folder):
    os.truncate(folder / "shapes.safetensors", 1_000_000)
    assert "bytes of weights" in refused(folder / "shapes.safetensors")


def test_a_model_larger_than_memory_is_refused_before_it_is_read(tmp_path):
    """The weights are a hole in the file, four times what this machine has free: reading them would end the test."""
    free = archive.available_memory()
    if free is None:
        pytest.skip("this system does not say how much memory is free")
    count = free
    header = {"decoder.w": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    try:
        os.truncate(path, 8 + len(text) + 4 * count)
    except OSError:
        pytest.skip("this file system does not hold sparse files of that size")
    shutil.copy(WEIGHTS.with_name("shapes.json"), tmp_path / "model.json")
    assert "GiB free" in refused(path)


def test_a_checkpoint_larger_than_memory_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(archive, "available_memory", lambda: 1 << 20)
    assert "GiB free" in refused(checkpoint)


def test_pt2_with_dynamic_shapes_is_refused(tmp_path):
    batch = torch.export.Dim("batch", min=2, max=8)
    program = torch.export.export(torch.nn.Linear(4, 4), (torch.ones(2, 4),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    assert "dynamic" in refused(tmp_path / "model.pt2")


def test_pt2_with_int64_inputs_is_refused(tmp_path):
    class Shift(torch.nn.Module):
        def forward(self, x):
            return x + 1

    torch.export.save(torch.export.export(Shift(), (torch.ones(2, dtype=torch.int64),)), tmp_path / "model.pt2")
    assert "int64" in refused(tmp_path / "model.pt2")


def test_pt2_with_nan_weights_is_refused(tmp_path):
    module = torch.nn.Linear(4, 4)
    torch.nn.init.constant_(module.bias, float("nan"))
    torch.export.save(torch.export.export(module, (torch.ones(2, 4),)), tmp_path / "model.pt2")
    assert "NaN" in refused(tmp_path / "model.pt2")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("lora_unet_conv_in.lora_down.weight", "lora_unet_conv_in.alpha"), "--lora "),
        (("model.diffusion_model.out.2.bias", "first_stage_model.x"), "StableDiffusionPipeline.from_single_file('"),
        (("model.diffusion_model.out.2.bias", "conditioner.embedders.1.x"), "StableDiffusionXLPipeline"),
        (("conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight"), "unet/diffusion_pytorch_model"),
        (("anything.weight",), "shapes.json"),
    ],
)
def test_what_is_published_without_a_config_is_told_how_it_becomes_a_student(tmp_path, names, said):
    save_file({name: torch.ones(1) for name in names}, tmp_path / "m.safetensors")
    with pytest.raises(EdgegenError, match="has no config") as caught:
        load(tmp_path / "m.safetensors")
    assert said in caught.value.hint
