"""merge_tokens: every sentence of its contract, as literal tables and against the oracle."""

# ruff: noqa: E501 - a table has one case a line

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_kernels import KeyTokens, MergedTokens, merge_tokens
from sparsify_kernels.merge_tokens import reference
from sparsify_kernels.testing import (
    LAYOUTS,
    MERGE_SHAPES,
    MergeShape,
    assert_accurate,
    assert_alone,
    assert_assignment,
    assert_same,
    merge_inputs,
    merge_tokens_eager,
    merge_tokens_oracle,
    poisoned_memory,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SMALL = MergeShape(3, 23, 5, 6, 4)
NAN = math.nan
T, F = True, False

TABLE = [
    # name, x (one value a token), metric, index, count, weight, valid, tokens, size, assign
    ("the largest dot product, not the smallest", (1, 2, 6), ((1,), (2,), (6,)), (0, 2), 2, None, None, (1, 4), (1, 2), (0, 1, 1)),
    ("negative metrics turn it round", (1, 2, 6), ((1,), (-2,), (6,)), (0, 2), 2, None, None, (1.5, 6), (2, 1), (0, 0, 1)),
    ("a key joins itself, though another is more similar", (1, 5), ((1,), (9,)), (0, 1), 2, None, None, (1, 5), (1, 1), (0, 1)),
    ("ties to the lower key", (1, 3, 5), ((1,), (2,), (1,)), (0, 2), 2, None, None, (2, 5), (2, 1), (0, 0, 1)),
    ("all metrics zero: all to the first key", (1, 3, 5, 7), ((0,), (0,), (0,), (0,)), (1, 2), 2, None, None, (11 / 3, 5), (3, 1), (0, 0, 1, 0)),
    ("all to one key", (1, 3, 5), ((1,), (2,), (3,)), (1,), 1, None, None, (3,), (3,), (0, 0, 0)),
    ("every token a key", (1, 3, 5), ((1,), (2,), (3,)), (0, 1, 2), 3, None, None, (1, 3, 5), (1, 1, 1), (0, 1, 2)),
    ("weights", (1, 3, 5), ((1,), (2,), (3,)), (1,), 1, (1, 2, 1), None, (3,), (4,), (0, 0, 0)),
    ("a weight of zero", (1, 3, 5), ((1,), (2,), (3,)), (1,), 1, (1, 0, 0), None, (1,), (1,), (0, 0, 0)),
    ("a cluster of weight zero", (1, 3, 5), ((1,), (2,), (3,)), (0, 2), 2, (4, 0, 0), None, (1, 0), (4, 0), (0, 1, 1)),
    ("slots beyond count are empty, whatever their index", (1, 3, 5), ((1,), (2,), (3,)), (1, 99, 0), 1, None, None, (3, 0, 0), (3, 0, 0), (0, 0, 0)),
    ("invalid tokens are left out", (1, 3, 5), ((1,), (2,), (3,)), (1, -1), 1, None, (F, T, T), (4, 0), (2, 0), (-1, 0, 0)),
    ("NaN at invalid tokens", (NAN, 3, 5), ((NAN,), (2,), (3,)), (1, -1), 1, (NAN, 1, 1), (F, T, T), (4, 0), (2, 0), (-1, 0, 0)),
    ("no valid token", (1, 3, 5), ((1,), (2,), (3,)), (-1, -1), 0, None, (F, F, F), (0, 0), (0, 0), (-1, -1, -1)),
    ("keys in any order: ties to the lower slot", (1, 3, 5), ((1,), (2,), (1,)), (2, 0), 2, None, None, (4, 1), (2, 1), (1, 0, 0)),
    ("a key named twice joins its lower slot", (1, 3), ((1,), (2,)), (1, 1), 2, None, None, (2, 0), (2, 0), (0, 0)),
    ("a similarity of NaN counts as minus infinity", (1, 3, 5), ((1,), (NAN,), (2,)), (0, 1), 2, None, None, (3, 3), (2, 1), (0, 1, 0)),
    ("two dimensions", (1, 2, 3, 4), ((1, 0), (0, 1), (2, 1), (1, 2)), (0, 1), 2, None, None, (2, 3), (2, 2), (0, 1, 0, 1)),
]  # fmt: skip


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case[0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_literal_table(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    _, x, metric, index, count, weight, valid, tokens, size, assign = case
    got = merge_tokens(
        torch.tensor(x, dtype=dtype).view(1, -1, 1),
        torch.tensor(metric, dtype=dtype)[None],
        KeyTokens(torch.tensor([index]), torch.tensor([count])),
        weight=None if weight is None else torch.tensor([weight], dtype=torch.float32),
        valid=None if valid is None else torch.tensor([valid]),
    )
    assert isinstance(got, MergedTokens)
    torch.testing.assert_close(got.tokens, torch.tensor(tokens, dtype=dtype).view(1, -1, 1))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert_same(got.size, torch.tensor([size], dtype=wide))
    assert_same(got.assign, torch.tensor([assign]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MERGE_SHAPES, ids=str)
def test_as_the_oracle_says(shape: MergeShape, dtype: torch.dtype) -> None:
    for seed, valid in enumerate((False, True)):
        inputs = merge_inputs(shape, dtype, weight=True, valid=valid, poison=True, seed=seed)
        with poisoned_memory():
            ours = merge_tokens(**inputs)
        truth = merge_tokens_oracle(**inputs)
        assert_same(ours.assign, truth.assign)
        if shape.batch and shape.tokens:
            eager, eager_size = merge_tokens_eager(inputs["x"], truth.assign, shape.slots, inputs["weight"])
            assert_accurate(ours.tokens, eager=eager, truth=truth.tokens)
            assert_accurate(ours.size, eager=eager_size, truth=truth.size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_assignment_reaches_the_best_similarity(dtype: torch.dtype) -> None:
    inputs = merge_inputs(MergeShape(3, 65, 13, 4, 32), dtype, exact=False, valid=True, poison=True)
    keys = inputs["keys"]
    assert_assignment(merge_tokens(**inputs).assign, inputs["metric"], keys.index, keys.count, inputs["valid"])


@pytest.mark.parametrize("weight", [False, True], ids=["ones", "weights"])
def test_nothing_is_lost(weight: bool) -> None:
    inputs = merge_inputs(SMALL, torch.float64, weight=weight, valid=True)
    tokens, size, _ = merge_tokens(**inputs)
    w = inputs["valid"].double() * (inputs["weight"] if weight else 1.0)
    torch.testing.assert_close((size[..., None] * tokens).sum(1), (w[..., None] * inputs["x"]).sum(1))
    torch.testing.assert_close(size.sum(1), w.sum(1))


def test_merging_twice_is_the_mean_of_the_originals() -> None:
    inputs = merge_inputs(MergeShape(2, 40, 12, 6, 4), torch.float64, weight=True)
    first = merge_tokens(**inputs)
    live = first.size > 0  # clusters of weight zero carry nothing on
    keys = KeyTokens(torch.tensor([[0, 5, 7], [1, 2, 11]]), torch.tensor([3, 3]))
    second = merge_tokens(first.tokens, torch.randn(2, 12, 4).double(), keys, weight=first.size)
    for b in range(2):
        for j in range(3):
            inside = (second.assign[b][first.assign[b]] == j) & live[b][first.assign[b]]
            w = inputs["weight"][b][inside]
            torch.testing.assert_close(second.size[b, j], w.sum())
            if w.sum() > 0:
                mean = (w[:, None] * inputs["x"][b][inside]).sum(0) / w.sum()
                torch.testing.assert_close(second.tokens[b, j], mean)


def test_a_sample_without_an_outlier_is_not_wiped() -> None:
    x = torch.randn(1, 6, 3)
    keys = KeyTokens(torch.tensor([[2, -1]]), torch.tensor([1]))
    tokens, size, _ = merge_tokens(x, x, keys)
    torch.testing.assert_close(tokens[0, 0], x[0].mean(0))
    assert size.tolist() == [[6, 0]]


def test_the_result_is_smaller_than_the_input() -> None:
    inputs = merge_inputs(SMALL)
    tokens, size, assign = merge_tokens(**inputs)
    assert (tokens.shape, size.shape, assign.shape) == ((3, 5, 6), (3, 5), (3, 23))


def test_similarities_are_compared_in_fp32() -> None:
    # 1 + 2^-30 and 1 are the same number in fp32: a tie, which the lower slot wins. In fp64 slot 1 would be more similar.
    metric = torch.tensor([[[1.0], [1.0], [1.0 + 2.0**-30]]], dtype=torch.float64)
    assert merge_tokens(metric, metric, KeyTokens(torch.tensor([[0, 2]]), torch.tensor([2]))).assign.tolist() == [
        [0, 0, 1]
    ]


def test_bf16_metrics_are_compared_in_fp32() -> None:
    # 256 and 257 are the same number in bf16, their dot products are not rounded to it.
    metric = torch.tensor([[[16.0, 0], [16.0, 1], [16.0, 1]]], dtype=torch.bfloat16)
    assert merge_tokens(metric, metric, KeyTokens(torch.tensor([[0, 1]]), torch.tensor([2]))).assign.tolist() == [
        [0, 1, 1]
    ]


def test_sums_are_fp32_for_half_precision() -> None:
    # In bf16 a running sum of ones sticks at 256, in fp16 at 2048.
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.ones(1, 5000, 1, dtype=dtype)
        tokens, size, _ = merge_tokens(x, x, KeyTokens(torch.tensor([[0]]), torch.tensor([1])))
        assert size.item() == 5000
        assert tokens.item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_at_invalid_tokens_reaches_no_result_and_no_gradient(dtype: torch.dtype) -> None:
    clean = merge_inputs(SMALL, dtype, weight=True, valid=True)
    poisoned = merge_inputs(SMALL, dtype, weight=True, valid=True, poison=True)
    assert poisoned["x"].isnan().any()
    assert poisoned["metric"].isnan().any()
    assert poisoned["weight"].isinf().any()
    assert_same(merge_tokens(**poisoned), merge_tokens(**clean))
    assert_same(gradients(poisoned), gradients(clean))


def test_nan_in_gradients_of_empty_slots_reaches_no_gradient() -> None:
    x = torch.randn(1, 4, 2, requires_grad=True)
    weight = torch.tensor([[1.0, 1, 0, 0]], requires_grad=True)
    metric = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1]]])
    keys = KeyTokens(
        torch.tensor([[0, 2, -1]]), torch.tensor([2])
    )  # the second cluster has weight 0, the third slot no key
    tokens, size, _ = merge_tokens(x, metric, keys, weight=weight)
    grad_tokens = torch.tensor([1.0, NAN, NAN])[None, :, None].expand_as(tokens)
    dx, dw = torch.autograd.grad((tokens, size), (x, weight), (grad_tokens, torch.tensor([[1.0, NAN, NAN]])))
    torch.testing.assert_close(dx, torch.tensor([[[0.5, 0.5], [0.5, 0.5], [0, 0], [0, 0]]]))
    assert dw[0, 2:].tolist() == [0, 0]
    assert dw.isfinite().all()


def test_nan_at_a_valid_token_shows_in_its_cluster_alone() -> None:
    x = torch.ones(2, 4, 2)
    x[0, 1] = NAN
    metric = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]).expand(2, 4, 2)
    keys = KeyTokens(torch.tensor([[0, 2], [0, 2]]), torch.tensor([2, 2]))
    tokens = merge_tokens(x, metric, keys).tokens
    assert tokens.isnan().all(-1).tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_does_not_depend_on_its_batch_mates(dtype: torch.dtype) -> None:
    for shape in (SMALL, MergeShape(3, 65, 13, 7, 40), MergeShape(3, 9, 1, 5, 1)):
        inputs = merge_inputs(shape, dtype, weight=True, valid=True, poison=True, exact=False)
        assert_alone(merge_tokens, inputs)
        assert_alone(lambda **kwargs: gradients(kwargs), inputs, "gradient")


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layout_changes_nothing(layout: str) -> None:
    flat = merge_inputs(SMALL, weight=True, valid=True)
    other = merge_inputs(SMALL, weight=True, valid=True, layout=layout)
    assert_same(merge_tokens(**other), merge_tokens(**flat))
    assert_same(gradients(other), gradients(flat))


def test_deterministic() -> None:
    inputs = merge_inputs(MergeShape(2, 640, 20, 16, 8), weight=True, exact=False)
    assert_same(merge_tokens(**inputs), merge_tokens(**inputs))
    assert_same(gradients(inputs), gradients(inputs))


UNCHECKED = [
    # name, index, count, weight, valid, assign is kept
    ("index too large", (0, 9), 2, None, None, False),
    ("index of minus one below count", (0, -1), 2, None, None, False),
    ("index far below zero", (0, -(2**40)), 2, None, None, False),
    ("key at an invalid token", (0, 2), 2, None, (T, T, F), False),
    ("count too large", (0, 2), 3, None, None, False),
    ("count below zero", (0, 2), -1, None, None, False),
    ("valid tokens and no key", (0, 2), 0, None, None, False),
    ("negative weight", (0, 2), 2, (1, -1, 1), None, True),
    ("weight NaN", (0, 2), 2, (1, NAN, 1), None, True),
    ("weight infinite", (0, 2), 2, (1, math.inf, 1), None, True),
]


@pytest.mark.parametrize("case", UNCHECKED, ids=lambda case: case[0])
def test_unchecked_bad_values_give_nan_in_their_sample_alone(
    case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, index, count, weight, valid, kept = case
    x = torch.randn(3, 3, 2)
    metric = torch.tensor([[1.0], [1.0], [-1.0]]).expand(3, 3, 1)
    good_keys = KeyTokens(torch.tensor([[0, 2]] * 3), torch.tensor([2] * 3))
    args: dict[str, Any] = {"weight": torch.ones(3, 3), "valid": torch.ones(3, 3, dtype=torch.bool)}
    want = merge_tokens(x, metric, good_keys, **args)
    good_keys.index[1] = torch.tensor(index)
    good_keys.count[1] = count
    if weight is not None:
        args["weight"][1] = torch.tensor(weight)
    if valid is not None:
        args["valid"][1] = torch.tensor(valid)
    with pytest.raises(ValueError, match=r"^merge_tokens: "):
        merge_tokens(x, metric, good_keys, **args)
    # As on a GPU: the CPU's kernels always check, so the reference stands in.
    monkeypatch.setattr(reference, "check_values", lambda device: False)
    got = MergedTokens(*reference.merge_tokens(x, metric, *good_keys, args["weight"], args["valid"]))
    assert got.tokens[1].isnan().all()
    assert got.size[1].isnan().all()
    assert torch.equal(got.assign[1], want.assign[1] if kept else torch.full((3,), -1))
    for ours, expected in zip(got, want, strict=True):
        torch.testing.assert_close(ours[[0, 2]], expected[[0, 2]])
    slopes = torch.ones_like(got.tokens), torch.ones_like(got.size)
    dx, dw = reference.merge_tokens_backward(*slopes, x, args["weight"], *got, [True, True])
    assert dx[1].eq(0).all()
    assert dw[1].eq(0).all()
    assert dx[[0, 2]].ne(0).all()
    assert dx.isfinite().all()
    assert dw.isfinite().all()


def gradients(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Gradients of x and weight for a loss that weighs every element of tokens and size differently."""
    leaves = {n: inputs[n].detach().requires_grad_() for n in ("x", "weight") if inputs[n] is not None}
    tokens, size, _ = merge_tokens(**{**inputs, **leaves})
    loss = (tokens.double() * torch.linspace(-1, 1, tokens[0].numel()).double().view(tokens[0].shape)).sum()
    loss = loss + (size.double() * torch.arange(1.0, size.shape[1] + 1).double()).sum()
    return torch.autograd.grad(loss, list(leaves.values()))
