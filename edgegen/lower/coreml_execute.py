"""A `.mlpackage` that runs: by Core ML, on macOS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgegen.errors import EdgegenError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import Array
from edgegen.lower.signature import check_call, reason


class CoreMLExecutable:
    """A model loaded by Core ML (macOS): named arrays in, named arrays out."""

    def __init__(self, model: Any, what: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self._model = model
        self._what = what
        self._inputs = inputs
        self._outputs = outputs

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._model is None:
            raise EdgegenError(f"{self._what} is closed")
        check_call(self._what, inputs, self._inputs)
        try:
            values = self._model.predict(dict(inputs))
        except Exception as error:
            raise EdgegenError(f"{self._what} failed while it ran: {reason(error)}") from error
        return {spec.name: np.asarray(values[spec.name], dtype=spec.dtype) for spec in self._outputs}

    def close(self) -> None:
        self._model = None
