"""What a scene must make possible so that a certain question can have a certain answer: a count, an order, a
difference.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from sparsify.synth.questions import COUNTS

__all__ = ["MAX_PLAYERS", "Plan", "free_plan", "plan_for"]

MAX_PLAYERS = 5


@dataclass(frozen=True)
class Plan:
    """What a scene is drawn to show."""

    seen: int  # players in the picture
    sounding: int  # of them
    twins: int = 0  # seen players of one instrument; 0: all different
    twins_sounding: int | None = None  # how many of them sound; None: drawn
    kinds: int | None = None  # different instruments in the picture, in place of twins
    unseen: int = 0  # voices from out of the picture
    arrangement: str = "together"  # or staggered, turns, halves, uneven, mixed
    steps: bool = False  # clear differences of loudness
    rhythms: bool = False  # clear differences of note rate
    voiceover: bool = False


def free_plan(rng: random.Random) -> Plan:
    """A plan without a purpose."""
    seen = rng.choices((1, 2, 3, 4, 5), (22, 40, 24, 9, 5))[0]
    sounding = min(seen, rng.choices((0, 1, 2, 3, 4), (4, 26, 42, 22, 6))[0])
    return Plan(
        seen=seen,
        sounding=sounding,
        unseen=rng.choices((0, 1, 2), (60, 34, 6))[0] if sounding < 4 else 0,
        arrangement=rng.choice(("together", "staggered", "turns", "uneven", "mixed")),
        steps=rng.random() < 0.2,
        rhythms=rng.random() < 0.3,
        voiceover=rng.random() < 0.06,
    )


def plan_for(question: str, answer: str, rng: random.Random) -> Plan:
    """A plan under which ``question`` (the text of a template) may well have ``answer``."""
    plan = free_plan(rng)
    for start, purpose in _PURPOSES:
        if question.startswith(start):
            return purpose(plan, question, answer, rng)
    return plan


def _at_least(count: int, rng: random.Random) -> int:
    """A number of players among whom ``count`` can be found: often that many, seldom many more."""
    return min(MAX_PLAYERS, max(1, count) + rng.choices((0, 1, 2, 3, 4), (40, 32, 16, 8, 4))[0])


def _several(plan: Plan, rng: random.Random) -> Plan:
    """Two or three players that sound, and maybe some that do not."""
    sounding = rng.choice((2, 2, 3))
    return replace(plan, seen=max(sounding, rng.choice((2, 2, 2, 3, 3, 4, 5))), sounding=sounding)


def _misleading(rng: random.Random) -> int:
    """How many voices sound unseen where they shall mislead."""
    return rng.choice((0, 0, 0, 1, 1))


def _count_heard(plan: Plan, question: str, answer: str, rng: random.Random) -> Plan:
    count = COUNTS.index(answer)
    unseen = min(count, rng.choice((0, 0, 1, 2)))
    return replace(plan, seen=max(1, count - unseen, plan.seen), sounding=count - unseen, unseen=unseen)


def _count_kinds(plan: Plan, question: str, answer: str, rng: random.Random) -> Plan:
    count = COUNTS.index(answer)
    seen = _at_least(count, rng)
    return replace(plan, seen=seen, sounding=min(seen, plan.sounding), kinds=count)


def _count_seen(plan: Plan, question: str, answer: str, rng: random.Random) -> Plan:
    count = COUNTS.index(answer)
    seen = _at_least(count, rng)
    return replace(plan, seen=seen, sounding=min(seen, plan.sounding), twins=count if count > 1 else 0)


def _count_sounding_twins(plan: Plan, question: str, answer: str, rng: random.Random) -> Plan:
    count = COUNTS.index(answer)
    group = _at_least(count, rng)
    others = rng.randint(0, min(2, MAX_PLAYERS - group))
    return replace(
        plan,
        seen=group + others,
        sounding=count + min(others, rng.choice((0, 0, 1))),
        twins=group if group > 1 else 0,
        twins_sounding=count if group > 1 else None,
        unseen=_misleading(rng),
    )


def _count_sounding(plan: Plan, question: str, answer: str, rng: random.Random) -> Plan:
    count = COUNTS.index(answer)
    types = question.startswith("How many types")
    twins = rng.choice((0, 0, 2)) if types and 0 < count < 4 else 0
    seen = _at_least(count + bool(twins), rng)
    unseen = _misleading(rng) if count < 4 else 0
    return replace(plan, seen=seen, sounding=count + bool(twins), twins=twins, unseen=unseen)


def _count_silent(plan: Plan, question: str, answer: str, rng: random.Random) -> Plan:
    count = COUNTS.index(answer)
    seen = _at_least(count, rng)
    return replace(plan, seen=seen, sounding=seen - count, unseen=_misleading(rng) if seen - count < 4 else 0)


def _one_player(plan: Plan, question: str, answer: str, rng: random.Random) -> Plan:
    return replace(plan, seen=1, sounding=rng.choice((0, 1)))


def _whose_sound(plan: Plan, question: str, answer: str, rng: random.Random) -> Plan:
    own = answer == "yes"
    return replace(plan, seen=1, sounding=int(own), unseen=int(not own))


def _voiceover(plan: Plan, question: str, answer: str, rng: random.Random) -> Plan:
    return replace(plan, voiceover=answer == "yes")


def _which_twin(plan: Plan, question: str, answer: str, rng: random.Random) -> Plan:
    twins = rng.choice((2, 2, 3))
    if answer == "simultaneously":
        sounding = rng.choice((2, twins))
    else:
        sounding = rng.choice((1, 2))
    seen = rng.choice((2, 3, 3, 4)) if twins == 2 else rng.choice((3, 3, 4, 5))
    return replace(
        plan,
        seen=seen,
        sounding=sounding + min(seen - twins, rng.choice((0, 1))),
        twins=twins,
        twins_sounding=sounding,
        arrangement="together" if answer == "simultaneously" else rng.choice(("staggered", "turns")),
        unseen=0,
    )


def _same_time(plan: Plan, question: str, answer: str, rng: random.Random) -> Plan:
    arrangement = rng.choice(("halves", "together", "halves"))
    return replace(_several(plan, rng), unseen=_misleading(rng), arrangement=arrangement, steps=False)


def _order(plan: Plan, question: str, answer: str, rng: random.Random) -> Plan:
    arrangement = rng.choice(("staggered", "turns"))
    return replace(_several(plan, rng), unseen=_misleading(rng), arrangement=arrangement, steps=False)


def _levels(plan: Plan, question: str, answer: str, rng: random.Random) -> Plan:
    arrangement = rng.choice(("together", "turns"))
    return replace(_several(plan, rng), unseen=_misleading(rng), arrangement=arrangement, steps=True)


def _compare_places(plan: Plan, question: str, answer: str, rng: random.Random) -> Plan:
    """In half of the scenes that name instruments, one of them is there twice: which one sounds must be seen."""
    plan = _several(plan, rng)
    rhythm = "rhythmic" in question
    if "<Object>" in question and rng.random() < 0.5:
        plan = replace(plan, seen=max(3, plan.seen), sounding=2, twins=2, twins_sounding=1)
    arrangement = rng.choice(("together", "together", "turns", "staggered"))
    return replace(plan, arrangement=arrangement, steps=plan.steps or not rhythm, rhythms=plan.rhythms or rhythm)


def _compare_sounds(plan: Plan, question: str, answer: str, rng: random.Random) -> Plan:
    seen = max(2, plan.seen)
    return replace(
        plan,
        seen=seen,
        sounding=max(2, plan.sounding),
        arrangement="uneven" if "longer" in question else plan.arrangement,
        steps=plan.steps or "louder" in question,
        rhythms=plan.rhythms or "rhythmic" in question,
    )


def _always(plan: Plan, question: str, answer: str, rng: random.Random) -> Plan:
    return replace(plan, sounding=max(1, plan.sounding), arrangement=rng.choice(("mixed", "uneven")))


# The first start that fits a template's text decides.
_PURPOSES: tuple[tuple[str, Callable[[Plan, str, str, random.Random], Plan]], ...] = (
    ("How many musical instruments were heard", _count_heard),
    ("How many types of musical instruments appeared", _count_kinds),
    ("How many <Object> are", _count_seen),
    ("How many sounding", _count_sounding_twins),
    ("How many instruments in the video did not", _count_silent),
    ("How many", _count_sounding),
    ("What kind of musical instrument", _one_player),
    ("Is this sound", _whose_sound),
    ("Is there a voiceover", _voiceover),
    ("Which <Object> makes", _which_twin),
    ("Which is the musical instrument that sounds at the same time", _same_time),
    ("Where is the <LL>", _levels),
    ("Where is the <FL>", _order),
    ("Is the <FL>", _order),
    ("What is the <LR> instrument of", _order),
    ("What is the <TH>", _order),
    ("Which instrument", _order),
    ("Is the instrument on the", _compare_places),
    ("Is the <Object> on the", _compare_places),
    ("Is the <Object> in the video always", _always),
    ("Is the <Object>", _compare_sounds),
)
