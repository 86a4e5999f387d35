"""random_mask, sentence by sentence: the generator, the masks that never change, the gradient, the errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sparsify_kernels import RandomMask, _registry, random_mask
from sparsify_kernels.random_mask import reference
from sparsify_kernels.testing import compiled_anew

# Known answers of Philox4x32-10, from the tests of Random123 (Salmon et al., SC 2011): counter, key, result.
PHILOX = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# Masks of 12 units for two samples. They are public: if one of these lines has to change, the change is wrong.
MASKS: list[tuple[dict[str, Any], list[list[int]]]] = [
    ({"seed": 0}, [[0, 2, 5, 8, 9, 11], [0, 2, 6, 7, 8, 9]]),
    ({"seed": 1}, [[2, 4, 5, 6, 9, 10], [0, 4, 6, 8, 9, 10]]),
    ({"seed": 2**63 - 1}, [[0, 1, 3, 5, 6, 10], [1, 2, 3, 4, 7, 10]]),
    ({"seed": 0, "keep": 0.25}, [[0, 2, 8], [2, 8, 9]]),
    ({"seed": torch.tensor([0, 2**40 + 7])}, [[0, 2, 5, 8, 9, 11], [0, 1, 2, 6, 7, 10]]),
    ({"seed": 0, "grid": (2, 6), "stratified": True}, [[0, 2, 5, 7, 8, 11], [2, 4, 5, 6, 7, 9]]),
    (
        {"seed": torch.tensor([5, 5]), "keep": 0.25, "grid": (6, 2), "stratified": True},
        [[1, 5, 11], [1, 5, 11]],
    ),
    (
        {"seed": 9, "keep": 0.75, "grid": (2, 6), "stratified": True},
        [[0, 1, 2, 5, 6, 8, 9, 10, 11], [0, 3, 4, 6, 7, 8, 9, 10, 11]],
    ),
]


def philox_of_integers(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """The generator in Python's own integers, written from the paper and not from our reference."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(x0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(x2 * 0xCD9E8D57, 2**32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x0, x1, x2, x3


def oracle(samples: int, units: int, kept: int, seed: int | list[int]) -> list[list[int]]:
    """The contract, word for word: the units with the smallest (key, unit)."""
    masks = []
    for b in range(samples):
        value, row = (seed, b) if isinstance(seed, int) else (seed[b], 0)
        keys = [(philox_of_integers((u, row, 0, 0), (value % 2**32, value >> 32))[0], u) for u in range(units)]
        masks.append(sorted(u for _, u in sorted(keys)[:kept]))
    return masks


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX)
def test_philox_gives_its_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([c]) for c in counter)
    words = reference.philox((c0, c1, c2, c3), (torch.tensor([key[0]]), torch.tensor([key[1]])))
    assert tuple(int(w) for w in words) == expected
    assert philox_of_integers(counter, key) == expected


@pytest.mark.parametrize(("arguments", "expected"), MASKS)
def test_masks_never_change(arguments: dict[str, Any], expected: list[list[int]]) -> None:
    x = torch.arange(2 * 12 * 3, dtype=torch.int32).view(2, 12, 3)
    mask = random_mask(x, **arguments)
    assert isinstance(mask, RandomMask)
    assert mask.index.dtype == torch.int64
    assert mask.index.tolist() == expected
    assert mask.tokens.tolist() == [[x[b, u].tolist() for u in expected[b]] for b in range(2)]


@pytest.mark.parametrize("seed", [0, 12345678901234567, 2**63 - 1, [3, 2**33, 2**62 + 11]])
def test_masks_are_those_of_the_definition(seed: int | list[int]) -> None:
    x = torch.zeros(3, 37, 1)
    given, expected = torch.tensor(seed), oracle(3, 37, 11, seed)
    assert random_mask(x, 0.3, seed=seed if isinstance(seed, int) else given).index.tolist() == expected
    for name, implementation in _registry.implementations("random_mask").items():
        device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
        assert implementation(x.to(device), given.to(device), 11, 0)[1].tolist() == expected, name


@pytest.mark.parametrize(
    ("units", "keep", "kept"),
    [(1, 0.5, 1), (3, 0.5, 2), (5, 0.5, 3), (10, 0.25, 3), (64, 0.001, 1), (7, 1.0, 7), (7, 1, 7), (13, 0.5, 7)],
)
def test_kept_units_round_half_up_and_are_one_at_least(units: int, keep: float, kept: int) -> None:
    assert kept == max(1, math.floor(keep * units + 0.5))
    index = random_mask(torch.zeros(2, units, 1), keep, seed=3).index
    assert index.shape == (2, kept)
    assert (index.diff(dim=1) > 0).all()
    assert index.min() >= 0
    assert index.max() < units


def test_ties_go_to_the_lower_unit() -> None:
    keys = torch.tensor([[5, 2, 5, 2, 9, 5], [1, 1, 1, 1, 1, 1]])
    assert reference.select_units(keys, 3, 0).tolist() == [[0, 1, 3], [0, 1, 2]]
    grid = torch.tensor([[7, 7, 3, 1, 7, 7, 1, 3]])  # 2 x 4: the blocks hold units 0 1 4 5 and 2 3 6 7
    assert reference.select_units(grid, 4, 4).tolist() == [[0, 1, 3, 6]]


def test_one_seed_differs_by_sample_and_one_a_sample_does_not_know_its_batch() -> None:
    x = torch.zeros(4, 64, 1)
    shared = random_mask(x, seed=11).index
    assert len({tuple(row) for row in shared.tolist()}) == 4
    assert torch.equal(shared, random_mask(x, seed=torch.tensor(11)).index)
    seeds = torch.tensor([7, 11, 7, 2])
    each = random_mask(x, seed=seeds).index
    assert torch.equal(each[0], each[2])
    for b in range(4):
        assert torch.equal(random_mask(x[b : b + 1], seed=seeds[b : b + 1]).index[0], each[b])
    assert torch.equal(shared[0], each[1])  # row 0 of one seed is the mask of that seed


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_every_block_of_a_stratified_mask_keeps_as_many(keep: float) -> None:
    rows, cols = 6, 8
    index = random_mask(torch.zeros(20, rows * cols, 1), keep, seed=4, grid=(rows, cols), stratified=True).index
    kept = torch.zeros(20, rows * cols, dtype=torch.int64).scatter_(1, index, 1).view(20, rows, cols)
    blocks = kept.view(20, rows // 2, 2, cols // 2, 2).sum((2, 4))
    assert (blocks == 4 * keep).all()


@pytest.mark.parametrize("stratified", [False, True])
def test_every_unit_is_kept_equally_often(stratified: bool) -> None:
    """Chi-square over 64 units, 40,000 masks: 63 is twice the mean of the statistic at this ratio."""
    samples, units, keep = 40_000, 64, 0.5
    index = random_mask(torch.zeros(samples, units, 0), keep, seed=1, grid=(8, 8), stratified=stratified).index
    counts = torch.bincount(index.flatten(), minlength=units).double()
    expected = samples * keep
    assert counts.sum() == samples * units * keep
    assert ((counts - expected) ** 2 / expected).sum() < 63
    # Pairs too: how often two units stay together does not depend on where they lie, except within a block.
    kept = torch.zeros(samples, units).scatter_(1, index, 1.0)
    together = (kept.T @ kept / samples)[0, 18:]
    assert (together - 0.25).abs().max() < 0.012


def test_no_global_random_state() -> None:
    before = torch.random.get_rng_state()
    random_mask(torch.zeros(2, 8, 1), seed=5)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(1)
    first = random_mask(torch.zeros(2, 8, 1), seed=5).index
    torch.manual_seed(2)
    assert torch.equal(first, random_mask(torch.zeros(2, 8, 1), seed=5).index)


def test_gradients_are_scattered_into_zeros() -> None:
    x = torch.zeros(2, 12, 1, requires_grad=True)
    mask = random_mask(x, seed=0)
    weight = torch.arange(1.0, 13.0).view(2, 6, 1)
    (mask.tokens * weight).sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, 0].tolist() == [1, 0, 2, 0, 0, 3, 0, 0, 4, 5, 0, 6]
    assert x.grad[1, :, 0].tolist() == [7, 0, 8, 0, 0, 0, 9, 10, 11, 12, 0, 0]
    assert not mask.index.requires_grad


def test_an_integer_payload_has_no_gradient() -> None:
    assert not random_mask(torch.zeros(2, 4, 3, dtype=torch.uint8), seed=0).tokens.requires_grad


X = torch.zeros(2, 4, 3)
ERRORS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "x must be a tensor, [B, U, P], got list", {"x": [1, 2]}),
    (ValueError, "x must be [B, U, P], got float32 [2, 4]", {"x": torch.zeros(2, 4)}),
    (ValueError, "x must be [B, U, P] with U >= 1, got float32 [2, 0, 3]", {"x": torch.zeros(2, 0, 3)}),
    (TypeError, "keep must be a float, got '0.5'", {"keep": "0.5"}),
    (TypeError, "keep must be a float, got True", {"keep": True}),
    (TypeError, "keep must be a float, got float32 []", {"keep": torch.tensor(0.5)}),
    (ValueError, "keep must be in (0, 1], got 0.0", {"keep": 0.0}),
    (ValueError, "keep must be in (0, 1], got -0.5", {"keep": -0.5}),
    (ValueError, "keep must be in (0, 1], got 1.5", {"keep": 1.5}),
    (ValueError, "keep must be in (0, 1], got nan", {"keep": math.nan}),
    (TypeError, "seed must be an int or an int64 tensor, [] or [B], got None", {"seed": None}),
    (TypeError, "seed must be an int or an int64 tensor, [] or [B], got 1.0", {"seed": 1.0}),
    (TypeError, "seed must be an int or an int64 tensor, [] or [B], got True", {"seed": True}),
    (ValueError, "seed must be in [0, 2**63), got -1", {"seed": -1}),
    (ValueError, "seed must be in [0, 2**63), got 9223372036854775808", {"seed": 2**63}),
    (ValueError, "seed must be in [0, 2**63), got -5", {"seed": torch.tensor(-5)}),
    (ValueError, "seed must be in [0, 2**63), got -7", {"seed": torch.tensor([3, -7])}),
    (TypeError, "seed must be int64 [], got int32 []", {"seed": torch.tensor(3, dtype=torch.int32)}),
    (TypeError, "seed must be int64 [B], got float32 [2]", {"seed": torch.zeros(2)}),
    (ValueError, "seed must be int64 [B] with B = 2, got int64 [3]", {"seed": torch.zeros(3, dtype=torch.int64)}),
    (ValueError, "seed must be int64 [] or [B], got int64 [2, 1]", {"seed": torch.zeros(2, 1, dtype=torch.int64)}),
    (ValueError, "seed must be on cpu like x, got meta", {"seed": torch.tensor(0, device="meta")}),
    (TypeError, "grid must be (rows, columns), got 4", {"grid": 4}),
    (TypeError, "grid must be (rows, columns), got (2, 2, 1)", {"grid": (2, 2, 1)}),
    (TypeError, "grid must be (rows, columns), got (2, 2.0)", {"grid": (2, 2.0), "stratified": True}),
    (TypeError, "grid must be (rows, columns), got ('2', 2)", {"grid": ("2", 2)}),
    (TypeError, "grid must be (rows, columns), got (True, 4)", {"grid": (True, 4)}),
    (ValueError, "grid must be (rows, columns) with rows * columns = U, got (2, 3)", {"grid": (2, 3)}),
    (ValueError, "grid must be (rows, columns) with rows * columns = U, got (-2, -2)", {"grid": (-2, -2)}),
    (ValueError, "grid must be given for a stratified mask, got None", {"stratified": True}),
    (
        ValueError,
        "grid must be even in both directions for a stratified mask, got (1, 4)",
        {"stratified": True, "grid": (1, 4)},
    ),
    (
        ValueError,
        "keep must be 1/4, 1/2 or 3/4 for a stratified mask, got 0.6",
        {"stratified": True, "grid": (2, 2), "keep": 0.6},
    ),
]


@pytest.mark.parametrize(("kind", "text", "change"), ERRORS, ids=[text for _, text, _ in ERRORS])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_errors_name_argument_expectation_and_what_came(
    kind: type[Exception], text: str, change: dict[str, Any], compiled: bool
) -> None:
    arguments = {"x": X, "seed": 0} | change
    op = compiled_anew(random_mask) if compiled else random_mask
    with pytest.raises((kind, RuntimeError) if compiled else kind) as caught:
        op(arguments.pop("x"), **arguments)
    if not (compiled and "9223372036854775808" in text):  # no int64: torch says so itself before the op is called
        assert str(caught.value) == f"random_mask: {text}"


@pytest.mark.parametrize("seed", [-5, torch.tensor(-5), torch.tensor([3, -5])])
def test_a_bad_seed_is_a_runtime_error_of_the_same_text_when_compiled(seed: int | torch.Tensor) -> None:
    compiled = torch.compile(lambda x, s: random_mask(x, seed=s).tokens, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError) as caught:
        compiled(X, seed)
    assert str(caught.value) == "random_mask: seed must be in [0, 2**63), got -5"
