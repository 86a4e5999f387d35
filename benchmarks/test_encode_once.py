"""A video is encoded once for all its questions: time for 1, 4 and 20 questions a video.

The baseline encodes the video anew for each question, as the public trainers of this field do. Ratios are of one run.
"""

from __future__ import annotations

import pytest
import torch

from sparsify.batch import Questions, Video
from sparsify.config import Config
from sparsify.data.vocabulary import Vocabulary
from sparsify.model import SparsifyModel

VIDEOS, WORDS = 8, 14


@pytest.fixture(scope="module")
def model() -> SparsifyModel:
    torch.manual_seed(0)
    return SparsifyModel(Config.preset("demo"), Vocabulary.build()).eval()


@pytest.fixture(scope="module")
def video(model: SparsifyModel) -> Video:
    c, v, a = model.config.clip, model.config.vision, model.config.audio
    draw = torch.Generator().manual_seed(0)
    return Video(
        torch.randint(0, 256, (VIDEOS, c.frames, v.units**2, 3 * v.unit**2), dtype=torch.uint8, generator=draw),
        (20 * torch.randn(VIDEOS, c.segments, a.units**2, a.unit**2, generator=draw) - 40).half(),
        torch.arange(c.frames).float().expand(VIDEOS, -1),
        torch.zeros(VIDEOS, c.segments),
        torch.full((VIDEOS,), float(c.frames)),
    )


def questions(per_video: int, vocabulary_size: int) -> Questions:
    """``per_video`` questions about each video."""
    count = VIDEOS * per_video
    tokens = torch.randint(2, vocabulary_size, (count, WORDS), generator=torch.Generator().manual_seed(1))
    index = torch.arange(VIDEOS).repeat_interleave(per_video)
    rank = torch.arange(per_video).repeat(VIDEOS)
    return Questions(tokens, torch.ones(count, WORDS, dtype=torch.bool), index, rank, per_video)


@pytest.mark.parametrize("per_video", [1, 4, 20])
@pytest.mark.parametrize("encoding", ["once a video", "once a question"])
def test_encode(benchmark, model: SparsifyModel, video: Video, per_video: int, encoding: str) -> None:
    asked = questions(per_video, len(model.vocabulary))
    if encoding == "once a question":
        video = Video(*(field[asked.video_index] for field in video))
        count = len(asked.video_index)
        asked = asked._replace(video_index=torch.arange(count), rank=torch.zeros(count, dtype=torch.long), width=1)
    benchmark.group = f"{VIDEOS} videos, {per_video} question(s) each"
    with torch.inference_mode():
        logits = benchmark.pedantic(model, (video, asked), rounds=3, warmup_rounds=1)
    assert logits.shape == (VIDEOS * per_video, 42)
