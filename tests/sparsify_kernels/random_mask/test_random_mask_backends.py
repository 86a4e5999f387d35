"""Every backend of random_mask against the reference: the same index, the same bytes, nothing beside the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_kernels import _registry
from sparsify_kernels.random_mask import reference
from sparsify_kernels.testing import LAYOUTS, at_the_edge, guarded, guarded_memory, poisoned_memory
from sparsify_kernels.testing.bits import assert_same_bits, payload, placed

FORWARD = _registry.implementations("random_mask")
BACKWARD = _registry.implementations("random_mask_backward")
FAST = [name for name in FORWARD if name != "reference"]
DEVICE = {"cpp": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}

DTYPES = [
    torch.uint8,
    torch.bool,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.uint32,
]
# One dtype a size is enough for the interpreter, which is slow.
INTERPRETED = (torch.bool, torch.bfloat16, torch.float32, torch.complex64, torch.complex128)
# (B, U, P, K, width of the grid): one, primes, below and above a block, empty, stratified.
SHAPES = [
    (1, 1, 1, 1, 0),
    (2, 7, 5, 3, 0),
    (3, 16, 41, 8, 0),
    (2, 37, 9, 36, 0),
    (1, 17, 2049, 2, 0),
    (0, 8, 4, 4, 0),
    (2, 8, 0, 4, 0),
    (2, 16, 3, 4, 4),
    (1, 24, 3, 18, 12),
    (2, 24, 3, 12, 2),
]


def on(backend: str, *args: Any) -> list[Any]:
    return [a.to(DEVICE[backend]) if isinstance(a, Tensor) else a for a in args]


def seeds(samples: int) -> list[Tensor]:
    return [torch.tensor(2**62 + 12345), torch.randint(0, 2**63 - 1, (samples,))]


# Seeds that give two of the first four units the same key: seed, kept units of four, which ones.
TIES = [
    (104069162, 3, [0, 1, 2]),  # units 2 and 3 are equal, third and fourth
    (328789540, 1, [1]),  # 1 and 2, the smallest
    (1882555580, 1, [0]),  # 0 and 3, the smallest
    (2664206701, 3, [0, 1, 3]),  # 0 and 2, third and fourth
    (4640527735, 3, [0, 1, 2]),  # 1 and 3, third and fourth
]


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize(("seed", "kept", "expected"), TIES)
def test_ties_go_to_the_lower_unit(backend: str, seed: int, kept: int, expected: list[int]) -> None:
    device = DEVICE.get(backend, "cpu")
    x, seeds = torch.zeros(1, 4, 0, device=device), torch.tensor([seed], device=device)
    for width in (0, 2):
        assert FORWARD[backend](x, seeds, kept, width)[1].tolist() == [expected]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_agree_with_the_reference(backend: str, shape: tuple[int, ...]) -> None:
    samples, units, values, kept, width = shape
    x = payload((samples, units, values), torch.float32)
    grad = payload((samples, kept, values), torch.float32)
    for seed in seeds(samples):
        tokens, index = reference.random_mask(x, seed, kept, width)
        with poisoned_memory():
            ours = FORWARD[backend](*on(backend, x, seed), kept, width)
            scattered = BACKWARD[backend](*on(backend, grad, index), units)
        assert torch.equal(ours[1].cpu(), index)
        assert_same_bits(ours[0], tokens)
        assert_same_bits(scattered, reference.random_mask_backward(grad, index, units))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, d) for b in FAST for d in DTYPES if d in INTERPRETED or b == "cpp" or DEVICE[b] == "cuda"],
)
def test_any_dtype_in_any_layout(backend: str, dtype: torch.dtype) -> None:
    x = payload((2, 6, 5), dtype)
    grad = payload((2, 3, 5), dtype)
    seed = torch.tensor([3, 4])
    tokens, index = reference.random_mask(x, seed, 3, 0)
    gradient = torch.zeros(2, 6, 5, dtype=dtype)
    for b in range(2):
        for slot, unit in enumerate(index[b].tolist()):
            gradient[b, unit] = grad[b, slot]
    for layout in LAYOUTS:
        ours = FORWARD[backend](*on(backend, placed(x, layout), placed(seed, layout)), 3, 0)
        assert_same_bits(ours[0], tokens)
        assert_same_bits(BACKWARD[backend](*on(backend, placed(grad, layout), placed(index, layout)), 6), gradient)


@pytest.mark.parametrize("backend", FAST)
def test_expanded_input_and_gradient(backend: str) -> None:
    x = torch.randn(1, 1, 4).expand(3, 8, 4)
    tokens, index = FORWARD[backend](*on(backend, x, torch.tensor(1)), 4, 0)
    assert_same_bits(tokens, x[:, :4].contiguous())
    grad = torch.ones(()).expand(3, 4, 4)
    expected = reference.random_mask_backward(grad, index.cpu(), 8)
    assert_same_bits(BACKWARD[backend](*on(backend, grad, index), 8), expected)


def test_cpp_index_is_bit_identical_over_a_thousand_seeds() -> None:
    if "cpp" not in FORWARD:
        pytest.skip("the C++ extension is not built")
    everyone = torch.randint(0, 2**63 - 1, (1000,), generator=torch.Generator().manual_seed(1))
    sizes = [(32, 0), (1, 0), (63, 0), (32, 8)]
    x = torch.zeros(1000, 64, 0)
    for kept, width in sizes:
        expected = reference.random_mask(x, everyone, kept, width)[1]
        assert torch.equal(FORWARD["cpp"](x, everyone, kept, width)[1], expected)
    for n, seed in enumerate(everyone):
        kept, width = sizes[n % len(sizes)]
        expected = reference.random_mask(x[:3], seed, kept, width)[1]
        assert torch.equal(FORWARD["cpp"](x[:3], seed, kept, width)[1], expected)


def test_triton_index_is_bit_identical() -> None:
    """Over 1,000 seeds on a GPU, 15 under the interpreter."""
    if "triton" not in FORWARD:
        pytest.skip("Triton is not installed")
    count = 1000 if torch.cuda.is_available() else 15
    everyone = torch.randint(0, 2**63 - 1, (count,), generator=torch.Generator().manual_seed(1))
    x = torch.zeros(count, 64, 0)
    for kept, width in [(32, 0), (1, 0), (63, 0), (16, 8)]:
        expected = reference.random_mask(x, everyone, kept, width)[1]
        assert torch.equal(FORWARD["triton"](*on("triton", x, everyone), kept, width)[1].cpu(), expected)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("units", "kept", "width"),
    [
        *((units, kept, 0) for units in (63, 64, 65, 127, 128, 129) for kept in (1, units // 2, units - 1, units)),
        (4096, 5, 0),
        (4097, 2048, 0),
        (4096, 1024, 64),
        (4356, 3267, 66),
    ],
)
def test_many_units(backend: str, units: int, kept: int, width: int) -> None:
    x = torch.zeros(1, units, 0)
    expected = reference.random_mask(x, torch.tensor(9), kept, width)[1]
    assert torch.equal(FORWARD[backend](*on(backend, x, torch.tensor(9)), kept, width)[1].cpu(), expected)


@pytest.mark.parametrize("width", [0, 4], ids=["free", "stratified"])
@pytest.mark.parametrize("backend", FAST)
def test_nothing_outside_the_tensors_is_read_or_written(backend: str, width: int) -> None:
    """33 values a unit: no whole number of vectors or blocks. (What C++ allocates, `make sanitize` watches.)"""
    units, kept = (8, 4) if width else (7, 3)
    x, seed = guarded(torch.ones(2, units, 33)), guarded(torch.tensor([2, 5]))
    with guarded_memory():
        tokens, index = FORWARD[backend](*on(backend, x.tensor, seed.tensor), kept, width)
        assert (tokens == 1).all()
        grad, at = guarded(tokens.cpu()), guarded(index.cpu())
        dx = BACKWARD[backend](*on(backend, grad.tensor, at.tensor), units)
    wanted = torch.zeros(2, units).scatter(1, index.cpu(), 1.0)
    assert torch.equal(dx.cpu(), wanted.unsqueeze(2).expand(-1, -1, 33))
    for box in (x, seed, grad, at):
        box.check()


@pytest.mark.parametrize("values", [3, 33, 2049])
@pytest.mark.parametrize("backend", [name for name in FAST if DEVICE[name] == "cpu"])
def test_nothing_behind_the_last_value_is_read(backend: str, values: int) -> None:
    """A kernel that tries is killed."""
    tried = (torch.tensor([1, number]) for number in range(99))
    seed = next(seed for seed in tried if reference.random_mask(torch.ones(2, 7, 1), seed, 3, 0)[1][1, -1] == 6)
    seed, x = at_the_edge(seed), at_the_edge(torch.ones(2, 7, values))
    tokens, index = FORWARD[backend](x, seed, 3, 0)
    assert (tokens == 1).all()
    assert index[1, -1] == 6
    dx = BACKWARD[backend](at_the_edge(tokens), at_the_edge(index), 7)
    assert dx.sum() == tokens.numel()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_masked_units_are_never_read(backend: str) -> None:
    """Their NaN does not come through, in the backward neither."""
    seed = torch.tensor(2)
    index = reference.random_mask(torch.zeros(1, 6, 1), seed, 3, 0)[1]
    x = torch.full((1, 6, 4), torch.nan)
    x[0, index[0]] = 1.0
    device = DEVICE.get(backend, "cpu")
    tokens, _ = FORWARD[backend](x.to(device), seed.to(device), 3, 0)
    assert (tokens == 1).all()


@pytest.mark.parametrize("backend", FAST)
def test_offsets_beyond_two_to_the_31(backend: str) -> None:
    if torch.cuda.is_available() and backend == "triton":
        pytest.skip("the memory of a GPU is not taken lazily")
    buffer = torch.empty(2**32, dtype=torch.uint8)  # untouched pages cost nothing
    x = buffer.as_strided((2, 4, 8), (2**31, 2**29, 1))
    x.copy_(payload((2, 4, 8), torch.uint8))
    tokens, index = FORWARD[backend](x, torch.tensor(5), 2, 0)
    assert torch.equal(tokens, reference.gather_units(x.contiguous(), index))


@pytest.mark.skipif("cpp" not in FORWARD, reason="the C++ extension is not built")
@pytest.mark.parametrize("apart", [1, 2])
@pytest.mark.parametrize("width", [256, 3 * 64 * 61, 64 * 183 + 1])
@pytest.mark.parametrize("samples", [1, 64])
def test_large_results_are_written_past_the_caches(samples: int, width: int, apart: int) -> None:
    """From 16 MiB on, in whole lines where rows are made of them; units may begin anywhere in memory."""
    rows = -(-(17 << 20) // width)
    units = 2 * -(-rows // samples)
    x = torch.randint(0, 256, (samples * units * width * apart + 3,), dtype=torch.uint8)[3:]
    x = x.view(samples, units, width, apart)[..., 0]
    tokens, index = FORWARD["cpp"](x, torch.tensor(5), units // 2, 0)
    assert tokens.numel() >= 16 << 20
    expected = reference.random_mask(x, torch.tensor(5), units // 2, 0)
    assert torch.equal(index, expected[1])
    assert torch.equal(tokens, expected[0])


@pytest.mark.parametrize("backend", [b for b in FAST if b != "cpp"])
def test_an_unchecked_negative_seed_draws_a_mask(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU (the CPU always checks): its two 32-bit halves are the key, nothing is out of bounds."""
    monkeypatch.setattr(reference, "check_values", lambda device: False)
    x, seed = torch.zeros(2, 8, 0), torch.tensor([-1, -(2**40)])
    expected = reference.random_mask(x, seed, 4, 0)[1]
    assert torch.equal(FORWARD[backend](*on(backend, x, seed), 4, 0)[1].cpu(), expected)


@pytest.mark.parametrize("kernel", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_results_repeat_bit_for_bit(kernel: dict[str, Callable[..., Any]]) -> None:
    x, index = torch.randn(4, 16, 33), torch.tensor([[0, 5, 9], [1, 2, 3], [0, 14, 15], [7, 8, 9]])
    args = (x, torch.tensor(3), 8, 0) if kernel is FORWARD else (x[:, :3], index, 16)
    for implementation in kernel.values():
        first, again = (torch.utils._pytree.tree_leaves(implementation(*args)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((torch.zeros(2, 4, 1), torch.tensor(0), 5, 0), "kept must be in"),
        ((torch.zeros(2, 4, 1), torch.tensor(0), 0, 0), "kept must be in"),
        ((torch.zeros(2, 6, 1), torch.tensor(0), 3, 4), "grid_width must be"),
        ((torch.zeros(2, 4, 1), torch.zeros(3, dtype=torch.int64), 2, 0), "seed must be"),
    ],
)
def test_cpp_refuses_sizes_that_lead_out_of_bounds(args: tuple[Any, ...], text: str) -> None:
    if "cpp" not in FORWARD:
        pytest.skip("the C++ extension is not built")
    with pytest.raises(RuntimeError, match=f"random_mask: {text}"):
        FORWARD["cpp"](*args)
