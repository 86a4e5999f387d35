"""What a video costs the model, stage by stage: tokens and floating-point operations, counted on the model itself.

A configuration is counted three ways, a forward pass of one video with four questions each: dense; with its smallest
keep ratio; and masked and merged. The weights do not matter and are random. A multiply and an add are two operations,
and only products of matrices are counted (``torch.utils.flop_counter`` and ``sparsify_kernels.flops``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify.batch import Masking, Questions, Video
    from sparsify.config import Config
    from sparsify.model import SparsifyModel
    from sparsify.model.audio import AudioEncoder
    from sparsify.model.masking import KeptUnits
    from sparsify.model.vision import VisionEncoder

__all__ = ["QUESTIONS", "Stage", "Variant", "count"]

QUESTIONS, WORDS = 4, 12  # asked about the video, and words of each


class Stage(NamedTuple):
    """A part of the model on the way of one video."""

    name: str
    tokens: int  # of the video that it works on; of the questions for the last one
    flop: int


class Variant(NamedTuple):
    """The model with a part of its sparsity on."""

    name: str
    stages: tuple[Stage, ...]

    @property
    def flop(self) -> int:
        return sum(stage.flop for stage in self.stages)


def count(config: Config) -> list[Variant]:
    """Dense, masked, and masked and merged, with the same stages in order; by half, where ``config`` never masks."""
    from sparsify.training.evaluate import masked_keep

    sparse = config.replace(dense=False)
    keep = masked_keep(sparse)
    keep = keep if keep < 1 else 0.5
    return [
        _variant("dense", config.replace(dense=True), 1.0),
        _variant(f"masked, {100 * keep:g} % kept", sparse.replace(**{"merge.enabled": False}), keep),
        _variant("masked and merged", sparse.replace(**{"merge.enabled": True}), keep),
    ]


def _variant(name: str, config: Config, keep: float) -> Variant:
    import torch

    from sparsify.data.vocabulary import Vocabulary
    from sparsify.model import SparsifyModel

    bare = dataclasses.replace(config, text=dataclasses.replace(config.text, weights=None))  # no download to count
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        model = SparsifyModel(bare, Vocabulary.build(), pretrained=False).eval()
        video, questions, masking = _inputs(config, keep)
        return Variant(name, tuple(_stages(model, video, questions, masking)))


def _inputs(config: Config, keep: float) -> tuple[Video, Questions, Masking | None]:
    """One video of zeros, questions of word 2, and masks."""
    import torch

    from sparsify.batch import Masking, Questions, Video

    c, v, a = config.clip, config.vision, config.audio
    video = Video(
        torch.zeros(1, c.frames, v.units**2, 3 * v.unit**2, dtype=torch.uint8),
        torch.zeros(1, c.segments, a.units**2, a.unit**2, dtype=torch.float16),
        torch.arange(c.frames).float()[None],
        c.segment_seconds * torch.arange(c.segments).float()[None],
        torch.tensor([float(max(c.frames, c.segments * c.segment_seconds))]),
    )
    questions = Questions(
        torch.full((QUESTIONS, WORDS), 2),
        torch.ones(QUESTIONS, WORDS, dtype=torch.bool),
        torch.zeros(QUESTIONS, dtype=torch.int64),
        torch.arange(QUESTIONS),
        QUESTIONS,
    )
    seeds = torch.arange(c.frames)[None], 1000 + torch.arange(c.segments)[None]
    return video, questions, Masking(*seeds, keep) if keep < 1 else None


def _stages(model: SparsifyModel, video: Video, questions: Questions, masking: Masking | None) -> list[Stage]:
    from torch.utils.flop_counter import FlopCounterMode

    import sparsify_kernels.flops  # noqa: F401  (registers the ops' formulas)

    with FlopCounterMode(display=False) as counter:
        model(video, questions, masking)
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}

    def of(*modules: str) -> int:
        return sum(counts.get(f"SparsifyModel.{name}", 0) for name in modules)

    tokens = model.encode(video, masking)
    asked = of("text", "words", "concepts", "head")
    mixer = of(*(f"mixer.{i}" for i in range(len(model.mixer))))
    stages = _encoders(model, video, masking)
    rest = counts["Global"] - sum(stage.flop for stage in stages) - of("merging") - mixer - asked
    encoded = tokens.visual.kept.shape[1] + tokens.audio.kept.shape[1]
    return [
        *stages,
        Stage("adapters, projections", encoded, rest),
        Stage("scoring, merging", encoded, of("merging")),
        Stage("mixer", int(tokens.valid.sum()), mixer),
        Stage(f"{QUESTIONS} questions", QUESTIONS * WORDS, asked),
    ]


def _encoders(model: SparsifyModel, video: Video, masking: Masking | None) -> list[Stage]:
    """The stages of both encoders, each run alone; the first one includes the patch embedding."""
    from torch.utils.flop_counter import FlopCounterMode

    from sparsify.model.masking import draw_units

    kept: Sequence[KeptUnits | None] = (None, None)
    if masking is not None:
        kept = draw_units(video, masking, model.config, model.vision.masked, model.audio.masked)
    stages = []
    parts: list[tuple[str, VisionEncoder | AudioEncoder, Tensor, KeptUnits | None]] = [
        ("frames", model.vision, video.frames, kept[0]),
        ("sound", model.audio, video.mel, kept[1]),
    ]
    for name, encoder, images, units in parts:
        x: Any = None
        for stage in range(len(encoder.stage_dims)):
            with FlopCounterMode(display=False) as counter:
                if stage == 0:
                    x = encoder.embed(images.flatten(0, 1)) if units is None else encoder.embed_kept(units)
                # Swin-V2 merges patches before a stage's blocks, HTS-AT after them: what the blocks work on
                before = x.numel() // x.shape[-1]
                x = encoder.stage(stage, x, None if units is None else units.plan)
            tokens = x.numel() // x.shape[-1] if name == "frames" else before
            stages.append(Stage(f"{name}, stage {stage + 1}", tokens, int(counter.get_total_flops())))
    return stages
