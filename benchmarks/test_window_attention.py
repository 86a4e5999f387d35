"""window_attention on the windows of Swin-V2-T at 256 pixels with half of the units masked, against what one would
write without it.

Baselines on the same kept tokens: *padded*, the windows with every place, as timm computes them, the missing keys
masked, kept tokens scattered in and gathered out; *uniform*, windows of exactly n tokens whose bias is gathered for
their places (unshifted windows only: the best eager form there); SDPA on these, bias and all as an additive mask; and
``torch.compile`` of both. *Dense* is the same attention where nothing is masked, twice the tokens: what the whole
encoder would spend. Ratios are of one run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify_kernels import Windows, random_mask, window_attention

SIDE, UNITS, WIDTH = 8, 8, 32  # places along a window, mask units along a picture, channels of a head
PLACES = SIDE * SIDE


class Stage(NamedTuple):
    """Pictures, tokens along a picture, heads; tokens that the windows are shifted by."""

    pictures: int
    side: int
    heads: int
    shift: int = 0


STAGES = {
    "stage 0": Stage(8, 64, 3),
    "stage 1": Stage(8, 32, 6),
    "stage 1, shifted": Stage(8, 32, 6, 4),
    "stage 2": Stage(8, 16, 12),
    "stage 3": Stage(8, 8, 24),
}


class Case(NamedTuple):
    """The tensors of one stage: kept tokens sorted by window, and what the baselines are given ready-made."""

    qkv: Tensor  # [N, 3, H, 32]
    bias: Tensor  # [H, 15, 15]
    scale: Tensor  # [H]
    windows: Windows
    slot: Tensor  # int64 [N]: window * 64 + place
    mask: Tensor  # [W, 1, 64, 64]: -inf for keys that are not there, -100 between regions
    relative: Tensor  # int64 [64, 64]: where a pair's bias is in the flattened table
    pairs: Tensor | None  # int64 [W, n, n]: the same for the tokens of windows of n
    dense: Tensor  # [W', 64, 3, H, 32]: every token of every window


def kept_cells(stage: Stage) -> tuple[Tensor, Tensor]:
    """int64 [N]: window * 64 + place and the region of each kept token, in the order of windows."""
    kept = random_mask(
        torch.empty(stage.pictures, UNITS * UNITS, 1), 0.5, seed=0, grid=(UNITS, UNITS), stratified=True
    ).index
    unit, across = stage.side // UNITS, stage.side // SIDE
    there = torch.zeros(stage.pictures, UNITS * UNITS, dtype=torch.bool).scatter_(1, kept, True)
    picture = there.view(-1, UNITS, 1, UNITS, 1).expand(-1, -1, unit, -1, unit).reshape(-1, stage.side, stage.side)
    line = torch.arange(stage.side)
    part = (line >= stage.side - SIDE).long() + (line >= stage.side - stage.shift).long() if stage.shift else 0 * line
    region = (3 * part[:, None] + part[None, :]).expand(stage.pictures, -1, -1)
    moved = picture.roll((-stage.shift, -stage.shift), (1, 2))

    def by_window(x: Tensor) -> Tensor:
        return x.reshape(-1, across, SIDE, across, SIDE).transpose(2, 3).reshape(-1)

    cells = by_window(moved).nonzero()[:, 0]
    windows = cells // PLACES
    filled = windows.unique()  # stage 0 drops whole windows
    return torch.searchsorted(filled, windows) * PLACES + cells % PLACES, by_window(region)[cells]


def make(stage: Stage, dtype: torch.dtype) -> Case:
    slot, region = kept_cells(stage)
    tokens, count = len(slot), int(slot[-1]) // PLACES + 1
    start = torch.searchsorted(slot, torch.arange(count + 1) * PLACES)
    windows = Windows(torch.arange(tokens), start, slot % PLACES, region if stage.shift else None)
    line = torch.arange(PLACES)
    relative = (line // SIDE * 15 + line % SIDE)[:, None] - (line // SIDE * 15 + line % SIDE)[None, :] + 7 * 15 + 7
    parts = torch.full((count * PLACES,), -1)
    parts[slot] = region
    parts = parts.view(count, 1, PLACES)
    mask = torch.where(parts[..., None] != parts[..., None, :], -100.0, 0.0)
    mask = mask.masked_fill(parts[..., None, :] < 0, -torch.inf).to(dtype)
    sizes = start.diff()
    place = windows.place.view(count, -1) if bool((sizes == sizes[0]).all()) else None
    g = torch.Generator().manual_seed(0)
    everything = stage.pictures * stage.side**2
    return Case(
        torch.randn(tokens, 3, stage.heads, WIDTH, generator=g).to(dtype),
        torch.randn(stage.heads, 15, 15, generator=g),
        torch.rand(stage.heads, generator=g) * 10 + 5,
        windows,
        slot,
        mask,
        relative,
        None if place is None else relative[place[:, :, None], place[:, None, :]],
        torch.randn(everything // PLACES, PLACES, 3, stage.heads, WIDTH, generator=g).to(dtype),
    )


def core(qkv: Tensor, bias: Tensor, scale: Tensor, mask: Tensor | None = None) -> Tensor:
    """timm's WindowAttention between its two projections, on [W, n, 3, H, d]; bias [1 or W, H, n, n]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale.view(-1, 1, 1).to(qkv.dtype)
    logits = logits + bias.to(qkv.dtype)
    logits = logits if mask is None else logits + mask
    return (logits.softmax(-1) @ v).transpose(1, 2)


def dense(qkv: Tensor, bias: Tensor, scale: Tensor, relative: Tensor) -> Tensor:
    return core(qkv, bias.flatten(1)[:, relative].unsqueeze(0), scale)


def padded(qkv: Tensor, bias: Tensor, scale: Tensor, slot: Tensor, mask: Tensor, relative: Tensor) -> Tensor:
    """Tokens scattered to their slots, windows of 64, tokens gathered."""
    whole = qkv.new_zeros(mask.shape[0] * PLACES, *qkv.shape[1:]).index_copy(0, slot, qkv)
    whole = whole.view(mask.shape[0], PLACES, *qkv.shape[1:])
    return core(whole, bias.flatten(1)[:, relative].unsqueeze(0), scale, mask).flatten(0, 1)[slot]


def uniform(qkv: Tensor, bias: Tensor, scale: Tensor, pairs: Tensor) -> Tensor:
    windows = qkv.view(*pairs.shape[:2], *qkv.shape[1:])
    return core(windows, bias.flatten(1)[:, pairs].transpose(0, 1), scale).flatten(0, 1)


def sdpa(qkv: Tensor, bias: Tensor, scale: Tensor, pairs: Tensor) -> Tensor:
    q, k, v = qkv.view(*pairs.shape[:2], *qkv.shape[1:]).permute(2, 0, 3, 1, 4)
    q, k = F.normalize(q, dim=-1) * scale.view(-1, 1, 1).to(q.dtype), F.normalize(k, dim=-1)
    added = bias.flatten(1)[:, pairs].transpose(0, 1).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=1.0).transpose(1, 2).flatten(0, 1)


def ours(qkv: Tensor, bias: Tensor, scale: Tensor, windows: Windows) -> Tensor:
    return window_attention(qkv, bias, windows, scale=scale, cosine=True)


NAMES = [
    "ours", "padded", "uniform", "SDPA on uniform", "torch.compile of padded", "torch.compile of uniform", "dense",
]  # fmt: skip


def function(case: Case, name: str) -> Callable[..., Tensor]:
    """What ``name`` computes from qkv, bias and scale."""
    if "padded" in name:
        form, given = padded, (case.slot, case.mask, case.relative)
    elif name == "ours":
        form, given = ours, (case.windows,)
    elif name == "dense":
        form, given = dense, (case.relative,)
    else:
        form, given = (sdpa if "SDPA" in name else uniform), (case.pairs,)
        if case.pairs is None:
            pytest.skip("the windows are not uniform")
    form = torch.compile(form, fullgraph=True) if "compile" in name else form
    return lambda qkv, bias, scale: form(qkv, bias, scale, *given)


def moved(case: Case) -> int:
    """Bytes of qkv and the output."""
    return case.qkv.nbytes * 4 // 3


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
EACH = pytest.mark.parametrize("name", NAMES)


@DTYPES
@pytest.mark.parametrize("stage", list(STAGES))
@EACH
def test_forward(benchmark: Any, table: Any, stage: str, dtype: torch.dtype, name: str) -> None:
    case = make(STAGES[stage], dtype)
    call = function(case, name)
    args = (case.dense if name == "dense" else case.qkv, case.bias, case.scale)
    group = f"window_attention {stage} {list(case.qkv.shape)}, {len(case.windows.start) - 1} windows, {dtype}"
    table.measure(benchmark, group, name, lambda: call(*args), moved(case), 20)


@DTYPES
@pytest.mark.parametrize("stage", list(STAGES))
@EACH
def test_forward_and_backward(benchmark: Any, table: Any, stage: str, dtype: torch.dtype, name: str) -> None:
    case = make(STAGES[stage], dtype)
    call = function(case, name)
    leaves = [t.requires_grad_() for t in (case.dense if name == "dense" else case.qkv, case.bias, case.scale)]
    with torch.no_grad():
        grad = torch.randn_like(call(*leaves))

    def step() -> Any:
        return torch.autograd.grad(call(*leaves), leaves, grad)

    group = f"window_attention forward and backward {stage} {list(case.qkv.shape)}, {dtype}"
    table.measure(benchmark, group, name, step, 3 * moved(case), 10)
