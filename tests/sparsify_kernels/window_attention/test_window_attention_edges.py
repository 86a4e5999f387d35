"""window_attention, the C++ kernels: what rounding must not touch, numbers out of the ordinary, arguments that do not
fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_kernels import Windows, _registry
from sparsify_kernels.testing import WindowShape, assert_same, poisoned_memory, window_attention_eager, window_inputs

FORWARD = _registry.implementations("window_attention")
BACKWARD = _registry.implementations("window_attention_backward")
ALL = [True, True, True]
EVERYTHING = {"cosine": True, "scale": True, "region": True}

pytestmark = pytest.mark.skipif("cpp" not in FORWARD, reason="the C++ extension is not built")


def slope(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A gradient that differs everywhere."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def run(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Results and gradients of the kernels."""
    args, cosine = [inputs["qkv"], inputs["bias"], inputs["scale"], *inputs["windows"]], inputs["cosine"]
    with poisoned_memory():
        output, lse = FORWARD["cpp"](*args, cosine)
        grads = BACKWARD["cpp"](slope(output.shape, output.dtype), *args, lse, cosine, ALL)
    return dict(zip(("output", "lse", "dqkv", "dbias", "dscale"), (output, lse, *grads), strict=True))


def exact(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The same from ordinary operations in fp64, differentiated by autograd; without the log-sum-exp."""
    leaves = {n: t.double().requires_grad_() for n, t in inputs.items() if isinstance(t, Tensor)}
    output = window_attention_eager(**{**inputs, **leaves})
    grads = torch.autograd.grad(output, list(leaves.values()), slope(output.shape, inputs["qkv"].dtype).double())
    return {"output": output.detach(), **dict(zip([f"d{n}" for n in leaves], grads, strict=True))}


def one_window(tokens: int, windows: int = 1) -> Windows:
    """``windows`` windows of as many places as tokens, none missing."""
    start = torch.arange(windows + 1) * tokens
    return Windows(torch.arange(windows * tokens), start, torch.arange(tokens).repeat(windows), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_long_sums_are_made_of_short_ones(dtype: torch.dtype) -> None:
    """1,024 times 0.1, over channels and over keys: added up one by one, that is off by more than 60 roundings."""
    close = {"rtol": 20 * torch.finfo(dtype).eps, "atol": 0.0}
    wide = torch.full((1, 3, 1, 1024), 0.1, dtype=dtype)
    wide[:, 0] = 1
    bias, scale = torch.zeros(1, 1, 2047, dtype=dtype), torch.ones(1, dtype=dtype)
    lse = FORWARD["cpp"](wide, bias[..., :1], scale, *one_window(1), False)[1]
    torch.testing.assert_close(lse, wide[:, 1, :, 0] * 1024, **close)
    many = torch.zeros(1024, 3, 1, 1, dtype=dtype)
    many[:, 2] = 0.1
    output = FORWARD["cpp"](many, bias, scale, *one_window(1024), False)[0]
    torch.testing.assert_close(output, many[:, 2], **close)


@pytest.mark.parametrize("shape", [WindowShape(97, 3, 7, 9, 2, 24), WindowShape(150, 1, 12, 13, 1, 17)], ids=str)
def test_a_bias_common_to_all_keys_changes_no_gradient(shape: WindowShape) -> None:
    """Beside it the log-sum-exp is rounded to a thousandth, the weights are not."""
    inputs = window_inputs(shape)
    inputs["qkv"][:, 0] = 0
    inputs["bias"][:] = 10_000
    ours = run(inputs)
    for name, truth in exact(inputs).items():
        torch.testing.assert_close(ours[name].double(), truth, rtol=1e-5, atol=1e-5 * truth.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_that_are_alike_leave_nothing_of_the_gradient_of_a_logit(dtype: torch.dtype) -> None:
    """All probabilities have the same gradient, thousands: what is subtracted from it may be rounded, not the rest."""
    inputs = window_inputs(WindowShape(97, 3, 7, 9, 2, 24), dtype, **EVERYTHING)
    inputs["qkv"][:, 2] = 1000 * inputs["qkv"][0, 2]
    grads = run(inputs)
    for name, grad in (("dqkv", grads["dqkv"][:, :2]), ("dbias", grads["dbias"]), ("dscale", grads["dscale"])):
        assert grad.abs().max() < 10 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
def test_gradients_of_a_token_alone_are_exact(cosine: bool, dtype: torch.dtype) -> None:
    """That of the output for its value, 0 for all else, however the log-sum-exp is rounded."""
    g = torch.Generator().manual_seed(0)
    qkv, bias, scale = (torch.randn(s, generator=g, dtype=dtype) for s in ((500, 3, 2, 7), (2, 1, 1), (2,)))
    args = (qkv, bias, scale, *one_window(1, 500))
    output, lse = FORWARD["cpp"](*args, cosine)
    grad, off = slope(output.shape, dtype), lse + torch.rand(lse.shape, generator=g, dtype=dtype) / 100
    dqkv, dbias, dscale = BACKWARD["cpp"](grad, *args, off, cosine, ALL)
    assert_same(dqkv[:, 2], grad)
    assert not any(each.any() for each in (dqkv[:, :2], dbias, dscale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_direction_of_one_number_has_no_gradient(dtype: torch.dtype) -> None:
    grads = run(window_inputs(WindowShape(97, 3, 7, 9, 2, 1), dtype, **EVERYTHING))["dqkv"]
    assert not grads[:, :2].any()
    assert grads[:, 2].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_vectors_shorter_than_the_smallest_length(dtype: torch.dtype) -> None:
    """Which they count as: their gradients keep all parts. Half of it about, and none at all."""
    inputs = window_inputs(WindowShape(97, 3, 7, 9, 2, 24), dtype, **EVERYTHING)
    inputs["qkv"] *= 1e-13
    inputs["qkv"][5, :2] = 0
    ours, truth = run(inputs), exact(inputs)
    torch.testing.assert_close(ours["output"].double(), truth["output"], rtol=1e-4, atol=1e-17)
    for part in (0, 1):
        grad, want = ours["dqkv"][:, part].double(), truth["dqkv"][:, part]
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_large_logits_and_scales_do_not_overflow() -> None:
    inputs = window_inputs(WindowShape(97, 3, 7, 9, 2, 24), **EVERYTHING)
    large = {**inputs, "scale": torch.tensor([100.0, 1e-4]), "bias": inputs["bias"] * 300}
    for name, result in run(large).items():
        assert result.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [16, 5])
def test_a_nan_of_any_bits_is_one_in_halves(dtype: torch.dtype, width: int) -> None:
    """The largest would be rounded up to zero."""
    bits = torch.tensor([2**31 - 1, -1, 0x7F800001, 0x7FC08000], dtype=torch.int32)
    bias = bits.view(torch.float32).view(4, 1, 1).expand(4, 1, 3)
    qkv = torch.randn(2, 3, 4, width).to(dtype)
    got = run({"qkv": qkv, "bias": bias, "scale": None, "windows": one_window(2), "cosine": False})
    assert got["output"].isnan().all()
    assert got["dqkv"].isnan().all()


@pytest.mark.parametrize("height", [8, 9])  # up to 64 places, and more
def test_a_nan_shows_in_the_bias_of_its_own_pairs_alone(height: int) -> None:
    """Not in that of places that have no token."""
    inputs = window_inputs(WindowShape(55, 1, height, 8, 1, 16))
    member, _, place, _ = inputs["windows"]
    inputs["qkv"][member[0], 0] = torch.nan
    want = torch.zeros(2 * height - 1, 15, dtype=torch.bool)
    want[place[0] // 8 - place // 8 + height - 1, place[0] % 8 - place % 8 + 7] = True
    assert_same(run(inputs)["dbias"][0].isnan(), want)


def small(**changes: Tensor) -> list[Any]:
    """What the kernels take, up to the windows: three tokens in two windows of 2 x 2."""
    good = {"qkv": torch.zeros(3, 3, 2, 4), "bias": torch.zeros(2, 3, 3), "scale": None, "member": torch.arange(3)}
    start, place = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 3])
    return list({**good, "start": start, "place": place, "region": None, **changes}.values())


BAD = {
    "rank of qkv": {"qkv": torch.zeros(3, 3, 8)},
    "parts of qkv": {"qkv": torch.zeros(3, 2, 2, 4)},
    "dtype of qkv": {"qkv": torch.zeros(3, 3, 2, 4).int()},
    "heads of bias": {"bias": torch.zeros(1, 3, 3)},
    "rows of bias": {"bias": torch.zeros(2, 4, 3)},
    "dtype of bias": {"bias": torch.zeros(2, 3, 3).double()},
    "length of scale": {"scale": torch.zeros(1)},
    "dtype of scale": {"scale": torch.zeros(2).half()},
    "length of member": {"member": torch.arange(2)},
    "dtype of member": {"member": torch.arange(3).int()},
    "no window": {
        "qkv": torch.zeros(0, 3, 2, 4),
        "member": torch.zeros(0).long(),
        "start": torch.zeros(1).long(),
        "place": torch.zeros(0).long(),
    },
    "dtype of start": {"start": torch.tensor([0, 2, 3]).int()},
    "length of place": {"place": torch.arange(2)},
    "length of region": {"region": torch.zeros(2).long()},
}


@pytest.mark.parametrize("name", BAD)
def test_both_kernels_refuse_what_leads_out_of_bounds(name: str) -> None:
    args, refused = small(**BAD[name]), "(window_attention|sparsify_kernels): "
    with pytest.raises(RuntimeError, match=refused):
        FORWARD["cpp"](*args, False)
    with pytest.raises(RuntimeError, match=refused):
        BACKWARD["cpp"](torch.zeros(3, 2, 4), *args, torch.zeros(3, 2), False, ALL)


@pytest.mark.parametrize(
    "changes",
    [
        {"grad": torch.zeros(3, 1, 4)},
        {"grad": torch.zeros(3, 2, 4).double()},
        {"lse": torch.zeros(2, 2)},
        {"lse": torch.zeros(3, 2).double()},
        {"wanted": [True, True]},
    ],
    ids=["heads of the gradient", "dtype of the gradient", "tokens of lse", "dtype of lse", "two parts wanted"],
)
def test_the_backward_refuses_what_does_not_fit(changes: dict[str, Any]) -> None:
    last = {"grad": torch.zeros(3, 2, 4), "lse": torch.zeros(3, 2), "wanted": ALL, **changes}
    with pytest.raises(RuntimeError, match="window_attention: "):
        BACKWARD["cpp"](last["grad"], *small(), last["lse"], False, last["wanted"])
