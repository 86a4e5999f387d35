"""merge_tokens in Triton against the reference: the same assignment, means and gradients within rounding.

On a GPU, or under Triton's interpreter on the CPU.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_kernels import _registry
from sparsify_kernels.merge_tokens import reference
from sparsify_kernels.testing import (
    LAYOUTS,
    MERGE_SHAPES,
    MergeShape,
    assert_accurate,
    assert_alone,
    assert_assignment,
    assert_same,
    guarded_memory,
    merge_inputs,
    merge_keys,
    poisoned_memory,
    relayout,
)

pytest.importorskip("triton", reason="Triton is not installed: its kernels were not tested")

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # of NumPy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One below and above a block of tokens, of keys and of a metric's values (16 under the interpreter), a block of values
# of x (32), several of each; more members than are summed at a time.
EDGES = (
    MergeShape(2, 15, 5, 31, 15),
    MergeShape(2, 16, 6, 32, 16),
    MergeShape(2, 17, 7, 33, 17),
    MergeShape(1, 36, 33, 5, 33),
    MergeShape(1, 70, 2, 70, 40),
    MergeShape(2, 20, 5, 3, 0),
    MergeShape(2, 20, 5, 0, 3),
    MergeShape(1, 5, 2, 2048, 3),
)
SHAPES = [*(shape for shape in MERGE_SHAPES if shape.slots < 60), *EDGES]  # the interpreter takes its time
NAN = math.nan


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


def wide(arguments: list[Any]) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def test_triton_serves_every_kernel() -> None:
    for kernel in _registry.kernels_of("merge_tokens"):
        assert "triton" in _registry.implementations(kernel)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_agrees_with_the_reference(shape: MergeShape, dtype: torch.dtype) -> None:
    for seed, masked in enumerate((False, True)):
        args = arguments(merge_inputs(shape, dtype, weight=masked, valid=masked, poison=True, seed=seed))
        with poisoned_memory(), guarded_memory():
            ours = forward(*args)
        expected, truth = reference.merge_tokens(*args), reference.merge_tokens(*wide(args))
        assert_same(ours[2], expected[2], "assign")
        assert_same(ours[1], expected[1], "size")
        assert ours[0].dtype == dtype
        assert_accurate(ours[0], eager=expected[0], truth=truth[0], what="tokens")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_agrees_with_the_reference(shape: MergeShape, dtype: torch.dtype) -> None:
    for seed, masked in enumerate((False, True)):
        args = arguments(merge_inputs(shape, dtype, weight=masked, valid=masked, poison=True, seed=seed))
        out = reference.merge_tokens(*args)
        exact = reference.merge_tokens(*wide(args))
        g = torch.Generator().manual_seed(seed)
        slopes = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in out[:2]]
        given = [*slopes, args[0], args[4], *out]
        for wanted in ([True, True], [True, False], [False, True], [False, False]):
            with poisoned_memory(), guarded_memory():
                ours = backward(*given, wanted)
            eager = reference.merge_tokens_backward(*given, wanted)
            truth = reference.merge_tokens_backward(*wide([*slopes, args[0], args[4]]), *exact, wanted)
            for name, o, e, t in zip(("x", "weight"), ours, eager, truth, strict=True):
                assert o.dtype == e.dtype
                assert_accurate(o, eager=e, truth=t, what=f"gradient of {name}, wanted {wanted}")


def test_backward_from_one_gradient_alone_and_without_x() -> None:
    args = arguments(merge_inputs(MergeShape(2, 19, 4, 35, 5), weight=True, valid=True, poison=True))
    out = reference.merge_tokens(*args)
    given = [torch.randn_like(out[0]), torch.randn_like(out[1]), args[0], args[4], *out]
    both = backward(*given, [True, True])
    without_size = backward(given[0], None, *given[2:], [True, True])
    assert_same(without_size[0], both[0])
    expected = reference.merge_tokens_backward(given[0], None, *given[2:], [True, True])
    torch.testing.assert_close(without_size[1], expected[1])
    without_tokens = (None, *given[1:], [True, True])
    assert_same(backward(*without_tokens), reference.merge_tokens_backward(*without_tokens))
    without_x = (*given[:2], None, *given[3:], [True, True])
    assert backward(*without_x)[1].eq(0).all()
    assert_same(backward(*without_x)[0], both[0])


def test_nan_in_gradients_of_empty_slots_reaches_no_gradient() -> None:
    x, weight = torch.randn(1, 4, 2), torch.tensor([[1.0, 1, 0, 0]])
    metric = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1]]])
    out = forward(x, metric, torch.tensor([[0, 2, -1]]), torch.tensor([2]), weight, None)
    assert out[1].tolist() == [[2, 0, 0]]
    grad = torch.tensor([1.0, NAN, NAN])[None, :, None].expand_as(out[0])
    dx, dw = backward(grad, torch.tensor([[1.0, NAN, NAN]]), x, weight, *out, [True, True])
    torch.testing.assert_close(dx, torch.tensor([[[0.5, 0.5], [0.5, 0.5], [0, 0], [0, 0]]]))
    assert dw[0, 2:].tolist() == [0, 0]
    assert dw.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [4, 100])
def test_a_real_metric_reaches_the_best_similarity(dim: int, dtype: torch.dtype) -> None:
    inputs = merge_inputs(MergeShape(2, 40, 19, 2, dim), dtype, exact=False, valid=True, poison=True)
    keys = inputs["keys"]
    assert_assignment(forward(*arguments(inputs))[2], inputs["metric"], keys.index, keys.count, inputs["valid"])


def test_metric_and_x_of_different_dtypes() -> None:
    for dtype in (*DTYPES, torch.float64):
        for metric_dtype in (*DTYPES, torch.float64):
            args = arguments(merge_inputs(MergeShape(2, 9, 2, 3, 5), dtype, weight=True, valid=True, poison=True))
            args[1] = args[1].to(metric_dtype)
            ours, expected = forward(*args), reference.merge_tokens(*args)
            assert_same(ours[1:], expected[1:])
            assert ours[0].dtype == dtype
            given = (ours[0], ours[1], args[0], args[4])
            assert backward(*given, *ours, [True, True])[0].dtype == dtype


def test_bf16_metrics_are_compared_in_fp32() -> None:
    # 256 and 257 are the same number in bf16, their dot products are not rounded to it.
    metric = torch.tensor([[[16.0, 0], [16.0, 1], [16.0, 1]]], dtype=torch.bfloat16)
    assert forward(metric, metric, torch.tensor([[0, 1]]), torch.tensor([2]), None, None)[2].tolist() == [[0, 1, 1]]


def test_fp32_metrics_are_not_rounded() -> None:
    # To tf32, 1 + 2^-12 is 1: a tie, which the lower slot would win.
    metric = torch.tensor([[[1.0], [1 + 2.0**-12], [1.0]]])
    assert forward(metric, metric, torch.tensor([[0, 1]]), torch.tensor([2]), None, None)[2].tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_fp32_for_half_precision(dtype: torch.dtype) -> None:
    # In bf16 a running sum of ones sticks at 256; in fp16 one of sixteens sticks at 32,768.
    x = torch.full((1, 300, 1), 256.0 if dtype == torch.float16 else 1.0).to(dtype)
    tokens, size, _ = forward(x, x[:, :, :0], torch.tensor([[0]]), torch.tensor([1]), None, None)
    assert size.item() == 300
    assert tokens.item() == x[0, 0, 0]


def test_bf16_means_are_rounded_to_nearest_even() -> None:
    x = torch.tensor([[1.0, 1 + 2.0**-7, 1 + 2.0**-7, 1 + 2.0**-6, 1.0, 1 + 3 * 2.0**-7]]).bfloat16()[..., None]
    keys = torch.tensor([[0, 2, 4]]), torch.tensor([3])
    metric = torch.tensor([[[1.0, 0, 0]] * 2 + [[0, 1.0, 0]] * 2 + [[0, 0, 1.0]] * 2])
    tokens = forward(x, metric, *keys, None, None)[0]
    assert tokens[0, :, 0].tolist() == [1.0, 1 + 2.0**-6, 1 + 2.0**-6]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lower_slot_wherever_the_two_are(dtype: torch.dtype) -> None:
    """Of 35 keys exactly two are the most similar: in one block of keys, in two."""
    slots = 35
    pairs = ((3, 13), (15, 16), (0, 34))
    metric = torch.ones(2 * len(pairs), slots + 1, 20, dtype=dtype)
    metric[:, :, 0] = 0
    metric[:, slots, 0] = 2
    for n, (low, high) in enumerate(pairs):
        metric[2 * n, low, 0] = metric[2 * n, high, 0] = metric[2 * n + 1, low, 0] = 2
        metric[2 * n + 1, high, 0] = 3  # no tie
    index, count = torch.arange(slots).repeat(len(metric), 1), torch.full((len(metric),), slots)
    assign = forward(metric[:, :, :1], metric, index, count, None, None)[2]
    assert assign[:, slots].view(-1, 2).tolist() == [list(pair) for pair in pairs]


def test_ties_of_zeros_of_both_signs_go_to_the_lower_slot() -> None:
    metric = torch.tensor([[[-0.0], [0.0], [1.0]]])  # in a sum from zero, or in a single product
    assert forward(metric, metric, torch.tensor([[0, 1]]), torch.tensor([2]), None, None)[2].tolist() == [[0, 1, 0]]


def test_a_key_named_twice_joins_its_lower_slot() -> None:
    args = arguments(merge_inputs(MergeShape(1, 40, 20, 3, 5)))
    args[2][0, 18] = args[2][0, 1]  # in different blocks of keys
    args[2][0, 3] = args[2][0, 2]
    ours, expected = forward(*args), reference.merge_tokens(*args)
    assert_same(ours[1:], expected[1:])
    assert ours[1][0, [3, 18]].tolist() == [0, 0]
    assert ours[0][0, [3, 18]].eq(0).all()


def test_a_key_joins_itself_though_another_is_infinitely_similar() -> None:
    metric = torch.tensor([[[math.inf], [1.0], [2.0]]])
    assert forward(metric, metric, torch.tensor([[0, 1]]), torch.tensor([2]), None, None)[2].tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_metrics(dtype: torch.dtype) -> None:
    """Equal, zero, all negative, NaN, infinite, and numbers so small that a unit which flushes them would see zeros."""
    keys = merge_keys(torch.ones(2, 18, dtype=torch.bool), 6, torch.Generator().manual_seed(0))
    signs = torch.randint(-3, 4, (2, 18, 18)).double()
    small = {torch.bfloat16: 2.0**-70, torch.float16: 2.0**-20, torch.float32: 2.0**-70}[dtype]
    spiked = signs.clone()
    spiked[0, 7] = torch.nan
    spiked[1, 9, 3] = torch.inf
    spiked[1, keys.index[1, 4]] = torch.nan
    for metric in (signs * 0, signs * 0 + 1, -signs.abs(), signs * small, spiked):
        m = metric.to(dtype)
        args = (torch.ones(2, 18, 1), m, *keys, None, None)
        assert_same(forward(*args)[2], reference.merge_tokens(*args)[2])


def test_nan_at_a_valid_token_shows_in_its_cluster_alone() -> None:
    x = torch.ones(2, 4, 2)
    x[0, 1] = NAN
    metric = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]).expand(2, 4, 2)
    tokens = forward(x, metric, torch.tensor([[0, 2], [0, 2]]), torch.tensor([2, 2]), None, None)[0]
    assert tokens.isnan().all(-1).tolist() == [[True, False], [False, False]]
    assert tokens[1].eq(1).all()


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    inputs = merge_inputs(MergeShape(3, 21, 5, 35, 20), weight=True, valid=True, poison=True, exact=False)

    def both(**inputs: Any) -> tuple[Tensor, ...]:
        args = arguments(inputs)
        out = forward(*args)
        return (*out, *backward(out[0], out[1], args[0], args[4], *out, [True, True]))

    assert_alone(both, inputs)
    assert_same(both(**inputs), both(**inputs), "again")


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_same_bits(dtype: torch.dtype) -> None:
    inputs = merge_inputs(MergeShape(3, 19, 2, 35, 18), dtype, weight=True, valid=True, exact=False)
    args = arguments(inputs)
    expected = forward(*args)
    given = [expected[0], expected[1], args[0], args[4]]
    grads = backward(*given, *expected, [True, True])
    for layout in LAYOUTS:
        assert_same(forward(*(relayout(a, layout) for a in args)), expected)
        placed = [relayout(t, layout) for t in (*given, *expected)]
        assert_same(backward(*placed, [True, True]), grads)
    spread = torch.ones((), dtype=dtype).expand(expected[0].shape)
    rest = (args[0], args[4], *expected, [True, True])
    assert_same(backward(spread, None, *rest), backward(spread.contiguous(), None, *rest), "expanded gradient")
