"""Paint the frames of a scene: players with their instruments, poses that follow the movement, indoor and
outdoor scenery.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sparsify.synth.pen import Color, Pen, shade
from sparsify.synth.portraits import PORTRAITS
from sparsify.synth.scene import Player, Scene

__all__ = ["paint_frames"]

Frame = NDArray[np.uint8]  # [size, size, 3]
Sprite = NDArray[np.uint8]  # [h, w, 4]

PHASES = (-1, 0, 1, 0)  # of a movement, in turn
PHASE_SECONDS = 0.36  # not a divisor of a second: frames sampled a second apart show different phases
LOOKS: tuple[tuple[Color, Color, Color], ...] = (  # skin, hair, clothes: pale, so that the instrument stands out
    ((240, 200, 170), (70, 50, 40), (150, 160, 176)),
    ((196, 142, 104), (30, 26, 26), (176, 168, 158)),
    ((252, 214, 184), (170, 120, 60), (140, 150, 146)),
)
TROUSERS = (86, 90, 104)
SCREEN = (104, 112, 84)


def paint_frames(scene: Scene, fps: float) -> Iterator[Frame]:
    """The frames of the clip, uint8 ``[size, size, 3]``, at ``fps``; consecutive equal frames are the same array."""
    rng = np.random.default_rng(scene.seed + 1)
    still = _background(scene, rng)
    cast = [(p, int(rng.integers(len(LOOKS))), float(rng.uniform(0, len(PHASES)))) for p in scene.players]
    for player, look, _ in cast:
        if player.hidden or not player.moving:  # painted once, behind those that move
            _put(still, player, look, None)
    movers = [entry for entry in cast if entry[0].moving]
    last_poses, frame = None, still
    for i in range(round(scene.seconds * fps)):
        poses = [_pose(player, (i + 0.5) / fps, start) for player, _, start in movers]
        if poses != last_poses:
            frame = still.copy()
            for (player, look, _), pose in zip(movers, poses, strict=True):
                _put(frame, player, look, pose)
            last_poses = poses
        yield frame


def _pose(player: Player, time: float, start: float) -> int | None:
    """Index into ``PHASES``, None at rest."""
    if not any(a <= time < b for a, b in player.moving):
        return None
    return int(time / PHASE_SECONDS + start) % len(PHASES)


def _put(frame: Frame, player: Player, look: int, pose: int | None) -> None:
    x0, y0, x1, y1 = player.box
    phase = None if pose is None else PHASES[pose]
    sprite = _sprite("screen" if player.hidden else player.instrument, phase, look, x1 - x0, y1 - y0)
    top = max(0, -y0)  # a box may reach above the picture
    left = max(0, -x0)
    region = frame[y0 + top : y1, x0 + left : x1]
    sprite = sprite[top : top + region.shape[0], left : left + region.shape[1]]
    alpha = sprite[..., 3:].astype(np.uint16)
    region[:] = (region * (255 - alpha) + sprite[..., :3] * alpha) // 255


@functools.lru_cache(maxsize=4096)
def _sprite(name: str, phase: int | None, look: int, width: int, height: int) -> Sprite:
    """RGBA, colours not premultiplied. Drawn at three times its final size or more, then reduced."""
    image = _drawing(name, phase, look, -(-width // 52))
    return np.asarray(image.resize((width, height), Image.Resampling.BOX, reducing_gap=3.0))


@functools.lru_cache(maxsize=512)
def _drawing(name: str, phase: int | None, look: int, magnify: int) -> Image.Image:
    pen = Pen(1.56 * magnify * 2)
    if name == "screen":
        _draw_screen(pen)
    else:
        _draw_player(pen, name, phase, LOOKS[look])
    return pen.image.reduce(2)


def _draw_player(pen: Pen, name: str, phase: int | None, look: tuple[Color, Color, Color]) -> None:
    """The body, the instrument over it, and the arms over both: hanging at rest, raised to the instrument when
    moving.
    """
    skin, hair, cloth = look
    lean = 0 if phase is None else 8 * phase  # the upper body sways with the music
    pen.polygon([(34, 112), (66, 112), (66, 194), (54, 194), (50, 130), (46, 194), (34, 194)], TROUSERS)
    pen.polygon([(31 + lean, 66), (69 + lean, 66), (67, 128), (33, 128)], cloth, shade(cloth, 0.75), 1.5)
    pen.disc(50 + lean, 44, 15, skin)
    pen.ellipse(50 + lean, 33, 15.5, 8, hair)
    for x in (45, 55):
        pen.disc(x + lean, 44, 1.8, (40, 34, 34))
    hands = PORTRAITS[name](pen, phase or 0)
    sleeve = shade(cloth, 0.82)
    if phase is None:
        for x, out in ((29, -11), (71, 11)):
            pen.line([(x, 72), (x + out, 100), (x + out, 126)], 9, sleeve)
            pen.disc(x + out, 132, 7, skin)
        return
    by_side = sorted(hands)
    for hand, shoulder, elbow in zip(by_side, ((30 + lean, 72), (70 + lean, 72)), (-14, 14), strict=True):
        bend = ((shoulder[0] + hand[0]) / 2 + elbow, (shoulder[1] + hand[1]) / 2 + 10)
        pen.line([shoulder, bend, hand], 8, sleeve)
        pen.disc(*hand, 9.5, skin)


def _draw_screen(pen: Pen) -> None:
    """A folding screen as high as a player."""
    for i in range(4):
        x0, x1 = 2 + 24 * i, 26 + 24 * i
        up, down = (0, 5) if i % 2 else (5, 0)
        pen.polygon(
            [(x0, 14 + up), (x1, 14 + down), (x1, 192 + down), (x0, 192 + up)],
            shade(SCREEN, 0.85 + 0.3 * (i % 2)),
            (60, 64, 48),
            2,
        )


def _background(scene: Scene, rng: np.random.Generator) -> Frame:
    image = Image.new("RGB", (scene.size, scene.size))
    draw = ImageDraw.Draw(image)
    paint = _indoor if scene.place == "indoor" else _outdoor
    paint(draw, scene.size, rng)
    light = np.clip(np.arange(256) * rng.uniform(0.9, 1.06), 0, 255).astype(np.uint8)
    return light[np.asarray(image)]


def _vary(color: Color, rng: np.random.Generator, amount: int = 12) -> Color:
    r, g, b = (int(np.clip(c + rng.integers(-amount, amount + 1), 0, 255)) for c in color)
    return r, g, b


def _indoor(draw: ImageDraw.ImageDraw, size: int, rng: np.random.Generator) -> None:
    """A wall, boards, and a picture or a lamp on the wall."""
    walls: tuple[Color, ...] = ((226, 212, 190), (212, 204, 200), (222, 200, 182))
    wall = _vary(walls[int(rng.integers(len(walls)))], rng)
    floor_at = round(size * rng.uniform(0.74, 0.82))
    draw.rectangle((0, 0, size, size), fill=wall)
    boards = _vary((168, 128, 96), rng)
    draw.rectangle((0, floor_at, size, size), fill=boards)
    for i in range(5):
        row = floor_at + (size - floor_at) * i // 5
        draw.line((0, row, size, row), fill=shade(boards, 0.85))
    x = size * rng.uniform(0.05, 0.75)
    y, w = size * 0.06, size * rng.uniform(0.14, 0.24)
    draw.rectangle(
        (x, y, x + w, y + 0.8 * w), fill=_vary((186, 194, 200), rng), outline=(120, 100, 80), width=max(1, size // 64)
    )
    x = size * rng.uniform(0.1, 0.9)
    draw.line((x, 0, x, size * 0.08), fill=(90, 90, 90))
    draw.polygon(
        ((x - size * 0.05, size * 0.12), (x + size * 0.05, size * 0.12), (x, size * 0.06)), fill=(250, 236, 180)
    )


def _outdoor(draw: ImageDraw.ImageDraw, size: int, rng: np.random.Generator) -> None:
    """Sky, sun, hills, trees and a meadow."""
    ground_at = round(size * rng.uniform(0.66, 0.76))
    sky, meadow = _vary((160, 206, 244), rng), _vary((150, 196, 120), rng)
    for row in range(ground_at):
        draw.line((0, row, size, row), fill=shade(sky, 0.95 + 0.13 * row / ground_at))
    x, y, r = size * rng.uniform(0.1, 0.9), size * 0.1, size * 0.05
    draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 244, 190))
    hill = _vary((140, 178, 150), rng)
    for _ in range(2):
        x, r = size * rng.uniform(0, 1), size * rng.uniform(0.3, 0.5)
        draw.ellipse((x - r, ground_at - 0.3 * r, x + r, ground_at + r), fill=hill)
    for _ in range(int(rng.integers(1, 4))):
        x, r = size * rng.uniform(0, 1), size * rng.uniform(0.05, 0.09)
        draw.line((x, ground_at - 2 * r, x, ground_at), fill=(130, 106, 84), width=max(1, size // 48))
        draw.ellipse((x - r, ground_at - 4 * r, x + r, ground_at - 1.6 * r), fill=_vary((116, 164, 104), rng))
    draw.rectangle((0, ground_at, size, size), fill=meadow)
