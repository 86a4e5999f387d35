"""The forward of window_attention in Triton: softmax over one tile of keys, or online over several."""

from __future__ import annotations

import triton
import triton.language as tl

from sparsify_kernels.window_attention.tiles_triton import (
    dot_products,
    fill_nan,
    load_bias,
    load_members,
    load_rows,
    logits,
    operand,
    store_rows,
)

__all__ = ["attend"]


@triton.jit
def _fold_keys(
    b_q, b_k, b_v, b_top, b_total, b_sum, factor, p_table, center, b_query_spot, b_key_spot,
    b_query_part, b_key_part, m_key, REGIONS: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The running softmax of a tile of queries (its top, its total, its weighted sum of values), with more keys."""
    b_dots = dot_products(b_q, b_k, COSINE, PRECISION)
    b_bias = load_bias(p_table, center, b_query_spot, b_key_spot)
    b_logits = logits(b_dots, factor, b_bias, b_query_part, b_key_part, m_key, REGIONS)
    b_new = tl.maximum(b_top, tl.max(b_logits, 1))
    b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # -inf - -inf is NaN
    b_fade = tl.exp(b_top - b_base)
    b_p = tl.exp(b_logits - b_base[:, None])
    b_sum = tl.dot(operand(b_p, b_v), b_v, b_sum * b_fade[:, None], input_precision=PRECISION)
    return b_new, b_total * b_fade + tl.sum(b_p, 1), b_sum


@triton.jit
def _attend_tile(
    p_q, p_k, p_v, p_member, p_place, p_part, p_table, p_out, p_lse,
    begin, count, first_query, factor, center, width, heads, dim: tl.constexpr, qkv_n, qkv_d,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ONE: tl.constexpr, COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BM queries of a window of ``count`` members that begins at ``begin``, ONE: all its members, which are the keys
    too."""
    REGIONS: tl.constexpr = p_part is not None
    o_query = first_query + tl.arange(0, BM).to(tl.int64)  # [BM]
    m_query = o_query < count
    b_row, b_spot, b_part = load_members(p_member, p_place, p_part, begin, count, o_query, width)
    b_q = load_rows(p_q, b_row, m_query, qkv_n, qkv_d, dim, BD)  # [BM, BD]
    b_top = tl.full((BM,), float("-inf"), tl.float32)
    b_total = tl.zeros((BM,), tl.float32)
    b_sum = tl.zeros((BM, BD), tl.float32)
    if ONE:
        b_k = load_rows(p_k, b_row, m_query, qkv_n, qkv_d, dim, BD)
        b_v = load_rows(p_v, b_row, m_query, qkv_n, qkv_d, dim, BD)
        b_top, b_total, b_sum = _fold_keys(
            b_q, b_k, b_v, b_top, b_total, b_sum, factor, p_table, center, b_spot, b_spot,
            b_part, b_part, m_query, REGIONS, COSINE, PRECISION,
        )  # fmt: skip
    else:
        for first in range(0, count, BN):
            o_key = first + tl.arange(0, BN).to(tl.int64)  # [BN]
            m_key = o_key < count
            b_key_row, b_key_spot, b_key_part = load_members(p_member, p_place, p_part, begin, count, o_key, width)
            b_k = load_rows(p_k, b_key_row, m_key, qkv_n, qkv_d, dim, BD)  # [BN, BD]
            b_v = load_rows(p_v, b_key_row, m_key, qkv_n, qkv_d, dim, BD)
            b_top, b_total, b_sum = _fold_keys(
                b_q, b_k, b_v, b_top, b_total, b_sum, factor, p_table, center, b_spot, b_key_spot,
                b_part, b_key_part, m_key, REGIONS, COSINE, PRECISION,
            )  # fmt: skip
    store_rows(p_out, b_sum / b_total[:, None], b_row, m_query, heads * dim, dim, BD)
    tl.store(p_lse + b_row * heads, b_top + tl.log(b_total), mask=m_query)


@triton.jit
def attend(
    p_qkv, p_bias, p_scale, p_member, p_start, p_place, p_part, p_bad, p_out, p_lse,
    tokens, heads, dim: tl.constexpr, tiles, default_scale, center, width, qkv_n, qkv_c, qkv_h, qkv_d,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ONE: tl.constexpr, COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of BM members of a window; ONE: no window has more. A window of few is a smaller tile.
    Program ((w * heads + h) * tiles + tile)."""
    i_wh = tl.program_id(0).to(tl.int64) // tiles
    i_w, i_h = i_wh // heads, i_wh % heads
    first = (tl.program_id(0).to(tl.int64) % tiles) * BM
    if tl.load(p_bad) != 0:
        fill_nan(p_out, tl.cast(tokens, tl.int64) * heads * dim, 1024)
        fill_nan(p_lse, tl.cast(tokens, tl.int64) * heads, 1024)
    else:
        begin = tl.load(p_start + i_w)
        count = tl.load(p_start + i_w + 1) - begin
        if first < count:
            factor = default_scale
            if p_scale is not None:
                factor = tl.load(p_scale + i_h)
            p_q = p_qkv + i_h * qkv_h
            p_k, p_v = p_q + qkv_c, p_q + 2 * qkv_c
            p_table = p_bias + i_h * (2 * center + 1)
            p_out += i_h * dim
            p_lse += i_h
            if BM > 32 and count <= 32:
                _attend_tile(
                    p_q, p_k, p_v, p_member, p_place, p_part, p_table, p_out, p_lse,
                    begin, count, first, factor, center, width, heads, dim, qkv_n, qkv_d,
                    32, 32, BD, True, COSINE, PRECISION,
                )  # fmt: skip
            else:
                _attend_tile(
                    p_q, p_k, p_v, p_member, p_place, p_part, p_table, p_out, p_lse,
                    begin, count, first, factor, center, width, heads, dim, qkv_n, qkv_d,
                    BM, BN, BD, ONE, COSINE, PRECISION,
                )  # fmt: skip
