"""Key tokens by the interquartile range, and gathering by their index: plain PyTorch.

Over the n valid scores of one sample, sorted ascending as a, with ``h = q * (n - 1)``::

    Q(q)      = a[floor(h)] + (h - floor(h)) * (a[floor(h) + 1] - a[floor(h)])      q = 1/4, 3/4; fp64
    threshold = Q(3/4) + fence * (Q(3/4) - Q(1/4))                                  multiply and add rounded separately
    keys      = the scores >= threshold, at least the best, at most K: the highest, then the lowest index

Source: Diao et al., ACL 2025 (arXiv 2506.01319), adaptive sparse merging; fence 1.5 is Tukey's outlier rule. The
quartiles are those of ``torch.quantile(..., interpolation="linear")``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_kernels._checks import InvalidValue, check_values
from sparsify_kernels._reference import segment_sum, without_autocast


def capacity_of(tokens: int, capacity: int | None) -> int:
    """K: the size of the upper quartile of ``tokens`` distinct scores, ``max(1, N - ceil(0.75 * (N - 1)))``, or a
    smaller ``capacity``."""
    quartile = torch.sym_max(1, tokens - (3 * tokens) // 4)  # ceil(3 (N - 1) / 4) = floor(3 N / 4)
    return quartile if capacity is None else torch.sym_min(quartile, capacity)


def key_tokens(scores: Tensor, valid: Tensor | None, fence: float, capacity: int | None) -> tuple[Tensor, Tensor]:
    """Returns ``(index, count)``: int64 [B, K] and [B]; arguments as in the public function.

    Raises ``InvalidValue`` for a NaN among the valid scores where values are checked; elsewhere it counts as -inf.
    """
    batch, tokens = scores.shape
    slots = capacity_of(tokens, capacity)
    if tokens == 0:
        return scores.new_full((batch, slots), -1, dtype=torch.int64), scores.new_zeros((batch,), dtype=torch.int64)
    if valid is None:
        valid = torch.ones_like(scores, dtype=torch.bool)
    check_scores(scores, valid)
    nan = scores.isnan() & valid

    # Adding 0 turns -0 into +0, which some sorts tell apart.
    clean = torch.where(valid & ~nan, scores.to(torch.float32) + 0.0, -torch.inf)
    order = torch.sort(clean, dim=1, descending=True, stable=True).indices
    behind = torch.sort((~valid).gather(1, order).to(torch.uint8), dim=1, stable=True).indices
    order = order.gather(1, behind)  # valid tokens first, by falling score, then by rising index

    n = valid.sum(1, keepdim=True)  # [B, 1]
    ranked = clean.gather(1, order).to(torch.float64)
    q1, q3 = _quartile(ranked, n, 1), _quartile(ranked, n, 3)
    spread = torch.where(q3 == q1, 0.0, q3 - q1)  # equal infinities have no spread
    threshold = q3 + spread * fence if fence > 0 else q3
    candidates = (valid & (clean.to(torch.float64) >= threshold)).sum(1)  # [B], a prefix of order
    count = torch.where(n[:, 0] > 0, candidates.clamp(min=1, max=slots), 0)

    taken = torch.arange(slots, device=scores.device) < count[:, None]
    index = torch.where(taken, order[:, :slots], tokens).sort(dim=1).values
    return torch.where(index == tokens, -1, index), count


def check_scores(scores: Tensor, valid: Tensor | None) -> None:
    """``InvalidValue`` for a NaN among the valid ``scores``, where values are checked."""
    if not check_values(scores.device):
        return
    nan = scores.isnan() if valid is None else scores.isnan() & valid
    if nan.any():
        sample, token = nan.nonzero()[0].tolist()
        raise InvalidValue(f"key_tokens: scores must not be NaN at valid tokens, got NaN at [{sample}, {token}]")


def _quartile(ranked: Tensor, n: Tensor, quarters: int) -> Tensor:
    """The quartile at ``quarters / 4`` of the first n [B, 1] of ``ranked`` [B, N] fp64, which falls; [B, 1].

    The branch at one half is that of ``torch.lerp``; with it the factor is 1/4 or 1/2, the product exact, and a fused
    multiply-add gives the same bits. An infinite neighbour wins over a finite one, where the formula would give inf -
    inf.
    """
    last = (n - 1).clamp(min=0)
    position = last * quarters  # in quarters of a rank
    low = position // 4
    part = (position % 4).to(torch.float64) / 4
    a = ranked.gather(1, last - low)
    b = ranked.gather(1, last - low - (part > 0).to(torch.int64))
    between = torch.where(part < 0.5, a + part * (b - a), b - (1 - part) * (b - a))
    between = torch.where(b == torch.inf, b, between)
    return torch.where((a == b) | (a == -torch.inf), a, between)


@without_autocast
def key_tokens_gather(x: Tensor, index: Tensor) -> Tensor:
    """``x`` [B, N, ...] at ``index`` [B, K]: [B, K, ...], zeros at -1.

    Raises ``InvalidValue`` for an index outside [-1, N) where values are checked; elsewhere its rows are NaN (0 for
    integers).
    """
    batch, tokens = x.shape[:2]
    check_index(index, tokens)
    bad = (index < -1) | (index >= tokens)
    ones = (1,) * (x.dim() - 2)
    nothing = torch.zeros((), dtype=x.dtype, device=x.device)
    wrong = torch.full_like(nothing, torch.nan) if x.dtype.is_floating_point else nothing
    blank = torch.where(bad, wrong, nothing).view(*index.shape, *ones)
    if tokens == 0:
        return blank.expand(*index.shape, *x.shape[2:]).contiguous()
    inside = (index >= 0) & ~bad
    sample = torch.arange(batch, device=x.device)[:, None]
    rows = x[sample, torch.where(inside, index, 0)]  # [B, K, ...]
    return torch.where(inside.view(*index.shape, *ones), rows, blank).contiguous()


def check_index(index: Tensor, tokens: int) -> None:
    """``InvalidValue`` for an ``index`` outside [-1, tokens), where values are checked."""
    if not check_values(index.device):
        return
    bad = (index < -1) | (index >= tokens)
    if bad.any():
        sample, slot = bad.nonzero()[0].tolist()
        raise InvalidValue(
            f"gather_tokens: index must be in [-1, {tokens}), got {index[sample, slot].item()} at [{sample}, {slot}]"
        )


@without_autocast
def key_tokens_gather_backward(grad: Tensor, index: Tensor, tokens: int) -> Tensor:
    """The sum of ``grad`` [B, K, ...] over the slots of each token: [B, N, ...]; indices outside [0, N) get nothing."""
    dx = grad.new_zeros((grad.shape[0], tokens, *grad.shape[2:]))
    inside = torch.where(index < tokens, index, -1)
    acc = torch.promote_types(grad.dtype, torch.float32)
    for b in range(grad.shape[0]):
        dx[b] = segment_sum(grad[b].to(acc), inside[b], tokens).to(grad.dtype)
    return dx
