"""What goes into and comes out of a component: the same names, shapes and dtypes in every backend and in the
manifest."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class TensorSpec(BaseModel):
    """A named tensor of static shape. fp16 artifacts keep float32 at their boundary."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float32", "int32"] = "float32"
