"""Questions about one video file: decoded once, encoded once, answered together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sparsify.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from sparsify.batch import Clip, Masking, Questions
    from sparsify.config import Config
    from sparsify.model import SparsifyModel
    from sparsify.model.outputs import SuperTokens

__all__ = ["Answer", "AskResult", "ask"]


class Answer(NamedTuple):
    """What the model makes of one question."""

    question: str
    ranked: tuple[tuple[str, float], ...]  # every answer with its probability, the likeliest first
    unknown: tuple[str, ...]  # words of the question that the model never learnt

    @property
    def text(self) -> str:
        return self.ranked[0][0]

    @property
    def probability(self) -> float:
        return self.ranked[0][1]


class AskResult(NamedTuple):
    """The answers, and what they were drawn from: ``sparsify.report.explain.draw`` makes a picture of it."""

    answers: tuple[Answer, ...]  # one a question, in order
    clip: Clip  # the decoded video
    tokens: SuperTokens  # its super-tokens (V = 1)


def ask(
    model: SparsifyModel,
    video_path: str | Path,
    questions: Sequence[str],
    *,
    partial: bool = False,
    masked_seed: int | None = None,
) -> AskResult:
    """Answer ``questions`` about the video at ``video_path``, encoding it once.

    ``partial`` accepts a truncated file and answers from what can be read. ``masked_seed`` masks the input as training
    does (``config.mask.keep``), drawn from that seed; None shows the model everything. Deterministic.

    Raises ``UsageError`` for an empty or overlong question (before the video is read) and ``MediaError`` for a video
    that cannot be read. The model's training mode is left as it was.
    """
    import torch

    from sparsify.batch import Video
    from sparsify.data.media import read_clip
    from sparsify.data.templates import ANSWERS

    if not questions:
        raise UsageError("ask: expected at least one question")
    words = [model.vocabulary.encode(question, model.config.text.max_words) for question in questions]
    unknown = [tuple(model.vocabulary.unknown(question)) for question in questions]
    path = Path(video_path)
    device = next(model.parameters()).device
    masking = None if masked_seed is None else _masking(model.config, masked_seed, path.stem, device)
    inputs = model.config.train.inputs  # a control that was trained without picture or sound is asked without it
    clip = read_clip(
        path,
        model.config,
        partial=partial,
        frames=inputs not in ("blind", "textonly"),
        audio=inputs not in ("deaf", "textonly"),
    )
    video = Video(*(field[None].to(device) for field in clip[: len(Video._fields)]))
    with _evaluating(model), torch.inference_mode():
        tokens = model.encode(video, masking)
        probability = model.answer(tokens, _questions(words, device)).softmax(-1).cpu()  # [Q, 42]
    order = probability.sort(dim=-1, descending=True, stable=True).indices.tolist()
    answers = tuple(
        Answer(question, tuple((ANSWERS[label], float(row[label])) for label in ranking), words_unknown)
        for question, row, ranking, words_unknown in zip(questions, probability, order, unknown, strict=True)
    )
    return AskResult(answers, clip, tokens)


def _questions(words: list[list[int]], device: torch.device) -> Questions:
    """Q questions, padded to the longest, all about video 0."""
    import torch

    from sparsify.batch import Questions

    length = max(len(w) for w in words)
    tokens = torch.zeros(len(words), length, dtype=torch.int64)
    for row, ids in zip(tokens, words, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    tokens = tokens.to(device)
    return Questions(
        tokens=tokens,
        valid=tokens != 0,
        video_index=torch.zeros(len(words), dtype=torch.int64, device=device),
        rank=torch.arange(len(words), device=device),
        width=len(words),
    )


def _masking(config: Config, seed: int, video_id: str, device: torch.device) -> Masking:
    """The masks that a masked evaluation with ``seed`` draws for this video."""
    if config.dense:
        raise UsageError("a dense model is never masked: ask it without masking")
    import torch

    from sparsify.batch import Masking
    from sparsify.data.seeds import mask_seed
    from sparsify.training.evaluate import EVALUATION_EPOCH, masked_keep

    def seeds(modality: str, n: int) -> torch.Tensor:
        drawn = [mask_seed(seed, EVALUATION_EPOCH, video_id, modality, i) for i in range(n)]
        return torch.tensor([drawn], dtype=torch.int64, device=device)

    return Masking(seeds("visual", config.clip.frames), seeds("audio", config.clip.segments), masked_keep(config))


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
