"""What a rendered clip shows and plays: the ground truth from which pictures, sound, questions and answers are all
made.

Times are seconds from the start of the clip, boxes pixels ``(x0, y0, x1, y1)`` with ``x1`` and ``y1`` exclusive,
levels dB (K-weighted as in ITU-R BS.1770, averaged over the time a voice sounds; only differences within a clip are
meaningful), rates notes a second.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

__all__ = ["Interval", "Player", "Scene", "Voice", "duration", "overlap", "place_name"]

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Voice:
    """One source of sound. ``part`` tells the voices of one instrument apart: each plays in a register of its own."""

    instrument: str
    sounding: tuple[Interval, ...]
    level: float
    rate: float
    part: int = 0

    @property
    def onset(self) -> float:
        return self.sounding[0][0]

    @property
    def end(self) -> float:
        return self.sounding[-1][1]


@dataclass(frozen=True, slots=True)
class Player:
    """A musician, from left to right in ``Scene.players``.

    A hidden one stands behind a screen: heard at most, never seen.
    """

    instrument: str
    box: tuple[int, int, int, int]
    moving: tuple[Interval, ...]
    voice: Voice | None
    hidden: bool = False


@dataclass(frozen=True, slots=True)
class Scene:
    """One clip of ``seconds`` at ``size`` x ``size`` pixels."""

    place: str  # indoor, outdoor
    seconds: float
    size: int
    players: tuple[Player, ...]
    offscreen: tuple[Voice, ...]
    voiceover: Voice | None
    seed: int  # of everything that decides no answer: scenery, clothes, melodies

    @property
    def seen(self) -> tuple[Player, ...]:
        """The players in the picture, from left to right."""
        return tuple(p for p in self.players if not p.hidden)

    @property
    def heard(self) -> tuple[Voice, ...]:
        """Every instrument that sounds, wherever it is; the voiceover is none."""
        return tuple(p.voice for p in self.players if p.voice is not None) + self.offscreen

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``from_dict`` is the inverse."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Scene:
        players = tuple(
            Player(p["instrument"], tuple(p["box"]), _intervals(p["moving"]), _voice(p["voice"]), p["hidden"])
            for p in data["players"]
        )
        offscreen = tuple(v for v in map(_voice, data["offscreen"]) if v is not None)
        voiceover = _voice(data["voiceover"])
        return Scene(data["place"], data["seconds"], data["size"], players, offscreen, voiceover, data["seed"])


def _intervals(data: list[list[float]]) -> tuple[Interval, ...]:
    return tuple((a, b) for a, b in data)


def _voice(data: dict[str, Any] | None) -> Voice | None:
    if data is None:
        return None
    return Voice(data["instrument"], _intervals(data["sounding"]), data["level"], data["rate"], data["part"])


def duration(intervals: tuple[Interval, ...]) -> float:
    """Total length of disjoint intervals."""
    return sum(b - a for a, b in intervals)


def overlap(one: tuple[Interval, ...], other: tuple[Interval, ...]) -> float:
    """Length of the time that lies in both."""
    return sum(max(0.0, min(b, d) - max(a, c)) for a, b in one for c, d in other)


def place_name(index: int, count: int) -> str | None:
    """``left``, ``middle`` or ``right`` for player ``index`` of ``count``; None where nobody would call it one
    of these.
    """
    if count < 2:
        return None
    if index == 0:
        return "left"
    if index == count - 1:
        return "right"
    return "middle" if count % 2 and index == count // 2 else None
