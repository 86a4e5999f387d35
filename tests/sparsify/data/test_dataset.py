from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from sparsify.batch import Batch
from sparsify.config import Config
from sparsify.data import dataset as dataset_module
from sparsify.data.cache import ClipCache
from sparsify.data.dataset import Item, VideoDataset, batch_questions, collate, prepare
from sparsify.data.media import read_clip
from sparsify.data.music_avqa import DataRoot, Question, QuestionType, Split
from sparsify.data.seeds import mask_seed
from sparsify.errors import ConfigError, SparsifyError, UsageError

TEXTS = ("How many instruments are sounding in the video?", "Is the violin louder than the piano?", "Where?")


class Letters:
    """A vocabulary in which a word's id is its length."""

    def encode(self, text: str, max_words: int) -> list[int]:
        words = text.split()
        if not 0 < len(words) <= max_words:
            raise UsageError(f"{len(words)} words")
        return [len(word) for word in words]


def split_of(videos: dict[str, int]) -> Split:
    """Video names and how many questions each has."""
    counting = QuestionType("Audio-Visual", "Counting")
    questions = [
        Question(2**40 + 100 * v + n, name, counting, TEXTS[n % 3], (), TEXTS[n % 3], "two", 10 * v + n)
        for v, (name, count) in enumerate(videos.items())
        for n in range(count)
    ]
    return Split("train", Path("avqa-train.json"), tuple(questions), "0123")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, media: Any) -> DataRoot:
    """Videos 0 to 7; ``text`` and ``cut`` are broken and ``gone`` is not there."""
    folder = tmp_path_factory.mktemp("root")
    (folder / "videos").mkdir()
    for n in range(8):
        media.write(folder / "videos" / f"{n}.mp4", frames=6 + n, size=(64, 64), tones=(300 + 100 * n,) * 2)
    (folder / "videos" / "text.mp4").write_text("no video")
    (folder / "videos" / "cut.mp4").write_bytes((folder / "videos" / "7.mp4").read_bytes()[:-3000])
    return DataRoot(folder)


@pytest.fixture
def cache(tmp_path: Path, tiny_config: Config) -> ClipCache:
    return ClipCache(tmp_path / "cache", tiny_config)


def forbid(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> None:
    def called(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"{name} called")

    monkeypatch.setattr(module, name, called)


def test_items(root: DataRoot, tiny_config: Config, cache: ClipCache) -> None:
    split = split_of({"1": 2, "0": 3})
    for kept in (cache, None):
        data = VideoDataset(root, split, tiny_config, Letters(), kept)
        assert len(data) == 2
        video_id, clip, questions, words, error = data[1]
        assert (video_id, error) == ("0", None)
        assert questions == split.questions[2:]
        assert words == ([3, 4, 11, 3, 8, 2, 3, 6], [2, 3, 6, 6, 4, 3, 6], [6])
        expected = read_clip(root.video_path("0"), tiny_config)
        assert clip is not None
        assert all(torch.equal(a, b) for a, b in zip(clip, expected, strict=True))


def test_broken_videos_say_so_and_are_tried_once(
    root: DataRoot, tiny_config: Config, cache: ClipCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = VideoDataset(root, split_of({"text": 1, "0": 1, "gone": 2, "cut": 1}), tiny_config, Letters(), cache)
    items = [data[n] for n in range(4)]
    assert [item.clip is None for item in items] == [True, False, True, True]
    assert [item.video_id for item in items] == ["text", "0", "gone", "cut"]
    assert "text.mp4: not a readable video file" in items[0].error
    assert "gone.mp4: cannot read the video: No such file" in items[2].error
    assert "without its index" in items[3].error
    assert len(items[2].questions) == 2
    assert data.skipped == {item.video_id: item.error for item in items if item.error}
    forbid(monkeypatch, cache, "get")
    assert data[0] == items[0]
    known = VideoDataset(root, split_of({"0": 1}), tiny_config, Letters(), cache, skipped={"0": "known"})
    assert (known[0].clip, known[0].error) == (None, "known")


def test_a_cache_that_fails_is_no_broken_video(
    root: DataRoot, tiny_config: Config, cache: ClipCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_bytes", full)
    data = VideoDataset(root, split_of({"0": 1}), tiny_config, Letters(), cache)
    with pytest.raises(SparsifyError, match="the disk is full"):
        data[0]
    with pytest.raises(SparsifyError, match="the disk is full"):
        prepare(root, split_of({"0": 1}), tiny_config, cache)


@pytest.mark.parametrize(
    ("inputs", "sees", "hears"), [("blind", 0, 1), ("deaf", 1, 0), ("textonly", 0, 0), ("both", 1, 1)]
)
@pytest.mark.parametrize("cached", [False, True])
def test_controls(
    inputs: str,
    sees: int,
    hears: int,
    cached: bool,
    root: DataRoot,
    tiny_config: Config,
    cache: ClipCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = read_clip(root.video_path("0"), tiny_config)
    if not cached and not sees:
        forbid(monkeypatch, dataset_module.read_clip.__globals__["_pictures"], "at_times")
    if not cached and not hears:
        forbid(monkeypatch, dataset_module.read_clip.__globals__["_streams"].Track, "hear")
    data = VideoDataset(root, split_of({"0": 1}), tiny_config, Letters(), cache if cached else None, inputs=inputs)
    clip = data[0].clip
    assert clip is not None
    assert torch.equal(clip.frames, whole.frames if sees else torch.zeros_like(whole.frames))
    assert torch.equal(clip.mel, whole.mel if hears else torch.full_like(whole.mel, -100))
    assert clip.has_audio.item() == bool(hears)
    assert clip.frames.dtype == torch.uint8
    assert clip.mel.dtype == torch.float16


def test_refused_at_once(root: DataRoot, tiny_config: Config) -> None:
    with pytest.raises(ConfigError, match="inputs: expected one of both, blind, deaf, textonly, got 'mute'"):
        VideoDataset(root, split_of({"0": 1}), tiny_config, Letters(), inputs="mute")
    with pytest.raises(UsageError, match="8 words"):
        VideoDataset(root, split_of({"0": 1}), tiny_config.replace(**{"text.max_words": 7}), Letters())


def test_questions_by_a_literal() -> None:
    questions = batch_questions([[[5, 6], [7]], [], [[8, 9, 4]]])
    assert questions.tokens.tolist() == [[5, 6, 0], [7, 0, 0], [8, 9, 4]]
    assert questions.valid.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert questions.video_index.tolist() == [0, 0, 2]
    assert questions.rank.tolist() == [0, 1, 0]
    assert questions.width == 2
    assert {t.dtype for t in (questions.tokens, questions.video_index, questions.rank)} == {torch.int64}
    none = batch_questions([[], []])
    assert (none.tokens.shape, none.valid.shape, none.width) == ((0, 0), (0, 0), 0)


def test_a_batch(root: DataRoot, tiny_config: Config, cache: ClipCache) -> None:
    data = VideoDataset(root, split_of({"0": 1, "text": 2, "1": 3}), tiny_config, Letters(), cache)
    items = [data[n] for n in range(3)]
    batch = collate(items, epoch=0, run_seed=0, keep=1.0)
    assert batch is not None
    assert batch.video_id == ("0", "1")  # the broken one is left out with its questions
    assert batch.question_id.tolist() == [2**40, 2**40 + 200, 2**40 + 201, 2**40 + 202]
    assert batch.label.tolist() == [0, 20, 21, 22]
    assert batch.questions.video_index.tolist() == [0, 1, 1, 1]
    assert batch.questions.width == 3
    assert batch.masking is None
    assert [list(t.shape) for t in batch.video] == [[2, 2, 16, 768], [2, 1, 16, 256], [2, 2], [2, 1], [2]]
    for name in batch.video._fields:
        assert torch.equal(getattr(batch.video, name)[1], getattr(items[2].clip, name))


def test_nothing_readable_is_no_batch() -> None:
    assert collate([]) is None
    assert collate([Item("0", None, (), (), "broken")], epoch=0, run_seed=0, keep=0.5) is None


def test_masks_do_not_depend_on_the_batch(root: DataRoot, tiny_config: Config, cache: ClipCache) -> None:
    data = VideoDataset(root, split_of({"0": 1, "1": 1, "2": 1}), tiny_config, Letters(), cache)
    masking = collate([data[2], data[0]], epoch=5, run_seed=9, keep=0.5).masking
    assert masking.keep == 0.5
    assert masking.frame_seed.tolist() == [[mask_seed(9, 5, v, "visual", t) for t in range(2)] for v in ("2", "0")]
    assert masking.mel_seed.tolist() == [[mask_seed(9, 5, v, "audio", 0)] for v in ("2", "0")]
    assert masking.frame_seed.dtype == masking.mel_seed.dtype == torch.int64
    alone = collate([data[0]], epoch=5, run_seed=9, keep=0.5).masking
    assert torch.equal(alone.frame_seed[0], masking.frame_seed[1])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("kept", [True, False])
def test_loading_processes_give_the_same(kept: bool, root: DataRoot, tiny_config: Config, cache: ClipCache) -> None:
    names = {"0": 2, "text": 1, "1": 1, "2": 3}
    data = VideoDataset(root, split_of(names), tiny_config, Letters(), cache if kept else None)
    batches: list[list[Batch]] = [
        list(
            DataLoader(
                data,
                batch_size=2,
                num_workers=workers,
                collate_fn=functools.partial(collate, epoch=1, run_seed=2, keep=0.5),
            )
        )
        for workers in (0, 2)
    ]
    assert [b.video_id for b in batches[0]] == [("0",), ("1", "2")]
    for here, there in zip(*batches, strict=True):
        assert here.video_id == there.video_id
        for name in ("video", "questions", "masking"):
            for a, b in zip(getattr(here, name), getattr(there, name), strict=True):
                assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_prepare(
    workers: int, root: DataRoot, tiny_config: Config, cache: ClipCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.randn(700, 700) @ torch.randn(700, 700)  # the parent's thread pool must not hang its children
    names = {"0": 1, "gone": 1, **{str(n): 1 for n in range(1, 6)}, "text": 1}
    cache.get(root.video_path("0"))
    done: list[int] = []
    report = prepare(root, split_of(names), tiny_config, cache, done.append, workers)
    assert sum(done) == 8
    assert (report.cached, report.decoded, report.videos) == (1, 5, 8)
    assert list(report.skipped) == ["gone", "text"]
    assert "No such file" in report.skipped["gone"]
    assert "not a readable video" in report.skipped["text"]
    forbid(monkeypatch, dataset_module, "read_clip")
    monkeypatch.setattr("sparsify.data.cache.read_clip", None)
    again = prepare(root, split_of(dict.fromkeys("012345", 1)), tiny_config, cache, done.append, workers)
    assert (again.cached, again.decoded, again.skipped) == (6, 0, {})
    data = VideoDataset(root, split_of({"3": 1}), tiny_config, Letters(), cache)
    assert data[0].clip is not None


def test_prepare_without_a_cache_tries_the_videos(root: DataRoot, tiny_config: Config) -> None:
    report = prepare(root, split_of({"0": 1, "text": 1}), tiny_config, None)
    assert (report.decoded, report.cached, list(report.skipped)) == (1, 0, ["text"])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_decoding_process_is_an_error(
    root: DataRoot, tiny_config: Config, cache: ClipCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    die: Callable[..., None] = lambda *args, **kwargs: os._exit(9)  # noqa: E731
    monkeypatch.setattr(dataset_module, "_try", die)
    with pytest.raises(SparsifyError, match="a decoding process was killed"):
        prepare(root, split_of({str(n): 1 for n in range(6)}), tiny_config, cache, workers=2)
