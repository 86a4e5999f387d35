from __future__ import annotations

import pytest
import torch

from sparsify.data.units import from_units, to_units


def test_units_of_a_literal_image() -> None:
    image = torch.arange(2 * 4 * 6).reshape(2, 4, 6)
    units = to_units(image, 2)
    assert units.tolist() == [
        [0, 1, 6, 7, 24, 25, 30, 31],
        [2, 3, 8, 9, 26, 27, 32, 33],
        [4, 5, 10, 11, 28, 29, 34, 35],
        [12, 13, 18, 19, 36, 37, 42, 43],
        [14, 15, 20, 21, 38, 39, 44, 45],
        [16, 17, 22, 23, 40, 41, 46, 47],
    ]
    assert units.is_contiguous()


@pytest.mark.parametrize(
    ("shape", "unit"),
    [((3, 8, 8), 8), ((1, 1, 1), 1), ((5, 3, 6, 4), 2), ((2, 3, 1, 9, 6), 3), ((0, 3, 4, 4), 2), ((2, 0, 3, 4, 4), 4)],
)
def test_units_go_back_to_the_image(shape: tuple[int, ...], unit: int) -> None:
    image = torch.randint(0, 255, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    grid = (shape[-2] // unit, shape[-1] // unit)
    units = to_units(image, unit)
    assert units.shape == (*shape[:-3], grid[0] * grid[1], shape[-3] * unit * unit)
    assert units.dtype == torch.uint8
    assert torch.equal(from_units(units, unit, grid), image)


def test_units_of_a_channels_last_view() -> None:
    image = torch.randint(0, 255, (2, 4, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    view = image.permute(0, 3, 1, 2)
    assert not view.is_contiguous()
    assert torch.equal(to_units(view, 2), to_units(view.contiguous(), 2))


@pytest.mark.parametrize(
    ("shape", "unit", "message"),
    [
        ((4, 4), 2, r"to_units: expected an image \[..., C, H, W\], got shape \[4, 4\]"),
        ((3, 4, 5), 2, "units of 2 px do not tile an image of 4 x 5"),
        ((3, 4, 4), 0, "units of 0 px do not tile an image of 4 x 4"),
    ],
)
def test_units_refuse(shape: tuple[int, ...], unit: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_units(torch.zeros(shape), unit)


@pytest.mark.parametrize("shape", [(4,), (5, 12), (4, 13)])
def test_from_units_refuses(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"from_units: expected \[..., 4, C \* 2 \* 2\] for a grid of 2 x 2"):
        from_units(torch.zeros(shape), 2, (2, 2))
