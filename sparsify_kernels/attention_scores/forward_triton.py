"""The forward of attention_scores in Triton; the formulas are in ``reference.py``.

Many queries: ``attend`` gives output and log-sum-exp, a program for each tile of queries; ``receive`` then rebuilds P
from the log-sum-exp, a program for each tile of keys, and sums it over the queries. Few queries: ``attend_once`` does
both, a program for each head. ``over_heads`` adds up what the heads leave, always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsify_kernels.attention_scores.tiles_triton import (
    LN2,
    LOG2E,
    load_tile,
    operand,
    row_share,
    visible_keys,
    weighed,
)

__all__ = ["attend", "attend_once", "over_heads", "receive"]


@triton.jit
def _store_rows(p_out, p_lse, b_out, b_lse, m_live, o_m, queries, value_dim, BDV: tl.constexpr, HAS_V: tl.constexpr):
    """One head's rows ``o_m`` of output and log-sum-exp: 0 and +inf where not ``m_live``."""
    m_row = o_m < queries
    tl.store(p_lse + o_m, tl.where(m_live, b_lse * LN2, float("inf")), mask=m_row)
    if HAS_V:
        o_dv = tl.arange(0, BDV)
        b_out = tl.where(m_live[:, None], b_out, 0.0).to(p_out.dtype.element_ty)
        p_rows = p_out + o_m[:, None] * value_dim + o_dv[None, :]
        tl.store(p_rows, b_out, mask=m_row[:, None] & (o_dv < value_dim)[None, :])


@triton.jit
def attend(
    p_q, p_k, p_v, p_bias, p_query_valid, p_key_valid, p_out, p_lse,
    heads, queries, keys, dim, value_dim, factor,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, bias_b, bias_n, qv_b, qv_m, kv_b, kv_n,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """output and lse of one tile of queries; program ((b * heads + h) * tiles + tile)."""
    MASKED: tl.constexpr = p_key_valid is not None or not EVEN_N
    HAS_V: tl.constexpr = p_v is not None
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
    if p_bias is not None:
        p_bias += i_b * bias_b
    if p_key_valid is not None:
        p_key_valid += i_b * kv_b
    b_top = tl.full((BM,), float("-inf"), tl.float32)
    b_total = tl.zeros((BM,), tl.float32)
    b_out = tl.zeros((BM, BDV), tl.float32)
    for start in range(0, keys, BN):
        o_n = start + tl.arange(0, BN).to(tl.int64)
        m_n = visible_keys(p_key_valid, o_n, keys, kv_n)
        b_k = load_tile(p_k, o_n, o_n < keys, k_n, k_d, dim, BD, not EVEN_N, EVEN_D)  # [BN, BD]
        b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * factor
        b_x = weighed(b_x, p_bias, o_n, m_n, bias_n, MASKED)  # [BM, BN]
        b_new = tl.maximum(b_top, tl.max(b_x, 1))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # -inf - -inf is NaN
        b_p = tl.exp2(b_x - b_base[:, None])
        b_fade = tl.exp2(b_top - b_base)
        b_total = b_total * b_fade + tl.sum(b_p, 1)
        if HAS_V:
            b_v = load_tile(p_v, o_n, m_n, v_n, v_d, value_dim, BDV, MASKED, EVEN_DV)  # [BN, BDV]
            b_out = tl.dot(operand(b_p, b_v), b_v, b_out * b_fade[:, None], input_precision=PRECISION)
        b_top = b_new
    m_live = m_query & (b_total != 0)  # a NaN row is live: what is wrong at valid positions must show
    if HAS_V:
        b_out = b_out / tl.where(m_live, b_total, 1.0)[:, None]
        p_out += i_bh * queries * value_dim
    _store_rows(p_out, p_lse + i_bh * queries, b_out, b_top + tl.log2(tl.where(m_live, b_total, 1.0)), m_live, o_m, queries, value_dim,
                BDV, HAS_V)  # fmt: skip


@triton.jit
def attend_once(
    p_q, p_k, p_v, p_bias, p_query_valid, p_key_valid, p_out, p_lse, p_part,
    heads, queries, keys, dim, value_dim, factor,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, bias_b, bias_n, qv_b, qv_m, kv_b, kv_n,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, ONE_TILE: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """output, lse and the sums of P over the queries, [B, H, N], of one head whose queries are one tile; program
    (b * heads + h).

    The first sweep over the keys finds the log-sum-exp, the second uses it; the second sweep finds the keys in the L2
    cache. ONE_TILE: the keys are one tile too, and the logits stay in registers in between.
    """
    MASKED: tl.constexpr = p_key_valid is not None or not EVEN_N
    HAS_V: tl.constexpr = p_v is not None
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
    if p_bias is not None:
        p_bias += i_b * bias_b
    if p_key_valid is not None:
        p_key_valid += i_b * kv_b
    b_top = tl.full((BM,), float("-inf"), tl.float32)
    b_total = tl.zeros((BM,), tl.float32)
    b_x = tl.zeros((BM, BN), tl.float32)
    for start in range(0, keys, BN):
        o_n = start + tl.arange(0, BN).to(tl.int64)
        m_n = visible_keys(p_key_valid, o_n, keys, kv_n)
        b_k = load_tile(p_k, o_n, o_n < keys, k_n, k_d, dim, BD, not EVEN_N, EVEN_D)  # [BN, BD]
        b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * factor
        b_x = weighed(b_x, p_bias, o_n, m_n, bias_n, MASKED)  # [BM, BN]
        b_new = tl.maximum(b_top, tl.max(b_x, 1))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_total = b_total * tl.exp2(b_top - b_base) + tl.sum(tl.exp2(b_x - b_base[:, None]), 1)
        b_top = b_new
    m_live = m_query & (b_total != 0)
    b_base = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_inverse = 1.0 / tl.where(m_live, b_total, float("inf"))  # 0 in dead rows
    b_out = tl.zeros((BM, BDV), tl.float32)
    for start in range(0, keys, BN):
        o_n = start + tl.arange(0, BN).to(tl.int64)
        m_n = visible_keys(p_key_valid, o_n, keys, kv_n)
        if not ONE_TILE:
            b_k = load_tile(p_k, o_n, o_n < keys, k_n, k_d, dim, BD, not EVEN_N, EVEN_D)
            b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * factor
            b_x = weighed(b_x, p_bias, o_n, m_n, bias_n, MASKED)
        b_p = tl.exp2(b_x - b_base[:, None]) * b_inverse[:, None]
        b_p = tl.where(m_live[:, None], b_p, 0.0)  # a NaN key makes a dead row NaN, times 0
        tl.store(p_part + i_bh * keys + o_n, tl.where(m_n, tl.sum(b_p, 0), 0.0), mask=o_n < keys)
        if HAS_V:
            b_v = load_tile(p_v, o_n, m_n, v_n, v_d, value_dim, BDV, MASKED, EVEN_DV)  # [BN, BDV]
            b_out = tl.dot(operand(b_p, b_v), b_v, b_out, input_precision=PRECISION)
    if HAS_V:
        p_out += i_bh * queries * value_dim
    _store_rows(p_out, p_lse + i_bh * queries, b_out, b_top + tl.log2(tl.where(m_live, b_total, 1.0)), m_live, o_m, queries, value_dim,
                BDV, HAS_V)  # fmt: skip


@triton.jit
def receive(
    p_q, p_k, p_bias, p_query_valid, p_key_valid, p_lse, p_part,
    heads, queries, keys, dim, factor,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, bias_b, bias_n, kv_b, kv_n,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of P over the queries, [B, H, N], for one tile of keys; program ((b * heads + h) * tiles + tile)."""
    tiles = tl.cdiv(keys, BN)
    i_bh = tl.program_id(0).to(tl.int64) // tiles
    i_b, i_h = i_bh // heads, i_bh % heads
    o_n = (tl.program_id(0).to(tl.int64) % tiles) * BN + tl.arange(0, BN)  # [BN]
    m_n = o_n < keys
    if p_key_valid is not None:
        m_n = visible_keys(p_key_valid + i_b * kv_b, o_n, keys, kv_n)
    b_k = load_tile(p_k + i_b * k_b + i_h * k_h, o_n, m_n, k_n, k_d, dim, BD, True, EVEN_D)  # [BN, BD]
    b_bias = tl.zeros((BN,), tl.float32)
    if p_bias is not None:
        b_bias = tl.load(p_bias + i_b * bias_b + o_n * bias_n, mask=m_n, other=0.0).to(tl.float32) * LOG2E
    p_q += i_b * q_b + i_h * q_h
    p_lse += i_bh * queries
    b_sum = tl.zeros((BN, BM), tl.float32)  # summed up over its rows at the end: one addition a weight until then
    for start in range(0, queries, BM):
        o_m = start + tl.arange(0, BM).to(tl.int64)
        b_q = load_tile(p_q, o_m, o_m < queries, q_m, q_d, dim, BD, not EVEN_M, EVEN_D)  # [BM, BD]
        if EVEN_M:
            b_lse = tl.load(p_lse + o_m)
        else:
            b_lse = tl.load(p_lse + o_m, mask=o_m < queries, other=float("inf"))
        b_x = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * factor
        if p_bias is not None:
            b_x += b_bias[:, None]
        b_p = tl.exp2(b_x - (b_lse * LOG2E)[None, :])  # [BN, BM]
        if p_query_valid is not None or not EVEN_M:  # queries that hold NaN, or stand beyond the last
            b_p = tl.where((b_lse != float("inf"))[None, :], b_p, 0.0)
        b_sum += b_p
    tl.store(p_part + i_bh * keys + o_n, tl.where(m_n, tl.sum(b_sum, 1), 0.0), mask=o_n < keys)


@triton.jit
def over_heads(
    p_part, p_query_valid, p_out, heads, queries, keys, qv_b, qv_m,
    MEAN: tl.constexpr, BH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[B, H, N] summed over the heads, MEAN: divided by heads * valid queries; program (b * tiles + tile)."""
    tiles = tl.cdiv(keys, BLOCK)
    i_b = tl.program_id(0).to(tl.int64) // tiles
    o_n = (tl.program_id(0).to(tl.int64) % tiles) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < keys
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, heads, BH):
        o_h = start + tl.arange(0, BH).to(tl.int64)
        p_tile = p_part + (i_b * heads + o_h)[:, None] * keys + o_n[None, :]
        b_sum += tl.sum(tl.load(p_tile, mask=(o_h < heads)[:, None] & m_n[None, :], other=0.0), 0)
    if MEAN:
        if p_query_valid is not None:
            p_query_valid += i_b * qv_b
        b_sum *= row_share(p_query_valid, queries, heads, qv_m)
    tl.store(p_out + i_b * keys + o_n, b_sum, mask=m_n)
