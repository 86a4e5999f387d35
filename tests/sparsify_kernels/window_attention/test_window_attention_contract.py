"""window_attention: every sentence of its contract, as literal tables and against the oracle."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_kernels import Windows, _registry, window_attention
from sparsify_kernels.testing import (
    LAYOUTS,
    WINDOW_SHAPES,
    WindowShape,
    assert_accurate,
    assert_same,
    poisoned_memory,
    window_attention_eager,
    window_attention_oracle,
    window_inputs,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SMALL = WindowShape(23, 4, 3, 4, 2, 6)
LOG3 = math.log(3.0)
FORMS = [
    pytest.param({}, id="plain"),
    pytest.param({"scale": True, "region": True}, id="scale, regions"),
    pytest.param({"cosine": True}, id="cosine"),
    pytest.param({"cosine": True, "scale": True, "region": True}, id="cosine, scale, regions"),
]


def packed(q: list[float], k: list[float], v: list[float]) -> Tensor:
    """[N, 3, 1, 1]."""
    return torch.tensor([q, k, v], dtype=torch.float32).T.reshape(-1, 3, 1, 1)


def windows(member: list[int], start: list[int], place: list[int], region: list[int] | None = None) -> Windows:
    part = None if region is None else torch.tensor(region)
    return Windows(torch.tensor(member), torch.tensor(start), torch.tensor(place), part)


# Queries (1, 0, 0), keys (0, log 3, 0), values (4, 8, 100), one head of width 1 and scale 1, windows of 1 x 2 places.
TABLE = [
    # name, windows, bias of the differences -1, 0, 1, output
    ("one window of two", ([0, 1, 2], [0, 2, 3], [0, 1, 0]), (0, 0, 0), (7, 6, 100)),
    ("members in another order", ([2, 1, 0], [0, 1, 3], [0, 1, 0]), (0, 0, 0), (7, 6, 100)),
    ("an empty window", ([0, 1, 2], [0, 0, 2, 2, 3], [0, 1, 1]), (0, 0, 0), (7, 6, 100)),
    ("alone in three windows", ([0, 1, 2], [0, 1, 2, 3], [1, 1, 0]), (5, 5, 5), (4, 8, 100)),
    ("bias to the right", ([0, 1, 2], [0, 2, 3], [0, 1, 0]), (LOG3, 0, 0), (7.6, 6, 100)),
    ("bias to the left", ([0, 1, 2], [0, 2, 3], [0, 1, 0]), (0, 0, LOG3), (7, 5, 100)),
    ("the same, places exchanged", ([0, 1, 2], [0, 2, 3], [1, 0, 0]), (0, 0, LOG3), (7.6, 6, 100)),
    ("bias of itself", ([0, 1, 2], [0, 2, 3], [0, 1, 0]), (0, LOG3, 0), (6, 7, 100)),
    ("of other regions", ([0, 1, 2], [0, 2, 3], [0, 1, 0], [3, 4, 4]), (0, 0, 0), (4, 8, 100)),
    ("of one region", ([0, 1, 2], [0, 2, 3], [0, 1, 0], [3, 3, 4]), (0, 0, 0), (7, 6, 100)),
]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case[0])
def test_literal_table(case: tuple[Any, ...]) -> None:
    _, members, bias, expected = case
    got = window_attention(
        packed([1, 0, 0], [0, LOG3, 0], [4, 8, 100]), torch.tensor([[bias]], dtype=torch.float32), windows(*members)
    )
    torch.testing.assert_close(got.flatten(), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_penalty_between_regions_is_a_hundred_and_no_more(scale: float) -> None:
    """Whatever dot products are multiplied by."""
    qkv, factor = packed([0, 0], [0, 0], [4, 8]).double(), torch.tensor([scale], dtype=torch.float64)
    bias = torch.tensor([[[100 + LOG3, 0.0, 0.0]]], dtype=torch.float64)
    got = window_attention(qkv, bias, windows([0, 1], [0, 2], [0, 1], [0, 1]), scale=factor)
    torch.testing.assert_close(got.flatten(), torch.tensor([7.0, 8.0], dtype=torch.float64))


@pytest.mark.parametrize("places", [3, 40], ids=["one tile", "several"])  # of Triton's
@pytest.mark.parametrize("region", [[0, 1, 2], [5, 2**40, -3]], ids=str)
@pytest.mark.parametrize("backend", sorted(_registry.implementations("window_attention")))
def test_the_penalty_does_not_grow_with_the_number_of_a_region(backend: str, region: list[int], places: int) -> None:
    """Three tokens of three regions. A bias of 100 + log 3 makes the weights of the first and the last 1 and 3 for the
    first."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    bias = torch.zeros(1, 1, 2 * places - 1)
    bias[0, 0, places - 3] = 100 + LOG3  # of a query two places to the left of its key
    tensors = (packed([0] * 3, [0] * 3, [4, 8, 12]), bias, None, *windows([0, 1, 2], [0, 3], [0, 1, 2], region))
    args = [None if t is None else t.to(device) for t in tensors]
    output, lse = _registry.implementations("window_attention")[backend](*args, False)
    backward = _registry.implementations("window_attention_backward")[backend]
    dqkv, dbias, _ = backward(torch.ones_like(output), *args, lse, False, [True, True, True])
    close = {"rtol": 1e-4, "atol": 1e-4}  # 100 + log 3 is rounded
    torch.testing.assert_close(output.flatten().cpu(), torch.tensor([10.0, 8.0, 12.0]), **close)
    torch.testing.assert_close(lse.flatten().cpu(), torch.tensor([math.log(4.0), 0.0, 0.0]), **close)
    torch.testing.assert_close(dqkv[:, 2].flatten().cpu(), torch.tensor([0.25, 1.0, 1.75]), **close)
    want = torch.zeros_like(bias)
    want[0, 0, places - 3], want[0, 0, places - 1] = 1.5, -1.5
    torch.testing.assert_close(dbias.cpu(), want, **close)


def test_bias_knows_rows_from_columns_and_query_from_key() -> None:
    """A window of 2 x 2 with tokens at (0, 1) and (1, 0): differences (-1, 1) and (1, -1)."""
    bias = torch.zeros(1, 3, 3)
    bias[0, 0, 2] = LOG3  # one row above, one column to the right of the key
    got = window_attention(packed([0, 0], [0, 0], [4, 8]), bias, windows([0, 1], [0, 2], [1, 2]))
    torch.testing.assert_close(got.flatten(), torch.tensor([7.0, 6.0]))


def test_scale_is_by_head_and_cosine_compares_directions() -> None:
    q = torch.tensor([[3.0, 4.0], [0.0, 2.0]])  # directions (0.6, 0.8) and (0, 1)
    k = torch.tensor([[0.0, 5.0], [7.0, 0.0]])  # directions (0, 1) and (1, 0)
    v = torch.tensor([[4.0, 4.0], [8.0, 8.0]])
    qkv = torch.stack([q, k, v], 1)[:, :, None].expand(2, 3, 2, 2)
    scale = torch.tensor([5 * LOG3, 0.0])
    got = window_attention(qkv, torch.zeros(2, 1, 3), windows([0, 1], [0, 2], [0, 1]), scale=scale, cosine=True)
    # Token 0: logits 4 log 3 and 3 log 3; token 1: 5 log 3 and 0.
    expected = [(3 * 4 + 8) / 4, (243 * 4 + 8) / 244]
    torch.testing.assert_close(got[:, 0, 0], torch.tensor(expected))
    torch.testing.assert_close(got[:, 1, 0], torch.tensor([6.0, 6.0]))


def test_default_scales() -> None:
    inputs = window_inputs(SMALL)
    assert_same(window_attention(**inputs), window_attention(**{**inputs, "scale": torch.full((2,), 6**-0.5)}))
    inputs["cosine"] = True
    assert_same(window_attention(**inputs), window_attention(**{**inputs, "scale": torch.ones(2)}))


def test_a_vector_of_no_length_has_no_direction() -> None:
    inputs = window_inputs(SMALL, cosine=True)
    inputs["qkv"][5, :2] = 0
    inputs["qkv"].requires_grad_()
    output = window_attention(**inputs)
    output.square().sum().backward()
    assert output.isfinite().all()
    assert inputs["qkv"].grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", WINDOW_SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_as_accurate_as_the_oracle_asks(shape: WindowShape, dtype: torch.dtype, form: dict[str, bool]) -> None:
    inputs = window_inputs(shape, dtype, **form)
    with poisoned_memory():
        ours = window_attention(**inputs)
    assert ours.dtype == dtype
    truth = window_attention_oracle(**inputs)
    if dtype == torch.float64:  # the truth is no truer than we are
        torch.testing.assert_close(ours, truth, rtol=1e-13, atol=1e-13)
    else:
        assert_accurate(ours, eager=window_attention_eager(**inputs), truth=truth)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64])  # in fp64 gradcheck is the judge
@pytest.mark.parametrize("shape", [SMALL, WINDOW_SHAPES[2], WINDOW_SHAPES[6]], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_as_accurate_as_the_oracle_asks(
    shape: WindowShape, dtype: torch.dtype, form: dict[str, bool]
) -> None:
    """Over several draws at once: of two numbers (``scale`` has one a head) the eager form may hit both by chance."""
    ours, eager, truth = (defaultdict(list) for _ in range(3))
    for seed in range(6):
        inputs = window_inputs(shape, dtype, **form, seed=seed)
        exact = {n: t.double() if isinstance(t, Tensor) else t for n, t in inputs.items()}
        with poisoned_memory():
            found = gradients(window_attention, inputs)
        for name, grad in found.items():
            assert grad.dtype == inputs[name].dtype
            ours[name].append(grad)
        for name, grad in gradients(window_attention_eager, inputs).items():
            eager[name].append(grad)
        for name, grad in gradients(window_attention_eager, exact).items():
            truth[name].append(grad)
    for name in truth:
        assert_accurate(
            torch.stack(ours[name]),
            eager=torch.stack(eager[name]),
            truth=torch.stack(truth[name]),
            what=f"gradient of {name}",
        )


def test_a_nan_shows_in_its_window_alone() -> None:
    inputs = window_inputs(SMALL)
    member, start = inputs["windows"].member, inputs["windows"].start
    inputs["qkv"][member[start[1]], 0, 0, 0] = torch.nan
    output = window_attention(**inputs)
    assert output[member[start[1]], 0].isnan().all()
    assert output[member[: start[1]]].isfinite().all()
    assert output[member[start[2] :]].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layout_changes_nothing(layout: str) -> None:
    form = {"scale": True, "region": True, "cosine": True}
    flat, other = window_inputs(SMALL, **form), window_inputs(SMALL, **form, layout=layout)
    assert layout == "offset" or not other["qkv"].is_contiguous()
    assert_same(window_attention(**other), window_attention(**flat))
    expected = gradients(window_attention, flat)
    for name, grad in gradients(window_attention, other).items():
        assert_same(grad, expected[name], f"gradient of {name}")


def test_deterministic() -> None:
    inputs = window_inputs(WindowShape(300, 9, 8, 8, 3, 16), scale=True, region=True, cosine=True)
    first, second = (gradients(window_attention, inputs) for _ in range(2))
    assert_same(window_attention(**inputs), window_attention(**inputs))
    assert_same(tuple(first.values()), tuple(second.values()))


def gradients(function: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of a loss that weighs every element of the output differently."""
    leaves = {
        name: t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for name, t in inputs.items()
        if isinstance(t, Tensor)
    }
    output = function(**{**inputs, **leaves})
    loss = (output.double() * torch.linspace(-1, 1, output.numel()).double().view(output.shape)).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
