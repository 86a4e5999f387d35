"""attention_scores as an operator: gradcheck, opcheck, compile, autocast, fake tensors, error messages."""

# ruff: noqa: E501 - a table has one case a line

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsify_kernels import AttentionScores, attention_scores
from sparsify_kernels.testing import (
    AttentionShape,
    assert_compiles,
    attention_inputs,
    attention_scores_eager,
    compiled_anew,
    relayout,
)

SMALL = AttentionShape(3, 2, 5, 7, 4, 6)
OP = torch.ops.sparsify_kernels.attention_scores.default
BACKWARD = torch.ops.sparsify_kernels.attention_scores_backward.default


@pytest.mark.parametrize("valid", [False, True], ids=["all", "valid"])
@pytest.mark.parametrize("value_dim", [0, 3], ids=["scores only", "values"])
@pytest.mark.parametrize("scale", [None, -0.7])
def test_gradcheck(valid: bool, value_dim: int, scale: float | None) -> None:
    shape = AttentionShape(5, 2, 3, 4, 2, value_dim)  # with valid, only the fifth has several queries and keys
    inputs = attention_inputs(shape, torch.float64, bias=True, valid=valid)
    names = [n for n, t in inputs.items() if isinstance(t, Tensor) and t.is_floating_point()]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = attention_scores(**{**inputs, **dict(zip(names, tensors, strict=True))}, scale=scale)
        return tuple(t for t in result if t is not None)

    assert torch.autograd.gradcheck(function, [inputs[n].requires_grad_() for n in names])


@pytest.mark.parametrize("part", [0, 1], ids=["received", "output"])
@pytest.mark.parametrize("name", ["q", "k", "v", "key_bias"])
def test_one_result_and_one_gradient_at_a_time(part: int, name: str) -> None:
    inputs = attention_inputs(AttentionShape(2, 1, 3, 4, 2, 3), torch.float64, bias=True)
    leaf = inputs[name].requires_grad_()
    (got,) = torch.autograd.grad(attention_scores(**inputs)[part].square().sum(), leaf)
    if (part, name) == (0, "v"):  # the scores do not depend on v
        assert got.eq(0).all()
        return
    (want,) = torch.autograd.grad(attention_scores_eager(**inputs)[part].square().sum(), leaf)
    torch.testing.assert_close(got, want)


def test_backward_computes_only_what_is_wanted() -> None:
    inputs = attention_inputs(SMALL, bias=True)
    args = (inputs["q"], inputs["k"], inputs["v"], inputs["key_bias"], None, None)
    received, output, lse = OP(*args, None)
    for wanted in ([True, False, False, False], [False, True, False, True], [False, False, True, False]):
        grads = BACKWARD(torch.ones_like(received), torch.ones_like(output), *args, output, lse, None, wanted)
        assert [g.numel() > 0 for g in grads] == wanted


def test_log_sum_exp_is_plus_infinity_in_dead_rows() -> None:
    inputs = attention_inputs(SMALL, valid=True, poison=True)
    tensors = [inputs[n] for n in ("q", "k", "v", "key_bias", "query_valid", "key_valid")]
    lse = OP(*tensors, None)[2]
    dead = ~(inputs["query_valid"] & inputs["key_valid"].any(1, keepdim=True))
    assert torch.equal(lse == torch.inf, dead[:, None, :].expand_as(lse))


def test_no_second_derivative() -> None:
    q = torch.randn(1, 1, 2, 3, requires_grad=True)
    loss = attention_scores(q, torch.randn(1, 1, 4, 3)).received.square().sum()
    (grad,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention_scores: second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize(
    "shape", [SMALL, SMALL._replace(batch=0), SMALL._replace(value_dim=0)], ids=["small", "empty", "scores only"]
)
def test_opcheck(shape: AttentionShape, layout: str, requires_grad: bool) -> None:
    inputs = attention_inputs(shape, bias=True, valid=True, layout=layout)
    args = [inputs[n] for n in ("q", "k", "v", "key_bias", "query_valid", "key_valid")]
    if requires_grad:
        args = [a.requires_grad_() if a is not None and a.is_floating_point() else a for a in args]
    torch.library.opcheck(OP, (*args, None))


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("batch", [3, 0])
def test_opcheck_backward(layout: str, batch: int) -> None:
    inputs = attention_inputs(SMALL._replace(batch=batch), bias=True, valid=True, layout=layout)
    args = [inputs[n] for n in ("q", "k", "v", "key_bias", "query_valid", "key_valid")]
    received, output, lse = OP(*args, None)
    grads = relayout(torch.ones_like(received), layout), relayout(torch.ones_like(output), layout)
    torch.library.opcheck(BACKWARD, (*grads, *args, output, lse, 0.5, [True, True, True, True]))
    torch.library.opcheck(BACKWARD, (grads[0], None, *args, output, lse, None, [True, False, False, True]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    inputs = attention_inputs(SMALL, bias=True, valid=True)
    for name in ("q", "k", "v", "key_bias"):
        inputs[name].requires_grad_()
    assert_compiles(attention_scores, **inputs, scale=0.3, dynamic=dynamic)
    q, k = inputs["q"], inputs["k"]
    assert_compiles(attention_scores, q, k, dynamic=dynamic)


def test_compiled_with_sizes_and_numbers_that_change() -> None:
    compiled = torch.compile(attention_scores, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples, queries, keys, scale in ((2, 5, 9, 0.5), (3, 70, 33, 0.25), (4, 600, 65, 1.5)):
        inputs = attention_inputs(AttentionShape(samples, 2, queries, keys, 16, 8), bias=True, valid=True)
        leaves = [inputs[n].requires_grad_() for n in ("q", "k", "v", "key_bias")]
        results = [f(**inputs, scale=scale) for f in (compiled, attention_scores)]
        grads = [torch.autograd.grad(r.received.square().sum() + r.output.square().sum(), leaves) for r in results]
        for ours, theirs in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
            assert torch.equal(ours, theirs)


def gradients(result: AttentionScores, leaves: list[torch.Tensor], **options: bool) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(result.received.square().sum() + result.output.float().sin().sum(), leaves, **options)


def test_autocast_casts_q_k_v_and_nothing_else() -> None:
    inputs = attention_inputs(SMALL, bias=True)
    leaves = [inputs[n].requires_grad_() for n in ("q", "k", "v", "key_bias")]
    rounded = {n: t.bfloat16() if n in ("q", "k", "v") else t for n, t in inputs.items()}
    want = attention_scores(**rounded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attention_scores(**inputs)
        mixed = attention_scores(**{**inputs, "k": rounded["k"]})
        double = attention_scores(inputs["q"].double(), inputs["k"].double())
        compiled = torch.compile(attention_scores, fullgraph=True)(**inputs)
    slopes = gradients(want, leaves, retain_graph=True)
    for result in (got, mixed, compiled):
        assert result.output.dtype == torch.bfloat16
        assert torch.equal(result.received, want.received)
        assert torch.equal(result.output, want.output)
        ours = gradients(result, leaves, retain_graph=result is mixed)  # whose k is that of ``want``
        assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(ours, slopes, strict=True))
    assert double.received.dtype == torch.float64


def test_autocast_does_not_reach_into_the_op() -> None:
    inputs = attention_inputs(SMALL)
    args = (inputs["q"], inputs["k"], inputs["v"], None, None, None, None)
    want = OP(*args)
    grad = BACKWARD(torch.ones_like(want[0]), None, *args[:6], *want[1:], None, [True] * 3 + [False])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = OP(*args)
        grad_autocast = BACKWARD(torch.ones_like(want[0]), None, *args[:6], *want[1:], None, [True] * 3 + [False])
    assert all(torch.equal(a, b) for a, b in zip((*got, *grad_autocast), (*want, *grad), strict=True))


def tensors(**changes: Any) -> dict[str, Any]:
    inputs = {"q": torch.zeros(2, 3, 4, 8), "k": torch.zeros(2, 3, 5, 8), "v": torch.zeros(2, 3, 5, 6)}
    return {**inputs, **changes}


ERRORS = [
    (TypeError, {"q": [1.0]}, "q must be a tensor, float32 or bfloat16 or float16 or float64 [B, H, M, d], got list"),
    (TypeError, {"q": torch.zeros(2, 3, 4, 8, dtype=torch.int32)}, "q must be float32 or bfloat16 or float16 or float64 [B, H, M, d], got int32 [2, 3, 4, 8]"),
    (ValueError, {"q": torch.zeros(2, 4, 8)}, "q must be float32 or bfloat16 or float16 or float64 [B, H, M, d], got float32 [2, 4, 8]"),
    (ValueError, {"q": torch.zeros(2, 0, 4, 8)}, "q must be [B, H, M, d] with H >= 1 and d >= 1, got float32 [2, 0, 4, 8]"),
    (ValueError, {"q": torch.zeros(2, 3, 4, 0)}, "q must be [B, H, M, d] with H >= 1 and d >= 1, got float32 [2, 3, 4, 0]"),
    (ValueError, {"k": torch.zeros(2, 5, 8)}, "k must be float32 or bfloat16 or float16 or float64 [B, H, N, d], got float32 [2, 5, 8]"),
    (ValueError, {"k": torch.zeros(2, 3, 5, 7)}, "k must be float32 or bfloat16 or float16 or float64 [B, H, N, d] with d = 8, got float32 [2, 3, 5, 7]"),
    (ValueError, {"k": torch.zeros(1, 3, 5, 8)}, "k must be float32 or bfloat16 or float16 or float64 [B, H, N, d] with B = 2, got float32 [1, 3, 5, 8]"),
    (TypeError, {"k": torch.zeros(2, 3, 5, 8, dtype=torch.float64)}, "k must be float32 like q, got float64 [2, 3, 5, 8]"),
    (ValueError, {"k": torch.zeros(2, 3, 5, 8, device="meta")}, "k must be on cpu like q, got meta"),
    (ValueError, {"v": torch.zeros(2, 3, 4, 6)}, "v must be float32 or bfloat16 or float16 or float64 [B, H, N, dv] with N = 5, got float32 [2, 3, 4, 6]"),
    (ValueError, {"v": torch.zeros(2, 3, 5)}, "v must be float32 or bfloat16 or float16 or float64 [B, H, N, dv], got float32 [2, 3, 5]"),
    (ValueError, {"v": torch.zeros(2, 3, 5, 6, device="meta")}, "v must be on cpu like q, got meta"),
    (TypeError, {"v": torch.zeros(2, 3, 5, 6).bfloat16()}, "v must be float32 like q, got bfloat16 [2, 3, 5, 6]"),
    (ValueError, {"key_bias": torch.zeros(2, 4)}, "key_bias must be float32 or bfloat16 or float16 or float64 [B, N] with N = 5, got float32 [2, 4]"),
    (ValueError, {"key_bias": torch.zeros(5)}, "key_bias must be float32 or bfloat16 or float16 or float64 [B, N], got float32 [5]"),
    (ValueError, {"key_bias": torch.zeros(2, 5, device="meta")}, "key_bias must be on cpu like q, got meta"),
    (TypeError, {"key_bias": torch.zeros(2, 5).long()}, "key_bias must be float32 or bfloat16 or float16 or float64 [B, N], got int64 [2, 5]"),
    (TypeError, {"query_valid": torch.zeros(2, 4)}, "query_valid must be bool [B, M], got float32 [2, 4]"),
    (ValueError, {"query_valid": torch.zeros(2, 5).bool()}, "query_valid must be bool [B, M] with M = 4, got bool [2, 5]"),
    (ValueError, {"query_valid": torch.zeros(4).bool()}, "query_valid must be bool [B, M], got bool [4]"),
    (ValueError, {"query_valid": torch.zeros(2, 4, device="meta").bool()}, "query_valid must be on cpu like q, got meta"),
    (ValueError, {"key_valid": torch.zeros(5).bool()}, "key_valid must be bool [B, N], got bool [5]"),
    (ValueError, {"key_valid": torch.zeros(2, 5, device="meta").bool()}, "key_valid must be on cpu like q, got meta"),
    (TypeError, {"key_valid": torch.zeros(2, 5)}, "key_valid must be bool [B, N], got float32 [2, 5]"),
    (ValueError, {"key_valid": torch.zeros(2, 4).bool()}, "key_valid must be bool [B, N] with N = 5, got bool [2, 4]"),
    (TypeError, {"scale": "1"}, "scale must be a float or None, got '1'"),
    (TypeError, {"scale": True}, "scale must be a float or None, got True"),
    (TypeError, {"scale": torch.tensor(1.0)}, "scale must be a float or None, got float32 []"),
    (ValueError, {"scale": float("nan")}, "scale must be finite, got nan"),
    (ValueError, {"scale": float("inf")}, "scale must be finite, got inf"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "changes", "message"), ERRORS, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_errors_name_the_argument(
    error: type[Exception], changes: dict[str, Any], message: str, compiled: bool
) -> None:
    op = compiled_anew(attention_scores) if compiled else attention_scores
    with pytest.raises((error, RuntimeError) if compiled else error) as caught:
        op(**tensors(**changes))
    assert str(caught.value) == f"attention_scores: {message}"


def test_errors_and_shapes_under_fake_tensors() -> None:
    with FakeTensorMode():
        received, output = attention_scores(**tensors())
        assert received.shape == (2, 5)
        assert output.shape == (2, 3, 4, 6)
        with pytest.raises(ValueError, match=r"attention_scores: k must be .* with d = 8, got float32 \[2, 3, 5, 7\]"):
            attention_scores(**tensors(k=torch.zeros(2, 3, 5, 7)))
