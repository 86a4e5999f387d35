"""What a report asks of a trained run: curves, likeness, the key subset, examples; asked once, then remembered."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsify.cli import main
from sparsify.config import Config
from sparsify.data.music_avqa import DataRoot
from sparsify.report import cost, probe
from sparsify.report.asked import Asker

pytestmark = pytest.mark.usefixtures("_silent_model")


def test_a_trained_run_fills_every_section_and_is_asked_once(
    run: Callable[..., dict[str, Any]],
    tiny_config: Config,
    tiny_root: DataRoot,
    cache_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = run(config=tiny_config.replace(**{"train.epochs": 4, "select.skip": 0.5}))
    monkeypatch.setattr(probe, "KEEPS", (1.0, 0.5))
    monkeypatch.setattr(probe, "FENCES", (0.0, 1.5))
    output = tmp_path / "report"
    folders = {"--data": tiny_root.root, "--cache": cache_folder, "--output": output, "--clips": 2}
    command = ["report", str(tmp_path / "run"), *(str(part) for pair in folders.items() for part in pair)]
    assert main(command) == 0
    page = (output / "index.html").read_text()
    missing = page.count('class="missing"')
    assert missing == 3  # published systems, subsets, a dense run
    names = {path.name for path in output.glob("*.png")}
    assert names >= {
        "accuracy_against_keep.png", "accuracy_against_fence.png", "likeness-1.png", "kept-1.png",
    }  # fmt: skip
    assert [name for name in names if name.startswith("example-")]
    found = {
        (question["keep"], question["fence"]): value["accuracy"]
        for question, value in (
            (json.loads(key), value) for key, value in json.loads((output / "probe.json").read_text()).items()
        )
        if question["ask"] == "accuracy"
    }
    assert set(found) == {(1.0, 0.0), (0.5, 0.0), (1.0, 1.5)}
    assert found[1.0, 0.0] == results["evaluation"]["unmasked"]["accuracy"]
    for module, name in (("training.evaluate", "evaluate_dataset"), ("report.probe", "_neighbours"), ("ask", "ask")):
        monkeypatch.setattr(sys.modules[f"sparsify.{module}"], name, lambda *_, **__: pytest.fail("asked again"))
    assert main(command) == 0
    assert (output / "index.html").read_text() == page


def test_a_part_of_the_clips_is_spread_over_the_split(tiny_root: DataRoot, tmp_path: Path) -> None:
    split = tiny_root.split("train")  # 8 videos of 3 questions
    part = Asker([], tmp_path, tiny_root.root, clips=3)._part(split)
    videos = list(split.videos)
    assert list(part.videos) == [videos[0], videos[2], videos[5]]
    assert part.questions == tuple(q for q in split.questions if q.video_id in part.videos)
    assert part.fingerprint != split.fingerprint  # answers about one are not answers about the other
    assert Asker([], tmp_path, tiny_root.root, clips=8)._part(split) is split


def test_cost_is_that_of_the_model(tiny_config: Config) -> None:
    dense, masked, merged = cost.count(tiny_config)
    assert [variant.name for variant in (dense, masked, merged)] == ["dense", "masked, 50 % kept", "masked and merged"]
    first = dense.stages[0]
    side = tiny_config.vision.image_size // tiny_config.vision.patch_size
    assert (first.name, first.tokens) == ("frames, stage 1", tiny_config.clip.frames * side**2)
    for name in ("frames, stage 1", "sound, stage 1"):
        whole, half = (next(s for s in v.stages if s.name == name) for v in (dense, masked))
        assert half.tokens == whole.tokens / 2
        assert 0.4 < half.flop / whole.flop < 0.6
    mixed = [next(s for s in v.stages if s.name == "mixer").tokens for v in (dense, masked, merged)]
    assert mixed[0] == 2 * mixed[1] > 4 * mixed[2]
    assert all(stage.flop >= 0 for variant in (dense, masked, merged) for stage in variant.stages)
