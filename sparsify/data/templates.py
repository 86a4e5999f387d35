"""What is fixed in MUSIC-AVQA: 42 answers, 22 instruments, nine question types, 33 question templates.

The facts are those of the data set (Li et al., CVPR 2022, arXiv 2203.14072): templates stand here as its files write
them, trailing spaces and one full-width question mark included. The order of the answers is that of their first
appearance in the training file, which is how the data set's own code (AVST) numbers its labels; a label therefore means
the same here as in that family of models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "ANSWERS",
    "ANSWER_LABEL",
    "INSTRUMENTS",
    "MODALITIES",
    "PLACEHOLDERS",
    "TEMPLATES",
    "TYPES",
    "QuestionType",
    "Template",
    "fill",
    "find_template",
    "placeholders",
    "tidy",
]

_PLACEHOLDER = re.compile(r"<[A-Za-z]+>")


class QuestionType(NamedTuple):
    """What a question is about and what it asks; ``str()`` gives ``"Audio-Visual/Counting"``."""

    modality: str
    kind: str

    def __str__(self) -> str:
        return f"{self.modality}/{self.kind}"


@dataclass(frozen=True, slots=True)
class Template:
    """One of the 33 questions, as the data set writes it."""

    text: str
    type: QuestionType

    @property
    def placeholders(self) -> tuple[str, ...]:
        """The ``<...>`` of the text from left to right; a name may occur twice."""
        return placeholders(self.text)


MODALITIES: tuple[str, ...] = ("Audio", "Visual", "Audio-Visual")

TYPES: tuple[QuestionType, ...] = (
    QuestionType("Audio", "Counting"),
    QuestionType("Audio", "Comparative"),
    QuestionType("Visual", "Counting"),
    QuestionType("Visual", "Location"),
    QuestionType("Audio-Visual", "Existential"),
    QuestionType("Audio-Visual", "Location"),
    QuestionType("Audio-Visual", "Counting"),
    QuestionType("Audio-Visual", "Comparative"),
    QuestionType("Audio-Visual", "Temporal"),
)

INSTRUMENTS: tuple[str, ...] = (
    "accordion", "acoustic_guitar", "bagpipe", "banjo", "bassoon", "cello", "clarinet", "congas", "drum",
    "electric_bass", "erhu", "flute", "guzheng", "piano", "pipa", "saxophone", "suona", "trumpet", "tuba", "ukulele",
    "violin", "xylophone",
)  # fmt: skip

ANSWERS: tuple[str, ...] = (
    "two", "cello", "congas", "zero", "no", "pipa", "six", "yes", "one", "four", "three", "seven", "five", "ukulele",
    "right", "piano", "left", "accordion", "clarinet", "guzheng", "more than ten", "nine", "indoor", "saxophone",
    "drum", "violin", "middle", "outdoor", "bagpipe", "bassoon", "acoustic_guitar", "banjo", "electric_bass", "ten",
    "eight", "flute", "simultaneously", "trumpet", "erhu", "xylophone", "tuba", "suona",
)  # fmt: skip

ANSWER_LABEL: dict[str, int] = {answer: label for label, answer in enumerate(ANSWERS)}

# The values that occur in the data set (fourth and fifth in the training file only). Files may hold others: see
# music_avqa.
PLACEHOLDERS: dict[str, tuple[str, ...]] = {
    "<Object>": INSTRUMENTS,
    "<LR>": ("left", "right", "middle"),
    "<LRer>": ("leftest", "rightest"),
    "<FL>": ("first", "last"),
    "<TH>": ("first", "second", "third", "fourth", "fifth"),
    "<BA>": ("before", "after"),
    "<LL>": ("loudest", "lowest"),
}

_TEXTS: dict[str, tuple[str, ...]] = {
    "Audio/Counting": (
        "Is there a <Object> sound?",
        "How many musical instruments were heard throughout the video?",
        "Are there <Object> and <Object> sound? ",
    ),
    "Audio/Comparative": (
        "Is the <Object> more rhythmic than the <Object>?",
        "Is the <Object> louder than the <Object>?",
        "Is the <Object> playing longer than the <Object>?",
    ),
    "Visual/Counting": (
        "Is there a <Object> in the entire video?",
        "Are there <Object> and <Object> instruments in the video?",
        "How many types of musical instruments appeared in the entire video?",
        "How many <Object> are in the entire video?",
    ),
    "Visual/Location": (
        "Where is the performance?",
        "What is the instrument on the <LR> of <Object>?",
        "What kind of musical instrument is it?",
        "What kind of instrument is the <LRer> instrument? ",
    ),
    "Audio-Visual/Existential": (
        "Is this sound from the instrument in the video?",
        "Is the <Object> in the video always playing?",
        "Is there a voiceover?",
    ),
    "Audio-Visual/Location": (
        "Where is the <LL> instrument?",
        "Is the <FL> sound coming from the <LR> instrument?",
        "Which is the musical instrument that sounds at the same time as the <Object>?",
        "What is the <LR> instrument of the <FL> sounding instrument?",
    ),
    "Audio-Visual/Counting": (
        "How many instruments are sounding in the video?",
        "How many types of musical instruments sound in the video?",
        "How many instruments in the video did not sound from beginning to end?",
        "How many sounding <Object> in the video\uff1f",
    ),
    "Audio-Visual/Comparative": (
        "Is the instrument on the <LR> more rhythmic than the instrument on the <LR>?",
        "Is the instrument on the <LR> louder than the instrument on the <LR>?",
        "Is the <Object> on the <LR> more rhythmic than the <Object> on the <LR>?",
        "Is the <Object> on the <LR> louder than the <Object> on the <LR>?",
    ),
    "Audio-Visual/Temporal": (
        "Where is the <FL> sounding instrument?",
        "Which <Object> makes the sound <FL>?",
        "What is the <TH> instrument that comes in?",
        "Which instrument makes sounds <BA> the <Object>?",
    ),
}

TEMPLATES: tuple[Template, ...] = tuple(Template(text, kind) for kind in TYPES for text in _TEXTS[str(kind)])


def placeholders(text: str) -> tuple[str, ...]:
    """The ``<...>`` of ``text`` from left to right."""
    return tuple(_PLACEHOLDER.findall(text))


def fill(text: str, values: Sequence[str]) -> str:
    """``text`` with its placeholders replaced by ``values`` in order, and tidied; ``ValueError`` when their numbers
    differ.
    """
    names = placeholders(text)
    if len(names) != len(values):
        raise ValueError(f"fill: {text!r} has {len(names)} placeholders, got {len(values)} values")
    remaining = iter(values)
    return tidy(_PLACEHOLDER.sub(lambda _: next(remaining), text))


def tidy(text: str) -> str:
    """``text`` with single spaces, none at the ends or before the question mark, and that mark in ASCII."""
    return re.sub(r"\s+\?", "?", " ".join(text.replace("\uff1f", "?").split()))


_BY_TIDY_TEXT = {tidy(template.text): template for template in TEMPLATES}


def find_template(text: str) -> Template | None:
    """The template that ``text`` (placeholders not filled) is, whatever its spaces and question mark; None for none of
    the 33.
    """
    return _BY_TIDY_TEXT.get(tidy(text))
