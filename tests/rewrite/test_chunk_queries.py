"""Attention in parts of the queries."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgegen.errors import EdgegenError
from edgegen.rewrite.chunk_queries import ChunkQueries, chunks

ATTENTION = "aten.scaled_dot_product_attention"
ROW = 2 * 4 * 4  # bytes of one query's scores: two heads, four keys, fp32


class Attend(nn.Module):
    def __init__(self, mask=None, causal=False, dropout=0.0):
        super().__init__()
        self.register_buffer("mask", mask)
        self.causal, self.dropout = causal, dropout

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, self.mask, self.dropout, self.causal)


@pytest.fixture
def heads():
    torch.manual_seed(0)
    return torch.randn(1, 2, 6, 3), torch.randn(1, 2, 4, 3), torch.randn(1, 2, 4, 5)


@pytest.mark.parametrize(("rows", "parts"), [(1, 6), (2, 3), (4, 2), (5, 2)])
def test_every_part_fits(check_pass, heads, rows, parts):
    before, after = {ATTENTION: 1}, {ATTENTION: parts, "aten.slice": parts, "aten.cat": 1}
    check_pass(ChunkQueries(rows * ROW), Attend(), *heads, before=before, after=after)


def test_scores_that_fit_stay(check_pass, heads):
    assert not check_pass(ChunkQueries(6 * ROW), Attend(), *heads, modified=False).declined


@pytest.mark.parametrize("mask", [torch.randn(6, 4), torch.randn(1, 1, 1, 4), torch.randn(1, 2, 6, 4)])
def test_masks_are_cut_where_they_have_a_row_for_each_query(check_pass, heads, mask):
    slices = 4 if mask.dim() > 1 and mask.shape[-2] == 6 else 2
    check_pass(ChunkQueries(3 * ROW), Attend(mask), *heads, after={ATTENTION: 2, "aten.slice": slices})


def test_causal_parts_know_their_place(check_pass):
    q = torch.randn(1, 2, 4, 3)
    check_pass(ChunkQueries(2 * ROW), Attend(causal=True), q, q, q, after={ATTENTION: 2})


class Grouped(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True)


def test_keyword_arguments_go_with_every_part(check_pass, heads):
    q, k, v = heads
    check_pass(ChunkQueries(3 * ROW), Grouped(), q, k[:, :1], v[:, :1], after={ATTENTION: 2})


def test_declines(check_pass, heads):
    q, k, v = heads
    one = check_pass(ChunkQueries(ROW - 1), Attend(), q[:, :, :1], k, v, modified=False)
    assert "one query alone" in one.declined[0].reason
    with pytest.raises(EdgegenError, match="positive"):
        ChunkQueries(0)(torch.export.export(Attend(), heads))


class Drops(Attend):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5) * 0


def test_an_attention_that_drops_out_stays(check_pass, heads):
    assert "drops" in check_pass(ChunkQueries(ROW), Drops(), *heads, modified=False).declined[0].reason


def test_parts_are_even():
    assert chunks(10, 1, 4) == [(0, 3), (3, 6), (6, 10)]
    assert chunks(10, 1, None) == chunks(10, 1, 10) == [(0, 10)]
    assert chunks(3, 8, 1) == [(0, 1), (1, 2), (2, 3)]
