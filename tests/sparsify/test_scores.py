"""The scorer: literal tables of accuracies and floors, and what must not change them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.data.music_avqa import DataRoot, Question
from sparsify.data.templates import ANSWERS, TEMPLATES, TYPES, fill
from sparsify.errors import DataError
from sparsify.report.scores import floor, floor_of, score

TEMPLATE = {template.text: template for template in TEMPLATES}
SOUND = TEMPLATE["Is there a <Object> sound?"]  # Audio/Counting
LONGER = TEMPLATE["Is the <Object> playing longer than the <Object>?"]  # Audio/Comparative
PLACE = TEMPLATE["Where is the performance?"]  # Visual/Location
TWO, CELLO, NO, YES = (ANSWERS.index(answer) for answer in ("two", "cello", "no", "yes"))


def ask(number, template, label, values=()):
    text = fill(template.text, values)
    return Question(number, f"v{number}", template.type, template.text, tuple(values), text, ANSWERS[label], label)


def sound(number, label, instrument="erhu"):
    return ask(number, SOUND, label, [instrument])


class TestFloor:
    def test_majority_per_template_and_per_filled_question(self):
        train = [sound(1, YES), sound(2, YES), sound(3, NO, "tuba"), sound(4, NO, "tuba"), sound(5, YES, "pipa")]
        learnt = floor(train)
        assert learnt.predict_template(sound(9, NO, "tuba")) == YES
        assert learnt.predict_filled(sound(9, NO, "tuba")) == NO
        assert learnt.predict_filled(sound(9, NO, "erhu")) == YES

    @pytest.mark.parametrize("order", [1, -1])
    def test_ties_go_to_the_lower_label(self, order):
        assert NO < YES
        learnt = floor([sound(1, YES), sound(2, NO)][::order])
        assert learnt.majority == learnt.predict_template(sound(9, YES)) == learnt.predict_filled(sound(9, YES)) == NO

    def test_what_training_lacks_falls_back(self):
        train = [sound(1, NO), ask(2, PLACE, TWO), ask(3, PLACE, TWO)]
        learnt = floor(train)
        assert learnt.predict_filled(sound(9, YES, "tuba")) == NO  # unseen text: its template's majority
        assert learnt.predict_template(ask(9, LONGER, YES, ["erhu", "pipa"])) == TWO  # unseen template: all questions'
        assert learnt.predict_filled(ask(9, LONGER, YES, ["erhu", "pipa"])) == TWO

    def test_no_question_teaches_nothing(self):
        with pytest.raises(DataError, match=r"floor: expected questions .* of train .* got none"):
            floor([])

    @pytest.mark.parametrize(
        ("files", "learnt_on", "said"),
        [
            (["test", "train", "val"], "train", r"of train \(1 questions\)"),
            (["test", "val"], "val", r"of val \(1 questions, for want of a training file\)"),
            (["test"], "test", r"of test \(1 questions, for want of a training file\)"),
        ],
    )
    def test_it_is_learnt_on_train_else_val_and_says_so(self, tmp_path, files, learnt_on, said):
        (tmp_path / "annotations").mkdir()
        row = {"video_id": "a", "question_id": 1, "type": '["Visual", "Location"]', "templ_values": "[]"}
        for name in files:
            rows = [row | {"question_content": "Where is the performance?", "anser": "indoor"}]
            (tmp_path / "annotations" / f"avqa-{name}.json").write_text(json.dumps(rows))
        learnt = floor_of(DataRoot(tmp_path))
        assert learnt.learnt_on == learnt_on
        assert floor([sound(1, YES)], learnt_on).describe().endswith(said.replace("\\", ""))

    def test_a_root_without_annotations(self, tmp_path):
        with pytest.raises(DataError, match="expected an annotation file to learn the floor from"):
            floor_of(DataRoot(tmp_path))


# Ten questions of three types; training says YES to a sound (but NO to a tuba's), NO to longer, TWO to a place.
TRAIN = [
    sound(1, YES),
    sound(2, YES),
    sound(3, YES),
    sound(4, NO, "tuba"),
    ask(5, LONGER, NO, ["erhu", "pipa"]),
    ask(6, PLACE, TWO),
]
ASKED = [
    sound(11, YES),
    sound(12, NO, "tuba"),
    sound(13, NO, "tuba"),
    sound(14, YES),
    ask(15, LONGER, YES, ["erhu", "pipa"]),
    ask(16, LONGER, NO, ["erhu", "pipa"]),
    ask(17, PLACE, TWO),
    ask(18, PLACE, CELLO),
    ask(19, PLACE, CELLO),
    ask(20, PLACE, CELLO),
]
PREDICTED = [YES, NO, YES, None, YES, YES, CELLO, CELLO, CELLO, None]
TABLE = """\
percent                     accuracy  macro   floor    gain  scored
------------------------------------------------------------------
  Audio Counting               66.67         100.00  -33.33     3/4
  Audio Comparative            50.00          50.00   +0.00     2/2
Audio                          60.00  58.33   80.00  -20.00     5/6
  Visual Counting                  -              -       -     0/0
  Visual Location              66.67          33.33  +33.33     3/4
Visual                         66.67  66.67   33.33  +33.33     3/4
  Audio-Visual Existential         -              -       -     0/0
  Audio-Visual Location            -              -       -     0/0
  Audio-Visual Counting            -              -       -     0/0
  Audio-Visual Comparative         -              -       -     0/0
  Audio-Visual Temporal            -              -       -     0/0
Audio-Visual                       -      -       -       -     0/0
------------------------------------------------------------------
overall                        62.50  61.11   62.50   +0.00    8/10
8 of 10 questions scored; floor: majority answer per template or filled question of train (6 questions)"""


def test_a_table_counted_by_hand():
    scores = score(ASKED, PREDICTED, floor(TRAIN))
    assert [line.split() for line in scores.table().splitlines() if "---" not in line] == [
        line.split() for line in TABLE.splitlines() if "---" not in line
    ]
    counting = scores.types[0]
    assert (counting.name, counting.asked, counting.scored, counting.correct) == ("Audio/Counting", 4, 3, 2)
    assert counting.floor_template == pytest.approx(1 / 3)
    assert counting.floor == counting.floor_filled == 1.0  # the larger form
    overall_macro = scores.macro[-1]
    assert overall_macro.accuracy == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    assert overall_macro.floor == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert scores.accuracy == 5 / 8


def test_the_columns_of_the_table_line_up():
    lines = score(ASKED, PREDICTED, floor(TRAIN)).table().splitlines()
    rows = [lines[0], *lines[2:-3], lines[-2]]
    assert len({len(line) for line in rows}) == 1
    assert len(rows) == 14


def test_a_type_without_questions_is_not_zero():
    scores = score(ASKED, PREDICTED, floor(TRAIN))
    empty = next(group for group in scores.types if group.name == "Audio-Visual/Temporal")
    assert (empty.accuracy, empty.floor, empty.asked) == (None, None, 0)
    assert scores.to_dict()["types"]["Audio-Visual/Temporal"]["accuracy"] is None
    unscored = score(ASKED, [None] * 10, floor(TRAIN))
    assert unscored.accuracy is None
    assert unscored.summary().startswith("0 of 10 questions scored")


def test_labels_by_id_are_the_same_as_labels_in_order():
    by_id = {question.id: label for question, label in zip(ASKED, PREDICTED, strict=True) if label is not None}
    assert score(ASKED, by_id, floor(TRAIN)) == score(ASKED, PREDICTED, floor(TRAIN))


def test_types_are_those_of_the_scored_questions_alone():
    """Public code reads types from the whole file and scores a part of it: every later question gets another's."""
    part = ASKED[6:]
    scores = score(part, [CELLO] * 4, floor(TRAIN))
    assert {group.name: group.scored for group in scores.types if group.asked} == {"Visual/Location": 4}
    assert scores.accuracy == 3 / 4


@pytest.mark.parametrize(
    ("predicted", "message"),
    [
        ([YES] * 9, "expected 10 predicted_labels, one a question, got 9"),
        ([42] + [None] * 9, r"expected a label in \[0, 42\) for question 11, got 42"),
        ([-1] + [None] * 9, r"expected a label in \[0, 42\) for question 11, got -1"),
        ({11: YES, 99: NO}, "predicted_labels has question 99, which was not asked"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(predicted, message):
    with pytest.raises(ValueError, match=message):
        score(ASKED, predicted, floor(TRAIN))


def test_a_share_is_no_label():
    with pytest.raises(TypeError):
        score(ASKED[:1], [0.5], floor(TRAIN))


def test_to_dict_is_json_and_names_the_split(tmp_path):
    row = {"video_id": "a", "question_id": 1, "type": '["Visual", "Location"]', "templ_values": "[]"}
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / "avqa-test.json"
    path.write_text(json.dumps([row | {"question_content": "Where is the performance?", "anser": "indoor"}]))
    split = DataRoot(tmp_path).split("test")
    scores = score(split.questions, [ANSWERS.index("indoor")], floor_of(DataRoot(tmp_path)), split=split)
    data = json.loads(json.dumps(scores.to_dict()))
    assert (data["split"], data["fingerprint"]) == ("test", split.fingerprint)
    assert data["overall"] == {
        "asked": 1,
        "scored": 1,
        "correct": 1,
        "accuracy": 1.0,
        "floor": 1.0,
        "floor_template": 1.0,
        "floor_filled": 1.0,
    }
    assert list(data["types"]) == [str(kind) for kind in TYPES]
    assert scores.summary().startswith(f"test (fingerprint {split.fingerprint}): 1 of 1 questions scored; floor: ")


def test_the_rich_table_shows_the_same():
    from rich.console import Console

    scores = score(ASKED, PREDICTED, floor(TRAIN))
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(scores.rich_table())
    shown = console.export_text()
    for row in scores.rows():
        for cell in row:
            assert cell.strip() in shown
    assert "8 of 10 questions scored" in shown


def test_rich_is_imported_only_for_its_table():
    code = "import sys, sparsify.report.scores; sys.exit('rich' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


questions = st.builds(
    lambda number, template, label, value: ask(number, template, label, [value] * len(template.placeholders)),
    st.integers(0, 10**6),
    st.sampled_from(TEMPLATES),
    st.integers(0, 41),
    st.sampled_from(["erhu", "left", "first"]),
)


@given(st.lists(questions, min_size=1, max_size=30), st.lists(questions, max_size=30), st.data())
def test_groups_add_up_and_floors_are_bounds(train, asked, data):
    predicted = data.draw(st.lists(st.none() | st.integers(0, 41), min_size=len(asked), max_size=len(asked)))
    scores = score(asked, predicted, floor(train))
    for parts in (scores.types, scores.modalities):
        assert sum(group.correct for group in parts) == scores.overall.correct
        assert (
            sum(group.scored for group in parts)
            == scores.overall.scored
            == sum(label is not None for label in predicted)
        )
        assert sum(group.asked for group in parts) == scores.overall.asked == len(asked)
    correct = sum(label == question.label for question, label in zip(asked, predicted, strict=True))
    assert scores.overall.correct == correct
    # On the questions it was learnt on, no constant answer beats the floor, and the filled form is no worse.
    own = score(train, [data.draw(st.integers(0, 41))] * len(train), floor(train))
    for group in (*own.types, *own.modalities, own.overall):
        if group.scored:
            assert group.accuracy <= group.floor_template <= group.floor_filled == group.floor


def test_the_floor_of_the_real_validation_file():
    if "SPARSIFY_MUSIC_AVQA" not in os.environ:
        pytest.skip("SPARSIFY_MUSIC_AVQA is not set: the real validation file was not scored")
    root = DataRoot(os.environ["SPARSIFY_MUSIC_AVQA"])
    val = root.split("val")
    learnt = floor(val.questions, "val")
    scores = score(val.questions, [learnt.predict_template(q) for q in val.questions], learnt, split=val)
    assert scores.overall.correct == 2356
    assert f"{scores.overall.floor_template:.4f} {scores.overall.floor_filled:.4f}" == "0.5158 0.6178"
    by_type = " ".join(f"{group.floor_template:.4f}" for group in scores.types)
    assert by_type == "0.6575 0.5458 0.5633 0.2626 0.7879 0.3189 0.5845 0.5920 0.3114"
