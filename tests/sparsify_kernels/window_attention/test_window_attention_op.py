"""window_attention as an operator: gradcheck, opcheck, compile, fake tensors, error messages."""

# ruff: noqa: E501 - a table has one case a line

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsify_kernels import Windows, window_attention
from sparsify_kernels.testing import WindowShape, assert_compiles, relayout, window_inputs
from sparsify_kernels.window_attention import reference

SMALL = WindowShape(11, 3, 2, 3, 2, 4)
OP = torch.ops.sparsify_kernels.window_attention.default
BACKWARD = torch.ops.sparsify_kernels.window_attention_backward.default


@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("region", [False, True], ids=["one region", "regions"])
@pytest.mark.parametrize("scale", [False, True], ids=["default", "scale"])
def test_gradcheck(cosine: bool, region: bool, scale: bool) -> None:
    inputs = window_inputs(SMALL, torch.float64, scale=scale, region=region, cosine=cosine)
    names = [n for n, t in inputs.items() if isinstance(t, Tensor)]

    def function(*tensors: Tensor) -> Tensor:
        return window_attention(**{**inputs, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(function, [inputs[n].requires_grad_() for n in names])


def operands(inputs: dict[str, Any]) -> list[Any]:
    return [inputs["qkv"], inputs["bias"], inputs["scale"], *inputs["windows"]]


def test_backward_computes_only_what_is_wanted() -> None:
    args = operands(window_inputs(SMALL, scale=True, region=True))
    output, lse = OP(*args, True)
    for wanted in ([True, False, False], [False, True, False], [False, False, True]):
        grads = BACKWARD(torch.ones_like(output), *args, lse, True, wanted)
        assert [g.numel() > 0 for g in grads] == wanted


def test_no_second_derivative() -> None:
    inputs = window_inputs(SMALL)
    qkv = inputs["qkv"].requires_grad_()
    (grad,) = torch.autograd.grad(window_attention(**inputs).square().sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="window_attention: second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("shape", [SMALL, SMALL._replace(tokens=0)], ids=["small", "empty"])
def test_opcheck(shape: WindowShape, layout: str, requires_grad: bool) -> None:
    args = operands(window_inputs(shape, scale=True, region=True, layout=layout))
    if requires_grad:
        args = [a.requires_grad_() if a.is_floating_point() else a for a in args]
    torch.library.opcheck(OP, (*args, True))


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("tokens", [11, 0])
def test_opcheck_backward(layout: str, tokens: int) -> None:
    args = operands(window_inputs(SMALL._replace(tokens=tokens), scale=True, region=True, layout=layout))
    output, lse = OP(*args, False)
    grad = relayout(torch.ones_like(output), layout)
    torch.library.opcheck(BACKWARD, (grad, *args, lse, False, [True, True, True]))
    torch.library.opcheck(BACKWARD, (grad, *args, lse, True, [True, False, True]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    inputs = window_inputs(SMALL, scale=True, region=True, cosine=True)
    for name in ("qkv", "bias", "scale"):
        inputs[name].requires_grad_()
    windows = inputs.pop("windows")

    def function(qkv: Tensor, bias: Tensor, scale: Tensor, cosine: bool, parts: list[Tensor]) -> Tensor:
        return window_attention(qkv, bias, Windows(*parts), scale=scale, cosine=cosine)

    assert_compiles(function, **inputs, parts=list(windows), dynamic=dynamic)


def test_autocast_casts_nothing() -> None:
    inputs = window_inputs(SMALL, scale=True)
    want = window_attention(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = window_attention(**inputs)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


BAD = [
    ({"member": [0, 1, 1]}, "windows.member must name each of 3 tokens once, got 1 at [2]"),
    ({"member": [0, 3, 1]}, "windows.member must name each of 3 tokens once, got 3 at [1]"),
    ({"member": [-1, 2, 1]}, "windows.member must name each of 3 tokens once, got -1 at [0]"),
    ({"start": [0, 2, 2]}, "windows.start must rise from 0 to the 3 tokens, got [0, 2, 2]"),
    ({"start": [1, 2, 3]}, "windows.start must rise from 0 to the 3 tokens, got [1, 2, 3]"),
    ({"start": [0, 4, 3]}, "windows.start must rise from 0 to the 3 tokens, got [0, 4, 3]"),
    ({"start": [0, -2, 3]}, "windows.start must rise from 0 to the 3 tokens, got [0, -2, 3]"),
    ({"place": [0, 0, 3]}, "windows.place must be in [0, 4), each once a window, got 0 at [1]"),
    ({"place": [0, 1, 4]}, "windows.place must be in [0, 4), each once a window, got 4 at [2]"),
    ({"place": [0, -1, 3]}, "windows.place must be in [0, 4), each once a window, got -1 at [1]"),
]


def three(**changes: list[int]) -> tuple[Tensor, Tensor, Windows]:
    """Three tokens in windows of 2 x 2: two in the first, one in the second."""
    parts = {"member": [0, 2, 1], "start": [0, 2, 3], "place": [0, 1, 3], **changes}
    return torch.randn(3, 3, 2, 4), torch.randn(2, 3, 3), Windows(*(torch.tensor(p) for p in parts.values()), None)


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(b[0]) for b in BAD])
def test_windows_that_are_no_partition(
    changes: dict[str, list[int]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv, bias, windows = three(**changes)
    with pytest.raises(ValueError) as caught:
        window_attention(qkv, bias, windows)
    assert str(caught.value) == f"window_attention: {message}"
    with pytest.raises(RuntimeError, match="windows"):
        torch.compile(window_attention, backend="aot_eager")(qkv, bias, windows)
    lse = torch.zeros(3, 2)
    with pytest.raises(RuntimeError, match="windows"):
        BACKWARD(torch.ones(3, 2, 4), qkv, bias, None, *windows, lse, False, [True] * 3)
    monkeypatch.setattr(reference, "check_values", lambda device: False)
    assert reference.window_attention(qkv, bias, None, *windows, False)[0].isnan().all()
    grads = reference.window_attention_backward(
        torch.ones(3, 2, 4), qkv, bias, None, *windows, lse, False, [True, True, True]
    )
    assert all(g.isnan().all() for g in grads)


def tensors(**changes: Any) -> dict[str, Any]:
    qkv, bias, windows = three()
    return {"qkv": qkv, "bias": bias, "windows": windows, **changes}


def changed(**parts: Tensor) -> Windows:
    return three()[2]._replace(**parts)


ERRORS = [
    (TypeError, {"qkv": [1.0]}, "qkv must be a tensor, float32 or bfloat16 or float16 or float64 [N, 3, H, d], got list"),
    (TypeError, {"qkv": torch.zeros(3, 3, 2, 4).int()}, "qkv must be float32 or bfloat16 or float16 or float64 [N, 3, H, d], got int32 [3, 3, 2, 4]"),
    (ValueError, {"qkv": torch.zeros(3, 2, 4)}, "qkv must be float32 or bfloat16 or float16 or float64 [N, 3, H, d], got float32 [3, 2, 4]"),
    (ValueError, {"qkv": torch.zeros(3, 2, 2, 4)}, "qkv must be float32 or bfloat16 or float16 or float64 [N, 3, H, d], got float32 [3, 2, 2, 4]"),
    (ValueError, {"qkv": torch.zeros(3, 3, 2, 0)}, "qkv must be [N, 3, H, d] with H >= 1 and d >= 1, got float32 [3, 3, 2, 0]"),
    (ValueError, {"bias": torch.zeros(1, 3, 3)}, "bias must be float32 or bfloat16 or float16 or float64 [H, R, C] with H = 2, got float32 [1, 3, 3]"),
    (ValueError, {"bias": torch.zeros(2, 3, 4)}, "bias must be [H, 2 * wh - 1, 2 * ww - 1], got float32 [2, 3, 4]"),
    (TypeError, {"windows": 3}, "windows must be Windows(member, start, ...), got 3"),
    (TypeError, {"windows": changed(member=torch.zeros(3))}, "windows.member must be int64 [N], got float32 [3]"),
    (ValueError, {"windows": changed(member=torch.zeros(4).long())}, "windows.member must be int64 [N] with N = 3, got int64 [4]"),
    (ValueError, {"windows": changed(start=torch.zeros(1).long())}, "windows.start must be int64 [W + 1] with W >= 1, got int64 [1]"),
    (TypeError, {"windows": changed(start=torch.zeros(3).int())}, "windows.start must be int64 [W+1], got int32 [3]"),
    (ValueError, {"windows": changed(place=torch.zeros(2).long())}, "windows.place must be int64 [N] with N = 3, got int64 [2]"),
    (ValueError, {"windows": changed(region=torch.zeros(2).long())}, "windows.region must be int64 [N] with N = 3, got int64 [2]"),
    (ValueError, {"windows": changed(place=torch.zeros(3, device="meta").long())}, "windows.place must be on cpu like qkv, got meta"),
    (ValueError, {"scale": torch.ones(3)}, "scale must be float32 or bfloat16 or float16 or float64 [H] with H = 2, got float32 [3]"),
    (TypeError, {"scale": 0.5}, "scale must be a tensor, float32 or bfloat16 or float16 or float64 [H], got 0.5"),
    (TypeError, {"cosine": 1}, "cosine must be a bool, got 1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "changes", "message"), ERRORS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_errors_name_the_argument(error: type[Exception], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(error) as caught:
        window_attention(**tensors(**changes))
    assert str(caught.value) == f"window_attention: {message}"


def test_errors_and_shapes_under_fake_tensors() -> None:
    with FakeTensorMode():
        assert window_attention(**tensors()).shape == (3, 2, 4)
        with pytest.raises(ValueError, match=r"window_attention: scale must be .* with H = 2, got float32 \[3\]"):
            window_attention(**tensors(scale=torch.ones(3)))
