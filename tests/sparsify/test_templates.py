"""The facts of MUSIC-AVQA, written out a second time: a change of the order of answers changes what labels mean."""

from __future__ import annotations

from collections import Counter

import pytest

from sparsify.data import templates as T

# AVST's answer list, the labels of the data set's own code.
ANSWERS = (
    "two|cello|congas|zero|no|pipa|six|yes|one|four|three|seven|five|ukulele|right|piano|left|accordion|clarinet|guzheng|"
    "more than ten|nine|indoor|saxophone|drum|violin|middle|outdoor|bagpipe|bassoon|acoustic_guitar|banjo|"
    "electric_bass|ten|eight|flute|simultaneously|trumpet|erhu|xylophone|tuba|suona"
)
COUNTS = {
    "Audio/Counting": 3,
    "Audio/Comparative": 3,
    "Visual/Counting": 4,
    "Visual/Location": 4,
    "Audio-Visual/Existential": 3,
    "Audio-Visual/Location": 4,
    "Audio-Visual/Counting": 4,
    "Audio-Visual/Comparative": 4,
    "Audio-Visual/Temporal": 4,
}


def test_answers_are_the_42_in_the_order_of_avst():
    assert "|".join(T.ANSWERS) == ANSWERS
    assert len(T.ANSWERS) == len(set(T.ANSWERS)) == 42
    assert T.ANSWER_LABEL["two"] == 0
    assert T.ANSWER_LABEL["suona"] == 41
    assert {"ten", "more than ten"} <= set(T.ANSWERS)


def test_instruments_are_the_22_of_the_answers():
    others = (
        "two zero no six yes one four three seven five right left nine indoor middle outdoor ten eight simultaneously"
    )
    assert set(T.INSTRUMENTS) == set(T.ANSWERS) - set(others.split()) - {"more than ten"}
    assert len(T.INSTRUMENTS) == 22


def test_33_templates_of_nine_types():
    assert Counter(str(t.type) for t in T.TEMPLATES) == COUNTS
    assert [str(kind) for kind in T.TYPES] == list(COUNTS)
    assert len({t.text for t in T.TEMPLATES}) == 33
    assert {kind.modality for kind in T.TYPES} == set(T.MODALITIES)


def test_every_placeholder_has_values():
    assert {name for t in T.TEMPLATES for name in t.placeholders} == set(T.PLACEHOLDERS)
    assert all(T.PLACEHOLDERS.values())


def test_template_texts_are_as_the_files_write_them():
    texts = {t.text for t in T.TEMPLATES}
    assert "How many sounding <Object> in the video\uff1f" in texts  # the one full-width question mark
    assert {text for text in texts if text != text.strip()} == {
        "Are there <Object> and <Object> sound? ",
        "What kind of instrument is the <LRer> instrument? ",
    }


@pytest.mark.parametrize(
    ("text", "values", "filled"),
    [
        ("Is there a <Object> sound?", ["erhu"], "Is there a erhu sound?"),
        ("Are there <Object> and <Object> sound? ", ["pipa", "tuba"], "Are there pipa and tuba sound?"),
        (
            "How many sounding <Object> in the video\uff1f",
            ["electric_bass"],
            "How many sounding electric_bass in the video?",
        ),
        (
            "Is the <FL> sound coming from the <LR> instrument?",
            ["last", "left"],
            "Is the last sound coming from the left instrument?",
        ),
        ("Is there a voiceover ?", [], "Is there a voiceover?"),
        ("Which <Object>?", [r"\1"], r"Which \1?"),  # a value is text, not a pattern
    ],
)
def test_fill_in_order_and_tidy(text, values, filled):
    assert T.fill(text, values) == filled


@pytest.mark.parametrize("values", [[], ["erhu", "pipa"]])
def test_fill_refuses_another_number_of_values(values):
    with pytest.raises(ValueError, match=r"1 placeholders, got [02] values"):
        T.fill("Is there a <Object> sound?", values)


def test_find_template_ignores_spaces_and_the_form_of_the_question_mark():
    found = T.find_template("How  many sounding <Object> in the video ? ")
    assert found is not None
    assert found.text == "How many sounding <Object> in the video\uff1f"
    assert T.find_template("How many sounding erhu in the video?") is None
