"""random_mask as an operator: opcheck, gradcheck, compile, fake tensors, what runs in the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsify_kernels import random_mask
from sparsify_kernels._checks import check_values
from sparsify_kernels.testing import RecordedOps, assert_compiles, relayout

OP = torch.ops.sparsify_kernels.random_mask.default
BACKWARD = torch.ops.sparsify_kernels.random_mask_backward.default


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("samples", [3, 0])
@pytest.mark.parametrize("width", [0, 4])
def test_opcheck(samples: int, requires_grad: bool, layout: str, width: int) -> None:
    x = relayout(torch.randn(samples, 8, 5), layout).requires_grad_(requires_grad)
    torch.library.opcheck(OP, (x, torch.tensor(3), 4, width))
    grad = relayout(torch.randn(samples, 4, 5), layout).requires_grad_(requires_grad)
    index = torch.tensor([[0, 2, 3, 7]]).expand(samples, 4)
    torch.library.opcheck(BACKWARD, (grad, index, 8))


def test_opcheck_with_bytes_and_a_seed_a_sample() -> None:
    x = torch.randint(0, 256, (3, 8, 5), dtype=torch.uint8)
    torch.library.opcheck(OP, (x, torch.tensor([3, 4, 5]), 4, 0))


@pytest.mark.parametrize("stratified", [False, True])
def test_gradcheck(stratified: bool) -> None:
    x = torch.randn(2, 8, 3, dtype=torch.float64, requires_grad=True)

    def tokens(x: Tensor) -> Tensor:
        return random_mask(x, 0.25, seed=6, grid=(2, 4), stratified=stratified).tokens

    assert torch.autograd.gradcheck(tokens, (x,))
    assert torch.autograd.gradgradcheck(tokens, (x,))


def test_autocast_changes_nothing() -> None:
    x = torch.randn(2, 8, 5, requires_grad=True)
    want = random_mask(x, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = random_mask(x, seed=3)
        assert torch.equal(OP(x, torch.tensor(3), 4, 0)[0], want.tokens)
    assert got.tokens.dtype == torch.float32
    assert torch.equal(got.tokens, want.tokens)
    assert torch.equal(got.index, want.index)
    ours, theirs = (torch.autograd.grad(t.tokens.square().sum(), x)[0] for t in (got, want))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("dynamic", "backend"), [(False, "inductor"), (True, "aot_eager"), (True, "inductor")])
def test_compiles_forward_and_backward_without_graph_breaks(dynamic: bool, backend: str) -> None:
    def halves(x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, index = random_mask(x * 2, 0.5, seed=seed)
        quarter = random_mask(x, 0.25, seed=seed, grid=(2, x.shape[1] // 2), stratified=True).tokens
        return tokens.square(), index, quarter

    compiled = torch.compile(halves, fullgraph=True, dynamic=dynamic, backend=backend)
    for samples, units in [(2, 8), (3, 12), (5, 16)] if dynamic else [(2, 8)]:
        seed = torch.arange(samples)
        x = torch.randn(samples, units, 3, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        ours, expected = compiled(x, seed), halves(y, seed)
        for a, b in zip(ours, expected, strict=True):
            assert torch.equal(a, b)
        (ours[0].sum() + ours[2].sum()).backward()
        (expected[0].sum() + expected[2].sum()).backward()
        assert x.grad is not None
        assert torch.equal(x.grad, y.grad)


def test_a_new_integer_seed_does_not_compile_anew_each_time() -> None:
    compiles = 0

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal compiles
        compiles += 1
        return graph.forward

    compiled = torch.compile(lambda x, seed: random_mask(x, seed=seed).index, fullgraph=True, backend=count)
    x = torch.zeros(2, 8, 1)
    for seed in (3, 4, 5, 2**60, 17):
        assert torch.equal(compiled(x, seed), random_mask(x, seed=seed).index)
    assert compiles <= 2  # the first value is taken as a constant, all others are not


def test_assert_compiles_with_an_integer_payload() -> None:
    assert_compiles(random_mask, torch.randint(0, 256, (2, 8, 3), dtype=torch.uint8), seed=torch.tensor(4))


def test_fake_tensors_and_meta_tensors_have_the_shapes_of_real_ones() -> None:
    with FakeTensorMode():
        mask = random_mask(torch.empty(4, 10, 6, dtype=torch.uint8), 0.25, seed=1)
        assert mask.tokens.shape == (4, 3, 6)
        assert mask.tokens.dtype == torch.uint8
        assert mask.index.shape == (4, 3)
        with pytest.raises(ValueError, match=r"random_mask: x must be \[B, U, P\], got float32 \[2, 3\]"):
            random_mask(torch.empty(2, 3), seed=1)
    assert random_mask(torch.empty(4, 10, 6, device="meta"), seed=1).tokens.shape == (4, 5, 6)


def test_the_backward_is_one_op_of_its_own() -> None:
    x = torch.randn(2, 8, 3, requires_grad=True)
    tokens = random_mask(x, seed=1).tokens
    with RecordedOps() as trace:
        torch.autograd.grad(tokens, x, torch.ones_like(tokens))
    ours = [name for name in trace.names if name.startswith("sparsify_kernels")]
    assert ours == ["sparsify_kernels::random_mask_backward"]
    assert not any("scatter" in name or "index" in name or "zero" in name for name in trace.names)


def test_no_backward_where_none_is_wanted() -> None:
    x = torch.randn(2, 8, 3)
    scale = torch.ones((), requires_grad=True)
    tokens = random_mask(x, seed=1).tokens * scale
    with RecordedOps() as trace:
        tokens.sum().backward()
    assert not any(name.startswith("sparsify_kernels") for name in trace.names)


def test_values_are_checked_on_the_cpu_and_elsewhere_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_values(torch.device("cpu"))
    assert not check_values(torch.device("cuda"))
    monkeypatch.setattr("sparsify_kernels._checks._CHECK_ON_GPU", True)
    assert check_values(torch.device("cuda"))
