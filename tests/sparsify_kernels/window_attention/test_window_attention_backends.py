"""Every fast backend of window_attention against what PyTorch computes, on sizes around vectors, tiles, slabs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_kernels import Windows, _registry, backend_info
from sparsify_kernels.testing import (
    LAYOUTS,
    WINDOW_SHAPES,
    WindowShape,
    assert_accurate,
    assert_same,
    guarded,
    poisoned_memory,
    relayout,
    window_attention_eager,
    window_inputs,
)
from sparsify_kernels.window_attention import reference

FORWARD = _registry.implementations("window_attention")
BACKWARD = _registry.implementations("window_attention_backward")
pytestmark = pytest.mark.skipif("cpp" not in FORWARD, reason="the C++ extension is not built")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ALL = [True, True, True]
FORMS = [
    pytest.param({}, id="plain"),
    pytest.param({"scale": True, "region": True}, id="scale, regions"),
    pytest.param({"cosine": True}, id="cosine"),
    pytest.param({"cosine": True, "scale": True, "region": True}, id="cosine, scale, regions"),
]
EVERYTHING = {"cosine": True, "scale": True, "region": True}

# Widths 8 to 64, odd ones; tokens around vectors of 4, 8 and 16, a tile of 24 (forward) and 48 (backward); 64 places
# and more.
SHAPES = (
    *(s for s in WINDOW_SHAPES if s.tokens),
    WindowShape(15, 1, 4, 5, 2, 16),
    WindowShape(16, 1, 4, 4, 1, 32),
    WindowShape(33, 1, 8, 8, 1, 64),
    WindowShape(97, 3, 7, 9, 2, 24),
    WindowShape(49, 2, 5, 13, 1, 8),
    WindowShape(150, 1, 12, 13, 1, 17),
    WindowShape(200, 1, 24, 24, 1, 8),
    WindowShape(60, 60, 8, 8, 1, 16),
)
# Two slabs and a bit: 16 windows and 512 tokens make one.
SLABS = WindowShape(1100, 37, 8, 8, 2, 8)


@pytest.fixture
def one_thread_then_two() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield lambda function: [(torch.set_num_threads(n), function())[1] for n in (1, 2)]
    torch.set_num_threads(before)


def operands(inputs: dict[str, Any]) -> list[Any]:
    return [inputs["qkv"], inputs["bias"], inputs["scale"], *inputs["windows"]]


def slope(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A gradient that differs everywhere."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def run(inputs: dict[str, Any], backend: str = "cpp", layout: str = "contiguous") -> dict[str, Tensor]:
    """Results and gradients of the kernels of ``backend``."""
    args, cosine = operands(inputs), inputs["cosine"]
    with poisoned_memory():
        output, lse = FORWARD[backend](*args, cosine)
        grad = relayout(slope(output.shape, output.dtype), layout)
        grads = BACKWARD[backend](grad, *args, lse, cosine, ALL)
    return dict(zip(("output", "lse", "dqkv", "dbias", "dscale"), (output, lse, *grads), strict=True))


def eager(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same from ordinary operations in ``dtype``, differentiated by autograd."""
    leaves = {n: t.to(dtype).requires_grad_() for n, t in inputs.items() if isinstance(t, Tensor)}
    output = window_attention_eager(**{**inputs, **leaves})
    grads = torch.autograd.grad(
        output, list(leaves.values()), slope(output.shape, inputs["qkv"].dtype).to(dtype), allow_unused=True
    )
    return {"output": output.detach(), **dict(zip([f"d{n}" for n in leaves], grads, strict=True))}


def drawn(shape: WindowShape, dtype: torch.dtype, form: dict[str, bool], seeds: range) -> dict[str, list[Tensor]]:
    """Ours, PyTorch's in ``dtype`` and in fp64 by name, each over several draws at once."""
    found: dict[str, list[list[Tensor]]] = defaultdict(lambda: [[], [], []])
    for seed in seeds:
        inputs = window_inputs(shape, dtype, **form, seed=seed)
        ours, plain, truth = run(inputs), eager(inputs, dtype), eager(inputs, torch.float64)
        for name in truth:
            for results, kept in zip((ours, plain, truth), found[name], strict=True):
                kept.append(results[name])
    return {name: [torch.stack(each) for each in three] for name, three in found.items()}


def assert_as_accurate(shape: WindowShape, dtype: torch.dtype, form: dict[str, bool]) -> None:
    """A few numbers the eager form may hit by chance: what fails is judged again by more draws."""
    for name, (ours, plain, truth) in drawn(shape, dtype, form, range(2)).items():
        if dtype == torch.float64:  # here the truth is no truer than we are: gradcheck is the judge
            torch.testing.assert_close(ours, truth, msg=lambda text, name=name: f"{name}: {text}")
            continue
        try:
            assert_accurate(ours, eager=plain, truth=truth, what=name)
        except AssertionError:
            ours, plain, truth = drawn(shape, dtype, form, range(2, 12))[name]
            assert_accurate(ours, eager=plain, truth=truth, what=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, SLABS], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_results_and_gradients_are_as_accurate_as_asked(
    shape: WindowShape, dtype: torch.dtype, form: dict[str, bool]
) -> None:
    assert_as_accurate(shape, dtype, form)


@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_the_lesser_instruction_sets_are_as_accurate(isa: str) -> None:
    if backend_info()["isa"] in ("base", isa) or "SPARSIFY_ISA" in os.environ:
        pytest.skip(f"{isa} is what the other tests ran on, or more than this machine has")
    chosen = "as_accurate_as_asked or every_half or rounds or other_windows or log_sum_exp"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__)), "-k", chosen],
        env=os.environ | {"SPARSIFY_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[3],
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_log_sum_exp_is_the_references(dtype: torch.dtype, form: dict[str, bool]) -> None:
    """And the logarithm of 1 is 0."""
    for shape in (WindowShape(97, 3, 7, 9, 2, 24), WindowShape(300, 1, 24, 24, 1, 8), WindowShape(5, 90, 2, 2, 1, 3)):
        args = operands(inputs := window_inputs(shape, dtype, **form))
        got = FORWARD["cpp"](*args, inputs["cosine"])[1]
        torch.testing.assert_close(got, reference.window_attention(*args, inputs["cosine"])[1])
    zeros = (torch.zeros(1, 3, 1, 1, dtype=dtype), torch.zeros(1, 1, 1, dtype=dtype), None, *one_window(1))
    assert FORWARD["cpp"](*zeros, False)[1].item() == 0


def one_window(tokens: int, windows: int = 1) -> Windows:
    """``windows`` windows of as many places as tokens, none missing."""
    start = torch.arange(windows + 1) * tokens
    return Windows(torch.arange(windows * tokens), start, torch.arange(tokens).repeat(windows), None)


@pytest.mark.parametrize("tokens", [16, 40, 64])
def test_whole_windows_in_order(tokens: int) -> None:
    """Token i at place i, none missing: the bias is read, not gathered; two heads, several windows."""
    g = torch.Generator().manual_seed(0)
    form = {"scale": None, "cosine": False}
    qkv = torch.randn(3 * tokens, 3, 2, 16, generator=g)
    bias = torch.randn(2, 2 * (tokens // 8) - 1, 15, generator=g)
    inputs = {"qkv": qkv, "bias": bias, "windows": one_window(tokens, 3), **form}
    ours, plain, truth = run(inputs), eager(inputs, torch.float32), eager(inputs, torch.float64)
    for name in truth:
        assert_accurate(ours[name], eager=plain[name], truth=truth[name], what=name)
    moved = inputs["windows"]._replace(place=inputs["windows"].place.flip(0))
    region = torch.arange(3 * tokens) % 3
    for windows in (moved, inputs["windows"]._replace(region=region)):
        changed = {**inputs, "windows": windows}
        assert_accurate(
            run(changed)["output"],
            eager=eager(changed, torch.float32)["output"],
            truth=eager(changed, torch.float64)["output"],
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layout_changes_nothing(dtype: torch.dtype, layout: str) -> None:
    shape = WindowShape(97, 3, 7, 9, 2, 24)
    flat, other = (window_inputs(shape, dtype, **EVERYTHING, layout=x) for x in ("contiguous", layout))
    assert_same(tuple(run(other, layout=layout).values()), tuple(run(flat).values()))


def test_parts_of_a_projection_and_expanded_gradients() -> None:
    """Queries, keys and values of a head next to each other; one gradient for everything; one row for every token."""
    inputs = window_inputs(WindowShape(97, 3, 7, 9, 2, 24), **EVERYTHING)
    wide = torch.randn(97, 2, 3, 24)
    strided = {**inputs, "qkv": wide.transpose(1, 2)}
    plain = {**inputs, "qkv": wide.transpose(1, 2).contiguous()}
    assert_same(tuple(run(strided).values()), tuple(run(plain).values()))
    same = {**inputs, "qkv": inputs["qkv"][:1].expand(97, -1, -1, -1)}
    assert_same(tuple(run(same).values()), tuple(run({**same, "qkv": same["qkv"].contiguous()}).values()))
    args, lse = operands(inputs), run(inputs)["lse"]
    one = torch.ones(()).expand(97, 2, 24)
    assert_same(BACKWARD["cpp"](one, *args, lse, True, ALL), BACKWARD["cpp"](one.contiguous(), *args, lse, True, ALL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [WindowShape(97, 3, 7, 9, 2, 24), WindowShape(90, 1, 9, 11, 1, 7)], ids=str)
def test_nothing_outside_the_inputs_is_read(shape: WindowShape, dtype: torch.dtype) -> None:
    inputs = window_inputs(shape, dtype, **EVERYTHING)
    around = {n: guarded(t).tensor if isinstance(t, Tensor) else t for n, t in inputs.items()}
    around["windows"] = Windows(*(guarded(t).tensor for t in inputs["windows"]))
    assert_same(tuple(run(around).values()), tuple(run(inputs).values()))


def test_offsets_beyond_two_to_the_31() -> None:
    buffer = torch.empty(2**31 + 4096, dtype=torch.float16)  # untouched pages cost nothing
    near = window_inputs(WindowShape(2, 1, 2, 2, 2, 16), torch.float16)
    far = buffer.as_strided(near["qkv"].shape, (2**31, 32, 16, 1)).copy_(near["qkv"])
    assert_same(tuple(run({**near, "qkv": far}).values()), tuple(run(near).values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [16, 5])
def test_every_half_goes_in_and_out_unchanged(dtype: torch.dtype, width: int) -> None:
    """A token alone: its output is its value, subnormals, infinities and NaN included."""
    v = torch.arange(2**16 - 2**16 % width, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1, width)
    qkv = torch.stack((torch.zeros_like(v), torch.zeros_like(v), v), 1)
    windows = one_window(1, len(v))
    assert_same(FORWARD["cpp"](qkv, torch.zeros(1, 1, 1), None, *windows, False)[0], v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [16, 5])
def test_halves_round_to_the_nearest_even(dtype: torch.dtype, width: int) -> None:
    """Two tokens share the attention: the output is the rounded mean of neighbours, of which half are ties."""
    bits = torch.arange(0, 2**15 - 3, dtype=torch.int16)
    a, b = bits.view(dtype), (bits + 1 + bits % 3).view(dtype)
    fits = a.isfinite() & b.isfinite()
    count = int(fits.sum()) // width * width
    v = torch.stack((a[fits][:count], b[fits][:count])).view(2, -1, width).transpose(0, 1).reshape(-1, 1, width)
    qkv = torch.stack((torch.zeros_like(v), torch.zeros_like(v), v), 1)
    windows = one_window(2, len(v) // 2)
    got = FORWARD["cpp"](qkv, torch.zeros(1, 1, 3), None, *windows, False)[0]
    assert_same(got[::2], v.view(-1, 2, 1, width).float().mean(1).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(dtype: torch.dtype, one_thread_then_two: Any) -> None:
    inputs = window_inputs(WindowShape(2200, 50, 8, 8, 3, 32), dtype, **EVERYTHING)
    one, two = one_thread_then_two(lambda: tuple(run(inputs).values()))
    assert_same(one, two)


@pytest.mark.parametrize("form", FORMS)
def test_other_windows_change_no_bit(form: dict[str, bool]) -> None:
    """Output, log-sum-exp and gradient of a window's tokens are the same without the other windows."""
    inputs = window_inputs(WindowShape(97, 4, 7, 9, 2, 24), **form)
    member, start, place, region = inputs["windows"]
    together = run(inputs)
    grad = slope(together["output"].shape, torch.float32)
    for begin, end in zip(start.tolist(), start[1:].tolist(), strict=False):
        own, count = slice(begin, end), end - begin
        rows = member[own]
        alone = Windows(
            torch.arange(count), torch.tensor([0, count]), place[own], None if region is None else region[own]
        )
        args = (inputs["qkv"][rows].clone(), inputs["bias"], inputs["scale"], *alone)
        output, lse = FORWARD["cpp"](*args, inputs["cosine"])
        assert_same((output, lse), (together["output"][rows], together["lse"][rows]))
        got = BACKWARD["cpp"](grad[rows], *args, lse, inputs["cosine"], ALL)
        assert_same(got[0], together["dqkv"][rows])


@pytest.mark.parametrize(
    "wanted", [[i == only for i in range(3)] for only in range(3)] + [[True, False, True]], ids=str
)
@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
def test_a_gradient_wanted_alone_is_the_same(wanted: list[bool], cosine: bool) -> None:
    inputs = window_inputs(SLABS, scale=True, region=True, cosine=cosine)
    args, whole = operands(inputs), run(inputs)
    with poisoned_memory():
        grads = BACKWARD["cpp"](slope(whole["output"].shape, torch.float32), *args, whole["lse"], cosine, wanted)
    for name, grad, want in zip(("dqkv", "dbias", "dscale"), grads, wanted, strict=True):
        assert_same(grad, whole[name] if want else whole[name].new_empty(0))


def test_a_nan_stays_in_its_window() -> None:
    inputs = window_inputs(WindowShape(97, 4, 7, 9, 2, 24), **EVERYTHING)
    member, start = inputs["windows"].member, inputs["windows"].start
    clean = run(inputs)
    for part in range(3):
        qkv = inputs["qkv"].clone()
        qkv[member[start[1]], part, 1, 5] = torch.nan
        got = run({**inputs, "qkv": qkv})
        others = torch.cat((member[: start[1]], member[start[2] :]))
        for name in ("output", "lse", "dqkv"):
            assert_same(got[name][others], clean[name][others])
            assert_same(
                got[name].select(-2 if name != "lse" else -1, 0), clean[name].select(-2 if name != "lse" else -1, 0)
            )
        assert got["output"][member[start[1]], 1].isnan().any()
        assert got["lse"][member[start[1]], 1].isnan() == (part < 2)
        assert got["dqkv"][member[start[1]], :, 1].isnan().any()


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 3), (12, 12), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_pair_adds_to_the_gradient_of_its_own_difference(height: int, width: int, dtype: torch.dtype) -> None:
    """Two tokens at any two places: equal probabilities, gradients of the logits 1 and -1 for the first token."""
    places = height * width
    first, second = torch.randint(0, places, (2, 40), generator=torch.Generator().manual_seed(0))
    for one, other in zip(first.tolist(), second.tolist(), strict=True):
        if one == other:
            continue
        qkv = torch.zeros(2, 3, 1, 1, dtype=dtype)
        qkv[0, 2] = 4
        windows = Windows(torch.arange(2), torch.tensor([0, 2]), torch.tensor([one, other]), None)
        bias = torch.zeros(1, 2 * height - 1, 2 * width - 1, dtype=dtype)
        lse = FORWARD["cpp"](qkv, bias, None, *windows, False)[1]
        grad = torch.tensor([1.0, 0.0], dtype=dtype).view(2, 1, 1)
        dbias = BACKWARD["cpp"](grad, qkv, bias, None, *windows, lse, False, ALL)[1]
        want = torch.zeros_like(bias)
        want[0, height - 1, width - 1] = 1
        want[0, one // width - other // width + height - 1, one % width - other % width + width - 1] = -1
        torch.testing.assert_close(dbias, want)


@pytest.mark.parametrize("tokens", [8, 40, 64, 130])
def test_the_largest_logit_is_found_wherever_it_is(tokens: int) -> None:
    """Keys far below one of them, whose value is the output; each in turn."""
    qkv = torch.zeros(tokens, 3, 1, 1)
    qkv[:, 0], qkv[:, 2, 0, 0] = 1, torch.arange(tokens) + 1.0
    bias = torch.zeros(1, 1, 2 * tokens - 1)
    for j in range(tokens):
        qkv[:, 1] = -1000
        qkv[j, 1] = 1000
        output, lse = FORWARD["cpp"](qkv, bias, None, *one_window(tokens), False)
        assert (output == j + 1).all()
        assert (lse == 1000).all()


def test_no_tokens() -> None:
    args = operands(window_inputs(WindowShape(0, 3, 2, 2, 2, 4), **EVERYTHING))
    output, lse = FORWARD["cpp"](*args, True)
    assert (output.shape, lse.shape) == ((0, 2, 4), (0, 2))
    with poisoned_memory():
        dqkv, dbias, dscale = BACKWARD["cpp"](output, *args, lse, True, ALL)
    assert dqkv.shape == (0, 3, 2, 4)
    assert not dbias.any()
    assert not dscale.any()


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("start", [0, 9, 5], "start must rise from 0 to the 5 tokens, got [0, 9, 5]"),
        ("start", [0, 2, 4], "start must rise from 0 to the 5 tokens, got [0, 2, 4]"),
        ("start", [1, 2, 5], "start must rise from 0 to the 5 tokens, got [1, 2, 5]"),
        ("member", [0, 1, 2, 3, 3], "member must name each of 5 tokens once, got 3 at [4]"),
        ("member", [0, 1, 2, 3, 5], "member must name each of 5 tokens once, got 5 at [4]"),
        ("member", [0, 1, 2, 3, -(2**62)], f"member must name each of 5 tokens once, got {-(2**62)} at [4]"),
        ("place", [0, 1, 0, 1, 1], "place must be in [0, 4), each once a window, got 1 at [4]"),
        ("place", [0, 1, 0, 1, 2**62], f"place must be in [0, 4), each once a window, got {2**62} at [4]"),
    ],
)
def test_both_kernels_complain_in_the_words_of_the_reference(part: str, value: list[int], message: str) -> None:
    windows = Windows(torch.arange(5), torch.tensor([0, 2, 5]), torch.tensor([0, 1, 0, 1, 2]), None)
    args = (
        torch.zeros(5, 3, 1, 2),
        torch.zeros(1, 3, 3),
        None,
        *windows._replace(**{part: torch.tensor(value)}),
        False,
    )
    for backend in ("cpp", "reference"):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            FORWARD[backend](*args)
        assert str(caught.value).splitlines()[0].endswith(f"window_attention: windows.{message}")
    with pytest.raises(RuntimeError) as caught:
        BACKWARD["cpp"](torch.zeros(5, 1, 2), *args[:-1], torch.zeros(5, 1), False, ALL)
    assert f"window_attention: windows.{message}" in str(caught.value)


def test_many_windows_share_a_place_without_complaint() -> None:
    """The same place in every window, and windows that are empty between them."""
    count = 70
    start = torch.arange(count + 1).repeat_interleave(2)
    windows = Windows(torch.arange(count).flip(0), start, torch.full((count,), 3), None)
    qkv = torch.randn(count, 3, 1, 4)
    assert_same(FORWARD["cpp"](qkv, torch.zeros(1, 3, 3), None, *windows, False)[0], qkv[:, 2])
