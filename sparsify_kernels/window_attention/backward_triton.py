"""The backward of window_attention in Triton; the formulas are in ``reference.py``.

P is rebuilt from the log-sum-exp and divided by its own sum, so that the rounding of the log-sum-exp does not show.
For windows of one tile ``grad_window`` gives dq, dk and dv at once. Larger ones take ``row_sums``, which gives 1 /
sum_j P and sum_j P gP of every query, then ``grad_rows``, a program a tile.

dbias is summed over windows as pairs of places: a program of ``grad_pairs`` adds up, in registers, the gradients of the
logits of the windows of its *slab*, tokens by place: the same pair of all windows is the same element of the tile.
``fold_parts`` adds up the slabs, ``fold_pairs`` the pairs that stand to each other alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsify_kernels.window_attention.tiles_triton import (
    direction,
    dot_products,
    fill_nan,
    load_bias,
    load_members,
    load_places,
    load_rows,
    logits,
    operand,
    products_of_rows,
    spot,
    store_rows,
    through_direction,
)

__all__ = ["fold_pairs", "fold_parts", "grad_pairs", "grad_rows", "grad_window", "row_sums"]


@triton.jit
def _window_gradients(
    p_q, p_k, p_v, p_member, p_place, p_part, p_table, p_grad, p_lse, p_inverse, p_sum, p_dq, p_dot,
    begin, count, factor, center, width, heads, dim: tl.constexpr, qkv_n, qkv_d, grad_n, grad_d,
    BM: tl.constexpr, BD: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What ``grad_window`` stores, for a window of at most BM members."""
    o_member = tl.arange(0, BM).to(tl.int64)  # [BM]
    m_row = o_member < count
    b_row, b_spot, b_part = load_members(p_member, p_place, p_part, begin, count, o_member, width)
    b_q = load_rows(p_q, b_row, m_row, qkv_n, qkv_d, dim, BD)  # [BM, BD]
    b_k = load_rows(p_k, b_row, m_row, qkv_n, qkv_d, dim, BD)
    b_dots = dot_products(b_q, b_k, COSINE, PRECISION)  # [BM, BM]
    b_bias = load_bias(p_table, center, b_spot, b_spot)
    b_logits = logits(b_dots, factor, b_bias, b_part, b_part, m_row, p_part is not None)
    b_p = tl.exp(b_logits - tl.where(m_row, tl.load(p_lse + b_row * heads), float("inf"))[:, None])
    b_inverse = 1.0 / tl.where(m_row, tl.sum(b_p, 1), 1.0)
    b_p *= b_inverse[:, None]
    b_grad = load_rows(p_grad, b_row, m_row, grad_n, grad_d, dim, BD)
    if p_dq is not None:
        b_dv = tl.dot(tl.trans(operand(b_p, b_grad)), b_grad, input_precision=PRECISION)
        store_rows(p_dq + 2 * heads * dim, b_dv, b_row, m_row, 3 * heads * dim, dim, BD)
    b_v = load_rows(p_v, b_row, m_row, qkv_n, qkv_d, dim, BD)
    b_ds = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)
    b_sum = tl.sum(b_p * b_ds, 1)
    b_ds = b_p * (b_ds - b_sum[:, None])
    if p_inverse is not None:
        tl.store(p_inverse + b_row * heads, b_inverse, mask=m_row)
        tl.store(p_sum + b_row * heads, b_sum, mask=m_row)
    if p_dot is not None:
        tl.store(p_dot + tl.arange(0, 1), tl.sum(tl.sum(b_ds * b_dots, 1)[None, :], 1))
    if p_dq is not None:
        b_steep = operand(b_ds, b_q)
        b_dq = tl.dot(b_steep, direction(b_k, COSINE), input_precision=PRECISION) * factor
        store_rows(p_dq, through_direction(b_dq, b_q, COSINE), b_row, m_row, 3 * heads * dim, dim, BD)
        b_dk = tl.dot(tl.trans(b_steep), direction(b_q, COSINE), input_precision=PRECISION) * factor
        b_dk = through_direction(b_dk, b_k, COSINE)
        store_rows(p_dq + heads * dim, b_dk, b_row, m_row, 3 * heads * dim, dim, BD)


@triton.jit
def grad_window(
    p_qkv, p_bias, p_scale, p_member, p_start, p_place, p_part, p_bad, p_grad, p_lse, p_inverse, p_sum, p_dqkv, p_dot,
    tokens, heads, dim: tl.constexpr, default_scale, center, width, qkv_n, qkv_c, qkv_h, qkv_d, grad_n, grad_h, grad_d,
    BM: tl.constexpr, BD: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dqkv, dscale [W, H], and what ``row_sums`` gives, those asked for, of windows of at most BM places; a window of
    few members is a smaller tile. Program (w * heads + h)."""
    i_w, i_h = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0).to(tl.int64) % heads
    if tl.load(p_bad) != 0:
        if p_dqkv is not None:
            fill_nan(p_dqkv, tl.cast(tokens, tl.int64) * 3 * heads * dim, 1024)
    else:
        begin = tl.load(p_start + i_w)
        count = tl.load(p_start + i_w + 1) - begin
        if p_dot is not None:
            p_dot += i_w * heads + i_h
            tl.store(p_dot, 0.0, mask=count == 0)
        if count > 0:
            factor = default_scale
            if p_scale is not None:
                factor = tl.load(p_scale + i_h)
            p_q = p_qkv + i_h * qkv_h
            p_k, p_v = p_q + qkv_c, p_q + 2 * qkv_c
            p_table = p_bias + i_h * (2 * center + 1)
            p_grad += i_h * grad_h
            p_lse += i_h
            if p_inverse is not None:
                p_inverse, p_sum = p_inverse + i_h, p_sum + i_h
            if p_dqkv is not None:
                p_dqkv += i_h * dim
            if BM > 32 and count <= 32:
                _window_gradients(
                    p_q, p_k, p_v, p_member, p_place, p_part, p_table, p_grad, p_lse, p_inverse, p_sum, p_dqkv, p_dot,
                    begin, count, factor, center, width, heads, dim, qkv_n, qkv_d, grad_n, grad_d,
                    32, BD, COSINE, PRECISION,
                )  # fmt: skip
            else:
                _window_gradients(
                    p_q, p_k, p_v, p_member, p_place, p_part, p_table, p_grad, p_lse, p_inverse, p_sum, p_dqkv, p_dot,
                    begin, count, factor, center, width, heads, dim, qkv_n, qkv_d, grad_n, grad_d,
                    BM, BD, COSINE, PRECISION,
                )  # fmt: skip


@triton.jit
def row_sums(
    p_qkv, p_bias, p_scale, p_member, p_start, p_place, p_part, p_bad, p_grad, p_lse, p_inverse, p_sum,
    heads, dim: tl.constexpr, tiles, default_scale, center, width, qkv_n, qkv_c, qkv_h, qkv_d, grad_n, grad_h, grad_d,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """1 / sum_j P and sum_j P gP / sum_j P, [N, H], with P as the log-sum-exp gives it; program ((w * heads + h) *
    tiles + tile)."""
    i_wh = tl.program_id(0).to(tl.int64) // tiles
    i_w, i_h = i_wh // heads, i_wh % heads
    first_query = (tl.program_id(0).to(tl.int64) % tiles) * BM
    begin = tl.load(p_start + i_w)
    count = tl.where(tl.load(p_bad) != 0, 0, tl.load(p_start + i_w + 1) - begin)
    if first_query < count:
        factor = default_scale
        if p_scale is not None:
            factor = tl.load(p_scale + i_h)
        p_q = p_qkv + i_h * qkv_h
        p_k, p_v = p_q + qkv_c, p_q + 2 * qkv_c
        p_table = p_bias + i_h * (2 * center + 1)
        o_query = first_query + tl.arange(0, BM).to(tl.int64)  # [BM]
        m_query = o_query < count
        b_row, b_spot, b_part = load_members(p_member, p_place, p_part, begin, count, o_query, width)
        b_q = load_rows(p_q, b_row, m_query, qkv_n, qkv_d, dim, BD)  # [BM, BD]
        b_grad = load_rows(p_grad + i_h * grad_h, b_row, m_query, grad_n, grad_d, dim, BD)
        b_lse = tl.where(m_query, tl.load(p_lse + b_row * heads + i_h), float("inf"))
        b_total = tl.zeros((BM,), tl.float32)
        b_sum = tl.zeros((BM,), tl.float32)
        for first in range(0, count, BN):
            o_key = first + tl.arange(0, BN).to(tl.int64)  # [BN]
            m_key = o_key < count
            b_key_row, b_key_spot, b_key_part = load_members(p_member, p_place, p_part, begin, count, o_key, width)
            b_k = load_rows(p_k, b_key_row, m_key, qkv_n, qkv_d, dim, BD)  # [BN, BD]
            b_dots = dot_products(b_q, b_k, COSINE, PRECISION)
            b_bias = load_bias(p_table, center, b_spot, b_key_spot)
            b_logits = logits(b_dots, factor, b_bias, b_part, b_key_part, m_key, p_part is not None)
            b_p = tl.exp(b_logits - b_lse[:, None])
            b_v = load_rows(p_v, b_key_row, m_key, qkv_n, qkv_d, dim, BD)
            b_total += tl.sum(b_p, 1)
            b_sum += tl.sum(b_p * tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION), 1)
        b_inverse = 1.0 / tl.where(m_query, b_total, 1.0)
        tl.store(p_inverse + b_row * heads + i_h, b_inverse, mask=m_query)
        tl.store(p_sum + b_row * heads + i_h, b_sum * b_inverse, mask=m_query)


@triton.jit
def _weights(
    b_dots, p_row_lse, p_row_inverse, factor, b_bias, b_query_part, b_key_part, m_query, m_key,
    REGIONS: tl.constexpr,
):  # fmt: skip
    """P of a tile of queries and keys, from their dot products."""
    b_logits = logits(b_dots, factor, b_bias, b_query_part, b_key_part, m_key, REGIONS)
    b_lse = tl.where(m_query, tl.load(p_row_lse), float("inf"))
    return tl.exp(b_logits - b_lse[:, None]) * tl.load(p_row_inverse)[:, None]


@triton.jit
def grad_rows(
    p_qkv, p_bias, p_scale, p_member, p_start, p_place, p_part, p_bad, p_grad, p_lse, p_inverse, p_sum,
    p_dqkv, p_dot, tokens, heads, dim: tl.constexpr, tiles, default_scale, center, width,
    qkv_n, qkv_c, qkv_h, qkv_d, grad_n, grad_h, grad_d,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv and dq of BM members, from BN queries and from BN keys at a time, and their part of dscale [W * tiles,
    H], those asked for; program ((w * heads + h) * tiles + tile)."""
    REGIONS: tl.constexpr = p_part is not None
    i_wh = tl.program_id(0).to(tl.int64) // tiles
    i_w, i_h = i_wh // heads, i_wh % heads
    i_tile = tl.program_id(0).to(tl.int64) % tiles
    bad = tl.load(p_bad)
    begin = tl.load(p_start + i_w)
    count = tl.where(bad != 0, 0, tl.load(p_start + i_w + 1) - begin)
    if p_dot is not None:
        p_dot += (i_w * tiles + i_tile) * heads + i_h
    if i_tile * BM < count:
        factor = default_scale
        if p_scale is not None:
            factor = tl.load(p_scale + i_h)
        p_q = p_qkv + i_h * qkv_h
        p_k, p_v = p_q + qkv_c, p_q + 2 * qkv_c
        p_grad += i_h * grad_h
        p_table = p_bias + i_h * (2 * center + 1)
        p_lse, p_inverse, p_sum = p_lse + i_h, p_inverse + i_h, p_sum + i_h
        o_own = i_tile * BM + tl.arange(0, BM).to(tl.int64)  # [BM]
        m_own = o_own < count
        b_row, b_spot, b_part = load_members(p_member, p_place, p_part, begin, count, o_own, width)
        if p_dqkv is not None:
            b_k = load_rows(p_k, b_row, m_own, qkv_n, qkv_d, dim, BD)  # [BM, BD]
            b_v = load_rows(p_v, b_row, m_own, qkv_n, qkv_d, dim, BD)
            b_dk = tl.zeros((BM, BD), tl.float32)
            b_dv = tl.zeros((BM, BD), tl.float32)
            for first in range(0, count, BN):
                o_query = first + tl.arange(0, BN).to(tl.int64)  # [BN]
                m_query = o_query < count
                b_other, b_other_spot, b_other_part = load_members(
                    p_member, p_place, p_part, begin, count, o_query, width
                )
                b_q = load_rows(p_q, b_other, m_query, qkv_n, qkv_d, dim, BD)  # [BN, BD]
                o_sums = b_other * heads
                b_dots = dot_products(b_q, b_k, COSINE, PRECISION)  # [BN, BM]
                b_bias = load_bias(p_table, center, b_other_spot, b_spot)
                b_p = _weights(
                    b_dots, p_lse + o_sums, p_inverse + o_sums, factor, b_bias, b_other_part, b_part, m_query, m_own,
                    REGIONS,
                )  # fmt: skip
                b_grad = load_rows(p_grad, b_other, m_query, grad_n, grad_d, dim, BD)
                b_dv = tl.dot(tl.trans(operand(b_p, b_grad)), b_grad, b_dv, input_precision=PRECISION)
                b_ds = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)
                b_ds = b_p * (b_ds - tl.load(p_sum + o_sums)[:, None])
                b_unit = direction(b_q, COSINE)
                b_dk = tl.dot(tl.trans(operand(b_ds, b_q)), b_unit, b_dk, input_precision=PRECISION)
            p_dk = p_dqkv + (heads + i_h) * dim
            b_dk = through_direction(b_dk * factor, b_k, COSINE)
            store_rows(p_dk, b_dk, b_row, m_own, 3 * heads * dim, dim, BD)
            store_rows(p_dk + heads * dim, b_dv, b_row, m_own, 3 * heads * dim, dim, BD)
        b_q = load_rows(p_q, b_row, m_own, qkv_n, qkv_d, dim, BD)  # [BM, BD]
        b_grad = load_rows(p_grad, b_row, m_own, grad_n, grad_d, dim, BD)
        o_sums = b_row * heads
        b_dq = tl.zeros((BM, BD), tl.float32)
        b_dot = tl.zeros((BM,), tl.float32)
        for first in range(0, count, BN):
            o_key = first + tl.arange(0, BN).to(tl.int64)  # [BN]
            m_key = o_key < count
            b_other, b_other_spot, b_other_part = load_members(p_member, p_place, p_part, begin, count, o_key, width)
            b_k = load_rows(p_k, b_other, m_key, qkv_n, qkv_d, dim, BD)  # [BN, BD]
            b_dots = dot_products(b_q, b_k, COSINE, PRECISION)  # [BM, BN]
            b_bias = load_bias(p_table, center, b_spot, b_other_spot)
            b_p = _weights(
                b_dots, p_lse + o_sums, p_inverse + o_sums, factor, b_bias, b_part, b_other_part, m_own, m_key,
                REGIONS,
            )  # fmt: skip
            b_v = load_rows(p_v, b_other, m_key, qkv_n, qkv_d, dim, BD)
            b_ds = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)
            b_ds = b_p * (b_ds - tl.load(p_sum + o_sums)[:, None])
            b_dot += tl.sum(b_ds * b_dots, 1)
            if p_dqkv is not None:
                b_dq = tl.dot(operand(b_ds, b_k), direction(b_k, COSINE), b_dq, input_precision=PRECISION)
        if p_dqkv is not None:
            b_dq = through_direction(b_dq * factor, b_q, COSINE)
            store_rows(p_dqkv + i_h * dim, b_dq, b_row, m_own, 3 * heads * dim, dim, BD)
        if p_dot is not None:
            tl.store(p_dot, tl.sum(b_dot, 0))
    elif bad != 0:
        if p_dqkv is not None:
            fill_nan(p_dqkv, tl.cast(tokens, tl.int64) * 3 * heads * dim, 1024)
    elif p_dot is not None:
        tl.store(p_dot, 0.0)


@triton.jit
def grad_pairs(
    p_qkv, p_bias, p_scale, p_member, p_start, p_place, p_part, p_cell, p_bad, p_grad, p_lse, p_inverse, p_sum,
    p_pair, heads, dim: tl.constexpr, tiles, key_tiles, windows, places, share, default_scale, center, width,
    qkv_n, qkv_c, qkv_h, qkv_d, grad_n, grad_h, grad_d,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of the logits of BM x BN pairs of places [slabs, H, P, P], summed over the windows of a slab;
    program (((slab * heads + h) * tiles + tile of queries) * key_tiles + tile of keys)."""
    i_sh = tl.program_id(0).to(tl.int64) // (tiles * key_tiles)
    i_tile = tl.program_id(0).to(tl.int64) % (tiles * key_tiles)
    i_slab, i_h = i_sh // heads, i_sh % heads
    factor = default_scale
    if p_scale is not None:
        factor = tl.load(p_scale + i_h)
    p_q = p_qkv + i_h * qkv_h
    p_k, p_v = p_q + qkv_c, p_q + 2 * qkv_c
    p_grad += i_h * grad_h
    p_table = p_bias + i_h * (2 * center + 1)
    p_lse, p_inverse, p_sum = p_lse + i_h, p_inverse + i_h, p_sum + i_h
    o_query = i_tile // key_tiles * BM + tl.arange(0, BM)  # [BM]
    o_key = i_tile % key_tiles * BN + tl.arange(0, BN)  # [BN]
    b_query_spot = spot(tl.minimum(o_query, places - 1), width)
    b_key_spot = spot(tl.minimum(o_key, places - 1), width)
    b_bias = load_bias(p_table, center, b_query_spot, b_key_spot)  # [BM, BN], the same in all windows
    b_pair = tl.zeros((BM, BN), tl.float32)
    last = tl.where(tl.load(p_bad) != 0, 0, tl.minimum(i_slab * share + share, windows))
    for i_w in range(i_slab * share, last):
        begin, end = tl.load(p_start + i_w), tl.load(p_start + i_w + 1)
        if begin < end:
            b_row, b_part, m_query = load_places(p_cell, p_member, p_place, p_part, i_w, begin, end, o_query, places)
            b_key_row, b_key_part, m_key = load_places(
                p_cell, p_member, p_place, p_part, i_w, begin, end, o_key, places
            )
            o_sums = b_row * heads
            b_dots = products_of_rows(
                p_q, b_row, m_query, qkv_n, qkv_d, p_k, b_key_row, m_key, qkv_n, qkv_d, dim,
                BM, BN, BD, COSINE, PRECISION,
            )  # fmt: skip
            b_p = _weights(
                b_dots, p_lse + o_sums, p_inverse + o_sums, factor, b_bias, b_part, b_key_part, m_query, m_key,
                p_part is not None,
            )  # fmt: skip
            b_ds = products_of_rows(
                p_grad, b_row, m_query, grad_n, grad_d, p_v, b_key_row, m_key, qkv_n, qkv_d, dim,
                BM, BN, BD, False, PRECISION,
            )  # fmt: skip
            b_pair += b_p * (b_ds - tl.load(p_sum + o_sums)[:, None])
    p_tile = p_pair + i_sh * places * places + o_query[:, None] * places + o_key[None, :]
    tl.store(p_tile, b_pair, mask=(o_query < places)[:, None] & (o_key < places)[None, :])


@triton.jit
def fold_parts(p_part, p_bad, p_out, parts, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out[x] = the sum of part[:, x], NaN if the windows are bad; ``part`` [parts, size]; program (block of x)."""
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_x = o_x < size
    bad = tl.load(p_bad) != 0
    b_sum = tl.zeros((PARTS, BLOCK), tl.float32)
    for first in range(0, tl.where(bad, 0, parts), PARTS):
        o_part = first + tl.arange(0, PARTS).to(tl.int64)  # [PARTS]
        p_tile = p_part + o_part[:, None] * size + o_x[None, :]
        b_sum += tl.load(p_tile, mask=(o_part < parts)[:, None] & m_x[None, :], other=0.0)
    tl.store(p_out + o_x, tl.where(bad, float("nan"), tl.sum(b_sum, 0)), mask=m_x)


@triton.jit
def fold_pairs(p_pair, p_dbias, blocks, center, places, width, PLACES: tl.constexpr, BLOCK: tl.constexpr):
    """dbias[h, r, c] = the sum of pair [H, P, P] over the pairs that are so far apart; program (h * blocks + block of
    the table)."""
    i_h = tl.program_id(0).to(tl.int64) // blocks
    o_bias = (tl.program_id(0).to(tl.int64) % blocks) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    size = 2 * tl.cast(center, tl.int64) + 1
    columns = 2 * width - 1
    b_down = o_bias // columns - (size // columns) // 2
    b_across = o_bias % columns - (width - 1)
    b_sum = tl.zeros((BLOCK, PLACES), tl.float32)
    for first in range(0, places, PLACES):
        o_query = first + tl.arange(0, PLACES).to(tl.int64)  # [PLACES]
        b_row = (o_query // width)[None, :] - b_down[:, None]  # [BLOCK, PLACES], of the key
        b_column = (o_query % width)[None, :] - b_across[:, None]
        m_pair = (o_query < places)[None, :] & (b_row >= 0) & (b_column >= 0) & (b_column < width)
        o_key = b_row * width + b_column
        m_pair = m_pair & (o_key < places)
        b_sum += tl.load(p_pair + (i_h * places + o_query[None, :]) * places + o_key, mask=m_pair, other=0.0)
    tl.store(p_dbias + i_h * size + o_bias, tl.sum(b_sum, 1), mask=o_bias < size)
