"""Evaluation: every question of every readable video, the same in any batch, and the file of predictions."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from sparsify.config import Config
from sparsify.data.cache import ClipCache
from sparsify.data.music_avqa import DataRoot
from sparsify.data.vocabulary import Vocabulary
from sparsify.errors import DataError, UsageError
from sparsify.model import SparsifyModel
from sparsify.training import EvalResult, Prediction, evaluate, write_predictions
from sparsify.training.evaluate import masked_keep

pytestmark = pytest.mark.usefixtures("_silent_model")


@pytest.fixture
def model(tiny_config: Config) -> SparsifyModel:
    """Random weights with every gate and norm open, so that the answers depend on the clips."""
    torch.manual_seed(0)
    model = SparsifyModel(tiny_config, Vocabulary.build())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def cache(cache_folder: Path, tiny_config: Config) -> ClipCache:
    return ClipCache(cache_folder, tiny_config)


def probabilities(result: EvalResult) -> torch.Tensor:
    return torch.tensor([p.probability for p in result.predictions], dtype=torch.float64)


def test_every_question_of_every_video_is_scored_in_the_split_s_order(
    model: SparsifyModel, tiny_root: DataRoot, cache: ClipCache
) -> None:
    split = tiny_root.split("train")
    result = evaluate(model, tiny_root, "train", cache=cache)
    assert (result.asked, result.scored, result.skipped) == (24, 24, {})
    assert [p.question_id for p in result.predictions] == [q.id for q in split.questions]
    assert [p.type for p in result.predictions] == [q.type for q in split.questions]
    assert [p.correct for p in result.predictions] == [
        p.answer == q.answer for p, q in zip(result.predictions, split.questions, strict=True)
    ]
    assert result.accuracy == sum(p.correct for p in result.predictions) / 24
    assert result.scores.overall.accuracy == result.accuracy
    assert result.fingerprint == split.fingerprint
    assert all(1 / 42 <= p.probability <= 1 for p in result.predictions)
    assert result.counts() == "24 of 24 questions scored"


def test_answers_do_not_depend_on_the_batch_nor_on_the_cache(
    model: SparsifyModel, tiny_root: DataRoot, cache: ClipCache
) -> None:
    whole = evaluate(model, tiny_root, "train", cache=cache, batch_size=32, masked=True)
    for batch_size, clips in ((1, cache), (3, cache), (5, None)):
        other = evaluate(model, tiny_root, "train", cache=clips, batch_size=batch_size, masked=True)
        assert [p.answer for p in other.predictions] == [p.answer for p in whole.predictions]
        torch.testing.assert_close(probabilities(other), probabilities(whole), rtol=0, atol=1e-5)
        assert other.loss == pytest.approx(whole.loss, abs=1e-5)
        assert other.super_tokens == whole.super_tokens


def test_a_masked_evaluation_is_the_same_each_time_and_another_with_another_seed(
    model: SparsifyModel, tiny_root: DataRoot, cache: ClipCache
) -> None:
    unmasked = evaluate(model, tiny_root, "train", cache=cache)
    first, again, other = (evaluate(model, tiny_root, "train", cache=cache, masked=True, seed=s) for s in (7, 7, 8))
    assert torch.equal(probabilities(first), probabilities(again))
    assert not torch.allclose(probabilities(first), probabilities(other), atol=1e-6)
    assert not torch.allclose(probabilities(first), probabilities(unmasked), atol=1e-6)
    assert (unmasked.keep, first.keep) == (1.0, 0.5)
    assert first.super_tokens < unmasked.super_tokens


def test_the_masked_share_is_the_smallest_that_training_uses(tiny_config: Config) -> None:
    assert masked_keep(tiny_config) == 0.5
    assert masked_keep(tiny_config.replace(**{"mask.schedule": [0.5, 0.25, 1.0]})) == 0.25
    assert masked_keep(tiny_config.replace(dense=True)) == 1.0


def test_a_broken_video_is_skipped_with_all_of_its_questions_and_counted(
    model: SparsifyModel, tiny_root: DataRoot, cache: ClipCache
) -> None:
    split = tiny_root.split("train")
    broken = list(split.videos)[2]
    path = tiny_root.video_path(broken)
    path.unlink()
    path.write_text("not a video")
    done = []
    result = evaluate(model, tiny_root, split, cache=cache, batch_size=2, advance=lambda n=1, note="": done.append(n))
    assert (result.asked, result.scored) == (24, 21)
    assert list(result.skipped) == [broken]
    assert str(path) in result.skipped[broken]
    assert broken not in {q.video_id for q in split.questions if q.id in {p.question_id for p in result.predictions}}
    assert result.scores.overall.asked == 24
    assert result.counts() == "21 of 24 questions scored (1 unreadable videos skipped)"
    assert sum(done) == 8


def test_a_split_without_a_readable_video_is_an_error(
    model: SparsifyModel, tiny_root: DataRoot, cache: ClipCache
) -> None:
    for video in tiny_root.split("test").videos:
        tiny_root.video_path(video).unlink()
    with pytest.raises(DataError, match=r"avqa-test\.json: none of the 2 videos of this split can be read \(.*0000001"):
        evaluate(model, tiny_root, "test", cache=cache)


def test_evaluation_leaves_the_model_as_it_was(model: SparsifyModel, tiny_root: DataRoot, cache: ClipCache) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for training in (True, False):
        model.train(training)
        evaluate(model, tiny_root, "test", cache=cache)
        assert model.training is training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("inputs", ["blind", "deaf", "textonly"])
def test_controls_are_recorded_and_change_the_answers(
    model: SparsifyModel, tiny_root: DataRoot, cache: ClipCache, inputs: str
) -> None:
    both = evaluate(model, tiny_root, "train", cache=cache)
    control = evaluate(model, tiny_root, "train", cache=cache, inputs=inputs)
    assert control.inputs == control.to_dict()["inputs"] == inputs
    assert not torch.allclose(probabilities(both), probabilities(control), atol=1e-6)


def test_results_are_plain_values(model: SparsifyModel, tiny_root: DataRoot, cache: ClipCache) -> None:
    data = evaluate(model, tiny_root, "test", cache=cache).to_dict()
    assert json.loads(json.dumps(data))["scores"]["overall"]["scored"] == 6
    assert "predictions" not in data


def test_predictions_are_written_as_json_and_csv_and_nothing_else(
    model: SparsifyModel, tiny_root: DataRoot, cache: ClipCache, tmp_path: Path
) -> None:
    predictions = evaluate(model, tiny_root, "test", cache=cache).predictions
    folder = tmp_path / "out"
    folder.mkdir()
    write_predictions(folder / "p.json", predictions)
    rows = json.loads((folder / "p.json").read_text())
    assert rows[0] == {
        "question_id": predictions[0].question_id,
        "type": "Visual/Location",
        "answer": predictions[0].answer,
        "probability": predictions[0].probability,
        "correct": predictions[0].correct,
    }
    assert len(rows) == 6
    write_predictions(folder / "p.csv", predictions)
    with (folder / "p.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == list(Prediction._fields)
    assert [int(row["question_id"]) for row in table] == [p.question_id for p in predictions]
    assert [float(row["probability"]) for row in table] == [p.probability for p in predictions]
    with pytest.raises(UsageError, match=r"--predictions .*p\.txt: expected a name ending in \.json or \.csv"):
        write_predictions(folder / "p.txt", predictions)
    assert sorted(p.name for p in folder.iterdir()) == ["p.csv", "p.json"]
