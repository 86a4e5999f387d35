"""Where the tokens of kept units stand at every stage of a windowed transformer: one plan a batch.

A mask unit is a square of ``u x u`` tokens, u halving from stage to stage, and no 2x2 patch merging crosses it. So the
tokens of M kept units are packed, in every stage, as [M * u * u, C]: unit after unit, row-major inside. Only attention
looks across units. A stage cuts its grid of tokens into windows, moved by a cyclic shift in every other block::

    grid of 4 units, u = 2, window 4       packed: unit 0, then unit 3      the window holds

        0  0 | 1  1                        token   0 1 2 3 | 4 5 6 7        place  0 1 4 5 | 10 11 14 15
        0  0 | 1  1     units 0 and 3
        -----+-----     are kept           shifted by 2: token 4 of the grid's row 2, column 2 is at place 0, and
        2  2 | 3  3                        token 0 at place 10, from over the edge: another region, which the
        2  2 | 3  3                        libraries keep apart by -100

Everything is arithmetic on unit numbers, on their device, and never waits for a value (but with ``SPARSIFY_CHECK=1``):
which windows a batch needs, and how many of them, is known from shapes alone; how many tokens each one holds is not,
and is left to ``Windows.start``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sparsify_kernels import Windows
from sparsify_kernels._checks import check_values

__all__ = ["Cut", "UnitPlan"]


class Cut(NamedTuple):
    """How the blocks of a stage cut their grid of tokens into windows."""

    unit: int  # tokens along one side of a mask unit
    window: int  # tokens along one side of a window
    shift: int  # by how many rows and columns the grid is moved up and left, cyclically, before it is cut


@dataclass(frozen=True)
class UnitPlan:
    """M kept units of a batch of square images, and the windows of their tokens for every cut that blocks make."""

    image: Tensor
    """int64 [M], ascending: the image of each unit."""
    unit: Tensor
    """int64 [M]: its number in the image, row-major."""
    images: int
    grid: int
    """units along one side of an image."""
    windows: Mapping[Cut, Windows]

    @staticmethod
    def of(image: Tensor, unit: Tensor, *, images: int, grid: int, cuts: Iterable[Cut]) -> UnitPlan:
        """The plan of the units ``unit`` (int64 [M], in [0, grid^2), none twice in an image) of ``image`` (int64 [M],
        in [0, images), ascending).

        Raises ``ValueError`` for a cut whose windows do not tile the grid, and for other numbers. These are looked for
        as the ops look for theirs: where reading a value would wait (on a GPU without ``SPARSIFY_CHECK=1``, inside
        ``torch.compile``), the windows of such a plan are none, and ``window_attention`` deals with them.
        """
        right = _right(image, unit, images, grid)
        readable = not torch.compiler.is_compiling() and not isinstance(right, FakeTensor) and not right.is_meta
        if readable and check_values(image.device) and not right:
            raise ValueError(
                f"UnitPlan: expected image in [0, {images}), ascending, and unit in [0, {grid**2}), each once in an "
                f"image; got image {_few(image)}, unit {_few(unit)}"
            )
        windows = {cut: _windows(image, unit, right, images, grid, cut) for cut in dict.fromkeys(cuts)}
        return UnitPlan(image, unit, images, grid, windows)

    def split(self, images: int, units: int) -> tuple[UnitPlan, UnitPlan]:
        """The plans of the first ``images``, whose ``units`` kept units come first, and of the others."""
        first, second = {}, {}
        for cut, (member, start, place, region) in self.windows.items():
            token, window = units * cut.unit**2, images * (self.grid * cut.unit // cut.window) ** 2
            sides = (None, None) if region is None else (region[:token], region[token:])
            first[cut] = Windows(member[:token], start[: window + 1], place[:token], sides[0])
            second[cut] = Windows(member[token:] - token, start[window:] - token, place[token:], sides[1])
        return (
            UnitPlan(self.image[:units], self.unit[:units], images, self.grid, first),
            UnitPlan(self.image[units:] - images, self.unit[units:], self.images - images, self.grid, second),
        )

    def cells(self, unit: int) -> Tensor:
        """Row-major number of each token in its image, units being ``unit`` x ``unit`` tokens: int64 [M, unit^2]."""
        row, column = _coordinates(self.unit, self.grid, unit)
        return (row.unsqueeze(2) * (self.grid * unit) + column.unsqueeze(1)).flatten(1)


def _right(image: Tensor, unit: Tensor, images: int, grid: int) -> Tensor:
    """bool []: whether images ascend and every unit is inside and there once. Rows and columns wrap around: a unit out
    of range would be taken for another one.
    """
    units = images * grid**2
    inside = (image >= 0) & (image < images) & (unit >= 0) & (unit < grid**2)
    number = torch.where(inside, image * grid**2 + unit, units)
    times = number.new_zeros(units + 1).scatter_add(0, number, torch.ones_like(number))
    return (times[:-1] <= 1).all() & (times[-1] == 0) & (image[1:] >= image[:-1]).all()


def _coordinates(number: Tensor, grid: int, unit: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the tokens of units [M] in their image: two int64 [M, unit]."""
    step = torch.arange(unit, device=number.device)
    return (number // grid * unit).unsqueeze(1) + step, (number % grid * unit).unsqueeze(1) + step


def _few(numbers: Tensor) -> str:
    listed = ", ".join(map(str, numbers[:8].tolist()))
    return f"[{listed}{', ...' if len(numbers) > 8 else ''}]"


def _windows(image: Tensor, unit: Tensor, right: Tensor, images: int, grid: int, cut: Cut) -> Windows:
    """``right``, bool []: whether ``image`` and ``unit`` are as they should be; if not, ``start`` is -1 throughout."""
    side, (_, window, shift) = grid * cut.unit, cut
    if side % window:
        raise ValueError(f"UnitPlan: windows of {window} tokens must tile a grid of {side} x {side}")
    across = side // window
    row, column = ((x - shift) % side for x in _coordinates(unit, grid, cut.unit))  # [M, u] after the shift
    where = ((image * across).unsqueeze(1) + row // window).unsqueeze(2) * across + (column // window).unsqueeze(1)
    place = (row % window * window).unsqueeze(2) + (column % window).unsqueeze(1)  # [M, u, u]
    # Tokens in the order of windows, and of places inside: a counting sort of cells that hold one token or none.
    cell = (where * window**2 + place).flatten() * right  # [N]
    held = torch.zeros(images * side * side, dtype=torch.int64, device=cell.device).scatter(0, cell, 1).cumsum(0)
    rank = held[cell] - 1
    member = torch.zeros_like(rank).scatter(0, rank, torch.arange(len(rank), device=rank.device))
    start = torch.where(right, torch.cat([held.new_zeros(1), held[window**2 - 1 :: window**2]]), -1)
    region = None
    if shift:
        parts = [(x >= side - window).long() + (x >= side - shift).long() for x in (row, column)]  # 0, 1 or 2
        region = (3 * parts[0].unsqueeze(2) + parts[1].unsqueeze(1)).flatten()[member]
    return Windows(member, start, place.flatten()[member], region)
