"""What the Triton kernels of window_attention share: the check of the windows, and tiles of their tokens.

Alphabet: ``i_`` ids, ``o_`` offsets, ``m_`` masks, ``p_`` pointers, ``b_`` blocks. Offsets into tensors are int64
before the first multiply. Where a pointer may be None, the kernel is compiled without what it is for.

Tokens of a window stand in a tile either as its members come (so few tokens make a small tile) or by place (so the
tiles of all windows lie on top of each other, for dbias). The *spot* of a token at row r and column c is r * (2 * ww -
1) + c: the difference of two spots, counted from the centre of the table of biases, is where the bias of the pair is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsify_kernels._floats_triton import INTERPRETED, narrowed, widened
from sparsify_kernels.window_attention.reference import SMALLEST_NORM, WRAP_PENALTY

__all__ = [
    "check_windows",
    "direction",
    "dot_products",
    "enter_windows",
    "fill_nan",
    "load_bias",
    "load_members",
    "load_places",
    "load_rows",
    "logits",
    "operand",
    "products_of_rows",
    "spot",
    "store_rows",
    "through_direction",
]

PENALTY = tl.constexpr(WRAP_PENALTY)
SMALLEST = tl.constexpr(SMALLEST_NORM)
LARGEST_INVERSE = tl.constexpr(1 / SMALLEST_NORM)


@triton.jit
def enter_windows(
    p_member, p_start, p_place, p_region, p_seen, p_cell, p_part, p_bad, tokens, places,
    BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """seen[member[i]] = i and cell[w, place[i]] = i for the members i of window w, and bad = 0; program (w).

    Neither table was cleared. Where two members write to one element, one of them does not find itself there again.
    part[i], fp32, is the region of member i as a small number: how many members stand before the first of its region.
    """
    i_w = tl.program_id(0).to(tl.int64)
    if i_w == 0:
        tl.store(p_bad, 0)
    begin, end = tl.load(p_start + i_w), tl.load(p_start + i_w + 1)
    fits = (begin >= 0) & (end <= tokens) & (end - begin <= places)
    for first in range(begin, tl.where(fits, end, begin), BLOCK):
        o_member = first + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
        m_member = o_member < end
        b_row = tl.load(p_member + o_member, mask=m_member, other=-1)
        tl.store(p_seen + b_row, o_member, mask=(b_row >= 0) & (b_row < tokens))
        b_place = tl.load(p_place + o_member, mask=m_member, other=-1)
        tl.store(p_cell + i_w * places + b_place, o_member, mask=(b_place >= 0) & (b_place < places))
        if p_region is not None:
            b_region = tl.load(p_region + o_member, mask=m_member, other=0)
            b_part = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
            for other in range(begin, end, OTHERS):
                o_other = other + tl.arange(0, OTHERS).to(tl.int64)  # [OTHERS]
                b_other = tl.load(p_region + o_other, mask=o_other < end, other=0)
                m_same = (b_region[:, None] == b_other[None, :]) & (o_other < end)[None, :]
                b_first = tl.where(m_same, (o_other - begin).to(tl.int32)[None, :], 0x7FFFFFFF)
                b_part = tl.minimum(b_part, tl.min(b_first, 1))
            tl.store(p_part + o_member, b_part.to(tl.float32), mask=m_member)


@triton.jit
def check_windows(p_member, p_start, p_place, p_seen, p_cell, p_bad, tokens, windows, places, BLOCK: tl.constexpr):
    """bad = 1 if the windows are no partition of the tokens, or a place is taken twice or does not exist; program (w).

    As many members as tokens, each of which finds itself: each token is a member once. All that is written is 1.
    """
    i_w = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(p_start + i_w), tl.load(p_start + i_w + 1)
    fits = (begin >= 0) & (begin <= end) & (end <= tokens) & (end - begin <= places)
    good = fits & ((i_w > 0) | (begin == 0)) & ((i_w < windows - 1) | (end == tokens))
    bad = (good == 0).to(tl.int32)
    for first in range(begin, tl.where(fits, end, begin), BLOCK):
        o_member = first + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
        m_member = o_member < end
        b_row = tl.load(p_member + o_member, mask=m_member, other=-1)
        b_place = tl.load(p_place + o_member, mask=m_member, other=-1)
        m_good = (b_row >= 0) & (b_row < tokens) & (b_place >= 0) & (b_place < places)
        m_good = m_good & (tl.load(p_seen + b_row, mask=m_good, other=-1) == o_member)
        m_good = m_good & (tl.load(p_cell + i_w * places + b_place, mask=m_good, other=-1) == o_member)
        bad = tl.maximum(bad, tl.max((m_member & (m_good == 0)).to(tl.int32), 0))
    if bad > 0:
        tl.store(p_bad, 1)


@triton.jit
def fill_nan(p_x, size, BLOCK: tl.constexpr):
    """This program's share of ``size`` elements becomes NaN."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, size, tl.num_programs(0).to(tl.int64) * BLOCK):
        o_x = start + tl.arange(0, BLOCK).to(tl.int64)
        b_nan = narrowed(tl.full([BLOCK], float("nan"), tl.float32), p_x.dtype.element_ty)
        tl.store(p_x + o_x, b_nan, mask=o_x < size)


@triton.jit
def spot(b_place, width):
    b_place = b_place.to(tl.int32)
    return b_place // width * (2 * width - 1) + b_place % width


@triton.jit
def load_members(p_member, p_place, p_part, begin, count, o_member, width):
    """Row, spot and part of members ``o_member`` of a window with some; beyond the last, of it: nothing to mask."""
    o_member = begin + tl.minimum(o_member, count - 1)
    b_row = tl.load(p_member + o_member)
    b_spot = spot(tl.load(p_place + o_member), width)
    b_part = b_spot
    if p_part is not None:
        b_part = tl.load(p_part + o_member)
    return b_row, b_spot, b_part


@triton.jit
def load_places(p_cell, p_member, p_place, p_part, i_w, begin, end, o_place, places):
    """Row and part of the tokens at ``o_place`` of a window with some, and where there is one; elsewhere, of others.

    A cell that no member wrote holds anything: the member it is taken for stands elsewhere.
    """
    o_cell = tl.load(p_cell + i_w * places + tl.minimum(o_place, places - 1))
    o_member = tl.minimum(tl.maximum(o_cell, begin), end - 1)
    b_part = o_member
    if p_part is not None:
        b_part = tl.load(p_part + o_member)
    return tl.load(p_member + o_member), b_part, tl.load(p_place + o_member) == o_place


@triton.jit
def _inside(m_row, columns: tl.constexpr, BLOCK: tl.constexpr):
    m_tile = m_row[:, None]
    if columns < BLOCK:
        m_tile = m_tile & (tl.arange(0, BLOCK) < columns)[None, :]
    return m_tile


@triton.jit
def load_rows(p_x, b_row, m_row, row, column, columns: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``b_row`` of a matrix with strides ``row`` and ``column``, ``columns`` <= BLOCK wide, zeros beyond it and
    where not ``m_row``: [rows, BLOCK]."""
    o_column = tl.arange(0, BLOCK).to(tl.int64)
    p_tile = p_x + b_row[:, None] * row + o_column[None, :] * column
    b_x = tl.load(p_tile, mask=_inside(m_row, columns, BLOCK), other=0.0)
    return widened(b_x) if INTERPRETED else b_x


@triton.jit
def store_rows(p_x, b_x, b_row, m_row, row, columns: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of ``load_rows``, elements of a row next to each other."""
    o_column = tl.arange(0, BLOCK).to(tl.int64)
    p_tile = p_x + b_row[:, None] * row + o_column[None, :]
    tl.store(p_tile, narrowed(b_x, p_x.dtype.element_ty), mask=_inside(m_row, columns, BLOCK))


@triton.jit
def operand(b_x, like):
    """``b_x`` in the dtype of ``like``, to be multiplied with it."""
    return b_x.to(like.dtype)


@triton.jit
def _squared_lengths(b_x):
    b_x = b_x.to(tl.float32)
    return tl.sum(b_x * b_x, 1)


@triton.jit
def _inverse(b_squared):
    return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(b_squared), SMALLEST))


@triton.jit
def _inverse_lengths(b_x):
    return _inverse(_squared_lengths(b_x))


@triton.jit
def dot_products(b_q, b_k, COSINE: tl.constexpr, PRECISION: tl.constexpr):
    """q . k, with COSINE of their directions. Divided afterwards: a direction in half precision would be rounded."""
    b_dots = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if COSINE:
        b_dots = b_dots * _inverse_lengths(b_q)[:, None] * _inverse_lengths(b_k)[None, :]
    return b_dots


@triton.jit
def products_of_rows(
    p_x, b_x_row, m_x, x_n, x_d, p_y, b_y_row, m_y, y_n, y_d, dim: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dot_products`` of rows of x and rows of y that are needed for nothing else: 32 channels at a time, so that
    wide heads take no more registers than narrow ones."""
    BC: tl.constexpr = BD if BD < 32 else 32
    b_dots = tl.zeros((BM, BN), tl.float32)
    b_x_squared, b_y_squared = tl.zeros((BM,), tl.float32), tl.zeros((BN,), tl.float32)
    for first in tl.static_range(0, BD, BC):
        b_x = load_rows(p_x + first * x_d, b_x_row, m_x, x_n, x_d, dim - first, BC)  # [BM, BC]
        b_y = load_rows(p_y + first * y_d, b_y_row, m_y, y_n, y_d, dim - first, BC)  # [BN, BC]
        b_dots = tl.dot(b_x, tl.trans(b_y), b_dots, input_precision=PRECISION)
        if COSINE:
            b_x_squared += _squared_lengths(b_x)
            b_y_squared += _squared_lengths(b_y)
    if COSINE:
        b_dots = b_dots * _inverse(b_x_squared)[:, None] * _inverse(b_y_squared)[None, :]
    return b_dots


@triton.jit
def load_bias(p_table, center, b_query_spot, b_key_spot):
    """[queries, keys]"""
    return tl.load(p_table + (b_query_spot[:, None] - b_key_spot[None, :] + center))


@triton.jit
def logits(b_dots, factor, b_bias, b_query_part, b_key_part, m_key, REGIONS: tl.constexpr):
    """[queries, keys], -inf where not ``m_key``: no selects, whose masks cost registers."""
    b_logits = b_dots * factor + b_bias + tl.where(m_key, 0.0, float("-inf"))[None, :]
    if REGIONS:
        b_logits += tl.maximum(tl.abs(b_query_part[:, None] - b_key_part[None, :]) * PENALTY, PENALTY)
    return b_logits


@triton.jit
def direction(b_x, COSINE: tl.constexpr):
    """x / |x| of rows, with COSINE; else x."""
    b_unit = b_x
    if COSINE:
        b_unit = (b_x.to(tl.float32) * _inverse_lengths(b_x)[:, None]).to(b_x.dtype)
    return b_unit


@triton.jit
def through_direction(b_grad, b_x, COSINE: tl.constexpr):
    """The gradient of x from that of its direction, with COSINE; below the smallest norm the divisor is a constant."""
    if COSINE:
        b_inverse = _inverse_lengths(b_x)
        b_unit = b_x.to(tl.float32) * b_inverse[:, None]
        b_along = b_unit * tl.sum(b_unit * b_grad, 1)[:, None]
        b_grad = tl.where((b_inverse < LARGEST_INVERSE)[:, None], b_grad - b_along, b_grad) * b_inverse[:, None]
    return b_grad
