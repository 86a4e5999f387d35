"""The reader of annotation files: every question kept, both editions read, every malformed row named."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.data.music_avqa import DataRoot, Question, QuestionType, fingerprint, read_split
from sparsify.data.templates import ANSWERS, TEMPLATES, TYPES
from sparsify.errors import DataError

ROW = {
    "video_id": "00000028",
    "question_id": 7,
    "type": '["Audio-Visual", "Existential"]',
    "question_content": "Is the <Object> in the video always playing?",
    "templ_values": '["ukulele"]',
    "question_deleted": 0,
    "anser": "yes",
}


def row(**changes):
    return ROW | changes


def without(*names):
    return {key: value for key, value in ROW.items() if key not in names}


def write(folder: Path, rows: object, name: str = "avqa-val.json") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return path


def test_a_row_becomes_a_question(tmp_path):
    split = read_split(write(tmp_path, [ROW]))
    assert split.name == "val"
    assert split.questions == (
        Question(
            id=7,
            video_id="00000028",
            type=QuestionType("Audio-Visual", "Existential"),
            template="Is the <Object> in the video always playing?",
            values=("ukulele",),
            text="Is the ukulele in the video always playing?",
            answer="yes",
            label=ANSWERS.index("yes"),
        ),
    )
    assert str(split.questions[0].type) == "Audio-Visual/Existential"


def test_every_question_of_every_video_is_kept_in_file_order(tmp_path):
    rows = [row(video_id=video, question_id=i) for i, video in enumerate(["b", "a", "b", "c", "a", "b"])]
    split = read_split(write(tmp_path, rows))
    assert {video: [q.id for q in questions] for video, questions in split.videos.items()} == {
        "b": [0, 2, 5],
        "a": [1, 4],
        "c": [3],
    }
    assert list(split.videos) == ["b", "a", "c"]
    assert sum(map(len, split.videos.values())) == len(split.questions) == 6


def test_spaces_and_full_width_question_marks(tmp_path):
    rows = [
        row(
            question_content="How many sounding <Object> in the video\uff1f",
            type='["Audio-Visual", "Counting"]',
            anser="ten",
        ),
        row(question_content="Are there <Object> and <Object> sound? ", templ_values='["erhu", "pipa"]', question_id=8),
        row(question_content=" Is the  <Object> in the video always playing ?", question_id=9),
    ]
    split = read_split(write(tmp_path, "\ufeff" + json.dumps(rows, ensure_ascii=False)))
    assert [q.text for q in split.questions] == [
        "How many sounding ukulele in the video?",
        "Are there erhu and pipa sound?",
        "Is the ukulele in the video always playing?",
    ]
    assert split.questions[0].answer == "ten"
    assert split.questions[2].template == ROW["question_content"]  # the data set's own form


def test_values_and_templates_beyond_the_known_are_read(tmp_path):
    rows = [row(templ_values='["theremin"]'), row(question_id=8, question_content="Who sings?", templ_values="[]")]
    assert [q.text for q in read_split(write(tmp_path, rows)).questions] == [
        "Is the theremin in the video always playing?",
        "Who sings?",
    ]


def test_deleted_rows_are_left_out_and_counted(tmp_path):
    split = read_split(
        write(tmp_path, [row(question_deleted=1), row(question_id=8), without("question_deleted") | {"question_id": 9}])
    )
    assert [q.id for q in split.questions] == [8, 9]
    assert split.deleted == 1


V2 = {k: v for k, v in ROW.items() if k not in ("question_id", "question_deleted")} | {"video_id": "tOcOiTFQYp4"}


class TestVersion2:
    """Rows that v2.0 added have no question_id; its files mix them with rows of v1."""

    def test_rows_without_an_id_get_one_from_their_content(self, tmp_path):
        old = without("question_id", "question_deleted")
        rows = [ROW, V2, V2 | {"video_id": "tOcOiTFQYp4_flip"}, V2 | {"anser": "no"}, old]
        split = read_split(write(tmp_path, rows))
        ids = [q.id for q in split.questions]
        assert ids[0] == 7
        assert len(set(ids)) == 5
        assert all(2**40 <= i < 2**53 for i in ids[1:])  # out of the way of real ids, exact in JSON and in fp64
        assert split.edition == "MUSIC-AVQA v2.0"
        again = read_split(write(tmp_path, [V2, ROW], "other.json"))
        assert again.questions[0].id == ids[1]  # so that a leak between files is seen

    def test_copies_of_a_row_all_count(self, tmp_path):
        split = read_split(write(tmp_path, [V2, V2, V2]))
        assert len({q.id for q in split.questions}) == 3

    @pytest.mark.parametrize("video_id", ["00000028", "esa00000446", "synth000012"])
    def test_elsewhere_an_id_is_required(self, tmp_path, video_id):
        path = write(tmp_path, [ROW, without("question_id") | {"video_id": video_id}])
        with pytest.raises(DataError, match="row 2, field 'question_id': expected the field to be there"):
            read_split(path)


BAD_ROWS = {
    "not an object": (["yes"], "expected an object with the fields of a question, got a list"),
    "null": (None, "expected an object with the fields of a question, got null"),
    **{
        f"no {name}": (without(name), f"field '{name}': expected the field to be there")
        for name in ROW
        if name != "question_deleted"
    },
    "empty object": ({}, "field 'video_id': expected the field to be there, got only an empty object"),
    "video_id empty": (row(video_id=""), "field 'video_id': expected a video's file name without .mp4"),
    "video_id a number": (row(video_id=28), "field 'video_id': .*got 28"),
    "video_id a path": (row(video_id="../../secret"), "field 'video_id': .*no path separators"),
    "video_id with a backslash": (row(video_id="a\\b"), "field 'video_id'"),
    "video_id ..": (row(video_id=".."), "field 'video_id'"),
    "video_id with a zero byte": (row(video_id="a\0b"), "field 'video_id'"),
    "video_id with spaces around": (row(video_id="a "), "field 'video_id'"),
    "question_id a string": (row(question_id="7"), "field 'question_id': expected an integer from 0 on, got '7'"),
    "question_id a fraction": (row(question_id=7.5), "field 'question_id'"),
    "question_id true": (row(question_id=True), "field 'question_id'"),
    "question_id negative": (row(question_id=-1), "field 'question_id'"),
    "question_id too large": (row(question_id=2**63), "field 'question_id'"),
    "type not JSON": (row(type="Audio"), r"field 'type': expected a JSON list in a string, like .* got 'Audio'"),
    "type a list": (row(type=["Audio", "Counting"]), "field 'type': expected a JSON list in a string"),
    "type not of the nine": (
        row(type='["Audio", "Temporal"]'),
        "field 'type': expected one of Audio/Counting, .*Temporal",
    ),
    "type too long": (row(type='["Audio", "Counting", ""]'), "field 'type': expected one of"),
    "question empty": (row(question_content=" "), "field 'question_content': expected a question, got ' '"),
    "question a number": (row(question_content=3), "field 'question_content'"),
    "placeholder left open": (
        row(question_content="Is the <Object> in <LR?"),
        "field 'question_content': expected placeholders",
    ),
    "placeholder without value": (
        row(templ_values="[]"),
        "field 'templ_values': expected 1 values for <Object> in 'Is the <Object> .*got '\\[\\]'",
    ),
    "value left over": (row(templ_values='["erhu", "left"]'), "field 'templ_values': expected 1 values"),
    "value for no placeholder": (
        row(question_content="Is there a voiceover?"),
        "field 'templ_values': expected no values for a question without placeholders",
    ),
    "value empty": (row(templ_values='[""]'), "field 'templ_values': expected a JSON list of values"),
    "values not JSON": (row(templ_values="['ukulele']"), "field 'templ_values': expected a JSON list of values"),
    "values not strings": (row(templ_values="[1]"), "field 'templ_values': expected a JSON list of values"),
    "values null": (row(templ_values=None), "field 'templ_values': .*got None"),
    "answer unknown": (
        row(anser="eleven"),
        "field 'anser': expected one of the 42 answers of MUSIC-AVQA, got 'eleven'",
    ),
    "answer in capitals": (row(anser="Yes"), "field 'anser'"),
    "answer a number": (row(anser=2), "field 'anser': .*got 2"),
    "deleted not 0 or 1": (row(question_deleted="no"), "field 'question_deleted': expected 0 or 1, got 'no'"),
    "id used before": (
        row(question_id=1),
        "field 'question_id': expected an id used once in the file, got 1, which row 1 has",
    ),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_malformed_row_is_named(tmp_path, bad):
    bad_row, message = BAD_ROWS[bad]
    path = write(tmp_path, [row(question_id=1), row(question_id=2), bad_row])
    with pytest.raises(DataError, match=rf"avqa-val\.json: row 3[:,].*{message}") as caught:
        read_split(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


BAD_FILES = {
    "empty": ("", "expected JSON: Expecting value at line 1, column 1"),
    "not JSON": ("video_id,question_id\n1,2\n", "expected JSON"),
    "cut off": (json.dumps([ROW])[:-10], "expected JSON"),
    "an object": (json.dumps({"rows": [ROW]}), "expected a JSON list of rows, got an object"),
    "a string": ('"rows"', "expected a JSON list of rows, got a string"),
    "no rows": ("[]", "expected questions, found none"),
    "all deleted": (
        json.dumps([row(question_deleted=1)]),
        r"expected questions, found none \(1 marked question_deleted\)",
    ),
    "a number of 5,000 digits": ("[" + "9" * 5000 + "]", "expected a JSON list of rows"),
    "100,000 levels": ("[" * 100_000, "expected a JSON list of rows"),
}


@pytest.mark.parametrize("bad", BAD_FILES)
def test_a_malformed_file_is_named(tmp_path, bad):
    text, message = BAD_FILES[bad]
    with pytest.raises(DataError, match=rf"avqa-val\.json: {message}"):
        read_split(write(tmp_path, text))


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "avqa-val.json"
    path.write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match="expected UTF-8 text, got byte 0xff at 2"):
        read_split(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json: no such annotation file"):
        read_split(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match="expected a readable annotation file"):
        read_split(tmp_path)


class TestDataRoot:
    def test_finds_the_standard_files(self, tmp_path):
        write(tmp_path / "annotations", [ROW])
        root = DataRoot(tmp_path)
        assert [root.has(name) for name in ("train", "val", "test")] == [False, True, False]
        assert root.split("val") is root.split("val")
        assert root.video_path("00000028") == tmp_path / "videos" / "00000028.mp4"
        with pytest.raises(DataError, match=r"avqa-train\.json: no such annotation file"):
            root.split("train")

    def test_files_named_on_purpose_replace_them(self, tmp_path):
        write(tmp_path / "annotations", [ROW])
        other = write(tmp_path, [ROW, row(question_id=8)], "val_balanced.json")
        split = DataRoot(tmp_path, val=other).split("val")
        assert (split.name, len(split.questions), split.path) == ("val", 2, other)
        named = DataRoot(tmp_path, test=tmp_path / "absent.json")
        assert named.has("test")
        with pytest.raises(DataError, match=r"absent\.json: no such annotation file"):
            named.split("test")

    def test_refuses_what_is_no_folder(self, tmp_path):
        with pytest.raises(DataError, match=r"expected a data folder .* found nothing there"):
            DataRoot(tmp_path / "nowhere")
        with pytest.raises(DataError, match=r"expected a data folder .* found a file"):
            DataRoot(write(tmp_path, "[]"))

    def test_refuses_a_split_of_another_name(self, tmp_path):
        with pytest.raises(DataError, match="no split 'dev'; expected one of train, val, test"):
            DataRoot(tmp_path).split("dev")


QUESTIONS = [
    Question(i, "v", TYPES[i % 9], TEMPLATES[0].text, ("erhu",), "Is there a erhu sound?", ANSWERS[i % 42], i % 42)
    for i in range(6)
]


@given(st.permutations(QUESTIONS))
def test_the_fingerprint_does_not_depend_on_the_order(shuffled):
    assert fingerprint(shuffled) == fingerprint(QUESTIONS) == "d8683a5d3e85"


@pytest.mark.parametrize(
    "change", [{"video_id": "00000029"}, {"question_id": 8}, {"templ_values": '["erhu"]'}, {"anser": "no"}]
)
def test_the_fingerprint_depends_on_what_is_asked_and_answered(tmp_path, change):
    plain = read_split(write(tmp_path, [ROW], "a.json"))
    changed = read_split(write(tmp_path, [row(**change)], "b.json"))
    reformatted = read_split(write(tmp_path, json.dumps([ROW], indent=4), "c.json"))
    assert plain.fingerprint != changed.fingerprint
    assert plain.fingerprint == reformatted.fingerprint


@pytest.mark.parametrize(
    ("count", "edition"),
    [(9185, "MUSIC-AVQA v1 test, first release"), (9129, "MUSIC-AVQA v1 test, updated"), (9130, None)],
)
def test_the_two_test_files_in_circulation_are_told_apart(tmp_path, count, edition):
    split = read_split(write(tmp_path, [row(question_id=i) for i in range(count)], "avqa-test.json"))
    assert split.edition == edition
    assert split.describe().startswith(f"test ({edition}): " if edition else "test: ")
    assert f"{count:,} questions, 1 videos, fingerprint {split.fingerprint}" in split.describe()


@pytest.fixture(scope="module")
def real_val():
    if "SPARSIFY_MUSIC_AVQA" not in os.environ:
        pytest.skip("SPARSIFY_MUSIC_AVQA is not set: the real validation file was not read")
    return DataRoot(os.environ["SPARSIFY_MUSIC_AVQA"]).split("val")


def test_the_real_validation_file(real_val):
    assert real_val.describe() == (
        "val (MUSIC-AVQA v1 val, updated): 4,568 questions, 3,815 videos, fingerprint f8488dc78bd4"
    )
    assert Counter(str(q.type) for q in real_val.questions) == {
        "Audio/Counting": 511,
        "Audio/Comparative": 295,
        "Visual/Counting": 600,
        "Visual/Location": 613,
        "Audio-Visual/Existential": 495,
        "Audio-Visual/Location": 461,
        "Audio-Visual/Counting": 633,
        "Audio-Visual/Comparative": 549,
        "Audio-Visual/Temporal": 411,
    }
    assert {(q.template, q.type) for q in real_val.questions} == {(t.text, t.type) for t in TEMPLATES}
    assert set(ANSWERS) - {q.answer for q in real_val.questions} == {"ten"}
    assert sum(map(len, real_val.videos.values())) == 4568
    assert Counter(map(len, real_val.videos.values()))[1] < len(real_val.videos)  # some have more than one
    assert not any("<" in q.text or "\uff1f" in q.text or q.text != q.text.strip() for q in real_val.questions)


def test_the_built_in_set_asks_types_as_often(real_val):
    from sparsify.synth.planning import TYPE_PERCENT

    count = Counter(tuple(question.type) for question in real_val.questions)
    assert {kind: round(100 * n / count.total(), 1) for kind, n in count.items()} == TYPE_PERCENT
