"""Do the merge scores look at who is sounding? Measured where the truth is known: on the built-in data set.

For every sampled frame, the visual tokens are split by the boxes of ``scenes.jsonl``:

    sounding     at least ``COVERED`` of the token's cell lies in the box of a visible player who sounds just then
    background   not touched by any box

    AUC = P(score of a sounding token > score of a background token), ties count half; 0.5 is chance

which is averaged over the frames that have both kinds. Beside it: the share of each kind that became key tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sparsify.errors import DataError

__all__ = ["COVERED", "Localisation", "frame_auc", "label_cells", "localisation", "read_scenes"]

COVERED = 0.25


class Localisation(NamedTuple):
    """How well scores rank sounding players above the background."""

    auc: float  # mean over frames; 0.5 is chance
    frames: int
    videos: int
    sounding_keys: float  # share of the sounding tokens that became key tokens
    background_keys: float

    def text(self) -> str:
        return (
            f"scores rank sounding players above background: AUC {self.auc:.3f} over {self.frames:,} frames of "
            f"{self.videos:,} videos; key tokens: {100 * self.sounding_keys:.1f} % of sounding players' tokens, "
            f"{100 * self.background_keys:.1f} % of background tokens"
        )


def read_scenes(root: Path, split: str) -> dict[str, dict[str, Any]]:
    """The scenes of a split by video id. ``DataError`` when the folder is not a built-in data set."""
    path = root / "scenes.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: missing; only data sets of `sparsify synth` know where their players are")
    scenes = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {scene["video_id"]: scene for scene in scenes if scene["split"] == split}


def label_cells(scene: dict[str, Any], time: float, side: int) -> list[int]:
    """The ``side`` x ``side`` cells of the frame at ``time`` (seconds): 1 sounding, 0 background, -1 neither."""
    width = scene["size"] / side  # pixels
    labels = []
    for row in range(side):
        for column in range(side):
            cell = (column * width, row * width, (column + 1) * width, (row + 1) * width)
            label = 0
            for player in scene["players"]:
                share = _overlap(cell, player["box"]) / width**2
                if share <= 0:
                    continue
                sounds = player["voice"] is not None and any(a <= time < b for a, b in player["voice"]["sounding"])
                if sounds and not player["hidden"] and share >= COVERED:
                    label = 1
                    break
                label = -1
            labels.append(label)
    return labels


def frame_auc(scores: list[float], labels: list[int]) -> float | None:
    """The AUC of one frame; None without both kinds."""
    sounding = [s for s, label in zip(scores, labels, strict=True) if label == 1]
    background = [s for s, label in zip(scores, labels, strict=True) if label == 0]
    if not sounding or not background:
        return None
    wins = sum((a > b) + 0.5 * (a == b) for a in sounding for b in background)
    return wins / (len(sounding) * len(background))


def localisation(model: Any, dataset: Any, scenes: dict[str, dict[str, Any]], *, batch: int = 32) -> Localisation:
    """Encode every video of ``dataset`` (a ``VideoDataset``) unmasked and compare its visual scores with its scene.

    Raises ``DataError`` when the model does not score (a dense one), or no frame has both kinds of tokens.
    """
    import torch

    from sparsify.data.dataset import collate

    aucs: list[float] = []
    counts = [[0, 0], [0, 0]]  # [background, sounding] x [all, keys]
    videos = 0
    model.eval()
    for start in range(0, len(dataset), batch):
        loaded = collate([dataset[i] for i in range(start, min(start + batch, len(dataset)))])
        if loaded is None:
            continue
        with torch.inference_mode():
            visual = model.encode(loaded.video).visual
        if visual.scores is None:
            raise DataError("localisation: this model merges nothing, so it has no scores")
        side = round((visual.scores.shape[1] // loaded.video.frame_time.shape[1]) ** 0.5)
        keys = _is_key(visual.position, visual.valid, visual.scores.shape[1])
        for v, video_id in enumerate(loaded.video_id):
            videos += 1
            for t, time in enumerate(loaded.video.frame_time[v].tolist()):
                cells = slice(t * side * side, (t + 1) * side * side)
                labels = label_cells(scenes[video_id], time, side)
                auc = frame_auc(visual.scores[v, cells].tolist(), labels)
                if auc is not None:
                    aucs.append(auc)
                for label, key in zip(labels, keys[v, cells].tolist(), strict=True):
                    if label >= 0:
                        counts[label][0] += 1
                        counts[label][1] += key
    if not aucs:
        raise DataError("localisation: no frame shows a sounding player and background")
    shares = [keys / max(1, total) for total, keys in counts]
    return Localisation(sum(aucs) / len(aucs), len(aucs), videos, shares[1], shares[0])


def _is_key(position: Tensor, valid: Tensor, tokens: int) -> Tensor:
    """bool [V, tokens]: which dense tokens are key tokens."""
    import torch

    keys = torch.zeros(len(position), tokens + 1, dtype=torch.bool)
    return keys.scatter_(1, torch.where(valid, position, tokens), True)[:, :tokens]


def _overlap(a: tuple[float, float, float, float], b: list[float]) -> float:
    """The common area of two boxes x0, y0, x1, y1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0
