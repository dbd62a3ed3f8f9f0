"""Depthwise-separable convolution: one within each channel, then a 1x1 one between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SeparableConv(nn.Module):
    """`rank` filters within each channel (the depthwise multiplier), then 1x1 over all that they give; the first has
    no bias."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int] = (3, 3),
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        *,
        rank: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        inner = rank * in_channels
        self.depthwise = nn.Conv2d(
            in_channels, inner, kernel_size, stride, padding, dilation, groups=in_channels, bias=False
        )
        self.pointwise = nn.Conv2d(inner, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))

    @property
    def in_channels(self) -> int:
        """What a convolution in its place would say of itself."""
        return self.depthwise.in_channels


def dense_macs(conv: nn.Conv2d) -> int:
    """Of one position of what `conv` writes."""
    return conv.weight.numel()


def separable_macs(conv: nn.Conv2d, rank: int) -> int:
    """Of one position of what would stand for `conv`."""
    return rank * conv.in_channels * (conv.kernel_size[0] * conv.kernel_size[1] + conv.out_channels)


def separable(conv: nn.Module) -> str | None:
    """Why `conv` cannot be made separable; None where it can."""
    if not isinstance(conv, nn.Conv2d) or isinstance(conv, nn.modules.conv._ConvTransposeNd):
        return "it is no two-dimensional convolution"
    if conv.groups != 1:
        return "it has groups already"
    if conv.kernel_size[0] * conv.kernel_size[1] == 1:
        return "it is 1x1 already"
    if conv.padding_mode != "zeros":
        return f"it pads by `{conv.padding_mode}`"
    return None


def separated(conv: nn.Conv2d, rank: int, *, weights: bool) -> SeparableConv:
    """What stands for `conv`; with `weights`, as near to it as `rank` filters a channel come.

    The filters that a channel has for all outputs are a matrix [outputs, taps]; its `rank` greatest singular vectors
    are the depthwise and the pointwise weights (Guo et al. 2018, network decoupling, arXiv 1808.05517). With as many
    filters as there are taps nothing is lost. ValueError for what `separable` says no to.
    """
    why = separable(conv)
    if why is not None:
        raise ValueError(why)
    device, dtype = conv.weight.device, conv.weight.dtype
    padding = conv.padding if isinstance(conv.padding, str) else (int(conv.padding[0]), int(conv.padding[1]))
    with torch.device(device):
        made = SeparableConv(
            conv.in_channels,
            conv.out_channels,
            (int(conv.kernel_size[0]), int(conv.kernel_size[1])),
            (int(conv.stride[0]), int(conv.stride[1])),
            padding,
            (int(conv.dilation[0]), int(conv.dilation[1])),
            rank=rank,
            bias=conv.bias is not None,
        ).to(dtype)
    made.train(conv.training)
    made.requires_grad_(conv.weight.requires_grad)
    if not weights:
        return made
    with torch.no_grad():
        taps = conv.weight.detach().double().permute(1, 0, 2, 3).flatten(2)  # [inputs, outputs, taps]
        outputs, values, filters = torch.linalg.svd(taps, full_matrices=False)
        few = min(rank, values.shape[1])
        root = values[:, :few].sqrt()
        within, between = torch.zeros(conv.in_channels, rank, taps.shape[2]), torch.zeros(*taps.shape[:2], rank)
        within[:, :few] = (root[:, :, None] * filters[:, :few]).float()
        between[:, :, :few] = (outputs[:, :, :few] * root[:, None]).float()
        made.depthwise.weight.copy_(within.reshape(made.depthwise.weight.shape))
        made.pointwise.weight.copy_(between.permute(1, 0, 2).reshape(made.pointwise.weight.shape))
        if conv.bias is not None and made.pointwise.bias is not None:
            made.pointwise.bias.copy_(conv.bias)
    return made
