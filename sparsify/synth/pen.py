"""A pen over a PIL image in the units of a player's cell: 100 wide, 200 high, whatever the pixels."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw

__all__ = ["CELL_HEIGHT", "CELL_WIDTH", "Color", "Pen", "Point", "shade"]

CELL_WIDTH, CELL_HEIGHT = 100, 200

Color = tuple[int, int, int]
Point = tuple[float, float]


def shade(color: Color, factor: float) -> Color:
    """``color`` darker (``factor`` < 1) or lighter."""
    r, g, b = (max(0, min(255, round(c * factor))) for c in color)
    return r, g, b


class Pen:
    """Draws on a transparent image of ``100 * scale`` x ``200 * scale`` pixels."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.image = Image.new("RGBA", (round(CELL_WIDTH * scale), round(CELL_HEIGHT * scale)), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.image)

    def _points(self, points: list[Point]) -> list[Point]:
        return [(x * self.scale, y * self.scale) for x, y in points]

    def line(self, points: list[Point], width: float, color: Color) -> None:
        """A stroke with round ends and joints."""
        self._draw.line(self._points(points), fill=color, width=max(1, round(width * self.scale)), joint="curve")
        for x, y in (points[0], points[-1]):
            self.disc(x, y, width / 2, color)

    def polygon(self, points: list[Point], color: Color, edge: Color | None = None, width: float = 1.0) -> None:
        self._draw.polygon(self._points(points), fill=color)
        if edge is not None:
            self.line([*points, points[0]], width, edge)

    def disc(self, x: float, y: float, r: float, color: Color) -> None:
        self.ellipse(x, y, r, r, color)

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, color: Color, edge: Color | None = None, width: float = 1.5
    ) -> None:
        s = self.scale
        box = ((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s)
        self._draw.ellipse(box, fill=color, outline=edge, width=max(1, round(width * s)) if edge else 0)

    def rect(self, x0: float, y0: float, x1: float, y1: float, color: Color, radius: float = 0.0) -> None:
        s = self.scale
        self._draw.rounded_rectangle((x0 * s, y0 * s, x1 * s, y1 * s), radius=radius * s, fill=color)

    def bar(self, a: Point, b: Point, width_a: float, width_b: float, color: Color) -> None:
        """A cone or beam from ``a`` to ``b`` with the given widths at its ends."""
        length = math.hypot(b[0] - a[0], b[1] - a[1]) or 1.0
        nx, ny = -(b[1] - a[1]) / length / 2, (b[0] - a[0]) / length / 2
        self.polygon(
            [
                (a[0] + nx * width_a, a[1] + ny * width_a),
                (b[0] + nx * width_b, b[1] + ny * width_b),
                (b[0] - nx * width_b, b[1] - ny * width_b),
                (a[0] - nx * width_a, a[1] - ny * width_a),
            ],
            color,
        )
