"""Every backend of key_tokens and gather_tokens against the reference: the same index bit for bit, the same bytes."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_kernels import _registry
from sparsify_kernels.key_tokens import reference
from sparsify_kernels.testing import (
    LAYOUTS,
    SCORE_KINDS,
    KeyShape,
    assert_accurate,
    assert_same,
    guarded,
    poisoned_memory,
    relayout,
    score_inputs,
)

KEYS = _registry.implementations("key_tokens")
GATHER = _registry.implementations("key_tokens_gather")
BACKWARD = _registry.implementations("key_tokens_gather_backward")
FAST = [name for name in KEYS if name == "cpp"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PAYLOADS = (torch.uint8, torch.bool, torch.int64, torch.float16, torch.float32, torch.complex128)
# One, around a vector and a block, primes, a power of two, the sizes of the benchmarks.
TOKENS = (1, 2, 3, 15, 16, 17, 31, 33, 127, 640, 1021, 8192, 16385)
FENCES = (0.0, 0.1, 1 / 3, 1.5, 30.0)


def test_the_extension_serves_the_cpu() -> None:
    if not FAST:
        pytest.skip("the C++ extension is not built")
    assert "cpp" in GATHER
    assert "cpp" in BACKWARD


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", SCORE_KINDS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_same_keys_as_the_reference(backend: str, tokens: int, kind: str) -> None:
    for valid in (False, True):
        inputs = score_inputs(KeyShape(3, tokens), kind, valid=valid, poison=True, seed=tokens)
        for fence in FENCES:
            for capacity in (None, 1, 1 + tokens // 8):
                expected = reference.key_tokens(*inputs.values(), fence, capacity)
                with poisoned_memory():
                    ours = KEYS[backend](*inputs.values(), fence, capacity)
                assert_same(ours, expected, f"fence {fence}, capacity {capacity}, valid {valid}")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_in_any_layout(backend: str, dtype: torch.dtype, layout: str) -> None:
    for kind in ("ties", "wide"):
        inputs = score_inputs(KeyShape(3, 67), kind, dtype, valid=True, poison=True, layout=layout)
        expected = reference.key_tokens(*inputs.values(), 0.1, None)
        assert_same(KEYS[backend](*inputs.values(), 0.1, None), expected)


@pytest.mark.parametrize("backend", FAST)
def test_all_bit_patterns_of_half_precision_rank_as_in_the_reference(backend: str) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        scores = bits.view(dtype)[None]
        there = ~scores.isnan()
        for fence in (0.0, 0.5):
            assert_same(KEYS[backend](scores, there, fence, None), reference.key_tokens(scores, there, fence, None))


@pytest.mark.parametrize("backend", FAST)
def test_infinities_zeros_and_subnormals(backend: str) -> None:
    g = torch.Generator().manual_seed(3)
    table = torch.tensor([-math.inf, -1.0, -1e-45, -0.0, 0.0, 1e-45, 3e-45, 1.0, 3.4e38, math.inf])
    for tokens in range(1, 30):
        scores = table[torch.randint(0, len(table), (40, tokens), generator=g)]
        for fence in (0.0, 1e-300, 0.5, 1e300):
            expected = reference.key_tokens(scores, None, fence, None)
            assert_same(KEYS[backend](scores, None, fence, None), expected, f"N {tokens}, fence {fence}")


@pytest.mark.parametrize("backend", FAST)
def test_the_product_with_the_fence_is_rounded_before_it_is_added(backend: str) -> None:
    # With Q3 = -m and fence m / spread the threshold is 0, or what rounding m / spread has left, if nothing rounds the
    # product: then a score of 0, or one a little below, is on the other side.
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        m, spread = torch.randint(1, 2**20, (2,), generator=g).tolist()
        fence = m / spread
        left = Fraction(fence) * spread - m
        if fence * spread != m or left == 0:
            continue
        border = 0.0 if left > 0 else -(2.0**-100)
        scores = torch.tensor([[-m - spread] * 3 + [-m] * 4 + [border, 1.0]])
        keys = KEYS[backend](scores, None, fence, None)
        assert keys[1].item() == (2 if left > 0 else 1)
        assert_same(keys, reference.key_tokens(scores, None, fence, None))


@pytest.mark.parametrize("backend", FAST)
def test_nothing_outside_the_inputs_is_read(backend: str) -> None:
    scores, valid = guarded(torch.rand(2, 19)), guarded(torch.rand(2, 19) < 0.4)
    for flags in (None, valid):
        given = None if flags is None else flags.tensor
        expected = reference.key_tokens(scores.tensor.clone(), None if given is None else given.clone(), 0.0, None)
        assert_same(KEYS[backend](scores.tensor, given, 0.0, None), expected)
    x, index = guarded(torch.rand(2, 5, 33)), guarded(torch.tensor([[4, -1, 0], [2, 2, 4]]))
    expected = reference.key_tokens_gather(x.tensor.clone(), index.tensor.clone())
    assert_same(GATHER[backend](x.tensor, index.tensor), expected)
    grad = guarded(expected)
    expected = reference.key_tokens_gather_backward(expected, index.tensor.clone(), 5)
    assert_same(BACKWARD[backend](grad.tensor, index.tensor, 5), expected)
    for box in (scores, valid, x, index, grad):
        box.check()


@pytest.mark.parametrize("backend", FAST)
def test_the_number_of_threads_changes_nothing(backend: str) -> None:
    scores = torch.rand(40, 700)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(KEYS[backend](scores, None, 1.5, None))
    finally:
        torch.set_num_threads(before)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_nan_is_the_one_complained_of(backend: str, dtype: torch.dtype) -> None:
    scores = torch.rand(3, 41).to(dtype)
    valid = torch.ones(3, 41, dtype=torch.bool)
    scores[0, 5], valid[0, 5] = math.nan, False
    scores[1, 7], valid[1, 7] = math.nan, False
    scores[1, 40] = scores[2, 3] = -math.nan
    with pytest.raises(
        RuntimeError, match=r"^key_tokens: scores must not be NaN at valid tokens, got NaN at \[1, 40\]"
    ):
        KEYS[backend](scores, valid, 0.0, None)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", PAYLOADS)
def test_gather_moves_the_bytes_of_any_dtype(backend: str, dtype: torch.dtype) -> None:
    index = torch.randint(-1, 9, (3, 23))
    for inner in ((), (1,), (37,), (2, 3)):
        x = torch.randint(0, 2, (3, 9, *inner)).to(dtype)
        for layout in LAYOUTS:
            with poisoned_memory():
                ours = GATHER[backend](relayout(x, layout), relayout(index, layout))
            assert_same(ours, reference.key_tokens_gather(x, index))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_backward(backend: str, dtype: torch.dtype) -> None:
    index = torch.randint(-1, 6, (3, 40))
    index[1] = 2  # all slots of a sample to one token
    for inner in ((), (1,), (37,), (2, 3)):
        grad = torch.randn(3, 40, *inner).to(dtype)
        truth = reference.key_tokens_gather_backward(grad.double(), index, 7)
        eager = reference.key_tokens_gather_backward(grad, index, 7)
        first = BACKWARD[backend](grad, index, 7)
        for layout in LAYOUTS:
            with poisoned_memory():
                ours = BACKWARD[backend](relayout(grad, layout), relayout(index, layout), 7)
            assert_accurate(ours, eager=eager, truth=truth)
            assert_same(ours, first)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_the_gradient_of_a_complex_payload_keeps_its_imaginary_part(backend: str) -> None:
    grad = torch.tensor([[1 + 2j, 3 - 4j, 5j]])
    index = torch.tensor([[1, 1, -1]])
    assert BACKWARD[backend](grad, index, 3).tolist() == [[0, 4 - 2j, 0]]


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (lambda cpp: cpp["key_tokens"](torch.zeros(2, 3), None, 0.0, 0), "key_tokens: capacity"),
        (lambda cpp: cpp["key_tokens"](torch.zeros(2, 3), torch.ones(2, 2).bool(), 0.0, None), "key_tokens: capacity"),
        (lambda cpp: cpp["gather"](torch.zeros(2, 3), torch.zeros(1, 2).long()), "key_tokens_gather: index must be"),
        (lambda cpp: cpp["back"](torch.zeros(2, 3), torch.zeros(2, 2).long(), 4), "key_tokens_gather: index must be"),
    ],
)
def test_cpp_refuses_sizes_that_lead_out_of_bounds(run: Any, text: str) -> None:
    if not FAST:
        pytest.skip("the C++ extension is not built")
    with pytest.raises(RuntimeError, match=text):
        run({"key_tokens": KEYS["cpp"], "gather": GATHER["cpp"], "back": BACKWARD["cpp"]})


@pytest.mark.parametrize("backend", FAST)
def test_a_bad_index_in_the_backward_is_left_out(backend: str) -> None:
    grad, index = torch.ones(1, 4, 2), torch.tensor([[0, 3, -2, 1]])
    expected: Tensor = reference.key_tokens_gather_backward(grad, index, 3)
    assert_same(BACKWARD[backend](grad, index, 3), expected)
