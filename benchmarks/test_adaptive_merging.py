"""The memory of AdaptiveSparseMerging, scores to merged tokens, from N 640 to 10,240.

Ours grows with N. Eager holds the softmax, M x N, and the similarity of tokens and keys, N x K.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_kernels import key_tokens
from sparsify_kernels.nn import AdaptiveSparseMerging
from sparsify_kernels.testing import attention_scores_eager, peak_memory

TOKENS = (640, 1280, 2560, 5120, 10240)
WIDTH, HEADS = 64, 1


def eager(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same with ordinary operations, every slot used."""
    heads = x.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)
    scores = attention_scores_eager(heads, heads).received
    slots = max(1, x.shape[1] - 3 * x.shape[1] // 4)
    index = scores.topk(slots, dim=1).indices.sort(dim=1).values
    key = x.gather(1, index.unsqueeze(-1).expand(-1, -1, WIDTH))
    assign = torch.bmm(x, key.transpose(1, 2)).max(-1).indices
    assign = assign.scatter(1, index, torch.arange(slots).expand(len(x), slots))
    size = x.new_zeros(len(x), slots).scatter_add(1, assign, torch.ones_like(scores))
    total = torch.zeros_like(key).scatter_add(1, assign.unsqueeze(-1).expand_as(x), x)
    return total / size.unsqueeze(-1), size


def extra(who: str, tokens: int, *, backward: bool) -> int:
    """Bytes at the peak beyond inputs, results and gradients, here and now: meant for a process of its own."""
    merging = AdaptiveSparseMerging(heads=HEADS)

    def step(count: int) -> tuple[Tensor, Any]:
        x = torch.randn(1, count, WIDTH, requires_grad=backward)

        def run() -> Any:
            out = eager(x) if who == "eager" else merging(x)
            if backward:
                out[0].square().mean().backward()
            return out

        return x, run

    step(16)[1]()  # what is set up once
    x, run = step(tokens)
    peak, out = peak_memory(run)
    results = sum(t.nbytes for t in out if isinstance(t, Tensor))
    return peak - results - (x.grad.nbytes if x.grad is not None else 0)


def measured(who: str, tokens: int, *, backward: bool) -> int:
    command = [sys.executable, __file__, who, str(tokens), str(int(backward))]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_extra_memory_grows_linearly(benchmark: Any, backward: bool) -> None:
    def table() -> dict[str, list[int]]:
        return {who: [measured(who, n, backward=backward) for n in TOKENS] for who in ("ours", "eager")}

    found = benchmark.pedantic(table, rounds=1, warmup_rounds=0)
    print(
        f"\nAdaptiveSparseMerging, B1 D{WIDTH} H{HEADS} fp32, {'with backward' if backward else 'forward'}: MiB beyond"
    )
    print("inputs, results and gradients\n       N      ours     eager")
    for tokens, ours, plain in zip(TOKENS, found["ours"], found["eager"], strict=True):
        print(f"  {tokens:>6}  {ours / 2**20:8.2f}  {plain / 2**20:8.2f}")
    benchmark.extra_info.update(found)
    # A few rows of fp32 a token, and what does not depend on N: pages of code, packed tiles.
    limits = [4 * 2**20 + 4 * WIDTH * 4 * tokens for tokens in TOKENS]
    assert all(n < limit for n, limit in zip(found["ours"], limits, strict=True))
    assert found["eager"][-1] > TOKENS[-1] ** 2 * 4  # the measure sees a matrix where there is one


def test_both_merge_alike() -> None:
    x = torch.randn(1, 640, WIDTH, generator=torch.Generator().manual_seed(0))
    ours = AdaptiveSparseMerging(heads=HEADS)(x)
    assert torch.equal(key_tokens(ours.scores).count, torch.tensor([160]))  # every slot is used
    torch.testing.assert_close(ours.tokens, eager(x)[0])


if __name__ == "__main__":
    print(extra(sys.argv[1], int(sys.argv[2]), backward=sys.argv[3] == "1"))
