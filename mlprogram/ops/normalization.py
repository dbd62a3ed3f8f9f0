"""Normalizations."""

from __future__ import annotations

import torch
from torch import Tensor

from mlprogram.kernel import Accumulate, arithmetic
from mlprogram.sums import mean, total


@arithmetic("batch_norm")
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    axes = tuple(one for one in range(x.dim()) if one != 1)
    result = (x - _place(mean, x, axes)) / torch.sqrt(_place(variance, x, axes) + epsilon)
    return _affine(result, axes, gamma, beta)


@arithmetic("instance_norm")
def instance_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
    accumulate: Accumulate = "fp32",
) -> Tensor:
    result = _standard(x, tuple(range(2, x.dim())), epsilon, accumulate)
    return _affine(result, tuple(one for one in range(x.dim()) if one != 1), gamma, beta)


@arithmetic("layer_norm")
def layer_norm(
    x: Tensor,
    axes: tuple[int, ...] | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
    accumulate: Accumulate = "fp32",
) -> Tensor:
    over = tuple(range(x.dim())) if axes is None else tuple(one % x.dim() for one in axes)
    kept = tuple(one for one in range(x.dim()) if one not in over)
    return _affine(_standard(x, over, epsilon, accumulate), kept, gamma, beta)


@arithmetic("l2_norm")
def l2_norm(x: Tensor, epsilon: float = 1e-6, accumulate: Accumulate = "fp32") -> Tensor:
    return x / torch.sqrt(total(x * x, (-3, -2, -1), keep_dims=True, accumulate=accumulate) + epsilon)


@arithmetic("local_response_norm")
def local_response_norm(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    return torch.nn.functional.local_response_norm(x, size, alpha, beta, k)


def _standard(x: Tensor, axes: tuple[int, ...], epsilon: float, accumulate: Accumulate) -> Tensor:
    centred = x - mean(x, axes, keep_dims=True, accumulate=accumulate)
    variance = mean(centred * centred, axes, keep_dims=True, accumulate=accumulate)
    return centred / torch.sqrt(variance + epsilon)


def _affine(x: Tensor, axes: tuple[int, ...], gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    """`axes` are those along which scale and offset do not vary."""
    if gamma is not None:
        x = x * _place(gamma, x, axes)
    if beta is not None:
        x = x + _place(beta, x, axes)
    return x


def _place(parameter: Tensor, x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return parameter.reshape([1 if one in axes else x.shape[one] for one in range(x.dim())])
