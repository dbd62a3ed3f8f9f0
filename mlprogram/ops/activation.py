"""Activation functions."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mlprogram.kernel import Accumulate, arithmetic
from mlprogram.sums import total


@arithmetic("clamped_relu")
def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * x).clamp(max=beta)


@arithmetic("elu")
def elu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(x))


@arithmetic("gelu")
def gelu(x: Tensor, mode: Literal["EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"] = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    if mode == "TANH_APPROXIMATION":
        return F.gelu(x, approximate="tanh")
    # Not torch's own, which makes not-a-number of infinity.
    return 0.5 * x * (1.0 + torch.erf(x * math.sqrt(0.5)))


@arithmetic("leaky_relu")
def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * x)


@arithmetic("linear_activation")
def linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * x + beta


@arithmetic("prelu")
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x > 0, x, _channels(alpha, x) * x)


@arithmetic("relu")
def relu(x: Tensor) -> Tensor:
    return x.relu()


@arithmetic("relu6")
def relu6(x: Tensor) -> Tensor:
    return x.clamp(0.0, 6.0)


@arithmetic("scaled_tanh")
def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * torch.tanh(beta * x)


@arithmetic("sigmoid")
def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


@arithmetic("sigmoid_hard")
def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    return (alpha * x + beta).clamp(0.0, 1.0)


@arithmetic("silu")
def silu(x: Tensor) -> Tensor:
    return F.silu(x)


@arithmetic("softplus")
def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x.abs())) + x.relu()


@arithmetic("softplus_parametric")
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return _channels(alpha, x) * softplus(_channels(beta, x) * x)


@arithmetic("softsign")
def softsign(x: Tensor) -> Tensor:
    return x / (1.0 + x.abs())


@arithmetic("thresholded_relu")
def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= alpha, x, torch.zeros_like(x))


@arithmetic("softmax")
def softmax(x: Tensor, axis: int = -1, accumulate: Accumulate = "fp32") -> Tensor:
    if accumulate == "fp32":
        return torch.softmax(x, axis)
    powers = torch.exp(x - x.amax(axis, keepdim=True))
    return powers / total(powers, (axis,), keep_dims=True, accumulate=accumulate)


def _channels(parameter: Tensor, x: Tensor) -> Tensor:
    """One number for each channel, the second axis of `x`."""
    return parameter.view(-1, *(1 for _ in x.shape[2:]))
