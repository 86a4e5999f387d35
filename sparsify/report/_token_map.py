"""Where the tokens of one clip lie in its pictures: rectangles of cells, their state, their cluster and their score."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from sparsify.config import AudioConfig, VisionConfig
    from sparsify.model.outputs import ModalityTokens

__all__ = ["Rect", "TokenMap", "audio_cells", "frame_cells", "token_map", "unfold"]

Rect = tuple[float, float, float, float]  # x, y of the corner nearest the origin, width, height


class TokenMap(NamedTuple):
    """The tokens of one modality of one clip; arrays are indexed by the dense token index, image * cells + cell."""

    total: int  # N_dense
    encoded: np.ndarray  # bool [N_dense]: false where masked
    cluster: np.ndarray  # int [N_dense]: slot of the key a token merged into, -1 where masked or invalid
    key: np.ndarray  # bool [N_dense]: the token is a key
    # fp [N_dense]: attention received, in multiples of the mean; NaN where masked. None: merging is off
    score: np.ndarray | None
    after: int  # tokens that remain


def token_map(tokens: ModalityTokens, total: int) -> TokenMap:
    """The map of the first clip in ``tokens``; ``total`` is its number of dense tokens."""
    kept = tokens.kept[0].cpu().numpy()
    valid = tokens.valid[0].cpu().numpy()
    encoded = np.zeros(total, dtype=bool)
    encoded[kept] = True
    cluster = np.full(total, -1)
    cluster[kept] = tokens.assign[0].cpu().numpy()
    key = np.zeros(total, dtype=bool)
    score = None
    if tokens.scores is not None:
        key[tokens.position[0].cpu().numpy()[valid]] = True
        received = tokens.scores[0].detach().float().cpu().numpy()
        score = np.full(total, np.nan)
        score[kept] = received / max(float(received.mean()), 1e-12)
    return TokenMap(total, encoded, cluster, key, score, int(valid.sum()))


def frame_cells(vision: VisionConfig) -> list[Rect]:
    """The rectangle of every token of a frame, in pixels, y downwards."""
    side = vision.patch_size * 2 ** (len(vision.depths) - 1)
    grid = vision.image_size // side
    return [(col * side, row * side, side, side) for row in range(grid) for col in range(grid)]


def audio_cells(audio: AudioConfig) -> list[list[Rect]]:
    """The rectangles of every token of a segment in the time-ordered spectrogram: x in mel frames, y in mel bins.

    The mel image is folded: its rows [k * mel_bins, (k + 1) * mel_bins) hold the k-th part of the segment's time. A
    token taller than a part lies in several of them and has several rectangles.
    """
    side = audio.patch_size * 2 ** (len(audio.depths) - 1)
    grid = audio.spec_size // side
    cells = []
    for row in range(grid):
        top, bottom = row * side, (row + 1) * side
        parts = []
        for part in range(top // audio.mel_bins, (bottom - 1) // audio.mel_bins + 1):
            low = max(top, part * audio.mel_bins) - part * audio.mel_bins
            high = min(bottom, (part + 1) * audio.mel_bins) - part * audio.mel_bins
            parts.append((part * audio.spec_size, low, high - low))
        cells += [[(x + col * side, low, side, height) for x, low, height in parts] for col in range(grid)]
    return cells


def unfold(image: np.ndarray, mel_bins: int) -> np.ndarray:
    """Folded mel images [..., spec, spec] in order of time, [..., mel_bins, mel_frames]; low mels first."""
    *lead, spec, _ = image.shape
    parts = image.reshape(*lead, spec // mel_bins, mel_bins, spec)  # [..., part, mel, time in part]
    return np.moveaxis(parts, -3, -2).reshape(*lead, mel_bins, -1)
