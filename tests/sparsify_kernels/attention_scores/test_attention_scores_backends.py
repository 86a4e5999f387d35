"""Every fast backend of attention_scores against what PyTorch computes, on sizes around its blocks, tiles and slabs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_kernels import _registry, backend_info
from sparsify_kernels.attention_scores import reference
from sparsify_kernels.testing import (
    ATTENTION_SHAPES,
    LAYOUTS,
    AttentionShape,
    assert_accurate,
    assert_alone,
    assert_same,
    attention_inputs,
    attention_scores_eager,
    guarded,
    poisoned_memory,
    relayout,
)

FORWARD = _registry.implementations("attention_scores")
BACKWARD = _registry.implementations("attention_scores_backward")
NEEDS_CPP = pytest.mark.skipif("cpp" not in FORWARD, reason="the C++ extension is not built")
NEEDS_TRITON = pytest.mark.skipif("triton" not in FORWARD, reason="Triton is not installed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICE = {"cpp": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
NAMES = ("q", "k", "v", "key_bias", "query_valid", "key_valid")
ALL = [True, True, True, True]

# Widths 1 to 128, odd ones, dv != d; keys around a chunk of 64 and around vectors of 4, 8 and 16; queries around a
# block of 6, a tile of 48 and a slab of 512.
SHAPES = (
    *(s for s in ATTENTION_SHAPES if s.batch),
    AttentionShape(3, 1, 7, 15, 128, 16),
    AttentionShape(3, 2, 47, 64, 64, 64),
    AttentionShape(3, 1, 48, 63, 80, 33),
    AttentionShape(3, 1, 49, 129, 17, 48),
    AttentionShape(3, 1, 97, 67, 32, 1),
    AttentionShape(2, 1, 80, 85, 7, 0),
    AttentionShape(3, 1, 1030, 20, 16, 16),
)
# Triton: widths around a block of 16 or 32; under the interpreter tiles of 16 keys and 32 queries, up to 64 queries in
# one pass. The first four in each dtype.
TILED = (
    AttentionShape(2, 2, 9, 17, 16, 24),
    AttentionShape(1, 1, 64, 15, 9, 5),
    AttentionShape(1, 2, 65, 33, 16, 16),
    AttentionShape(1, 1, 96, 16, 33, 48),
    AttentionShape(2, 1, 1, 41, 7, 1),
    AttentionShape(1, 3, 70, 1, 1, 0),
    AttentionShape(1, 1, 66, 20, 128, 80),
)
# So many keys that a tile gets smaller.
WIDE = AttentionShape(1, 1, 50, 12000, 16, 16)


@pytest.fixture
def one_thread_then_two() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield lambda function: [(torch.set_num_threads(n), function())[1] for n in (1, 2)]
    torch.set_num_threads(before)


def weights(received: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient for each result, different everywhere, in another layout than the results."""
    g = torch.Generator().manual_seed(1)
    grads = (torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in (received, output))
    return tuple(relayout(t, "permuted") for t in grads)


def run(backend: str, inputs: dict[str, Any], scale: float | None = None) -> dict[str, Tensor]:
    """Results and gradients of the kernels of ``backend``."""
    device = DEVICE[backend]
    args = [None if inputs[n] is None else inputs[n].to(device) for n in NAMES]
    with poisoned_memory():
        received, output, lse = FORWARD[backend](*args, scale)
        wanted = [True, True, args[2] is not None, args[3] is not None]
        given = [g.to(device) for g in weights(received, output)]
        grads = BACKWARD[backend](*given, *args, output, lse, scale, wanted)
    named = {f"d{n}": g for n, g, w in zip(NAMES, grads, wanted, strict=False) if w}
    return {n: t.cpu() for n, t in {"received": received, "output": output, "lse": lse, **named}.items()}


def eager(inputs: dict[str, Any], dtype: torch.dtype, scale: float | None = None) -> dict[str, Tensor]:
    """The same from ordinary operations in ``dtype``, differentiated by autograd."""
    changed = {
        n: t.to(dtype).requires_grad_() if t is not None and t.is_floating_point() else t for n, t in inputs.items()
    }
    received, output = attention_scores_eager(**changed, scale=scale)
    results = [received] if output is None else [received, output]
    like = received.new_empty(0) if output is None else output
    accumulation = torch.float64 if inputs["q"].dtype == torch.float64 else torch.float32
    grads = weights(received.detach().to(accumulation), like.detach().to(inputs["q"].dtype))
    leaves = {n: t for n, t in changed.items() if t is not None and t.requires_grad}
    got = torch.autograd.grad(
        results, list(leaves.values()), [g.to(dtype) for g in grads[: len(results)]], allow_unused=True
    )
    found = dict(zip([f"d{n}" for n in leaves], got, strict=True))
    return {"received": received.detach(), "output": like.detach(), **found}


def assert_as_accurate(inputs: dict[str, Any], backend: str, scale: float | None = None) -> None:
    ours, plain = run(backend, inputs, scale), eager(inputs, inputs["q"].dtype, scale)
    for name, truth in eager(inputs, torch.float64, scale).items():
        got = ours[name]
        if name == "output" and inputs["v"] is None:
            assert got.shape[-1] == 0
            continue
        if got.dtype == torch.float64:  # here the truth is no truer than we are: gradcheck and the oracle judge
            torch.testing.assert_close(got, truth)
        else:
            assert_accurate(got, eager=plain[name], truth=truth, what=name)


ACCURACY = [
    *(pytest.param("cpp", s, d, marks=NEEDS_CPP) for s in SHAPES if s.keys and s.queries for d in DTYPES),
    *(pytest.param("triton", s, DTYPES[0], marks=NEEDS_TRITON) for s in TILED),
    *(pytest.param("triton", s, d, marks=NEEDS_TRITON) for s in TILED[:4] for d in DTYPES[1:3]),
]


@pytest.mark.parametrize(("backend", "shape", "dtype"), ACCURACY, ids=str)
@pytest.mark.parametrize("valid", [False, True], ids=["all", "valid"])
def test_results_and_gradients_are_as_accurate_as_asked(
    backend: str, shape: AttentionShape, dtype: torch.dtype, valid: bool
) -> None:
    if valid:  # of the first four samples each lacks something; the fifth has several valid queries and keys
        shape = shape._replace(batch=5)
    inputs = attention_inputs(shape, dtype, bias=valid, valid=valid, poison=valid)
    assert_as_accurate(inputs, backend, scale=0.4 if valid else None)


@NEEDS_CPP
def test_so_many_keys_that_a_tile_gets_smaller() -> None:
    assert_as_accurate(attention_inputs(WIDE, bias=True), "cpp")


@NEEDS_CPP
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_the_lesser_instruction_sets_are_as_accurate(isa: str) -> None:
    """AVX-512 is a lesser one for bf16 alone: its name rules out the dot products of pairs."""
    levels = ["base", "avx2", "avx512"]
    best = backend_info()["isa"]
    same = isa == best != "avx512"
    if same or levels.index(isa) > levels.index(best) or "SPARSIFY_ISA" in os.environ:
        pytest.skip(f"{isa} is what the other tests ran on, or more than this machine has")
    chosen = "not triton and (as_accurate_as_asked or tile_gets_smaller or every_half or round_to or batch_mates)"
    chosen += " and bfloat16" if isa == "avx512" else ""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__)), "-k", chosen],
        env=os.environ | {"SPARSIFY_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[3],
    )
    assert done.returncode == 0, done.stdout


@NEEDS_CPP
@pytest.mark.parametrize("valid", [False, True], ids=["all", "valid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_log_sum_exp_is_the_references(dtype: torch.dtype, valid: bool) -> None:
    inputs = attention_inputs(AttentionShape(3, 2, 50, 70, 9, 4), dtype, bias=True, valid=valid, poison=valid)
    args = [inputs[n] for n in NAMES]
    torch.testing.assert_close(FORWARD["cpp"](*args, None)[2], reference.attention_scores(*args, None)[2])


@NEEDS_CPP
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layout_changes_nothing(dtype: torch.dtype, layout: str) -> None:
    shape = AttentionShape(3, 2, 50, 70, 32, 16)
    flat, other = (attention_inputs(shape, dtype, bias=True, layout=x) for x in ("contiguous", layout))
    assert_same(tuple(run("cpp", other).values()), tuple(run("cpp", flat).values()))


@NEEDS_CPP
def test_heads_next_to_each_other_and_expanded_inputs() -> None:
    """The layout of a split projection, and one key for every sample."""
    wide = torch.randn(2, 70, 3, 16)
    q, k = wide.transpose(1, 2), wide[:1].transpose(1, 2).expand(2, 3, 70, 16)
    args = (q, k, k, None, None, None)
    plain = tuple(None if t is None else t.contiguous() for t in args)
    want, got = FORWARD["cpp"](*plain, None), FORWARD["cpp"](*args, None)
    assert_same(got, want)
    one = torch.ones(()).expand(want[0].shape), torch.ones(()).expand(want[1].shape)
    grads = BACKWARD["cpp"](*one, *args, *got[1:], None, ALL)
    assert_same(grads, BACKWARD["cpp"](*(t.contiguous() for t in one), *plain, *want[1:], None, ALL))


@NEEDS_CPP
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nothing_outside_the_inputs_is_read(dtype: torch.dtype) -> None:
    inputs = attention_inputs(AttentionShape(2, 2, 7, 19, 16, 16), dtype, bias=True, valid=True)
    around = {n: guarded(t).tensor for n, t in inputs.items()}
    assert_same(tuple(run("cpp", around).values()), tuple(run("cpp", inputs).values()))
    args = [inputs[n] for n in NAMES]
    received, output, lse = FORWARD["cpp"](*args, None)
    given = (received.sin(), output.cos(), *args, output, lse)
    placed = [guarded(t).tensor for t in given]
    assert_same(BACKWARD["cpp"](*placed, None, ALL), BACKWARD["cpp"](*given, None, ALL))


@NEEDS_CPP
def test_offsets_beyond_two_to_the_31() -> None:
    buffer = torch.empty(2**31 + 4096, dtype=torch.float16)  # untouched pages cost nothing
    near = attention_inputs(AttentionShape(2, 1, 5, 9, 16, 16), torch.float16)
    far = dict(near)
    for n in ("q", "k", "v"):
        far[n] = buffer.as_strided(near[n].shape, (2**31, 256, 16, 1), 300 * "qkv".index(n)).copy_(near[n])
    assert_same(tuple(run("cpp", far).values()), tuple(run("cpp", near).values()))


@NEEDS_CPP
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_goes_in_and_out_unchanged(dtype: torch.dtype) -> None:
    """One key has all the attention: the output is its value, subnormals, infinities and NaN included."""
    v = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, 1, -1)
    zero = torch.zeros(1, 1, 1, 1, dtype=dtype)
    assert_same(FORWARD["cpp"](zero, zero, v, None, None, None, None)[1], v)


@NEEDS_CPP
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_round_to_the_nearest_even(dtype: torch.dtype) -> None:
    """Two keys share the attention: the output is the rounded mean of neighbours, of which half are ties."""
    bits = torch.arange(0, 2**15 - 3, dtype=torch.int16)
    a, b = bits.view(dtype), (bits + 1 + bits % 3).view(dtype)
    fits = a.isfinite() & b.isfinite()
    v = torch.stack((a[fits], b[fits]))[None, None]
    zero = torch.zeros(1, 1, 2, 1, dtype=dtype)
    want = v.float().mean(2, keepdim=True).to(dtype)
    got = FORWARD["cpp"](zero[:, :, :1], zero, v, None, None, None, None)[1]
    assert_same(got, want)


@NEEDS_CPP
def test_exponential_over_its_whole_range() -> None:
    for dtype, lowest in ((torch.float32, -87.0), (torch.float64, -708.0)):
        x = torch.linspace(lowest, 0.0, 200_001, dtype=dtype).view(1, 1, -1, 1)
        received = FORWARD["cpp"](torch.ones(1, 1, 1, 1, dtype=dtype), x, None, None, None, None, 1.0)[0]
        exact = x.view(1, -1).double().exp()
        exact = exact / exact.sum()
        normal = exact > torch.finfo(dtype).tiny
        error = ((received.double() - exact) / exact)[normal].abs().max()
        assert error < 8 * torch.finfo(dtype).eps, error


@NEEDS_CPP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(dtype: torch.dtype, one_thread_then_two: Any) -> None:
    inputs = attention_inputs(AttentionShape(3, 2, 1100, 300, 32, 32), dtype, bias=True, valid=True)
    one, two = one_thread_then_two(lambda: tuple(run("cpp", inputs).values()))
    assert_same(one, two)


@NEEDS_CPP
@pytest.mark.parametrize("shape", [AttentionShape(3, 2, 1100, 70, 16, 16), AttentionShape(9, 4, 16, 64, 32, 32)])
def test_batch_mates_change_no_bit(shape: AttentionShape) -> None:
    inputs = attention_inputs(shape, bias=True, valid=True, poison=True)

    def kernels(**inputs: Any) -> tuple[Tensor, ...]:
        args = [inputs[n] for n in NAMES]
        received, output, lse = FORWARD["cpp"](*args, None)
        ones = torch.ones_like(received), torch.full_like(output, 0.5)
        return received, output, lse, *BACKWARD["cpp"](*ones, *args, output, lse, None, ALL)

    assert_alone(kernels, inputs)


# One forward and backward in a process of its own: what it took beyond inputs, outputs and gradients.
EXTRA = """
import sys, torch
from sparsify_kernels import attention_scores
from sparsify_kernels.testing import attention_scores_eager, peak_memory
torch.set_num_threads(2)
function = attention_scores_eager if sys.argv[1] == "eager" else attention_scores
def step(batch, heads, length):
    q, k, v = (torch.randn(batch, heads, length, 64, requires_grad=True) for _ in range(3))
    def run():
        received, output = function(q, k, v)
        (output.mean() + received.square().sum()).backward()
        return received, output
    return run, (q, k, v)
step(1, 1, 8)[0]()  # what is set up once
run, leaves = step(*map(int, sys.argv[2:]))
peak, results = peak_memory(run)
print(peak, peak - sum(t.nbytes for t in (*results, *(t.grad for t in leaves))))
"""


def extra_memory(who: str, *shape: int) -> tuple[int, int]:
    """Peak bytes, and those beyond outputs and gradients (the inputs are there before)."""
    done = subprocess.run(
        [sys.executable, "-c", EXTRA, who, *map(str, shape)], capture_output=True, text=True, check=True
    )
    peak, extra = map(int, done.stdout.split())
    return peak, extra


@NEEDS_CPP
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")
def test_no_matrix_of_queries_and_keys_in_memory() -> None:
    ours, eager = extra_memory("ours", 8, 12, 640)[1], extra_memory("eager", 8, 12, 640)[1]
    assert eager > 2 * 8 * 12 * 640 * 640 * 4  # the measure sees the matrices where there are some
    assert ours <= eager / 20, (ours, eager)


@pytest.mark.slow
@NEEDS_CPP
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")
def test_memory_of_very_many_tokens() -> None:
    inputs = 3 * 16384 * 64 * 4
    assert extra_memory("ours", 1, 1, 16384)[0] + inputs < 300e6


@NEEDS_CPP
@pytest.mark.parametrize("skipped", range(4))
def test_a_gradient_left_out_changes_no_other(skipped: int) -> None:
    inputs = attention_inputs(AttentionShape(2, 2, 50, 70, 16, 16), bias=True)
    args = [inputs[n] for n in NAMES]
    received, output, lse = FORWARD["cpp"](*args, None)
    grads = weights(received, output)
    whole = BACKWARD["cpp"](*grads, *args, output, lse, None, ALL)
    wanted = [i != skipped for i in range(4)]
    for i, part in enumerate(BACKWARD["cpp"](*grads, *args, output, lse, None, wanted)):
        assert_same(part, whole[i] if wanted[i] else whole[i].new_empty(0))


@NEEDS_CPP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_see_no_key_take_no_gradient(dtype: torch.dtype) -> None:
    """A sample whose biases are all -inf, between two others: gradients 0, whatever comes in."""
    inputs = attention_inputs(AttentionShape(3, 2, 50, 70, 16, 16), dtype, bias=True)
    inputs["key_bias"][1] = -torch.inf
    args = [inputs[n] for n in NAMES]
    received, output, lse = FORWARD["cpp"](*args, None)
    assert lse[1].eq(torch.inf).all()
    grads = [g.contiguous() for g in weights(received, output)]
    grads[1][1] = torch.nan
    for grad in BACKWARD["cpp"](*grads, *args, output, lse, None, ALL):
        assert grad[1].eq(0).all()
        assert grad[[0, 2]].isfinite().all()
        assert grad[[0, 2]].ne(0).any()


@NEEDS_CPP
def test_no_gradient_comes_in() -> None:
    inputs = attention_inputs(AttentionShape(2, 2, 5, 7, 4, 3), bias=True, valid=True)
    args = [inputs[n] for n in NAMES]
    _, output, lse = FORWARD["cpp"](*args, None)
    with poisoned_memory():
        assert all(g.eq(0).all() for g in BACKWARD["cpp"](None, None, *args, output, lse, None, ALL))


BAD = {
    "rank of q": {"q": torch.zeros(2, 3, 8)},
    "dtype of q": {"q": torch.zeros(2, 1, 3, 8).int(), "k": torch.zeros(2, 1, 5, 8).int(), "v": None},
    "width of k": {"k": torch.zeros(2, 1, 5, 7)},
    "dtype of k": {"k": torch.zeros(2, 1, 5, 8).half()},
    "keys of v": {"v": torch.zeros(2, 1, 4, 8)},
    "dtype of the bias": {"key_bias": torch.zeros(2, 5).double()},
    "length of the bias": {"key_bias": torch.zeros(2, 4)},
    "length of query_valid": {"query_valid": torch.ones(2, 2, dtype=torch.bool)},
    "length of key_valid": {"key_valid": torch.ones(1, 5, dtype=torch.bool)},
}


@NEEDS_CPP
@pytest.mark.parametrize("name", BAD)
def test_cpp_refuses_what_leads_out_of_bounds(name: str) -> None:
    good = {"q": torch.zeros(2, 1, 3, 8), "k": torch.zeros(2, 1, 5, 8), "v": torch.zeros(2, 1, 5, 8)}
    args = {**dict.fromkeys(NAMES), **good, **BAD[name]}
    with pytest.raises(RuntimeError, match="attention_scores: "):
        FORWARD["cpp"](*(args[n] for n in NAMES), None)


@NEEDS_CPP
@pytest.mark.parametrize("which", range(4))
def test_cpp_refuses_gradients_that_do_not_fit(which: int) -> None:
    inputs = attention_inputs(AttentionShape(2, 2, 5, 7, 4, 3), bias=True)
    args = [inputs[n] for n in NAMES]
    received, output, lse = FORWARD["cpp"](*args, None)
    good = [received, output, *args, output, lse]
    bad = {0: (0, received[:, 1:]), 1: (1, output[:, :1]), 2: (9, lse[..., 1:]), 3: (0, received.double())}[which]
    good[bad[0]] = bad[1]
    with pytest.raises(RuntimeError, match="attention_scores: "):
        BACKWARD["cpp"](*good, None, ALL)
