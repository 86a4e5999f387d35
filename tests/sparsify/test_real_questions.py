"""The real validation questions from end to end, on rendered stand-ins for 200 of their videos: check, train, eval."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sparsify.cli import main

VIDEOS = 200
# Small enough to train on two hundred clips in seconds; the same classes.
SMALL = [
    "clip.frames=2",
    "clip.segment_seconds=3.0",
    "vision.image_size=64",
    "vision.unit=16",
    "vision.window_size=2",
    "vision.depths=[1,1]",
    "vision.heads=[1,2]",
    "vision.embed_dim=16",
    "audio.spec_size=64",
    "audio.mel_bins=32",
    "audio.unit=16",
    "audio.window_size=2",
    "audio.depths=[1,1]",
    "audio.heads=[1,2]",
    "audio.embed_dim=16",
    "fusion.dim=32",
    "text.dim=32",
    "train.epochs=1",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for the first 200 videos; their questions split by video into train, val and test."""
    if "SPARSIFY_MUSIC_AVQA" not in os.environ:
        pytest.skip("SPARSIFY_MUSIC_AVQA is not set: nothing ran on the real validation questions")
    real = Path(os.environ["SPARSIFY_MUSIC_AVQA"]) / "annotations" / "avqa-val.json"
    root = tmp_path_factory.mktemp("real")
    command = ["synth", str(root), "--standins", str(real), "--videos", str(VIDEOS)]
    assert main([*command, "--size", "64", "--fps", "2", "--seconds", "3"]) == 0
    rows = json.loads(real.read_text(encoding="utf-8"))
    videos = list(dict.fromkeys(row["video_id"] for row in rows))[:VIDEOS]
    (root / "annotations" / "avqa-val.json").unlink()  # a copy of the whole file: most of its videos are not here
    for name, part in (("train", videos[:120]), ("val", videos[120:160]), ("test", videos[160:])):
        chosen = [row for row in rows if row["video_id"] in set(part)]
        (root / "annotations" / f"avqa-{name}.json").write_text(json.dumps(chosen), encoding="utf-8")
    return root


def test_check_train_and_eval_run_on_the_real_questions(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {
        name: len(json.loads((root / "annotations" / f"avqa-{name}.json").read_text(encoding="utf-8")))
        for name in ("train", "val", "test")
    }
    report = root / "check.json"
    assert main(["data", "check", str(root), "--json", str(report)]) == 0
    shown = capsys.readouterr().out
    assert f"{asked['train']:,}" in shown
    assert json.loads(report.read_text(encoding="utf-8"))["ok"] is True

    run = root / "run"
    options = [word for option in SMALL for word in ("--set", option)]
    assert main(["train", str(root), "--preset", "demo", "--output", str(run), *options]) == 0
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert (run / "best" / "model.safetensors").exists()
    assert results["config"]["train"]["epochs"] == 1

    capsys.readouterr()
    predictions = root / "predictions.json"
    assert main(["eval", str(run), str(root), "--split", "test", "--predictions", str(predictions)]) == 0
    assert f"{asked['test']:,} of {asked['test']:,}" in capsys.readouterr().out
    assert len(json.loads(predictions.read_text(encoding="utf-8"))) == asked["test"]
