"""The ops as one would write them with ordinary PyTorch operations, at the dtype of the inputs.

They are baselines: for errors (``assert_accurate``), for time, and with fp64 inputs the truth for gradients, which
autograd derives here.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify_kernels.attention_scores.op import AttentionScores
from sparsify_kernels.window_attention.op import Windows

__all__ = ["attention_scores_eager", "merge_tokens_eager", "window_attention_eager"]


def attention_scores_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    query_valid: Tensor | None = None,
    key_valid: Tensor | None = None,
) -> AttentionScores:
    """``attention_scores`` with a dense softmax, every step in q's dtype. Invalid positions are zeroed first, then
    masked."""
    if query_valid is not None:
        q = q.masked_fill(~query_valid[:, None, :, None], 0)
    if key_valid is not None:
        hidden = ~key_valid[:, None, :, None]
        k = k.masked_fill(hidden, 0)
        v = None if v is None else v.masked_fill(hidden, 0)
    logits = torch.einsum("bhmd,bhnd->bhmn", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if key_bias is not None:
        bias = key_bias if key_valid is None else key_bias.masked_fill(~key_valid, 0)
        logits = logits + bias.to(q.dtype)[:, None, None, :]
    dead = torch.zeros(logits.shape[0], 1, logits.shape[2], 1, dtype=torch.bool, device=q.device)
    if key_valid is not None:
        dead = dead | ~key_valid.any(1)[:, None, None, None]
        logits = logits.masked_fill(~key_valid[:, None, None, :], torch.finfo(q.dtype).min)
    rows = torch.full_like(q[:, 0, :, 0], 1.0)
    if query_valid is not None:
        dead = dead | ~query_valid[:, None, :, None]
        rows = query_valid.to(q.dtype)
    weights = logits.softmax(-1).masked_fill(dead, 0)
    received = weights.sum((1, 2)) / (q.shape[1] * rows.sum(1, keepdim=True).clamp(min=1))
    return AttentionScores(received, None if v is None else torch.einsum("bhmn,bhnc->bhmc", weights, v))


def merge_tokens_eager(x: Tensor, assign: Tensor, slots: int, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``tokens`` and ``size`` of ``merge_tokens`` for a given assignment, with a flat ``index_add`` in x's dtype (the
    fastest of the eager forms)."""
    batch, _, dim = x.shape
    inside = assign >= 0
    weight = torch.ones_like(x[..., 0]) if weight is None else weight.to(x.dtype)
    weight = weight.masked_fill(~inside, 0)
    rows = (x.masked_fill(~inside[..., None], 0) * weight[..., None]).reshape(-1, dim)
    flat = (assign.clamp(min=0) + slots * torch.arange(batch, device=x.device)[:, None]).reshape(-1)
    size = x.new_zeros(batch * slots).index_add(0, flat, weight.reshape(-1))
    total = x.new_zeros(batch * slots, dim).index_add(0, flat, rows)
    mean = total / size.masked_fill(size == 0, 1)[:, None]
    return mean.view(batch, slots, dim), size.view(batch, slots)


def window_attention_eager(
    qkv: Tensor, bias: Tensor, windows: Windows, *, scale: Tensor | None = None, cosine: bool = False
) -> Tensor:
    """``window_attention`` one window after the other, each as small as it is, every step in the dtype of qkv."""
    width = (bias.shape[2] + 1) // 2
    factor = scale if scale is not None else qkv.new_tensor(1.0 if cosine else qkv.shape[3] ** -0.5)
    start = windows.start.tolist()
    outputs = [qkv.new_empty((0, *qkv.shape[2:]))]
    for part in (slice(*pair) for pair in pairwise(start)):
        q, k, v = qkv[windows.member[part]].permute(1, 2, 0, 3)  # [H, n, d]
        if cosine:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        row, column = windows.place[part] // width, windows.place[part] % width
        down = row[:, None] - row[None, :] + bias.shape[1] // 2
        across = column[:, None] - column[None, :] + bias.shape[2] // 2
        logits = q @ k.transpose(1, 2) * factor.to(q.dtype).view(-1, 1, 1) + bias[:, down, across].to(q.dtype)
        if windows.region is not None:
            region = windows.region[part]
            logits = logits - 100.0 * (region[:, None] != region[None, :]).to(q.dtype)
        outputs.append((logits.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)[windows.member.argsort()]
