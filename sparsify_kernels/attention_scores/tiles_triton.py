"""What the Triton kernels of attention_scores share.

Alphabet: ``i_`` ids, ``o_`` offsets, ``m_`` masks, ``p_`` pointers, ``b_`` blocks. Offsets into tensors are int64
before the first multiply. Logits of halves are in powers of two: exp2 is one instruction, and log2(e) is folded
into the scale and the terms. Those of fp32 are natural: folded in, its rounding would show.

Bias and validity of the keys come as one table of terms [B, PADDED] (``prepare``), -inf where a key is not seen: one
addition, no selects, nothing beyond the last key to mask. A key is read only where its term is not -inf.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsify_kernels._floats_triton import INTERPRETED

__all__ = [
    "LN2",
    "LOG2E",
    "exponential",
    "load_tile",
    "operand",
    "over_heads",
    "prepare",
    "seen_keys",
]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def operand(b_x, like):
    """``b_x`` in the dtype of ``like``, to be multiplied with it."""
    return b_x.to(like.dtype)


@triton.jit
def exponential(b_x, EXACT: tl.constexpr):
    """exp of differences of logits, EXACT: natural ones."""
    return tl.exp(b_x) if EXACT else tl.exp2(b_x)


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
def seen_keys(p_term, o_n, keys):
    """The terms of keys ``o_n``, and which of them are seen."""
    if p_term is not None:
        b_term = tl.load(p_term + o_n)
        m_n = b_term != float("-inf")
    else:
        m_n = o_n < keys
        b_term = tl.where(m_n, 0.0, float("-inf"))
    return b_term, m_n


@triton.jit
def _valid_queries(p_query_valid, queries, stride):
    """How many queries of a sample are valid."""
    count = queries
    if p_query_valid is not None:
        count = 0
        for start in range(0, queries, 1024):
            o_m = start + tl.arange(0, 1024).to(tl.int64)
            b_valid = tl.load(p_query_valid + o_m * stride, mask=o_m < queries, other=0)
            count += tl.sum((b_valid != 0).to(tl.int32), 0)
    return count


@triton.jit
def prepare(
    p_bias, p_query_valid, p_key_valid, p_grad, p_term, p_gain,
    heads, queries, keys, padded, bias_b, bias_n, qv_b, qv_m, kv_b, kv_n, grad_b, grad_n,
    EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """term [B, PADDED] of every key, and gain [B, PADDED], what a weight on it adds to the loss by way of
    ``received``: grad / (heads * valid queries); program (b * tiles + tile)."""
    tiles = padded // BLOCK
    i_b = tl.program_id(0).to(tl.int64) // tiles
    o_n = (tl.program_id(0).to(tl.int64) % tiles) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_n = o_n < keys
    if p_key_valid is not None:
        m_n = m_n & (tl.load(p_key_valid + i_b * kv_b + o_n * kv_n, mask=m_n, other=0) != 0)
    if p_term is not None:
        b_term = tl.zeros((BLOCK,), tl.float32)
        if p_bias is not None:
            b_term = tl.load(p_bias + i_b * bias_b + o_n * bias_n, mask=m_n, other=0.0).to(tl.float32)
            b_term *= 1.0 if EXACT else LOG2E
        tl.store(p_term + i_b * padded + o_n, tl.where(m_n, b_term, float("-inf")))
    if p_grad is not None:
        if p_query_valid is not None:
            p_query_valid += i_b * qv_b
        count = _valid_queries(p_query_valid, queries, qv_m)
        b_grad = tl.load(p_grad + i_b * grad_b + o_n * grad_n, mask=m_n, other=0.0).to(tl.float32)
        tl.store(p_gain + i_b * padded + o_n, b_grad / (heads * tl.maximum(count, 1)).to(tl.float32))


@triton.jit
def over_heads(
    p_part, p_query_valid, p_out, heads, queries, keys, qv_b, qv_m,
    MEAN: tl.constexpr, BH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[B, H, N] summed over the heads, always in the same order; MEAN: divided by heads * valid queries, 0 without
    any; program (b * tiles + tile)."""
    tiles = tl.cdiv(keys, BLOCK)
    i_b = tl.program_id(0).to(tl.int64) // tiles
    o_n = (tl.program_id(0).to(tl.int64) % tiles) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_n = o_n < keys
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, heads, BH):
        o_h = start + tl.arange(0, BH).to(tl.int64)
        p_tile = p_part + (i_b * heads + o_h)[:, None] * keys + o_n[None, :]
        b_sum += tl.sum(tl.load(p_tile, mask=(o_h < heads)[:, None] & m_n[None, :], other=0.0), 0)
    if MEAN:
        if p_query_valid is not None:
            p_query_valid += i_b * qv_b
        count = _valid_queries(p_query_valid, queries, qv_m)
        b_sum = tl.where(count > 0, b_sum / (heads * tl.maximum(count, 1)).to(tl.float32), 0.0)
    tl.store(p_out + i_b * keys + o_n, b_sum, mask=m_n)
