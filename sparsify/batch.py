"""What travels between data, model and trainer: plain named tuples of tensors.

Sizes: V videos, Q questions, T frames, S audio segments, Uv and Ua mask units a frame and a segment, P values a unit,
L words. Units are row-major: unit ``u`` is row ``u // units``, column ``u % units`` of its frame or mel image.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Batch", "Clip", "Masking", "Questions", "Video"]


class Clip(NamedTuple):
    """One video as the cache holds it (no batch dimension)."""

    frames: Tensor  # uint8 [T, Uv, 3*p*p]: RGB, each unit [3, p, p] flattened
    mel: Tensor  # fp16 [S, Ua, p*p]: log-mel image in dB, each unit [mel p, time p] flattened
    frame_time: Tensor  # fp32 [T]: seconds
    segment_time: Tensor  # fp32 [S]: start of each segment, seconds
    duration: Tensor  # fp32 []: seconds
    has_audio: Tensor  # bool []: false when the file has no audio stream (mel is then that of silence)


class Video(NamedTuple):
    """A batch of V clips."""

    frames: Tensor  # uint8 [V, T, Uv, 3*p*p]
    mel: Tensor  # fp16 [V, S, Ua, p*p]
    frame_time: Tensor  # fp32 [V, T]
    segment_time: Tensor  # fp32 [V, S]
    duration: Tensor  # fp32 [V]


class Masking(NamedTuple):
    """The draw of a masked step: a seed for each frame and segment, and the share of units kept."""

    frame_seed: Tensor  # int64 [V, T], in [0, 2^63)
    mel_seed: Tensor  # int64 [V, S], in [0, 2^63)
    keep: float


class Questions(NamedTuple):
    """Q questions about the V videos of a batch."""

    tokens: Tensor  # int64 [Q, L]: word ids
    valid: Tensor  # bool [Q, L]
    video_index: Tensor  # int64 [Q], in [0, V)
    rank: Tensor  # int64 [Q]: the question's place among its video's questions, in [0, width)
    width: int  # the most questions any video of the batch has


class Batch(NamedTuple):
    """One training or evaluation step."""

    video: Video
    questions: Questions
    label: Tensor  # int64 [Q], in [0, 42)
    question_id: Tensor  # int64 [Q]
    video_id: tuple[str, ...]  # V names
    masking: Masking | None  # None: nothing is masked
