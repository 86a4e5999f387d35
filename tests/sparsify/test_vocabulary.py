"""Words and their ids."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.data.templates import PLACEHOLDERS, TEMPLATES, fill
from sparsify.data.vocabulary import MAX_CHARACTERS, PAD, UNKNOWN, Vocabulary, words
from sparsify.errors import CheckpointError, UsageError

VOCABULARY = Vocabulary.build()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("How many sounding violin in the video\uff1f", ["how", "many", "sounding", "violin", "in", "the", "video"]),
        ("Is the acoustic_guitar louder?", ["is", "the", "acoustic", "guitar", "louder"]),
        ("  IS  there a voice-over ?\n", ["is", "there", "a", "voice", "over"]),
        ("Isn\u2019t it the 2nd\uff01", ["isn't", "it", "the", "2nd"]),
        ("\uff26\uff4c\uff55\uff54\uff45", ["flute"]),  # full-width letters
        ("\u4e8c\u80e1?", ["\u4e8c\u80e1"]),
        ("?! _ -- \u3002", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def test_the_fixed_vocabulary_knows_every_question_the_templates_can_make():
    for template in TEMPLATES:
        for value in range(22):
            values = [PLACEHOLDERS[name][value % len(PLACEHOLDERS[name])] for name in template.placeholders]
            assert VOCABULARY.unknown(fill(template.text, values)) == []
    assert len(VOCABULARY) == 94
    assert VOCABULARY.words[:4] == ("<pad>", "<unknown>", "a", "accordion")


def test_encode_gives_ids_and_unknown_words_one_id():
    ids = VOCABULARY.encode("Is there a theremin or a Tuba?", max_words=7)
    assert [VOCABULARY.words[i] for i in ids] == ["is", "there", "a", "<unknown>", "<unknown>", "a", "tuba"]
    assert PAD not in ids
    assert VOCABULARY.unknown("theremin or theremin tuba") == ["theremin", "or"]
    assert VOCABULARY.encode("<pad> <unknown>", 2) == [UNKNOWN, UNKNOWN]  # the special entries are no words


def test_training_questions_add_words_behind_the_fixed_ones():
    built = Vocabulary.build(["Is the zither louder?", "An organ?", "zither"])
    assert built.words == (*VOCABULARY.words, "an", "organ", "zither")
    assert built.encode("is the zither louder", 4)[:2] == VOCABULARY.encode("is the", 4)


@pytest.mark.parametrize("text", ["", "   ", "?", "\uff1f", "_"])
def test_a_question_without_words_is_refused(text):
    for ask in (VOCABULARY.unknown, lambda text: VOCABULARY.encode(text, 8)):
        with pytest.raises(UsageError, match="question: expected words, got '"):
            ask(text)


def test_a_question_too_long_is_refused():
    assert len(VOCABULARY.encode("is " * 8, 8)) == 8
    with pytest.raises(UsageError, match=r"question: expected at most 8 words, got 9: 'is is"):
        VOCABULARY.encode("is " * 9, 8)
    for text in ("a" * 10_000, "is it " * 2_000):
        with pytest.raises(UsageError, match=r"expected at most 2,000 characters, got 1\d,000: '.{57}\.\.\.'$"):
            VOCABULARY.encode(text, 64)
    assert VOCABULARY.encode("a" * MAX_CHARACTERS, 64) == [UNKNOWN]


def test_json_round_trip():
    built = Vocabulary.build(["\u4e8c\u80e1 zither"])
    assert Vocabulary.from_json(built.to_json()) == built
    assert json.loads(built.to_json())["words"][-2:] == ["zither", "\u4e8c\u80e1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "expected an object with format 'sparsify-vocabulary'"),
        ({"format": "other"}, "expected an object with format"),
        ({"version": 2}, "version 2; this release reads version 1"),
        ({"words": None}, "field 'words': expected a list of words"),
        ({"words": ["<pad>", "<unknown>", 3]}, "field 'words': expected a list of words"),
        ({"words": ["<pad>", "<unknown>", "a", "a"]}, "no word twice"),
        ({"words": ["a", "b"]}, "expected <pad>, <unknown> first"),
        ({"words": []}, "expected <pad>, <unknown> first"),
    ],
)
def test_another_format_is_refused(change, message):
    data = [] if change is None else json.loads(VOCABULARY.to_json()) | change
    with pytest.raises(CheckpointError, match=f"run/vocabulary.json: .*{message}"):
        Vocabulary.from_json(json.dumps(data), source="run/vocabulary.json")


def test_no_json_is_refused():
    with pytest.raises(CheckpointError, match="vocabulary: expected the JSON of a vocabulary"):
        Vocabulary.from_json("is there a")


@given(st.text(max_size=200))
def test_any_text_encodes_or_is_refused_by_name(text):
    try:
        ids = VOCABULARY.encode(text, 10)
    except UsageError:
        assert not 1 <= len(words(text)) <= 10
        return
    assert len(ids) == len(words(text))
    assert all(UNKNOWN <= i < len(VOCABULARY) for i in ids)
    assert ids.count(UNKNOWN) >= len(VOCABULARY.unknown(text))
    assert [words(word) for word in words(text)] == [[word] for word in words(text)]  # a word is a word again
