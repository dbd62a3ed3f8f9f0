"""Rotary position embedding over a grid, as constant tables of real numbers (Su et al. 2021, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(height: int, width: int, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines [height * width, head_dim] for tokens in row-major order.

    The first half of a head turns with the row, the second half with the column, each half in pairs (i, i + a quarter
    of the head), as `rotate` has them. `head_dim` must be a multiple of 4.
    """
    quarter = head_dim // 4
    frequencies = theta ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    rows = torch.arange(height, dtype=torch.float32)[:, None, None] * frequencies
    columns = torch.arange(width, dtype=torch.float32)[None, :, None] * frequencies
    grid = (height, width, quarter)
    turned, moved = rows.expand(grid), columns.expand(grid)
    angles = torch.cat([turned, turned, moved, moved], dim=-1).reshape(height * width, head_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn queries or keys [B, H, L, D] by the tables [L, D]."""
    quarter = x.shape[-1] // 4
    a, b, c, d = (x[..., i * quarter : (i + 1) * quarter] for i in range(4))
    return x * cosines + torch.cat([-b, a, -d, c], dim=-1) * sines
