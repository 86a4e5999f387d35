"""``sparsify.ask``: real files through a small random model."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from sparsify.ask import ask
from sparsify.config import Config
from sparsify.data.templates import ANSWERS
from sparsify.data.vocabulary import Vocabulary
from sparsify.errors import MediaError, TruncatedMediaError, UsageError
from sparsify.model import SparsifyModel

QUESTIONS = [
    "How many instruments are sounding in the video?",
    "Is the theremin louder than the violin?",
    "Which is the musical instrument that sounds at the same time as the cello?",
]


def small_model(**changes: object) -> SparsifyModel:
    """The demo's classes with one block a stage; norms and gates randomised, so that the input matters."""
    small = {"clip.frames": 2, "vision.depths": [1, 1, 1], "audio.depths": [1, 1, 1]}
    torch.manual_seed(0)
    model = SparsifyModel(Config.preset("demo").replace(**small | changes), Vocabulary.build())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def write_clip(path: Path, *, seconds: float = 2.0, sound: bool = True) -> Path:
    """A clip of a square that moves over noise, with a tone."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=8)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        if sound:
            audio = container.add_stream("aac", rate=48_000, layout="mono")
        for t in range(round(8 * seconds)):
            picture = rng.integers(0, 90, (64, 64, 3), dtype=np.uint8)
            picture[20:40, 2 * t : 2 * t + 16] = (250, 200, 40)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        if sound:
            wave = 0.4 * np.sin(np.arange(round(48_000 * seconds)) * 2 * np.pi * 440 / 48_000)
            for start in range(0, len(wave), 1024):
                frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024].astype(np.float32), "fltp", "mono")
                frame.sample_rate = 48_000
                frame.pts = start
                container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return path


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4")


@pytest.fixture(scope="module")
def model() -> SparsifyModel:
    return small_model()


def test_every_answer_is_ranked_and_probabilities_sum_to_one(model: SparsifyModel, clip_path: Path) -> None:
    result = ask(model, clip_path, QUESTIONS)
    assert [answer.question for answer in result.answers] == QUESTIONS
    for answer in result.answers:
        texts, probabilities = zip(*answer.ranked, strict=True)
        assert sorted(texts) == sorted(ANSWERS)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert list(probabilities) == sorted(probabilities, reverse=True)
        assert (answer.text, answer.probability) == answer.ranked[0]
    assert float(result.clip.duration) == pytest.approx(2, abs=0.2)


def test_the_clip_is_decoded_and_encoded_once(
    model: SparsifyModel, clip_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsify.data import media

    calls = {"encode": 0, "answer": 0, "read": 0}

    def counted(name: str, function: object) -> object:
        def call(*args: object, **options: object) -> object:
            calls[name] += 1
            return function(*args, **options)

        return call

    monkeypatch.setattr(model, "encode", counted("encode", model.encode))
    monkeypatch.setattr(model, "answer", counted("answer", model.answer))
    monkeypatch.setattr(media, "read_clip", counted("read", media.read_clip))
    ask(model, clip_path, QUESTIONS)
    assert calls == {"encode": 1, "answer": 1, "read": 1}


def test_a_question_is_answered_alone_as_among_others(model: SparsifyModel, clip_path: Path) -> None:
    together = ask(model, clip_path, QUESTIONS)
    for question, answer in zip(QUESTIONS, together.answers, strict=True):
        alone = ask(model, clip_path, [question]).answers[0]
        assert dict(alone.ranked) == pytest.approx(dict(answer.ranked), abs=1e-5)


def test_different_questions_get_different_answers(model: SparsifyModel, clip_path: Path) -> None:
    a, b = ask(model, clip_path, QUESTIONS[:2]).answers
    assert max(abs(dict(a.ranked)[text] - dict(b.ranked)[text]) for text in ANSWERS) > 1e-4


def test_unknown_words_are_named(model: SparsifyModel, clip_path: Path) -> None:
    known, unknown, _ = ask(model, clip_path, QUESTIONS).answers
    assert known.unknown == ()
    assert unknown.unknown == ("theremin",)


def test_masking_hides_half_and_depends_on_the_seed(model: SparsifyModel, clip_path: Path) -> None:
    first, again, other = (ask(model, clip_path, QUESTIONS[:1], masked_seed=seed).tokens.visual for seed in (0, 0, 1))
    assert first.kept.shape[1] == 2 * 8  # of two frames of 16 tokens
    assert torch.equal(first.kept, again.kept)
    assert not torch.equal(first.kept, other.kept)
    assert ask(model, clip_path, QUESTIONS[:1]).tokens.visual.kept.shape[1] == 32


def test_the_models_mode_and_the_gradient_setting_stay(model: SparsifyModel, clip_path: Path) -> None:
    model.train()
    tokens = ask(model, clip_path, QUESTIONS[:1]).tokens
    assert model.training
    assert torch.is_grad_enabled()
    assert not tokens.tokens.requires_grad
    model.eval()


def test_a_deaf_model_is_asked_without_sound(clip_path: Path) -> None:
    deaf = ask(small_model(**{"train.inputs": "deaf"}), clip_path, QUESTIONS[:1])
    blind = ask(small_model(**{"train.inputs": "blind"}), clip_path, QUESTIONS[:1])
    assert not deaf.clip.has_audio
    assert deaf.clip.frames.any()
    assert blind.clip.has_audio
    assert not blind.clip.frames.any()


def test_a_dense_model_is_not_masked(clip_path: Path) -> None:
    dense = small_model(dense=True)
    assert len(ask(dense, clip_path, QUESTIONS[:1]).answers) == 1
    with pytest.raises(UsageError, match="dense"):
        ask(dense, clip_path, QUESTIONS[:1], masked_seed=0)


def test_a_file_without_sound_is_answered(model: SparsifyModel, tmp_path: Path) -> None:
    result = ask(model, write_clip(tmp_path / "silent.mp4", sound=False), QUESTIONS[:1])
    assert not result.clip.has_audio
    assert len(result.answers) == 1


@pytest.mark.parametrize(
    ("question", "message"),
    [("", "expected words"), (" ?! ", "expected words"), ("violin " * 65, "at most 64"), ("x" * 10_000, "10,000")],
)
def test_bad_questions_are_refused_before_the_video_is_read(model: SparsifyModel, question: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ask(model, "nowhere.mp4", [QUESTIONS[0], question])


def test_no_question_is_an_error(model: SparsifyModel, clip_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one question"):
        ask(model, clip_path, [])


def test_a_truncated_file_is_refused_unless_partial(model: SparsifyModel, tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "whole.mp4", seconds=4)
    moved = tmp_path / "moved.mp4"  # the index in front, so that a cut file still has one
    with av.open(str(whole)) as source, av.open(str(moved), "w", options={"movflags": "faststart"}) as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(moved.read_bytes()[: int(0.6 * moved.stat().st_size)])
    with pytest.raises(TruncatedMediaError, match=r"cut\.mp4"):
        ask(model, cut, QUESTIONS[:1])
    result = ask(model, cut, QUESTIONS[:1], partial=True)
    assert 0 < float(result.clip.duration) < 3.6


def test_a_missing_file_is_a_media_error(model: SparsifyModel) -> None:
    with pytest.raises(MediaError, match=r"nowhere\.mp4"):
        ask(model, "nowhere.mp4", QUESTIONS[:1])
