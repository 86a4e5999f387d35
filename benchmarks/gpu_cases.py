"""What ``benchmarks.gpu`` measures: each op on shapes that fill the chip, its baselines, its bytes and its FLOP."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsify_kernels import (
    KeyTokens,
    Windows,
    attention_scores,
    key_tokens,
    merge_tokens,
    random_mask,
    window_attention,
)
from sparsify_kernels.nn import AdaptiveSparseMerging
from sparsify_kernels.testing import attention_scores_eager

CACHE_BYTES = 256 * 2**20  # more than any GPU's last cache holds
BF16 = torch.bfloat16


class Case(NamedTuple):
    """One line of the table."""

    op: str
    what: str
    ours: Callable[[], Any]
    baselines: dict[str, Callable[[], Any]]  # the ratio printed is to the fastest
    bytes: int  # that must move
    flop: int  # that must be computed
    target: tuple[float, str] | None = None  # (factor, baseline): ours <= factor * that baseline's time
    check: Callable[[], bool] = lambda: True


def seconds(function: Callable[[], Any], rounds: int) -> float:
    """The median time of ``function`` on the current device, the cache overwritten before each call."""
    flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in events:
        flush.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def close(ours: Tensor, other: Tensor, truth: Tensor) -> bool:
    """Whether ours is about as near to the truth as the baseline."""
    error, allowed = (ours.double() - truth).abs().max(), (other.double() - truth).abs().max()
    return bool(error <= 2 * allowed + 1e-6)


def fastest_sdpa(q: Tensor, k: Tensor, v: Tensor, rounds: int) -> SDPBackend:
    """The backend of ``scaled_dot_product_attention`` that is fastest on these tensors."""
    times = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        with suppress(RuntimeError), sdpa_kernel(backend):
            times[backend] = seconds(lambda: F.scaled_dot_product_attention(q, k, v), rounds)
    return min(times, key=times.__getitem__) if times else SDPBackend.MATH


def attention_cases(rounds: int) -> Iterator[Case]:
    """Self-attention that fills the chip, and few queries, which one pass serves."""
    for batch, heads, queries, keys, dim, factor in (
        (16, 16, 2048, 2048, 64, 2.2),
        (16, 16, 2048, 2048, 128, 1.9),
        (256, 12, 64, 1024, 64, 1.2),
        (256, 12, 14, 1024, 64, 1.2),
    ):
        g = torch.Generator("cuda").manual_seed(0)
        shapes = ((batch, heads, n, dim) for n in (queries, keys, keys))
        q, k, v = (torch.randn(s, generator=g, device="cuda", dtype=BF16) for s in shapes)
        backend = fastest_sdpa(q, k, v, max(5, rounds // 5))
        best = f"SDPA {backend.name.split('_')[0].lower()}"

        def sdpa(q: Tensor = q, k: Tensor = k, v: Tensor = v, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        def agrees(q: Tensor = q[:1, :, :256], k: Tensor = k[:1], v: Tensor = v[:1]) -> bool:
            ours, eager = attention_scores(q, k, v), attention_scores_eager(q, k, v)
            truth = attention_scores_eager(q.double(), k.double(), v.double())
            pairs = zip(ours, eager, truth, strict=True)
            return all(close(*three) for three in pairs)

        size = f"B{batch} H{heads} M{queries} N{keys} d{dim}"
        moved = 2 * batch * heads * dim * 2 * (queries + keys) + 4 * batch * keys
        flop = 4 * batch * heads * queries * keys * dim
        yield Case(
            "attention_scores",
            size,
            lambda q=q, k=k, v=v: attention_scores(q, k, v),
            {best: sdpa, "eager": lambda q=q, k=k, v=v: attention_scores_eager(q, k, v)},
            moved,
            flop,
            (factor, best),
            agrees,
        )
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        slope, received_slope = torch.randn_like(q), torch.randn(batch, keys, device="cuda")

        def step(function: Callable[..., Any], leaves: Any = leaves, a: Any = slope, b: Any = received_slope) -> Any:
            received, output = function(*leaves)
            return torch.autograd.grad((output, received), leaves, (a, b.to(received.dtype)))

        def sdpa_step(leaves: Any = leaves, slope: Tensor = slope, backend: SDPBackend = backend) -> Any:
            with sdpa_kernel(backend):
                return torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, slope)

        yield Case(
            "attention_scores",
            f"{size} fwd+bwd",
            lambda step=step: step(attention_scores),
            {best: sdpa_step, "eager": lambda step=step: step(attention_scores_eager)},
            3 * moved,
            7 * flop // 2,  # two products forward, five backward
        )


def merge_eager(x: Tensor, metric: Tensor, index: Tensor, form: str) -> Tensor:
    """Where every slot is used and nothing is masked or weighed."""
    batch, tokens, dim = x.shape
    slots = index.shape[1]
    similarity = torch.bmm(metric, metric.gather(1, index.unsqueeze(-1).expand(-1, -1, metric.shape[2])).mT)
    own = torch.arange(slots, device=x.device).expand(batch, slots)
    assign = similarity.argmax(-1).scatter(1, index, own)
    if form == "one-hot bmm":
        one_hot = F.one_hot(assign, slots).to(x.dtype)  # [B, N, K]
        return one_hot.mT @ x / one_hot.sum(1).unsqueeze(-1)
    if form == "scatter_reduce":
        wide = assign.unsqueeze(-1).expand(-1, -1, dim)
        return x.new_zeros(batch, slots, dim).scatter_reduce(1, wide, x, "mean", include_self=False)
    flat = (assign + slots * torch.arange(batch, device=x.device).unsqueeze(1)).view(-1)
    size = x.new_zeros(batch * slots).index_add_(0, flat, x.new_ones(batch * tokens))
    total = x.new_zeros(batch * slots, dim).index_add_(0, flat, x.view(-1, dim))
    return (total / size.unsqueeze(1)).view(batch, slots, dim)


def merge_cases() -> Iterator[Case]:
    batch, tokens, slots, dim, width = 128, 1024, 256, 768, 64
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(batch, tokens, dim, generator=g, device="cuda", dtype=BF16)
    # Small integers: dots are exact in every backend, so the assignments are the same.
    metric = torch.randint(-2, 3, (batch, tokens, width), generator=g, device="cuda").to(BF16)
    index = torch.stack(
        [torch.randperm(tokens, generator=g, device="cuda")[:slots].sort().values for _ in range(batch)]
    )
    keys = KeyTokens(index, torch.full((batch,), slots, device="cuda"))
    moved = 2 * batch * (tokens * (dim + width) + slots * dim) + 8 * batch * tokens
    flop = 2 * batch * tokens * slots * width
    forms = {name: lambda name=name: merge_eager(x, metric, index, name) for name in ("index_add", "scatter_reduce")}
    forms["one-hot bmm"] = lambda: merge_eager(x, metric, index, "one-hot bmm")

    def agrees() -> bool:
        part, truth = (
            KeyTokens(index[:2], keys.count[:2]),
            merge_eager(x[:2].double(), metric[:2].double(), index[:2], ""),
        )
        plain = merge_eager(x[:2], metric[:2], index[:2], "one-hot bmm")
        return close(merge_tokens(x[:2], metric[:2], part).tokens, plain, truth)

    size = f"B{batch} N{tokens} K{slots} D{dim} d{width}"
    yield Case("merge_tokens", size, lambda: merge_tokens(x, metric, keys), forms, moved, flop, (0.2, "best"), agrees)
    leaf, slope = x.detach().requires_grad_(), torch.randn(batch, slots, dim, device="cuda", dtype=BF16)
    both = {
        name: lambda name=name: torch.autograd.grad(merge_eager(leaf, metric, index, name), leaf, slope)
        for name in forms
    }
    yield Case(
        "merge_tokens",
        f"{size} fwd+bwd",
        lambda: torch.autograd.grad(merge_tokens(leaf, metric, keys).tokens, leaf, slope),
        both,
        moved + 2 * batch * dim * (slots + tokens),
        flop,
    )


def key_eager(scores: Tensor) -> Tensor:
    tokens = scores.shape[1]
    slots = max(1, tokens - 3 * tokens // 4)
    threshold = torch.quantile(scores, 0.75, dim=1, keepdim=True)
    count = (scores >= threshold).sum(1, keepdim=True).clamp(1, slots)
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :slots]
    index = torch.where(torch.arange(slots, device=scores.device) < count, best, tokens).sort(dim=1).values
    return torch.where(index == tokens, -1, index)


def key_cases() -> Iterator[Case]:
    for batch, tokens in ((4096, 640), (1024, 8192)):
        scores = torch.rand(batch, tokens, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
        yield Case(
            "key_tokens",
            f"B{batch} N{tokens} fp32",
            lambda scores=scores: key_tokens(scores),
            {"quantile and sort": lambda scores=scores: key_eager(scores)},
            batch * tokens * 4 + batch * (tokens // 4) * 8,
            0,
            check=lambda scores=scores: torch.equal(key_tokens(scores[:64]).index, key_eager(scores[:64])),
        )


def mask_cases() -> Iterator[Case]:
    batch, units, values = 1024, 64, 3 * 32 * 32
    for dtype in (torch.uint8, BF16, torch.float32):
        x = torch.zeros(batch, units, values, dtype=dtype, device="cuda")
        half = x[:, : units // 2].contiguous()

        def eager(x: Tensor = x) -> Tensor:
            index = torch.rand(batch, units, device="cuda").topk(units // 2, dim=1, sorted=False).indices.sort(1).values
            flat = (index + units * torch.arange(batch, device="cuda").unsqueeze(1)).view(-1)
            return x.view(batch * units, values).index_select(0, flat)

        yield Case(
            "random_mask",
            f"B{batch} U{units} P{values} keep 1/2 {str(dtype).split('.')[1]}",
            lambda x=x: random_mask(x, 0.5, seed=3),
            {"clone of as much": lambda half=half: half.clone(), "eager, best": eager},
            2 * half.nbytes,
            0,
            (1 / 0.9, "floor"),
        )


def merging_cases() -> Iterator[Case]:
    """Scores, keys and merge together, as ``nn.AdaptiveSparseMerging`` calls them."""
    batch, tokens, context, dim = 64, 1024, 256, 768
    g = torch.Generator("cuda").manual_seed(0)
    x, asks = (torch.randn(batch, n, dim, generator=g, device="cuda", dtype=BF16) for n in (tokens, context))
    merging = AdaptiveSparseMerging(heads=12)

    def eager() -> Tensor:
        q, k = (t.unflatten(-1, (12, -1)).transpose(1, 2) for t in (asks, x))
        received = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1).float().mean((1, 2))
        slots = tokens - 3 * tokens // 4
        index = received.topk(slots, dim=1, sorted=False).indices.sort(1).values
        return merge_eager(x, x, index, "one-hot bmm")

    yield Case(
        "adaptive merging",
        f"B{batch} N{tokens} M{context} D{dim}",
        lambda: merging(x, asks),
        {"eager": eager},
        2 * batch * dim * (2 * tokens + context + tokens // 4),
        2 * batch * tokens * dim * (context + tokens // 4),
    )


def window_eager(
    qkv: Tensor, bias: Tensor, place: Tensor, side: int, there: Tensor | None, scale: Tensor | None
) -> Tensor:
    """Windows [W, n] of tokens that lie next to each other, the same places in each, or a dense window with a mask;
    ``scale`` [H]: of cosine attention."""
    down, across = place // side, place % side
    pairs = bias[:, down[:, None] - down + side - 1, across[:, None] - across + side - 1].to(qkv.dtype)
    q, k, v = qkv.unflatten(0, (-1, len(place))).permute(2, 0, 3, 1, 4)  # [W, H, n, d]
    if there is not None:
        pairs = pairs.masked_fill(~there, -torch.inf)
    if scale is not None:
        q, k = F.normalize(q, dim=-1) * scale[:, None, None].to(q.dtype), F.normalize(k, dim=-1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=pairs, scale=None if scale is None else 1.0)
    return out.transpose(1, 2).flatten(0, 1)


def window_cases() -> Iterator[Case]:
    """Swin at 256 px, batch 256: stage 0, whose windows are all there, and stage 1 at keep 1/2, that of Swin-V2, too; a
    window of 12 x 12.
    """
    sizes = ((8192, 8, 64, 3, False), (4096, 8, 32, 6, False), (4096, 8, 32, 6, True), (2048, 12, 72, 6, False))
    for windows, side, tokens, heads, cosine in sizes:
        g = torch.Generator("cuda").manual_seed(0)
        count, dim = windows * tokens, 32
        qkv, slope = (
            torch.randn((count, *axes, heads, dim), generator=g, device="cuda", dtype=BF16) for axes in ((3,), ())
        )
        bias = torch.randn((heads, 2 * side - 1, 2 * side - 1), generator=g, device="cuda")
        place = torch.randperm(side * side, generator=g, device="cuda")[:tokens].sort().values
        start = torch.arange(windows + 1, device="cuda") * tokens
        parts = Windows(torch.arange(count, device="cuda"), start, place.repeat(windows), None)
        dense = torch.zeros(windows * side * side, 3, heads, dim, device="cuda", dtype=BF16)
        cells = (torch.arange(windows, device="cuda")[:, None] * side * side + place).flatten()
        there = torch.zeros(side * side, dtype=torch.bool, device="cuda").index_fill(0, place, True)
        every = torch.arange(side * side, device="cuda")
        scale = torch.linspace(5, 20, heads, device="cuda") if cosine else None

        def ours(qkv: Tensor, bias: Tensor, parts: Windows = parts, scale: Any = scale) -> Tensor:
            return window_attention(qkv, bias, parts, scale=scale, cosine=scale is not None)

        def compact(qkv: Tensor, bias: Tensor, place: Any = place, side: int = side, scale: Any = scale) -> Tensor:
            return window_eager(qkv, bias, place, side, None, scale)

        def padded(
            qkv: Tensor, bias: Tensor, dense: Any = dense, cells: Any = cells, there: Any = there, side: int = side,
            every: Any = every, scale: Any = scale,
        ) -> Tensor:  # fmt: skip
            return window_eager(dense.index_copy(0, cells, qkv), bias, every, side, there, scale)[cells]

        def agrees(qkv: Tensor = qkv, bias: Tensor = bias, ours: Any = ours, compact: Any = compact) -> bool:
            return close(ours(qkv, bias), compact(qkv, bias), compact(qkv.double(), bias.double()))

        forms = {"SDPA of equal windows": compact, "SDPA, padded": padded}
        size = f"W{windows} {tokens} of {side}x{side} H{heads} d{dim}{' cosine' if cosine else ''}"
        moved, flop = 2 * count * heads * dim * 4 + 4 * count * heads, 4 * count * tokens * heads * dim
        yield Case(
            "window_attention",
            size,
            lambda qkv=qkv, bias=bias, ours=ours: ours(qkv, bias),
            {n: lambda f=f, qkv=qkv, bias=bias: f(qkv, bias) for n, f in forms.items()},
            moved,
            flop,
            check=agrees,
        )
        leaves = [t.detach().requires_grad_() for t in (qkv, bias)]

        def step(function: Callable[..., Any], leaves: Any = leaves, slope: Tensor = slope) -> Any:
            return torch.autograd.grad(function(*leaves), leaves, slope)

        def agree(
            step: Any = step, ours: Any = ours, compact: Any = compact, leaves: Any = leaves, slope: Any = slope
        ) -> bool:
            exact = [t.detach().double().requires_grad_() for t in leaves]
            truths = step(compact, exact, slope.double())
            return all(close(*three) for three in zip(step(ours), step(compact), truths, strict=True))

        yield Case(
            "window_attention",
            f"{size} fwd+bwd",
            lambda step=step, ours=ours: step(ours),
            {n: lambda step=step, f=f: step(f) for n, f in forms.items()},
            moved + 2 * count * heads * dim * 7,
            7 * flop // 2,
            check=agree,
        )


def cases(rounds: int) -> Iterator[Case]:
    yield from attention_cases(rounds)
    yield from merge_cases()
    yield from key_cases()
    yield from mask_cases()
    yield from merging_cases()
    yield from window_cases()
