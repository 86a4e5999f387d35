"""sparsify_kernels.testing: the assertions fail when they should, the inputs are what they say."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import pytest
import torch

from sparsify_kernels import KeyTokens, key_tokens, testing
from sparsify_kernels.testing import AttentionShape, KeyShape, MergeShape


def test_every_public_name_exists() -> None:
    assert all(hasattr(testing, name) for name in testing.__all__)


def test_accuracy_is_measured_against_twice_the_error_of_pytorch() -> None:
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eager = torch.tensor([1.0, 2.1])
    testing.assert_accurate(torch.tensor([1.19, 2.0]), eager=eager, truth=truth)
    for wrong in ([1.21, 2.0], [1.0, float("nan")]):
        with pytest.raises(AssertionError, match="largest error"):
            testing.assert_accurate(torch.tensor(wrong), eager=eager, truth=truth)
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_accurate(torch.tensor([1.0]), eager=eager, truth=truth)


def test_one_rounding_step_is_allowed_where_pytorch_is_exact() -> None:
    truth = torch.tensor([1.0], dtype=torch.float64)
    testing.assert_accurate(torch.tensor([1.0 + 2.0**-23]), eager=truth, truth=truth)
    with pytest.raises(AssertionError):
        testing.assert_accurate(torch.tensor([1.0 + 2.0**-21]), eager=truth, truth=truth)


def test_the_peak_of_tensors_is_what_was_there_at_once() -> None:
    def call() -> torch.Tensor:
        first = torch.empty(3 << 20, dtype=torch.uint8)
        del first
        second, third = torch.empty(1 << 20, dtype=torch.uint8), torch.empty(4 << 20, dtype=torch.uint8)
        del third
        return second

    peak, result = testing.peak_of_tensors(call)
    assert peak == 5 << 20
    assert result.shape == (1 << 20,)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([1.0]), torch.tensor([2.0])),
        (torch.tensor([1.0]), torch.tensor([1])),
        (torch.tensor([1.0]), torch.tensor([[1.0]])),
        (torch.tensor([1.0]), torch.tensor([float("nan")])),
        ((torch.tensor([1.0]), None), (torch.tensor([1.0]), 3)),
        ((torch.tensor([1.0]),), (torch.tensor([1.0]), None)),
    ],
)
def test_assert_same_sees_differences(one: Any, other: Any) -> None:
    testing.assert_same(one, one)
    with pytest.raises(AssertionError):
        testing.assert_same(one, other)


def test_assert_alone_sees_a_batch_mate() -> None:
    x = torch.randn(3, 4)
    testing.assert_alone(lambda x: x.softmax(1), {"x": x})
    with pytest.raises(AssertionError, match="of sample"):
        testing.assert_alone(lambda x: x - x.mean(), {"x": x})


def test_assert_assignment_sees_a_wrong_slot() -> None:
    inputs = testing.merge_inputs(MergeShape(2, 30, 5, 4, 8), exact=False)
    keys = inputs["keys"]
    assign = testing.merge_tokens_oracle(**inputs).assign
    testing.assert_assignment(assign, inputs["metric"], *keys)
    wrong = assign.clone()
    token = next(i for i in range(30) if i not in keys.index[0].tolist())
    wrong[0, token] = (wrong[0, token] + 1) % 5
    with pytest.raises(AssertionError, match="not its most similar one"):
        testing.assert_assignment(wrong, inputs["metric"], *keys)
    wrong = assign.clone()
    wrong[0, keys.index[0, 0]] = 1
    with pytest.raises(AssertionError, match="did not join itself"):
        testing.assert_assignment(wrong, inputs["metric"], *keys)
    wrong = assign.clone()
    wrong[1, 3] = -1
    with pytest.raises(AssertionError, match="in no live slot"):
        testing.assert_assignment(wrong, inputs["metric"], *keys)


def test_assert_compiles_sees_a_graph_break() -> None:
    testing.assert_compiles(lambda x: x * 2, torch.ones(2, requires_grad=True), backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        testing.assert_compiles(lambda x: x * 2 if x.sum() > 0 else x, torch.ones(2), backend="aot_eager")


def test_poisoned_memory_is_poisoned_and_restored() -> None:
    with testing.poisoned_memory():
        assert torch.empty(1000).isnan().all()
        assert torch.ones(3, dtype=torch.bfloat16).new_empty(100).isnan().all()
        assert torch.empty(100, dtype=torch.int64).eq(torch.iinfo(torch.int64).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_guarded_sees_writes_on_both_sides(dtype: torch.dtype) -> None:
    x = torch.ones(3, 4).to(dtype)
    for offset in (-1, 12):
        guard = testing.guarded(x)
        assert torch.equal(guard.tensor, x)
        guard.tensor.zero_()
        guard.check()
        start = guard.tensor.storage_offset()
        guard.buffer[start + offset] = 0
        with pytest.raises(AssertionError, match="before" if offset < 0 else "after"):
            guard.check()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_nothing_can_be_read_behind_the_edge(dtype: torch.dtype) -> None:
    x = torch.arange(1, 1201).to(dtype).view(3, 400)
    assert torch.equal(testing.at_the_edge(x), x)
    code = f"""
import ctypes, torch
from sparsify_kernels.testing import at_the_edge
x = at_the_edge(torch.ones(3, 400, dtype={dtype}))
ctypes.string_at(x.data_ptr(), x.nbytes)
print("inside", flush=True)
ctypes.string_at(x.data_ptr() + x.nbytes, 1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("inside\n", -signal.SIGSEGV)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_relayout_keeps_the_values(layout: str) -> None:
    for shape in ((3, 4, 5), (2, 1), (4,), (0, 3), ()):
        x = torch.randn(shape)
        moved = testing.relayout(x, layout)
        assert torch.equal(moved, x)
    moved = testing.relayout(torch.randn(3, 4, 5), layout)
    expected = {"contiguous": (20, 5, 1), "permuted": (1, 3, 12), "strided": (40, 10, 2), "offset": (20, 5, 1)}[layout]
    assert moved.stride() == expected
    assert (moved.storage_offset() > 0) == (layout == "offset")


def test_factories_are_deterministic_and_as_described() -> None:
    one, two = (testing.attention_inputs(AttentionShape(3, 2, 9, 11, 4, 4), valid=True, poison=True) for _ in range(2))
    testing.assert_same(tuple(one.values()), tuple(two.values()))
    assert not one["key_valid"][0].any()
    assert not one["query_valid"][1].any()
    assert one["key_valid"][2].sum() == 1
    assert one["k"].isnan().any()
    merge = testing.merge_inputs(MergeShape(3, 9, 4, 2, 2), valid=True, weight=True)
    assert not merge["valid"][1].any()
    assert merge["keys"].count[1] == 0
    assert (merge["weight"] == 0).any()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        step = testing.score_inputs(KeyShape(2, 9), "step", dtype)["scores"]
        rest = torch.cat((step[:, :4], step[:, 5:]), dim=1)
        assert (rest == rest[0, 0]).all()
        assert (step[:, 4] > rest[0, 0]).all()
        assert (step[:, 4] <= rest[0, 0] * (1 + 2 * torch.finfo(dtype).eps)).all()
    with pytest.raises(ValueError, match="kind must be one of"):
        testing.score_inputs(KeyShape(1, 1), "funny")
    with pytest.raises(ValueError, match="layout must be one of"):
        testing.relayout(torch.zeros(1), "funny")


def test_oracles_are_independent_of_the_ops() -> None:
    """They run with every kernel of the package replaced by one that raises."""
    script = (
        "import torch\n"
        "from sparsify_kernels import _registry, testing\n"
        "def broken(*args): raise RuntimeError('a kernel ran')\n"
        "inputs = testing.attention_inputs(testing.AttentionShape(1, 1, 2, 3, 2, 2))\n"
        "merge = testing.merge_inputs(testing.MergeShape(1, 5, 2, 2, 2))\n"
        "lib = torch.library.Library('sparsify_kernels', 'IMPL')\n"
        "for kernel in _registry._references: lib.impl(kernel, broken, 'CPU', allow_override=True)\n"
        "testing.attention_scores_oracle(**inputs); testing.attention_scores_eager(**inputs)\n"
        "testing.key_tokens_oracle(torch.rand(2, 9)); testing.merge_tokens_oracle(**merge)\n"
        "testing.gather_tokens_oracle(torch.rand(1, 3, 2), torch.tensor([[0, -1]]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_example_of_the_package_docstring_runs() -> None:
    inputs = testing.attention_inputs(testing.ATTENTION_SHAPES[0], torch.bfloat16, valid=True, poison=True)
    from sparsify_kernels import attention_scores as mine

    with testing.poisoned_memory():
        ours = mine(**inputs)
    eager, truth = testing.attention_scores_eager(**inputs), testing.attention_scores_oracle(**inputs)
    testing.assert_accurate(ours.received, eager=eager.received, truth=truth.received)


def test_inputs_between_sentinels_are_not_read_out_of_bounds() -> None:
    """Every input of every op stands between NaN: a read past its end would show in the result."""
    scores = testing.guarded(torch.rand(2, 41))
    plain = scores.tensor.clone()
    testing.assert_same(key_tokens(scores.tensor), key_tokens(plain))
    merge = testing.merge_inputs(MergeShape(2, 41, 7, 5, 3), weight=True, valid=True)
    guards = {n: testing.guarded(t) for n, t in merge.items() if isinstance(t, torch.Tensor)}
    index, count = (testing.guarded(t) for t in merge["keys"])
    from sparsify_kernels import merge_tokens

    inside = {n: g.tensor for n, g in guards.items()}
    testing.assert_same(merge_tokens(**inside, keys=KeyTokens(index.tensor, count.tensor)), merge_tokens(**merge))
    for guard in (*guards.values(), index, count, scores):
        guard.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_guarded_memory_sees_writes_beside_an_output(dtype: torch.dtype) -> None:
    x = torch.zeros(3, dtype=dtype)

    def write(offset: int) -> None:
        with testing.guarded_memory():
            out = x.new_empty((2, 2))
            assert x.new_empty(0).numel() == 0
            out.as_strided((1,), (1,), out.storage_offset() + offset).fill_(1)

    for inside in (0, 3):
        write(inside)
    for offset, where in ((-1, "before"), (4, "after")):
        with pytest.raises(AssertionError, match=f"something wrote {where}"):
            write(offset)
    assert x.new_empty(4).storage_offset() == 0  # as before
