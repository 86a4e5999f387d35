"""Subset files: ids or annotations name the same part of a split; leaks and what does not belong are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsify.data.music_avqa import DataRoot, Split, fingerprint, read_split
from sparsify.data.subset import apply_subset, subset_document, to_row
from sparsify.errors import DataError


@pytest.fixture
def train(tiny_root: DataRoot) -> Split:
    return tiny_root.split("train")


@pytest.fixture
def val(tiny_root: DataRoot) -> Split:
    return tiny_root.split("val")


def write(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_ids_and_annotations_name_the_same_part_in_the_split_s_order(train: Split, val: Split, tmp_path: Path) -> None:
    ids = [7, 2, 3]
    by_id = {q.id: q for q in train.questions}
    document = subset_document(ids, train.fingerprint, {"selector": "paper"})
    assert document == {
        "format": "sparsify-subset", "version": 1, "fingerprint": train.fingerprint, "selector": "paper",
        "question_ids": [7, 2, 3],
    }  # fmt: skip
    files = [
        write(tmp_path / "ids.json", document),
        write(tmp_path / "rows.json", [to_row(by_id[i]) for i in ids]),
    ]
    for path in files:
        part, leaks = apply_subset(train, path, [val])
        assert [q.id for q in part.questions] == [2, 3, 7]
        assert (part.name, part.path, leaks) == ("train", path, {})
        assert list(part.videos) == ["00000000", "00000001", "00000002"]
        assert part.fingerprint == fingerprint(by_id[i] for i in ids) != train.fingerprint


def test_a_row_reads_back_as_the_question_it_was(tmp_path: Path) -> None:
    """A YouTube id marks v2.0: the row has no id, and gets one from its content that the written row must keep."""
    row = {
        "video_id": "sN4cqP6Yd9k_flip", "type": '["Audio-Visual", "Comparative"]',
        "question_content": "Is the <Object>  more rhythmic than the <Object> ?", "templ_values": '["erhu", "弦"]',
        "anser": "no",
    }  # fmt: skip
    first = read_split(write(tmp_path / "a.json", [row]))
    again = read_split(write(tmp_path / "b.json", [to_row(q) for q in first.questions]))
    assert again.questions == first.questions
    assert first.questions[0].id >= 2**40
    assert again.fingerprint == first.fingerprint


def test_a_question_of_an_evaluated_split_is_refused_or_left_out(train: Split, val: Split, tmp_path: Path) -> None:
    leaked = val.questions[1]
    ids = write(tmp_path / "ids.json", subset_document([1, leaked.id], train.fingerprint, {}))
    rows = write(tmp_path / "rows.json", [to_row(train.questions[1]), to_row(leaked)])
    for path in (ids, rows):
        with pytest.raises(DataError, match=f"1 of its 2 question ids, such as {leaked.id}, are of the split 'val'"):
            apply_subset(train, path, [val])
        part, leaks = apply_subset(train, path, [val], filter_leaks=True)
        assert [q.id for q in part.questions] == [1]
        assert leaks == {"val": 1}
    only = write(tmp_path / "only.json", subset_document([leaked.id], train.fingerprint, {}))
    with pytest.raises(DataError, match=r"only\.json: expected questions to train on, found none but leaks"):
        apply_subset(train, only, [val], filter_leaks=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "not JSON"),
        ("3", "expected a list of annotations, or an object with format 'sparsify-subset' and version 1"),
        ({"format": "sparsify-subset", "version": 2}, "and version 1"),
        ({"fingerprint": "0123"}, "field 'fingerprint': chosen from the split 0123, but .*avqa-train.json has"),
        ({"question_ids": "1"}, "field 'question_ids': expected a list of integers"),
        ({"question_ids": [1, 2.0]}, "field 'question_ids': expected a list of integers"),
        ({"question_ids": [1, True]}, "field 'question_ids': expected a list of integers"),
        ({"question_ids": [1, 1]}, "expected every id once, 1 are repeated"),
        ({"question_ids": [1, 99]}, r"question id 99 is not in .*avqa-train\.json \(1 such ids\)"),
        ({"question_ids": []}, "expected questions to train on, found none$"),
        ([{"video_id": "a"}], "row 1, field 'question_id'"),
        ("[]", "expected questions, found none"),
    ],
)
def test_what_is_no_subset_of_the_split_is_refused_by_name(
    train: Split, tmp_path: Path, data: Any, message: str
) -> None:
    if isinstance(data, dict) and "format" not in data:
        data = subset_document([1], train.fingerprint, {}) | data
    path = write(tmp_path / "part.json", data)
    with pytest.raises(DataError, match=rf"part\.json: .*{message}"):
        apply_subset(train, path, [])


def test_a_missing_file_and_a_question_that_asks_otherwise_are_refused(train: Split, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        apply_subset(train, tmp_path / "none.json", [])
    row = to_row(train.questions[1]) | {"templ_values": '["drum"]'}
    with pytest.raises(DataError, match=r"question id 1 asks 'Is there a drum sound\?' about 00000000; in .* it asks"):
        apply_subset(train, write(tmp_path / "rows.json", [row]), [])
