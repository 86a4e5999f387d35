"""The word vocabulary of the question encoder: the words of the 33 templates and their values, and what the training
file adds.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sparsify.data.templates import PLACEHOLDERS, TEMPLATES, fill
from sparsify.errors import CheckpointError, UsageError

__all__ = ["MAX_CHARACTERS", "PAD", "UNKNOWN", "Vocabulary", "words"]

PAD = 0  # id of the padding
UNKNOWN = 1  # id of every word that is not in the vocabulary
MAX_CHARACTERS = 2_000  # of a question; far beyond max_words of ordinary words

_SPECIAL = ("<pad>", "<unknown>")
_FORMAT = "sparsify-vocabulary"
_VERSION = 1
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def words(text: str) -> list[str]:
    """The words of ``text``: lower case, compatibility forms folded (full-width letters), no punctuation; ``_`` and
    ``-`` split words.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).replace("\u2019", "'").lower())


@dataclass(frozen=True)
class Vocabulary:
    """Words and their ids: the position in ``words``. Ids 0 and 1 are padding and the unknown word."""

    words: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.words)

    @staticmethod
    def build(questions: Iterable[str] = ()) -> Vocabulary:
        """The words of the fixed templates and values, in alphabetical order, then those that only ``questions``
        (filled texts) have.

        Build it on training questions alone. Without any, it already holds every word that the data set's templates can
        make.
        """
        fixed = {word for text in _fixed_texts() for word in words(text)}
        added = {word for text in questions for word in words(text)} - fixed
        return Vocabulary((*_SPECIAL, *sorted(fixed), *sorted(added)))

    def encode(self, text: str, max_words: int) -> list[int]:
        """The ids of the words of ``text``, unpadded; at least one. ``UsageError`` for no word, or more than
        ``max_words``.
        """
        found = self._words_of(text)
        if len(found) > max_words:
            raise UsageError(f"question: expected at most {max_words} words, got {len(found):,}: {_shorten(text)}")
        return [self._id_of.get(word, UNKNOWN) for word in found]

    def unknown(self, text: str) -> list[str]:
        """The words of ``text`` that are not in the vocabulary, each once, in order. ``UsageError`` for no word."""
        return list(dict.fromkeys(word for word in self._words_of(text) if word not in self._id_of))

    def to_json(self) -> str:
        """A JSON text that ``from_json`` reads back."""
        data = {"format": _FORMAT, "version": _VERSION, "words": list(self.words)}
        return json.dumps(data, ensure_ascii=False, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, source: str = "vocabulary") -> Vocabulary:
        """The inverse of ``to_json``; ``CheckpointError`` naming ``source`` for anything else."""
        try:
            data: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{source}: expected the JSON of a vocabulary: {error}") from None
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise CheckpointError(f"{source}: expected an object with format {_FORMAT!r}")
        if data.get("version") != _VERSION:
            raise CheckpointError(f"{source}: version {data.get('version')!r}; this release reads version {_VERSION}")
        entries = data.get("words")
        if not isinstance(entries, list) or not all(isinstance(entry, str) and entry for entry in entries):
            raise CheckpointError(f"{source}: field 'words': expected a list of words")
        if tuple(entries[:2]) != _SPECIAL or len(set(entries)) != len(entries):
            raise CheckpointError(f"{source}: field 'words': expected {', '.join(_SPECIAL)} first and no word twice")
        return Vocabulary(tuple(entries))

    @cached_property
    def _id_of(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}  # no word of a text is <pad> or <unknown>

    def _words_of(self, text: str) -> list[str]:
        if len(text) > MAX_CHARACTERS:
            raise UsageError(
                f"question: expected at most {MAX_CHARACTERS:,} characters, got {len(text):,}: {_shorten(text)}"
            )
        found = words(text)
        if not found:
            raise UsageError(f"question: expected words, got {_shorten(text)}")
        return found


def _fixed_texts() -> Iterator[str]:
    for template in TEMPLATES:
        yield fill(template.text, [""] * len(template.placeholders))
    for values in PLACEHOLDERS.values():
        yield from values


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
