"""Merging every token into its most similar key token: plain PyTorch.

With the key tokens ``key[0..count)`` of a sample, over its valid tokens i and live slots j::

    assign[i]  = argmax_j metric[i] . metric[key[j]]         in fp32; a key joins itself; ties to the lower slot
    size[j]    = sum_{i: assign[i] = j} w[i]
    tokens[j]  = sum_{i: assign[i] = j} w[i] x[i] / size[j]   0 where size[j] = 0

Backward, from the gradients gT of tokens and gS of size, with j = assign[i] (0 where size[j] = 0)::

    dx[i]      = w[i] / size[j] * gT[j]
    dw[i]      = (x[i] - tokens[j]) . gT[j] / size[j] + gS[j]

Source: Diao et al., ACL 2025 (arXiv 2506.01319), adaptive sparse merging. This form holds the N x K similarity of one
sample at a time; samples are computed one by one so that a sample's bits do not depend on its batch-mates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_kernels._checks import InvalidValue, check_values
from sparsify_kernels._reference import accumulation_dtype, masked, segment_sum, without_autocast


@without_autocast
def merge_tokens(
    x: Tensor, metric: Tensor, index: Tensor, count: Tensor, weight: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``(tokens, size, assign)``; arguments as in the public function, ``weight`` in the accumulation dtype.

    Raises ``InvalidValue`` for a bad key or weight where values are checked. Elsewhere tokens and size of that sample
    are NaN, and after a bad key its assign is -1.
    """
    batch, tokens, dim = x.shape
    slots = index.shape[1]
    alive = _valid(x, valid)
    bad_key = _bad_keys(index, count, alive)
    bad_weight = torch.zeros_like(bad_key)
    if weight is not None:
        bad_weight = (alive & ~(weight.isfinite() & (weight >= 0))).any(1)
    if check_values(x.device) and (bad_key | bad_weight).any():
        raise InvalidValue(_complaint(index, count, weight, alive))

    dtype = accumulation_dtype(x.dtype)
    merged = x.new_zeros((batch, slots, dim))
    size = x.new_zeros((batch, slots), dtype=dtype)
    assign = index.new_full((batch, tokens), -1)
    for b in range(batch):
        if tokens > 0:
            assign[b] = torch.where(alive[b] & ~bad_key[b], _nearest(metric[b], index[b], count[b], alive[b]), -1)
        rows = masked(x[b].to(dtype), alive[b])
        w = torch.where(alive[b], 1.0 if weight is None else weight[b], 0.0).to(dtype)
        total = segment_sum(rows * w[:, None], assign[b], slots)
        size[b] = segment_sum(w, assign[b], slots)
        merged[b] = masked(total / size[b][:, None], size[b] > 0).to(x.dtype)
    bad = bad_key | bad_weight
    return merged.masked_fill_(bad[:, None, None], torch.nan), size.masked_fill_(bad[:, None], torch.nan), assign


@without_autocast
def merge_tokens_backward(
    grad_tokens: Tensor | None,
    grad_size: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    tokens: Tensor,
    size: Tensor,
    assign: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """Returns ``(dx, dweight)`` in the dtypes of x and size; one not ``wanted`` is an empty tensor [0].

    ``x`` is needed for dweight alone, and None otherwise: a step that learns no weights need not keep it. ``tokens``,
    ``size`` and ``assign`` are the forward's. A sample whose tokens are NaN (see the forward) gets gradient 0.
    """
    batch, length = assign.shape
    dim = tokens.shape[2]
    dx = tokens.new_zeros((batch, length, dim)) if wanted[0] else tokens.new_empty(0)
    dweight = size.new_zeros((batch, length)) if wanted[1] else size.new_empty(0)
    for b in range(batch):
        slot = assign[b].clamp(min=0)  # [N]
        live = (size[b] > 0)[slot] & (assign[b] >= 0)
        grad = size.new_zeros((length, dim))
        if grad_tokens is not None:
            grad = masked((grad_tokens[b].to(size.dtype) / size[b][:, None])[slot], live)
        if wanted[0]:
            w = torch.where(live, 1.0 if weight is None else weight[b], 0.0).to(size.dtype)
            dx[b] = (grad * w[:, None]).to(dx.dtype)
        if wanted[1] and x is not None:
            away = x[b].to(size.dtype) - tokens[b].to(size.dtype)[slot]
            d = (away * grad).sum(-1)
            dweight[b] = torch.where(live, d if grad_size is None else d + grad_size[b][slot], 0.0)
    return dx, dweight


def _nearest(metric: Tensor, index: Tensor, count: Tensor, alive: Tensor) -> Tensor:
    """The slot [N] of the most similar key of each token of one sample; a NaN similarity counts as -inf."""
    tokens, slots = metric.shape[0], index.shape[0]
    used = torch.arange(slots, device=index.device) < count
    key = torch.where(used & (index >= 0) & (index < tokens), index, 0)
    # A copy even without a mask: the rounding of a matrix product depends on how its operands are aligned.
    rows = masked(metric.to(accumulation_dtype(metric.dtype)), alive).contiguous()
    similarity = torch.matmul(rows, rows[key].T).to(torch.float32)  # [N, K]
    similarity = torch.where(used & ~similarity.isnan(), similarity, -torch.inf)
    own = used & (key == torch.arange(tokens, device=index.device)[:, None])
    return torch.where(own.any(1), own.to(torch.uint8).argmax(1), similarity.argmax(1))


def _valid(x: Tensor, valid: Tensor | None) -> Tensor:
    return x.new_ones(x.shape[:2], dtype=torch.bool) if valid is None else valid


def _bad_keys(index: Tensor, count: Tensor, alive: Tensor) -> Tensor:
    """Samples [B] with a key that is no valid token, a count outside [0, K], or valid tokens and no key."""
    used = torch.arange(index.shape[1], device=index.device) < count[:, None]
    bad_count = (count < 0) | (count > index.shape[1]) | ((count == 0) & alive.any(1))
    return bad_count | (used & ~_is_valid_token(index, alive)).any(1)


def _is_valid_token(index: Tensor, alive: Tensor) -> Tensor:
    """Whether each of ``index`` [B, K] names a valid token."""
    tokens = alive.shape[1]
    inside = (index >= 0) & (index < tokens)
    if tokens == 0:
        return inside
    return inside & alive.gather(1, torch.where(inside, index, 0))


def _complaint(index: Tensor, count: Tensor, weight: Tensor | None, alive: Tensor) -> str:
    """The sentence about the first bad value."""
    tokens, slots = alive.shape[1], index.shape[1]
    for b, c in enumerate(count.tolist()):
        if not 0 <= c <= slots:
            return f"merge_tokens: keys.count must be in [0, {slots}], got {c} at [{b}]"
        if c == 0 and bool(alive[b].any()):
            return f"merge_tokens: keys.count must be at least 1 where a sample has valid tokens, got 0 at [{b}]"
        named = index[b, :c].tolist()
        for j, (i, good) in enumerate(zip(named, _is_valid_token(index, alive)[b, :c].tolist(), strict=True)):
            if not 0 <= i < tokens:
                return f"merge_tokens: keys.index must be in [0, {tokens}) below keys.count, got {i} at [{b}, {j}]"
            if not good:
                return f"merge_tokens: keys.index must name valid tokens below keys.count, got {i} at [{b}, {j}]"
    if weight is None:
        raise AssertionError("called without a bad value")
    wrong = alive & ~(weight.isfinite() & (weight >= 0))
    b, i = wrong.nonzero()[0].tolist()
    return f"merge_tokens: weight must be finite and >= 0 at valid tokens, got {weight[b, i].item()} at [{b}, {i}]"
