"""What the traces of a pass say: one call of a kernel an op, nothing computed around it, no host sync, no M x N."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sparsify_kernels import _registry, attention_scores, gather_tokens, merge_tokens, random_mask, window_attention
from sparsify_kernels.nn import AdaptiveSparseMerging
from sparsify_kernels.testing import (
    AttentionShape,
    MergeShape,
    RecordedOps,
    WindowShape,
    assert_compiles,
    attention_inputs,
    attention_scores_eager,
    merge_inputs,
    traced,
    window_inputs,
)

NEEDS_CPP = pytest.mark.skipif(not _registry.has_cpp("random_mask"), reason="the C++ extension is not built")
# Gradients are handed over and, where a leaf has one, added.
HANDED_OVER = {"aten::detach", "aten::new_empty_strided", "aten::copy_", "aten::clone", "aten::add_", "aten::view"}
HOST_SYNCS = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}


def profiled(run: Callable[[], Any]) -> Any:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as result:
        run()
    return result


def masking() -> tuple[Any, ...]:
    return random_mask(torch.randn(2, 16, 3, requires_grad=True), seed=1)[:1]


def scoring() -> tuple[Any, ...]:
    inputs = attention_inputs(AttentionShape(3, 2, 9, 13, 8, 4), bias=True, valid=True)
    return tuple(attention_scores(**{n: leaf(t) for n, t in inputs.items()}))


def gathering() -> tuple[Any, ...]:
    return (gather_tokens(torch.randn(2, 9, 3, requires_grad=True), torch.randint(-1, 9, (2, 5))),)


def merging() -> tuple[Any, ...]:
    inputs = merge_inputs(MergeShape(3, 23, 5, 6, 4), weight=True, valid=True)
    return tuple(merge_tokens(**{n: leaf(t) if n in ("x", "weight") else t for n, t in inputs.items()})[:2])


def attending_inside_windows() -> tuple[Any, ...]:
    inputs = window_inputs(WindowShape(23, 4, 3, 4, 2, 6), scale=True, region=True, cosine=True)
    return (window_attention(**{n: leaf(t) if isinstance(t, Tensor) else t for n, t in inputs.items()}),)


def leaf(x: Tensor) -> Tensor:
    return x.requires_grad_() if x.is_floating_point() else x


FORWARD = {
    "random_mask_backward": masking,
    "attention_scores_backward": scoring,
    "key_tokens_gather_backward": gathering,
    "merge_tokens_backward": merging,
    "window_attention_backward": attending_inside_windows,
}


def test_every_backward_is_among_them() -> None:
    kernels = [k for op in _registry.TO_COME for k in _registry.kernels_of(op)]
    assert set(FORWARD) == {k for k in kernels if k.endswith("_backward")}


@pytest.mark.parametrize("kernel", FORWARD)
def test_a_backward_is_one_kernel_and_nothing_computed_around_it(kernel: str) -> None:
    outputs = FORWARD[kernel]()
    slopes = [torch.ones_like(t) for t in outputs]
    with RecordedOps() as recorded:
        torch.autograd.backward(outputs, slopes)
    ours = [name for name in recorded.names if name.startswith("sparsify_kernels::")]
    assert ours == [f"sparsify_kernels::{kernel}"]
    assert set(recorded.names) - set(ours) <= HANDED_OVER


def test_a_backward_that_computes_is_seen() -> None:
    inputs = attention_inputs(AttentionShape(1, 1, 4, 5, 3, 2))
    outputs = attention_scores_eager(**{n: leaf(t) for n, t in inputs.items() if t is not None})
    slopes = [torch.ones_like(t) for t in outputs]
    with RecordedOps() as recorded:
        torch.autograd.backward(outputs, slopes)
    assert not set(recorded.names) <= HANDED_OVER


@NEEDS_CPP
@pytest.mark.parametrize("kernel", [k for k in FORWARD if "cpp" not in _registry.TO_COME[_registry.op_of(k)]])
def test_kernels_in_cpp_call_no_operation_that_computes(kernel: str) -> None:
    def step() -> None:
        outputs = FORWARD[kernel]()
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])

    calls = traced(profiled(step))
    assert [c.kernel for c in calls] == [kernel.removesuffix("_backward"), kernel]
    assert all(c.fused for c in calls), calls


def test_a_reference_is_told_from_a_kernel() -> None:
    """What else would a trace of the reference show than that it is one?"""
    inputs = merge_inputs(MergeShape(2, 9, 3, 4, 4))
    reference = _registry.implementations("merge_tokens")["reference"]
    arguments = (inputs["x"], inputs["metric"], *inputs["keys"], None, None)
    with (
        torch.profiler.profile(activities=[ProfilerActivity.CPU]) as result,
        torch.profiler.record_function("sparsify_kernels::merge_tokens"),
    ):
        reference(*arguments)
    (call,) = traced(result)
    assert not call.fused
    assert "aten::matmul" in call.inside


N = 512
MATRIX = N * N * 4  # bytes of an M x N matrix of one sample


def merging_step() -> None:
    x = torch.randn(2, N, 16, requires_grad=True)
    merged = AdaptiveSparseMerging()(x)
    (merged.tokens.square().sum() + merged.scores.square().sum()).backward()


def test_merging_is_three_kernels_without_a_host_sync_between() -> None:
    events = profiled(merging_step).events()
    names = [e.name for e in events]
    ours = [n for n in names if n.startswith("sparsify_kernels::")]
    assert ours[:3] == [f"sparsify_kernels::{op}" for op in ("attention_scores", "key_tokens", "merge_tokens")]
    assert sorted(ours[3:]) == [f"sparsify_kernels::{op}_backward" for op in ("attention_scores", "merge_tokens")]
    at_top = [e.name for e in events if e.cpu_parent is None and e.name != "[memory]"]
    assert at_top[at_top.index(ours[0]) :][:3] == ours[:3]
    if _registry.has_cpp("key_tokens"):
        assert not set(names) & HOST_SYNCS


def test_a_host_sync_is_seen() -> None:
    names = {e.name for e in profiled(lambda: torch.ones(3).sum().item()).events()}
    assert names & HOST_SYNCS


@NEEDS_CPP
def test_merging_allocates_no_matrix_of_queries_and_keys() -> None:
    result = profiled(merging_step)
    shapes = [shape for e in result.events() for shape in e.input_shapes or []]
    assert [s for s in shapes if list(s[-2:]) == [N, N]] == []
    assert max(e.self_cpu_memory_usage for e in result.events()) < MATRIX
    assert max(c.largest for c in traced(result)) < MATRIX


def test_a_matrix_of_queries_and_keys_is_seen() -> None:
    q = torch.randn(1, 1, N, 16)
    result = profiled(lambda: attention_scores_eager(q, q))
    assert max(e.self_cpu_memory_usage for e in result.events()) >= MATRIX
    assert any(list(s[-2:]) == [N, N] for e in result.events() for s in e.input_shapes or [])


def test_merging_compiles_once_for_every_length() -> None:
    """In one graph, forward and backward, whatever the number of tokens."""
    torch._dynamo.reset()  # what earlier tests compiled of it would be looked at first
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    merging = torch.compile(AdaptiveSparseMerging(), fullgraph=True, dynamic=True, backend=count)
    for tokens in (40, 56, 77):
        assert merging(torch.randn(2, tokens, 8)).tokens.shape == (2, max(1, tokens - 3 * tokens // 4), 8)
    assert len(graphs) == 1
    for tokens in (40, 77):
        x = torch.randn(2, tokens, 8, requires_grad=True)
        assert_compiles(AdaptiveSparseMerging(heads=2), x, dynamic=True, backend="aot_eager")


@pytest.mark.slow
def test_merging_compiles_to_code_for_every_length() -> None:
    assert_compiles(AdaptiveSparseMerging(), torch.randn(2, 40, 8, requires_grad=True), dynamic=True)
