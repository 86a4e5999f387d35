"""Tiny models and batches for the tests of ``sparsify.model``."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsify._torchvision import ensure_torchvision
from sparsify.batch import Masking, Questions, Video
from sparsify.config import Config
from sparsify.data.vocabulary import Vocabulary
from sparsify.model import SparsifyModel

TINY = {
    "clip.frames": 2,
    "clip.segments": 2,
    "clip.segment_seconds": 2.0,
    "vision.image_size": 64,
    "vision.patch_size": 4,
    "vision.window_size": 4,
    "vision.embed_dim": 8,
    "vision.depths": [2, 2, 1],
    "vision.heads": [1, 2, 2],
    "vision.unit": 16,
    "audio.spec_size": 64,
    "audio.mel_bins": 32,
    "audio.patch_size": 4,
    "audio.window_size": 4,
    "audio.embed_dim": 8,
    "audio.depths": [2, 2, 1],
    "audio.heads": [1, 2, 2],
    "audio.unit": 16,
    "text.dim": 16,
    "text.layers": 1,
    "text.heads": 2,
    "text.max_words": 16,
    "merge.heads": 2,
    "fusion.dropout": 0.0,  # two passes are compared in training mode
    "fusion.dim": 16,
    "fusion.heads": 2,
    "fusion.adapter_latents": 2,
    "fusion.adapter_dim": 8,
    "fusion.layers": 1,
    "train.matching": 0.0,
}


@pytest.fixture(autouse=True, scope="session")
def _importable_libraries() -> None:
    """Some tests import timm and transformers themselves, before any model is made."""
    ensure_torchvision()


@pytest.fixture(autouse=True)
def _quiet_start(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="sparsify")


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary.build()


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Config]:
    """A tiny configuration, changed by dotted keys."""
    base = Config.preset("demo").replace(**TINY)
    return lambda **changes: base.replace(**{k.replace("__", "."): v for k, v in changes.items()})


@pytest.fixture(scope="session")
def make_model(vocabulary: Vocabulary) -> Callable[..., SparsifyModel]:
    """A model whose norms, biases, gates and tables are random: at their initial values they hide mistakes."""

    def make(config: Config, *, randomised: bool = True, seed: int = 0) -> SparsifyModel:
        torch.manual_seed(seed)
        model = SparsifyModel(config, vocabulary)
        if randomised:
            with torch.no_grad():
                for p in model.parameters():
                    if p.ndim <= 1:
                        p.copy_(0.5 * torch.randn_like(p))
                for name, p in model.named_parameters():
                    if name.endswith("relative_position_bias_table"):
                        p.normal_()
        return model

    return make


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., tuple[Video, Questions, Masking]]:
    """Random clips, ``questions`` a clip, and mask seeds."""

    def make(
        config: Config,
        videos: int = 3,
        questions: int = 2,
        keep: float = 0.5,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> tuple[Video, Questions, Masking]:
        g = torch.Generator().manual_seed(seed)
        frames, segments, words = config.clip.frames, config.clip.segments, 7

        def spread(n: int, step: float) -> Tensor:
            return (torch.arange(n) * step).expand(videos, -1).contiguous()

        pixels = (videos, frames, config.vision.units**2, 3 * config.vision.unit**2)
        mel = (videos, segments, config.audio.units**2, config.audio.unit**2)
        video = Video(
            torch.randint(0, 256, pixels, generator=g, dtype=torch.uint8),
            (torch.randn(mel, generator=g) * 25 - 40).half(),
            spread(frames, 1.0),
            spread(segments, 2.0),
            torch.full((videos,), 4.0),
        )
        if dtype is not None:
            video = Video(*(x.to(dtype) for x in video))
        length = torch.randint(2, words + 1, (videos * questions, 1), generator=g)
        valid = torch.arange(words) < length
        asked = Questions(
            torch.randint(2, 60, (videos * questions, words), generator=g) * valid,
            valid,
            torch.arange(videos).repeat_interleave(questions),
            torch.arange(questions).repeat(videos),
            questions,
        )
        masking = Masking(
            torch.randint(0, 2**62, (videos, frames), generator=g),
            torch.randint(0, 2**62, (videos, segments), generator=g),
            keep,
        )
        return video, asked, masking

    return make
