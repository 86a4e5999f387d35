"""Images as mask units: square blocks that a mask keeps or drops whole.

An image [C, H, W] cut into blocks of ``unit`` x ``unit`` pixels becomes [U, C * unit * unit], one row a block, so that
a kept block is one contiguous run of bytes: what is masked is never read. Block ``u`` is row ``u // gw``, column ``u %
gw`` of the ``gh`` x ``gw`` grid (row-major); inside a row of the result the block is flattened as [C, unit, unit].
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["from_units", "to_units"]


def to_units(image: Tensor, unit: int) -> Tensor:
    """Cut images into mask units.

    Args:
        image: [..., C, H, W] of any dtype; H and W are multiples of ``unit``.
        unit: side of a unit in pixels.

    Returns:
        [..., U, C * unit * unit], contiguous, with U = (H / unit) * (W / unit).

    Raises:
        ValueError: the image has fewer than three dimensions, or a side that units do not tile.
    """
    if image.dim() < 3:
        raise ValueError(f"to_units: expected an image [..., C, H, W], got shape {list(image.shape)}")
    *lead, channels, height, width = image.shape
    if unit < 1 or height % unit or width % unit:
        raise ValueError(f"to_units: units of {unit} px do not tile an image of {height} x {width}")
    gh, gw = height // unit, width // unit
    blocks = image.reshape(*lead, channels, gh, unit, gw, unit)
    n = len(lead)
    blocks = blocks.permute(*range(n), n + 1, n + 3, n, n + 2, n + 4)  # [..., gh, gw, C, unit, unit]
    return blocks.reshape(*lead, gh * gw, channels * unit * unit).contiguous()


def from_units(units: Tensor, unit: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of ``to_units``.

    Args:
        units: [..., U, C * unit * unit].
        unit: side of a unit in pixels.
        grid: units down and across, (gh, gw) with gh * gw = U.

    Returns:
        [..., C, gh * unit, gw * unit], contiguous.

    Raises:
        ValueError: the shape does not fit ``unit`` and ``grid``.
    """
    gh, gw = grid
    if units.dim() < 2 or units.shape[-2] != gh * gw or unit < 1 or units.shape[-1] % (unit * unit):
        raise ValueError(
            f"from_units: expected [..., {gh * gw}, C * {unit} * {unit}] for a grid of {gh} x {gw}, "
            f"got {list(units.shape)}"
        )
    *lead, _, values = units.shape
    channels = values // (unit * unit)
    blocks = units.reshape(*lead, gh, gw, channels, unit, unit)
    n = len(lead)
    blocks = blocks.permute(*range(n), n + 2, n, n + 3, n + 1, n + 4)  # [..., C, gh, unit, gw, unit]
    return blocks.reshape(*lead, channels, gh * unit, gw * unit).contiguous()
