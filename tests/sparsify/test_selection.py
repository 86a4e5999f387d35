"""Selection by loss: literal draws, weights without bias over an epoch, unit by unit, and its place in a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsify.config import Config
from sparsify.data.dataset import batch_questions
from sparsify.data.music_avqa import Question, QuestionType, Split
from sparsify.errors import CheckpointError
from sparsify.training.loading import draw_seed
from sparsify.training.selection import SELECTION, Selection, epoch_weights

COUNTING = QuestionType("Audio-Visual", "Counting")
CPU = torch.device("cpu")


def split_of(counts: list[int]) -> Split:
    """Videos v0, v1, ... with so many questions each; ids from 20000 on, which half precision cannot tell apart."""
    ids = iter(range(20_000, 30_000))
    questions = [
        Question(next(ids), f"v{video}", COUNTING, "Where?", (), "Where?", "two", 0)
        for video, count in enumerate(counts)
        for _ in range(count)
    ]
    return Split("train", Path("avqa-train.json"), tuple(questions), "0123")


def selection_of(counts: list[int], unit: str, epochs: int = 8, **changes: object) -> tuple[Split, Selection]:
    split = split_of(counts)
    keys = {"select.skip": 0.5, "select.unit": unit, "train.epochs": epochs} | changes
    return split, Selection(split, Config().replace(**keys), CPU)


def learn(split: Split, selection: Selection, losses: list[float], videos: list[str], dtype: torch.dtype) -> None:
    """A batch of ``videos`` with all of their questions."""
    asked = [q for name in videos for q in split.videos[name]]
    batch = batch_questions([[[1]] * len(split.videos[name]) for name in videos])
    selection.record(selection.places(asked), torch.tensor(losses, dtype=dtype), batch)


def test_the_weights_of_a_draw_are_literal() -> None:
    """Mean 3: the first two are hard; of the four at most as large, two are skipped and the others weigh double."""
    loss = torch.tensor([7.0, 5.0, 1.0, 2.0, 3.0, 0.0])
    assert epoch_weights(loss, 0.5, seed=0).tolist() == [1.0, 1.0, 0.0, 0.0, 2.0, 2.0]
    assert epoch_weights(loss, 0.25, seed=0)[2:].sum().item() == pytest.approx(4.0)
    assert draw_seed(0, 1) == 3121569863121461155  # blake2b-64 of "select 0 1", modulo 2^63


def test_what_has_no_loss_yet_is_kept_and_does_not_move_the_mean() -> None:
    loss = torch.tensor([math.nan, 4.0, 1.0, math.nan, 1.0])
    weights = torch.stack([epoch_weights(loss, 0.5, seed) for seed in range(20)])
    assert (weights[:, [0, 1, 3]] == 1).all()
    assert weights[:, [2, 4]].sum(1).tolist() == [2.0] * 20
    assert epoch_weights(torch.full((3,), math.nan), 0.5, 0).tolist() == [1.0] * 3


def test_the_draw_is_one_for_one_seed_and_others_for_others() -> None:
    loss = torch.arange(50.0)
    assert torch.equal(epoch_weights(loss, 0.5, 7), epoch_weights(loss, 0.5, 7))
    assert len({tuple(epoch_weights(loss, 0.5, seed).tolist()) for seed in range(10)}) == 10
    assert len({draw_seed(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16


@pytest.mark.parametrize("skip", [0.5, 0.3])
def test_the_sum_over_an_epoch_is_unbiased_in_any_number(skip: float) -> None:
    """Seven easy samples: half of them is no whole number. 6,000 draws; four standard errors."""
    loss = torch.tensor([1.0, 2.0, 0.5, 0.25, 1.5, 0.75, 2.5, 30.0, 40.0])
    gradient = torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, 6.0, -5.0])
    weights = torch.stack([epoch_weights(loss, skip, draw_seed(0, draw)) for draw in range(6000)]).double()
    assert weights[:, :7].unique().tolist() == pytest.approx([0.0, 1 / (1 - skip)])
    assert (weights[:, 7:] == 1).all()
    error = 4 * math.sqrt(skip / (1 - skip) / 6000)
    assert (weights.mean(0) - 1).abs().max() < error
    sums = weights @ gradient.double()
    assert abs(sums.mean() - gradient.sum()) < 4 * sums.std() / math.sqrt(6000)
    assert set((weights[:, :7] == 0).sum(1).tolist()) == ({3, 4} if skip == 0.5 else {2, 3})


@pytest.mark.parametrize("number", [1, 3])
def test_where_skipping_could_leave_none_one_is_left_that_weighs_all(number: int) -> None:
    """Nine tenths of three alike: 2.7. Two are skipped in every draw, and the third weighs three, without bias."""
    loss = torch.tensor([1.0] * number + [math.nan] * 2)
    weights = torch.stack([epoch_weights(loss, 0.9, seed) for seed in range(600)])
    assert (weights[:, number:] == 1).all()
    known = weights[:, :number]
    assert (known > 0).sum(1).tolist() == [1] * 600
    torch.testing.assert_close(known.sum(1), torch.full((600,), float(number)))
    assert (known.mean(0) - 1).abs().max() < 4 * math.sqrt((number - 1) / 600) + 1e-6


def test_losses_and_weights_live_where_the_model_does() -> None:
    """A device without values: what it is asked for must be made there."""
    selection = Selection(split_of([2, 1]), Config(), torch.device("meta"))
    assert {t.device.type for t in state_of(selection)} == {"meta"}
    questions = batch_questions([[[1], [1]], [[1]]])
    places = selection.places(split_of([2, 1]).questions).to("meta")
    on_meta = questions._replace(video_index=questions.video_index.to("meta"), rank=questions.rank.to("meta"))
    selection.record(places, torch.zeros(3, device="meta", dtype=torch.float16), on_meta)
    assert selection.weight[places].device.type == "meta"


@pytest.mark.parametrize(("epochs", "pruned"), [(15, range(1, 13)), (30, range(1, 26))])
def test_the_first_and_the_last_epochs_see_everything_with_weight_1(epochs: int, pruned: range) -> None:
    split, selection = selection_of([1] * 12, "question", epochs)
    for epoch in range(epochs):
        selection.start_epoch(epoch)
        if epoch in pruned:
            assert set(selection.weight.tolist()) == {0.0, 1.0, 2.0}
        else:
            assert torch.equal(selection.weight, torch.ones(12))
        assert torch.equal(selection.kept[epoch], selection.weight > 0)
        names = [f"v{i}" for i in range(12) if selection.weight[i] > 0]
        learn(split, selection, [float(name[1:]) for name in names], names, torch.float32)


def test_a_video_s_loss_is_the_mean_of_its_questions_and_they_go_together() -> None:
    split, selection = selection_of([3, 1, 2, 2], "video")
    learn(split, selection, [1.0, 2.0, 6.0, 8.0], ["v0", "v1"], torch.float32)
    learn(split, selection, [1.0, 2.0, 0.5, 0.0], ["v3", "v2"], torch.float32)
    assert selection.loss.tolist() == [3.0, 8.0, 0.25, 1.5]
    selection.start_epoch(1)  # mean 3.1875: v0, v2 and v3 are easy
    videos, asked = selection.asked()
    assert asked is None
    assert videos[1]
    assert videos == [w > 0 for w in selection.weight.tolist()]
    counts = [3, 1, 2, 2]
    left_out = [n for n, kept in zip(counts, videos, strict=True) if not kept]
    assert len(left_out) in (1, 2)
    assert selection.skipped() == (sum(left_out), len(left_out))


def test_a_question_s_loss_is_its_own_and_a_video_is_left_out_when_none_of_its_questions_is_asked() -> None:
    split, selection = selection_of([2, 2], "question")
    learn(split, selection, [1.0, 2.0, 3.0, 4.0], ["v1", "v0"], torch.float32)
    assert selection.loss.tolist() == [3.0, 4.0, 1.0, 2.0]
    selection.weight = torch.tensor([0.0, 1.0, 2.0, 0.0])
    assert selection.asked() == ([True, True], frozenset({20_001, 20_002}))
    assert selection.skipped() == (2, 0)
    selection.weight = torch.tensor([0.0, 0.0, 2.0, 1.0])
    assert selection.asked() == ([False, True], frozenset({20_002, 20_003}))
    assert selection.skipped() == (2, 1)


def test_what_is_not_in_a_batch_keeps_its_last_loss() -> None:
    split, selection = selection_of([1, 1, 1], "video")
    learn(split, selection, [5.0, 6.0, 7.0], ["v0", "v1", "v2"], torch.float32)
    learn(split, selection, [1.0], ["v1"], torch.float32)
    selection.end_epoch(0)
    assert selection.losses[0].tolist() == [5.0, 1.0, 7.0]
    assert selection.losses[1:].isnan().all()


@pytest.mark.parametrize("unit", ["video", "question"])
def test_losses_of_any_precision_go_to_the_right_sample(unit: str) -> None:
    """Places are int64 whatever the losses are: 4001 in half precision is 4000."""
    split, selection = selection_of([1] * 4002, unit)
    learn(split, selection, [0.5], ["v4001"], torch.float16)
    assert selection.loss[4001] == 0.5
    assert selection.loss[:4001].isnan().all()
    places = selection.places(split.questions)
    assert (places.dtype, selection.question_id.dtype, selection.loss.dtype) == (
        torch.int64,
        torch.int64,
        torch.float32,
    )


def state_of(selection: Selection) -> list[Tensor]:
    return [selection.loss, selection.weight, selection.kept, selection.losses]


def test_the_selection_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    split, selection = selection_of([2, 1, 3], "video")
    learn(split, selection, [1.0, 2.0, 9.0], ["v0", "v1"], torch.float32)
    selection.start_epoch(1)
    selection.end_epoch(1)
    selection.save(tmp_path)
    _, again = selection_of([2, 1, 3], "video")
    again.load(tmp_path)
    for ours, theirs in zip(state_of(selection), state_of(again), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0, equal_nan=True)


def test_a_selection_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    _, selection = selection_of([2, 1], "video")
    with pytest.raises(CheckpointError, match=r"selection\.safetensors: cannot be read"):
        selection.load(tmp_path)
    selection.save(tmp_path)
    _, other = selection_of([2, 1, 1], "video")
    with pytest.raises(CheckpointError, match=r"'loss': expected torch\.float32 \[3\], got torch\.float32 \[2\]"):
        other.load(tmp_path)
    saved = load_file(tmp_path / SELECTION)
    save_file(saved | {"question_id": saved["question_id"] + 1}, tmp_path / SELECTION)
    with pytest.raises(CheckpointError, match="expected the questions of the training split, in its order"):
        selection.load(tmp_path)
    del saved["kept"]
    save_file(saved, tmp_path / SELECTION)
    with pytest.raises(CheckpointError, match="'kept' is missing"):
        selection.load(tmp_path)
