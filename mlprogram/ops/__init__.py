"""Operations of ML Programs, a file for each family; importing this package fills the table of `mlprogram.kernel`.

Semantics are those of the operation's documentation in coremltools (`converters/mil/mil/ops/defs`), with its
`value_inference` where the documentation leaves something open. What neither says is refused, not guessed.
"""

from mlprogram.ops import (
    activation,
    attention,
    compressed,
    convolution,
    elementwise,
    gathering,
    layout,
    matrix,
    normalization,
    pooling,
    quantization,
    reduction,
    resizing,
    tensors,
)

__all__ = [
    "activation",
    "attention",
    "compressed",
    "convolution",
    "elementwise",
    "gathering",
    "layout",
    "matrix",
    "normalization",
    "pooling",
    "quantization",
    "reduction",
    "resizing",
    "tensors",
]
