"""The backward of attention_scores in Triton; the formulas are in ``reference.py``.

P is rebuilt tile by tile from the log-sum-exp. ``row_sums`` gives sum_j P gP of every query, without which nothing
else can begin; then ``grad_keys`` gives dk, dv and dkey_bias, a program for each tile of keys, and ``grad_queries``
dq, a program for each tile of queries. ``gain`` [B, PADDED] is grad_received / (heads * valid queries).

In fp32 the rounding of the log-sum-exp would show: there, ``exact_row_sums`` gives the rows' softmax anew, as ``base``
and ``inverse`` [B, H, M], and ``base`` takes the place of the log-sum-exp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsify_kernels._floats_triton import narrowed
from sparsify_kernels.attention_scores.tiles_triton import LOG2E, exponential, load_tile, operand, seen_keys

__all__ = ["exact_row_sums", "grad_keys", "grad_queries", "row_sums"]


@triton.jit
def _store_tile(p_x, b_x, m_keep, o_row, rows, columns, BLOCK: tl.constexpr):
    """Rows ``o_row`` of a contiguous [rows, columns]: 0 where not ``m_keep``."""
    o_column = tl.arange(0, BLOCK)
    b_x = narrowed(tl.where(m_keep[:, None], b_x, 0.0), p_x.dtype.element_ty)
    p_tile = p_x + o_row[:, None] * columns + o_column[None, :]
    tl.store(p_tile, b_x, mask=(o_row < rows)[:, None] & (o_column < columns)[None, :])


@triton.jit
def row_sums(
    p_q, p_k, p_term, p_gain, p_grad, p_out, p_lse, p_sum,
    heads, queries, keys, dim, value_dim, padded, factor,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, grad_b, grad_h, grad_m, grad_d,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_j P gP = grad_output . output + sum_j P gain, [B, H, M], 0 in dead rows; program ((b * heads + h) * tiles +
    tile)."""
    MASKED: tl.constexpr = p_term is not None or not EVEN_N
    tiles = tl.cdiv(queries, BM)
    i_bh = tl.program_id(0).to(tl.int64) // tiles
    i_b, i_h = i_bh // heads, i_bh % heads
    o_m = (tl.program_id(0).to(tl.int64) % tiles) * BM + tl.arange(0, BM)  # [BM]
    b_lse = tl.load(p_lse + i_bh * queries + o_m, mask=o_m < queries, other=float("inf"))
    m_live = b_lse != float("inf")
    b_sum = tl.zeros((BM,), tl.float32)
    if p_grad is not None:
        p_grad += i_b * grad_b + i_h * grad_h
        b_grad = load_tile(p_grad, o_m, m_live, grad_m, grad_d, value_dim, BDV, True, EVEN_DV)  # [BM, BDV]
        p_out += i_bh * queries * value_dim
        b_out = load_tile(p_out, o_m, m_live, value_dim, 1, value_dim, BDV, True, EVEN_DV)
        b_sum += tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
    if p_gain is not None:
        b_q = load_tile(p_q + i_b * q_b + i_h * q_h, o_m, m_live, q_m, q_d, dim, BD, True, EVEN_D)  # [BM, BD]
        p_k += i_b * k_b + i_h * k_h
        p_gain += i_b * padded
        if p_term is not None:
            p_term += i_b * padded
        for start in range(0, keys, BN):
            o_n = start + tl.arange(0, BN).to(tl.int64)
            b_term, m_n = seen_keys(p_term, o_n, keys)
            b_k = load_tile(p_k, o_n, m_n, k_n, k_d, dim, BD, MASKED, EVEN_D)  # [BN, BD]
            b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * factor  # [BM, BN]
            if MASKED:
                b_x += b_term[None, :]
            b_p = tl.exp2(b_x - (b_lse * LOG2E)[:, None])
            b_sum += tl.sum(b_p * tl.load(p_gain + o_n)[None, :], 1)
    tl.store(p_sum + i_bh * queries + o_m, tl.where(m_live, b_sum, 0.0), mask=o_m < queries)


@triton.jit
def exact_row_sums(
    p_q, p_k, p_v, p_term, p_gain, p_grad, p_lse, p_sum, p_base, p_inverse,
    heads, queries, keys, dim, value_dim, padded, factor,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, grad_b, grad_h, grad_m, grad_d,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``row_sums`` with a softmax of its own: P = exp(logit - base) * inverse, base the largest logit of a row, +inf
    in dead rows, without the rounding of the log-sum-exp; program ((b * heads + h) * tiles + tile)."""
    MASKED: tl.constexpr = p_term is not None or not EVEN_N
    tiles = tl.cdiv(queries, BM)
    i_bh = tl.program_id(0).to(tl.int64) // tiles
    i_b, i_h = i_bh // heads, i_bh % heads
    o_m = (tl.program_id(0).to(tl.int64) % tiles) * BM + tl.arange(0, BM)  # [BM]
    m_live = tl.load(p_lse + i_bh * queries + o_m, mask=o_m < queries, other=float("inf")) != float("inf")
    b_q = load_tile(p_q + i_b * q_b + i_h * q_h, o_m, m_live, q_m, q_d, dim, BD, True, EVEN_D)  # [BM, BD]
    p_k += i_b * k_b + i_h * k_h
    if p_grad is not None:
        p_grad += i_b * grad_b + i_h * grad_h
        b_grad = load_tile(p_grad, o_m, m_live, grad_m, grad_d, value_dim, BDV, True, EVEN_DV)  # [BM, BDV]
        p_v += i_b * v_b + i_h * v_h
    if p_gain is not None:
        p_gain += i_b * padded
    if p_term is not None:
        p_term += i_b * padded
    b_top = tl.full((BM,), float("-inf"), tl.float32)
    b_total = tl.zeros((BM,), tl.float32)
    b_sum = tl.zeros((BM,), tl.float32)
    for start in range(0, keys, BN):
        o_n = start + tl.arange(0, BN).to(tl.int64)
        b_term, m_n = seen_keys(p_term, o_n, keys)
        b_k = load_tile(p_k, o_n, m_n, k_n, k_d, dim, BD, MASKED, EVEN_D)  # [BN, BD]
        b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * factor  # [BM, BN]
        if MASKED:
            b_x += b_term[None, :]
        b_new = tl.maximum(b_top, tl.max(b_x, 1))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # -inf - -inf is NaN
        b_p = tl.exp(b_x - b_base[:, None])
        b_fade = tl.exp(b_top - b_base)
        b_total = b_total * b_fade + tl.sum(b_p, 1)
        b_sum *= b_fade
        if p_gain is not None:
            b_sum += tl.sum(b_p * tl.load(p_gain + o_n)[None, :], 1)
        if p_grad is not None:
            b_v = load_tile(p_v, o_n, m_n, v_n, v_d, value_dim, BDV, MASKED, EVEN_DV)  # [BN, BDV]
            b_sum += tl.sum(b_p * tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION), 1)
        b_top = b_new
    b_inverse = 1.0 / tl.where(m_live, b_total, 1.0)
    p_row, m_row = i_bh * queries + o_m, o_m < queries
    tl.store(p_sum + p_row, tl.where(m_live, b_sum * b_inverse, 0.0), mask=m_row)
    tl.store(p_base + p_row, tl.where(m_live, b_top, float("inf")), mask=m_row)
    tl.store(p_inverse + p_row, b_inverse, mask=m_row)


@triton.jit
def grad_keys(
    p_q, p_k, p_v, p_term, p_gain, p_grad, p_base, p_sum, p_inverse, p_dk, p_dv, p_part,
    heads, queries, keys, dim, value_dim, padded, factor, scale,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, grad_b, grad_h, grad_m, grad_d,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, HAS_QUERY_VALID: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv and, a row a head, dkey_bias of one tile of keys, those asked for; program ((b * heads + h) * tiles +
    tile)."""
    MASKED: tl.constexpr = HAS_QUERY_VALID or not EVEN_M
    EXACT: tl.constexpr = p_inverse is not None
    LOGITS: tl.constexpr = p_dk is not None or p_part is not None
    tiles = tl.cdiv(keys, BN)
    i_bh = tl.program_id(0).to(tl.int64) // tiles
    i_b, i_h = i_bh // heads, i_bh % heads
    o_n = (tl.program_id(0).to(tl.int64) % tiles) * BN + tl.arange(0, BN)  # [BN]
    if p_term is not None:
        p_term += i_b * padded
    b_term, m_n = seen_keys(p_term, o_n, keys)
    b_k = load_tile(p_k + i_b * k_b + i_h * k_h, o_n, m_n, k_n, k_d, dim, BD, True, EVEN_D)  # [BN, BD]
    if p_grad is not None:
        p_grad += i_b * grad_b + i_h * grad_h
        if LOGITS:
            b_v = load_tile(p_v + i_b * v_b + i_h * v_h, o_n, m_n, v_n, v_d, value_dim, BDV, True, EVEN_DV)
    b_gain = tl.zeros((BN,), tl.float32)
    if LOGITS and p_gain is not None:
        b_gain = tl.load(p_gain + i_b * padded + o_n)
    p_q += i_b * q_b + i_h * q_h
    b_dk = tl.zeros((BN, BD), tl.float32)
    b_dv = tl.zeros((BN, BDV), tl.float32)
    b_dbias = tl.zeros((BN,), tl.float32)
    for start in range(0, queries, BM):
        o_m = start + tl.arange(0, BM).to(tl.int64)
        m_m = o_m < queries
        p_row = i_bh * queries + o_m
        b_base = tl.load(p_base + p_row) if EVEN_M else tl.load(p_base + p_row, mask=m_m, other=float("inf"))
        m_live = m_m
        if HAS_QUERY_VALID:
            m_live = b_base != float("inf")  # what stands at invalid queries is not read
        b_q = load_tile(p_q, o_m, m_live, q_m, q_d, dim, BD, MASKED, EVEN_D)  # [BM, BD]
        b_x = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * factor  # [BN, BM]
        if p_term is not None:
            b_x += b_term[:, None]
        b_p = exponential(b_x - (b_base if EXACT else b_base * LOG2E)[None, :], EXACT)
        if p_inverse is not None:
            p_row_inverse = p_inverse + p_row
            b_p *= (tl.load(p_row_inverse) if EVEN_M else tl.load(p_row_inverse, mask=m_m, other=0.0))[None, :]
        if p_grad is not None:
            b_grad = load_tile(p_grad, o_m, m_live, grad_m, grad_d, value_dim, BDV, MASKED, EVEN_DV)  # [BM, BDV]
            if p_dv is not None:
                b_dv = tl.dot(operand(b_p, b_grad), b_grad, b_dv, input_precision=PRECISION)
        if LOGITS:
            b_sum = tl.load(p_sum + p_row) if EVEN_M else tl.load(p_sum + p_row, mask=m_m, other=0.0)
            b_ds = b_gain[:, None] - b_sum[None, :]
            if p_grad is not None:
                b_ds += tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION)
            b_ds = b_p * b_ds  # [BN, BM]
            if p_dk is not None:
                b_dk = tl.dot(operand(b_ds, b_q), b_q, b_dk, input_precision=PRECISION)
            if p_part is not None:
                b_dbias += tl.sum(b_ds, 1)
    if p_dk is not None:
        _store_tile(p_dk + i_bh * keys * dim, b_dk * scale, m_n, o_n, keys, dim, BD)
    if p_dv is not None:
        _store_tile(p_dv + i_bh * keys * value_dim, b_dv, m_n, o_n, keys, value_dim, BDV)
    if p_part is not None:
        tl.store(p_part + i_bh * keys + o_n, tl.where(m_n, b_dbias, 0.0), mask=o_n < keys)


@triton.jit
def grad_queries(
    p_q, p_k, p_v, p_term, p_gain, p_grad, p_base, p_sum, p_inverse, p_dq,
    heads, queries, keys, dim, value_dim, padded, factor, scale,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, grad_b, grad_h, grad_m, grad_d,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries; program ((b * heads + h) * tiles + tile)."""
    MASKED: tl.constexpr = p_term is not None or not EVEN_N
    EXACT: tl.constexpr = p_inverse is not None
    # What is prepared of queries and gradients before the loop and held through it spills registers on sm_120.
    NOTHING_HELD: tl.constexpr = EXACT and BD > 64
    tiles = tl.cdiv(queries, BM)
    i_bh = tl.program_id(0).to(tl.int64) // tiles
    i_b, i_h = i_bh // heads, i_bh % heads
    o_m = (tl.program_id(0).to(tl.int64) % tiles) * BM + tl.arange(0, BM)  # [BM]
    b_base = tl.load(p_base + i_bh * queries + o_m, mask=o_m < queries, other=float("inf"))
    b_sum = tl.load(p_sum + i_bh * queries + o_m, mask=o_m < queries, other=0.0)
    m_live = b_base != float("inf")
    b_q = load_tile(p_q + i_b * q_b + i_h * q_h, o_m, m_live, q_m, q_d, dim, BD, True, EVEN_D)  # [BM, BD]
    p_k += i_b * k_b + i_h * k_h
    if p_grad is not None:
        p_grad += i_b * grad_b + i_h * grad_h
        b_grad = load_tile(p_grad, o_m, m_live, grad_m, grad_d, value_dim, BDV, True, EVEN_DV)  # [BM, BDV]
        p_v += i_b * v_b + i_h * v_h
    if p_gain is not None:
        p_gain += i_b * padded
    if p_term is not None:
        p_term += i_b * padded
    if p_inverse is not None:
        b_inverse = tl.load(p_inverse + i_bh * queries + o_m, mask=o_m < queries, other=0.0)
    b_dq = tl.zeros((BM, BD), tl.float32)
    for start in tl.range(0, keys, BN, disable_licm=NOTHING_HELD):
        o_n = start + tl.arange(0, BN).to(tl.int64)
        b_term, m_n = seen_keys(p_term, o_n, keys)
        b_ds = tl.zeros((BM, BN), tl.float32) - b_sum[:, None]
        if p_gain is not None:
            b_ds += tl.load(p_gain + o_n)[None, :]
        if p_grad is not None:  # before the keys are there: fewer registers
            b_v = load_tile(p_v, o_n, m_n, v_n, v_d, value_dim, BDV, MASKED, EVEN_DV)  # [BN, BDV]
            b_ds += tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)
        b_k = load_tile(p_k, o_n, m_n, k_n, k_d, dim, BD, MASKED, EVEN_D)  # [BN, BD]
        b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * factor  # [BM, BN]
        if MASKED:
            b_x += b_term[None, :]
        b_p = exponential(b_x - (b_base if EXACT else b_base * LOG2E)[:, None], EXACT)
        if p_inverse is not None:
            b_p *= b_inverse[:, None]
        b_ds = b_p * b_ds
        b_dq = tl.dot(operand(b_ds, b_k), b_k, b_dq, input_precision=PRECISION)
    _store_tile(p_dq + i_bh * queries * dim, b_dq * scale, m_live, o_m, queries, dim, BD)
