"""What a report asks of a trained run: curves, likeness, the key subset, examples; asked once, then remembered."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.cli import main
from sparsify.config import Config
from sparsify.data.music_avqa import DataRoot
from sparsify.report import cost, kept, probe
from sparsify.report.asked import Asker
from sparsify.report.runs import load_run
from sparsify.training.selectors import SELECTORS, Sample, read_records

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
    answers = [(json.loads(key), value) for key, value in json.loads((output / "probe.json").read_text()).items()]
    answers = [((q["keep"], q["fence"]), value) for q, value in answers if q["ask"] == "accuracy"]
    found = {key: value["accuracy"] for key, value in answers}
    tokens = {key: value["super_tokens"] for key, value in answers}
    assert set(found) == {(1.0, 0.0), (0.5, 0.0), (1.0, 1.5)}
    assert tokens[0.5, 0.0] < tokens[1.0, 0.0], "half of the input was hidden"
    assert tokens[1.0, 1.5] < tokens[1.0, 0.0], "fewer scores are beyond a higher fence"
    assert found[1.0, 0.0] == results["evaluation"]["unmasked"]["accuracy"]
    for module, name in (("training.evaluate", "evaluate_dataset"), ("report.probe", "_neighbours"), ("ask", "ask")):
        monkeypatch.setattr(sys.modules[f"sparsify.{module}"], name, lambda *_, **__: pytest.fail("asked again"))
    assert main(command) == 0
    assert (output / "index.html").read_text() == page


def test_examples_are_of_the_model_that_the_page_is_about(
    run: Callable[..., dict[str, Any]],
    tiny_config: Config,
    tiny_root: DataRoot,
    cache_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two runs in turn reported on in one folder, the first one twice."""
    monkeypatch.setattr(probe, "KEEPS", (1.0, 0.5))
    monkeypatch.setattr(probe, "FENCES", (0.0, 1.5))
    command = ["--data", str(tiny_root.root), "--cache", str(cache_folder), "--output", str(tmp_path / "report")]
    pages = []
    for seed in (0, 1):
        run(f"run-{seed}", config=tiny_config.replace(**{"train.epochs": 1, "train.seed": seed}))
    for seed in (0, 1, 0):
        assert main(["report", str(tmp_path / f"run-{seed}"), *command]) == 0
        pages.append((tmp_path / "report" / "index.html").read_text())
    assert pages[2] == pages[0]
    assert len(list((tmp_path / "report").glob("example-*.png"))) == 2 * 2  # models, clips


def test_likeness_compares_neighbours_in_the_direction_that_it_names() -> None:
    """Tokens that tell where they are: clip, image, row and column."""
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (2, 3, 2, 2)), indexing="ij"), dim=-1)
    tokens = places.flatten(1, 3)  # [V, images * side * side, 4]
    grid = probe._grid(tokens, 3)
    assert torch.equal(grid, places)
    steps = {
        name: set(map(tuple, (b - a).flatten(0, -2).tolist())) for name, (a, b) in probe._pairs(grid, grid).items()
    }
    assert steps == {
        "next frame, same place": {(0, 1, 0, 0)},
        "same frame, next place": {(0, 0, 0, 1)},
        "another clip, same place": {(1, 0, 0, 0)},
        "next moment, same pitch": {(0, 0, 0, 1)},
        "next segment, same place": {(0, 1, 0, 0)},
        "another clip, same moment": {(1, 0, 0, 0)},
    }


def test_what_a_key_subset_kept_is_counted_by_type_template_and_difficulty(tiny_root: DataRoot) -> None:
    questions = tiny_root.split("train").questions[:10]
    losses = [0.5, math.nan, 0.1, 0.9, 0.3, 0.7, 0.2, 0.8, 0.4, 0.6]
    samples = [Sample(q.id, (q,), Fraction(i), loss) for i, (q, loss) in enumerate(zip(questions, losses, strict=True))]
    fifth = kept._fifths(samples)
    assert [fifth[q.id] for q in questions] == [2, 0, 0, 4, 1, 3, 1, 4, 2, 3]
    shares = kept._shares(questions, questions[:4], lambda q: str(fifth[q.id]))
    assert {(s.name, s.asked, s.kept) for s in shares} == {
        ("0", 2, 2), ("1", 2, 0), ("2", 2, 1), ("3", 2, 0), ("4", 2, 1),
    }  # fmt: skip
    assert [s.name for s in kept._ordered(shares, ["4", "3", "2", "1", "0"])] == ["4", "3", "2", "1", "0"]


def test_the_chosen_quarter_is_that_of_the_run(
    run: Callable[..., dict[str, Any]], tiny_config: Config, tiny_root: DataRoot, tmp_path: Path
) -> None:
    """By its own training file, which the data folder's need not be."""
    run(config=tiny_config.replace(**{"train.epochs": 4, "select.skip": 0.5}))
    other = tmp_path / "other.json"
    other.write_text("[]")
    loaded = load_run(tmp_path / "run")
    found = kept.kept_by_paper(loaded, DataRoot(tiny_root.root, train=other))
    records = read_records(tmp_path / "run", "video")
    best = SELECTORS["paper"](records.samples, 2, 0)  # of 8 videos
    assert found.share == sum(len(s.questions) for s in best) / sum(len(s.questions) for s in records.samples)
    assert sum(share.asked for share in found.types) == sum(share.asked for share in found.templates) == 24
    types = Counter(str(q.type) for s in best for q in s.questions)
    assert {share.name: share.kept for share in found.types if share.kept} == dict(types)


def test_a_part_of_the_clips_is_spread_over_the_split(tiny_root: DataRoot, tmp_path: Path) -> None:
    split = tiny_root.split("train")  # 8 videos of 3 questions
    part = Asker([], tmp_path, tiny_root, clips=3)._part(split)
    videos = list(split.videos)
    assert list(part.videos) == [videos[0], videos[2], videos[5]]
    assert part.questions == tuple(q for q in split.questions if q.video_id in part.videos)
    assert part.fingerprint != split.fingerprint  # answers about one are not answers about the other
    assert Asker([], tmp_path, tiny_root, clips=8)._part(split) is split


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
