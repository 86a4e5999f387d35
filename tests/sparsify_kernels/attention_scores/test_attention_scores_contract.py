"""attention_scores: every sentence of its contract, as literal tables and against the oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_kernels import AttentionScores, attention_scores
from sparsify_kernels.testing import (
    ATTENTION_SHAPES,
    LAYOUTS,
    AttentionShape,
    assert_accurate,
    assert_alone,
    assert_same,
    attention_inputs,
    attention_scores_eager,
    attention_scores_oracle,
    poisoned_memory,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SMALL = AttentionShape(3, 2, 5, 7, 4, 6)
LOG3 = math.log(3.0)

# Sizes at which batched matrix products round otherwise for another batch size or alignment.
UNALIGNED = (
    AttentionShape(4, 1, 1, 301, 9, 1),
    AttentionShape(3, 1, 7, 640, 33, 33),
    AttentionShape(3, 1, 65, 1, 8, 3),
    AttentionShape(2, 1, 65, 129, 40, 5),
)

# One head, scale 1, queries (1, 0), keys (0, log 3), values (4, 8): rows of the softmax (1/4, 3/4) and (1/2, 1/2).
TABLE = [
    # name, key_bias, query_valid, key_valid, received, output
    ("plain", None, None, None, (3 / 8, 5 / 8), (7, 6)),
    ("bias", (LOG3, 0), None, None, (5 / 8, 3 / 8), (6, 5)),
    ("bias of minus infinity hides a key", (-math.inf, 0), None, None, (0, 1), (8, 8)),
    ("bias of minus infinity everywhere", (-math.inf, -math.inf), None, None, (0, 0), (0, 0)),
    ("one valid query", None, (True, False), None, (1 / 4, 3 / 4), (7, 0)),
    ("the other valid query", None, (False, True), None, (1 / 2, 1 / 2), (0, 6)),
    ("one valid key", None, None, (True, False), (1, 0), (4, 4)),
    ("no valid key", None, None, (False, False), (0, 0), (0, 0)),
    ("no valid query", None, (False, False), None, (0, 0), (0, 0)),
    ("one of each", None, (False, True), (False, True), (0, 1), (0, 8)),
]


def literal(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1)


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case[0])
def test_literal_table(case: tuple[Any, ...]) -> None:
    _, bias, query_valid, key_valid, received, output = case
    got = attention_scores(
        literal((1, 0)),
        literal((0, LOG3)),
        literal((4, 8)),
        scale=1.0,
        key_bias=None if bias is None else torch.tensor([bias], dtype=torch.float32),
        query_valid=None if query_valid is None else torch.tensor([query_valid]),
        key_valid=None if key_valid is None else torch.tensor([key_valid]),
    )
    torch.testing.assert_close(got.received, torch.tensor([received], dtype=torch.float32))
    torch.testing.assert_close(got.output, literal(output))


def test_heads_are_averaged() -> None:
    q, k = torch.tensor([[[[1.0]], [[0.0]]]]), torch.tensor([[[[0.0], [LOG3]], [[0.0], [0.0]]]])
    torch.testing.assert_close(attention_scores(q, k, scale=1.0).received, torch.tensor([[3 / 8, 5 / 8]]))


def test_importance_is_summed_over_the_queries_not_over_the_softmaxed_axis() -> None:
    # Every query looks at key 2. Summed along the keys every importance would be the same.
    q = torch.ones(1, 1, 8, 1)
    k = torch.tensor([0.0, 0.0, 30.0, 0.0, 0.0]).view(1, 1, 5, 1)
    received = attention_scores(q, k).received[0]
    assert received.argmax() == 2
    torch.testing.assert_close(received, torch.tensor([0.0, 0, 1, 0, 0]))


def test_default_scale_is_one_over_the_root_of_the_width() -> None:
    q, k = torch.randn(1, 1, 3, 16), torch.randn(1, 1, 5, 16)
    assert_same(attention_scores(q, k), attention_scores(q, k, scale=0.25))
    assert not torch.equal(attention_scores(q, k).received, attention_scores(q, k, scale=1.0).received)


def test_without_v_there_is_no_output() -> None:
    result = attention_scores(torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4))
    assert isinstance(result, AttentionScores)
    assert result.output is None
    assert result.received.shape == (1, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_received_sums_to_one_over_the_valid_keys(dtype: torch.dtype) -> None:
    inputs = attention_inputs(SMALL, dtype, bias=True, valid=True, poison=True)
    received, output = attention_scores(**inputs)
    assert received.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert output.dtype == dtype
    alive = inputs["key_valid"].any(1) & inputs["query_valid"].any(1)
    assert alive.tolist() == [False, False, True]
    torch.testing.assert_close(received.sum(1), alive.to(received.dtype))
    assert received.masked_select(~inputs["key_valid"]).eq(0).all()
    assert output.movedim(1, 2)[~inputs["query_valid"]].eq(0).all()
    assert output[0].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
@pytest.mark.parametrize("valid", [False, True], ids=["all", "valid"])
def test_as_accurate_as_the_oracle_asks(shape: AttentionShape, dtype: torch.dtype, valid: bool) -> None:
    inputs = attention_inputs(shape, dtype, bias=True, valid=valid, poison=True)
    with poisoned_memory():
        ours = attention_scores(**inputs)
    eager = attention_scores_eager(**inputs) if shape.keys else None
    truth = attention_scores_oracle(**inputs)
    for name in ("received", "output"):
        if getattr(truth, name) is None:
            assert getattr(ours, name) is None
        else:
            baseline = getattr(truth if eager is None else eager, name)
            assert_accurate(getattr(ours, name), eager=baseline, truth=getattr(truth, name), what=name)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64])  # in fp64 gradcheck is the judge
@pytest.mark.parametrize("valid", [False, True], ids=["all", "valid"])
@pytest.mark.parametrize("value_dim", [0, 6], ids=["scores only", "values"])
def test_gradients_as_accurate_as_the_oracle_asks(dtype: torch.dtype, valid: bool, value_dim: int) -> None:
    # With valid, only the fifth sample has several queries and keys.
    inputs = attention_inputs(SMALL._replace(batch=5, value_dim=value_dim), dtype, bias=True, valid=valid)
    exact = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in inputs.items()}
    ours = gradients(attention_scores, inputs)
    eager = gradients(attention_scores_eager, inputs)
    truth = gradients(attention_scores_eager, exact)
    for name in truth:
        assert ours[name].dtype == inputs[name].dtype
        assert_accurate(ours[name], eager=eager[name], truth=truth[name], what=f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_at_invalid_positions_reaches_no_result_and_no_gradient(dtype: torch.dtype) -> None:
    clean = attention_inputs(SMALL, dtype, bias=True, valid=True)
    poisoned = attention_inputs(SMALL, dtype, bias=True, valid=True, poison=True)
    assert poisoned["q"].isnan().any()
    assert poisoned["k"].isnan().any()
    assert poisoned["key_bias"].isnan().any()
    assert_same(attention_scores(**poisoned), attention_scores(**clean))
    expected = gradients(attention_scores, clean)
    for name, grad in gradients(attention_scores, poisoned).items():
        assert_same(grad, expected[name], f"gradient of {name}")


def test_nan_in_gradients_at_dead_places_reaches_no_gradient() -> None:
    inputs = attention_inputs(SMALL, valid=True)
    leaves = [inputs[n].requires_grad_() for n in ("q", "k", "v")]
    received, output = attention_scores(**inputs)
    dead = ~(inputs["query_valid"] & inputs["key_valid"].any(1, keepdim=True))
    grad_output = torch.ones_like(output).masked_fill(dead[:, None, :, None], torch.nan)
    grad_received = torch.ones_like(received).masked_fill(~inputs["key_valid"], torch.nan)
    for grad in torch.autograd.grad((received, output), leaves, (grad_received, grad_output)):
        assert grad.isfinite().all()


def test_nan_at_a_valid_position_shows_in_its_sample_alone() -> None:
    inputs = attention_inputs(SMALL)
    inputs["q"][1, 0, 2, 0] = torch.nan
    received, output = attention_scores(**inputs)
    assert received[1].isnan().all()
    assert output[1, 0, 2].isnan().all()
    assert received[[0, 2]].isfinite().all()
    assert output[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [SMALL, *UNALIGNED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_does_not_depend_on_its_batch_mates(shape: AttentionShape, dtype: torch.dtype) -> None:
    inputs = attention_inputs(shape, dtype, bias=True, valid=True, poison=True)
    assert_alone(attention_scores, inputs)
    assert_alone(lambda **kwargs: tuple(gradients(attention_scores, kwargs).values()), inputs, "gradient")


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layout_changes_nothing(layout: str) -> None:
    flat = attention_inputs(SMALL, bias=True, valid=True)
    other = attention_inputs(SMALL, bias=True, valid=True, layout=layout)
    assert layout == "offset" or not other["q"].is_contiguous()
    assert_same(attention_scores(**other), attention_scores(**flat))
    expected = gradients(attention_scores, flat)
    for name, grad in gradients(attention_scores, other).items():
        assert_same(grad, expected[name], f"gradient of {name}")


def test_deterministic() -> None:
    inputs = attention_inputs(AttentionShape(2, 3, 33, 65, 16, 16), bias=True, valid=True)
    first, second = (gradients(attention_scores, inputs) for _ in range(2))
    assert_same(attention_scores(**inputs), attention_scores(**inputs))
    assert_same(tuple(first.values()), tuple(second.values()))


def test_large_logits_do_not_overflow() -> None:
    q, k = torch.tensor([[[[1e4]]]]), torch.tensor([[[[1e4], [-1e4]]]])
    assert attention_scores(q, k).received.tolist() == [[1.0, 0.0]]


def gradients(function: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of a loss that weighs every element of both outputs differently."""
    leaves = {
        name: t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for name, t in inputs.items()
        if isinstance(t, Tensor) and t.is_floating_point()
    }
    received, output = function(**{**inputs, **leaves})
    loss = received.double() @ torch.arange(1.0, received.shape[1] + 1, dtype=torch.float64)
    loss = loss.sum()
    if output is not None:
        loss = loss + (output.double() * torch.linspace(-1, 1, output[0].numel()).double().view(output[0].shape)).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
