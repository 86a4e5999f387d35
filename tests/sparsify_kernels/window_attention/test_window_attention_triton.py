"""window_attention in Triton: accuracy around its tiles, what it reads and writes, and what PyTorch runs beside it.

On a GPU, or under Triton's interpreter on the CPU. Windows of up to 64 places are one tile in half precision, of up to
32 in fp32 and in half precision where heads are wider than 32, of up to 16 in fp32 where they are; larger ones take
several.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_kernels import Windows, _registry
from sparsify_kernels._checks import InvalidValue
from sparsify_kernels.testing import (
    LAYOUTS,
    RecordedOps,
    WindowShape,
    assert_accurate,
    assert_same,
    guarded,
    guarded_memory,
    poisoned_memory,
    window_attention_eager,
    window_inputs,
)
from sparsify_kernels.window_attention import reference

pytest.importorskip("triton", reason="Triton is not installed: its kernels were not tested")

MODULE = importlib.import_module("sparsify_kernels.window_attention.triton")
FORWARD = _registry.implementations("window_attention")["triton"]
BACKWARD = _registry.implementations("window_attention_backward")["triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = [True] * 3
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PLAIN: dict[str, bool] = {}
SWIN = {"scale": True, "region": True}
SWIN2 = {"cosine": True, "scale": True, "region": True}

ONE = WindowShape(23, 4, 3, 4, 2, 6)  # one tile in each dtype
SEVERAL = WindowShape(50, 2, 5, 7, 2, 5)  # two tiles in the backward in fp32
FULL = WindowShape(40, 1, 5, 8, 2, 5)  # two tiles of keys in the forward in fp32, the last row the second


def given(inputs: dict[str, Any]) -> list[Any]:
    """The arguments of both kernels up to ``region``, on the device."""
    args = [inputs["qkv"], inputs["bias"], inputs["scale"], *inputs["windows"]]
    return [None if a is None else a.to(DEVICE) for a in args]


def slope_for(output: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.randn(output.shape, generator=g, dtype=torch.float64).to(output)


def run(args: list[Any], cosine: bool = False, wanted: list[bool] = ALL) -> tuple[Tensor, ...]:
    """output, lse, dqkv, dbias, dscale."""
    with poisoned_memory():
        output, lse = FORWARD(*args, cosine)
        grads = BACKWARD(slope_for(output), *args, lse, cosine, wanted)
    return output, lse, *grads


def truth_of(args: list[Any], cosine: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    wide = [a.to(dtype) if a is not None and a.is_floating_point() else a for a in args]
    output, lse = reference.window_attention(*wide, cosine)
    slope = slope_for(output.to(args[0].dtype)).to(dtype)
    return output, lse, *reference.window_attention_backward(slope, *wide, lse, cosine, ALL)


def eager_of(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """output and gradients of ordinary operations in ``dtype``, differentiated by autograd."""
    rest = {n: v.to(DEVICE) if isinstance(v, Tensor) else v for n, v in inputs.items()}
    rest["windows"] = Windows(*(None if t is None else t.to(DEVICE) for t in inputs["windows"]))
    leaves = {n: t.to(dtype).requires_grad_() for n, t in rest.items() if isinstance(t, Tensor)}
    output = window_attention_eager(**(rest | leaves))
    slope = slope_for(output.to(inputs["qkv"].dtype)).to(dtype)
    grads = torch.autograd.grad(output, list(leaves.values()), slope)
    return {"output": output.detach(), **dict(zip([f"d{n}" for n in leaves], grads, strict=True))}


def drawn(shape: WindowShape, dtype: torch.dtype, form: dict[str, bool], seeds: range) -> dict[str, list[Tensor]]:
    """Ours, PyTorch's in ``dtype`` and in fp64 by name, each over several draws at once."""
    found: dict[str, list[list[Tensor]]] = defaultdict(lambda: [[], [], []])
    for seed in seeds:
        inputs = window_inputs(shape, dtype, **form, seed=seed)
        output, _, dqkv, dbias, dscale = run(given(inputs), inputs["cosine"])
        assert output.dtype == dqkv.dtype == dtype
        ours = {"output": output, "dqkv": dqkv, "dbias": dbias, "dscale": dscale}
        plain, truth = eager_of(inputs, dtype), eager_of(inputs, torch.float64)
        for name in truth:
            for results, kept in zip((ours, plain, truth), found[name], strict=True):
                kept.append(results[name])
    return {name: [torch.stack(each) for each in three] for name, three in found.items()}


def accurate(name: str, ours: Tensor, plain: Tensor, truth: Tensor) -> bool:
    try:
        assert_accurate(ours, eager=plain, truth=truth, what=name)
    except AssertionError:
        return False
    return True


CASES = [
    # shape, dtypes, forms
    (WindowShape(1, 1, 1, 1, 1, 1), (F32, BF16), (SWIN2,)),
    (WindowShape(40, 5, 4, 4, 2, 8), (F32,), (PLAIN, SWIN, SWIN2)),
    (WindowShape(40, 5, 4, 4, 2, 8), (BF16, F16), (SWIN2,)),
    (WindowShape(3, 13, 2, 3, 2, 5), (F32, F16), (SWIN,)),  # most windows empty
    (WindowShape(17, 2, 1, 11, 1, 7), (F32, BF16), (SWIN2,)),  # primes, one above a tile of 16
    (WindowShape(15, 1, 3, 5, 2, 33), (F32, F16), (SWIN2,)),  # one below
    (WindowShape(63, 2, 8, 8, 1, 24), (F32, BF16, F16), (SWIN,)),  # windows of about 32
    (WindowShape(33, 1, 8, 8, 1, 8), (BF16,), (SWIN,)),  # one above a smaller tile
    (WindowShape(64, 1, 8, 8, 2, 32), (BF16,), (SWIN2,)),
    (WindowShape(65, 1, 9, 8, 1, 64), (F32,), (SWIN,)),
    (WindowShape(101, 1, 10, 11, 1, 33), (F16,), (SWIN2,)),
    (WindowShape(140, 2, 9, 9, 1, 16), (BF16,), (SWIN2,)),
    (WindowShape(20, 2, 4, 5, 1, 65), (F32, BF16), (PLAIN,)),
]


@pytest.mark.parametrize(
    ("shape", "dtype", "form"), [(s, d, f) for s, dtypes, forms in CASES for d in dtypes for f in forms], ids=str
)
def test_results_and_gradients_are_as_accurate_as_asked(
    shape: WindowShape, dtype: torch.dtype, form: dict[str, bool]
) -> None:
    """A few numbers the eager form may hit by chance: what fails is judged again by more draws."""
    first = drawn(shape, dtype, form, range(1))
    failed = [name for name, three in first.items() if not accurate(name, *three)]
    more = drawn(shape, dtype, form, range(1, 7)) if failed else {}
    for name in failed:
        ours, plain, truth = more[name]
        assert_accurate(ours, eager=plain, truth=truth, what=name)


@pytest.mark.parametrize(("shape", "form"), [(ONE, PLAIN), (ONE, SWIN2), (SEVERAL, PLAIN)], ids=str)
def test_log_sum_exp_and_the_gradient_of_the_scale_are_the_references(
    shape: WindowShape, form: dict[str, bool]
) -> None:
    """Of a scale that is not given, too."""
    inputs = window_inputs(shape, **form)
    args, cosine = given(inputs), inputs["cosine"]
    _, lse, _, _, dscale = run(args, cosine)
    truth = truth_of(args, cosine)
    torch.testing.assert_close(lse.double(), truth[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dscale.double(), truth[4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [WindowShape(0, 3, 2, 2, 2, 4), WindowShape(0, 2, 9, 9, 2, 4)], ids=str)
def test_no_tokens(shape: WindowShape) -> None:
    output, lse, dqkv, dbias, dscale = run(given(window_inputs(shape, **SWIN2)), True)
    assert (output.shape, lse.shape, dqkv.shape) == ((0, 2, 4), (0, 2), (0, 3, 2, 4))
    assert dbias.eq(0).all()
    assert dscale.eq(0).all()


@pytest.mark.parametrize("shape", [ONE, SEVERAL], ids=str)
def test_a_gradient_left_out_changes_no_other(shape: WindowShape) -> None:
    """More than in the order of a sum."""
    args = given(window_inputs(shape, **SWIN2))
    _, lse, *whole = run(args, True)
    slope = slope_for(args[0][:, 0])
    for wanted in [[i == n for i in range(3)] for n in range(3)] + [[True, False, True], [False] * 3]:
        with poisoned_memory():
            grads = BACKWARD(slope, *args, lse, True, wanted)
        for want, ours, all_at_once in zip(wanted, grads, whole, strict=True):
            if want:
                torch.testing.assert_close(ours, all_at_once)
            else:
                assert ours.shape == (0,)


@pytest.mark.parametrize("slabs", [2, 3])
@pytest.mark.parametrize("shape", [WindowShape(30, 7, 3, 3, 1, 4), WindowShape(90, 5, 5, 7, 1, 4)], ids=str)
def test_slabs_of_several_windows(shape: WindowShape, slabs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = 1 if shape.height == 3 else 6  # of 16 places by 32
    monkeypatch.setattr(MODULE, "PROGRAMS", slabs * tiles)
    monkeypatch.setattr(MODULE, "PARTS", 128)  # two slabs a step
    args = given(window_inputs(shape, **SWIN))
    for ours, truth in zip(run(args)[2:], truth_of(args, False)[2:], strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [ONE, SEVERAL], ids=str)
def test_layout_changes_nothing(shape: WindowShape) -> None:
    flat = given(window_inputs(shape, **SWIN2))
    expected = run(flat, True)
    for layout in LAYOUTS[1:] if shape == ONE else LAYOUTS[1:2]:
        assert_same(run(given(window_inputs(shape, **SWIN2, layout=layout)), True), expected, layout)
    slope, lse = slope_for(expected[0]), expected[1]
    turned = slope.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert_same(BACKWARD(turned, *flat, lse.T.contiguous().T, True, ALL), expected[2:])


@pytest.mark.parametrize(
    ("shape", "dtype"), [(ONE, F32), (SEVERAL, F32), (WindowShape(75, 1, 9, 9, 1, 7), F16)], ids=str
)
def test_nothing_outside_is_read_or_written(shape: WindowShape, dtype: torch.dtype) -> None:
    args = given(window_inputs(shape, dtype, **SWIN2))
    around = [guarded(a).tensor for a in args]
    with guarded_memory():
        output, lse = FORWARD(*around, True)
        grads = BACKWARD(guarded(slope_for(output)).tensor, *around, lse, True, ALL)
    assert_same((output, lse, *grads), run(args, True))


def test_offsets_beyond_two_to_the_31() -> None:
    if DEVICE == "cuda":
        pytest.skip("the memory of a GPU is not taken lazily")
    near = given(window_inputs(WindowShape(5, 2, 2, 3, 1, 4), F16, **SWIN))
    buffer = torch.empty(2**31 + 2**29, dtype=torch.float16)  # untouched pages cost nothing
    far = [buffer.as_strided((5, 3, 1, 4), (2**29, 4, 4, 1)).copy_(near[0]), *near[1:]]
    assert_same(run(far), run(near))


@pytest.mark.parametrize("shape", [ONE, SEVERAL], ids=str)
def test_the_same_bits_again_and_without_the_other_windows(shape: WindowShape) -> None:
    args = given(window_inputs(shape, **SWIN))
    whole = run(args)
    assert_same(run(args), whole)
    qkv, bias, scale, member, start, place, region = args
    part = member[: start[1]]
    alone = [qkv[part], bias, scale, torch.arange(len(part), device=DEVICE), start[:2], place[: start[1]]]
    got = FORWARD(*alone, region[: start[1]], False)
    assert_same(got, (whole[0][part], whole[1][part]))


@pytest.mark.parametrize(("shape", "which"), [(ONE, 0), (ONE, 1), (ONE, 2), (SEVERAL, 1)], ids=str)  # q, k, v
@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN)")  # NumPy's, under the interpreter
def test_a_nan_shows_in_its_window_alone(shape: WindowShape, which: int) -> None:
    args = given(window_inputs(shape, **SWIN2))
    member, start = args[3:5]
    inside = member[start[1] : start[2]]
    args[0][inside[0], which] = torch.nan
    output, _, dqkv, _, _ = run(args, True)
    outside = torch.ones(len(member), dtype=torch.bool, device=DEVICE)
    outside[inside] = False
    assert output[inside[0] if which == 0 else inside].isnan().any()
    assert dqkv[inside].isnan().any()
    assert output[outside].isfinite().all()
    assert dqkv[outside].isfinite().all()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # a gradient divided by 1e-12, in fp16
@pytest.mark.parametrize(("shape", "dtype"), [(ONE, F32), (ONE, F16), (FULL, F32)], ids=str)
def test_vectors_of_no_length_and_biases_of_minus_infinity(shape: WindowShape, dtype: torch.dtype) -> None:
    """A divisor is at least 1e-12; a pair with a bias of -inf is no pair, whole tiles of keys even."""
    args = given(window_inputs(shape, dtype, **SWIN2))
    args[0][3, :2] = 0
    args[0][4, 0] *= 1e-4 if dtype == F16 else 2e-13  # there shorter than the divisor: its gradient keeps all parts
    args[1][:, shape.height :] = -torch.inf  # of keys in higher rows
    got, truth = run(args, True), truth_of(args, True)
    for ours, exact in zip(got[:2], truth[:2], strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-2, atol=2e-3)
    assert not any(g.isnan().any() for g in got)
    for live in ([4], [i for i in range(shape.tokens) if i not in (3, 4)]):
        ours, exact = got[2][live].double(), truth[2][live]
        torch.testing.assert_close(ours, exact, rtol=2e-2, atol=1e-2 * exact.abs().max())


@pytest.mark.parametrize("shape", [ONE, SEVERAL], ids=str)
def test_logits_far_below_zero(shape: WindowShape) -> None:
    """About 1,000: the exponential of a row that is none must not be looked at."""
    args = given(window_inputs(shape, **SWIN))
    args[0][:, 0] += 15
    args[0][:, 1] -= 15
    for ours, exact in zip(run(args), truth_of(args, False), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3 * exact.abs().max())


@pytest.mark.parametrize("shape", [ONE, SEVERAL], ids=str)
def test_a_bias_common_to_all_keys_changes_no_gradient(shape: WindowShape) -> None:
    """Beside it the log-sum-exp is rounded to a thousandth, the weights are not."""
    args = given(window_inputs(shape))
    args[0][:, 0] = 0
    args[1][:] = 10_000
    for ours, exact in zip(run(args), truth_of(args, False), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max())


def test_regions_far_apart_and_the_smallest_numbers() -> None:
    """And regions of which none of the first 16 members of a window is."""
    args = given(window_inputs(SEVERAL, **SWIN))
    numbers = torch.tensor([-(2**63), 2**63 - 1, -1, 2**32 - 1, 0, *range(1, 9)], device=DEVICE)
    args[6] = numbers[torch.arange(SEVERAL.tokens, device=DEVICE) // 4]
    for ours, truth in zip(run(args), truth_of(args, False), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float64, 4), (F32, 129)])
def test_the_reference_serves_what_the_kernels_do_not(
    dtype: torch.dtype, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "_Call", None)
    args = given(window_inputs(ONE._replace(dim=dim), dtype))
    assert_same(FORWARD(*args, False), reference.window_attention(*args, False))
    slope, lse = args[0][:, 0], torch.zeros(23, 2, dtype=args[1].dtype, device=DEVICE)
    assert_same(
        BACKWARD(slope, *args, lse, False, ALL),
        reference.window_attention_backward(slope, *args, lse, False, ALL),
    )


BAD = [
    {"member": [0, 1, 1]},
    {"member": [0, 3, 1]},
    {"member": [-1, 2, 1]},
    {"member": [0, 2**62, 1]},
    {"start": [0, 2, 2]},
    {"start": [0, 0, 2]},
    {"start": [1, 2, 3]},
    {"start": [0, 4, 3]},
    {"start": [0, -2, 3]},
    {"start": [-(2**62), 2, 2**62]},
    {"start": [3, 2, 0]},
    {"place": [0, 0, 3]},
    {"place": [0, 1, 4]},
    {"place": [0, -1, 3]},
    {"place": [2**40, 1, 3]},
    {"place": [3, 3, 3]},
]


def three(places: int, changes: dict[str, list[int]]) -> list[Any]:
    """Three tokens in two windows of 2 x 2, or 2 x 20, places."""
    parts = {"member": [0, 2, 1], "start": [0, 2, 3], "place": [0, 1, 3], **changes}
    if "place" in changes:
        parts["place"] = [places if p == 4 else p for p in parts["place"]]
    tensors = [torch.randn(3, 3, 2, 4), torch.randn(2, 3, places - 1), torch.ones(2)]
    tensors += [torch.tensor(p) for p in parts.values()]
    return [*(t.to(DEVICE) for t in tensors), torch.zeros(3, dtype=torch.int64, device=DEVICE)]


@pytest.mark.parametrize(("places", "changes"), [*((4, bad) for bad in BAD), *((40, bad) for bad in BAD[::5])], ids=str)
def test_bad_windows(places: int, changes: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked, the words of the reference; unchecked, NaN everywhere and nothing out of bounds."""
    args = three(places, changes)
    slope, lse = torch.ones(3, 2, 4, device=DEVICE), torch.zeros(3, 2, device=DEVICE)
    monkeypatch.setattr(reference, "check_values", lambda device: True)
    with pytest.raises(InvalidValue) as expected:
        reference.window_attention(*args, False)
    for function in (lambda: FORWARD(*args, False), lambda: BACKWARD(slope, *args, lse, False, ALL)):
        with pytest.raises(InvalidValue) as ours:
            function()
        assert str(ours.value) == str(expected.value)
    monkeypatch.setattr(reference, "check_values", lambda device: False)
    args = [guarded(a).tensor for a in args]
    with guarded_memory(fill=0.0):  # NaN would be there already
        results = FORWARD(*args, False)
        for wanted in (ALL, [True, False, True]):
            results += BACKWARD(slope, *args, lse, False, wanted)
    assert all(t.isnan().all() for t in results)


def test_more_tokens_than_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "check_values", lambda device: False)
    args = three(4, {})
    tokens = torch.arange(9, device=DEVICE)
    args = [torch.randn(9, 3, 2, 4, device=DEVICE), *args[1:3], tokens, tokens[[0, 8]] + tokens[:2], tokens % 4, None]
    assert all(t.isnan().all() for t in FORWARD(*args, False))


# What allocates or describes memory, and how the interpreter moves its arguments.
QUIET = {
    f"aten::{name}"
    for name in ("new_empty", "view", "alias", "detach", "unsqueeze", "view_as_real", "set_", "empty", "copy_")
}


@pytest.mark.parametrize("shape", [ONE, SEVERAL], ids=str)
def test_pytorch_only_allocates(shape: WindowShape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "check_values", lambda device: False)
    args = given(window_inputs(shape, **SWIN2))
    slope = torch.ones(shape.tokens, 2, shape.dim, device=DEVICE)
    with RecordedOps() as trace:
        _, lse = MODULE.window_attention(*args, True)
        MODULE.window_attention_backward(slope, *args, lse, True, ALL)
    assert set(trace.names) <= QUIET
    with RecordedOps() as trace:
        reference.window_attention(*args, True)
    assert "aten::bmm" in trace.names  # or nothing was recorded
