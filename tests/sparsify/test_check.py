"""``check_root``: true counts, every fault found, and what is a fault."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import av
import numpy as np
import pytest

from sparsify.data.check import check_root
from sparsify.data.inspect import MediaState, inspect_media
from sparsify.data.music_avqa import DataRoot
from sparsify.errors import DataError

RATE = 16_000  # Hz


def row(number, video, **changes):
    fields = {
        "video_id": video,
        "question_id": number,
        "type": '["Audio", "Counting"]',
        "question_content": "Is there a <Object> sound?",
        "templ_values": '["erhu"]',
        "question_deleted": 0,
        "anser": "yes",
    }
    return fields | changes


def write_split(root: Path, name: str, rows: object) -> None:
    folder = root / "annotations"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"avqa-{name}.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))


def write_video(
    path: Path, loudness: float | None, seconds: float = 1.0, picture: bool = True, faststart: bool = False
) -> Path:
    """An mp4 with a grey picture and a 440 Hz tone of peak ``loudness``; None: no audio stream."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
        if picture:
            video = container.add_stream("mpeg4", rate=8, width=32, height=32, pix_fmt="yuv420p")
        if loudness is not None:
            audio = container.add_stream("aac", rate=RATE, layout="mono")
        if picture:
            rng = np.random.default_rng(0)
            for _ in range(round(8 * seconds)):
                image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(video.encode(None))
        if loudness is not None:
            wave = loudness * np.sin(2 * np.pi * 440 / RATE * np.arange(round(seconds * RATE)))
            for start in range(0, len(wave), 1024):
                frame = av.AudioFrame.from_ndarray(
                    wave[None, start : start + 1024].astype(np.float32), format="fltp", layout="mono"
                )
                frame.sample_rate, frame.pts = RATE, start
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """One file of each kind."""
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "fine.mp4", 0.5)
    write_video(folder / "mute.mp4", None)
    write_video(folder / "zeros.mp4", 0.0)
    write_video(folder / "whisper.mp4", 0.01)
    write_video(folder / "sound_only.mp4", 0.5, picture=False)
    whole = write_video(folder / "cut.mp4", 0.5, seconds=8.0, faststart=True).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("This is no video.\n" * 100)
    return folder


@pytest.mark.parametrize(
    ("name", "broken", "silent"),
    [
        ("fine", None, None),
        ("whisper", None, None),
        ("mute", None, "no audio stream"),
        ("zeros", None, "no sound above -60 dB"),
        ("sound_only", "no video stream", None),
        ("empty", "0 bytes", None),
        ("text", "not a readable video file", None),
        ("cut", "truncated: ", None),
        ("absent", "No such file", None),
    ],
)
def test_a_file_of_each_kind(clips, name, broken, silent):
    state = inspect_media(clips / f"{name}.mp4")
    if broken is None:
        assert state == MediaState(broken=None, silent=silent)
    else:
        assert state.silent is None
        assert broken in state.broken
        assert str(clips) not in state.broken


def test_a_sound_root_is_ok(tmp_path, clips):
    write_split(tmp_path, "train", [row(1, "a"), row(2, "a", anser="no", templ_values='["pipa"]'), row(3, "b")])
    write_split(tmp_path, "val", [row(4, "b")])
    (tmp_path / "videos").mkdir()
    shutil.copy(clips / "fine.mp4", tmp_path / "videos" / "a.mp4")
    shutil.copy(clips / "whisper.mp4", tmp_path / "videos" / "b.mp4")
    seen = []
    report = check_root(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert report.ok
    assert seen == [(1, 2), (2, 2)]
    assert [(split.name, split.questions, split.videos) for split in report.splits] == [("train", 3, 2), ("val", 1, 1)]
    assert report.splits[0].types["Audio/Counting"] == 3
    assert report.splits[1].fingerprint == DataRoot(tmp_path).split("val").fingerprint
    assert report.shared_videos == {"train/val": 1}  # counted, not wrong
    assert report.text().endswith("\nok")
    assert "train/val: 1 video in both (allowed)" in report.text()


def test_every_kind_of_media_is_found(tmp_path, clips):
    names = ["fine", "twin", "mute", "zeros", "whisper", "sound_only", "cut", "empty", "text", "absent"]
    write_split(tmp_path, "test", [row(i, name) for i, name in enumerate(names)])
    shutil.copytree(clips, tmp_path / "videos")
    shutil.copy(clips / "fine.mp4", tmp_path / "videos" / "twin.mp4")
    shutil.copy(clips / "fine.mp4", tmp_path / "videos" / "nobody.mp4")
    report = check_root(str(tmp_path), workers=2)
    media = report.media
    assert media.missing == ["absent"]
    assert list(media.broken) == ["cut", "empty", "sound_only", "text"]
    assert media.silent == {"mute": "no audio stream", "zeros": "no sound above -60 dB"}
    assert media.identical == [["fine", "twin"]]
    assert media.orphans == ["nobody"]
    assert not report.ok
    assert report.problems() == [
        "media: 4 broken videos: " + ", ".join(f"{name} ({reason})" for name, reason in media.broken.items())
    ]
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["ok"], data["media"]["asked"], data["media"]["present"]) == (False, 10, 9)
    text = report.text()
    for line in (
        "videos: 10 asked about, 9 here, 1 missing",
        "  of the 9 here: 4 broken, 2 silent",
        "  1 group of identical files: fine = twin",
        "  1 file nothing asks about: nobody",
    ):
        assert line in text.splitlines()


def test_without_media_no_file_is_opened(tmp_path, clips):
    write_split(tmp_path, "test", [row(1, "text"), row(2, "absent")])
    (tmp_path / "videos").mkdir()
    shutil.copy(clips / "text.mp4", tmp_path / "videos")
    report = check_root(tmp_path, media=False, progress=lambda done, total: pytest.fail("a file was opened"))
    assert report.ok
    assert (report.media.missing, report.media.broken) == (["absent"], {})
    assert "  not opened" in report.text().splitlines()


def test_a_question_in_two_splits_is_a_leak(tmp_path):
    write_split(tmp_path, "train", [row(1, "a"), row(2, "b")])
    write_split(tmp_path, "val", [row(3, "c")])
    write_split(tmp_path, "test", [row(2, "b"), row(4, "c")])
    report = check_root(tmp_path)
    assert report.leaks == {"train/val": [], "train/test": [2], "val/test": []}
    assert report.shared_videos == {"train/val": 0, "train/test": 1, "val/test": 1}
    assert report.problems() == ["train/test: 1 question id in both (leak): 2"]


def test_a_leaked_row_of_v2_without_an_id_is_found(tmp_path):
    fresh = row(0, "tOcOiTFQYp4")
    del fresh["question_id"]
    write_split(tmp_path, "train", [row(1, "a"), fresh])
    write_split(tmp_path, "test", [fresh])
    report = check_root(tmp_path)
    assert len(report.leaks["train/test"]) == 1
    assert not report.ok


def test_malformed_rows_are_all_listed_and_the_rest_counted(tmp_path):
    bad = [row(i, "a", anser="many") for i in range(7)]
    write_split(tmp_path, "val", [row(10, "a"), *bad, "row", row(11, "b")])
    write_split(tmp_path, "test", "{")
    report = check_root(tmp_path)
    val, test = report.splits
    assert (val.questions, len(val.errors), val.fingerprint) == (2, 8, "")
    assert "row 2, field 'anser': expected one of the 42 answers" in val.errors[0]
    assert (test.questions, len(test.errors)) == (0, 1)
    first, second = report.problems()
    assert first.startswith("val: 8 malformed rows: ")
    assert first.endswith("; and 3 more")
    assert second.startswith("test: 1 malformed row or file: ")
    assert "expected JSON" in second


def test_duplicates(tmp_path):
    rows = [
        row(1, "a"),
        row(1, "b"),
        row(2, "c"),
        row(3, "c"),
        row(4, "d"),
        row(5, "d", anser="no"),
        row(6, "e", question_deleted=1),
    ]
    write_split(tmp_path, "val", rows)
    report = check_root(tmp_path)
    (val,) = report.splits
    assert val.duplicate_ids == [1]
    assert val.repeated == ["c: Is there a erhu sound?"]
    assert val.contradictions == ["d: Is there a erhu sound?"]
    assert val.deleted == 1
    assert report.problems() == ["val: 1 question id twice: 1"]
    assert "val: 1 row marked question_deleted, left out" in report.text()


def test_what_the_data_set_does_not_list_is_counted(tmp_path):
    rows = [
        row(1, "a", templ_values='["theremin"]'),
        row(2, "b", templ_values='["theremin"]'),
        row(3, "a", question_content="Who sings?", templ_values="[]"),
        row(4, "b", type='["Visual", "Counting"]'),
    ]
    write_split(tmp_path, "val", rows)
    report = check_root(tmp_path)
    assert report.splits[0].unlisted == {
        "<Object> theremin": 2,
        "Who sings?": 1,
        "Is there a <Object> sound? as Visual/Counting": 1,
    }
    assert report.splits[0].templates == 1
    assert report.ok


def test_an_empty_list_is_malformed(tmp_path):
    write_split(tmp_path, "val", [])
    assert "expected questions, found none" in check_root(tmp_path).problems()[0]


def test_no_annotation_file_or_no_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"expected an annotation file, such as .*avqa-train\.json"):
        check_root(tmp_path)
    with pytest.raises(DataError, match="expected a data folder"):
        check_root(tmp_path / "nowhere")


def test_a_stopped_check_does_not_read_on(tmp_path, monkeypatch):
    names = [f"v{i}" for i in range(40)]
    write_split(tmp_path, "val", [row(i, name) for i, name in enumerate(names)])
    (tmp_path / "videos").mkdir()
    for name in names:
        (tmp_path / "videos" / f"{name}.mp4").touch()
    read = []

    def inspect(path):
        read.append(path)
        time.sleep(0.01)
        return MediaState()

    def stop(done, total):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsify.data.check.inspect_media", inspect)
    with pytest.raises(KeyboardInterrupt):
        check_root(tmp_path, progress=stop, workers=1)
    assert len(read) < 20  # one at least, the next maybe; not all


def test_the_real_root():
    if "SPARSIFY_MUSIC_AVQA" not in os.environ:
        pytest.skip("SPARSIFY_MUSIC_AVQA is not set: the real data folder was not checked")
    report = check_root(os.environ["SPARSIFY_MUSIC_AVQA"], media=False)  # with all of its videos there it takes minutes
    val = next(split for split in report.splits if split.name == "val")
    assert (val.questions, val.videos, val.templates, val.fingerprint) == (4568, 3815, 33, "f8488dc78bd4")
    assert (val.errors, val.duplicate_ids, val.repeated, val.contradictions, val.unlisted) == ([], [], [], [], {})
    lines = report.text().splitlines()
    assert "  Audio-Visual Counting       633" in lines
    assert "  all                       4,568" in lines
    assert len(lines) < 40  # thousands of missing videos are a number and a few examples
