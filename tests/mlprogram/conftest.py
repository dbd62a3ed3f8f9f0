"""Packages for the evaluator: programs of single operations, and networks that coremltools converted."""

from types import SimpleNamespace

import numpy as np
import pytest

from mlprogram import Program


def sqnr(reference, value):
    """Signal to noise in dB, in float64."""
    reference, value = np.asarray(reference, np.float64), np.asarray(value, np.float64)
    return 10 * np.log10((reference**2).sum() / max(((reference - value) ** 2).sum(), 1e-30))


class Packages:
    """Makes packages below one folder."""

    sqnr = staticmethod(sqnr)

    def __init__(self, folder):
        self.folder = folder
        self.made = 0

    def path(self):
        self.made += 1
        return self.folder / f"made{self.made}.mlpackage"

    def operations(self, build, inputs, target="iOS18"):
        """A program whose values are those that `build(mb, placeholders)` returns by name, as they were built."""
        import coremltools as ct
        from coremltools.converters.mil.mil import Builder as mb
        from coremltools.converters.mil.mil import Function, types
        from coremltools.converters.mil.mil import Program as MilProgram

        kinds = {np.float32: types.fp32, np.float16: types.fp16, np.int32: types.int32}
        program = MilProgram()
        holders = {name: mb.placeholder(array.shape, dtype=kinds[array.dtype.type]) for name, array in inputs.items()}
        with Function(holders, opset_version=ct.target[target]) as function:
            # An identity each: an output may not be an input or a constant.
            results = {name: mb.identity(x=value, name=name) for name, value in build(mb, function.inputs).items()}
            function.set_outputs(list(results.values()))
        program.add_function("main", function)
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target[target],
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )
        path = self.path()
        model.save(str(path))
        return path

    def convert(self, module, arguments, precision="fp32", target="iOS17", change=None):
        """A converted torch module: path, `given` by name, `expected` (torch, fp32) by name."""
        import coremltools as ct
        import torch

        with torch.no_grad():
            program = torch.export.export(module.eval(), arguments).run_decompositions({})
            expected = module(*arguments)
        expected = expected if isinstance(expected, tuple) else (expected,)
        model = ct.convert(
            program,
            minimum_deployment_target=ct.target[target],
            compute_precision=ct.precision.FLOAT16 if precision == "fp16" else ct.precision.FLOAT32,
            outputs=[ct.TensorType(name=f"y{at}", dtype=np.float32) for at in range(len(expected))],
            skip_model_load=True,
        )
        if change is not None:
            model = change(model)
        path = self.path()
        model.save(str(path))
        spec = model.get_spec()
        given = {}
        for feature, argument in zip(spec.description.input, arguments, strict=True):
            kind = np.int32 if argument.dtype in (torch.int64, torch.int32) else np.float32
            given[feature.name] = argument.numpy().astype(kind)
        return SimpleNamespace(
            path=path, given=given, expected={f"y{at}": one.numpy() for at, one in enumerate(expected)}, model=model
        )

    def score(self, made, **options):
        """The worst SQNR of a converted module's outputs, run by the evaluator."""
        found = Program.open(made.path, **options)(made.given)
        assert set(found) == set(made.expected)
        return min(sqnr(made.expected[name], found[name]) for name in found)


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    pytest.importorskip("coremltools")
    return Packages(tmp_path_factory.mktemp("packages"))
