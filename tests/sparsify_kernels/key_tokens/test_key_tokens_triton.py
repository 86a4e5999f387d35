"""key_tokens and gather_tokens in Triton against the reference: the same index and bytes, without a word from PyTorch.

On a GPU, or under Triton's interpreter on the CPU.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_kernels import _registry
from sparsify_kernels._checks import InvalidValue
from sparsify_kernels.key_tokens import reference
from sparsify_kernels.testing import (
    LAYOUTS,
    SCORE_KINDS,
    KeyShape,
    RecordedOps,
    assert_accurate,
    assert_same,
    guarded,
    guarded_memory,
    poisoned_memory,
    relayout,
    score_inputs,
)

pytest.importorskip("triton", reason="Triton is not installed: its kernels were not tested")
from sparsify_kernels.key_tokens import triton as kernels

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # of NumPy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PAYLOADS = (torch.uint8, torch.bool, torch.int64, torch.bfloat16, torch.float8_e5m2, torch.float32, torch.complex128)
# One, around a block of 64 and a part (256 under the interpreter, 2,048 on a GPU), primes, the benchmarks'.
TOKENS = (1, 2, 3, 4, 5, 17, 63, 64, 65, 127, 256, 257, 640, 2049)
FENCES = (0.0, 0.1, 1 / 3, 1.5, 30.0)


def run(name: str, *args: Any) -> Any:
    """Triton's kernel, with every tensor on its device and the results on the CPU."""
    implementation = _registry.implementations(name)["triton"]
    out = implementation(*(a.to(DEVICE) if isinstance(a, Tensor) else a for a in args))
    return tuple(t.cpu() for t in out) if isinstance(out, tuple) else out.cpu()


@pytest.fixture
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "check_values", lambda device: False)


@pytest.fixture
def _checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "check_values", lambda device: True)


def test_triton_serves_every_kernel() -> None:
    for kernel in _registry.kernels_of("key_tokens"):
        assert "triton" in _registry.implementations(kernel)


@pytest.mark.parametrize("kind", SCORE_KINDS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_same_keys_as_the_reference(tokens: int, kind: str) -> None:
    turn = TOKENS.index(tokens) + SCORE_KINDS.index(kind)
    cases = [
        (False, FENCES[turn % 5], (None, 1)[turn // 3 % 2]),
        (True, FENCES[(turn + 2) % 5], (1 + tokens // 8, None)[turn % 2]),
    ]
    for valid, fence, capacity in cases:
        inputs = score_inputs(KeyShape(5, tokens), kind, valid=valid, poison=True, seed=tokens)
        expected = reference.key_tokens(*inputs.values(), fence, capacity)
        with poisoned_memory(), guarded_memory():
            ours = run("key_tokens", *inputs.values(), fence, capacity)
        assert_same(ours, expected, f"fence {fence}, capacity {capacity}, valid {valid}")


@pytest.mark.parametrize("samples", [0, 1, 9])
@pytest.mark.parametrize("tokens", [0, 20])
def test_any_number_of_samples(samples: int, tokens: int) -> None:
    scores = torch.rand(samples, tokens)
    assert_same(run("key_tokens", scores, None, 0.0, None), reference.key_tokens(scores, None, 0.0, None))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_in_any_layout(dtype: torch.dtype, layout: str) -> None:
    inputs = score_inputs(KeyShape(3, 67), "wide", dtype, valid=True, poison=True, layout=layout)
    expected = reference.key_tokens(*inputs.values(), 0.1, None)
    assert_same(run("key_tokens", *inputs.values(), 0.1, None), expected)


def test_scores_expanded_over_the_batch() -> None:
    scores = torch.rand(1, 40).expand(3, 40)
    valid = torch.rand(1, 40).expand(3, 40) < 0.5
    assert_same(run("key_tokens", scores, valid, 0.1, None), reference.key_tokens(scores, valid, 0.1, None))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_bit_patterns_of_half_precision_rank_as_in_the_reference(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    scores = bits[torch.randperm(2**16)].view(dtype).view(8, 8192)
    there = ~scores.isnan()
    assert_same(run("key_tokens", scores, there, 0.5, None), reference.key_tokens(scores, there, 0.5, None))


@pytest.mark.parametrize("tokens", [16384, 16385])  # the most of which one program finds the keys, and one more
def test_many_tokens(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    slower = []
    real = reference.key_tokens
    monkeypatch.setattr(reference, "key_tokens", lambda *args: slower.append(1) or real(*args))
    for kind in ("distinct", "ties"):
        scores = score_inputs(KeyShape(1, tokens), kind)["scores"]
        assert_same(run("key_tokens", scores, None, 0.1, None), real(scores, None, 0.1, None))
    assert bool(slower) == (tokens > 16384)


@pytest.mark.parametrize("fence", [0.0, 1e-300, 0.5, 1e300])
def test_infinities_zeros_and_subnormals(fence: float) -> None:
    g = torch.Generator().manual_seed(3)
    table = torch.tensor([-math.inf, -1.0, -1e-45, -0.0, 0.0, 1e-45, 3e-45, 1.0, 3.4e38, math.inf])
    for tokens in (2, 3, 6, 29):
        scores = table[torch.randint(0, len(table), (16, tokens), generator=g)]
        expected = reference.key_tokens(scores, None, fence, None)
        assert_same(run("key_tokens", scores, None, fence, None), expected, f"N {tokens}")


def test_the_threshold_is_computed_in_fp64() -> None:
    # Q1 = 0.26, Q3 = 0.66: the fp64 threshold is 1.26000008; in fp32 it would be 1.26, a score.
    scores = torch.tensor([[0, 0.1, 0.26, 0.3, 0.4, 0.5, 0.66, 1.26, 9]])
    assert run("key_tokens", scores, None, 1.5, None)[0].tolist() == [[8, -1, -1]]
    # With Q1 = 0 and Q3 = 3 a fence of (t - 3) / 3 is reached by t; one of the next number of fp32 is not.
    for score in torch.linspace(3.1, 4.0, 20).tolist():
        fence = (score - 3) / 3
        narrow = torch.tensor(fence).item()
        if 3 + 3 * fence <= score < 3 + 3 * narrow:
            break
    else:
        raise AssertionError("no score tells the two fences apart")
    scores = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.5, 2.0, 3.0, score, score]])
    assert run("key_tokens", scores, None, fence, None)[1].tolist() == [2]
    assert run("key_tokens", scores, None, narrow, None)[1].tolist() == [1]


def test_half_way_is_computed_from_the_upper_neighbour() -> None:
    # Between numbers so far apart that their difference is rounded the two ways differ by a step, which decides where
    # the fence puts the threshold beside a score.
    g = torch.Generator().manual_seed(0)
    cases = 0
    while cases < 6:
        low, high, top = (
            torch.rand(3, generator=g) * torch.tensor([1e-9, 1.0, 0.0]) + torch.tensor([0, 1, 3])
        ).tolist()
        upper, lower = high - 0.5 * (high - low), low + 0.5 * (high - low)
        fence = (top - upper) / upper
        reached = upper + fence * upper <= top
        if reached == (lower + fence * lower <= top):
            continue
        scores = torch.tensor([[0.0] * 7 + [low, high, top, top]])
        assert run("key_tokens", scores, None, fence, None)[1].item() == (2 if reached else 1)
        cases += 1


def test_the_product_with_the_fence_is_rounded_before_it_is_added() -> None:
    # With Q3 = -m and fence m / spread the threshold is 0, or what rounding m / spread has left, if nothing rounds the
    # product: then a score of 0, or one a little below, is on the other side.
    g = torch.Generator().manual_seed(0)
    cases = 0
    while cases < 12:
        m, spread = torch.randint(1, 2**20, (2,), generator=g).tolist()
        fence = m / spread
        left = Fraction(fence) * spread - m
        if fence * spread != m or left == 0:
            continue
        border = 0.0 if left > 0 else -(2.0**-100)
        scores = torch.tensor([[-m - spread] * 3 + [-m] * 4 + [border, 1.0]])
        keys = run("key_tokens", scores, None, fence, None)
        assert keys[1].item() == (2 if left > 0 else 1)
        assert_same(keys, reference.key_tokens(scores, None, fence, None))
        cases += 1


SCRIPT = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparsify_kernels.key_tokens.triton import TARGETS
kernel, types, constants, warps = next(case for case in TARGETS if case[0].__name__ == "_pick")
run_time = [name for name in kernel.arg_names if name not in constants]
signature = dict.fromkeys(kernel.arg_names, "constexpr")
signature |= dict(zip(run_time, types.split(), strict=True))
source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()})
for options in json.loads(sys.argv[1]):
    options["num_warps"] = warps
    cuda = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    hip = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options=options).asm["amdgcn"]
    print(cuda.count("fma.rn.f64"), hip.count("v_fma_f64") + hip.count("v_fmac_f64"))
"""


def test_the_compiled_kernel_fuses_no_multiply_add(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The interpreter never does, so this reads the assembly: with the option that the launch passes, and without."""
    passed: dict[str, Any] = {}

    class Launch:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: passed.update(kwargs)

    monkeypatch.setattr(kernels, "_pick", Launch())
    kernels.key_tokens(torch.rand(1, 5), None, 0.0, None)
    option = {"enable_fp_fusion": passed["enable_fp_fusion"]}
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, json.dumps([option, {}])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    ours, default = ([int(n) for n in line.split()] for line in done.stdout.splitlines())
    assert ours == [0, 0]
    assert min(default) > 0  # or nothing was looked for


def test_nothing_outside_the_scores_is_read() -> None:
    for tokens in (1, 19, 64):
        scores, valid = guarded(torch.rand(2, tokens).to(DEVICE)), guarded(torch.rand(2, tokens).to(DEVICE) < 0.7)
        expected = reference.key_tokens(scores.tensor.cpu().clone(), valid.tensor.cpu().clone(), 0.0, None)
        assert_same(run("key_tokens", scores.tensor, valid.tensor, 0.0, None), expected)
        scores.check()


def test_offsets_beyond_two_to_the_31() -> None:
    if DEVICE == "cuda":
        pytest.skip("the memory of a GPU is not taken lazily")
    scores = torch.empty(2**31 + 2**29, dtype=torch.int16).view(torch.bfloat16)  # untouched pages cost nothing
    scores = scores.as_strided((2, 6), (2**31, 2**26))
    scores.copy_(torch.rand(2, 6))
    expected = reference.key_tokens(scores.contiguous(), None, 0.1, None)
    assert_same(run("key_tokens", scores, None, 0.1, None), expected)
    x = torch.empty(2**32, dtype=torch.uint8).as_strided((2, 4, 8), (2**31, 2**29, 1))
    x.copy_(torch.randint(0, 256, (2, 4, 8)))
    index = torch.tensor([[3, 0], [1, 3]])
    assert_same(run("key_tokens_gather", x, index), reference.key_tokens_gather(x.contiguous(), index))


@pytest.mark.usefixtures("_checked")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_nan_is_the_one_complained_of(dtype: torch.dtype) -> None:
    scores = torch.rand(3, 41).to(dtype)
    valid = torch.ones(3, 41, dtype=torch.bool)
    scores[0, 5], valid[0, 5] = math.nan, False
    run("key_tokens", scores, valid, 0.0, None)
    scores[1, 40] = scores[2, 3] = -math.nan
    with pytest.raises(
        InvalidValue, match=r"^key_tokens: scores must not be NaN at valid tokens, got NaN at \[1, 40\]$"
    ):
        run("key_tokens", scores, valid, 0.0, None)
    with pytest.raises(InvalidValue, match=r"got NaN at \[0, 5\]$"):
        run("key_tokens", scores, None, 0.0, None)


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("dtype", DTYPES)
def test_unchecked_nan_scores_count_as_minus_infinity(dtype: torch.dtype) -> None:
    scores = torch.rand(3, 20)
    scores[1:] = torch.where(scores[1:] < 0.5, -math.nan, scores[1:])
    scores[2, :18] = math.nan
    scores = torch.cat((scores, torch.full((1, 20), math.nan))).to(dtype)
    want = reference.key_tokens(torch.where(scores.isnan(), -math.inf, scores), None, 0.2, None)
    assert_same(run("key_tokens", scores, None, 0.2, None), want)


@pytest.mark.parametrize("dtype", PAYLOADS)
def test_gather_moves_the_bytes_of_any_dtype(dtype: torch.dtype) -> None:
    index = torch.randint(-1, 9, (3, 23))
    for inner in ((), (1,), (37,), (2, 3)):
        x = torch.randint(0, 2, (3, 9, *inner)).to(dtype)
        for layout in LAYOUTS:
            placed = x if x.dtype.itemsize == 1 else relayout(x, layout)
            with poisoned_memory(), guarded_memory():
                ours = run("key_tokens_gather", placed, relayout(index, layout))
            assert ours.dtype == dtype
            assert_same(ours.view(torch.uint8), reference.key_tokens_gather(x, index).view(torch.uint8))


def test_gather_of_blocks_of_values_and_of_nothing() -> None:
    x = torch.randn(2, 3, 2049)
    index = torch.tensor([[2, -1], [0, 1]])
    assert_same(run("key_tokens_gather", x, index), reference.key_tokens_gather(x, index))
    for shape, slots in (((0, 3, 2), 4), ((2, 0, 2), 3), ((2, 3, 0), 4), ((2, 3, 2), 0)):
        x, index = torch.zeros(shape), torch.full((shape[0], slots), -1)
        assert_same(run("key_tokens_gather", x, index), reference.key_tokens_gather(x, index))
        grad = torch.ones(shape[0], slots, shape[2])
        expected = reference.key_tokens_gather_backward(grad, index, shape[1])
        assert_same(run("key_tokens_gather_backward", grad, index, shape[1]), expected)


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.complex64])
def test_gather_unchecked_bad_index(dtype: torch.dtype) -> None:
    index = torch.tensor([[0, 3, -2, -1], [1, 2**62, 2, -(2**62)]])  # times four, the large ones are 0
    x = torch.randn(2, 3, 2).to(dtype)
    assert_same(run("key_tokens_gather", x, index), reference.key_tokens_gather(x, index))
    grad = torch.randn(2, 4, 2)
    assert_same(run("key_tokens_gather_backward", grad, index, 3), reference.key_tokens_gather_backward(grad, index, 3))


@pytest.mark.usefixtures("_checked")
def test_gather_complains_of_a_bad_index() -> None:
    with pytest.raises(InvalidValue, match=r"^gather_tokens: index must be in \[-1, 3\), got 3 at \[1, 0\]$"):
        run("key_tokens_gather", torch.zeros(2, 3), torch.tensor([[2, -1], [3, 0]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_backward(dtype: torch.dtype) -> None:
    index = torch.randint(-1, 4, (2, 18))
    index[1] = 2  # all slots of a sample to one token
    for inner in ((), (37,), (2, 3)):
        grad = torch.randn(2, 18, *inner).to(dtype)
        truth = reference.key_tokens_gather_backward(grad.double(), index, 5)
        eager = reference.key_tokens_gather_backward(grad, index, 5)
        first = run("key_tokens_gather_backward", grad, index, 5)
        assert first.dtype == dtype
        for layout in LAYOUTS:
            with poisoned_memory(), guarded_memory():
                ours = run("key_tokens_gather_backward", relayout(grad, layout), relayout(index, layout), 5)
            assert_accurate(ours, eager=eager, truth=truth)
            assert_same(ours, first)


def test_gather_backward_leaves_out_what_no_token_was_gathered_to() -> None:
    """NaN at -1, and in the slots of another token."""
    grad = torch.tensor([[1.0, math.nan, 2.0, math.inf, 5.0]])
    index = torch.tensor([[2, -1, 2, 0, 1]])
    assert run("key_tokens_gather_backward", grad, index, 3).tolist() == [[math.inf, 5, 3]]


def test_the_gradient_of_a_complex_payload_keeps_its_imaginary_part() -> None:
    grad = torch.tensor([[1 + 2j, 3 - 4j, 5j]])
    index = torch.tensor([[1, 1, -1]])
    assert run("key_tokens_gather_backward", grad, index, 3).tolist() == [[0, 4 - 2j, 0]]
    assert run("key_tokens_gather_backward", grad.conj(), index, 3).tolist() == [[0, 4 + 2j, 0]]


def test_results_repeat_bit_for_bit() -> None:
    scores, grad, index = torch.rand(3, 100), torch.randn(2, 30, 5), torch.randint(0, 3, (2, 30))
    assert_same(run("key_tokens", scores, None, 0.1, None), run("key_tokens", scores, None, 0.1, None))
    first, again = (run("key_tokens_gather_backward", grad, index, 3) for _ in range(2))
    assert_same(first, again)


# What allocates or describes memory, and how the interpreter moves its arguments.
QUIET = {
    f"aten::{name}"
    for name in ("new_empty", "view", "alias", "detach", "unsqueeze", "view_as_real", "set_", "empty", "copy_")
}


@pytest.mark.usefixtures("_unchecked")
def test_pytorch_only_allocates() -> None:
    valid, index = torch.ones(2, 9, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.int64)
    with RecordedOps() as trace:
        kernels.key_tokens(torch.rand(2, 9).to(DEVICE), valid.to(DEVICE), 0.1, 2)
        for shape in ((2, 9), (2, 9, 4), (2, 9, 3, 2)):
            kernels.key_tokens_gather(torch.rand(shape, device=DEVICE), index.to(DEVICE))
            grad = torch.rand(2, 3, *shape[2:], device=DEVICE)
            kernels.key_tokens_gather_backward(grad, index.to(DEVICE), 9)
    assert set(trace.names) - QUIET == {"aten::rand"}
    with RecordedOps() as trace:
        reference.key_tokens(torch.rand(2, 9), None, 0.1, 2)
    assert "aten::sort" in trace.names  # or nothing was recorded
