"""The forward of attention_scores in Triton; the formulas are in ``reference.py``.

Many queries: ``attend`` gives output and log-sum-exp, a program for each tile of queries; ``receive`` then rebuilds P
from the log-sum-exp, a program for each tile of keys, and sums it over the queries. Few queries: ``attend_once`` does
both, a program for each head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsify_kernels._floats_triton import narrowed
from sparsify_kernels.attention_scores.tiles_triton import LN2, exponential, load_tile, operand, seen_keys

__all__ = ["attend", "attend_once", "receive"]


@triton.jit
def _store_rows(
    p_out, p_lse, p_base, p_inverse, b_out, b_top, b_total, m_live, i_bh, o_m, queries, value_dim,
    BDV: tl.constexpr, HAS_V: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Rows ``o_m`` of head i_bh of output, log-sum-exp, base and inverse: 0, +inf, +inf and 1 where not ``m_live``."""
    m_row = o_m < queries
    b_total = tl.where(m_live, b_total, 1.0)
    b_lse = b_top + (tl.log(b_total) if EXACT else tl.log2(b_total))
    b_natural = b_lse if EXACT else b_lse * LN2
    tl.store(p_lse + i_bh * queries + o_m, tl.where(m_live, b_natural, float("inf")), mask=m_row)
    if p_base is not None:
        b_base = b_top if EXACT else b_lse
        tl.store(p_base + i_bh * queries + o_m, tl.where(m_live, b_base, float("inf")), mask=m_row)
    if p_inverse is not None:
        tl.store(p_inverse + i_bh * queries + o_m, 1.0 / b_total, mask=m_row)
    if HAS_V:
        o_dv = tl.arange(0, BDV)
        b_out = narrowed(tl.where(m_live[:, None], b_out, 0.0), p_out.dtype.element_ty)
        p_rows = p_out + (i_bh * queries + o_m)[:, None] * value_dim + o_dv[None, :]
        tl.store(p_rows, b_out, mask=m_row[:, None] & (o_dv < value_dim)[None, :])


@triton.jit
def attend(
    p_q, p_k, p_v, p_term, p_query_valid, p_out, p_lse, p_base, p_inverse,
    heads, queries, keys, dim, value_dim, padded, factor,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, qv_b, qv_m,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """output, lse, and what ``receive`` rebuilds P from, of one tile of queries; program ((b * heads + h) * tiles +
    tile).

    P is exp2(logit - base); in fp32 exp(logit - base) * inverse, without the rounding of a log-sum-exp.
    """
    MASKED: tl.constexpr = p_term is not None or not EVEN_N
    HAS_V: tl.constexpr = p_v is not None
    EXACT: tl.constexpr = p_q.dtype.element_ty == tl.float32
    tiles = tl.cdiv(queries, BM)
    i_bh = tl.program_id(0).to(tl.int64) // tiles
    i_b, i_h = i_bh // heads, i_bh % heads
    o_m = (tl.program_id(0).to(tl.int64) % tiles) * BM + tl.arange(0, BM)  # [BM]
    m_query = o_m < queries
    if p_query_valid is not None:
        m_query = m_query & (tl.load(p_query_valid + i_b * qv_b + o_m * qv_m, mask=m_query, other=0) != 0)
    b_q = load_tile(p_q + i_b * q_b + i_h * q_h, o_m, m_query, q_m, q_d, dim, BD, True, EVEN_D)  # [BM, BD]
    p_k += i_b * k_b + i_h * k_h
    if HAS_V:
        p_v += i_b * v_b + i_h * v_h
    if p_term is not None:
        p_term += i_b * padded
    b_top = tl.full((BM,), float("-inf"), tl.float32)
    b_total = tl.zeros((BM,), tl.float32)
    b_out = tl.zeros((BM, BDV), tl.float32)
    for start in range(0, keys, BN):
        o_n = start + tl.arange(0, BN).to(tl.int64)
        b_term, m_n = seen_keys(p_term, o_n, keys)
        b_k = load_tile(p_k, o_n, m_n, k_n, k_d, dim, BD, MASKED, EVEN_D)  # [BN, BD]
        b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * factor  # [BM, BN]
        if MASKED:
            b_x += b_term[None, :]
        b_new = tl.maximum(b_top, tl.max(b_x, 1))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # -inf - -inf is NaN
        b_p = exponential(b_x - b_base[:, None], EXACT)
        b_fade = exponential(b_top - b_base, EXACT)
        b_total = b_total * b_fade + tl.sum(b_p, 1)
        if HAS_V:
            b_v = load_tile(p_v, o_n, m_n, v_n, v_d, value_dim, BDV, MASKED, EVEN_DV)  # [BN, BDV]
            b_out = tl.dot(operand(b_p, b_v), b_v, b_out * b_fade[:, None], input_precision=PRECISION)
        b_top = b_new
    m_live = m_query & (b_total != 0)  # a NaN row is live: what is wrong at valid positions must show
    b_out = b_out / tl.where(m_live, b_total, 1.0)[:, None]
    _store_rows(
        p_out, p_lse, p_base, p_inverse, b_out, b_top, b_total, m_live, i_bh, o_m, queries, value_dim, BDV, HAS_V, EXACT
    )


@triton.jit
def attend_once(
    p_q, p_k, p_v, p_term, p_query_valid, p_out, p_lse, p_part,
    heads, queries, keys, dim, value_dim, padded, factor,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, qv_b, qv_m,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, ONE_TILE: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """output, lse and the sums of P over the queries, [B, H, N], of a head whose queries are one tile; program
    (b * heads + h).

    The first sweep over the keys finds the log-sum-exp, the second uses it and finds the keys in the L2 cache.
    ONE_TILE: the keys are one tile too, and their logits stay in registers in between.
    """
    MASKED: tl.constexpr = p_term is not None or not EVEN_N
    HAS_V: tl.constexpr = p_v is not None
    EXACT: tl.constexpr = p_q.dtype.element_ty == tl.float32
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_m = tl.arange(0, BM).to(tl.int64)  # [BM]
    m_query = o_m < queries
    if p_query_valid is not None:
        m_query = m_query & (tl.load(p_query_valid + i_b * qv_b + o_m * qv_m, mask=m_query, other=0) != 0)
    b_q = load_tile(p_q + i_b * q_b + i_h * q_h, o_m, m_query, q_m, q_d, dim, BD, True, EVEN_D)  # [BM, BD]
    p_k += i_b * k_b + i_h * k_h
    if HAS_V:
        p_v += i_b * v_b + i_h * v_h
    if p_term is not None:
        p_term += i_b * padded
    b_top = tl.full((BM,), float("-inf"), tl.float32)
    b_total = tl.zeros((BM,), tl.float32)
    b_x = tl.zeros((BM, BN), tl.float32)
    for start in range(0, keys, BN):
        o_n = start + tl.arange(0, BN).to(tl.int64)
        b_term, m_n = seen_keys(p_term, o_n, keys)
        b_k = load_tile(p_k, o_n, m_n, k_n, k_d, dim, BD, MASKED, EVEN_D)  # [BN, BD]
        b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * factor  # [BM, BN]
        if MASKED:
            b_x += b_term[None, :]
        b_new = tl.maximum(b_top, tl.max(b_x, 1))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # -inf - -inf is NaN
        b_total = b_total * exponential(b_top - b_base, EXACT) + tl.sum(exponential(b_x - b_base[:, None], EXACT), 1)
        b_top = b_new
    m_live = m_query & (b_total != 0)  # a NaN row is live: what is wrong at valid positions must show
    b_base = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_inverse = 1.0 / tl.where(m_live, b_total, 1.0)
    b_out = tl.zeros((BM, BDV), tl.float32)
    for start in range(0, keys, BN):
        o_n = start + tl.arange(0, BN).to(tl.int64)
        b_term, m_n = seen_keys(p_term, o_n, keys)
        if not ONE_TILE:
            b_k = load_tile(p_k, o_n, m_n, k_n, k_d, dim, BD, MASKED, EVEN_D)
            b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * factor
            if MASKED:
                b_x += b_term[None, :]
        b_p = tl.where(m_live[:, None], exponential(b_x - b_base[:, None], EXACT) * b_inverse[:, None], 0.0)
        tl.store(p_part + i_bh * keys + o_n, tl.where(m_n, tl.sum(b_p, 0), 0.0), mask=o_n < keys)
        if HAS_V:
            b_v = load_tile(p_v, o_n, m_n, v_n, v_d, value_dim, BDV, MASKED, EVEN_DV)  # [BN, BDV]
            b_out = tl.dot(operand(b_p, b_v), b_v, b_out, input_precision=PRECISION)
    _store_rows(
        p_out, p_lse, None, None, b_out, b_top, b_total, m_live, i_bh, o_m, queries, value_dim, BDV, HAS_V, EXACT
    )


@triton.jit
def receive(
    p_q, p_k, p_term, p_base, p_inverse, p_part,
    heads, queries, keys, dim, value_dim, padded, factor, q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, HAS_QUERY_VALID: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of P over the queries, [B, H, N], for one tile of keys; program ((b * heads + h) * tiles + tile)."""
    EXACT: tl.constexpr = p_q.dtype.element_ty == tl.float32
    tiles = tl.cdiv(keys, BN)
    i_bh = tl.program_id(0).to(tl.int64) // tiles
    i_b, i_h = i_bh // heads, i_bh % heads
    o_n = (tl.program_id(0).to(tl.int64) % tiles) * BN + tl.arange(0, BN)  # [BN]
    if p_term is not None:
        p_term += i_b * padded
    b_term, m_n = seen_keys(p_term, o_n, keys)
    b_k = load_tile(p_k + i_b * k_b + i_h * k_h, o_n, m_n, k_n, k_d, dim, BD, True, EVEN_D)  # [BN, BD]
    p_q += i_b * q_b + i_h * q_h
    p_base += i_bh * queries
    b_sum = tl.zeros((BN, BM), tl.float32)  # added up along its rows at the end: one addition a weight until then
    for start in range(0, queries, BM):
        o_m = start + tl.arange(0, BM).to(tl.int64)
        m_m = o_m < queries
        b_base = tl.load(p_base + o_m) if EVEN_M else tl.load(p_base + o_m, mask=m_m, other=float("inf"))
        if HAS_QUERY_VALID:
            m_m = b_base != float("inf")  # what stands at invalid queries is not read
        b_q = load_tile(p_q, o_m, m_m, q_m, q_d, dim, BD, HAS_QUERY_VALID or not EVEN_M, EVEN_D)  # [BM, BD]
        b_x = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * factor  # [BN, BM]
        if p_term is not None:
            b_x += b_term[:, None]
        b_p = exponential(b_x - b_base[None, :], EXACT)
        if p_inverse is not None:
            p_tile = p_inverse + i_bh * queries + o_m
            b_p *= (tl.load(p_tile) if EVEN_M else tl.load(p_tile, mask=o_m < queries, other=0.0))[None, :]
        b_sum += b_p
    tl.store(p_part + i_bh * keys + o_n, tl.where(m_n, tl.sum(b_sum, 1), 0.0), mask=o_n < keys)
