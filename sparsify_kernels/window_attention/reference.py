"""Attention inside windows of packed tokens: plain PyTorch.

For head h and two tokens i, j of one window, standing at row and column (r, c) of a window of wh x ww places::

    S[h, i, j]  = scale[h] * q[i, h] . k[j, h] + bias[h, r_i - r_j + wh - 1, c_i - c_j + ww - 1]
                  - 100 where region[i] != region[j]
    P[h, i, :]  = softmax of S[h, i, :] over the tokens j of the window that are there
    output[i,h] = sum_j P[h, i, j] v[j, h]

with q / |q| and k / |k| in place of q and k for ``cosine``. Backward, from the gradient ``gO`` of output::

    gP[h, i, j] = gO[i, h] . v[j, h]
    gS          = P * (gP - sum_j P * gP)
    dq, dk, dv  = scale * gS k,  scale * gS^T q,  P^T gO
    dbias       = gS summed over the pairs of all windows that stand to each other alike
    dscale[h]   = sum of gS[h, i, j] * q[i, h] . k[j, h]

and for ``cosine`` dx = (g - x^ (x^ . g)) / |x| from the gradient g of the direction x^ = x / |x|. Sources: Liu et al.,
Swin Transformer (arXiv 2103.14030), equation 4 and the mask of section 3.2; Swin Transformer V2 (arXiv 2111.09883),
equation 2.

This form puts every token at its place in a dense window of wh * ww places, the others empty, and holds the pairs of
all windows at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsify_kernels._checks import InvalidValue, check_values
from sparsify_kernels._reference import accumulation_dtype, segment_sum, without_autocast

WRAP_PENALTY = -100.0  # of Swin's and HTS-AT's own masks; finite, so that a token alone in its region sees others a bit
SMALLEST_NORM = 1e-12  # as in torch.nn.functional.normalize


class _Dense(NamedTuple):
    """Windows with every place: W windows of P places, H heads of d channels."""

    slot: Tensor  # int64 [N]: window * P + place of each member
    row: Tensor  # int64 [N]: the token of each member, in range
    bad: Tensor  # bool []: the windows are no partition of the tokens
    q: Tensor  # [W, H, P, d]; its direction where cosine
    k: Tensor  # likewise
    v: Tensor  # [W, H, P, d]
    norms: tuple[Tensor, ...]  # two [W, H, P, 1] where cosine: lengths of the q and k that came
    probability: Tensor  # [W, H, P, P]: 0 in rows and columns of empty places
    lse: Tensor  # [W, H, P]


@without_autocast
def window_attention(
    qkv: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    member: Tensor,
    start: Tensor,
    place: Tensor,
    region: Tensor | None,
    cosine: bool,
) -> tuple[Tensor, Tensor]:
    """Returns ``(output, lse)``: [N, H, d] in the dtype of qkv, and the log-sum-exp of the logits of each row [N, H]
    in the accumulation dtype. Arguments as in the public function, bias and scale in the accumulation dtype.

    Raises ``InvalidValue`` where values are checked and the windows are no partition of the tokens; elsewhere
    everything is NaN.
    """
    dense = _dense(qkv, bias, scale, member, start, place, region, cosine)
    if check_values(qkv.device) and bool(dense.bad):
        raise InvalidValue(complaint(bias, member, start, place))
    output = qkv.new_zeros((qkv.shape[0], *qkv.shape[2:]))
    lse = dense.lse.new_zeros(output.shape[:2])
    output[dense.row] = _rows(torch.matmul(dense.probability, dense.v), dense.slot).to(output.dtype)
    lse[dense.row] = _rows(dense.lse.unsqueeze(-1), dense.slot).squeeze(-1)
    return output.masked_fill_(dense.bad, torch.nan), lse.masked_fill_(dense.bad, torch.nan)


@without_autocast
def window_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    member: Tensor,
    start: Tensor,
    place: Tensor,
    region: Tensor | None,
    lse: Tensor,
    cosine: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``(dqkv, dbias, dscale)`` in the dtypes of qkv, bias and bias; one not ``wanted`` is an empty tensor [0].

    ``lse`` is the forward's: with it a kernel rebuilds P. This form recomputes P whole instead, which is a little more
    accurate.
    """
    dense = _dense(qkv, bias, scale, member, start, place, region, cosine)
    if check_values(qkv.device) and bool(dense.bad):
        raise InvalidValue(complaint(bias, member, start, place))
    factor = _factor(scale, qkv, cosine)
    windows, heads, places, dim = dense.v.shape
    grads = _placed(grad.to(dense.v.dtype)[dense.row], dense.slot, windows, places)  # [W, H, P, d]
    grad_p = torch.matmul(grads, dense.v.transpose(-1, -2))
    grad_s = dense.probability * (grad_p - (dense.probability * grad_p).sum(-1, keepdim=True))
    dqkv, dbias, dscale = qkv.new_empty(0), bias.new_empty(0), bias.new_empty(0)
    if wanted[0]:
        dq, dk = torch.matmul(grad_s, dense.k) * factor, torch.matmul(grad_s.transpose(-1, -2), dense.q) * factor
        if cosine:
            dq, dk = (
                _through_direction(g, x, n) for g, x, n in zip((dq, dk), (dense.q, dense.k), dense.norms, strict=True)
            )
        parts = [dq, dk, torch.matmul(dense.probability.transpose(-1, -2), grads)]
        dqkv = qkv.new_zeros((qkv.shape[0], 3, heads, dim))
        dqkv[dense.row] = torch.stack([_rows(x, dense.slot) for x in parts], dim=1).to(qkv.dtype)
        dqkv.masked_fill_(dense.bad, torch.nan)
    if wanted[1]:
        pairs = grad_s.sum(0).flatten(1).T  # [P * P, H]
        total = segment_sum(pairs, _relative(bias).flatten(), bias.shape[1] * bias.shape[2])
        dbias = total.T.reshape(bias.shape).masked_fill(dense.bad, torch.nan)
    if wanted[2]:
        dots = torch.matmul(dense.q, dense.k.transpose(-1, -2))
        dscale = (grad_s * dots).sum((0, 2, 3)).masked_fill(dense.bad, torch.nan)
    return dqkv, dbias, dscale


def complaint(bias: Tensor, member: Tensor, start: Tensor, place: Tensor) -> str:
    """The sentence about the first bad value."""
    tokens, places = len(member), _places(bias)
    starts, members = start.tolist(), member.tolist()
    for w, (begin, end) in enumerate(zip([0, *starts], [*starts, tokens], strict=True)):
        if end < begin or (w == 0 and end != 0) or (w == len(starts) and end != begin):
            return f"window_attention: windows.start must rise from 0 to the {tokens} tokens, got {starts}"
    seen: set[int] = set()
    for i, row in enumerate(members):
        if not 0 <= row < tokens or row in seen:
            return f"window_attention: windows.member must name each of {tokens} tokens once, got {row} at [{i}]"
        seen.add(row)
    for w in range(len(starts) - 1):
        taken: set[int] = set()
        for i in range(starts[w], starts[w + 1]):
            at = int(place[i])
            if not 0 <= at < places or at in taken:
                return (
                    f"window_attention: windows.place must be in [0, {places}), each once a window, got {at} at [{i}]"
                )
            taken.add(at)
    raise AssertionError("called without a bad value")


def _dense(
    qkv: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    member: Tensor,
    start: Tensor,
    place: Tensor,
    region: Tensor | None,
    cosine: bool,
) -> _Dense:
    tokens, windows, places = qkv.shape[0], start.shape[0] - 1, _places(bias)
    # int64 [N]: the window of each member; W for members beyond the last start
    window = torch.bucketize(torch.arange(tokens, device=start.device), start[1:].contiguous(), right=True)
    bad = _bad(member, window, start, place, places)
    slot = window.clamp(max=max(windows - 1, 0)) * places + place.clamp(0, places - 1)
    row = member.clamp(0, max(tokens - 1, 0))
    x = qkv[row].to(accumulation_dtype(qkv.dtype))  # [N, 3, H, d]
    q, k, v = (_placed(x[:, i], slot, windows, places) for i in range(3))
    norms: tuple[Tensor, ...] = ()
    if cosine:
        norms = q.norm(dim=-1, keepdim=True), k.norm(dim=-1, keepdim=True)
        q, k = (part / norm.clamp(min=SMALLEST_NORM) for part, norm in zip((q, k), norms, strict=True))
    there = torch.zeros(windows * places, dtype=torch.bool, device=qkv.device)
    there[slot] = True
    there = there.view(windows, 1, places)
    logits = torch.matmul(q, k.transpose(-1, -2)) * _factor(scale, qkv, cosine) + bias.flatten(1)[:, _relative(bias)]
    if region is not None:
        parts = torch.zeros(windows * places, dtype=region.dtype, device=region.device)
        parts[slot] = region
        parts = parts.view(windows, 1, places)
        logits = logits + torch.where(parts.unsqueeze(-1) != parts.unsqueeze(-2), WRAP_PENALTY, 0.0).to(logits.dtype)
    logits = torch.where(there.unsqueeze(-2), logits, -torch.inf)
    # A select, not a product: an empty window has no finite logit, and its softmax is NaN.
    probability = torch.where(there.unsqueeze(-1), torch.softmax(logits, dim=-1), 0.0)
    return _Dense(slot, row, bad, q, k, v, norms, probability, torch.logsumexp(logits, dim=-1))


def _bad(member: Tensor, window: Tensor, start: Tensor, place: Tensor, places: int) -> Tensor:
    """bool []: whether the windows are no partition of the tokens, or a place is taken twice or does not exist."""
    tokens, windows = member.shape[0], start.shape[0] - 1
    inside = (member >= 0) & (member < tokens) & (place >= 0) & (place < places) & (window < windows)
    named = start.new_zeros(tokens).index_add(0, torch.where(inside, member, 0), inside.to(start.dtype))
    taken = start.new_zeros(max(windows * places, 1))
    taken = taken.index_add(0, torch.where(inside, window * places + place, 0), inside.to(start.dtype))
    falling = (start.diff() < 0).any() | (start[0] != 0) | (start[-1] != tokens)
    return falling | (named != 1).any() | (taken > 1).any()


def _places(bias: Tensor) -> int:
    return (bias.shape[1] + 1) // 2 * ((bias.shape[2] + 1) // 2)


def _relative(bias: Tensor) -> Tensor:
    """int64 [P, P]: where in the flattened table the bias of query place i and key place j stands."""
    height, width = (bias.shape[1] + 1) // 2, (bias.shape[2] + 1) // 2
    place = torch.arange(height * width, device=bias.device)
    row, column = place // width, place % width
    rows = row[:, None] - row[None, :] + height - 1
    return rows * bias.shape[2] + column[:, None] - column[None, :] + width - 1


def _factor(scale: Tensor | None, qkv: Tensor, cosine: bool) -> Tensor | float:
    """What the dot products are multiplied by: [H, 1, 1], or a number."""
    if scale is None:
        return 1.0 if cosine else qkv.shape[3] ** -0.5
    return scale[:, None, None]


def _placed(rows: Tensor, slot: Tensor, windows: int, places: int) -> Tensor:
    """Rows [N, H, d] at their slots, zeros elsewhere: [W, H, P, d]."""
    dense = rows.new_zeros((windows * places, *rows.shape[1:]))
    dense[slot] = rows
    return dense.view(windows, places, *rows.shape[1:]).transpose(1, 2).contiguous()


def _rows(dense: Tensor, slot: Tensor) -> Tensor:
    """The inverse: [W, H, P, d] to [N, H, d]."""
    return dense.transpose(1, 2).flatten(0, 1)[slot]


def _through_direction(grad: Tensor, direction: Tensor, norm: Tensor) -> Tensor:
    """The gradient of x from that of x / max(|x|, smallest); below the smallest norm the divisor is a constant."""
    along = direction * (direction * grad).sum(-1, keepdim=True)
    return torch.where(norm > SMALLEST_NORM, grad - along, grad) / norm.clamp(min=SMALLEST_NORM)
