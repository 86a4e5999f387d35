"""key_tokens and gather_tokens as operators: gradcheck, opcheck, compile, fake tensors, error messages."""

# ruff: noqa: E501 - a table has one case a line

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsify_kernels import KeyTokens, gather_tokens, key_tokens
from sparsify_kernels.testing import KeyShape, assert_compiles, compiled_anew, relayout, score_inputs

OP = torch.ops.sparsify_kernels.key_tokens.default
GATHER = torch.ops.sparsify_kernels.key_tokens_gather.default
GATHER_BACKWARD = torch.ops.sparsify_kernels.key_tokens_gather_backward.default


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("batch", [3, 0])
@pytest.mark.parametrize("capacity", [None, 3])
def test_opcheck(batch: int, layout: str, capacity: int | None) -> None:
    inputs = score_inputs(KeyShape(batch, 21), valid=True, layout=layout)
    torch.library.opcheck(OP, (inputs["scores"], inputs["valid"], 1.5, capacity))


def test_opcheck_with_scores_that_require_a_gradient() -> None:
    scores = torch.rand(2, 9, requires_grad=True)
    torch.library.opcheck(OP, (scores, None, 0.0, None))
    keys = key_tokens(scores)
    assert not keys.index.requires_grad
    assert not keys.count.requires_grad


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("batch", [3, 0])
def test_opcheck_gather(batch: int, requires_grad: bool, layout: str) -> None:
    x = relayout(torch.randn(batch, 7, 4), layout).requires_grad_(requires_grad)
    index = relayout(torch.randint(-1, 7, (batch, 5)), layout)
    torch.library.opcheck(GATHER, (x, index))
    grad = relayout(torch.randn(batch, 5, 4), layout).requires_grad_(requires_grad)
    torch.library.opcheck(GATHER_BACKWARD, (grad, index, 7))


def test_gradcheck_gather() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 0, 4, -1], [3, -1, 3, 1]])
    assert torch.autograd.gradcheck(gather_tokens, (x, index))
    assert torch.autograd.gradgradcheck(gather_tokens, (x, index))


def test_autocast_changes_nothing() -> None:
    scores, x = 1 + torch.rand(2, 300) / 100, torch.randn(2, 300, 3, requires_grad=True)
    want = key_tokens(scores)
    assert not torch.equal(key_tokens(scores.bfloat16()).index, want.index)  # in bf16 scores tie
    taken = gather_tokens(x, want.index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = key_tokens(scores)
        again = gather_tokens(x, got.index)
    assert torch.equal(got.index, want.index)
    assert torch.equal(got.count, want.count)
    assert again.dtype == torch.float32
    assert torch.equal(again, taken)
    ours, theirs = (torch.autograd.grad(t.square().sum(), x)[0] for t in (again, taken))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("dynamic", "backend"), [(False, "inductor"), (True, "aot_eager"), (True, "inductor")])
def test_compiles_without_graph_breaks(dynamic: bool, backend: str) -> None:
    def both(
        scores: torch.Tensor, valid: torch.Tensor, x: torch.Tensor
    ) -> tuple[KeyTokens, torch.Tensor, torch.Tensor]:
        keys = key_tokens(scores, fence=1.5, capacity=4, valid=valid)
        return keys, keys.valid, gather_tokens(x, keys.index)

    x = torch.randn(3, 41, 5, requires_grad=True)
    assert_compiles(both, **score_inputs(KeyShape(3, 41), valid=True), x=x, dynamic=dynamic, backend=backend)


def test_compiled_with_sizes_and_numbers_that_change() -> None:
    compiled = torch.compile(key_tokens, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens, fence, capacity in ((5, 0.0, 9), (41, 1.5, 4), (100, 0.5, 30), (3, 0.25, 2)):
        scores = torch.rand(2, tokens)
        got, want = (f(scores, fence=fence, capacity=capacity) for f in (compiled, key_tokens))
        assert torch.equal(got.index, want.index)
        assert torch.equal(got.count, want.count)


def inputs(**changes: Any) -> dict[str, Any]:
    return {"scores": torch.zeros(2, 5), **changes}


FLOATS = "float32 or bfloat16 or float16 or float64"
ERRORS = [
    (TypeError, {"scores": [[1.0]]}, f"scores must be a tensor, {FLOATS} [B, N], got list"),
    (TypeError, {"scores": torch.zeros(2, 5).int()}, f"scores must be {FLOATS} [B, N], got int32 [2, 5]"),
    (ValueError, {"scores": torch.zeros(5)}, f"scores must be {FLOATS} [B, N], got float32 [5]"),
    (TypeError, {"fence": "wide"}, "fence must be a float, got 'wide'"),
    (TypeError, {"fence": None}, "fence must be a float, got None"),
    (ValueError, {"fence": -0.5}, "fence must be finite and >= 0, got -0.5"),
    (ValueError, {"fence": math.nan}, "fence must be finite and >= 0, got nan"),
    (ValueError, {"fence": math.inf}, "fence must be finite and >= 0, got inf"),
    (TypeError, {"capacity": 2.0}, "capacity must be an int or None, got 2.0"),
    (TypeError, {"capacity": True}, "capacity must be an int or None, got True"),
    (ValueError, {"capacity": 0}, "capacity must be >= 1, got 0"),
    (TypeError, {"valid": torch.zeros(2, 5)}, "valid must be bool [B, N], got float32 [2, 5]"),
    (ValueError, {"valid": torch.zeros(5).bool()}, "valid must be bool [B, N], got bool [5]"),
    (ValueError, {"valid": torch.zeros(2, 4).bool()}, "valid must be bool [B, N] with N = 5, got bool [2, 4]"),
    (ValueError, {"valid": torch.zeros(2, 5, device="meta").bool()}, "valid must be on cpu like scores, got meta"),
]


@pytest.mark.parametrize(
    ("error", "changes", "message"), ERRORS, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_errors_name_the_argument(
    error: type[Exception], changes: dict[str, Any], message: str, compiled: bool
) -> None:
    op = compiled_anew(key_tokens) if compiled else key_tokens
    with pytest.raises((error, RuntimeError) if compiled else error) as caught:
        op(**inputs(**changes))
    assert str(caught.value) == f"key_tokens: {message}"


GATHER_ERRORS = [
    (TypeError, [1], torch.zeros(2, 3).long(), "x must be a tensor, [B, N], got list"),
    (ValueError, torch.zeros(5), torch.zeros(2, 3).long(), "x must be [B, N], got float32 [5]"),
    (TypeError, torch.zeros(2, 5, 1), torch.zeros(2, 3), "index must be int64 [B, K], got float32 [2, 3]"),
    (TypeError, torch.zeros(2, 5, 1), torch.zeros(2, 3).int(), "index must be int64 [B, K], got int32 [2, 3]"),
    (ValueError, torch.zeros(2, 5, 1), torch.zeros(3).long(), "index must be int64 [B, K], got int64 [3]"),
    (ValueError, torch.zeros(2, 5, 1), torch.zeros(2, 3, device="meta").long(), "index must be on cpu like x, got meta"),
    (ValueError, torch.zeros(2, 5, 1), torch.zeros(3, 3).long(), "index must be int64 [B, K] with B = 2, got int64 [3, 3]"),
    (ValueError, torch.zeros(2, 5, 1), torch.tensor([[0, 5], [0, 0]]), "index must be in [-1, 5), got 5 at [0, 1]"),
    (ValueError, torch.zeros(2, 5, 1), torch.tensor([[0, 4], [-2, 0]]), "index must be in [-1, 5), got -2 at [1, 0]"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "x", "index", "message"), GATHER_ERRORS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_gather_errors_name_the_argument(error: type[Exception], x: Any, index: Any, message: str) -> None:
    with pytest.raises(error) as caught:
        gather_tokens(x, index)
    assert str(caught.value) == f"gather_tokens: {message}"


def test_value_errors_eager_and_compiled() -> None:
    scores = torch.rand(2, 5)
    scores[1, 3] = math.nan
    text = r"^key_tokens: scores must not be NaN at valid tokens, got NaN at \[1, 3\]$"
    with pytest.raises(ValueError, match=text):
        key_tokens(scores)
    with pytest.raises(RuntimeError, match=text):
        torch.compile(key_tokens, fullgraph=True)(scores)
    index = torch.tensor([[7]])
    text = r"^gather_tokens: index must be in \[-1, 5\), got 7 at \[0, 0\]$"
    with pytest.raises(RuntimeError, match=text):
        torch.compile(gather_tokens, fullgraph=True, backend="aot_eager")(torch.zeros(1, 5, 2), index)


def test_errors_and_shapes_under_fake_tensors() -> None:
    with FakeTensorMode():
        keys = key_tokens(torch.zeros(2, 100))
        assert keys.index.shape == keys.valid.shape == (2, 25)
        assert keys.count.shape == (2,)
        assert gather_tokens(torch.zeros(2, 100, 3), keys.index).shape == (2, 25, 3)
        with pytest.raises(TypeError, match=r"key_tokens: valid must be bool \[B, N\], got float32 \[2, 100\]"):
            key_tokens(torch.zeros(2, 100), valid=torch.zeros(2, 100))
