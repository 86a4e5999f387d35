"""Bad input on the command line: one line on stderr, the exit code of its kind, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from sparsify.cli import main
from sparsify.config import Config
from sparsify.data.vocabulary import Vocabulary
from sparsify.model import SparsifyModel

QUESTION = "How many instruments are sounding in the video?"
ROW = {
    "video_id": "00000001",
    "question_id": 1,
    "type": '["Audio", "Counting"]',
    "question_content": "Is there a <Object> sound?",
    "templ_values": '["violin"]',
    "question_deleted": 0,
    "anser": "yes",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good checkpoint, broken ones, good and broken videos, and broken data folders."""
    place = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    small = {"clip.frames": 1, "vision.depths": [1, 1, 1], "audio.depths": [1, 1, 1]}
    model = SparsifyModel(Config.preset("demo").replace(**small), Vocabulary.build())
    model.save_pretrained(place / "run" / "best")
    _broken_checkpoints(place, model)
    _write_clip(place / "clip.mp4")
    (place / "empty.mp4").touch()
    (place / "text.mp4").write_text("this is no video")
    with av.open(str(place / "sound.mp4"), "w") as container:
        audio = container.add_stream("aac", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 48_000
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
    for name, text in {
        "missing": None,
        "no-json": "{",
        "no-list": "{}",
        "no-field": json.dumps([{k: v for k, v in ROW.items() if k != "type"}]),
        "answer": json.dumps([ROW | {"anser": "theremin"}]),
        "value": json.dumps([ROW | {"templ_values": "[]"}]),
        "no-places": json.dumps([ROW]),
        "type": json.dumps([ROW | {"type": '["Audio", "Tasting"]'}]),
    }.items():
        (place / name / "annotations").mkdir(parents=True)
        (place / name / "videos").mkdir()
        if text is not None:
            (place / name / "annotations" / "avqa-test.json").write_text(text)
    return place


def _broken_checkpoints(place: Path, model: SparsifyModel) -> None:
    for name in ("no-weights", "pickle", "version", "shape", "no-tensors"):
        model.save_pretrained(place / name)
    (place / "no-weights" / "model.safetensors").unlink()
    torch.save({}, place / "pickle" / "model.pt")
    (place / "pickle" / "model.safetensors").unlink()
    config = json.loads((place / "version" / "config.json").read_text())
    (place / "version" / "config.json").write_text(json.dumps(config | {"version": 99}))
    config["fusion"]["dim"] = 64
    (place / "shape" / "config.json").write_text(json.dumps(config))
    (place / "no-tensors" / "model.safetensors").write_bytes(b"\0" * 64)
    (place / "young").mkdir()
    (place / "young" / "config.json").write_text("{}")
    (place / "young" / "metrics.jsonl").touch()
    (place / "model.pt").touch()
    (place / "folder").mkdir()


def _write_clip(path: Path) -> None:
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=8)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        for t in range(8):
            picture = np.full((64, 64, 3), 20 * t, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())


ASK = ["ask", "run", "clip.mp4"]
CASES = [
    # usage
    ([], 2, "required: COMMAND"),
    (["fly"], 2, "'fly'"),
    (["data"], 2, "sparsify data --help"),
    (["synth"], 2, "ROOT"),
    (["train"], 2, "ROOT"),
    (["ask", "run", "clip.mp4"], 2, "QUESTION"),
    (["synth", "x", "--train", "-3"], 2, "--train"),
    (["synth", "x", "--train", "many"], 2, "whole number"),
    (["synth", "x", "--seconds", "0"], 2, "above 0"),
    (["synth", "x", "--size", "33"], 2, "even number of pixels"),
    (["synth", "x", "--fps", "500"], 2, "between 1 and 60"),
    (["synth", "x", "--seed", "9223372036854775808"], 2, "below 2^63"),
    (["synth", "x", "--train", "0", "--val", "0", "--test", "0"], 2, "at least one clip"),
    (["synth", "x", "--videos", "3"], 2, "--standins"),
    (["synth", "x", "--questions", "3", "4", "--standins", "answer"], 2, "--questions"),
    (["synth", "x", "--questions", "5", "4"], 2, "least <= most"),
    (["synth", "clip.mp4"], 2, "is a file"),
    (["train", "missing", "--preset", "grand"], 2, "no preset 'grand'; the presets are adaptive, demo, paper"),
    (["train", "missing", "--set", "train.lrr=1"], 2, "no key 'train.lrr'; did you mean train.lr"),
    (["train", "missing", "--set", "train.lr"], 2, "expected KEY=VALUE"),
    (["train", "missing", "--set", "train.lr=high"], 2, "train.lr: expected float"),
    (["train", "missing", "--epochs", "0"], 2, "at least 1"),
    (["train", "missing", "--blind", "--deaf"], 2, "not allowed with"),
    (["train", "missing", "--resume"], 2, "--output"),
    (["train", "missing", "--resume", "--output", "nowhere", "--epochs", "3"], 2, "nowhere holds no run to resume"),
    (["eval", "run", "missing", "--split", "exam"], 2, "train, val, test, got 'exam'"),
    (["eval", "run", "missing", "--videos", "0"], 2, "--videos"),
    (["eval", "run", "missing", "--predictions", "out.txt"], 2, ".json or .csv"),
    (["eval", "run", "missing", "--json", "no/scores.json"], 2, "the folder no does not exist"),
    (["data", "check", "missing", "--json", "folder"], 2, "is a folder"),
    ([*ASK, ""], 2, "empty"),
    ([*ASK, QUESTION, "  "], 2, "empty"),
    ([*ASK, "x" * 10_000], 2, "10,000"),
    ([*ASK, "violin " * 100], 2, "at most 64 words, got 100"),
    ([*ASK, QUESTION, "--explain", "out.doc"], 2, "ends in .png"),
    ([*ASK, QUESTION, "--explain", "no/out.png"], 2, "the folder no does not exist"),
    ([*ASK, QUESTION, "--explain", "folder.png/out.png"], 2, "does not exist"),
    (["info", "run", "--preset", "demo"], 2, "got both"),
    (["info", "--preset", "grand"], 2, "no preset 'grand'"),
    # data
    (["data", "check", "nowhere"], 3, "nowhere"),
    (["data", "check", "missing"], 3, "avqa-train.json"),
    (["train", "nowhere"], 3, "nowhere"),
    (["eval", "run", "missing"], 3, "avqa-test.json"),
    (["eval", "run", "no-places", "--localisation"], 3, "scenes.jsonl"),
    (["eval", "run", "no-json"], 3, "avqa-test.json"),
    (["eval", "run", "no-list"], 3, "list"),
    (["eval", "run", "no-field"], 3, "type"),
    (["eval", "run", "answer"], 3, "theremin"),
    (["eval", "run", "value"], 3, "<Object>"),
    (["eval", "run", "type"], 3, "Tasting"),
    # media
    (["ask", "run", "nowhere.mp4", QUESTION], 4, "nowhere.mp4"),
    (["ask", "run", "empty.mp4", QUESTION], 4, "empty.mp4"),
    (["ask", "run", "text.mp4", QUESTION], 4, "text.mp4"),
    (["ask", "run", "sound.mp4", QUESTION], 4, "sound.mp4"),
    (["ask", "run", "folder", QUESTION], 4, "folder"),
    # checkpoint
    (["ask", "nowhere", "clip.mp4", QUESTION], 5, "RUN nowhere does not exist"),
    (["ask", "model.pt", "clip.mp4", QUESTION], 5, "is a file"),
    (["ask", "folder", "clip.mp4", QUESTION], 5, "no config.json"),
    (["ask", "young", "clip.mp4", QUESTION], 5, "no best/ yet"),
    (["ask", "no-weights", "clip.mp4", QUESTION], 5, "model.safetensors"),
    (["ask", "pickle", "clip.mp4", QUESTION], 5, "model.pt is a pickle"),
    (["ask", "version", "clip.mp4", QUESTION], 5, "99"),
    (["ask", "shape", "clip.mp4", QUESTION], 5, "shape"),
    (["ask", "no-tensors", "clip.mp4", QUESTION], 5, "safetensors"),
    (["eval", "nowhere", "missing"], 5, "nowhere"),
    (["info", "nowhere"], 5, "nowhere"),
    (["info", "no-weights"], 5, "model.safetensors"),
    (["info", "no-tensors"], 5, "model.safetensors"),
    (["info", "version"], 5, "99"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "message"), CASES, ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None
)
def test_bad_input_is_one_line_and_an_exit_code(
    arguments: list[str],
    code: int,
    message: str,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.delenv("SPARSIFY_DEBUG", raising=False)
    before = sorted(place.rglob("*"))
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sparsify: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "Traceback" not in err
    assert len(err) < 500
    assert sorted(place.rglob("*")) == before


def _raising(error: BaseException) -> object:
    def run(*_: object, **__: object) -> object:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "sparsify: interrupted\n"),
        (KeyboardInterrupt("stopped; saved in runs/x"), 130, "sparsify: stopped; saved in runs/x\n"),
        (PermissionError(13, "Permission denied", "/some/x"), 1, "sparsify: error: /some/x: Permission denied\n"),
        (OSError(28, "No space left on device"), 1, "sparsify: error: No space left on device\n"),
        (MemoryError(), 1, "sparsify: error: out of memory\n"),
        (
            ModuleNotFoundError("No module named 'timm.models'", name="timm.models"),
            1,
            "sparsify: error: this command needs the package timm; "
            "install it with: pip install 'sparsify-avqa[avqa]'\n",
        ),
        (
            ModuleNotFoundError("No module named 'tinysoundfont'", name="tinysoundfont"),
            1,
            "sparsify: error: this command needs the package tinysoundfont; "
            "install it with: pip install --no-deps tinysoundfont\n",
        ),
        (
            RuntimeError("a\nb"),
            1,
            "sparsify: error: RuntimeError: a b (unexpected; SPARSIFY_DEBUG=1 shows where)\n",
        ),
    ],
)
def test_other_errors(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPARSIFY_DEBUG", raising=False)
    monkeypatch.setattr("sparsify.cli.info.run", _raising(error))
    assert main(["info"]) == code
    assert capsys.readouterr().err == line


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_DEBUG", "1")
    monkeypatch.setattr("sparsify.cli.info.run", _raising(RuntimeError("here")))
    with pytest.raises(RuntimeError, match="here"):
        main(["info"])


def test_a_warning_is_one_line() -> None:
    code = (
        "import warnings\nfrom sparsify.cli import info, main\nplain = warnings.formatwarning\n"
        "info.run = lambda _: warnings.warn('slow path', RuntimeWarning)\n"
        "assert main(['info']) == 0\nassert warnings.formatwarning is plain"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "sparsify: warning: slow path\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    """As `sparsify info | head -0` does it: exit code 141, nothing on stderr."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "sparsify", "info", "--preset", "demo"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_exit_code_reaches_the_shell() -> None:
    done = subprocess.run([sys.executable, "-m", "sparsify", "info", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 5
    assert done.stderr.startswith("sparsify: error: RUN nowhere")
