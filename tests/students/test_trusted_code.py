"""Networks of the user's own: run when asked for by name, then a graph like any other."""

import json

import numpy as np
import pytest
import torch

from edgegen.cli.main import main
from edgegen.errors import EdgegenError, UsageError
from edgegen.graph.capture import capture
from edgegen.students.load import load
from edgegen.students.source import Source, unavailable

CODE = '''
import torch
from torch import nn


class Upscaler(nn.Module):
    """One-step super-resolution."""

    def __init__(self, width=8):
        super().__init__()
        self.body = nn.Conv2d(3, width, 3, padding=1)
        self.tail = nn.Conv2d(width, 12, 3, padding=1)

    def forward(self, image):
        return nn.functional.pixel_shuffle(self.tail(torch.relu(self.body(image))), 2)


class Vocoder(nn.Module):
    """Mel spectrogram -> waveform, in one call."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose1d(10, 4, 8, stride=4, padding=2)
        self.out = nn.Conv1d(4, 1, 7, padding=3)
        self.example_inputs = {"mel": torch.zeros(1, 10, 6)}

    def forward(self, mel):
        return {"waveform": torch.tanh(self.out(nn.functional.leaky_relu(self.up(mel), 0.1)))}


class Generator(nn.Module):
    """Noise and a class in, a picture out."""

    def __init__(self):
        super().__init__()
        self.label = nn.Embedding(5, 6)
        self.body = nn.Linear(12, 48)
        self.norm = nn.BatchNorm1d(48)

    def forward(self, noise, label):
        return self.norm(self.body(torch.cat([noise, self.label(label)], dim=-1))).reshape(-1, 3, 4, 4)


class Policy(nn.Module):
    """What a robot sees and feels -> what it does, and how sure it is."""

    def __init__(self):
        super().__init__()
        self.see, self.feel, self.act = nn.Conv2d(3, 4, 4, stride=4), nn.Linear(7, 16), nn.Linear(32, 14)

    def forward(self, camera, joints):
        h = torch.cat([self.see(camera).flatten(1), self.feel(joints)], dim=-1)
        actions, sure = self.act(h).split([13, 1], dim=-1)
        return actions, (sure > 0)


def upscaler(config=None):
    return Upscaler(**(config or {}))


def broken():
    raise ValueError("no such width")


def generator():
    return Generator()


def nothing():
    return 3
'''


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with the user's module in it, as the current one."""
    import uuid

    name = f"mine_{uuid.uuid4().hex[:8]}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return name


def module_of(name, kind):
    import importlib.util

    spec = importlib.util.spec_from_file_location("users", f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    torch.manual_seed(0)
    return getattr(found, kind)().eval()


CASES = {
    "Upscaler": ({"image": (np.float32, (1, 3, 6, 6))}, [("output", (1, 3, 12, 12), "float32")]),
    "Vocoder": ({"mel": (np.float32, (1, 10, 6))}, [("waveform", (1, 1, 24), "float32")]),
    "Generator": (
        {"noise": (np.float64, (1, 6)), "label": (np.int64, (1,))},
        [("output", (1, 3, 4, 4), "float32")],
    ),
    "Policy": (
        {"joints": (np.float32, (1, 7)), "camera": (np.float32, (1, 3, 8, 8))},
        [("output_0", (1, 13), "float32"), ("output_1", (1, 1), "int32")],
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_module_becomes_a_student_with_its_own_names(home, tmp_path, kind):
    shapes, outputs = CASES[kind]
    module = module_of(home, kind)
    torch.save(module.state_dict(), "weights.pt")
    rng = np.random.default_rng(0)
    arrays = {
        key: rng.integers(0, 5, shape).astype(dtype)
        if np.issubdtype(dtype, np.integer)
        else rng.normal(size=shape).astype(dtype)
        for key, (dtype, shape) in shapes.items()
    }
    np.savez("inputs.npz", **arrays)
    student = Source(arch=f"{home}:{kind}", inputs=tmp_path / "inputs.npz").open(tmp_path / "weights.pt")
    (part,) = student.components.values()
    assert [(spec.name, spec.shape, spec.dtype) for spec in part.outputs] == outputs
    assert {spec.name for spec in part.inputs} == set(shapes)
    assert len(student.fingerprint) == 64, "a batch norm's count is a tensor without dimensions"
    given = {key: torch.from_numpy(value) for key, value in arrays.items()}
    wanted = module(**{key: value.float() if value.is_floating_point() else value for key, value in given.items()})
    wanted = wanted.values() if isinstance(wanted, dict) else wanted if isinstance(wanted, tuple) else [wanted]
    ready = {spec.name: value for spec, value in zip(part.inputs, part.example_inputs(), strict=True)}
    program = capture(part).module()
    for found in (part.call(ready).values(), program(*ready.values())):
        found = [found] if isinstance(found, torch.Tensor) else found
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a.float(), b.float(), atol=1e-6, rtol=1e-5)
    said = " ".join(unavailable(student))
    assert "no trajectory" in said
    assert "the 1 given" in said


def test_other_code_with_the_same_weights_is_another_student(home, tmp_path):
    torch.save(module_of(home, "Vocoder").state_dict(), "weights.pt")
    first = Source(arch=f"{home}:Vocoder").open(tmp_path / "weights.pt")
    (tmp_path / f"{home}_b.py").write_text(CODE.replace("0.1)", "0.3)"))
    second = Source(arch=f"{home}_b:Vocoder").open(tmp_path / "weights.pt")
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize(
    ("arch", "kind", "said"),
    [
        ("{home}:broken", EdgegenError, "ValueError: no such width.*line"),
        ("{home}:nothing", EdgegenError, "'int'"),
        ("{home}:absent", UsageError, "absent"),
        ("no_such_module_here:f", UsageError, "no_such_module_here"),
        ("os.path.join", UsageError, "package.module:factory|not the name"),
        ("{home}:upscaler", UsageError, "what the module"),
        ("{home}:Vocoder", EdgegenError, "does not fit"),
    ],
)
def test_what_goes_wrong_in_the_users_code_is_said(home, tmp_path, arch, kind, said):
    torch.save({"body.weight": torch.zeros(3)}, "weights.pt")
    if arch.endswith("upscaler"):
        torch.save(module_of(home, "Upscaler").state_dict(), "weights.pt")
    with pytest.raises(kind, match=said) as caught:
        Source(arch=arch.format(home=home)).open(tmp_path / "weights.pt")
    assert caught.value.hint


def test_only_the_option_runs_code_and_the_path_is_as_it_was(home, tmp_path, caplog):
    import sys

    torch.save(module_of(home, "Vocoder").state_dict(), "weights.pt")
    before = list(sys.path)
    Source(arch=f"{home}:Vocoder").open(tmp_path / "weights.pt")
    assert sys.path == before
    assert "your own code" in caplog.text


def test_a_factory_is_given_its_json(home, tmp_path):
    module = module_of(home, "Upscaler").__class__(16)
    torch.save(module.state_dict(), "weights.pt")
    (tmp_path / "arch.json").write_text(json.dumps({"width": 16}))
    np.savez("inputs.npz", image=np.zeros((1, 3, 4, 4), np.float32))
    how = Source(arch=f"{home}:upscaler", arch_config=tmp_path / "arch.json", inputs=tmp_path / "inputs.npz")
    assert how.open(tmp_path / "weights.pt").components["model"].outputs[0].shape == (1, 3, 8, 8)


@pytest.fixture
def packed(home, tmp_path, caplog):
    """A `.pt2` written by `student pack --arch`, with a file of three samples for it."""
    torch.save(module_of(home, "Upscaler").state_dict(), "weights.pt")
    rng = np.random.default_rng(0)
    np.savez("one.npz", image=rng.normal(size=(1, 3, 6, 6)).astype(np.float32))
    np.savez("three.npz", image=rng.normal(size=(3, 1, 3, 6, 6)).astype(np.float32))
    argv = ["student", "pack", "weights.pt", "--arch", f"{home}:Upscaler", "--inputs", "one.npz", "-o", "up.pt2"]
    assert main(argv) == 0
    assert "your own code" in caplog.text
    return tmp_path / "up.pt2"


def test_a_pack_needs_the_code_no_more(packed, home, tmp_path):
    module = module_of(home, "Upscaler")
    (tmp_path / f"{home}.py").unlink()
    student = Source(inputs=tmp_path / "three.npz").open(packed)
    part = student.components["model"]
    assert len(part.samples()) == 3
    (image,) = part.samples()[2]
    (found,) = part.call({"image": image}).values()
    torch.testing.assert_close(found, module(image))
    assert load(packed).fingerprint != student.fingerprint


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"picture": np.zeros((1, 3, 6, 6), np.float32)}, "picture"),
        ({"image": np.zeros((1, 3, 6, 7), np.float32)}, "shape"),
        ({"image": np.zeros((1, 3, 6, 6), np.int64)}, "int64"),
        ({"image": np.full((1, 3, 6, 6), np.nan, np.float32)}, "NaN"),
        ({"image": np.array([object()])}, "cannot be read"),
    ],
)
def test_inputs_that_do_not_fit_are_named(packed, tmp_path, arrays, said):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(EdgegenError, match=said):
        Source(inputs=tmp_path / "bad.npz").open(packed)


def test_build_measures_on_the_given_inputs_and_says_what_is_not_there(packed, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("EDGEGEN_CACHE_DIR", str(tmp_path / "cache"))
    argv = ["build", str(packed), "--target", "linux-x86", "--backend", "onnx", "--inputs", "three.npz", "-o", "bundle"]
    assert main(argv) == 0
    assert "no trajectory: calibration and verification use the 3 given" in capfd.readouterr().err
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    assert len(manifest["component_fixtures"]) == 3
    kept = np.load(tmp_path / "bundle" / manifest["component_fixtures"][1]["inputs"]["image"])
    assert np.array_equal(kept, np.load("three.npz")["image"][1])


def test_a_student_that_draws_takes_no_inputs(shapes, tmp_path):
    from edgegen.students.given_inputs import with_inputs

    with pytest.raises(UsageError, match="prompts"):
        with_inputs(shapes, {"latent": np.zeros(3)}, "inputs.npz")


COMPONENTS = '''
import json
from pathlib import Path

from edgegen.students.architectures import build_module


def parts():
    """Networks that someone else might have written."""
    described = json.loads(Path("shapes.json").read_text())["components"]
    return {name: build_module(part["architecture"], part["config"]) for name, part in described.items()}
'''


def test_a_dict_of_components_draws(shapes, home, tmp_path):
    import shutil

    from edgegen.students.sample import draw
    from edgegen.students.shapes.family import WEIGHTS

    for name in ("shapes.safetensors", "shapes.json", "tokenizer.json"):
        shutil.copy(WEIGHTS.with_name(name), tmp_path / name)
    (tmp_path / f"{home}.py").write_text(COMPONENTS)
    student = Source(arch=f"{home}:parts").open(tmp_path / "shapes.safetensors")
    assert {part.architecture for part in student.config.components.values()} == {"exported_program"}
    prompts = ["a small red circle"]
    torch.testing.assert_close(draw(student, prompts, [3], 1), draw(shapes, prompts, [3], 1), atol=1e-5, rtol=0)
    assert unavailable(student) == ()
