"""A network of the user's own, from `--arch` to what it gives, with the command line as people type it."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from edgegen.bundle.call import Network
from edgegen.bundle.open import open_bundle
from edgegen.bundle.write import write_bundle
from edgegen.cli.main import main
from edgegen.errors import UsageError

CODE = """
import torch
from torch import nn


class Upscaler(nn.Module):
    def __init__(self):
        super().__init__()
        self.tail = nn.Conv2d(3, 12, 3, padding=1)
        self.example_inputs = {"image": torch.rand(1, 3, 8, 10)}

    def forward(self, image):
        more = nn.functional.interpolate(image, scale_factor=2.0, mode="nearest")
        return more + 0.1 * nn.functional.pixel_shuffle(self.tail(image), 2)


class Batch(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 3, 4)

    def forward(self, noise):
        return self.up(noise[:, :, None, None])


def branch():
    class Branch(nn.Module):
        def forward(self, noise):
            return noise if noise.sum() > 0 else -noise
    return Branch()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_upscaler.py").write_text(CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield folder
    sys.modules.pop("own_upscaler", None)


@pytest.fixture(scope="module")
def bundle(build_cache, home):
    import own_upscaler

    torch.manual_seed(0)
    torch.save(own_upscaler.Upscaler().state_dict(), home / "weights.pt")
    argv = ["build", "weights.pt", "--arch", "own_upscaler:Upscaler", "--target", "linux-x86", "--backend", "onnx"]
    assert main([*argv, "-o", "bundle", "-q"]) == 0
    return home / "bundle"


@pytest.fixture(scope="module")
def network(bundle, home):
    import own_upscaler

    module = own_upscaler.Upscaler().eval()
    module.load_state_dict(torch.load(home / "weights.pt", weights_only=True))
    return module


@pytest.mark.parametrize(("pixels", "scale"), [("0..1", 255.0), ("0..255", 1.0)])
def test_a_picture_in_and_a_larger_one_out(pixels, scale, bundle, network, tmp_path, capsys):
    given = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    Image.fromarray(given).save(tmp_path / "small.png")
    argv = ["run", str(bundle), "--image", str(tmp_path / "small.png"), "--pixels", pixels]
    assert main([*argv, "-o", str(tmp_path / "large.png")]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'large.png'}\n" and "1 call of `onnx`" in said.err
    made = network(torch.from_numpy(given).permute(2, 0, 1)[None].float() / scale)[0].permute(1, 2, 0).detach() * scale
    expected = made.round().clamp(0, 255).numpy()
    found = np.asarray(Image.open(tmp_path / "large.png")).astype(np.float32)
    assert found.shape == (16, 20, 3) and np.abs(found - expected).max() <= 1


def test_arrays_in_and_arrays_out(bundle, network, tmp_path, capsys):
    several = np.random.default_rng(1).random((3, 1, 3, 8, 10), dtype=np.float32)
    for name, array in (("several", several), ("one", several[0])):
        np.savez(tmp_path / f"{name}.npz", image=array)
        argv = ["run", str(bundle), "--inputs", str(tmp_path / f"{name}.npz"), "-o", str(tmp_path / f"{name}-out.npz")]
        assert main([*argv, "--json", "-q"]) == 0
        (output,) = json.loads(capsys.readouterr().out)["outputs"]
        (found,) = np.load(tmp_path / f"{name}-out.npz").values()
        wanted = np.stack([network(torch.from_numpy(sample)).detach().numpy() for sample in several])
        np.testing.assert_allclose(found, wanted if name == "several" else wanted[0], atol=1e-5)
        assert output == open_bundle(bundle).manifest.components["model"].outputs[0].name


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--prompt", "a cat"], "single network"),
        (["--inputs", "one.npz", "--image", "a.png"], "exclude each other"),
        (["--inputs", "other.npz"], "takes `image`"),
        (["--inputs", "nan.npz"], "NaN"),
        (["--inputs", "one.npz", "-o", "out.png"], ".npz"),
        (["--inputs", "one.npz", "-o", "taken.npz"], "not overwritten"),
        (["--image", "one.npz.png"], "does not exist"),
        (["--image", "one.npz.png", "-o", "out.npz"], ".png"),
        ([], "is needed"),
    ],
)
def test_what_cannot_be_asked_is_told(asked, said, bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture = np.zeros((1, 3, 8, 10), np.float32)
    np.savez("one.npz", image=picture)
    np.savez("other.npz", picture=picture)
    np.savez("nan.npz", image=picture + np.nan)
    (tmp_path / "taken.npz").write_text("no archive")
    assert main(["run", str(bundle), *asked]) == 2
    caught = capsys.readouterr()
    assert said in caught.err and "hint:" in caught.err and caught.out == ""


def test_a_student_that_draws_is_no_single_network(tiny_contents, tmp_path):
    with pytest.raises(UsageError, match="makes its inputs itself"):
        Network(open_bundle(write_bundle(tmp_path / "tiny", tiny_contents)))


def test_hints_of_networks_that_cannot_be_taken(home, tmp_path, monkeypatch, capsys):
    import own_upscaler

    torch.save(own_upscaler.Batch().state_dict(), "batch.pt")
    torch.save({}, "branch.pt")
    np.savez("noise.npz", noise=np.zeros((3, 1, 4), np.float32))
    for name, factory, hint in (("batch", "Batch", "example_inputs"), ("branch", "branch", "torch.where")):
        argv = ["inspect", f"{name}.pt", "--arch", f"own_upscaler:{factory}", "--inputs", "noise.npz"]
        assert main(argv) == 1
        assert hint in capsys.readouterr().err


def test_a_recurrent_network_is_unrolled_for_core_ml(home, build_cache, capsys):
    (home / "own_policy.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Policy(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.cells = nn.ModuleList([nn.GRU(4, 6, batch_first=True), nn.LSTM(6, 5, batch_first=True)])\n"
        "        self.example_inputs = {'seen': torch.randn(1, 3, 4)}\n"
        "    def forward(self, seen):\n"
        "        return self.cells[1](self.cells[0](seen)[0])[0]\n"
    )
    import own_policy

    torch.save(own_policy.Policy().state_dict(), "policy.pt")
    argv = ["build", "policy.pt", "--arch", "own_policy:Policy", "--target", "iphone15", "-o", "policy"]
    assert main([*argv, "--backend", "coreml"]) == 0
    capsys.readouterr()
