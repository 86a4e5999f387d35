"""What ``synth.write`` and ``synth.write_standins`` leave on the disk: layout, determinism, resuming, refusals."""

from __future__ import annotations

import importlib.util
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from sparsify import synth
from sparsify.data.music_avqa import DataRoot, read_split
from sparsify.errors import DataError, UsageError
from sparsify.synth import sound, writer
from sparsify.synth.standins import _scene

FIELDS = ["video_id", "question_id", "type", "question_content", "templ_values", "question_deleted", "anser"]
TINY = {"train": 5, "val": 2, "test": 3, "seed": 3, "size": 64, "fps": 4, "seconds": 3.0}


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return synth.write(tmp_path_factory.mktemp("synth") / "set", workers=1, **TINY)


def test_layout_and_fields_are_those_of_the_data_set(root):
    names = {f"annotations/avqa-{split}.json" for split in ("train", "val", "test")} | {"scenes.jsonl", "synth.json"}
    assert set(tree(root)) == names | {f"videos/{i:08d}.mp4" for i in range(10)}
    rows = json.loads((root / "annotations/avqa-val.json").read_text())
    assert [list(row) for row in rows] == [FIELDS] * len(rows)
    assert all(isinstance(json.loads(row["templ_values"]), list) for row in rows)
    assert all(len(json.loads(row["type"])) == 2 and row["question_deleted"] == 0 for row in rows)


def test_the_reader_takes_it_and_splits_are_disjoint(root):
    data = DataRoot(root)
    splits = [data.split(name) for name in ("train", "val", "test")]
    assert [len(split.videos) for split in splits] == [5, 2, 3]
    ids = [q.id for split in splits for q in split.questions]
    videos = [video for split in splits for video in split.videos]
    assert len(set(ids)) == len(ids)
    assert len(set(videos)) == 10
    assert all(data.video_path(video).stat().st_size > 1000 for video in videos)
    assert all(len(questions) in (3, 4) for split in splits for questions in split.videos.values())
    scenes = [json.loads(line) for line in (root / "scenes.jsonl").read_text().splitlines()]
    assert [scene["video_id"] for scene in scenes] == videos
    assert [scene["split"] for scene in scenes] == ["train"] * 5 + ["val"] * 2 + ["test"] * 3


def test_same_seed_same_bytes_whatever_the_workers(root, tmp_path):
    assert tree(synth.write(tmp_path / "two", workers=2, **TINY)) == tree(root)


def test_another_seed_gives_another_set(root, tmp_path):
    other = synth.write(tmp_path / "other", workers=1, **{**TINY, "seed": 4, "val": 0, "test": 0})
    name = "annotations/avqa-train.json"
    assert (other / name).read_bytes() != (root / name).read_bytes()
    assert (other / "videos/00000000.mp4").read_bytes() != (root / "videos/00000000.mp4").read_bytes()


def test_progress_counts_every_clip(tmp_path):
    seen = []
    settings = {**TINY, "train": 2, "val": 1, "test": 0}
    synth.write(tmp_path / "a", workers=1, progress=lambda *p: seen.append(p), **settings)
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    seen.clear()
    synth.write(tmp_path / "a", workers=1, progress=lambda *p: seen.append(p), **settings)
    assert seen == [(0, 3), (3, 3)]  # what is there is counted at once


def test_an_interrupted_run_leaves_whole_files_and_is_finished_by_the_next(root, tmp_path):
    target = tmp_path / "set"

    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synth.write(target, workers=1, progress=interrupt, **TINY)
    assert not list((target / "annotations").iterdir())
    begun = tree(target)
    assert sum(name.endswith(".mp4") for name in begun) == 4
    assert begun.items() <= tree(root).items()
    (target / "videos" / ".00000007.123.part").write_bytes(b"half")  # as a killed process leaves it
    synth.write(target, workers=1, **TINY)
    assert tree(target) == tree(root)


def test_a_clip_that_cannot_be_encoded_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        (tmp_path / "set" / "videos" / f".00000000.{os.getpid()}.part").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsify.synth.movie._encode", fail)
    with pytest.raises(DataError, match=r"00000000\.mp4 cannot be written: No space left on device"):
        synth.write(tmp_path / "set", workers=1, **TINY)
    assert not list((tmp_path / "set" / "videos").iterdir())


def test_a_finished_set_is_left_as_it_is(root, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in root.glob("videos/*")}
    monkeypatch.setattr(writer, "render_clip", lambda *_: pytest.fail("rendered again"))
    synth.write(root, workers=1, **TINY)
    assert {p: p.stat().st_mtime_ns for p in root.glob("videos/*")} == before


def test_a_folder_with_another_data_set_is_refused(root, tmp_path):
    with pytest.raises(UsageError, match=r"holds a data set with seed = 3, not 4; choose another folder"):
        synth.write(root, **{**TINY, "seed": 4})
    (tmp_path / "real" / "annotations").mkdir(parents=True)
    with pytest.raises(UsageError, match="holds a data set that synth has not written"):
        synth.write(tmp_path / "real", **TINY)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "synth.json").write_text("{")
    with pytest.raises(UsageError, match=r"synth\.json: cannot be read"):
        synth.write(tmp_path / "broken", **TINY)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; expected a folder"):
        synth.write(tmp_path / "file", **TINY)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("train", -1, "train: expected a number of clips, 0 or more, got -1"),
        ("seconds", 0.5, "seconds: expected between 3 and 600, got 0.5"),
        ("size", 65, "size: expected an even number of pixels from 32 to 2048, got 65"),
        ("fps", 0, "fps: expected between 1 and 60, got 0"),
        ("questions", (4, 3), "questions: expected (least, most)"),
        ("workers", 0, "workers: expected at least 1"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path, setting, value, message):
    with pytest.raises(UsageError) as error:
        synth.write(tmp_path / "set", **{**TINY, setting: value})
    assert message in str(error.value)
    assert not (tmp_path / "set").exists()


def test_no_clips_at_all_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="at least one clip"):
        synth.write(tmp_path / "set", train=0, val=0, test=0)


def test_a_missing_sound_font_says_what_to_install(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(sound.importlib.util, "find_spec", lambda n: None if n == "tinysoundfont" else find(n))
    with pytest.raises(UsageError, match="pip install --no-deps tinysoundfont"):
        synth.write(tmp_path / "set", **TINY)
    monkeypatch.setattr(sound.importlib.util, "find_spec", lambda n: None if n == "pretty_midi" else find(n))
    with pytest.raises(UsageError, match="pip install pretty_midi"):
        synth.write(tmp_path / "set", **TINY)
    assert not (tmp_path / "set").exists()


def row(video_id, question_id, kind, text, values, answer):
    return dict(
        zip(FIELDS, [video_id, question_id, json.dumps(kind), text, json.dumps(values), 0, answer], strict=True)
    )


def test_standins_show_what_the_questions_speak_of(tmp_path, monkeypatch):
    rows = [
        row(
            "00000028",
            1,
            ["Audio-Visual", "Existential"],
            "Is the <Object> in the video always playing?",
            ["ukulele"],
            "yes",
        ),
        row("00000028", 2, ["Visual", "Location"], "Where is the performance?", [], "outdoor"),
        row("00000300", 3, ["Visual", "Counting"], "How many <Object> are in the entire video?", ["cello"], "three"),
        row("00000400", 4, ["Visual", "Counting"], "How many <Object> are in the entire video?", ["cello"], "two"),
    ]
    file = tmp_path / "avqa-val.json"
    file.write_text(json.dumps(rows))
    scenes = {}
    render = writer.render_clip
    monkeypatch.setattr(writer, "render_clip", lambda s, p, fps: (scenes.update({p.stem: s}), render(s, p, fps)))
    (tmp_path / "root" / "videos").mkdir(parents=True)
    (tmp_path / "root" / "videos" / "00000400.mp4").write_bytes(b"a real video")
    ids = synth.write_standins(tmp_path / "root", file, videos=3, size=64, fps=4, seconds=3.0, workers=1)
    assert ids == ["00000028", "00000300", "00000400"]
    assert (tmp_path / "root" / "annotations" / "avqa-val.json").read_bytes() == file.read_bytes()
    assert (tmp_path / "root" / "videos" / "00000400.mp4").read_bytes() == b"a real video"
    assert [p.instrument for p in scenes["00000028"].seen] == ["ukulele"]
    assert scenes["00000028"].place == "outdoor"
    assert [p.instrument for p in scenes["00000300"].seen] == ["cello"] * 3
    assert len(read_split(tmp_path / "root" / "annotations" / "avqa-val.json").videos) == 3


def test_standins_for_the_real_file():
    real = os.environ.get("SPARSIFY_MUSIC_AVQA")
    if not real:
        pytest.skip("SPARSIFY_MUSIC_AVQA is not set: the real validation file is not tested")
    split = read_split(Path(real) / "annotations" / "avqa-val.json")
    for video_id, questions in list(split.videos.items())[:400]:
        scene = _scene(questions, random.Random(video_id), 4.0, 128)
        assert 1 <= len(scene.seen) <= 5
        assert np.isfinite([p.voice.level for p in scene.seen if p.voice]).all()
