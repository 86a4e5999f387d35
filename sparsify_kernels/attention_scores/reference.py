"""Attention that also returns how much attention every key received: plain PyTorch.

For head h, query i, key j of one sample, with nq valid queries::

    P[h, i, j]    = softmax_j(scale * q[h, i] . k[h, j] + key_bias[j])      over the valid keys, 0 in dead rows
    output[h, i]  = sum_j P[h, i, j] v[h, j]
    received[j]   = sum_{h, i} P[h, i, j] / (H * nq)                        over the *queries*: along j it is always 1

Backward, from the gradients ``gO`` of output and ``gR`` of received::

    gP[h, i, j]   = gO[h, i] . v[h, j] + gR[j] / (H * nq)
    gS            = P * (gP - sum_j P * gP)
    dq, dk, dv, dkey_bias = scale * gS k,  scale * gS^T q,  P^T gO,  sum_{h, i} gS

A row is *dead* when its query is invalid or no key can be seen from it; its P is 0. Sources: Diao et al., ACL 2025
(arXiv 2506.01319), adaptive sparse merging; the softmax backward is that of Dao et al., FlashAttention (arXiv
2205.14135), appendix B.2, with gR added.

This form holds H x M x N of one sample at a time. Samples are computed one by one on purpose: a batched matrix
product may sum in another order for another batch size or alignment, and a sample's bits must not depend on its
batch-mates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify_kernels._reference import accumulation_dtype, masked, without_autocast


@without_autocast
def attention_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    key_bias: Tensor | None,
    query_valid: Tensor | None,
    key_valid: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``(received, output, lse)``; arguments as in the public function.

    ``received`` [B, N] and ``lse`` [B, H, M] have the accumulation dtype, ``output`` [B, H, M, dv] has q's (dv = 0
    without v). ``lse`` is the log-sum-exp of the logits of each row, +inf for a dead one, so that ``exp(logit -
    lse)`` is P everywhere.
    """
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    dtype = accumulation_dtype(q.dtype)
    received = q.new_zeros((batch, keys), dtype=dtype)
    output = q.new_zeros((batch, heads, queries, 0 if v is None else v.shape[3]))
    lse = q.new_full((batch, heads, queries), math.inf, dtype=dtype)
    for b in range(batch):
        probability, row_lse, _, _ = _softmax(b, q, k, key_bias, query_valid, key_valid, scale)
        received[b] = probability.sum((0, 1)) * _share(b, heads, queries, query_valid, probability)
        lse[b] = row_lse
        if v is not None:
            output[b] = torch.matmul(probability, _rows(b, v, key_valid)).to(output.dtype)
    return received, output, lse


@without_autocast
def attention_scores_backward(
    grad_received: Tensor | None,
    grad_output: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    key_bias: Tensor | None,
    query_valid: Tensor | None,
    key_valid: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns ``(dq, dk, dv, dkey_bias)`` in the dtypes of q, k, v and key_bias; one not ``wanted`` is an empty
    tensor [0].

    ``output`` and ``lse`` are the forward's: with them a kernel rebuilds P tile by tile. This form recomputes P whole
    instead, which is a little more accurate.
    """
    heads, queries, dim = q.shape[1:]
    factor = dim**-0.5 if scale is None else scale
    dq = q.new_zeros(q.shape) if wanted[0] else q.new_empty(0)
    dk = k.new_zeros(k.shape) if wanted[1] else k.new_empty(0)
    dv = v.new_zeros(v.shape) if wanted[2] and v is not None else q.new_empty(0)
    dbias = lse.new_zeros(k.shape[0], k.shape[2]) if wanted[3] else lse.new_empty(0)
    for b in range(q.shape[0]):
        probability, row_lse, q_rows, k_rows = _softmax(b, q, k, key_bias, query_valid, key_valid, scale)
        visible = _visible(b, k, key_valid)
        live = row_lse != math.inf  # [H, M]
        grad_p = torch.zeros_like(probability)
        if grad_output is not None and v is not None:
            grad_rows = masked(grad_output[b].to(probability.dtype), live).contiguous()  # [H, M, dv]
            grad_p = torch.matmul(grad_rows, _rows(b, v, key_valid).transpose(-1, -2))
            if dv.numel():
                dv[b] = masked(torch.matmul(probability.transpose(-1, -2), grad_rows), visible).to(dv.dtype)
        if grad_received is not None:
            grad_keys = torch.where(visible, grad_received[b].to(probability.dtype), 0.0)
            grad_p = grad_p + grad_keys * _share(b, heads, queries, query_valid, probability)
        grad_s = probability * (grad_p - (probability * grad_p).sum(-1, keepdim=True))
        if dq.numel():
            dq[b] = masked(torch.matmul(grad_s, k_rows) * factor, live).to(dq.dtype)
        if dk.numel():
            dk[b] = masked(torch.matmul(grad_s.transpose(-1, -2), q_rows) * factor, visible).to(dk.dtype)
        if dbias.numel():
            dbias[b] = torch.where(visible, grad_s.sum((0, 1)), 0.0)
    return dq, dk, dv, dbias


def _softmax(
    b: int,
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    query_valid: Tensor | None,
    key_valid: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P [H, M, N], lse [H, M] (+inf in dead rows), and q [H, M, d] and k [H, N, d] of sample b with zeros at invalid
    positions."""
    factor = q.shape[3] ** -0.5 if scale is None else scale
    q_rows, k_rows = _rows(b, q, query_valid), _rows(b, k, key_valid)
    logits = torch.matmul(q_rows, k_rows.transpose(-1, -2)) * factor  # [H, M, N]
    if key_bias is not None:
        logits = logits + key_bias[b]
    if key_valid is not None:
        logits = torch.where(key_valid[b], logits, -math.inf)
    lse = torch.logsumexp(logits, dim=-1)
    live = lse != -math.inf  # a NaN row stays live: what is wrong at valid positions must show
    if query_valid is not None:
        live = live & query_valid[b]
    return masked(torch.softmax(logits, dim=-1), live), torch.where(live, lse, math.inf), q_rows, k_rows


def _rows(b: int, x: Tensor, valid: Tensor | None) -> Tensor:
    """``x[b]`` [H, L, d] in the accumulation dtype with zeros at invalid positions.

    In memory of its own: the rounding of a matrix product depends on how its operands are aligned.
    """
    rows = torch.empty_like(x[b], dtype=accumulation_dtype(x.dtype), memory_format=torch.contiguous_format)
    return rows.copy_(x[b] if valid is None else masked(x[b], valid[b]))


def _visible(b: int, k: Tensor, key_valid: Tensor | None) -> Tensor:
    """The valid keys [N] of sample b."""
    return k.new_ones(k.shape[2], dtype=torch.bool) if key_valid is None else key_valid[b]


def _share(b: int, heads: int, queries: int, query_valid: Tensor | None, like: Tensor) -> Tensor | float:
    """1 / (H * valid queries) of sample b: what one row contributes to the mean."""
    if query_valid is None:
        return 1.0 / (heads * max(queries, 1))
    return 1.0 / (heads * query_valid[b].sum().clamp(min=1).to(like.dtype))
