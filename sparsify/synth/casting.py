"""Draw scenes at random: who stands where, who sounds when, how loud and how fast, who only pretends to play.

A ``Plan`` says what a scene must make possible; everything else is drawn. Movement tells little about sound:
players move without a sound, or sound without moving, and an instrument may sound out of the picture. The exception
are *twins*, several players of one instrument: no ear could tell which of them plays, so while it is heard exactly
those sound that move.
"""

from __future__ import annotations

import random
from dataclasses import replace

from sparsify.data.templates import INSTRUMENTS
from sparsify.synth.plans import MAX_PLAYERS, Plan
from sparsify.synth.scene import Interval, Player, Scene, Voice

__all__ = ["cast"]

VOICE = "voice"  # the instrument name of a voiceover
LEAD, TAIL = 0.04, 0.02  # s before the first and after the last sound of who plays "from beginning to end"
LEVELS = (0.0, -9.5, -19.0)  # dB below the loudest, in scenes with clear differences
RATES = (1.6, 5.0)  # notes a second


def cast(plan: Plan, rng: random.Random, seconds: float, size: int) -> Scene:
    """A scene that follows ``plan``."""
    names = _names(plan, rng)
    sounding = _who_sounds(plan, names, rng)
    unseen = rng.sample([n for n in INSTRUMENTS if n not in names], plan.unseen)
    voices = _voices(plan, [names[i] for i in sounding] + unseen, rng, seconds)
    by_player = dict(zip(sounding, voices, strict=False))
    seen = [Player(name, (0, 0, 0, 0), (), by_player.get(i)) for i, name in enumerate(names)]
    moving = _movement(seen, rng, seconds)
    players = [replace(p, moving=m) for p, m in zip(seen, moving, strict=True)]
    offscreen = []
    for voice in voices[len(sounding) :]:
        if len(players) < MAX_PLAYERS and rng.random() < 0.4:
            players.insert(rng.randint(0, len(players)), Player(voice.instrument, (0, 0, 0, 0), (), voice, hidden=True))
        else:
            offscreen.append(voice)
    voiceover = None
    if plan.voiceover:
        start = rng.uniform(0.1, 0.25) * seconds
        voiceover = Voice(
            VOICE, (_interval(start, start + rng.uniform(0.45, 0.65) * seconds),), -3.0, rng.uniform(4.0, 5.5)
        )
    boxes = _boxes(len(players), rng, size)
    return Scene(
        place=rng.choice(("indoor", "outdoor")),
        seconds=seconds,
        size=size,
        players=tuple(replace(p, box=box) for p, box in zip(players, boxes, strict=True)),
        offscreen=tuple(offscreen),
        voiceover=voiceover,
        seed=rng.getrandbits(48),
    )


def _names(plan: Plan, rng: random.Random) -> list[str]:
    """The seen players' instruments from left to right."""
    if plan.kinds is not None:
        kinds = rng.sample(INSTRUMENTS, min(plan.kinds, plan.seen))
        names = kinds + [rng.choice(kinds) for _ in range(plan.seen - len(kinds))]
    elif plan.twins > 1:
        kind, *others = rng.sample(INSTRUMENTS, 1 + plan.seen - plan.twins)
        names = [kind] * plan.twins + others
    else:
        names = rng.sample(INSTRUMENTS, plan.seen)
    rng.shuffle(names)
    return names


def _who_sounds(plan: Plan, names: list[str], rng: random.Random) -> list[int]:
    """Indices of the players that sound, in random order."""
    everyone = list(range(len(names)))
    if plan.twins > 1 and plan.twins_sounding is not None:
        kind = max(names, key=names.count)
        group = [i for i in everyone if names[i] == kind]
        others = [i for i in everyone if names[i] != kind]
        extra = max(0, min(len(others), plan.sounding - plan.twins_sounding))
        chosen = rng.sample(group, min(plan.twins_sounding, len(group))) + rng.sample(others, extra)
        rng.shuffle(chosen)
        return chosen
    return rng.sample(everyone, min(plan.sounding, len(names)))


def _interval(start: float, end: float) -> Interval:
    return (round(start, 3), round(end, 3))


def _voices(plan: Plan, names: list[str], rng: random.Random, seconds: float) -> list[Voice]:
    times = _times(plan.arrangement, len(names), rng, seconds)
    rng.shuffle(times)
    levels = [rng.uniform(-2.0, 2.0) for _ in names]
    if plan.steps:
        steps = [LEVELS[i % len(LEVELS)] if len(names) > 2 else LEVELS[i % 2] * 1.3 for i in range(len(names))]
        rng.shuffle(steps)
        levels = [step + rng.uniform(-0.5, 0.5) for step in steps]
    rates = [rng.uniform(2.4, 3.2) for _ in names]
    if plan.rhythms:
        first = rng.randrange(2)
        rates = [RATES[(i + first) % 2] * rng.uniform(0.92, 1.08) for i in range(len(names))]
    parts = [names[:i].count(name) for i, name in enumerate(names)]
    return [
        Voice(name, tuple(when), round(level, 2), round(rate, 3), part)
        for name, when, level, rate, part in zip(names, times, levels, rates, parts, strict=True)
    ]


def _times(arrangement: str, count: int, rng: random.Random, seconds: float) -> list[list[Interval]]:
    """When each of ``count`` voices sounds."""
    end = seconds - TAIL
    if count == 0:
        return []
    if arrangement == "staggered" and count > 1:
        step = min(0.3 * seconds, 0.8 * seconds / count)
        wait = rng.uniform(0.0, 0.08) * seconds if rng.random() < 0.5 else 0.0
        return [[_interval(LEAD + wait + i * step, end)] for i in range(count)]
    if arrangement == "turns" and count > 1:
        step = seconds / count
        return [[_interval(i * step + LEAD, (i + 1) * step - TAIL)] for i in range(count)]
    if arrangement == "halves" and count > 2:
        middle = seconds / 2
        halves = [_interval(LEAD, middle - TAIL), _interval(middle + LEAD, end)]
        rng.shuffle(halves)
        return [[halves[0 if i < 2 else 1]] for i in range(count)]
    if arrangement == "uneven":
        shares = [1.0, 0.62, 0.3]
        return [[_interval(LEAD, end * shares[i % 3] * rng.uniform(0.98, 1.0))] for i in range(count)]
    if arrangement == "mixed":
        return [_mixed(rng, seconds) for _ in range(count)]
    return [[_interval(LEAD, end)] for _ in range(count)]


def _mixed(rng: random.Random, seconds: float) -> list[Interval]:
    """All the time (half of the draws), from later on, until earlier, or with a rest."""
    kind = rng.choice(("all", "all", "all", "late", "early", "rest"))
    end = seconds - TAIL
    if kind == "late":
        return [_interval(rng.uniform(0.35, 0.5) * seconds, end)]
    if kind == "early":
        return [_interval(LEAD, rng.uniform(0.5, 0.65) * seconds)]
    if kind == "rest":
        start = rng.uniform(0.25, 0.35) * seconds
        return [_interval(LEAD, start), _interval(start + 0.37 * seconds, end)]
    return [_interval(LEAD, end)]


def _movement(players: list[Player], rng: random.Random, seconds: float) -> list[tuple[Interval, ...]]:
    """When each of the seen players moves."""
    names = [p.instrument for p in players]
    always = (_interval(0.0, seconds),)
    moving: list[tuple[Interval, ...]] = []
    for player in players:
        group = [p for p in players if p.instrument == player.instrument]
        heard = tuple(when for p in group if p.voice for when in p.voice.sounding)
        if names.count(player.instrument) > 1 and heard:
            first = min(start for start, _ in heard)
            if player.voice:
                moving.append(player.voice.sounding)
            elif first >= 0.2 * seconds and rng.random() < 0.6:
                moving.append((_interval(0.0, first - 0.08),))  # pretends as long as nobody can contradict
            else:
                moving.append(())
        elif player.voice:
            moving.append(() if rng.random() < 0.3 else always if rng.random() < 0.5 else player.voice.sounding)
        else:
            moving.append(() if rng.random() < 0.6 else always)
    return moving


def _boxes(count: int, rng: random.Random, size: int) -> list[tuple[int, int, int, int]]:
    """One box twice as high as wide for each of ``count`` players side by side, feet near the lower edge."""
    width = round(size * (0.48, 0.45, 0.36, 0.29, 0.235)[count - 1])  # neighbours in a row of five overlap a little
    slot = size / count
    boxes = []
    for i in range(count):
        w = round(width * rng.choice((0.94, 1.0)))
        room = slot - w
        x = round(i * slot + room / 2 + rng.uniform(-0.5, 0.5) * min(max(room, 0.0), 0.2 * size))
        bottom = round(size * rng.uniform(0.93, 0.99) - (0.08 * size if count > 3 else 0))
        x = min(max(x, 0), size - w)
        boxes.append((x, bottom - 2 * w, x + w, bottom))
    return boxes
