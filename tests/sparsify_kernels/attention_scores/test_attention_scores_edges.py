"""attention_scores, the C++ kernels: the last vector of a chunk, what an earlier sample left behind, one gradient
alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsify_kernels import _registry
from sparsify_kernels.testing import AttentionShape, assert_same, attention_inputs

FORWARD = _registry.implementations("attention_scores")
BACKWARD = _registry.implementations("attention_scores_backward")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("q", "k", "v", "key_bias", "query_valid", "key_valid")

pytestmark = pytest.mark.skipif("cpp" not in FORWARD, reason="the C++ extension is not built")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [64, 70])
def test_the_largest_logit_is_found_wherever_it_is(keys: int, dtype: torch.dtype) -> None:
    """It stands 10,000 above the others, which no exponential survives that does not know it."""
    q = torch.full((1, 1, 7, 1), 100.0, dtype=dtype)
    for at in range(keys):
        k = torch.zeros(1, 1, keys, 1, dtype=dtype)
        k[0, 0, at] = 100.0
        received, _, lse = FORWARD["cpp"](q, k, None, None, None, None, 1.0)
        assert_same(received[0], torch.nn.functional.one_hot(torch.tensor(at), keys).to(received.dtype))
        assert lse.eq(10_000).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_an_earlier_sample_left_reaches_no_later_one(dtype: torch.dtype) -> None:
    """The first fills every vector with NaN, of the second's keys and queries some only fill vectors up."""
    inputs = attention_inputs(AttentionShape(2, 1, 9, 32, 5, 5), dtype, bias=True)
    inputs["key_valid"] = torch.arange(32) < torch.tensor([[32], [21]])
    for name in ("q", "k", "v", "key_bias"):
        inputs[name][0] = torch.nan

    def kernels(args: list[Any]) -> tuple[torch.Tensor, ...]:
        received, output, lse = FORWARD["cpp"](*args, None)
        grads = torch.ones_like(received), torch.full_like(output, 0.5)
        if received.shape[0] > 1:
            for grad in grads:
                grad[0] = torch.nan
        return received, output, lse, *BACKWARD["cpp"](*grads, *args, output, lse, None, [True] * 4)

    args = [inputs[name] for name in NAMES]
    alone = kernels([None if t is None else t[1:] for t in args])
    assert_same(tuple(t[1:] for t in kernels(args)), alone)
    assert all(t.isfinite().all() for t in alone)


def test_so_many_queries_that_the_last_slabs_are_empty() -> None:
    """512,001 queries in 1,000 slabs of 513: they end before the last one begins."""
    queries, keys = 512_001, 16
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, queries, 4, generator=g), torch.randn(1, 1, keys, 4, generator=g)
    valid = torch.rand(1, queries, generator=g) < 0.7
    truth = (0.5 * q.double() @ k.double().mT).softmax(-1)
    for given in (None, valid):
        received, _, lse = FORWARD["cpp"](q, k, None, None, given, None, None)
        rows = truth[0, 0] if given is None else truth[0, 0][given[0]]
        torch.testing.assert_close(received[0].double(), rows.mean(0), rtol=1e-5, atol=0)
        assert torch.equal(lse[0, 0].isinf(), torch.zeros(queries).bool() if given is None else ~valid[0])


def test_the_backward_asks_for_four_flags() -> None:
    inputs = attention_inputs(AttentionShape(1, 1, 2, 3, 4, 4))
    args = [inputs[name] for name in NAMES]
    received, output, lse = FORWARD["cpp"](*args, None)
    with pytest.raises(RuntimeError, match="wanted must be four flags, got 2"):
        BACKWARD["cpp"](received, output, *args, output, lse, None, [True, True])


@pytest.mark.parametrize("only", range(4))
def test_a_gradient_wanted_alone_is_the_same(only: int) -> None:
    inputs = attention_inputs(AttentionShape(2, 2, 50, 70, 16, 16), bias=True)
    args = [inputs[name] for name in NAMES]
    received, output, lse = FORWARD["cpp"](*args, None)
    grads = torch.linspace(-1, 1, received.numel()).view_as(received), torch.randn_like(output)
    whole = BACKWARD["cpp"](*grads, *args, output, lse, None, [True] * 4)
    part = BACKWARD["cpp"](*grads, *args, output, lse, None, [i == only for i in range(4)])
    assert_same(part[only], whole[only])


def test_a_bias_common_to_all_keys_changes_no_gradient() -> None:
    """Added to a log-sum-exp of 1,024, what distinguishes the rows is rounded to 6e-5: their own sums mend that."""
    inputs = attention_inputs(AttentionShape(2, 2, 50, 70, 16, 16), bias=True)
    inputs["q"], inputs["k"] = (inputs[name].round() / 2 for name in ("q", "k"))  # their logits lose nothing to it
    grads = torch.linspace(-1, 1, 140).view(2, 70), torch.randn(2, 2, 50, 16)
    found = []
    for bias in (0.0, 1024.0):
        inputs["key_bias"] = torch.full((2, 70), bias)
        args = [inputs[name] for name in NAMES]
        _, output, lse = FORWARD["cpp"](*args, 0.25)
        found.append((output, *BACKWARD["cpp"](*grads, *args, output, lse, 0.25, [True] * 4)))
    for name, ours, plain in zip(("output", "dq", "dk", "dv", "dkey_bias"), found[1], found[0], strict=True):
        assert (ours - plain).abs().max() < 1e-6 * plain.abs().max().clamp(min=1), name


@pytest.mark.parametrize(("keys", "most"), [(1, 3), (100, 10)])
def test_long_dot_products_are_made_of_short_ones(keys: int, most: int) -> None:
    """256 times 0.1: off by 20 roundings if added up one by one, by 5 in parts of 64, by 1.25 in parts of 16."""
    q, k = torch.ones(1, 1, 3, 256), torch.full((1, 1, keys, 256), 0.1)
    hidden = torch.where(torch.arange(keys) == 0, 0.0, -torch.inf)[None]
    lse = FORWARD["cpp"](q, k, None, hidden, None, None, 1.0)[2]
    torch.testing.assert_close(lse, torch.full((1, 1, 3), 0.1) * 256, rtol=most * 2**-23, atol=0.0)


@pytest.mark.parametrize("keys", [1, 100])
def test_a_bias_is_added_to_the_whole_dot_product(keys: int) -> None:
    """The dot products and their parts are exact, multiples of 2^-22, so that the sum with the bias is rounded once."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-45, 46, (1, 1, n, 257), generator=g) / 2**11 for n in (40, keys))
    bias = torch.full((1, keys), -torch.inf).index_fill(1, torch.tensor([0]), 100.37)
    lse = FORWARD["cpp"](q, k, None, bias, None, None, 1.0)[2]
    exact = q.double() @ k[:, :, :1].double().mT + bias[:, :1].double()
    torch.testing.assert_close(lse, exact[..., 0].float(), rtol=0.0, atol=0.0)


def test_what_equal_keys_receive_is_rounded_but_once() -> None:
    """Each gets a tenth from every query; added up in fp32, equal numbers are all rounded the same way."""
    q, k = torch.randn(1, 3, 700, 8), torch.ones(1, 3, 10, 8)
    received = FORWARD["cpp"](q, k, None, None, None, None, None)[0]
    torch.testing.assert_close(received, torch.full((1, 10), 0.1), rtol=2**-23, atol=0.0)
