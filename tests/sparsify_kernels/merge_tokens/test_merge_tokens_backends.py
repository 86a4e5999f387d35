"""Every backend of merge_tokens against the reference: the same assignment, means and gradients within rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsify_kernels
from sparsify_kernels import KeyTokens, _registry
from sparsify_kernels.merge_tokens import reference
from sparsify_kernels.testing import (
    LAYOUTS,
    MERGE_SHAPES,
    MergeShape,
    assert_accurate,
    assert_assignment,
    assert_same,
    guarded,
    merge_inputs,
    merge_keys,
    poisoned_memory,
    relayout,
)

FORWARD = _registry.implementations("merge_tokens")
BACKWARD = _registry.implementations("merge_tokens_backward")
FAST = [name for name in FORWARD if name == "cpp"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Around a vector of keys, a panel of them, a tile; around a block of tokens; widths around a chunk, a tile's 32, more
# than a tile of keys holds; the sizes that the model calls it with.
EDGES = (
    MergeShape(2, 90, 15, 5, 31),
    MergeShape(2, 90, 16, 5, 32),
    MergeShape(2, 90, 17, 5, 33),
    MergeShape(2, 130, 31, 16, 63),
    MergeShape(2, 130, 32, 17, 64),
    MergeShape(2, 130, 33, 64, 65),
    MergeShape(2, 44, 33, 65, 127),
    MergeShape(2, 45, 33, 130, 8),
    MergeShape(5, 100, 66, 3, 2048),
    MergeShape(1, 300, 97, 3, 1500),
    MergeShape(24, 64, 16, 128, 128),
    MergeShape(32, 16, 4, 128, 128),
    MergeShape(1, 200, 50, 2048, 40),
    MergeShape(2, 20, 5, 3, 0),
    MergeShape(2, 20, 5, 0, 3),
)


def arguments(inputs: dict[str, Any]) -> list[Any]:
    return [inputs["x"], inputs["metric"], *inputs["keys"], inputs["weight"], inputs["valid"]]


def wide(arguments: list[Any]) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*MERGE_SHAPES, *EDGES], ids=str)
def test_forward_agrees_with_the_reference(backend: str, shape: MergeShape, dtype: torch.dtype) -> None:
    for seed, (weight, valid) in enumerate(((False, False), (True, True))):
        args = arguments(merge_inputs(shape, dtype, weight=weight, valid=valid, poison=True, seed=seed))
        with poisoned_memory():
            ours = FORWARD[backend](*args)
        expected, truth = reference.merge_tokens(*args), reference.merge_tokens(*wide(args))
        assert_same(ours[2], expected[2], "assign")
        assert_same(ours[1], expected[1], "size")
        if dtype == torch.float64:  # there is no finer truth; the oracle is in the test of the contract
            torch.testing.assert_close(ours[0], expected[0])
        else:
            assert_accurate(ours[0], eager=expected[0], truth=truth[0], what="tokens")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*MERGE_SHAPES, *EDGES], ids=str)
def test_backward_agrees_with_the_reference(backend: str, shape: MergeShape, dtype: torch.dtype) -> None:
    for seed, (weight, valid) in enumerate(((False, False), (True, True))):
        args = arguments(merge_inputs(shape, dtype, weight=weight, valid=valid, poison=True, seed=seed))
        out = reference.merge_tokens(*args)
        exact = reference.merge_tokens(*wide(args))
        g = torch.Generator().manual_seed(seed)
        slopes = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in out[:2]]
        given = [*slopes, args[0], args[4], *out]
        for wanted in ([True, True], [True, False], [False, True]):
            with poisoned_memory():
                ours = BACKWARD[backend](*given, wanted)
            eager = reference.merge_tokens_backward(*given, wanted)
            truth = reference.merge_tokens_backward(*wide([*slopes, args[0], args[4]]), *exact, wanted)
            for name, o, e, t in zip(("x", "weight"), ours, eager, truth, strict=True):
                assert o.dtype == e.dtype
                if dtype == torch.float64:  # there is no finer truth; gradcheck is the proof there
                    torch.testing.assert_close(o, e)
                else:
                    assert_accurate(o, eager=e, truth=t, what=f"gradient of {name}, wanted {wanted}")
        without_size = BACKWARD[backend](slopes[0], None, None, args[4], *out, [True, True])
        assert_same(without_size[0], BACKWARD[backend](*given, [True, False])[0])
        assert without_size[1].eq(0).all()
        without_tokens = BACKWARD[backend](None, *given[1:], [True, True])
        assert_same(without_tokens, reference.merge_tokens_backward(None, *given[1:], [True, True]))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [4, 32, 100, 768])
def test_a_real_metric_reaches_the_best_similarity(backend: str, dim: int, dtype: torch.dtype) -> None:
    inputs = merge_inputs(MergeShape(3, 150, 41, 2, dim), dtype, exact=False, valid=True, poison=True)
    keys = inputs["keys"]
    assign = FORWARD[backend](*arguments(inputs))[2]
    assert_assignment(assign, inputs["metric"], keys.index, keys.count, inputs["valid"])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("metric_dtype", DTYPES)
def test_metric_and_x_of_different_dtypes(backend: str, metric_dtype: torch.dtype) -> None:
    for dtype in DTYPES:
        args = arguments(merge_inputs(MergeShape(2, 50, 9, 7, 40), dtype, weight=True, valid=True, poison=True))
        args[1] = args[1].to(metric_dtype)
        ours, expected = FORWARD[backend](*args), reference.merge_tokens(*args)
        assert_same(ours[1:], expected[1:])
        assert ours[0].dtype == dtype


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 40, 2048])
def test_ties_go_to_the_lower_slot_wherever_the_two_are(backend: str, dim: int, dtype: torch.dtype) -> None:
    """Of 70 keys exactly two are the most similar: in one vector, in two, in two panels, in two tiles (at 2,048)."""
    slots = 70
    index = torch.arange(slots)[None]
    for low, high in ((0, 1), (3, 18), (15, 16), (16, 31), (31, 32), (5, 33), (32, 64), (63, 64), (2, 69), (68, 69)):
        metric = torch.ones(1, slots + 1, dim, dtype=dtype)
        metric[0, :, 0] = 0
        metric[0, low, 0] = metric[0, high, 0] = metric[0, slots, 0] = 2
        keys = (index, torch.tensor([slots]))
        assert FORWARD[backend](metric, metric, *keys, None, None)[2][0, slots] == low
        metric[0, high, 0] = 3  # no tie any more
        assert FORWARD[backend](metric, metric, *keys, None, None)[2][0, slots] == high


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_metrics(backend: str, dtype: torch.dtype) -> None:
    """Equal, zero, all negative, NaN, infinite, and numbers so small that a unit which flushes them would see zeros."""
    keys = merge_keys(torch.ones(2, 60, dtype=torch.bool), 20, torch.Generator().manual_seed(0))
    signs = torch.randint(-3, 4, (2, 60, 48)).double()
    small = {torch.bfloat16: 2.0**-70, torch.float16: 2.0**-20, torch.float32: 2.0**-70, torch.float64: 2.0**-70}[dtype]
    spiked = signs.clone()
    spiked[0, 7] = torch.nan
    spiked[1, 9, 3] = torch.inf
    spiked[1, keys.index[1, 4]] = torch.nan
    one_small = [signs * 0 for _ in range(4)]
    for metric, at in zip(one_small, (0, 31, 32, 47), strict=True):
        metric[..., at] = signs[..., at] * small
    # Only the keys, or only the other tokens, so small that their products are subnormal.
    key = keys.index[..., None].expand(-1, -1, 48)
    small_keys = (signs * 2.0**-39).scatter(1, key, signs[:, :20] * 2.0**-100)
    small_tokens = (signs * 2.0**-100).scatter(1, key, signs[:, :20] * 2.0**-39)
    equal = (signs * 0, signs * 0 + 1)
    for metric in (*equal, -signs.abs(), signs * small, *one_small, small_keys, small_tokens, spiked):
        m = metric.to(dtype)
        args = (torch.ones(2, 60, 1), m, *keys, None, None)
        assert_same(FORWARD[backend](*args)[2], reference.merge_tokens(*args)[2])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_round_to_the_nearest_even(backend: str, dtype: torch.dtype) -> None:
    """The mean of neighbours, of which half are ties; subnormals and both signs included. So with gradients."""
    bits = torch.arange(0, 2**15 - 3, dtype=torch.int16)
    a, b = bits.view(dtype), (bits + 1 + bits % 3).view(dtype)
    fits = a.isfinite() & b.isfinite()
    pair = torch.stack((a[fits], b[fits]))
    x = torch.stack((pair, -pair))
    keys = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    out = FORWARD[backend](x, torch.zeros(2, 2, 1), *keys, None, None)
    assert_same(out[0], x.float().mean(1, keepdim=True).to(dtype))
    weight = torch.tensor([[1.5, 0.5]]).expand(2, 2)
    grad = x[:, :1]
    dx = BACKWARD[backend](grad, None, None, weight, *out, [True, False])[0]
    assert_same(dx, (grad.float() * (weight / 2)[..., None]).to(dtype))


@pytest.mark.parametrize("backend", FAST)
def test_a_size_whose_reciprocal_is_infinite(backend: str) -> None:
    x, weight = torch.tensor([[[1.0], [3.0], [5.0]]]), torch.full((1, 3), 2.0**-140)
    keys = torch.tensor([[0]]), torch.tensor([1])
    tokens, size, _ = FORWARD[backend](x, x, *keys, weight, None)
    assert tokens.item() == 3
    assert size.item() == 3 * 2.0**-140


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beyond", [0, 1])
def test_a_gradient_too_large_for_the_caches(backend: str, dtype: torch.dtype, beyond: int) -> None:
    """Over 4 MiB in whole lines of 64 bytes, or not in whole ones."""
    samples, tokens, slots = 2, 900, 7
    dim = (4 << 20) // (samples * tokens * dtype.itemsize) // 64 * 64 + 64 + beyond
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assign = torch.randint(-1, slots, (samples, tokens))
    weight, size = torch.rand(samples, tokens, dtype=wide), torch.rand(samples, slots, dtype=wide) + 0.5
    grad = torch.randn(samples, slots, dim).to(dtype)
    with poisoned_memory():
        dx = BACKWARD[backend](grad, None, None, weight, grad, size, assign, [True, False])[0]
    slot = assign.clamp(min=0)
    scale = (weight / size.gather(1, slot)).masked_fill(assign < 0, 0)
    rows = grad.to(wide).gather(1, slot[..., None].expand(-1, -1, dim))
    assert_same(dx, (scale[..., None] * rows).to(dtype))


@pytest.mark.parametrize("backend", FAST)
def test_a_slot_out_of_range_takes_no_gradient(backend: str) -> None:
    """Sample 0's slot 2 of 2 would be the first of sample 1."""
    x, tokens, size = torch.ones(2, 3, 2), torch.zeros(2, 2, 2), torch.ones(2, 2)
    assign = torch.tensor([[0, 2, -1], [0, 1, 2**40]])
    dx, dw = BACKWARD[backend](tokens + 1, size, x, None, tokens, size, assign, [True, True])
    assert dx[..., 0].tolist() == dx[..., 1].tolist() == [[1, 0, 0], [1, 1, 0]]
    assert dw.tolist() == [[3, 0, 0], [3, 3, 0]]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 9])
def test_the_number_of_threads_changes_no_bit(backend: str, batch: int, dtype: torch.dtype) -> None:
    inputs = merge_inputs(MergeShape(batch, 700, 77, 33, 96), dtype, weight=True, valid=True, exact=False)
    args = arguments(inputs)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = FORWARD[backend](*args)
            grads = BACKWARD[backend](out[0], out[1], args[0], args[4], *out, [True, True])
            results.append((*out, *grads))
    finally:
        torch.set_num_threads(before)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_same_bits(backend: str, dtype: torch.dtype) -> None:
    inputs = merge_inputs(MergeShape(3, 41, 11, 70, 37), dtype, weight=True, valid=True, exact=False)
    args = arguments(inputs)
    expected = FORWARD[backend](*args)
    given = [expected[0], expected[1], args[0], args[4]]
    grads = BACKWARD[backend](*given, *expected, [True, True])
    for layout in LAYOUTS:
        other = [relayout(a, layout) for a in args]
        assert_same(FORWARD[backend](*other), expected)
        placed = [relayout(t, layout) for t in (*given, *expected)]
        assert_same(BACKWARD[backend](*placed, [True, True]), grads)
    spread = torch.ones((), dtype=dtype).expand(expected[0].shape)
    ones = (args[0], args[4], *expected, [True, True])
    assert_same(
        BACKWARD[backend](spread, None, *ones), BACKWARD[backend](spread.contiguous(), None, *ones), "expanded gradient"
    )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_outside_the_inputs_is_read(backend: str, dtype: torch.dtype) -> None:
    args = arguments(merge_inputs(MergeShape(2, 37, 9, 33, 45), dtype, weight=True, valid=True))
    expected = FORWARD[backend](*args)
    boxes = [guarded(a) for a in args]
    assert_same(FORWARD[backend](*(box.tensor for box in boxes)), expected)
    given = (expected[0], expected[1], args[0], args[4], *expected)
    around = [guarded(a) for a in given]
    grads = BACKWARD[backend](*given, [True, True])
    assert_same(BACKWARD[backend](*(box.tensor for box in around), [True, True]), grads)
    for box in (*boxes, *around):
        box.check()


SCRIPT = """
import sys, torch
from sparsify_kernels import backend_info, key_tokens, merge_tokens
from sparsify_kernels.testing import KeyShape, MergeShape, merge_inputs, score_inputs
assert backend_info()["isa"] == sys.argv[1], backend_info()
keys = [tuple(key_tokens(**score_inputs(KeyShape(4, n), "ties"), fence=0.1)) for n in (5, 67, 700)]
merged = [tuple(merge_tokens(**merge_inputs(MergeShape(3, 90, 35, 50, d), dtype, weight=True, valid=True)))
          for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64) for d in (3, 40)]
torch.save((keys, merged), sys.argv[2])
"""


def test_every_instruction_set_gives_the_same_keys_and_assignments(tmp_path: Any) -> None:
    if not FAST:
        pytest.skip("the C++ extension is not built")
    best = sparsify_kernels.backend_info()["isa"]
    levels = ("base", "avx2", "avx512", "avx512_bf16")
    files = {}
    for isa in levels if best == "avx512" else levels[: levels.index(best) + 1]:
        files[isa] = tmp_path / f"{isa}.pt"
        command = [sys.executable, "-c", SCRIPT, isa.removesuffix("_bf16"), str(files[isa])]  # as it is shown
        subprocess.run(command, check=True, env={**os.environ, "SPARSIFY_ISA": isa})
    keys, merged = torch.load(files["base"])
    for isa, file in files.items():
        other_keys, other_merged = torch.load(file)
        assert_same(tuple(other_keys), tuple(keys), isa)
        for (tokens, size, assign), (other, other_size, other_assign) in zip(merged, other_merged, strict=True):
            assert_same(other_size, size, isa)
            assert_same(other_assign, assign, isa)
            torch.testing.assert_close(other, tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {1: torch.zeros(2, 4, 3)},
        {2: torch.zeros(1, 2).long()},
        {3: torch.ones(3).long()},
        {4: torch.ones(2, 4)},
        {4: torch.ones(2, 5, dtype=torch.float64)},
        {5: torch.ones(2, 6).bool()},
    ],
    ids=str,
)
def test_cpp_refuses_shapes_that_lead_out_of_bounds(changes: dict[int, Tensor]) -> None:
    if not FAST:
        pytest.skip("the C++ extension is not built")
    keys = KeyTokens(torch.zeros(2, 2).long(), torch.ones(2).long())
    args: list[Any] = [torch.zeros(2, 5, 3), torch.zeros(2, 5, 3), *keys, None, None]
    for at, value in changes.items():
        args[at] = value
    with pytest.raises(RuntimeError, match="merge_tokens: metric must be"):
        FORWARD["cpp"](*args)
