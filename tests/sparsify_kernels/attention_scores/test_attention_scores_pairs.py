"""attention_scores in bf16, the C++ kernels: numbers are multiplied in pairs where the machine does that. The last one
of an odd row counts, sums are of what was not rounded, and small values are not lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_kernels import _backends, _registry
from sparsify_kernels.testing import AttentionShape, assert_alone, assert_same, attention_inputs, relayout

FORWARD = _registry.implementations("attention_scores")
BACKWARD = _registry.implementations("attention_scores_backward")
NAMES = ("q", "k", "v", "key_bias", "query_valid", "key_valid")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
ALL = [True, True, True, True]
SHAPE = AttentionShape(3, 2, 50, 70, 33, 21)

pytestmark = pytest.mark.skipif("cpp" not in FORWARD, reason="the C++ extension is not built")


def run(inputs: dict[str, Any], grads: tuple[Tensor, Tensor], scale: float | None = None) -> dict[str, Tensor]:
    """Results and gradients, by name."""
    args = [inputs[n] for n in NAMES]
    received, output, lse = FORWARD["cpp"](*args, scale)
    back = BACKWARD["cpp"](*grads, *args, output, lse, scale, ALL)
    names = ("received", "output", "lse", "dq", "dk", "dv", "dkey_bias")
    return dict(zip(names, (received, output, lse, *back), strict=True))


def slopes(shape: AttentionShape, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """The gradients that come in: of received, and of the output."""
    g = torch.Generator().manual_seed(5)
    received = torch.randn(shape.batch, shape.keys, generator=g)
    return received, torch.randn(*shape[:3], shape.value_dim, generator=g).to(dtype)


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    return {n: t.float() if t is not None and t.is_floating_point() else t for n, t in inputs.items()}


def assert_near(got: Tensor, want: Tensor, bound: float, what: str) -> None:
    error = (got.double() - want.double()).abs().max() / want.double().abs().max()
    assert error <= bound, f"{what}: {error:.2e} of the largest"


@DTYPES
@pytest.mark.parametrize("dim", [1, 2, 31, 32, 33, 65])
def test_every_number_of_a_row_is_multiplied(dim: int, dtype: torch.dtype) -> None:
    """Query and key agree in one number alone, which no other key has."""
    for c in range(dim):
        q, k = torch.zeros(1, 1, 7, dim, dtype=dtype), torch.zeros(1, 1, 19, dim, dtype=dtype)
        q[..., c], k[0, 0, c % 19, c] = 100.0, 100.0
        received, _, lse = FORWARD["cpp"](q, k, None, None, None, None, 1.0)
        assert_same(received[0], torch.nn.functional.one_hot(torch.tensor(c % 19), 19).float())
        assert lse.eq(10_000).all()


@DTYPES
@pytest.mark.parametrize("keys", [1, 2, 15, 16, 17, 33, 63, 64, 65, 129])
def test_every_key_gives_its_own_value(keys: int, dtype: torch.dtype) -> None:
    """Equal probabilities, and a value that no other key has."""
    q, k = torch.zeros(1, 1, 7, 5, dtype=dtype), torch.zeros(1, 1, keys, 5, dtype=dtype)
    v = torch.eye(keys, dtype=dtype)[None, None] * keys
    output = FORWARD["cpp"](q, k, v, None, None, None, None)[1]
    torch.testing.assert_close(output, torch.ones_like(output))


@DTYPES
@pytest.mark.parametrize("queries", [1, 2, 3, 5, 47, 48, 49, 97])
def test_every_query_gives_its_own_gradient(queries: int, dtype: torch.dtype) -> None:
    """Two keys share the attention of each; a query, and its gradient, are of a number that no other has."""
    q = torch.eye(queries, dtype=dtype)[None, None] * 3
    k = torch.zeros(1, 1, 2, queries, dtype=dtype)
    v = torch.ones(1, 1, 2, queries, dtype=dtype)
    v[:, :, 1] = -1
    args = (q, k, v, None, None, None)
    received, output, lse = FORWARD["cpp"](*args, 1.0)
    assert output.eq(0).all()
    grad = torch.eye(queries, dtype=dtype)[None, None] * 2
    _, dk, dv, _ = BACKWARD["cpp"](torch.zeros_like(received), grad, *args, output, lse, 1.0, [True, True, True, False])
    torch.testing.assert_close(dv, torch.ones_like(dv))  # 0.5 * 2
    torch.testing.assert_close(dk, 3 * v)  # 0.5 * (+-2 - 0) * 3


def test_probabilities_are_rounded_up_as_often_as_down() -> None:
    """Values of 1 add up to the sum of the probabilities, over the sum of what they were before."""
    inputs = attention_inputs(AttentionShape(2, 2, 50, 256, 32, 1), torch.bfloat16)
    inputs["v"].fill_(1.0)
    assert FORWARD["cpp"](*(inputs[n] for n in NAMES), None)[1].eq(1.0).all()


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("valid", [False, True], ids=["all", "valid"])
def test_sums_are_of_what_was_not_rounded(valid: bool, layout: str) -> None:
    """All that is not in bf16 is as in fp32: there it is the same numbers that are multiplied."""
    inputs = attention_inputs(SHAPE._replace(batch=5), torch.bfloat16, bias=True, valid=valid, poison=valid)
    grad_received, grad_output = slopes(SHAPE._replace(batch=5))
    inputs = {n: t if t is None else relayout(t, layout) for n, t in inputs.items()}
    ours = run(inputs, (grad_received, grad_output))
    want = run(widened(inputs), (grad_received, grad_output.float()))
    for name in ("received", "lse", "dkey_bias"):
        torch.testing.assert_close(ours[name], want[name], msg=lambda text, name=name: f"{name}: {text}")
    for name in ("output", "dq", "dk", "dv"):
        assert_near(ours[name], want[name], 2**-7, name)


def test_what_keys_have_in_common_cancels_in_the_gradient_of_queries() -> None:
    """It is 64 times what distinguishes them: with rounded gradients of the logits some of it would be left."""
    inputs = attention_inputs(SHAPE, torch.bfloat16, bias=True)
    inputs["k"] = (inputs["k"].sign() / 4 + 16).to(torch.bfloat16)
    grad_received, grad_output = slopes(SHAPE)
    ours = run(inputs, (grad_received, grad_output))
    want = run(widened(inputs), (grad_received, grad_output.float()))
    assert_near(ours["dq"], want["dq"], 2**-8, "dq")


def test_a_bias_common_to_all_keys_changes_no_gradient() -> None:
    """Added to a log-sum-exp of 2^20, what distinguishes the rows is rounded to eighths: their own sums mend that."""
    inputs = attention_inputs(AttentionShape(2, 2, 49, 70, 17, 16), torch.bfloat16, bias=True)
    inputs["q"], inputs["k"] = (inputs[name].round() for name in ("q", "k"))  # their logits lose nothing to it
    grads = slopes(AttentionShape(2, 2, 49, 70, 17, 16))
    found = []
    for bias in (0.0, 2.0**20):
        inputs["key_bias"] = torch.full((2, 70), bias)
        found.append(run(inputs, grads, 0.25))
    for name in ("output", "dq", "dk", "dv", "dkey_bias"):
        assert_near(found[1][name], found[0][name], 2**-8, name)


@pytest.mark.parametrize("small", ["q", "k", "v", "grad"])
@pytest.mark.parametrize("exponent", [-133, -126, -124])
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_small_values_are_multiplied_too(small: str, exponent: int, layout: str) -> None:
    """2^-133 is the smallest number of bf16, 2^-126 the smallest that units which multiply it do not take for zero;
    products with probabilities are smaller. The other operand and the scale make up for a small q or k; of v and of the
    gradient the results are as small."""
    g = torch.Generator().manual_seed(3)
    sizes = {"q": (2, 2, 19, 17), "k": (2, 2, 35, 17), "v": (2, 2, 35, 9), "grad": (2, 2, 19, 9)}
    drawn = {n: torch.randint(-4, 5, size, generator=g).float() for n, size in sizes.items()}
    if exponent == -133:  # results have bits to be compared
        drawn["v"] *= 64
        drawn["grad"] *= 64
    powers, scale = dict.fromkeys(drawn, 0) | {small: exponent}, 2.0**-4
    if small in ("q", "k"):
        powers["k" if small == "q" else "q"] = 60
        scale *= 2.0 ** (-exponent - 60)
    made = {n: relayout((t * 2.0 ** powers[n]).bfloat16(), layout) for n, t in drawn.items()}

    def kernels(x: dict[str, Tensor], scale: float, powers: dict[str, int]) -> tuple[Tensor, ...]:
        args = (x["q"], x["k"], x["v"], None, None, None)
        received, output, lse = FORWARD["cpp"](*args, scale)
        wanted = [True, True, True, False]
        dq, dk, dv, _ = BACKWARD["cpp"](torch.zeros(2, 35), x["grad"], *args, output, lse, scale, wanted)
        results = (output, "v"), (dv, "grad"), (dq, "v", "grad"), (dk, "v", "grad")
        return received, lse, *(t.double() * 2.0 ** -sum(powers[n] for n in of) for t, *of in results)

    ours, want = kernels(made, scale, powers), kernels(drawn, 2.0**-4, dict.fromkeys(drawn, 0))
    torch.testing.assert_close(ours[:2], want[:2])
    bounds = {"output": 2**-6, "dv": 2**-6}
    if small not in ("q", "k"):  # else what makes up for one leaves no room for the gradient of the other
        bounds |= {"dq": 2**-4, "dk": 2**-4}
    for (name, bound), one, other in zip(bounds.items(), ours[2:], want[2:], strict=False):
        assert_near(one, other, bound, name)


@pytest.mark.parametrize("place", [(0, 0), (0, -1), (-1, 0), (-1, -1)], ids=str)
@pytest.mark.parametrize("width", [1, 32, 33])
def test_one_small_value_is_not_lost_wherever_it_is(place: tuple[int, int], width: int) -> None:
    v = torch.zeros(1, 1, 4, width, dtype=torch.bfloat16)
    v[0, 0, place[0], place[1]] = 2.0**-130
    q, k = torch.zeros(1, 1, 3, 5, dtype=torch.bfloat16), torch.zeros(1, 1, 4, 5, dtype=torch.bfloat16)
    output = FORWARD["cpp"](q, k, v, None, None, None, None)[1]
    assert output[..., place[1]].double().eq(2.0**-132).all()
    assert output.count_nonzero() == 3


@pytest.mark.parametrize("name", ["q", "k", "v", "grad"])
def test_a_head_with_a_small_value_is_alone_in_that(name: str) -> None:
    """It is multiplied another way than those before and after it: each has its own results all the same."""
    shape = AttentionShape(3, 2, 1100, 20, 16, 16)  # two slabs of queries
    inputs = attention_inputs(shape, torch.bfloat16, bias=True, valid=True, poison=True)
    inputs["query_valid"][1], inputs["key_valid"][1] = True, True
    for n in ("q", "k", "v"):
        inputs[n][1] = torch.randn(inputs[n][1].shape)
    inputs["key_bias"][1] = 0.0
    _, grad = slopes(shape)
    (grad if name == "grad" else inputs[name])[1, 1, 18, 15] = 1e-37
    inputs["grad"] = grad

    def kernels(**inputs: Any) -> tuple[Tensor, ...]:
        grads = torch.ones(inputs["q"].shape[0], 20), inputs["grad"]
        return tuple(run(inputs, grads).values())

    assert_alone(kernels, inputs)
    ours, want = kernels(**inputs), kernels(**widened(inputs))
    for what, one, other in zip(("received", "output", "lse", "dq", "dk", "dv", "dkey_bias"), ours, want, strict=True):
        assert_near(one.nan_to_num(posinf=0), other.nan_to_num(posinf=0), 2**-7, what)


@pytest.mark.parametrize("name", ["q", "k", "v", "grad"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_infinities_and_nan_show_where_they_do_in_fp32(name: str, value: float) -> None:
    """In the last of an odd number of rows, too: what fills the pair up beside it is multiplied by zero."""
    shape = AttentionShape(2, 2, 9, 21, 5, 3)
    inputs = attention_inputs(shape, torch.bfloat16, bias=True)
    grad_received, grad = slopes(shape)
    changed = grad if name == "grad" else inputs[name]
    changed[1, 0, -1, 2] = value
    changed[1, 1, 4, 1] = value
    ours, want = run(inputs, (grad_received, grad)), run(widened(inputs), (grad_received, grad.float()))
    for what, other in want.items():
        finite = other.isfinite()
        assert_same(ours[what].float().masked_fill(finite, 0), other.masked_fill(finite, 0), what)
        assert finite[0].all()
    assert not want["dv" if name == "grad" else "output"][1].isfinite().all()


SCRIPT = """
import sys, torch
from sparsify_kernels import attention_scores
from sparsify_kernels.testing import AttentionShape, attention_inputs
inputs = attention_inputs(AttentionShape(2, 2, 50, 70, 32, 16), torch.bfloat16, bias=True)
torch.save(tuple(attention_scores(**inputs)), sys.argv[1])
"""


def test_pairs_are_used_where_the_machine_has_them(tmp_path: Path) -> None:
    """They round probabilities, and nothing else does; no name, and their own, choose them."""
    if not _backends.build_info().get("cpu", {}).get("avx512bf16"):
        pytest.skip("this machine multiplies no pairs of bf16, or _info was not built")
    found = {}
    for isa in (None, "avx512_bf16", "avx512"):
        env = {n: value for n, value in os.environ.items() if n != "SPARSIFY_ISA"}
        env |= {} if isa is None else {"SPARSIFY_ISA": isa}
        file = tmp_path / f"{isa}.pt"
        subprocess.run([sys.executable, "-c", SCRIPT, str(file)], check=True, env=env)
        found[isa] = torch.load(file)
    assert_same(found["avx512_bf16"], found[None])
    received, output = found["avx512"]
    torch.testing.assert_close(received, found[None][0])
    assert_near(found[None][1], output, 2**-7, "output")
    assert not torch.equal(found[None][1], output)
