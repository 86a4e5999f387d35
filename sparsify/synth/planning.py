"""Plan a split: which scenes, and which of the questions they answer are asked, so that no answer is a good guess.

Types are asked as often as in MUSIC-AVQA, templates of a type alike. The template furthest behind its due comes first,
with its most missing answer; scenes are drawn until one gives that answer; then the scene's other questions fill
whatever else lacks most. Answers are kept level for each template and for each filled question ("Is there a violin
sound?").
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from sparsify.data.templates import INSTRUMENTS, TEMPLATES, Template
from sparsify.synth.casting import cast
from sparsify.synth.plans import plan_for
from sparsify.synth.questions import COUNTS, Candidate, candidates_of
from sparsify.synth.scene import Scene

__all__ = ["TYPE_PERCENT", "PlannedClip", "plan_split"]

TRIES = 40  # scenes drawn for one wanted answer before another answer is wanted
AHEAD = 1.3  # times its due that a template is asked at most: some scenes answer one kind of question many times over
HARD = 0.5  # share of the draws that prefer a question which eye or ear alone would get wrong


@dataclass(frozen=True)
class PlannedClip:
    """One clip to render and what is asked about it."""

    scene: Scene
    questions: tuple[Candidate, ...]


# How often each type is asked, in percent: in MUSIC-AVQA v1, by its validation file.
TYPE_PERCENT: dict[tuple[str, str], float] = {
    ("Audio", "Counting"): 11.2,
    ("Audio", "Comparative"): 6.5,
    ("Visual", "Counting"): 13.1,
    ("Visual", "Location"): 13.4,
    ("Audio-Visual", "Existential"): 10.8,
    ("Audio-Visual", "Location"): 10.1,
    ("Audio-Visual", "Counting"): 13.9,
    ("Audio-Visual", "Comparative"): 12.0,
    ("Audio-Visual", "Temporal"): 9.0,
}


def _dues() -> dict[str, float]:
    """How often each template, by its text, is to be asked: as a multiple of the average one."""
    templates, whole = Counter(t.type for t in TEMPLATES), sum(TYPE_PERCENT.values())
    return {t.text: TYPE_PERCENT[t.type] / templates[t.type] * len(TEMPLATES) / whole for t in TEMPLATES}


def _shares(start: str, *counts: float) -> tuple[str, dict[str, float]]:
    return start, dict(zip(COUNTS, counts, strict=False))


# Shares of the answers of a template; five players that sound at once are rare because hardly an ear counts them.
_COUNT_SHARES = dict(
    (
        _shares("How many musical instruments were", 0.15, 0.26, 0.26, 0.22, 0.09, 0.02),
        _shares("How many types of musical instruments appeared", 0.0, 0.26, 0.26, 0.26, 0.14, 0.08),
        _shares("How many <Object> are", 0.26, 0.26, 0.26, 0.15, 0.05, 0.02),
        _shares("How many instruments are sounding", 0.2, 0.25, 0.25, 0.2, 0.08, 0.02),
        _shares("How many types of musical instruments sound", 0.16, 0.28, 0.28, 0.2, 0.08),
        _shares("How many instruments in the video did not", 0.25, 0.25, 0.25, 0.17, 0.06, 0.02),
        _shares("How many sounding", 0.26, 0.26, 0.26, 0.15, 0.05, 0.02),
    )
)
_CLOSED: dict[str, tuple[str, ...]] = {
    "Where is the performance?": ("indoor", "outdoor"),
    "Where is the <": ("left", "middle", "right"),
    "Which <Object> makes": ("left", "middle", "right", "simultaneously"),
    "What ": INSTRUMENTS,
    "Which i": INSTRUMENTS,
}


def _answer_shares(template: Template) -> dict[str, float]:
    for start, shares in _COUNT_SHARES.items():
        if template.text.startswith(start):
            return {answer: share for answer, share in shares.items() if share > 0}
    answers = next((a for start, a in _CLOSED.items() if template.text.startswith(start)), ("yes", "no"))
    return {answer: 1 / len(answers) for answer in answers}


class _Ledger:
    """Counts of what was asked and answered so far, by the template's text."""

    def __init__(self) -> None:
        self.dues = _dues()
        self.shares = {t.text: _answer_shares(t) for t in TEMPLATES}
        self.asked: Counter[str] = Counter()
        self.answered: Counter[tuple[str, str]] = Counter()
        self.filled: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.filled_answered: Counter[tuple[str, tuple[str, ...], str]] = Counter()

    def add(self, c: Candidate) -> None:
        text = c.template.text
        self.asked[text] += 1
        self.answered[text, c.answer] += 1
        self.filled[text, c.values] += 1
        self.filled_answered[text, c.values, c.answer] += 1

    def ahead(self, text: str) -> float:
        """How often a template was asked, by its due: the same for all when each has had its share."""
        return self.asked[text] / self.dues[text]

    def missing(self, text: str, answer: str) -> float:
        """How many answers short of its share ``answer`` is, once one more question is asked."""
        return self.shares[text][answer] * (self.asked[text] + 1) - self.answered[text, answer]

    def fits(self, c: Candidate) -> bool:
        """Whether asking ``c`` keeps the answers of its template and of its filled question level."""
        text = c.template.text
        share = self.shares[text].get(c.answer, 0.0)
        if share == 0.0 or self.missing(text, c.answer) < share - 1e-9:
            return False
        asked, answered = self.filled[text, c.values], self.filled_answered[text, c.values, c.answer]
        return answered + 1 <= share * (asked + 1) + (1.0 - share) + 1e-9

    def need(self, c: Candidate) -> tuple[int, float]:
        """Sorts the candidates of a template: the least asked filled question, the most missing answer."""
        return self.filled[c.template.text, c.values], -self.missing(c.template.text, c.answer)


def plan_split(
    count: int,
    rng: random.Random,
    *,
    seconds: float,
    size: int,
    questions: tuple[int, int],
    used: set[Hashable],
    repeats: int = 1,
) -> Iterator[PlannedClip]:
    """``count`` clips with ``questions`` (least, most) questions each, at most ``repeats`` from one template.

    Scenes in ``used`` are not drawn again; new ones are added.
    """
    ledger = _Ledger()
    for _ in range(count):
        scene, first = _first_question(ledger, rng, seconds, size, used)
        used.add(_signature(scene))
        ledger.add(first)
        chosen = [first]
        candidates = {t.text: candidates_of(scene, t) for t in TEMPLATES}
        for _ in range(rng.randint(*questions) - 1):
            further = _further_question(ledger, rng, candidates, chosen, repeats)
            if further is None:
                break
            ledger.add(further)
            chosen.append(further)
        rng.shuffle(chosen)
        yield PlannedClip(scene, tuple(chosen))


def _by_need(ledger: _Ledger, rng: random.Random) -> list[Template]:
    """The templates, those furthest behind their due first, in random order where they tie."""
    return sorted(TEMPLATES, key=lambda t: (ledger.ahead(t.text), rng.random()))


def _further_question(
    ledger: _Ledger, rng: random.Random, candidates: dict[str, list[Candidate]], chosen: list[Candidate], repeats: int
) -> Candidate | None:
    """The most needed of a scene's ``candidates`` (by template) from a template ``chosen`` less than ``repeats``
    times; None when only those are left that were asked more than ``AHEAD`` times their due."""
    asked = Counter(c.template.text for c in chosen)
    most = AHEAD * sum(ledger.asked.values()) / len(TEMPLATES) + 1
    for template in _by_need(ledger, rng):
        if ledger.ahead(template.text) > most:
            break
        if asked[template.text] < repeats:
            fitting = [c for c in candidates[template.text] if c not in chosen and ledger.fits(c)]
            if fitting:
                return _pick(ledger, fitting, rng)
    return None


def _first_question(
    ledger: _Ledger, rng: random.Random, seconds: float, size: int, used: set[Hashable]
) -> tuple[Scene, Candidate]:
    for template in _by_need(ledger, rng):
        answers = sorted(ledger.shares[template.text], key=lambda a: (-ledger.missing(template.text, a), rng.random()))
        for answer in answers[:4]:
            for _ in range(TRIES):
                scene = cast(plan_for(template.text, answer, rng), rng, seconds, size)
                found = [c for c in candidates_of(scene, template) if _wanted(ledger, c, answer)]
                if found and _signature(scene) not in used:
                    return scene, _pick(ledger, found, rng)
    raise RuntimeError("no scene answers any of the questions that are due")  # a hole in plan_for


def _wanted(ledger: _Ledger, c: Candidate, answer: str) -> bool:
    # An instrument is any of 22: whichever the scene names is as good as the one wanted.
    return ledger.fits(c) and (c.answer == answer or answer in INSTRUMENTS)


def _pick(ledger: _Ledger, fitting: list[Candidate], rng: random.Random) -> Candidate:
    """The most needed of the ``fitting`` questions from one template."""
    if rng.random() < HARD:
        fitting = [c for c in fitting if c.hard] or fitting
    if fitting[0].template.text.startswith(
        ("Is there a <", "Are there")
    ):  # "no" is true of many more instruments than "yes"
        answer = max(
            sorted({c.answer for c in fitting}),
            key=lambda a: (ledger.missing(fitting[0].template.text, a), rng.random()),
        )
        fitting = [c for c in fitting if c.answer == answer]
    rng.shuffle(fitting)
    return min(fitting, key=ledger.need)


def _signature(scene: Scene) -> Hashable:
    """Equal for scenes that show and play the same, whatever their scenery."""
    players = tuple((p.instrument, p.moving, p.voice, p.hidden) for p in scene.players)
    return scene.place, players, scene.offscreen, scene.voiceover
