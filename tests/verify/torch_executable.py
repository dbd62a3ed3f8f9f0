"""The reference itself behind the Executable interface, and the ways in which an artifact can be wrong."""

import numpy as np
import torch


class TorchExecutable:
    """A component run by torch as an artifact would be: named arrays in, named arrays out."""

    def __init__(self, component, tamper=None):
        self.component = component
        self.tamper = tamper
        self.closed = False

    def __call__(self, inputs):
        given = [torch.from_numpy(np.array(inputs[spec.name])) for spec in self.component.inputs]
        with torch.no_grad():
            out = self.component.module.eval()(*given)
        parts = (out,) if isinstance(out, torch.Tensor) else out
        named = {spec.name: part.numpy() for spec, part in zip(self.component.outputs, parts, strict=True)}
        return self.tamper(named) if self.tamper else named

    def close(self):
        self.closed = True


class Prepared:
    """Changes what goes in before the wrapped executable sees it."""

    def __init__(self, inner, change):
        self.inner = inner
        self.change = change

    def __call__(self, inputs):
        return self.inner(self.change(dict(inputs)))

    def close(self):
        self.inner.close()


def torch_executables(student):
    return {name: TorchExecutable(part) for name, part in student.components.items()}
