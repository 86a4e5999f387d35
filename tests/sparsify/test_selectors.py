"""Selectors on tables small enough to rank by hand, and the records of a run that they rank."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sparsify.config import Config
from sparsify.data.music_avqa import DataRoot, Question, QuestionType
from sparsify.errors import CheckpointError, UsageError
from sparsify.training import InterruptedRun, select_key_subset
from sparsify.training.selectors import SELECTORS, Sample, read_records

pytestmark = pytest.mark.usefixtures("_silent_model")
Run = Callable[..., dict[str, Any]]


def sample(number: int, score: float, loss: float = 1.0, template: str = "Where?", answer: str = "two") -> Sample:
    kind = QuestionType("Audio", "Counting")
    question = Question(number, f"v{number}", kind, template, (), template, answer, 0)
    return Sample(number, (question,), Fraction(score), loss)


def chosen(selector: str, samples: list[Sample], size: int, seed: int = 0) -> list[int]:
    return [s.number for s in SELECTORS[selector](samples, size, seed)]


def test_paper_ranks_by_score_and_number() -> None:
    samples = [sample(4, 2), sample(9, 3), sample(1, 2), sample(3, 0.5)]
    assert chosen("paper", samples, 3) == [9, 1, 4]


def test_random_is_decided_by_the_seed_and_blind_to_scores_and_order() -> None:
    samples = [sample(i, i % 7) for i in range(30)]
    first = chosen("random", samples, 10)
    assert len(set(first)) == 10
    assert chosen("random", samples[::-1], 10) == first
    assert len({tuple(chosen("random", samples, 10, seed)) for seed in range(5)}) == 5
    drawn = Counter(i for seed in range(600) for i in chosen("random", samples, 10, seed))
    assert all(abs(count - 200) < 5 * math.sqrt(600 * 2 / 9) for count in drawn.values())


def test_stratified_keeps_the_shares_of_the_templates_and_the_best_of_each() -> None:
    """Eight of A and four of B, best A first: of six, four are of A."""
    a = [sample(i, 20 - i, template="A?") for i in range(8)]
    b = [sample(i, 12 - i, template="B?") for i in range(8, 12)]
    picked = chosen("stratified", b + a, 6)
    assert sorted(picked) == [0, 1, 2, 3, 8, 9]
    assert picked[0] == 0  # A lacks four, B two
    assert sorted(chosen("paper", b + a, 6)) == [0, 1, 2, 3, 4, 5]
    assert sorted(chosen("stratified", b + a, 12)) == list(range(12))


def test_stratified_takes_videos_whole() -> None:
    kind = QuestionType("Audio", "Counting")
    templates = ["AA", "A", "B", "AB"]
    videos = [
        Sample(n, tuple(Question(10 * n + i, f"v{n}", kind, t, (), t, "two", 0) for i, t in enumerate(asked)),
               Fraction(5 - n), 1.0)
        for n, asked in enumerate(templates)
    ]  # fmt: skip
    # A is asked four times and B twice by four videos: two of them should ask A twice and B once. v0 fills A's share.
    assert chosen("stratified", videos, 2) == [0, 2]


def test_robust_leaves_the_hardest_tenth_and_counts_what_is_asked_already_for_less() -> None:
    hard = sample(0, 10, loss=9.0)
    same = [sample(i, 4, template="A?") for i in range(1, 6)]
    other = [sample(i, 3, template="B?", answer=str(i)) for i in range(6, 10)]
    # 1 leads with 4; then A with the same answer counts 4/2, B 3 each; when all B are taken, 4/2, 4/3, ...
    assert chosen("robust", [hard, *same, *other], 6) == [1, 6, 7, 8, 9, 2]
    assert chosen("paper", [hard, *same, *other], 2) == [0, 1]
    assert 0 in chosen("robust", [hard, *same, *other], 10)  # nothing else is left
    unknown = sample(0, 10, loss=math.nan)
    assert 0 not in chosen("robust", [unknown, *same, *other], 9)


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_every_selector_takes_so_many_different_samples(name: str) -> None:
    samples = [sample(i, i * 7 % 5, loss=i % 3, template="AB"[i % 2]) for i in range(20)]
    for size in (0, 1, 7, 20):
        assert len(set(chosen(name, samples, size))) == size


@pytest.fixture
def config(tiny_config: Config) -> Config:
    return tiny_config.replace(**{"train.epochs": 7, "select.skip": 0.5, "select.unit": "question"})


def test_the_records_of_a_run_rank_as_select_key_subset_does(
    run: Run, config: Config, tiny_root: DataRoot, tmp_path: Path
) -> None:
    run(config=config)
    records = read_records(tmp_path / "run", "question")
    saved = load_file(tmp_path / "run" / "last" / "selection.safetensors")
    kept = [saved["question_id"][row] for row in saved["kept"]]
    assert [s.number for s in SELECTORS["paper"](records.samples, 24, 0)] == select_key_subset(kept, 24)
    assert (records.epochs, records.skipping) == (7, True)
    assert records.fingerprint == tiny_root.split("train").fingerprint
    for s in records.samples:
        place = saved["question_id"].tolist().index(s.number)
        assert s.loss == pytest.approx(saved["losses"][3:, place].mean().item())
    videos = read_records(tmp_path / "run", "video").samples
    assert [len(s.questions) for s in videos] == [3] * 8
    by_id = {s.number: s.score for s in records.samples}
    assert videos[2].score == (by_id[6] + by_id[7] + by_id[8]) / 3


def test_records_that_are_missing_or_of_other_data_are_refused(
    run: Run, config: Config, tiny_root: DataRoot, tmp_path: Path
) -> None:
    with pytest.raises(InterruptedRun):
        run(config=config, stop_after=1)
    with pytest.raises(UsageError, match="run: no epoch is finished yet"):
        read_records(tmp_path / "run", "video")
    with pytest.raises(InterruptedRun):
        run(config=config, resume=True, stop_after=4)
    assert read_records(tmp_path / "run", "video").epochs == 1
    with pytest.raises(
        UsageError, match=r"avqa-val\.json: is not the annotation file that the run trained on .* --train"
    ):
        read_records(tmp_path / "run", "video", tiny_root.annotation_path("val"))
    (tmp_path / "run" / "last" / "selection.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"selection\.safetensors: missing; this checkpoint is not whole"):
        read_records(tmp_path / "run", "video")


def test_a_video_that_cannot_be_read_is_no_candidate(
    run: Run, config: Config, tiny_root: DataRoot, tmp_path: Path
) -> None:
    path = tiny_root.video_path("00000003")
    path.unlink()
    path.write_bytes(b"")
    run(config=config)
    assert [s.number for s in read_records(tmp_path / "run", "video").samples] == [0, 1, 2, 4, 5, 6, 7]
