"""What the Triton kernels of attention_scores do beyond being accurate: what they launch, read, write and leave alone.

Under the interpreter tiles are 16 keys and 32 queries; up to 64 queries take one pass, or 16 in fp32 beyond a width
of 64.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sparsify_kernels import _registry
from sparsify_kernels.attention_scores import reference
from sparsify_kernels.testing import (
    LAYOUTS,
    AttentionShape,
    RecordedOps,
    assert_alone,
    assert_same,
    attention_inputs,
    guarded,
    poisoned_memory,
)

pytest.importorskip("triton", reason="Triton is not installed: no kernel ran")

MODULE = importlib.import_module("sparsify_kernels.attention_scores.triton")
FORWARD = _registry.implementations("attention_scores")["triton"]
BACKWARD = _registry.implementations("attention_scores_backward")["triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("q", "k", "v", "key_bias", "query_valid", "key_valid")
ALL = [True] * 4

ONE = AttentionShape(3, 2, 9, 21, 8, 5)  # one pass, two tiles of keys
TWO = AttentionShape(3, 1, 70, 21, 8, 5)  # two passes, three tiles of queries
PASSES = pytest.mark.parametrize("shape", [ONE, TWO], ids=["one pass", "two passes"])


def arguments(shape: AttentionShape, dtype: torch.dtype = torch.float32, **options: Any) -> list[Tensor | None]:
    inputs = attention_inputs(shape, dtype, device=DEVICE, **options)
    return [inputs[n] for n in NAMES]


def gradients_for(received: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return tuple(torch.randn(t.shape, generator=g).to(t) for t in (received, output))


def run(args: list[Tensor | None], scale: float | None = None, wanted: list[bool] = ALL) -> tuple[Tensor, ...]:
    """received, output, lse and the gradients."""
    with poisoned_memory():
        received, output, lse = FORWARD(*args, scale)
        grads = BACKWARD(*gradients_for(received, output), *args, output, lse, scale, wanted)
    return received, output, lse, *grads


def assert_like_reference(got: tuple[Tensor, ...], args: list[Tensor | None], scale: float | None = None) -> None:
    want = reference.attention_scores(*args, scale)
    want += reference.attention_scores_backward(*gradients_for(*want[:2]), *args, *want[1:], scale, ALL)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


class Recorder:
    """A kernel that writes down its launches; what PyTorch does for the interpreter is not ours."""

    def __init__(self, kernel: Any, launches: list[str]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches.append(self.kernel.__name__)

        def launch(*args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                self.kernel[grid](*args, **kwargs)

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    for kernel in (*MODULE.TILES, MODULE.prepare, MODULE.over_heads):
        recorder = Recorder(kernel, names)
        for table in (MODULE.TILES, MODULE.TILES_WITH_TERMS):
            for key in [k for k in table if k is kernel or (isinstance(k, tuple) and k[0] is kernel)]:
                monkeypatch.setitem(table, (recorder, *key[1:]) if isinstance(key, tuple) else recorder, table[key])
        monkeypatch.setattr(MODULE, kernel.__name__, recorder)
    return names


@pytest.mark.parametrize(
    ("queries", "dim", "dtype", "passes"),
    [
        (64, 8, torch.float32, ["attend_once"]),
        (65, 8, torch.float32, ["attend", "receive"]),
        (64, 128, torch.float16, ["attend_once"]),
        (17, 128, torch.float32, ["attend", "receive"]),
        (16, 128, torch.float32, ["attend_once"]),
    ],
)
def test_few_queries_take_one_pass(
    launches: list[str], queries: int, dim: int, dtype: torch.dtype, passes: list[str]
) -> None:
    args = arguments(AttentionShape(1, 1, queries, 17, dim, 3), dtype)
    received, output, lse = FORWARD(*args, None)
    assert launches == [*passes, "over_heads"]
    if dtype == torch.float32:
        for ours, theirs in zip((received, output, lse), reference.attention_scores(*args, None), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_backward_launches_what_is_asked_for(launches: list[str]) -> None:
    args = arguments(ONE, torch.float16)
    received, output, lse = FORWARD(*args, None)
    grads = gradients_for(received, output)
    for wanted, expected in (
        ([True, False, False, False], ["prepare", "row_sums", "grad_queries"]),
        ([False, True, False, False], ["prepare", "row_sums", "grad_keys"]),
        ([False, False, False, True], ["prepare", "row_sums", "grad_keys", "over_heads"]),
        ([False] * 4, []),
    ):
        launches.clear()
        BACKWARD(*grads, *args, output, lse, None, wanted)
        assert launches == expected


@PASSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pytorch_does_nothing_but_allocate(shape: AttentionShape, dtype: torch.dtype, launches: list[str]) -> None:
    args = arguments(shape, dtype, bias=True, valid=True, layout="permuted")
    received, output, _ = FORWARD(*args, None)
    grads = gradients_for(received, output)
    with RecordedOps() as seen:
        _, output, lse = FORWARD(*args, 0.5)
        BACKWARD(*grads, *args, output, lse, 0.5, ALL)
    assert set(seen.names) == {"aten::new_empty", "aten::empty_like"}
    assert len(launches) > 5


@pytest.mark.parametrize("queries", [60, 200])  # one pass, two
def test_no_tensor_is_as_large_as_queries_times_keys(queries: int) -> None:
    args = arguments(AttentionShape(1, 1, queries, 600, 4, 4), bias=True, valid=True)
    with RecordedOps() as seen:
        received, output, lse = FORWARD(*args, None)
        BACKWARD(received, output, *args, output, lse, None, ALL)
    assert 600 * 4 <= seen.largest < queries * 600 / 2


@PASSES
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layout_changes_nothing(shape: AttentionShape, layout: str) -> None:
    flat, other = (arguments(shape, bias=True, valid=True, poison=True, layout=x) for x in ("contiguous", layout))
    assert_same(run(other, 0.4), run(flat, 0.4))


def test_heads_next_to_each_other_and_expanded_inputs() -> None:
    """The layout of a split projection, one key for every sample, gradients that are all the same."""
    wide = torch.randn(2, 20, 3, 8, device=DEVICE)
    q, k = wide.transpose(1, 2), wide[:1].transpose(1, 2).expand(2, 3, 20, 8)
    args = (q, k, k, None, None, None)
    plain = tuple(None if t is None else t.contiguous() for t in args)
    want, got = FORWARD(*plain, None), FORWARD(*args, None)
    assert_same(got, want)
    one = torch.ones((), device=DEVICE)
    expanded = one.expand(want[0].shape), one.expand(want[1].shape)
    grads = BACKWARD(*expanded, *args, *got[1:], None, ALL)
    assert_same(grads, BACKWARD(*(t.contiguous() for t in expanded), *plain, *want[1:], None, ALL))


@PASSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nothing_outside_is_read_or_written(
    shape: AttentionShape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(shape, dtype, bias=True, valid=True)
    around = [None if t is None else guarded(t).tensor for t in args]
    buffers = []
    new_empty = torch.Tensor.new_empty

    def allocate(like: Tensor, size: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        if device is not None:  # the interpreter's own
            return new_empty(like, size, device=device)
        buffers.append(guarded(torch.zeros(size, dtype=dtype or like.dtype, device=like.device)))
        return buffers[-1].tensor

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", allocate)
        patch.setattr(torch, "empty_like", lambda x: allocate(x, x.shape))
        forward = FORWARD(*around, None)
        grads = [guarded(g).tensor for g in gradients_for(*forward[:2])]
        backward = BACKWARD(*grads, *around, *forward[1:], None, ALL)
    assert len(buffers) >= 12
    for buffer in buffers:
        buffer.check()
    assert_same((*forward, *backward), run(args))


def test_offsets_beyond_two_to_the_31() -> None:
    if DEVICE == "cuda":
        pytest.skip("the memory of a GPU is not taken lazily")
    buffer = torch.empty(2**31 + 4096, dtype=torch.float16)  # untouched pages cost nothing
    near = arguments(AttentionShape(2, 1, 5, 9, 16, 16), torch.float16)
    far = list(near)
    for i, t in enumerate(near[:3]):
        far[i] = buffer.as_strided(t.shape, (2**31, 256, 16, 1), 300 * i).copy_(t)
    assert_same(run(far), run(near))


@PASSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_mates_and_repetition_change_no_bit(shape: AttentionShape, dtype: torch.dtype) -> None:
    inputs = dict(zip(NAMES, arguments(shape, dtype, bias=True, valid=True, poison=True), strict=True))

    def kernels(**inputs: Any) -> tuple[Tensor, ...]:
        args = [inputs[n] for n in NAMES]
        received, output, lse = FORWARD(*args, None)
        ones = torch.ones_like(received), torch.full_like(output, 0.5)
        return received, output, lse, *BACKWARD(*ones, *args, output, lse, None, ALL)

    assert_alone(kernels, inputs)
    assert_same(kernels(**inputs), kernels(**inputs))


@pytest.mark.parametrize("valid", [False, True], ids=["all", "valid"])
@pytest.mark.parametrize(
    "shape",
    [
        AttentionShape(1, 1, 1, 1, 1, 1),
        AttentionShape(2, 1, 0, 5, 8, 8),
        AttentionShape(2, 1, 5, 0, 8, 8),
        AttentionShape(2, 1, 65, 0, 8, 8),
        AttentionShape(0, 2, 5, 7, 8, 8),
        AttentionShape(2, 1, 3, 129, 2, 3),  # more keys than a tile of the tables
        AttentionShape(1, 17, 2, 3, 2, 2),  # more heads than are added up at a time
        AttentionShape(2, 1, 1030, 2, 1, 1),  # more queries than are counted at a time
    ],
    ids=str,
)
def test_sizes_at_the_edge(shape: AttentionShape, valid: bool) -> None:
    args = arguments(shape._replace(batch=4 if valid else shape.batch), bias=valid, valid=valid)
    scale = -0.7 if valid else None
    assert_like_reference(run(args, scale), args, scale)


@pytest.mark.parametrize(("dtype", "dim", "value_dim"), [(torch.float64, 4, 4), (torch.float32, 129, 1)])
def test_the_reference_serves_what_the_kernels_do_not(
    launches: list[str], dtype: torch.dtype, dim: int, value_dim: int
) -> None:
    args = arguments(AttentionShape(2, 1, 3, 5, dim, value_dim), dtype, bias=True)
    for given in (args, [args[0][..., :4], args[1][..., :4], args[0].new_ones(2, 1, 5, dim), *args[3:]]):
        run(given)
        assert launches == []
        assert_same(FORWARD(*given, None), reference.attention_scores(*given, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("wanted", [[i == n for i in range(4)] for n in range(4)] + [[i != 1 for i in range(4)]])
def test_a_gradient_left_out_changes_no_other(wanted: list[bool], dtype: torch.dtype) -> None:
    args = arguments(ONE, dtype, bias=True)
    whole = run(args)
    part = run(args, wanted=wanted)
    for i, want in enumerate(wanted):
        assert_same(part[3 + i], whole[3 + i] if want else whole[3 + i].new_empty(0))


@PASSES
@pytest.mark.parametrize("with_values", [True, False])
@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_gradient_that_does_not_come_in(
    shape: AttentionShape, with_values: bool, given: tuple[bool, bool], dtype: torch.dtype
) -> None:
    """It counts as zeros."""
    args = arguments(shape if with_values else shape._replace(value_dim=0), dtype, bias=True, valid=True)
    received, output, lse = FORWARD(*args, None)
    grads = gradients_for(received, output)
    zeros = [g if is_given else torch.zeros_like(g) for g, is_given in zip(grads, given, strict=True)]
    with poisoned_memory():
        got = BACKWARD(*(g if there else None for g, there in zip(grads, given, strict=True)),
                       *args, output, lse, None, ALL)  # fmt: skip
    for ours, theirs in zip(got, BACKWARD(*zeros, *args, output, lse, None, ALL), strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs)
    if not any(given):
        assert all(g.eq(0).all() for g in got)


@PASSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_see_no_key(shape: AttentionShape, dtype: torch.dtype) -> None:
    """A sample whose biases are all -inf, between two others, and one key of bias -inf: 0, whatever comes in."""
    args = arguments(shape, dtype, bias=True)
    args[3][1] = -torch.inf
    args[3][0, 3] = -torch.inf
    received, output, lse = FORWARD(*args, None)
    assert lse[1].eq(torch.inf).all()
    assert output[1].eq(0).all()
    assert received[1].eq(0).all()
    assert received[0, 3] == 0
    torch.testing.assert_close(received.sum(1).cpu(), torch.tensor([1.0, 0.0, 1.0]))
    grads = list(gradients_for(received, output))
    grads[1][1] = torch.nan
    for grad in BACKWARD(*grads, *args, output, lse, None, ALL):
        assert grad[1].eq(0).all()
        assert grad[[0, 2]].isfinite().all()
        assert grad[[0, 2]].ne(0).any()


@PASSES
def test_nan_at_dead_places_reaches_nothing(shape: AttentionShape) -> None:
    shape = shape._replace(batch=5)
    clean, poisoned = (arguments(shape, bias=True, valid=True, poison=p) for p in (False, True))
    assert_same(run(poisoned), run(clean))
    assert_like_reference(run(clean), clean)
    received, output, lse = FORWARD(*clean, None)
    dead = ~(clean[4] & clean[5].any(1, keepdim=True))
    grads = gradients_for(received, output)
    bad = grads[0].masked_fill(~clean[5], torch.nan), grads[1].masked_fill(dead[:, None, :, None], torch.nan)
    want = BACKWARD(*grads, *clean, output, lse, None, ALL)
    assert_same(BACKWARD(*bad, *clean, output, lse, None, ALL), want)


@PASSES
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # NumPy's, under the interpreter
@pytest.mark.parametrize("which", [0, 1], ids=["query", "key"])
def test_nan_at_a_valid_position_shows_in_its_sample_alone(shape: AttentionShape, which: int) -> None:
    """And there not at what is invalid: query 3 and key 4."""
    args = arguments(shape)
    args[4] = torch.arange(shape.queries, device=DEVICE).ne(3).expand(3, -1)
    args[5] = torch.arange(shape.keys, device=DEVICE).ne(4).expand(3, -1)
    args[which][1, 0, 2, 0] = torch.nan
    received, output, lse, *grads = run(args)
    seen = args[5][1]
    assert received[1, seen].isnan().all()
    assert output[1, 0, 2].isnan().all()
    assert lse[1, 0, 2].isnan()
    assert all(g[1].isnan().any() for g in grads[:3])
    assert lse[1, 0, 3] == torch.inf
    for hidden in (
        received[1, 4],
        output[1, 0, 3],
        grads[0][1, 0, 3],
        grads[1][1, 0, 4],
        grads[2][1, 0, 4],
        grads[3][1, 4],
    ):
        assert hidden.eq(0).all()
    for t in (received, output, *grads):
        assert t[[0, 2]].isfinite().all()
