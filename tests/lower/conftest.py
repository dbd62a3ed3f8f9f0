"""The shipped student's components with inputs of its own trajectory, and the checks that every backend must pass."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest


class Lowering:
    """`parts`, `inputs` and `expected` by component; the checks take a backend and what it made."""

    def __init__(self, student):
        import torch

        self.parts = parts = student.components
        ids = student.tokenize(["a small red circle left of a large blue square"])
        latent = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            context = parts["text_encoder"].module(ids)
            prediction = parts["denoiser"].module(latent, torch.tensor([1000.0]), context)
            given = {
                "text_encoder": {"input_ids": ids},
                "denoiser": {
                    "latent": latent - 0.25 * prediction,
                    "timestep": torch.tensor([750.0]),
                    "context": context,
                },
                "decoder": {"latent": latent - prediction},
            }
            self.expected = {name: parts[name].module(*values.values()).numpy() for name, values in given.items()}
        self.inputs = {name: {key: value.numpy() for key, value in values.items()} for name, values in given.items()}

    @staticmethod
    def sqnr(reference, value):
        """Signal to noise in dB, in float64."""
        reference, value = reference.astype(np.float64), value.astype(np.float64)
        return 10 * np.log10((reference**2).sum() / max(((reference - value) ** 2).sum(), 1e-30))

    @staticmethod
    def request(part, precision, folder, **changes):
        from edgegen.lower.backend import LowerRequest

        fields = {"inputs": part.inputs, "outputs": part.outputs, "precision": precision, "out_dir": folder}
        return LowerRequest(part.name, **(fields | changes))

    def lower(self, backend, folder, name, precision):
        from edgegen.graph.capture import capture
        from edgegen.rewrite.to_half import ToHalf

        program = capture(self.parts[name])
        if backend.half == "graph" and precision == "fp16":
            program = ToHalf()(program).program
        result = backend.lower(program, self.request(self.parts[name], precision, folder))
        return SimpleNamespace(path=folder / result.file, result=result, program=program)

    def load(self, backend, path, name, **changes):
        specs = {"inputs": self.parts[name].inputs, "outputs": self.parts[name].outputs} | changes
        return backend.load(path, specs["inputs"], specs["outputs"])

    def run(self, backend, path, name):
        executable = self.load(backend, path, name)
        try:
            return executable(self.inputs[name])
        finally:
            executable.close()

    def check_parity(self, backend, path, name, floor):
        (spec,) = self.parts[name].outputs
        values = self.run(backend, path, name)
        assert list(values) == [spec.name]
        assert values[spec.name].dtype == np.float32 and values[spec.name].shape == spec.shape
        assert self.sqnr(self.expected[name], values[spec.name]) >= floor

    def check_wrong_calls(self, backend, path):
        from edgegen.errors import EdgegenError

        good = self.inputs["denoiser"]
        executable = self.load(backend, path, "denoiser")
        for call, message in (
            ({k: v for k, v in good.items() if k != "timestep"}, "without its input `timestep`"),
            (good | {"prompt": good["latent"]}, "no input `prompt`"),
            (good | {"latent": good["latent"][:, :3]}, r"`latent` .* float32\[1, 3, 16, 16\]"),
            (good | {"latent": good["latent"].astype(np.float64)}, r"`latent` .* float64"),
        ):
            with pytest.raises(EdgegenError, match=message):
                executable(call)
        executable.close()
        with pytest.raises(EdgegenError, match="closed"):
            executable(good)

    def check_damage(self, backend, path, name, folder):
        from edgegen.errors import EdgegenError

        content, broken = path.read_bytes(), folder / path.name
        for size in (0, 40, len(content) // 2, int(0.99 * len(content))):
            broken.write_bytes(content[:size])
            with pytest.raises(EdgegenError, match=path.name):
                self.load(backend, broken, name)
        broken.unlink()
        with pytest.raises(EdgegenError, match=path.name):
            self.load(backend, broken, name)

    def check_foreign_specs(self, backend, path):
        from edgegen.errors import EdgegenError

        part = self.parts["decoder"]
        resized = (part.outputs[0].model_copy(update={"shape": (1, 3, 32, 32)}),)
        integer = (part.inputs[0].model_copy(update={"dtype": "int32"}),)
        with pytest.raises(EdgegenError, match=r"`image` .* expected float32\[1, 3, 32, 32\]"):
            self.load(backend, path, "decoder", outputs=resized)
        with pytest.raises(EdgegenError, match=r"`latent` .* expected int32"):
            self.load(backend, path, "decoder", inputs=integer)

    def check_same_bytes(self, backend, first, name, precision, folder):
        before = first.program.graph_module.code
        result = backend.lower(first.program, self.request(self.parts[name], precision, folder))
        assert (folder / result.file).read_bytes() == first.path.read_bytes()
        assert first.program.graph_module.code == before

    def check_no_paths(self, path):
        import edgegen

        content, home = path.read_bytes(), Path(edgegen.__file__).parents[1]
        assert str(home).encode() not in content
        assert b"stack_trace" not in content and b"clip_text.py" not in content and b"unet.py" not in content

    def check_names_component(self, backend, folder):
        """A product that is not what the specs say must fail, and the message must say of which component."""
        from edgegen.errors import EdgegenError
        from edgegen.graph.capture import capture

        part = self.parts["decoder"]
        wrong = (part.outputs[0].model_copy(update={"shape": (1, 3, 32, 32)}),)
        with pytest.raises(EdgegenError, match="decoder"):
            backend.lower(capture(part), self.request(part, "fp32", folder, outputs=wrong))


@pytest.fixture(scope="session")
def lowering():
    import torch
    from safetensors.torch import load_file

    from edgegen.students import student
    from edgegen.students.config import StudentConfig

    folder = Path(student.__file__).parent / "shapes" / "weights"
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(folder / "shapes.safetensors").items():
        name, _, rest = key.partition(".")
        state.setdefault(name, {})[rest] = value
    config = StudentConfig.model_validate_json((folder / "shapes.json").read_text())
    return Lowering(student.assemble(config, state, (folder / "tokenizer.json").read_text()))


@pytest.fixture(scope="session")
def every_op():
    """A network with every kind of op that a plan may name."""
    sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path: their neighbours have to be findable
    from every_op import EveryOp

    return EveryOp()
