"""What the Triton kernels of attention_scores share: loading tiles, logits, the share of a row in the mean.

Alphabet: ``i_`` ids, ``o_`` offsets, ``m_`` masks, ``p_`` pointers, ``b_`` blocks. Offsets into tensors are int64
before the first multiply. Logits are in powers of two: exp2 is one instruction, and log2(e) is folded into the scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "LN2", "LOG2E", "load_tile", "operand", "row_share", "visible_keys", "weighed"]

# The interpreter multiplies bf16 as the integers it keeps them in: there, everything is widened when it is loaded.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def operand(b_x, like):
    """``b_x`` in the dtype of ``like``, to be multiplied with it."""
    return b_x.to(like.dtype)


@triton.jit
def load_tile(p_x, o_row, m_row, row, column, columns, BLOCK: tl.constexpr, MASKED: tl.constexpr, EVEN: tl.constexpr):
    """Rows ``o_row`` of a matrix with strides ``row``, ``column`` and ``columns`` <= BLOCK columns (EVEN: =), zeros
    beyond them and, if MASKED, where not ``m_row``: [rows, BLOCK]."""
    o_column = tl.arange(0, BLOCK).to(tl.int64)
    p_tile = p_x + o_row[:, None] * row + o_column[None, :] * column
    if MASKED and EVEN:
        b_x = tl.load(p_tile, mask=m_row[:, None], other=0.0)
    elif MASKED:
        b_x = tl.load(p_tile, mask=m_row[:, None] & (o_column < columns)[None, :], other=0.0)
    elif EVEN:
        b_x = tl.load(p_tile)
    else:
        b_x = tl.load(p_tile, mask=(o_column < columns)[None, :], other=0.0)
    return b_x.to(tl.float32) if INTERPRETED else b_x


@triton.jit
def visible_keys(p_key_valid, o_n, keys, stride):
    """Which keys ``o_n`` of a sample are there, and valid."""
    m_n = o_n < keys
    if p_key_valid is not None:
        m_n = m_n & (tl.load(p_key_valid + o_n * stride, mask=m_n, other=0) != 0)
    return m_n


@triton.jit
def weighed(b_x, p_bias, o_n, m_n, stride, MASKED: tl.constexpr):
    """Logits ``b_x`` [BM, BN] plus the bias of each key; -inf, MASKED, where not ``m_n``."""
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_n * stride, mask=m_n, other=0.0).to(tl.float32) * LOG2E
        b_x += b_bias[None, :]
    return tl.where(m_n[None, :], b_x, float("-inf")) if MASKED else b_x


@triton.jit
def row_share(p_query_valid, queries, heads, stride):
    """1 / (heads * valid queries) of a sample: what one row contributes to the mean."""
    count = queries
    if p_query_valid is not None:
        count = 0
        for start in range(0, queries, 1024):
            o_m = start + tl.arange(0, 1024).to(tl.int64)
            b_valid = tl.load(p_query_valid + o_m * stride, mask=o_m < queries, other=0)
            count += tl.sum((b_valid != 0).to(tl.int32), 0)
    return 1.0 / (heads * tl.maximum(count, 1)).to(tl.float32)
