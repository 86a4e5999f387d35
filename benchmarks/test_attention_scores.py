"""attention_scores, forward and with backward, against eager, torch.compile and SDPA without scores; its peak memory.

SDPA computes the output alone: the rows that name it say what the scores cost on top. Ratios are of one run.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify_kernels import attention_scores
from sparsify_kernels.testing import AttentionShape, attention_inputs, attention_scores_eager

SHAPES = {
    "self": AttentionShape(8, 12, 640, 640, 64, 64),
    "few queries": AttentionShape(8, 12, 14, 640, 64, 64),
    "small": AttentionShape(32, 4, 16, 64, 32, 32),
}
ROWS = 64


def eager_chunked(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The best plain form for many keys that we know: a few queries at a time, whose probabilities stay in cache."""
    received, output, keys = q.new_zeros(q.shape[0], k.shape[2]), torch.empty_like(q), k.transpose(-1, -2)
    for start in range(0, q.shape[2], ROWS):
        part = slice(start, start + ROWS)
        weights = torch.matmul(q[:, :, part] * q.shape[3] ** -0.5, keys).softmax(-1)
        received += weights.sum((1, 2))
        output[:, :, part] = torch.matmul(weights, v)
    return received / (q.shape[1] * q.shape[2]), output


def forward_cases(shape: AttentionShape, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    inputs = attention_inputs(shape, dtype)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    compiled = torch.compile(attention_scores_eager, fullgraph=True)
    return {
        "ours": lambda: attention_scores(q, k, v),
        "eager": lambda: attention_scores_eager(q, k, v),
        "eager, 64 queries at a time": lambda: eager_chunked(q, k, v),
        "torch.compile of eager": lambda: compiled(q, k, v),
        "SDPA, no scores": lambda: F.scaled_dot_product_attention(q, k, v),
    }


def backward_cases(shape: AttentionShape, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    inputs = attention_inputs(shape, dtype)
    leaves = [inputs[n].requires_grad_() for n in ("q", "k", "v")]
    grad_output = torch.randn_like(leaves[0])
    grad_received = torch.randn(shape.batch, shape.keys)
    compiled = torch.compile(attention_scores_eager, fullgraph=True)

    def both(function: Callable[..., Any]) -> Callable[[], Any]:
        def step() -> Any:
            received, output = function(*leaves)
            return torch.autograd.grad((output, received), leaves, (grad_output, grad_received.to(received.dtype)))

        return step

    return {
        "ours": both(attention_scores),
        "eager": both(attention_scores_eager),
        "torch.compile of eager": both(compiled),
        "SDPA, no scores": lambda: torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, grad_output),
    }


def moved(shape: AttentionShape, dtype: torch.dtype) -> int:
    """Bytes of q, k, v and the output."""
    per_head = shape.queries * (shape.dim + shape.value_dim) + shape.keys * (shape.dim + shape.value_dim)
    return shape.batch * shape.heads * per_head * dtype.itemsize


FORWARD = ["ours", "eager", "eager, 64 queries at a time", "torch.compile of eager", "SDPA, no scores"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("name", FORWARD)
def test_forward(benchmark: Any, table: Any, shape: str, dtype: torch.dtype, name: str) -> None:
    run, rounds = forward_cases(SHAPES[shape], dtype)[name], 9 if shape == "self" else 60
    group = f"attention_scores {SHAPES[shape]} {dtype}"
    table.measure(benchmark, group, name, run, moved(SHAPES[shape], dtype), rounds)


@DTYPES
@pytest.mark.parametrize("name", [n for n in FORWARD if "at a time" not in n])
def test_forward_and_backward(benchmark: Any, table: Any, dtype: torch.dtype, name: str) -> None:
    shape = SHAPES["self"]
    group = f"attention_scores forward and backward {shape} {dtype}"
    table.measure(benchmark, group, name, backward_cases(shape, dtype)[name], 3 * moved(shape, dtype), 5)


# Forward and backward in a process of its own: peak bytes beyond the inputs, and beyond outputs and gradients too.
MEMORY = """
import sys, torch
from sparsify_kernels import attention_scores
from sparsify_kernels.testing import attention_scores_eager, peak_memory
function = attention_scores_eager if sys.argv[1] == "eager" else attention_scores
def step(batch, heads, length):
    q, k, v = (torch.randn(batch, heads, length, 64, requires_grad=True) for _ in range(3))
    def run():
        received, output = function(q, k, v)
        (output.mean() + received.square().sum()).backward()
        return received, output
    return run, (q, k, v)
step(1, 1, 8)[0]()
run, leaves = step(*map(int, sys.argv[2:]))
peak, results = peak_memory(run)
print(peak, peak - sum(t.nbytes for t in (*results, *(t.grad for t in leaves))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(
    ("name", "shape"), [("ours", (8, 12, 640)), ("eager", (8, 12, 640)), ("ours", (1, 1, 16384))], ids=str
)
def test_memory(benchmark: Any, name: str, shape: tuple[int, int, int]) -> None:
    command = [sys.executable, "-c", MEMORY, name, *map(str, shape)]
    done = benchmark.pedantic(
        lambda: subprocess.run(command, capture_output=True, text=True, check=True), rounds=1, warmup_rounds=0
    )
    peak, extra = (int(n) / 1e6 for n in done.stdout.split())
    benchmark.group = "attention_scores forward and backward in a process of its own"
    benchmark.extra_info["MB beyond inputs, outputs and gradients"] = extra
    sizes = f"B{shape[0]} H{shape[1]} M=N={shape[2]} d64 fp32"
    print(f"\n  {sizes}, {name}: {peak:.1f} MB beyond the inputs, {extra:.1f} MB beyond outputs and gradients too")
