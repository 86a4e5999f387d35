"""merge_tokens as an operator: gradcheck, opcheck, compile, autocast, fake tensors, error messages."""

# ruff: noqa: E501 - a table has one case a line

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsify_kernels import KeyTokens, merge_tokens
from sparsify_kernels.testing import (
    MergeShape,
    assert_accurate,
    assert_compiles,
    compiled_anew,
    merge_inputs,
    merge_tokens_eager,
    relayout,
)

SMALL = MergeShape(3, 23, 5, 6, 4)
OP = torch.ops.sparsify_kernels.merge_tokens.default
BACKWARD = torch.ops.sparsify_kernels.merge_tokens_backward.default


@pytest.mark.parametrize("valid", [False, True], ids=["all", "valid"])
def test_gradcheck(valid: bool) -> None:
    inputs = merge_inputs(MergeShape(3, 7, 3, 2, 2), torch.float64, valid=valid)
    weight = (torch.rand(3, 7, dtype=torch.float64) + 0.5).requires_grad_()

    def function(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return merge_tokens(**{**inputs, "x": x, "weight": weight})[:2]

    assert torch.autograd.gradcheck(function, (inputs["x"].requires_grad_(), weight))
    assert torch.autograd.gradcheck(lambda x: merge_tokens(**{**inputs, "x": x}).tokens, (inputs["x"],))
    assert torch.autograd.gradcheck(lambda w: merge_tokens(**{**inputs, "weight": w}).size, (weight,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_as_accurate_as_the_oracle_asks(dtype: torch.dtype) -> None:
    inputs = merge_inputs(SMALL, dtype, weight=True, valid=True)
    assign = merge_tokens(**inputs).assign
    slopes = torch.randn(3, 5, 6, dtype=torch.float64)

    def run(x: Tensor, weight: Tensor, function: Any) -> tuple[Tensor, ...]:
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        return torch.autograd.grad((function(x, weight).double() * slopes).sum(), (x, weight))

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        return merge_tokens_eager(x, assign, 5, weight)[0]

    x, weight = inputs["x"], inputs["weight"]
    weight = weight + 0.5  # a cluster of weight 0 has no gradient; autograd's formula disagrees there by convention
    ours = run(x, weight, lambda a, w: merge_tokens(**{**inputs, "x": a, "weight": w}).tokens)
    low = run(x, weight, eager)
    truth = run(x.double(), weight.double(), eager)
    for name, o, e, t in zip(("x", "weight"), ours, low, truth, strict=True):
        assert_accurate(o, eager=e, truth=t, what=f"gradient of {name}")


def test_a_cluster_of_weight_zero_has_gradient_zero() -> None:
    x = torch.randn(1, 3, 2, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    metric = torch.tensor([[[1.0], [-1.0], [-1.0]]])
    tokens, size, _ = merge_tokens(x, metric, KeyTokens(torch.tensor([[0, 1]]), torch.tensor([2])), weight=weight)
    (tokens.sum() + size.sum()).backward()
    assert x.grad[0].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert weight.grad.tolist() == [[1, 0, 0]]


def test_metric_has_no_gradient() -> None:
    inputs = merge_inputs(SMALL)
    inputs["metric"].requires_grad_()
    tokens = merge_tokens(**{**inputs, "x": inputs["x"].requires_grad_()}).tokens
    assert torch.autograd.grad(tokens.sum(), inputs["metric"], allow_unused=True)[0] is None


def test_backward_computes_only_what_is_wanted_and_keeps_x_only_for_the_weights() -> None:
    inputs = merge_inputs(SMALL, weight=True)
    keys = inputs["keys"]
    out = OP(inputs["x"], inputs["metric"], *keys, inputs["weight"], None)
    grad = torch.ones_like(out[0])
    for wanted, x in (([True, False], None), ([False, True], inputs["x"])):
        grads = BACKWARD(grad, None, x, inputs["weight"], *out, wanted)
        assert [g.numel() > 0 for g in grads] == wanted
    tokens = merge_tokens(**{**inputs, "x": inputs["x"].requires_grad_()}).tokens
    assert not any(t is inputs["x"] for t in tokens.grad_fn.saved_tensors)


def test_no_second_derivative() -> None:
    x = torch.randn(1, 3, 2, requires_grad=True)
    keys = KeyTokens(torch.tensor([[0]]), torch.tensor([1]))
    (grad,) = torch.autograd.grad(merge_tokens(x, x, keys).tokens.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="merge_tokens: second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("batch", [3, 0])
def test_opcheck(batch: int, layout: str, requires_grad: bool) -> None:
    inputs = merge_inputs(SMALL._replace(batch=batch), weight=True, valid=True, layout=layout)
    x, weight = (inputs[n].requires_grad_(requires_grad) for n in ("x", "weight"))
    torch.library.opcheck(OP, (x, inputs["metric"], *inputs["keys"], weight, inputs["valid"]))
    torch.library.opcheck(OP, (x, inputs["metric"], *inputs["keys"], None, inputs["valid"]))


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("batch", [3, 0])
def test_opcheck_backward(batch: int, layout: str) -> None:
    inputs = merge_inputs(SMALL._replace(batch=batch), weight=True, valid=True, layout=layout)
    out = OP(inputs["x"], inputs["metric"], *inputs["keys"], inputs["weight"], inputs["valid"])
    grads = [relayout(torch.ones_like(t), layout) for t in out[:2]]
    torch.library.opcheck(BACKWARD, (*grads, inputs["x"], inputs["weight"], *out, [True, True]))
    torch.library.opcheck(BACKWARD, (grads[0], None, None, None, *out, [True, False]))


@pytest.mark.parametrize(("dynamic", "backend"), [(False, "inductor"), (True, "aot_eager"), (True, "inductor")])
def test_compiles_without_graph_breaks(dynamic: bool, backend: str) -> None:
    inputs = merge_inputs(SMALL, weight=True, valid=True)
    inputs["x"].requires_grad_()
    inputs["weight"].requires_grad_()
    assert_compiles(merge_tokens, **inputs, dynamic=dynamic, backend=backend)
    assert_compiles(
        merge_tokens,
        inputs["x"],
        inputs["metric"],
        inputs["keys"],
        valid=inputs["valid"],
        dynamic=dynamic,
        backend=backend,
    )


def test_autocast_changes_nothing() -> None:
    inputs = merge_inputs(MergeShape(3, 200, 50, 6, 4), weight=True, exact=False)
    leaves = [inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()]
    want = merge_tokens(**inputs)
    rounded = merge_tokens(**{**inputs, "metric": inputs["metric"].bfloat16()})
    assert not torch.equal(rounded.assign, want.assign)  # in bf16 some token would join another key
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = merge_tokens(**inputs)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))
    ours, theirs = (torch.autograd.grad(t.tokens.square().sum() + t.size.sum(), leaves) for t in (got, want))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


FLOATS = "float32 or bfloat16 or float16 or float64"


def arguments(**changes: Any) -> dict[str, Any]:
    args = {"x": torch.zeros(2, 5, 3), "metric": torch.zeros(2, 5, 4), "keys": keys_of([[0, 3], [1, 2]], [2, 2])}
    return {**args, **changes}


def keys_of(index: Any, count: Any, dtype: torch.dtype = torch.int64) -> KeyTokens:
    return KeyTokens(torch.tensor(index, dtype=dtype), torch.tensor(count))


ERRORS = [
    (TypeError, {"x": None}, f"x must be a tensor, {FLOATS} [B, N, D], got None"),
    (TypeError, {"x": torch.zeros(2, 5, 3).int()}, f"x must be {FLOATS} [B, N, D], got int32 [2, 5, 3]"),
    (ValueError, {"x": torch.zeros(5, 3)}, f"x must be {FLOATS} [B, N, D], got float32 [5, 3]"),
    (TypeError, {"metric": torch.zeros(2, 5, 4).int()}, f"metric must be {FLOATS} [B, N, d], got int32 [2, 5, 4]"),
    (ValueError, {"metric": torch.zeros(2, 5)}, f"metric must be {FLOATS} [B, N, d], got float32 [2, 5]"),
    (ValueError, {"metric": torch.zeros(2, 6, 4)}, f"metric must be {FLOATS} [B, N, d] with N = 5, got float32 [2, 6, 4]"),
    (ValueError, {"metric": torch.zeros(2, 5, 4, device="meta")}, "metric must be on cpu like x, got meta"),
    (TypeError, {"keys": torch.zeros(2, 2)}, "keys must be KeyTokens(index, count), got float32 [2, 2]"),
    (TypeError, {"keys": keys_of([[0] * 7] * 2, [2, 2], torch.int32)}, "keys.index must be int64 [B, K], got int32 [2, 7]"),
    (ValueError, {"keys": keys_of([0, 1], [2, 2])}, "keys.index must be int64 [B, K], got int64 [2]"),
    (ValueError, {"keys": KeyTokens(torch.zeros(2, 2, device="meta").long(), torch.zeros(2).long())}, "keys.index must be on cpu like x, got meta"),
    (ValueError, {"keys": KeyTokens(torch.zeros(2, 2).long(), torch.zeros(2, device="meta").long())}, "keys.count must be on cpu like x, got meta"),
    (ValueError, {"keys": keys_of([[0, 1]] * 2, [2, 2, 2])}, "keys.count must be int64 [B] with B = 2, got int64 [3]"),
    (ValueError, {"keys": keys_of([[0, 1]], [2, 2])}, "keys.index must be int64 [B, K] with B = 2, got int64 [1, 2]"),
    (ValueError, {"keys": keys_of([[], []], [0, 0])}, "keys.index must be int64 [B, K] with K >= 1, got int64 [2, 0]"),
    (ValueError, {"keys": keys_of([[0, 1]] * 2, [[2], [2]])}, "keys.count must be int64 [B], got int64 [2, 1]"),
    (TypeError, {"keys": keys_of([[0, 1]] * 2, [2.0, 2.0])}, "keys.count must be int64 [B], got float32 [2]"),
    (ValueError, {"weight": torch.zeros(2, 4)}, f"weight must be {FLOATS} [B, N] with N = 5, got float32 [2, 4]"),
    (ValueError, {"weight": torch.zeros(5)}, f"weight must be {FLOATS} [B, N], got float32 [5]"),
    (ValueError, {"weight": torch.zeros(2, 5, device="meta")}, "weight must be on cpu like x, got meta"),
    (TypeError, {"weight": torch.zeros(2, 5).int()}, f"weight must be {FLOATS} [B, N], got int32 [2, 5]"),
    (TypeError, {"valid": torch.zeros(2, 5)}, "valid must be bool [B, N], got float32 [2, 5]"),
    (ValueError, {"valid": torch.zeros(5).bool()}, "valid must be bool [B, N], got bool [5]"),
    (ValueError, {"valid": torch.zeros(2, 5, device="meta").bool()}, "valid must be on cpu like x, got meta"),
    (ValueError, {"valid": torch.zeros(2, 4).bool()}, "valid must be bool [B, N] with N = 5, got bool [2, 4]"),
    # values
    (ValueError, {"keys": keys_of([[0, 3], [1, 5]], [2, 2])}, "keys.index must be in [0, 5) below keys.count, got 5 at [1, 1]"),
    (ValueError, {"keys": keys_of([[-1, 3], [1, 2]], [2, 2])}, "keys.index must be in [0, 5) below keys.count, got -1 at [0, 0]"),
    (ValueError, {"keys": keys_of([[0, 3], [1, 2]], [2, 3])}, "keys.count must be in [0, 2], got 3 at [1]"),
    (ValueError, {"keys": keys_of([[0, 3], [1, 2]], [-1, 2])}, "keys.count must be in [0, 2], got -1 at [0]"),
    (ValueError, {"keys": keys_of([[0, 3], [1, 2]], [2, 0])}, "keys.count must be at least 1 where a sample has valid tokens, got 0 at [1]"),
    (ValueError, {"valid": torch.tensor([[T, T, T, F, T] for T, F in [(True, False)]] * 2)}, "keys.index must name valid tokens below keys.count, got 3 at [0, 1]"),
    (ValueError, {"weight": torch.tensor([[1.0] * 5, [1, 1, -0.5, 1, 1]])}, "weight must be finite and >= 0 at valid tokens, got -0.5 at [1, 2]"),
    (ValueError, {"weight": torch.tensor([[1.0] * 5, [1, 1, math.nan, 1, 1]])}, "weight must be finite and >= 0 at valid tokens, got nan at [1, 2]"),
    (ValueError, {"weight": torch.tensor([[1.0] * 5, [1, 1, math.inf, 1, 1]])}, "weight must be finite and >= 0 at valid tokens, got inf at [1, 2]"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "changes", "message"), ERRORS, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_errors_name_the_argument(
    error: type[Exception], changes: dict[str, Any], message: str, compiled: bool
) -> None:
    op = compiled_anew(merge_tokens) if compiled else merge_tokens
    with pytest.raises((error, RuntimeError) if compiled else error) as caught:
        op(**arguments(**changes))
    assert str(caught.value) == f"merge_tokens: {message}"


def test_value_errors_compiled() -> None:
    compiled = torch.compile(merge_tokens, fullgraph=True)
    with pytest.raises(
        RuntimeError, match=r"^merge_tokens: keys.index must be in \[0, 5\) below keys.count, got 5 at \[1, 1\]$"
    ):
        compiled(**arguments(keys=keys_of([[0, 3], [1, 5]], [2, 2])))


def test_errors_and_shapes_under_fake_tensors() -> None:
    with FakeTensorMode():
        args = arguments(keys=KeyTokens(torch.zeros(2, 2).long(), torch.zeros(2).long()))
        tokens, size, assign = merge_tokens(**args)
        assert (tokens.shape, size.shape, assign.shape) == ((2, 2, 3), (2, 2), (2, 5))
        with pytest.raises(ValueError, match=r"merge_tokens: metric must be .* with N = 5, got float32 \[2, 6, 4\]"):
            merge_tokens(**{**args, "metric": torch.zeros(2, 6, 4)})
