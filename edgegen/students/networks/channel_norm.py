"""Norms over the channels of a picture [B, C, H, W], where it lies: no transposition there and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def channel_rms_norm(x: Tensor, eps: float = 1e-8) -> Tensor:
    """RMSNorm without weights over C (Zhang & Sennrich 2019, arXiv 1910.07467), as diffusers' video autoencoders have
    it."""
    return x * torch.rsqrt(x.pow(2).mean(dim=1, keepdim=True) + eps)


class ChannelLayerNorm(nn.Module):
    """LayerNorm over C with weight and bias [C]."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=1, keepdim=True)
        normed = centred * torch.rsqrt(centred.pow(2).mean(dim=1, keepdim=True) + self.eps)
        return normed * self.weight[:, None, None] + self.bias[:, None, None]
