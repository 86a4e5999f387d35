"""What the ops mean, in plain Python loops over fp64 numbers. Independent of the implementations; slow, for small
shapes.

Each has the signature and the result of the public function, in fp64, so that a test is a swap.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sparsify_kernels.attention_scores.op import AttentionScores
from sparsify_kernels.key_tokens.op import KeyTokens
from sparsify_kernels.merge_tokens.op import MergedTokens
from sparsify_kernels.window_attention.op import Windows

__all__ = [
    "attention_scores_oracle",
    "gather_tokens_oracle",
    "key_tokens_oracle",
    "merge_tokens_oracle",
    "window_attention_oracle",
]


def attention_scores_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    query_valid: Tensor | None = None,
    key_valid: Tensor | None = None,
) -> AttentionScores:
    """``attention_scores`` one weight at a time."""
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    width = 0 if v is None else v.shape[3]
    factor = 1.0 / math.sqrt(dim) if scale is None else scale
    received = [[0.0] * keys for _ in range(batch)]
    output = [[[[0.0] * width for _ in range(queries)] for _ in range(heads)] for _ in range(batch)]
    qs, ks, vs, biases = _numbers(q), _numbers(k), _numbers(v), _numbers(key_bias)
    for b in range(batch):
        rows = [i for i in range(queries) if query_valid is None or bool(query_valid[b, i])]
        columns = [j for j in range(keys) if key_valid is None or bool(key_valid[b, j])]
        for h in range(heads):
            for i in rows:
                logits = []
                for j in columns:
                    dot = math.fsum(a * c for a, c in zip(qs[b][h][i], ks[b][h][j], strict=True))
                    logits.append(factor * dot + (0.0 if biases is None else biases[b][j]))
                top = max(logits, default=-math.inf)
                if top == -math.inf:
                    continue
                weights = [math.exp(logit - top) for logit in logits]
                total = math.fsum(weights)
                for j, weight in zip(columns, weights, strict=True):
                    received[b][j] += weight / total / (heads * len(rows))
                    for c in range(width):
                        output[b][h][i][c] += weight / total * vs[b][h][j][c]
    result = torch.tensor(received, dtype=torch.float64, device=q.device).view(batch, keys)
    if v is None:
        return AttentionScores(result, None)
    shape = (batch, heads, queries, width)
    return AttentionScores(result, torch.tensor(output, dtype=torch.float64, device=q.device).view(shape))


def key_tokens_oracle(
    scores: Tensor, *, fence: float = 0.0, capacity: int | None = None, valid: Tensor | None = None
) -> KeyTokens:
    """``key_tokens`` one sample and one score at a time; a NaN score counts as -inf."""
    batch, tokens = scores.shape
    slots = max(1, tokens - math.ceil(0.75 * (tokens - 1)))
    slots = slots if capacity is None else min(slots, capacity)
    index, count = [], []
    for b in range(batch):
        row = scores[b].to(torch.float32).tolist()
        row = [-math.inf if math.isnan(s) else s for s in row]
        there = [i for i in range(tokens) if valid is None or bool(valid[b, i])]
        chosen = []
        if there:
            ranked = sorted(row[i] for i in there)
            q1, q3 = _quartile(ranked, 0.25), _quartile(ranked, 0.75)
            threshold = q3
            if fence > 0 and q3 > q1:
                product = fence * (q3 - q1)
                threshold = q3 + product
            best_first = sorted(there, key=lambda i: (-row[i], i))
            chosen = [i for i in best_first if row[i] >= threshold][:slots] or best_first[:1]
        index.append(sorted(chosen) + [-1] * (slots - len(chosen)))
        count.append(len(chosen))
    as_index = torch.tensor(index, dtype=torch.int64, device=scores.device).view(batch, slots)
    return KeyTokens(as_index, torch.tensor(count, dtype=torch.int64, device=scores.device))


def gather_tokens_oracle(x: Tensor, index: Tensor) -> Tensor:
    """``gather_tokens`` one slot at a time; an index out of range gives NaN, 0 for integers."""
    result = torch.zeros((*index.shape, *x.shape[2:]), dtype=x.dtype, device=x.device)
    for b, row in enumerate(index.tolist()):
        for j, i in enumerate(row):
            if 0 <= i < x.shape[1]:
                result[b, j] = x[b, i]
            elif i != -1 and x.dtype.is_floating_point:
                result[b, j] = torch.nan
    return result


def merge_tokens_oracle(
    x: Tensor,
    metric: Tensor,
    keys: KeyTokens,
    *,
    weight: Tensor | None = None,
    valid: Tensor | None = None,
) -> MergedTokens:
    """``merge_tokens`` one token at a time; similarities are rounded to fp32 before they are compared. Valid keys and
    weights only."""
    batch, tokens, dim = x.shape
    slots = keys.index.shape[1]
    merged = torch.zeros((batch, slots, dim), dtype=torch.float64)
    size = torch.zeros((batch, slots), dtype=torch.float64)
    assign = torch.full((batch, tokens), -1, dtype=torch.int64)
    xs, metrics, weights = _numbers(x), _numbers(metric), _numbers(weight)
    for b in range(batch):
        key = keys.index[b, : int(keys.count[b])].tolist()
        members: list[list[int]] = [[] for _ in range(slots)]
        for i in range(tokens):
            if valid is not None and not bool(valid[b, i]):
                continue
            slot = key.index(i) if i in key else _most_similar(metrics[b], i, key)
            assign[b, i] = slot
            members[slot].append(i)
        for j in range(slots):
            own = [1.0 if weights is None else weights[b][i] for i in members[j]]
            total = math.fsum(own)
            size[b, j] = total
            for c in range(dim if total > 0 else 0):
                merged[b, j, c] = math.fsum(w * xs[b][i][c] for w, i in zip(own, members[j], strict=True)) / total
    return MergedTokens(merged.to(x.device), size.to(x.device), assign.to(x.device))


def _most_similar(metric: list[list[float]], token: int, key: list[int]) -> int:
    best, best_slot = -math.inf, 0
    for slot, other in enumerate(key):
        dot = math.fsum(a * c for a, c in zip(metric[token], metric[other], strict=True))
        similarity = torch.tensor(dot, dtype=torch.float64).to(torch.float32).item()
        if similarity > best:
            best, best_slot = similarity, slot
    return best_slot


def window_attention_oracle(
    qkv: Tensor, bias: Tensor, windows: Windows, *, scale: Tensor | None = None, cosine: bool = False
) -> Tensor:
    """``window_attention`` one pair of tokens at a time."""
    tokens, _, heads, dim = qkv.shape
    width = (bias.shape[2] + 1) // 2
    rows, table = _numbers(qkv), _numbers(bias)
    factors = [1.0 if cosine else dim**-0.5] * heads if scale is None else _numbers(scale)
    output = torch.zeros((tokens, heads, dim), dtype=torch.float64)
    member, start, place = windows.member.tolist(), windows.start.tolist(), windows.place.tolist()
    region = [0] * tokens if windows.region is None else windows.region.tolist()
    for begin, end in pairwise(start):
        for h in range(heads):
            for i in range(begin, end):
                logits = []
                for j in range(begin, end):
                    q, k = rows[member[i]][0][h], rows[member[j]][1][h]
                    dot = math.fsum(a * b for a, b in zip(q, k, strict=True))
                    if cosine:
                        dot /= max(math.hypot(*q), 1e-12) * max(math.hypot(*k), 1e-12)
                    down = place[i] // width - place[j] // width + bias.shape[1] // 2
                    across = place[i] % width - place[j] % width + bias.shape[2] // 2
                    apart = -100.0 if region[i] != region[j] else 0.0
                    logits.append(factors[h] * dot + table[h][down][across] + apart)
                weights = [math.exp(logit - max(logits)) for logit in logits]
                for j, weight in zip(range(begin, end), weights, strict=True):
                    value = torch.tensor(rows[member[j]][2][h], dtype=torch.float64)
                    output[member[i], h] += weight / math.fsum(weights) * value
    return output.to(qkv.device)


def _quartile(ranked: list[float], q: float) -> float:
    """The linear quantile of an ascending list, with the limits of the formula where a neighbour is infinite."""
    position = q * (len(ranked) - 1)
    below = math.floor(position)
    part = position - below
    low = ranked[below]
    if part == 0:
        return low
    high = ranked[below + 1]
    if low == high or low == -math.inf:
        return low
    if high == math.inf:
        return high
    if part < 0.5:
        return low + part * (high - low)
    return high - (1 - part) * (high - low)


def _numbers(t: Tensor | None) -> Any:
    """Nested lists of Python floats: fp64, whatever the tensor holds."""
    return None if t is None else t.detach().cpu().to(torch.float64).tolist()
