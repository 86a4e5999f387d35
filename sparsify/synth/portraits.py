"""Draw each of the 22 instruments with its player: big, in its own shape and colour, so that 25 pixels of width are
enough to name it.

Every drawing takes the pen and the pose: ``phase`` in {-1, 0, 1} moves hands, bows and sticks of a player that
moves; a player at rest (``phase`` None) holds the instrument still, arms hanging down. It returns where the two
hands are when they are on the instrument.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from sparsify.synth.pen import Color, Pen, Point, shade

__all__ = ["PORTRAITS"]

Hands = tuple[Point, Point]

WHITE, BLACK, GOLD = (245, 243, 235), (28, 27, 32), (238, 184, 36)
BOW = (250, 246, 230)


def _bow(pen: Pen, x: float, y: float, phase: int, slope: float = -0.18) -> Point:
    """A bow across ``(x, y)``; returns its frog, where the hand is."""
    shift = 17 * phase
    left, right = (x - 30 + shift, y - 30 * slope), (x + 36 + shift, y + 36 * slope)
    pen.line([left, right], 3.2, (90, 45, 20))
    pen.line([(left[0], left[1] + 3), (right[0], right[1] + 3)], 1.8, BOW)
    return right


def _fiddle(pen: Pen, x: float, y: float, s: float, color: Color, angle: float = 0.0) -> None:
    """A violin body around ``(x, y)``, its neck upwards, turned by ``angle`` (radians, clockwise), ``s`` units long."""

    def at(u: float, v: float) -> Point:
        return x + s * (u * math.cos(angle) - v * math.sin(angle)), y + s * (u * math.sin(angle) + v * math.cos(angle))

    for v, r in ((0.2, 0.31), (-0.2, 0.25), (0.0, 0.2)):
        px, py = at(0, v)
        pen.ellipse(px, py, r * s, r * s, color, shade(color, 0.5), 1.6)
    px, py = at(0, 0)
    pen.ellipse(px, py, 0.2 * s, 0.26 * s, color)
    pen.line([at(0, 0.1), at(0, -0.95)], 0.1 * s, BLACK)
    pen.disc(*at(0, -0.98), 0.075 * s, shade(color, 0.6))
    pen.line([at(0, 0.12), at(0, 0.4)], 0.1 * s, BLACK)


def violin(pen: Pen, phase: int) -> Hands:
    _fiddle(pen, 46, 74, 58, (204, 92, 22), angle=-1.2)
    hand = _bow(pen, 44, 68, phase, slope=-0.55)
    return (8, 62), hand


def cello(pen: Pen, phase: int) -> Hands:
    pen.line([(50, 160), (50, 196)], 2.5, BLACK)
    _fiddle(pen, 50, 132, 92, (168, 58, 20))
    hand = _bow(pen, 50, 142, phase, slope=0.1)
    return (54, 78 + 6 * phase), hand


def erhu(pen: Pen, phase: int) -> Hands:
    pen.line([(46, 20), (46, 150)], 4, (74, 18, 22))
    for y in (34, 50):
        pen.line([(46, y), (62, y - 3)], 4, (74, 18, 22))
    pen.polygon([(32, 136), (40, 128), (56, 128), (64, 136), (64, 152), (56, 160), (40, 160), (32, 152)], (74, 18, 22))
    pen.disc(48, 144, 12, (172, 190, 140))
    hand = _bow(pen, 48, 126, phase, slope=0.0)
    return (46, 84 + 8 * phase), hand


def _guitar(
    pen: Pen, x: float, y: float, s: float, body: Color, angle: float, hole: Color = BLACK
) -> Callable[[float, float], Point]:
    def at(u: float, v: float) -> Point:
        return x + s * (u * math.cos(angle) - v * math.sin(angle)), y + s * (u * math.sin(angle) + v * math.cos(angle))

    for u, r in ((-0.16, 0.36), (0.26, 0.28)):
        pen.ellipse(*at(u, 0), r * s, r * s, body, shade(body, 0.5), 1.8)
    pen.ellipse(*at(0.05, 0), 0.24 * s, 0.24 * s, body)
    pen.line([at(0.1, 0), at(1.05, 0)], 0.11 * s, (66, 38, 22))
    pen.bar(at(1.02, 0), at(1.25, 0), 0.15 * s, 0.2 * s, (40, 26, 20))
    pen.disc(*at(0.1, 0), 0.125 * s, hole)
    pen.line([at(-0.3, -0.1), at(-0.3, 0.1)], 0.06 * s, (50, 28, 18))
    return at


def acoustic_guitar(pen: Pen, phase: int) -> Hands:
    at = _guitar(pen, 44, 120, 58, (240, 190, 110), -0.42)
    x, y = at(-0.05, 0.0)
    return at(0.85 - 0.12 * phase, 0.05), (x, y + 15 * phase)


def ukulele(pen: Pen, phase: int) -> Hands:
    at = _guitar(pen, 38, 98, 48, (246, 96, 150), -0.3)
    x, y = at(0.0, 0.0)
    return at(0.9, 0.05), (x, y + 15 * phase)


def electric_bass(pen: Pen, phase: int) -> Hands:
    blue = (36, 84, 214)
    angle = -0.55
    c, s = math.cos(angle), math.sin(angle)

    def at(u: float, v: float) -> Point:
        return 38 + u * c - v * s, 132 + u * s + v * c

    outline = [
        (-26, -14),
        (-4, -16),
        (8, -22),
        (26, -20),
        (14, -9),
        (14, 7),
        (24, 17),
        (8, 19),
        (-6, 15),
        (-24, 17),
        (-32, 2),
    ]
    pen.polygon([at(u, v) for u, v in outline], blue, shade(blue, 0.5), 2.5)
    pen.polygon([at(u, v) for u, v in [(-14, -6), (8, -9), (10, 9), (-12, 9)]], WHITE)
    pen.line([at(4, 0), at(84, 0)], 6, (52, 32, 22))
    pen.bar(at(80, 0), at(98, -3), 8, 13, blue)
    x, y = at(-6, 0)
    return at(62 - 9 * phase, 2), (x, y + 12 * phase)


def banjo(pen: Pen, phase: int) -> Hands:
    pen.line([(40, 122), (90, 70)], 6, (92, 54, 28))
    pen.bar((86, 74), (97, 61), 7, 10, (60, 34, 20))
    pen.disc(40, 122, 28, (120, 84, 44))
    pen.disc(40, 122, 24, (206, 206, 210))
    pen.disc(40, 122, 21, (252, 252, 248))
    pen.line([(34, 138), (48, 134)], 3, (92, 54, 28))
    return (76 - 6 * phase, 85 + 6 * phase), (40, 120 + 14 * phase)


def pipa(pen: Pen, phase: int) -> Hands:
    body, dark = (236, 206, 138), (86, 46, 24)
    pen.line([(50, 96), (50, 30)], 9, dark)
    pen.line([(50, 32), (42, 18)], 8, dark)
    for y in (42, 52, 62):
        pen.line([(38, y), (62, y)], 3, dark)
    pen.polygon(
        [
            (45, 78),
            (55, 78),
            (66, 104),
            (76, 130),
            (74, 152),
            (62, 166),
            (50, 169),
            (38, 166),
            (26, 152),
            (24, 130),
            (34, 104),
        ],
        body,
        dark,
        3,
    )
    for y in (92, 102, 112, 120):
        pen.line([(43, y), (57, y)], 2, dark)
    pen.line([(40, 150), (60, 150)], 4, dark)
    return (48, 70 + 9 * phase), (60 + 4 * phase, 134 + 10 * phase)


def guzheng(pen: Pen, phase: int) -> Hands:
    wood, dark = (206, 158, 96), (96, 44, 30)
    for x in (18, 82):
        pen.line([(x, 150), (x - 6, 194)], 4, dark)
        pen.line([(x, 150), (x + 6, 194)], 4, dark)
    pen.polygon([(4, 136), (94, 124), (98, 146), (6, 160)], wood, dark, 2.5)
    pen.polygon([(4, 136), (14, 135), (16, 159), (6, 160)], dark)
    pen.polygon([(87, 125), (94, 124), (98, 146), (90, 147)], dark)
    for i in range(5):
        y0, y1 = 138 + 4 * i, 129 + 4 * i
        pen.line([(14, y0), (88, y1)], 0.9, WHITE)
    for i in range(6):
        pen.disc(26 + 10 * i, 138 + 2.4 * (5 - i) + 2, 2.6, (252, 250, 240))
    return (32 + 8 * phase, 138), (66 - 8 * phase, 132 + 5 * phase)


def piano(pen: Pen, phase: int) -> Hands:
    black = (20, 20, 24)
    pen.rect(2, 108, 98, 186, black, 2)
    pen.rect(2, 100, 98, 110, (52, 52, 60), 2)
    pen.rect(4, 136, 96, 152, (252, 252, 250))
    for i in range(11):
        x = 10 + 8 * i
        if i % 7 not in (2, 6):
            pen.rect(x, 136, x + 4, 145, black)
    pen.rect(8, 186, 15, 197, black)
    pen.rect(85, 186, 92, 197, black)
    pen.rect(34, 112, 66, 130, WHITE)
    return (30 + 9 * phase, 141 - 4 * phase), (70 + 9 * phase, 141 + 4 * phase)


def accordion(pen: Pen, phase: int) -> Hands:
    red, pull = (216, 30, 40), 5 * phase
    left, right = 15 - pull, 85 + pull
    pen.rect(left + 8, 76, right - 8, 128, (250, 240, 232))
    folds = 6
    for i in range(1, folds):
        x = left + 10 + (right - left - 20) * i / folds
        pen.line([(x, 76), (x, 128)], 2.6, (90, 20, 28))
    pen.rect(left - 8, 70, left + 14, 134, red, 4)
    pen.rect(right - 14, 70, right + 8, 134, red, 4)
    pen.rect(left - 5, 76, left + 3, 128, WHITE)
    for i in range(6):
        pen.rect(left - 5, 82 + 8 * i, left, 85 + 8 * i, BLACK)
    for i in range(4):
        pen.disc(right + 1, 82 + 13 * i, 3, WHITE)
    return (left - 3, 104 + 5 * phase), (right + 4, 104 - 5 * phase)


def bagpipe(pen: Pen, phase: int) -> Hands:
    green = (22, 120, 62)
    for x0, y0, x1, y1 in ((60, 82, 66, 4), (68, 84, 82, 8), (76, 88, 97, 16)):
        pen.line([(x0, y0), (x1, y1)], 5, BLACK)
        pen.disc(x1, y1, 4.5, WHITE)
    swell = 2 * phase
    pen.ellipse(58, 104, 31 + swell, 24 + swell, green, shade(green, 0.5), 2)
    for i in range(-2, 3):
        pen.line([(58 + 11 * i, 86), (54 + 11 * i, 122)], 1.8, (206, 40, 40))
    for y in (95, 105, 115):
        pen.line([(32, y), (84, y)], 1.5, (240, 214, 70))
    pen.line([(46, 122), (36, 168)], 6, BLACK)
    pen.disc(36, 168, 4.5, WHITE)
    pen.line([(48, 86), (50, 52)], 3.5, BLACK)
    return (40, 150 + 6 * phase), (43, 136 - 5 * phase)


def flute(pen: Pen, phase: int) -> Hands:
    y = 50 + 3 * phase
    pen.line([(38, y), (98, y + 9)], 11, (104, 116, 134))
    pen.line([(38, y), (98, y + 9)], 8, (226, 234, 242))
    for i in range(5):
        pen.disc(58 + 8 * i, y + 3 + 1.2 * i, 2.4, (104, 116, 134))
    return (62, y + 14), (88, y + 17 + 4 * phase)


def clarinet(pen: Pen, phase: int) -> Hands:
    tip = (36 + 5 * phase, 158)
    pen.bar((50, 56), tip, 7, 9, BLACK)
    pen.bar((tip[0] + 2, tip[1] - 10), (tip[0] - 3, tip[1] + 8), 9, 24, BLACK)
    for f in (0.25, 0.42, 0.58, 0.74):
        x, y = 50 + (tip[0] - 50) * f, 56 + (tip[1] - 56) * f
        pen.disc(x + 2, y, 3.4, (226, 230, 236))
    return (47, 92 + 5 * phase), (42 + 2 * phase, 122 - 5 * phase)


def bassoon(pen: Pen, phase: int) -> Hands:
    wood = (122, 24, 30)
    s = 4 * phase
    pen.bar((78 - s, 8), (28 + s, 174), 11, 15, wood)
    pen.bar((79 - s, 4), (75 - s, 17), 14, 12, WHITE)
    pen.line([(52, 54), (60, 62), (64, 72)], 3, (216, 220, 226))
    for f in (0.3, 0.45, 0.6, 0.75, 0.88):
        x, y = 78 - s + (28 + 2 * s - 78) * f, 8 + 166 * f
        pen.disc(x + 3, y, 3, (222, 226, 232))
    return (62, 80 + 6 * phase), (42, 128 - 6 * phase)


def saxophone(pen: Pen, phase: int) -> Hands:
    s = 4 * phase
    pen.line([(50, 56), (62, 58), (66, 70)], 5, shade(GOLD, 0.8))
    pen.bar((66, 68), (56 + s, 140), 8, 15, GOLD)
    pen.line([(56 + s, 140), (48 + s, 158), (34 + s, 158), (26 + s, 140)], 17, GOLD)
    pen.bar((28 + s, 148), (18 + s, 108), 16, 36, GOLD)
    pen.ellipse(18 + s, 108, 18, 6, (150, 96, 10))
    for f in (0.15, 0.4, 0.65, 0.9):
        pen.disc(66 - 9 * f, 70 + 66 * f, 3.8, (255, 240, 180))
    return (68, 88 + 6 * phase), (60, 122 - 6 * phase)


def trumpet(pen: Pen, phase: int) -> Hands:
    y = 60 + 5 * phase
    pen.line([(42, 54), (76, y)], 8, GOLD)
    pen.bar((66, y), (98, y + 1), 10, 46, GOLD)
    pen.ellipse(96, y + 1, 4, 22, (160, 100, 12))
    pen.line([(50, 60), (50, 80), (78, y + 20), (78, y + 2)], 6, shade(GOLD, 0.85))
    for x in (56, 64, 72):
        pen.line([(x, y - 10), (x, y + 20)], 5.5, shade(GOLD, 0.72))
    return (52, y + 22), (66, y - 14 - 4 * phase)


def tuba(pen: Pen, phase: int) -> Hands:
    brass = (206, 170, 70)
    s = 3 * phase
    pen.bar((66, 92), (64 + s, 18), 18, 52, brass)
    pen.ellipse(64 + s, 18, 30, 10, shade(brass, 0.55), brass, 3)
    for rx, ry, f in ((34, 44, 1.0), (20, 28, 0.85)):
        pen.ellipse(52, 128, rx, ry, shade(brass, f), shade(brass, 0.5), 2.4)
    pen.ellipse(52, 128, 9, 14, (84, 84, 96))
    for x in (38, 46, 54):
        pen.line([(x, 96), (x, 118)], 5, (252, 240, 200))
    pen.line([(50, 58), (36, 66), (30, 100)], 5, brass)
    return (22, 124), (46, 96 + 5 * phase)


def suona(pen: Pen, phase: int) -> Hands:
    tip = (24 - 3 * phase, 118 + 7 * phase)
    pen.bar((50, 57), tip, 6, 13, (70, 36, 26))
    pen.bar((tip[0] + 5, tip[1] - 8), (tip[0] - 10, tip[1] + 25), 14, 42, (224, 150, 40))
    pen.ellipse(tip[0] - 10, tip[1] + 25, 20, 9, (150, 84, 16))
    pen.disc(49, 58, 6, (232, 190, 80))
    for f in (0.3, 0.5, 0.7):
        pen.disc(50 + (tip[0] - 50) * f, 57 + (tip[1] - 57) * f, 2.6, WHITE)
    return (44, 74 + 4 * phase), (34, 98 + 4 * phase)


def drum(pen: Pen, phase: int) -> Hands:
    shell = (122, 40, 156)
    pen.disc(50, 158, 32, shell)
    pen.disc(50, 158, 26, WHITE)
    pen.disc(50, 158, 8, shell)
    for x in (30, 70):
        pen.rect(x - 15, 110, x + 15, 130, shell, 3)
        pen.ellipse(x, 110, 15, 5, WHITE)
    for x, tilt in ((14, -4), (86, 4)):
        pen.line([(x, 92), (x, 194)], 2.5, (120, 124, 130))
        pen.polygon(
            [(x - 14, 90 + tilt), (x + 14, 90 - tilt), (x + 14, 94 - tilt), (x - 14, 94 + tilt)], (246, 204, 60)
        )
    left, right = (34, 92 - 15 * phase), (66, 92 + 15 * phase)
    for hand, end in ((left, (26, 106 - 13 * phase)), (right, (74, 106 + 13 * phase))):
        pen.line([hand, end], 3.2, (246, 214, 150))
    return left, right


def congas(pen: Pen, phase: int) -> Hands:
    teal = (18, 158, 160)
    for x in (27, 73):
        pen.polygon(
            [(x - 19, 120), (x + 19, 120), (x + 23, 146), (x + 13, 194), (x - 13, 194), (x - 23, 146)],
            teal,
            shade(teal, 0.5),
            2,
        )
        for y, w in ((130, 20), (176, 16)):
            pen.line([(x - w, y), (x + w, y)], 3, (226, 230, 232))
        pen.ellipse(x, 119, 20, 7, (248, 238, 214), BLACK, 1.6)
    return (30, 112 - 13 * max(phase, 0)), (70, 112 - 13 * max(-phase, 0))


def xylophone(pen: Pen, phase: int) -> Hands:
    colors = (
        (220, 40, 40),
        (240, 130, 30),
        (246, 214, 40),
        (70, 180, 70),
        (40, 160, 200),
        (50, 80, 200),
        (140, 60, 180),
    )
    for x in (14, 86):
        pen.line([(x, 150), (x, 195)], 4, (90, 60, 40))
    for i, color in enumerate(colors):
        x, half = 8 + 14 * i, 22 - 2 * i
        pen.rect(x - 5.5, 144 - half, x + 5.5, 144 + half, color, 2)
    for slope in (-1, 1):
        pen.line([(4, 144 + slope * 13), (96, 144 + slope * 6)], 2.4, (90, 60, 40))
    left, right = (30 + 6 * phase, 112 - 7 * phase), (70 + 6 * phase, 112 + 7 * phase)
    for hand, x in ((left, 26 + 12 * phase), (right, 66 + 12 * phase)):
        end = (x, 136 - 6 * phase)
        pen.line([hand, end], 2.6, (240, 220, 180))
        pen.disc(*end, 4.5, (40, 40, 48))
    return left, right


_ALL = (
    accordion, acoustic_guitar, bagpipe, banjo, bassoon, cello, clarinet, congas, drum, electric_bass, erhu, flute,
    guzheng, piano, pipa, saxophone, suona, trumpet, tuba, ukulele, violin, xylophone,
)  # fmt: skip

PORTRAITS: dict[str, Callable[[Pen, int], Hands]] = {portrait.__name__: portrait for portrait in _ALL}
