"""Inputs for the ops: seeded, in any dtype, with invalid positions that hold NaN, in layouts that are not
contiguous."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify_kernels.key_tokens.op import KeyTokens
from sparsify_kernels.testing.shapes import AttentionShape, KeyShape, MergeShape, WindowShape
from sparsify_kernels.window_attention.op import Windows

__all__ = [
    "LAYOUTS",
    "SCORE_KINDS",
    "attention_inputs",
    "merge_inputs",
    "merge_keys",
    "relayout",
    "score_inputs",
    "window_inputs",
]

LAYOUTS = ("contiguous", "permuted", "strided", "offset")

SCORE_KINDS = ("distinct", "ties", "equal", "step", "outlier", "sorted", "wide")


def attention_inputs(
    shape: AttentionShape,
    dtype: torch.dtype = torch.float32,
    *,
    device: str | torch.device = "cpu",
    bias: bool = False,
    valid: bool = False,
    poison: bool = False,
    layout: str = "contiguous",
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of ``attention_scores``; with ``valid``, the first sample has no valid key and the second no
    valid query.

    ``poison`` puts NaN at invalid positions. v is None where ``shape.value_dim`` is 0.
    """
    g = torch.Generator().manual_seed(seed)
    batch, heads, queries, keys, dim, value_dim = shape
    q = torch.randn((batch, heads, queries, dim), generator=g, dtype=torch.float64)
    k = torch.randn((batch, heads, keys, dim), generator=g, dtype=torch.float64)
    v = torch.randn((batch, heads, keys, value_dim), generator=g, dtype=torch.float64) if value_dim else None
    key_bias = torch.randn((batch, keys), generator=g, dtype=torch.float64) if bias else None
    query_valid = _some_valid((batch, queries), g, none=1) if valid else None
    key_valid = _some_valid((batch, keys), g, none=0) if valid else None
    if poison and query_valid is not None and key_valid is not None:
        q[~query_valid[:, None, :].expand(batch, heads, queries)] = torch.nan
        for t in (k, v):
            if t is not None:
                t[~key_valid[:, None, :].expand(batch, heads, keys)] = torch.nan
        if key_bias is not None:
            key_bias[~key_valid] = torch.nan
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32

    def place(t: Tensor | None, to: torch.dtype) -> Tensor | None:
        return None if t is None else relayout(t.to(device=device, dtype=to), layout)

    return {
        "q": place(q, dtype),
        "k": place(k, dtype),
        "v": place(v, dtype),
        "key_bias": place(key_bias, accumulation),
        "query_valid": place(query_valid, torch.bool),
        "key_valid": place(key_valid, torch.bool),
    }


def score_inputs(
    shape: KeyShape,
    kind: str = "distinct",
    dtype: torch.dtype = torch.float32,
    *,
    device: str | torch.device = "cpu",
    valid: bool = False,
    poison: bool = False,
    layout: str = "contiguous",
    seed: int = 0,
) -> dict[str, Any]:
    """``scores`` and ``valid`` of ``key_tokens``. Kinds: ``distinct``; ``ties`` (a few values); ``equal``; ``step``
    (all equal but one, a rounding step above); ``outlier`` (one far above); ``sorted`` (rising); ``wide`` (magnitudes
    from 1e-30 to 1e30, fewer in fp16).
    """
    g = torch.Generator().manual_seed(seed)
    batch, tokens = shape
    scores = torch.rand((batch, tokens), generator=g, dtype=torch.float64)
    if kind == "ties":
        scores = (scores * 4).floor() / 4
    elif kind in ("equal", "step"):
        scores = torch.full_like(scores, 0.3)
    elif kind == "outlier":
        scores[:, tokens // 2 : tokens // 2 + 1] = 50.0
    elif kind == "sorted":
        scores = scores.sort(dim=1).values
    elif kind == "wide":
        scores = (scores - 0.5) * 10 ** (60 * torch.rand((batch, tokens), generator=g, dtype=torch.float64) - 30)
        scores = scores.clamp(-3e4, 3e4) if dtype == torch.float16 else scores
    elif kind != "distinct":
        raise ValueError(f"score_inputs: kind must be one of {SCORE_KINDS}, got {kind!r}")
    scores = scores.to(dtype)
    if kind == "step" and tokens:
        middle = tokens // 2
        scores[:, middle] = torch.nextafter(scores[:, middle], torch.full_like(scores[:, middle], torch.inf))
    mask = _some_valid((batch, tokens), g, none=1) if valid else None
    if poison and mask is not None:
        scores[~mask] = torch.nan
    return {
        "scores": relayout(scores.to(device), layout),
        "valid": None if mask is None else relayout(mask.to(device), layout),
    }


def merge_inputs(
    shape: MergeShape,
    dtype: torch.dtype = torch.float32,
    *,
    device: str | torch.device = "cpu",
    weight: bool = False,
    valid: bool = False,
    poison: bool = False,
    exact: bool = True,
    layout: str = "contiguous",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of ``merge_tokens``; with ``valid``, the second sample has no valid token; with ``weight``, some
    weights are 0.

    ``exact``: the metric holds small integers, so that every dtype and backend computes the same dot products, with
    many ties.
    """
    g = torch.Generator().manual_seed(seed)
    batch, tokens, slots, dim, metric_dim = shape
    x = torch.randn((batch, tokens, dim), generator=g, dtype=torch.float64)
    if exact:
        metric = torch.randint(-3, 4, (batch, tokens, metric_dim), generator=g).to(torch.float64)
    else:
        metric = torch.randn((batch, tokens, metric_dim), generator=g, dtype=torch.float64)
    w = None
    if weight:
        w = torch.randint(0, 4, (batch, tokens), generator=g).to(torch.float64) * 0.75
    mask = _some_valid((batch, tokens), g, none=1) if valid else None
    keys = merge_keys(torch.ones((batch, tokens), dtype=torch.bool) if mask is None else mask, slots, g)
    if poison and mask is not None:
        x[~mask] = torch.nan
        metric[~mask] = torch.nan
        if w is not None:
            w[~mask] = -torch.inf
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": relayout(x.to(device=device, dtype=dtype), layout),
        "metric": relayout(metric.to(device=device, dtype=dtype), layout),
        "keys": KeyTokens(relayout(keys.index.to(device), layout), relayout(keys.count.to(device), layout)),
        "weight": None if w is None else relayout(w.to(device=device, dtype=accumulation), layout),
        "valid": None if mask is None else relayout(mask.to(device), layout),
    }


def window_inputs(
    shape: WindowShape,
    dtype: torch.dtype = torch.float32,
    *,
    device: str | torch.device = "cpu",
    scale: bool = False,
    region: bool = False,
    cosine: bool = False,
    layout: str = "contiguous",
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of ``window_attention``: tokens at random places of random windows, in random order."""
    g = torch.Generator().manual_seed(seed)
    tokens, windows, height, width, heads, dim = shape
    places = height * width
    qkv = torch.randn((tokens, 3, heads, dim), generator=g, dtype=torch.float64)
    bias = torch.randn((heads, 2 * height - 1, 2 * width - 1), generator=g, dtype=torch.float64)
    factor = torch.rand((heads,), generator=g, dtype=torch.float64) + 0.5 if scale else None
    cells = torch.randperm(windows * places, generator=g)[:tokens].sort().values
    start = torch.searchsorted(cells, torch.arange(windows + 1) * places)
    parts = torch.randint(0, 3, (tokens,), generator=g) if region else None
    member = torch.randperm(tokens, generator=g)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32

    def place(t: Tensor | None, to: torch.dtype = torch.int64) -> Any:
        return None if t is None else relayout(t.to(device=device, dtype=to), layout)

    return {
        "qkv": place(qkv, dtype),
        "bias": place(bias, accumulation),
        "windows": Windows(place(member), place(start), place(cells % places), place(parts)),
        "scale": place(factor, accumulation),
        "cosine": cosine,
    }


def merge_keys(valid: Tensor, slots: int, generator: torch.Generator) -> KeyTokens:
    """Random key tokens among the ``valid`` [B, N] ones: as many as fit, in ``slots`` slots."""
    batch = valid.shape[0]
    index = torch.full((batch, slots), -1, dtype=torch.int64)
    count = torch.zeros((batch,), dtype=torch.int64)
    for b in range(batch):
        there = valid[b].nonzero()[:, 0]
        chosen = there[torch.randperm(len(there), generator=generator)][:slots].sort().values
        index[b, : len(chosen)] = chosen
        count[b] = len(chosen)
    return KeyTokens(index, count)


def relayout(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout: ``permuted`` (axes in reverse), ``strided`` (every second element) or
    ``offset`` (inside a larger buffer, not at its start).
    """
    if layout == "contiguous":
        return x.contiguous()
    if layout == "permuted":
        axes = tuple(reversed(range(x.dim())))
        return x.permute(axes).contiguous().permute(axes)
    if layout == "strided":
        return torch.stack((x, x), dim=-1)[..., 0]
    if layout == "offset":
        buffer = x.new_zeros(x.numel() + 3)
        buffer[3:] = x.reshape(-1)
        return buffer[3:].view(x.shape)
    raise ValueError(f"relayout: layout must be one of {LAYOUTS}, got {layout!r}")


def _some_valid(size: tuple[int, int], generator: torch.Generator, none: int) -> Tensor:
    """bool [B, L], about two thirds True; nothing in sample ``none``, only the last position in the sample after the
    next."""
    mask = torch.rand(size, generator=generator) < 0.67
    mask[none : none + 1] = False
    mask[none + 2 : none + 3] = False
    if size[1]:
        mask[none + 2 : none + 3, -1] = True
    return mask
