"""random_mask in plain PyTorch: the definition the other backends are tested against.

    key(b, u) = word 0 of Philox4x32-10(counter = (u, r, 0, 0), key = (low 32 bits, high 32 bits of the seed)),
    r = b for one seed, r = 0 for a seed a sample;  the K smallest keys of a sample stay, ties to the lower u.

Philox: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_kernels._checks import InvalidValue, check_values

__all__ = ["philox", "random_mask", "random_mask_backward", "select_units", "unit_keys"]

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key after each round
ROUNDS = 10


def random_mask(x: Tensor, seed: Tensor, kept: int, grid_width: int) -> tuple[Tensor, Tensor]:
    """``x`` [B, U, P] any dtype; ``seed`` int64, [] or [B]; -> tokens [B, kept, P], index int64 [B, kept].

    ``grid_width`` > 0 is the width of the unit grid of a stratified mask, of whose 2x2 blocks each keeps ``4 * kept /
    U``.
    """
    check_seed(seed)
    index = select_units(unit_keys(seed, x.shape[0], x.shape[1]), kept, grid_width)
    return gather_units(x, index), index


def random_mask_backward(grad: Tensor, index: Tensor, units: int) -> Tensor:
    """``grad`` [B, K, P], ``index`` int64 [B, K] -> [B, units, P], the gradients at their units, zeros elsewhere."""
    out = grad.new_zeros((grad.shape[0], units, grad.shape[2]))
    return out.scatter_(1, index.unsqueeze(-1).expand(grad.shape), grad)


def unit_keys(seed: Tensor, samples: int, units: int) -> Tensor:
    """The key of every unit, int64 [samples, units] in [0, 2^32)."""
    unit = torch.arange(units, device=seed.device)  # [U]
    row = torch.arange(samples, device=seed.device) if seed.dim() == 0 else torch.zeros_like(seed)
    seed = seed.reshape(-1, 1)  # [1, 1] or [B, 1]
    zero = torch.zeros((samples, units), dtype=torch.int64, device=seed.device)
    return philox((unit + zero, row.unsqueeze(1) + zero, zero, zero), (seed & WORD, (seed >> 32) & WORD))[0]


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four counter words and two key words -> four random words, all 32-bit values in int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def select_units(keys: Tensor, kept: int, grid_width: int) -> Tensor:
    """The units with the smallest ``keys`` [B, U], ascending: int64 [B, kept]."""
    samples, units = keys.shape
    if grid_width == 0:
        return keys.sort(dim=1, stable=True).indices[:, :kept].sort(dim=1).values
    rows, cols = units // grid_width // 2, grid_width // 2
    blocks = keys.view(samples, rows, 2, cols, 2).transpose(2, 3).reshape(samples, rows, cols, 4)
    best = blocks.sort(dim=3, stable=True).indices[..., : 4 * kept // units]  # [B, rows, cols, 4 * keep]
    row = 2 * torch.arange(rows, device=keys.device).view(-1, 1, 1) + best // 2
    col = 2 * torch.arange(cols, device=keys.device).view(-1, 1) + best % 2
    return (row * grid_width + col).reshape(samples, kept).sort(dim=1).values


def gather_units(x: Tensor, index: Tensor) -> Tensor:
    """The units ``index`` [B, K] of ``x`` [B, U, P] -> [B, K, P]; bytes are moved, so any dtype will do."""
    moved = x.view(torch.uint8) if x.dtype.itemsize == 1 else x
    sample = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return moved[sample, index].view(x.dtype)


def check_seed(seed: Tensor) -> None:
    """``InvalidValue`` for a negative seed, where values are checked."""
    if check_values(seed.device) and bool((seed < 0).any()):
        raise InvalidValue(f"random_mask: seed must be in [0, 2**63), got {int(seed[seed < 0][0])}")


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product of two 32-bit values, without overflowing int64 on the way."""
    upper, lower = b * (a >> 16), b * (a & 0xFFFF)  # < 2^48
    return (upper + (lower >> 16)) >> 16, ((upper & 0xFFFF) * 0x10000 + lower) & WORD
