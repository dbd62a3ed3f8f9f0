"""Networks of diffusers and transformers in a student: a class of a fixed list, and its own configuration as data.

Neither package is imported before such a network is built, and no name that a checkpoint gives is ever looked up: the
class names are literals of the config classes, and what their constructors are given is checked against the keys that
they have.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

from edgegen.errors import EdgegenError

INSTALL_HINT = "pip install 'edgegen[diffusers]'"

NOTED = {"AutoencoderTiny": ("block_out_channels", "force_upcast")}
"""What a class writes into its config beside what its constructor takes."""


def upstream_class(package: str, name: str) -> Any:
    """Class `name` of `package`, "diffusers" or "transformers"; EdgegenError where that is not installed or too old."""
    try:
        return getattr(import_module(package), name)
    except (ImportError, AttributeError) as error:
        raise EdgegenError(
            f"`{name}` is a network of {package}, which cannot give it: {error}", INSTALL_HINT
        ) from error


def constructor_arguments(made: Any, config: Mapping[str, Any], what: str) -> dict[str, Any]:
    """What the constructor of class `made` takes of `config`; EdgegenError for a setting that it does not have.

    Keys with a leading underscore are diffusers' notes to itself and are left out, as are those in `NOTED`.
    """
    known = set(inspect.signature(made.__init__).parameters) - {"self"}
    noted = NOTED.get(what, ())
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key not in noted}
    unknown = sorted(set(kept) - known)
    if unknown:
        raise EdgegenError(
            f"`{unknown[0]}` is not a setting of `{what}` in the diffusers that is installed",
            hint="pip install --upgrade diffusers",
        )
    return {key: tuple(value) if isinstance(value, list) else value for key, value in kept.items()}


class Adopting(nn.Module):
    """A module that shows the parameters of another one as its own, by the names they have there.

    So a state dict of the wrapped class is one of the wrapper, without a prefix.
    """

    network: Any

    def adopt(self, network: nn.Module) -> None:
        """Hold `network` beside the module tree: its children, parameters and buffers are this module's own."""
        self._modules = network._modules
        self._parameters = network._parameters
        self._buffers = network._buffers
        self._non_persistent_buffers_set = network._non_persistent_buffers_set
        self.__dict__["network"] = network

    def train(self, mode: bool = True) -> Adopting:
        self.__dict__["network"].train(mode)
        self.training = mode
        return self
