"""merge_tokens at B8 N640 K160 D768 with metrics of width 64 (a head) and 768 (the tokens), and at the sizes of the
small model, forward and backward: against bmm, argmax and a flat index_add_. Its memory, from N 640 to 10,240."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_kernels import KeyTokens, merge_tokens

# samples, tokens, slots, width, width of the metric
SHAPES = [(8, 640, 160, 768, 64), (8, 640, 160, 768, 768), (32, 64, 16, 128, 128), (32, 16, 4, 128, 128)]


def eager(x: Tensor, metric: Tensor, index: Tensor, *, argmax: bool) -> Tensor:
    """Where every slot is used and nothing is masked or weighed. ``max`` is the faster way to ``argmax``."""
    batch, tokens, dim = x.shape
    slots = index.shape[1]
    key = metric.gather(1, index.unsqueeze(-1).expand(-1, -1, metric.shape[2]))
    similarity = torch.bmm(metric, key.transpose(1, 2))
    assign = similarity.argmax(-1) if argmax else similarity.max(-1).indices
    assign = assign.scatter(1, index, torch.arange(slots).expand(batch, slots))
    flat = (assign + slots * torch.arange(batch).unsqueeze(1)).view(-1)
    size = torch.zeros(batch * slots).index_add_(0, flat, torch.ones(batch * tokens))
    total = torch.zeros(batch * slots, dim, dtype=x.dtype).index_add(0, flat, x.view(-1, dim))
    return (total / size.unsqueeze(1).to(x.dtype)).view(batch, slots, dim)


def cases(shape: tuple[int, ...], dtype: torch.dtype, backward: bool) -> dict[str, Callable[[], Any]]:
    batch, tokens, slots, dim, metric_dim = shape
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, dim, generator=g).to(dtype).requires_grad_(backward)
    metric = torch.randn(batch, tokens, metric_dim, generator=g).to(dtype)
    index = torch.stack([torch.randperm(tokens, generator=g)[:slots].sort().values for _ in range(batch)])
    keys = KeyTokens(index, torch.full((batch,), slots))
    slope = torch.randn(batch, slots, dim, generator=g).to(dtype)
    compiled = torch.compile(eager, fullgraph=True)
    forms: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: merge_tokens(x, metric, keys).tokens,
        "eager: bmm, argmax, index_add": lambda: eager(x, metric, index, argmax=True),
        "eager, best: max for argmax": lambda: eager(x, metric, index, argmax=False),
        "torch.compile of the best": lambda: compiled(x, metric, index, argmax=False),
    }
    if not backward:
        return forms
    return {name: lambda form=form: torch.autograd.grad(form(), x, slope) for name, form in forms.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("name", list(cases((1, 2, 1, 1, 1), torch.float32, False)))
def test_time(
    benchmark: Any, table: Any, shape: tuple[int, ...], dtype: torch.dtype, backward: bool, name: str
) -> None:
    batch, tokens, slots, dim, metric_dim = shape
    moved = batch * (tokens * (dim + metric_dim) + slots * dim) * dtype.itemsize
    moved += batch * (slots + tokens) * dim * dtype.itemsize if backward else 0
    what = "forward + backward" if backward else "forward"
    group = f"merge_tokens {what} B{batch} N{tokens} K{slots} D{dim} d{metric_dim} {dtype}"
    table.measure(benchmark, group, name, cases(shape, dtype, backward)[name], moved)


# What the process holds at its worst beyond inputs and results, in KiB; a process of its own, as that never falls.
PEAK = """
import resource, sys, torch
from sparsify_kernels import key_tokens, merge_tokens
torch.set_num_threads(1)
tokens = int(sys.argv[1])
key_tokens(torch.rand(1, 8)); merge_tokens(torch.rand(1, 8, 4), torch.rand(1, 8, 4), key_tokens(torch.rand(1, 8)))
x, scores = torch.rand(1, tokens, 256), torch.rand(1, tokens)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = merge_tokens(x, x, key_tokens(scores))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(after - before - sum(t.numel() * t.element_size() for t in out) // 1024)
"""


def test_extra_memory_grows_linearly() -> None:
    """Scores to merged tokens, one call after the other: an N x K similarity at N = 10,240 would be 100 MiB."""
    print("\nmerge_tokens, from scores, B1 D256 fp32: memory beyond inputs and results")
    for tokens in (640, 2560, 5120, 10240):
        done = subprocess.run([sys.executable, "-c", PEAK, str(tokens)], capture_output=True, text=True, check=True)
        print(f"  N {tokens:>6}  {int(done.stdout) / 1024:6.2f} MiB")
        assert int(done.stdout) < 4096 + tokens
