"""key_tokens and gather_tokens: every sentence of their contract, as literal tables and against the oracle."""

# ruff: noqa: E501 - a table has one case a line

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sparsify_kernels import KeyTokens, gather_tokens, key_tokens
from sparsify_kernels.key_tokens import reference
from sparsify_kernels.testing import (
    KEY_SHAPES,
    LAYOUTS,
    SCORE_KINDS,
    KeyShape,
    assert_alone,
    assert_same,
    gather_tokens_oracle,
    key_tokens_oracle,
    poisoned_memory,
    relayout,
    score_inputs,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INF = math.inf
T, F = True, False
LOW, HIGH = float.fromhex("0x1.c2094cp-31"), float.fromhex("0x1.d82c08p+0")
ABOVE = torch.nextafter(torch.tensor(0.3), torch.tensor(1.0)).item()

TABLE = [
    # name, scores, fence, capacity, valid, index (with -1), count
    ("five distinct: Q3 is the second best", (0.1, 0.9, 0.2, 0.8, 0.3), 0, None, None, (1, 3), 2),
    ("one token", (0.5,), 0, None, None, (0,), 1),
    ("two tokens", (0.5, 0.6), 0, None, None, (1,), 1),
    ("three tokens", (0.5, 0.7, 0.6), 0, None, None, (1,), 1),
    ("four tokens", (0.5, 0.6, 0.8, 0.7), 0, None, None, (2,), 1),
    ("ties at the top, too many: the lower index", (1.0, 2.0, 2.0, 2.0, 2.0), 0, None, None, (1, 2), 2),
    ("all equal: the first ones", (3.0,) * 8, 0, None, None, (0, 1), 2),
    ("all equal, any fence: the first ones", (3.0,) * 8, 1.5, None, None, (0, 1), 2),
    ("largest one rounding step above the rest", (0.3,) * 6 + (ABOVE, 0.3), 0, None, None, (0, 6), 2),
    ("the same with Tukey's fence", (0.3,) * 6 + (ABOVE, 0.3), 1.5, None, None, (0, 6), 2),
    ("highest first, then the lower index", (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0, 1.0), 0, None, None, (0, 6), 2),
    ("capacity below the quartile", (0.1, 0.9, 0.2, 0.8, 0.3), 0, 1, None, (1,), 1),
    ("capacity above the quartile changes nothing", (0.1, 0.9, 0.2, 0.8, 0.3), 0, 4, None, (1, 3), 2),
    # sorted 0 1 2 3 4 5 6 7 8: Q1 = 2, Q3 = 6, threshold = 6 + 1.5 * 4 = 12: nothing reaches it
    ("no outlier: the best alone", (8, 7, 6, 5, 4, 3, 2, 1, 0), 1.5, None, None, (0, -1, -1), 1),
    # Q1 = 2, Q3 = 6, threshold 12: reached exactly
    ("an outlier on the fence", (12, 7, 6, 5, 4, 3, 2, 1, 0), 1.5, None, None, (0, -1, -1), 1),
    # sorted 0 1 2 3 4 5 6 20 30: Q1 = 2, Q3 = 6
    ("two outliers", (30, 5, 6, 20, 4, 3, 2, 1, 0), 1.5, None, None, (0, 3, -1), 2),
    # threshold = 6 + 3.5 * 4 = 20
    ("two outliers, one exactly on a wider fence", (30, 5, 6, 20, 4, 3, 2, 1, 0), 3.5, None, None, (0, 3, -1), 2),
    ("two outliers, one below the fence", (30, 5, 6, 19, 4, 3, 2, 1, 0), 3.5, None, None, (0, -1, -1), 1),
    # valid 1 2 3 4 5: Q3 = 4. The capacity stays that of all tokens.
    ("invalid tokens do not count", (9, 1, 2, 9, 3, 4, 5, 9), 0, None, (F, T, T, F, T, T, T, F), (5, 6), 2),
    ("quartile of the valid ones", (9, 1, 2, 9, 9, 9, 9, 9, 9), 0, None, (F, T, T, F, F, F, F, F, F), (2, -1, -1), 1),
    ("NaN at invalid tokens", (math.nan, 1, 2, math.nan, 3), 0, None, (F, T, T, F, T), (4, -1), 1),
    ("no valid token", (1, 2, 3, 4, 5), 0, None, (F,) * 5, (-1, -1), 0),
    ("one valid token, the worst", (1, 2, 3, 4, 5), 0, None, (T, F, F, F, F), (0, -1), 1),
    ("minus infinity is a score", (-INF,) * 5, 0, None, None, (0, 1), 2),
    ("minus infinity and valid beats invalid", (9, -INF, 9, 9, 9), 0, None, (F, T, F, F, F), (1, -1), 1),
    ("infinity is a score", (1, INF, 2, INF, INF), 0, None, None, (1, 3), 2),
    ("minus infinity has no spread", (-INF,) * 5, 1.5, None, None, (0, 1), 2),
    # between 1 and inf at part 3/4 lies inf
    ("quartile between a number and infinity", (1, INF, 9, 9, 9, 9, 9, 9), 0, None, (T, T) + (F,) * 6, (1, -1), 1),
    ("the same with a fence: infinity has no spread", (1, INF, 9, 9, 9, 9, 9, 9), 1.5, None, (T, T) + (F,) * 6, (1, -1), 1),
    # Q1 = 1.75, Q3 between 3 and inf: inf. Their spread times 0 would be no number.
    ("an infinite spread without a fence", (1, 2, 3, INF, 9, 9, 9, 9), 0, None, (T,) * 4 + (F,) * 4, (3, -1), 1),
    # Q3 is half way from LOW to HIGH, in fp64 as the upper neighbour gives it: on this fence it decides over HIGH
    ("half way from above, past the fence", (0, 0, 0, 0, LOW, HIGH, 2), float.fromhex("0x1.fffffff860030p-1"), None, None, (6, -1), 1),
    ("half way from above, on the fence", (0, 0, 0, 0, LOW, HIGH, 2), float.fromhex("0x1.fffffff86002fp-1"), None, None, (5, 6), 2),
    # Q1 = 0.26, Q3 = 0.66: as fp64 of the fp32 numbers the threshold is 1.26000008; in fp32 it would be 1.26, a score
    ("a threshold in fp64", (0, 0.1, 0.26, 0.3, 0.4, 0.5, 0.66, 1.26, 9), 1.5, None, None, (8, -1, -1), 1),
    # between -inf and 1 at part 1/4 lies -inf: everything is a candidate
    ("quartile between minus infinity and a number", (-INF, 1), 0, None, None, (1,), 1),
    ("zeros of both signs are equal", (-0.0, 0.0, -0.0, 0.0, -0.0), 0, None, None, (0, 1), 2),
    ("negative scores", (-1.0, -9.0, -2.0, -8.0, -3.0), 0, None, None, (0, 2), 2),
]  # fmt: skip


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case[0])
def test_literal_table(case: tuple[Any, ...]) -> None:
    _, scores, fence, capacity, valid, index, count = case
    args = {
        "scores": torch.tensor([scores], dtype=torch.float32),
        "valid": None if valid is None else torch.tensor([valid]),
        "fence": fence,
        "capacity": capacity,
    }
    for function in (key_tokens, key_tokens_oracle):  # the table is the specification of both
        got = function(**args)
        assert got.index.tolist() == [list(index)]
        assert got.count.tolist() == [count]


def test_a_hundred_tokens_become_25() -> None:
    scores = torch.randperm(100).float()[None]
    keys = key_tokens(scores)
    assert keys.count.tolist() == [25]
    assert sorted(scores[0, keys.index[0]].tolist()) == list(range(75, 100))


@pytest.mark.parametrize(
    ("tokens", "slots"),
    [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3), (100, 25), (101, 26), (640, 160)],
)
def test_capacity(tokens: int, slots: int) -> None:
    assert key_tokens(torch.rand(2, tokens)).index.shape == (2, slots)
    assert slots == max(1, tokens - math.ceil(0.75 * (tokens - 1)))
    assert key_tokens(torch.rand(2, tokens), capacity=1).index.shape == (2, 1)
    assert key_tokens(torch.rand(2, tokens), capacity=10**6).index.shape == (2, slots)


def test_types_and_valid() -> None:
    keys = key_tokens(torch.tensor([[0.0, 1, 2, 30, 4], [0, 1, 1, 1, 1]]), fence=1.5)
    assert isinstance(keys, KeyTokens)
    assert keys.index.dtype == keys.count.dtype == torch.int64
    assert keys.index.tolist() == [[3, -1], [1, 2]]
    assert keys.valid.tolist() == [[True, False], [True, True]]
    assert KeyTokens(torch.tensor([[5, 7]]), torch.tensor([1])).valid.tolist() == [[True, False]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SCORE_KINDS)
@pytest.mark.parametrize("shape", KEY_SHAPES, ids=str)
def test_same_index_as_the_oracle(shape: KeyShape, kind: str, dtype: torch.dtype) -> None:
    for valid, capacity in ((False, None), (True, None), (True, 2)):
        inputs = score_inputs(shape, kind, dtype, valid=valid, poison=True)
        for fence in (0.0, 1 / 3) if capacity is None else (1.5,):
            with poisoned_memory():
                ours = key_tokens(**inputs, fence=fence, capacity=capacity)
            assert_same(ours, key_tokens_oracle(**inputs, fence=fence, capacity=capacity), f"fence {fence}")


@pytest.mark.parametrize("fence", [0.0, 0.1, 1.5])
def test_quartiles_are_those_of_torch_quantile(fence: float) -> None:
    for tokens in range(1, 60):
        scores = torch.randn(4, tokens)
        q1, q3 = torch.quantile(scores.double(), torch.tensor([0.25, 0.75]).double(), dim=1)
        threshold = q3 + fence * (q3 - q1)
        keys = key_tokens(scores, fence=fence)
        for b in range(4):
            want = (scores[b].double() >= threshold[b]).nonzero()[:, 0].tolist() or [int(scores[b].argmax())]
            assert keys.index[b, : keys.count[b]].tolist() == want


@pytest.mark.parametrize("kind", ["distinct", "wide"])
def test_quartiles_are_those_of_torch_quantile_to_the_last_bit(kind: str) -> None:
    for tokens in range(1, 60):
        scores = score_inputs(KeyShape(4, tokens), kind, seed=tokens)["scores"].double()
        ranked, n = scores.sort(dim=1, descending=True).values, torch.full((4, 1), tokens)
        for quarters in (1, 3):
            want = torch.quantile(scores, quarters / 4, dim=1, keepdim=True)
            assert_same(reference._quartile(ranked, n, quarters), want)


def test_half_way_is_computed_from_the_upper_neighbour() -> None:
    # Two fp32 numbers so far apart that their difference is rounded: from below the result would end in 29.
    low, high = float.fromhex("0x1.c2094cp-31"), float.fromhex("0x1.d82c08p+0")
    ranked = torch.tensor([[high, low, 0.0]], dtype=torch.float64)
    want = float.fromhex("0x1.d82c08038412ap-1")
    assert reference._quartile(ranked, torch.tensor([[3]]), 3).item() == want
    assert torch.quantile(ranked, 0.75).item() == want


def test_scores_are_rounded_to_fp32_first() -> None:
    tiny = 2.0**-40  # lost in fp32: a tie, which the lower index wins
    scores = torch.tensor([[1.0, 1.0 + tiny, 0.0, 0.0]], dtype=torch.float64)
    assert key_tokens(scores).index.tolist() == [[0]]


def test_quartiles_belong_to_the_sample_not_to_the_batch() -> None:
    # With quartiles of the flattened batch the first sample would have no key and the second only keys.
    scores = torch.stack((torch.linspace(0, 0.1, 20), torch.linspace(10, 11, 20)))
    assert key_tokens(scores).count.tolist() == [5, 5]


def test_a_sample_without_an_outlier_keeps_its_best_token() -> None:
    scores = torch.stack((torch.linspace(0, 1, 20), torch.cat((torch.zeros(19), torch.ones(1)))))
    keys = key_tokens(scores, fence=100.0)
    assert keys.count[0] == 1
    assert keys.index[0, 0] == 19


def test_shape_does_not_depend_on_the_values() -> None:
    shapes = {key_tokens(score_inputs(KeyShape(2, 41), kind)["scores"]).index.shape for kind in SCORE_KINDS}
    assert shapes == {(2, 11)}


def test_nan_at_invalid_tokens_changes_nothing() -> None:
    clean = score_inputs(KeyShape(3, 41), valid=True)
    poisoned = score_inputs(KeyShape(3, 41), valid=True, poison=True)
    assert poisoned["scores"].isnan().any()
    assert_same(key_tokens(**poisoned), key_tokens(**clean))


@pytest.mark.parametrize("kind", SCORE_KINDS)
def test_a_sample_does_not_depend_on_its_batch_mates(kind: str) -> None:
    assert_alone(key_tokens, score_inputs(KeyShape(4, 41), kind, valid=True, poison=True))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layout_changes_nothing(layout: str) -> None:
    other = score_inputs(KeyShape(3, 41), "ties", valid=True, layout=layout)
    assert_same(key_tokens(**other), key_tokens(**score_inputs(KeyShape(3, 41), "ties", valid=True)))


def test_unchecked_nan_scores_count_as_minus_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(3, 20)
    want = key_tokens(torch.where(scores < 0.3, -INF, scores))
    bad = torch.where(scores < 0.3, math.nan, scores)
    monkeypatch.setattr(reference, "check_values", lambda device: False)
    assert_same(KeyTokens(*reference.key_tokens(bad, None, 0.0, None)), want)
    index, count = reference.key_tokens(torch.full((1, 5), math.nan), None, 0.0, None)
    assert (index.tolist(), count.tolist()) == ([[0, 1]], [2])


GATHER_TABLE = [
    ("in any order", ((10, 11, 12),), ((2, 0),), ((12, 10),)),
    ("zeros at -1", ((10, 11, 12),), ((-1, 1, -1),), ((0, 11, 0),)),
    ("repeats", ((10, 11, 12),), ((1, 1, 1, 1),), ((11, 11, 11, 11),)),
    ("each sample its own", ((10, 11), (20, 21)), ((0,), (1,)), ((10,), (21,))),
]


@pytest.mark.parametrize("case", GATHER_TABLE, ids=lambda case: case[0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.uint8])
def test_gather_literal_table(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    _, x, index, want = case
    for function in (gather_tokens, gather_tokens_oracle):
        assert_same(function(torch.tensor(x, dtype=dtype), torch.tensor(index)), torch.tensor(want, dtype=dtype))


@pytest.mark.parametrize("inner", [(), (5,), (2, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_any_rank_and_layout(inner: tuple[int, ...], layout: str) -> None:
    x = torch.randn(3, 7, *inner)
    index = torch.randint(-1, 7, (3, 11))
    got = gather_tokens(relayout(x, layout), relayout(index, layout))
    assert_same(got, gather_tokens_oracle(x, index))
    assert_alone(gather_tokens, {"x": x, "index": index})


def test_gather_empty() -> None:
    assert gather_tokens(torch.zeros(0, 3, 2), torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 4, 2)
    assert gather_tokens(torch.zeros(2, 0, 2), torch.full((2, 3), -1)).eq(0).all()
    assert gather_tokens(torch.zeros(2, 3, 2), torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 2)


def test_gather_stops_nan_of_tokens_not_taken() -> None:
    x = torch.tensor([[[1.0], [math.nan], [3.0]]], requires_grad=True)
    got = gather_tokens(x, torch.tensor([[0, -1, 2]]))
    assert got[0, :, 0].tolist() == [1, 0, 3]
    got.backward(torch.tensor([[[1.0], [math.nan], [1.0]]]))  # the gradient of a slot at -1 goes nowhere
    assert x.grad[0, :, 0].tolist() == [1, 0, 1]


def test_gather_gradient_sums_over_the_slots_of_a_token() -> None:
    x = torch.zeros(1, 3, 1, requires_grad=True)
    gather_tokens(x, torch.tensor([[2, 0, 2, -1]])).backward(torch.tensor([1.0, 10, 100, 1000]).view(1, 4, 1))
    assert x.grad[0, :, 0].tolist() == [10, 0, 101]


def test_gather_unchecked_bad_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "check_values", lambda device: False)
    index = torch.tensor([[0, 3, -2, -1], [0, 1, 2, -1]])
    x = torch.randn(2, 3, 2)
    got = reference.key_tokens_gather(x, index)
    assert_same(got, gather_tokens_oracle(x, index))
    assert got[0, 1:3].isnan().all()
    assert got[1].isfinite().all()
    assert reference.key_tokens_gather(x.long(), index)[0, 1:3].eq(0).all()
    assert reference.key_tokens_gather_backward(torch.ones(2, 4, 2), index, 3)[0, :, 0].tolist() == [1, 0, 0]
