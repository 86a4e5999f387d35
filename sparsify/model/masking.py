"""Sparse masking: which units of a batch's frames and log-mel images are read. The others never are.

``unit`` keeps a share of the units of each frame and of each segment. ``time`` keeps the same share of the seconds in
both: whole frames, and the whole columns of the spectrogram that lie nearest to them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.batch import Masking, Video
from sparsify.config import AudioConfig, Config
from sparsify.model.masked import MaskedHTSAT, MaskedSwinV2
from sparsify.model.plan import UnitPlan
from sparsify.model.time import audio_offsets
from sparsify_kernels import random_mask

__all__ = ["KeptUnits", "draw_units"]


class KeptUnits(NamedTuple):
    """The M kept units of all images of one modality, image after image, ascending inside."""

    values: Tensor  # [M, P]: what they hold
    plan: UnitPlan
    groups: int  # equal parts of a video's units that share a time (frames), or are one segment, or all of them


class _Drawn(NamedTuple):
    values: Tensor  # [M, P]
    image: Tensor  # int64 [M]
    unit: Tensor  # int64 [M]
    groups: int


def draw_units(
    video: Video, masking: Masking, config: Config, vision: MaskedSwinV2 | None, audio: MaskedHTSAT | None
) -> tuple[KeptUnits, KeptUnits]:
    """The kept units of frames and of segments, each drawn from its own seed; for ``time`` from a video's first.

    Raises ``ValueError`` for the encoders of a dense model, which are not wrapped.
    """
    if vision is None or audio is None:
        raise ValueError("encode: a dense model takes no masking; expected None")
    if config.mask.kind == "time":
        frames, mel = _draw_time(video, masking, config)
    else:
        frames = _draw_each(video.frames, masking.frame_seed, masking.keep, config.mask.stratified)
        mel = _draw_each(video.mel, masking.mel_seed, masking.keep, config.mask.stratified)
    plans = _plans(frames, mel, video.frames.shape[:2].numel(), video.mel.shape[:2].numel(), vision, audio)
    return KeptUnits(frames.values, plans[0], frames.groups), KeptUnits(mel.values, plans[1], mel.groups)


def _plans(
    frames: _Drawn, mel: _Drawn, pictures: int, segments: int, vision: MaskedSwinV2, audio: MaskedHTSAT
) -> tuple[UnitPlan, UnitPlan]:
    """A plan for each modality: the two halves of one where the encoders cut their images alike."""
    if vision.needs != audio.needs:
        return vision.plan(frames.image, frames.unit, pictures), audio.plan(mel.image, mel.unit, segments)
    image, unit = torch.cat([frames.image, mel.image + pictures]), torch.cat([frames.unit, mel.unit])
    return vision.plan(image, unit, pictures + segments).split(pictures, len(frames.unit))


def _draw_each(x: Tensor, seed: Tensor, keep: float, stratified: bool) -> _Drawn:
    """A share of the units of every image of ``x`` [V, A, U, P].

    ``stratified`` keeps the same number in every 2x2 units where the ratio (1/4, 1/2, 3/4) and an even grid allow it;
    other ratios are drawn freely.
    """
    grid = math.isqrt(x.shape[2])
    blocks = stratified and grid % 2 == 0 and keep in (0.25, 0.5, 0.75)
    images = x.flatten(0, 1)
    tokens, index = random_mask(
        images, keep, seed=seed.flatten(), grid=(grid, grid) if blocks else None, stratified=blocks
    )
    image = torch.arange(len(images), device=x.device).repeat_interleave(index.shape[1])
    return _Drawn(tokens.flatten(0, 1), image, index.flatten(), x.shape[1])


def _draw_time(video: Video, masking: Masking, config: Config) -> tuple[_Drawn, _Drawn]:
    videos, frames, units, _ = video.frames.shape
    device = video.frames.device
    order = torch.arange(frames, device=device).view(1, -1, 1).expand(videos, -1, -1)
    frame = random_mask(order, masking.keep, seed=masking.frame_seed[:, 0]).index  # [V, Kt]
    kept = video.frame_time.gather(1, frame)
    seconds, columns = _columns(config.audio, config.clip.segment_seconds, device)  # [C], [C, rows]
    seconds = (video.segment_time.unsqueeze(2) + seconds).flatten(1)  # [V, S * C]
    distance = (seconds.unsqueeze(2) - kept.unsqueeze(1)).abs().amin(2)
    count = max(1, math.floor(masking.keep * seconds.shape[1] + 0.5))
    nearest = distance.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values  # [V, Kc]
    segment = nearest // len(columns)
    unit = columns[nearest % len(columns)] + (segment * video.mel.shape[2]).unsqueeze(2)  # [V, Kc, rows]
    number = unit.flatten(1).sort(dim=1).values  # of all units of a video's segments
    whole = torch.arange(units, device=device)
    picture = (frame.unsqueeze(2) * units + whole).flatten(1)
    return _taken(video.frames, picture, frame.shape[1]), _taken(video.mel, number, 1)


def _columns(config: AudioConfig, segment_seconds: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """The columns of a segment's spectrogram, all mel bins of a unit's width each: the seconds of their middles from
    the segment's start [C], and their units int64 [C, mel_bins / unit].
    """
    grid, rows = config.units, config.mel_bins // config.unit
    unit = torch.arange(grid * grid, device=device).view(-1, rows, grid).transpose(1, 2)  # [runs, grid, rows]
    columns = unit.flatten(0, 1)
    return audio_offsets(config, grid, segment_seconds, device)[columns[:, 0]], columns


def _taken(x: Tensor, number: Tensor, groups: int) -> _Drawn:
    """Units ``number`` int64 [V, K] of each video of ``x`` [V, A, U, P], counted through its images."""
    videos, images, units, _ = x.shape
    flat = (number + (torch.arange(videos, device=x.device) * images * units).unsqueeze(1)).flatten()
    return _Drawn(x.flatten(0, 2).index_select(0, flat), flat // units, flat % units, groups)
