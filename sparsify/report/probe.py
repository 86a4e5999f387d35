"""What a report asks checkpoints: accuracy at other keep ratios and fences, and how alike neighbouring tokens are.

Answers are kept in ``probe.json`` of the report's folder, by the checkpoint's content and the split's fingerprint: what
was asked once is not computed again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsify.progress import Advance

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify.data.dataset import VideoDataset
    from sparsify.data.music_avqa import Split
    from sparsify.model import SparsifyModel
    from sparsify.report.scores import Floor

__all__ = ["CLIPS", "FENCES", "KEEPS", "PERCENTILES", "Answers", "Judged", "accuracy_at", "digest", "neighbours"]

KEEPS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)  # shares of the mask units
FENCES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)  # of the interquartile range above the upper quartile
CLIPS = 64  # videos whose tokens are compared
PERCENTILES = (5, 25, 50, 75, 95)


class Judged(NamedTuple):
    """A checkpoint with the split to ask it about."""

    model: SparsifyModel
    dataset: VideoDataset
    split: Split
    floor: Floor
    digest: str  # of the checkpoint's weights


class Answers:
    """Answers by question in a JSON file, which is written after each new one. A file that is none is begun anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        self._known: dict[str, Any] = found if isinstance(found, dict) else {}

    def forget(self, question: dict[str, Any]) -> None:
        """So that it is asked anew: what the answer stood for is gone."""
        self._known.pop(self._key(question), None)

    def get(self, question: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """The answer to ``question``, which is what ``compute`` returned when it was first asked."""
        key = self._key(question)
        if key not in self._known:
            self._known[key] = compute()
            partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
            partial.write_text(json.dumps(self._known, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, self.path)
        return self._known[key]

    @staticmethod
    def _key(question: dict[str, Any]) -> str:
        return json.dumps(question, sort_keys=True)


def digest(checkpoint: Path) -> str:
    """Of the weights in a checkpoint folder."""
    found = hashlib.blake2b(digest_size=12)
    with (checkpoint / "model.safetensors").open("rb") as file:
        while block := file.read(2**22):
            found.update(block)
    return found.hexdigest()


def accuracy_at(judged: Judged, keep: float, fence: float, answers: Answers, advance: Advance) -> dict[str, float]:
    """``accuracy`` (a share) and ``super_tokens`` (a video) with a share ``keep`` of the units and this ``fence``."""
    from sparsify.training.evaluate import evaluate_dataset

    model, config = judged.model, judged.model.config

    def compute() -> dict[str, float]:
        configured = model.merging.config
        model.merging.config = dataclasses.replace(configured, fence=fence)
        try:
            found = evaluate_dataset(
                model,
                judged.dataset,
                judged.split,
                floor=judged.floor,
                batch_size=2 * config.train.videos,
                keep=keep,
                inputs=config.train.inputs,
                seed=config.train.seed,
                precision=config.train.precision,
                advance=advance,
            )
        finally:
            model.merging.config = configured
        return {"accuracy": found.accuracy, "super_tokens": found.super_tokens}

    asked = {"ask": "accuracy", "checkpoint": judged.digest, "split": judged.split.fingerprint, "keep": keep}
    return answers.get(asked | {"fence": fence}, compute)


def neighbours(judged: Judged, answers: Answers, advance: Advance) -> dict[str, list[float]]:
    """How alike tokens are, by how they are related: ``PERCENTILES`` of the cosine of what the encoders make of them.

    Tokens are taken as they leave the encoders, before anything tells where and when they were.
    """
    asked = {"ask": "neighbours", "checkpoint": judged.digest, "split": judged.split.fingerprint, "clips": CLIPS}
    return answers.get(asked, lambda: _neighbours(judged, advance))


def _neighbours(judged: Judged, advance: Advance) -> dict[str, list[float]]:
    import torch

    from sparsify.data.dataset import collate

    model, dataset = judged.model, judged.dataset
    found: dict[str, list[Tensor]] = {}
    seen: dict[str, Tensor] = {}
    hooks = [
        part.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name, part in (("frames", model.visual_tokens), ("sound", model.audio_tokens))
    ]
    was_training = model.training
    model.eval()
    try:
        count = min(CLIPS, len(dataset))
        for start in range(0, count, 16):
            batch = collate([dataset[i] for i in range(start, min(start + 16, count))])
            if batch is None:
                continue
            with torch.inference_mode():
                device = next(model.parameters()).device
                model.encode(type(batch.video)(*(field.to(device) for field in batch.video)))
            frames = _grid(seen["frames"], batch.video.frames.shape[1])
            sound = _grid(seen["sound"], batch.video.mel.shape[1])
            for name, pair in _pairs(frames, sound).items():
                if pair[0].numel():
                    cosine = torch.nn.functional.cosine_similarity(*pair, dim=-1).flatten()
                    found.setdefault(name, []).append(cosine.float().cpu())
            advance(len(batch.video_id))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    at = torch.tensor(PERCENTILES) / 100
    return {name: torch.cat(parts).quantile(at).tolist() for name, parts in found.items()}


def _grid(tokens: Tensor, images: int) -> Tensor:
    """[V, images * side * side, C] as [V, images, side, side, C]."""
    side = round((tokens.shape[1] / images) ** 0.5)
    return tokens.unflatten(1, (images, side, side))


def _pairs(frames: Tensor, sound: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Tokens and their counterparts, by relation; ``another clip`` is what chance gives."""
    return {
        "next frame, same place": (frames[:, :-1], frames[:, 1:]),
        "same frame, next place": (frames[:, :, :, :-1], frames[:, :, :, 1:]),
        "another clip, same place": (frames[:-1], frames[1:]),
        "next moment, same pitch": (sound[:, :, :, :-1], sound[:, :, :, 1:]),
        "next segment, same place": (sound[:, :-1], sound[:, 1:]),
        "another clip, same moment": (sound[:-1], sound[1:]),
    }
