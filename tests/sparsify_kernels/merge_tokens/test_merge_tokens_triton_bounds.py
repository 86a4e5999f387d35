"""merge_tokens in Triton: bad values, what lies outside its inputs and outputs, and what PyTorch runs beside it.

On a GPU, or under Triton's interpreter on the CPU.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_kernels import _registry
from sparsify_kernels._checks import InvalidValue
from sparsify_kernels.merge_tokens import reference
from sparsify_kernels.testing import (
    MergeShape,
    RecordedOps,
    assert_same,
    guarded,
    guarded_memory,
    merge_inputs,
    poisoned_memory,
    relayout,
)

pytest.importorskip("triton", reason="Triton is not installed: its kernels were not tested")
from sparsify_kernels.merge_tokens import triton as kernels

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # of NumPy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = math.nan
T, F = True, False


def run(name: str, *args: Any) -> tuple[Tensor, ...]:
    """Triton's kernel, with every tensor on its device and the results on the CPU."""
    implementation = _registry.implementations(name)["triton"]
    return tuple(t.cpu() for t in implementation(*(a.to(DEVICE) if isinstance(a, Tensor) else a for a in args)))


def forward(*args: Any) -> tuple[Tensor, ...]:
    return run("merge_tokens", *args)


def backward(*args: Any) -> tuple[Tensor, ...]:
    return run("merge_tokens_backward", *args)


def arguments(inputs: dict[str, Any]) -> list[Any]:
    return [inputs["x"], inputs["metric"], *inputs["keys"], inputs["weight"], inputs["valid"]]


@pytest.fixture
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "check_values", lambda device: False)


@pytest.fixture
def _checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "check_values", lambda device: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_outside_the_inputs_is_read(dtype: torch.dtype) -> None:
    args = arguments(merge_inputs(MergeShape(2, 19, 5, 33, 17), dtype, weight=True, valid=True))
    args = [a.to(DEVICE) for a in args]
    expected = forward(*args)
    given = [expected[0], expected[1], args[0], args[4], *expected]
    grads = backward(*given, [True, True])
    boxes = [guarded(a) for a in args]
    assert_same(forward(*(box.tensor for box in boxes)), expected)
    boxes += (others := [guarded(t.to(DEVICE)) for t in given])
    assert_same(backward(*(box.tensor for box in others), [True, True]), grads)
    for box in boxes:
        box.check()


def test_offsets_beyond_two_to_the_31() -> None:
    if DEVICE == "cuda":
        pytest.skip("the memory of a GPU is not taken lazily")
    buffer = torch.empty(2**31 + 2**30, dtype=torch.int16).view(torch.bfloat16)  # untouched pages cost nothing
    x = buffer.as_strided((2, 3, 4), (2**31, 2**28, 1))
    x.copy_(torch.randn(2, 3, 4))
    keys = torch.tensor([[0, 2], [0, 1]]), torch.tensor([2, 2])
    ours, expected = forward(x, x, *keys, None, None), reference.merge_tokens(x.contiguous(), x, *keys, None, None)
    assert_same(ours[1:], expected[1:])
    torch.testing.assert_close(ours[0], expected[0])
    given = (ours[0], ours[1], x, None, *ours, [True, True])
    torch.testing.assert_close(backward(*given), reference.merge_tokens_backward(*given))


BAD = [
    # name, index, count, weight, valid, assign is kept
    ("index too large", (0, 9), 2, None, None, False),
    ("index of N", (0, 3), 2, None, None, False),
    ("index of minus one below count", (0, -1), 2, None, None, False),
    ("index far below zero", (0, -(2**40)), 2, None, None, False),
    ("index far too large", (0, 2**62), 2, None, None, False),
    ("key at an invalid token", (0, 2), 2, None, (T, T, F), False),
    ("count too large", (0, 2), 3, None, None, False),
    ("count below zero", (0, 2), -1, None, None, False),
    ("valid tokens and no key", (0, 2), 0, None, None, False),
    ("negative weight", (0, 2), 2, (1, -1, 1), None, True),
    ("weight NaN", (0, 2), 2, (1, NAN, 1), None, True),
    ("weight infinite", (0, 2), 2, (1, math.inf, 1), None, True),
]


def spoilt(case: tuple[Any, ...], tokens: int) -> tuple[list[Any], list[Any]]:
    """Arguments of three samples of ``tokens``, and the same with the case's values in the second."""
    _, index, count, weight, valid, _ = case
    metric = torch.tensor([[1.0], [1.0], [-1.0]]).repeat(1, tokens // 3 + 1).view(-1)[:tokens]
    good = [
        torch.randn(3, tokens, 2),
        metric.view(1, tokens, 1).expand(3, tokens, 1),
        torch.tensor([[0, 2]] * 3),
        torch.tensor([2] * 3),
        torch.ones(3, tokens),
        torch.ones(3, tokens, dtype=torch.bool),
    ]
    bad = [t.clone() for t in good]
    bad[2][1], bad[3][1] = torch.tensor([i + tokens - 3 if i >= 3 else i for i in index]), count
    if weight is not None:
        bad[4][1, -3:] = torch.tensor(weight)
    if valid is not None:
        bad[5][1, :3] = torch.tensor(valid)
    return good, bad


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("case", BAD, ids=lambda case: case[0])
def test_unchecked_bad_values_give_nan_in_their_sample_alone(case: tuple[Any, ...], tokens: int) -> None:
    good, bad = spoilt(case, tokens)
    want = reference.merge_tokens(*good)
    boxes = [guarded(t.to(DEVICE)) for t in bad]
    with poisoned_memory(), guarded_memory():
        got = forward(*(box.tensor for box in boxes))
    assert got[0][1].isnan().all()
    assert got[1][1].isnan().all()
    assert torch.equal(got[2][1], want[2][1] if case[5] else torch.full((tokens,), -1))
    for ours, expected in zip(got, want, strict=True):
        torch.testing.assert_close(ours[[0, 2]], expected[[0, 2]])
    slopes = torch.ones_like(got[0]), torch.ones_like(got[1])
    dx, dw = backward(*slopes, bad[0], bad[4], *got, [True, True])
    assert dx[1].eq(0).all()
    assert dw[1].eq(0).all()
    assert dx[[0, 2]].ne(0).all()
    assert dx.isfinite().all()
    assert dw.isfinite().all()


@pytest.mark.usefixtures("_unchecked")
def test_unchecked_keys_of_a_sample_without_tokens() -> None:
    x, keys = torch.zeros(2, 0, 2), torch.tensor([[0], [0]])
    args = (x, x, keys, torch.tensor([0, 1]), None, None)
    assert_same(forward(*args), reference.merge_tokens(*args))
    assert forward(*args)[1].isnan().tolist() == [[False], [True]]


@pytest.mark.usefixtures("_checked")
@pytest.mark.parametrize("case", BAD, ids=lambda case: case[0])
def test_checked_bad_values_are_complained_of_in_the_words_of_the_reference(case: tuple[Any, ...]) -> None:
    _, bad = spoilt(case, 40)
    with pytest.raises(InvalidValue) as expected:
        reference.merge_tokens(*bad)
    with pytest.raises(InvalidValue) as ours:
        forward(*bad)
    assert str(ours.value) == str(expected.value)


def test_a_slot_out_of_range_gets_no_gradient() -> None:
    """The backward reads nothing by an assignment that no forward gave."""
    grad, x = torch.ones(1, 2, 3), torch.ones(1, 4, 3)
    assign = torch.tensor([[0, 2, 2**40, -5]])
    dx, dw = backward(grad, torch.ones(1, 2), x, None, grad * 0, torch.ones(1, 2), assign, [True, True])
    assert dx.sum(-1).tolist() == [[3, 0, 0, 0]]
    assert dw.tolist() == [[4, 0, 0, 0]]


# What allocates or describes memory, and how the interpreter moves its arguments.
QUIET = {
    f"aten::{name}"
    for name in ("new_empty", "view", "alias", "detach", "unsqueeze", "view_as_real", "set_", "empty", "copy_")
}


@pytest.mark.usefixtures("_unchecked")
def test_pytorch_only_allocates() -> None:
    args = arguments(merge_inputs(MergeShape(2, 9, 3, 4, 5), weight=True, valid=True))
    args = [a.to(DEVICE) for a in args]
    args[0] = relayout(args[0], "permuted")
    with RecordedOps() as trace:
        out = kernels.merge_tokens(*args)
        kernels.merge_tokens_backward(out[0], out[1], args[0], args[4], *out, [True, True])
        kernels.merge_tokens(*args[:4], None, None)
    assert set(trace.names) <= QUIET
    with RecordedOps() as trace:
        reference.merge_tokens(*args)
    assert "aten::mm" in trace.names  # or nothing was recorded


@pytest.mark.usefixtures("_unchecked")
def test_no_tensor_is_as_large_as_tokens_times_keys() -> None:
    args = [a.to(DEVICE) for a in arguments(merge_inputs(MergeShape(1, 200, 100, 4, 4), weight=True, valid=True))]
    with RecordedOps() as trace:
        out = kernels.merge_tokens(*args)
        kernels.merge_tokens_backward(out[0], out[1], args[0], args[4], *out, [True, True])
    assert 200 * 4 <= trace.largest < 200 * 100 / 4
