"""Pictures and sound of a video file, decoded with PyAV.

Clip time: second 0 is where the file's first stream starts. A frame is shown from its own timestamp until the next
one's, so the picture *at* a time is the latest frame at or before it (the first one before that, the last one after):
with a variable frame rate, too. Frames are turned as their display matrix says and resized whole to a square, the
aspect not kept. Sound is the mean of its channels.

A first pass reads every packet and decodes none: which frames exist, and how far the file really goes. Then pictures
and sound are decoded side by side: each run of frames that a wanted one needs, from its key frame on, which is a few
seeks for few frames and one pass for many (``sparsify.data._pictures``), and all of the sound.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsify.batch import Clip
from sparsify.data import _pictures, _streams
from sparsify.data.mel import SILENCE_DB, log_mel, mel_image
from sparsify.data.units import to_units
from sparsify.errors import MediaError, TruncatedMediaError

if TYPE_CHECKING:
    from sparsify.config import Config

__all__ = ["MediaInfo", "frame_times", "probe", "read_audio", "read_clip", "read_frames", "segment_starts"]

_READABLE = 0.9  # a file of which less than this share can be read is refused


class MediaInfo(NamedTuple):
    """What a file says of itself; nothing but its first frame is decoded."""

    duration: float  # seconds, as declared
    width: int  # pixels, as shown (after rotation)
    height: int  # pixels, as shown
    fps: float  # mean rate; 0 when unknown
    rotation: int  # degrees the stored frames are turned counter-clockwise to be shown: 0, 90, 180 or 270
    has_audio: bool


def frame_times(duration: float, count: int) -> list[float]:
    """The middles of ``count`` equal parts of ``duration`` seconds."""
    return [(t + 0.5) * duration / count for t in range(count)]


def segment_starts(duration: float, count: int, seconds: float) -> list[float]:
    """Starts of ``count`` segments of ``seconds``, spread evenly from 0 so that the last one ends with the clip."""
    last = max(0.0, duration - seconds)
    return [last * s / (count - 1) for s in range(count)] if count > 1 else [last / 2]


def probe(path: str | Path) -> MediaInfo:
    """What the file at ``path`` holds. ``MediaError`` when it is no video with a picture that can be decoded."""
    with _streams.opened(path) as container:
        video = _streams.video_stream(container, path)
        frame = _pictures.first(container, video, path)
        turns = _pictures.quarter_turns(frame)
        width, height = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
        rate = video.average_rate or video.guessed_rate
        return MediaInfo(
            duration=_streams.declared_seconds(container, video) or _streams.scan(container, path).end,
            width=width,
            height=height,
            fps=float(rate) if rate else 0.0,
            rotation=90 * turns,
            has_audio=_streams.audio_stream(container) is not None,
        )


def read_frames(
    path: str | Path, times: Sequence[float] | int, size: int, *, partial: bool = False, threads: int = 0
) -> tuple[Tensor, Tensor]:
    """The pictures shown at some times.

    Args:
        path: the video file.
        times: seconds of clip time in any order, or a count: that many, at the middles of equal parts of the clip.
        size: side of the pictures in pixels.
        partial: accept a truncated file; the clip then ends where it can no longer be read.
        threads: decoder threads; 0 lets the decoder choose.

    Returns:
        uint8 [T, size, size, 3] in RGB, and fp32 [T] the seconds.

    Raises:
        TruncatedMediaError: less than 90 % of the file can be read, and not ``partial``.
        MediaError: it is missing, no media file, without a picture, or none can be decoded.
    """
    with _streams.opened(path) as container:
        video = _streams.video_stream(container, path)
        found = _streams.scan(container, path)
        _refuse_truncated(found, path, partial)
        wanted = frame_times(found.end, times) if isinstance(times, int) else list(times)
        pictures = _shown(container, video, found, wanted, size, path, partial, threads)
    return torch.from_numpy(pictures), torch.tensor(wanted, dtype=torch.float32)


def read_audio(path: str | Path, sample_rate: int, *, partial: bool = False) -> tuple[np.ndarray, bool]:
    """The sound of a file, mixed to one channel (the mean) and resampled; sample 0 is clip time 0.

    Returns:
        float32 [n] in [-1, 1] at ``sample_rate`` Hz, and True; or an empty array and False where the file has no audio
        stream.

    Raises:
        TruncatedMediaError, MediaError: as ``read_frames``; a file without a picture is read all the same.
    """
    with _streams.opened(path) as container:
        track = _streams.Track()
        found = _streams.scan(container, path, track)
        _refuse_truncated(found, path, partial)
        has_audio = _streams.audio_stream(container) is not None
    return track.wave(sample_rate, found.start, found.end), has_audio


def read_clip(
    path: str | Path,
    config: Config,
    partial: bool = False,
    *,
    frames: bool = True,
    audio: bool = True,
    threads: int = 0,
) -> Clip:
    """A video as the model takes it: sampled frames and log-mel images, cut into mask units.

    Frame t of T is shown at the middle of the t-th of T equal parts; S audio segments start evenly spread
    (``segment_starts``), short sound is repeated and padded as CLAP does.

    Args:
        path: the video file.
        config: ``clip`` and the geometry of ``vision`` and ``audio`` are used.
        partial: accept a truncated file: the clip is what can be read of it.
        frames: decode the pictures; else they are all zero.
        audio: decode the sound; else the mel images are those of silence and ``has_audio`` is False.
        threads: 1 keeps all work in this thread; 0 decodes sound and pictures side by side.

    Raises:
        TruncatedMediaError: less than 90 % of the declared duration can be read, and not ``partial``; says how much
            can.
        MediaError: the file is missing, no media file, has no picture, or none can be decoded.
    """
    clip, size = config.clip, config.vision.image_size
    with _streams.opened(path) as container, ThreadPoolExecutor(1) as helper:
        video = _streams.video_stream(container, path)
        audio = audio and _streams.audio_stream(container) is not None
        track = _streams.Track() if audio and threads == 1 else None
        found = _streams.scan(container, path, track)
        _refuse_truncated(found, path, partial)
        starts = segment_starts(found.end, clip.segments, clip.segment_seconds)
        times = frame_times(found.end, clip.frames)
        listening = helper.submit(_heard, path, found, starts, config) if audio and track is None else None
        if frames:
            pictures = torch.from_numpy(_shown(container, video, found, times, size, path, partial, threads))
        else:
            pictures = torch.zeros(clip.frames, size, size, 3, dtype=torch.uint8)
        mel = listening.result() if listening else _mel_units(track, found, starts, config)
    return Clip(
        frames=to_units(pictures.permute(0, 3, 1, 2), config.vision.unit),
        mel=mel,
        frame_time=torch.tensor(times, dtype=torch.float32),
        segment_time=torch.tensor(starts, dtype=torch.float32),
        duration=torch.tensor(found.end, dtype=torch.float32),
        has_audio=torch.tensor(audio),
    )


def _heard(path: str | Path, found: _streams.Scan, starts: list[float], config: Config) -> Tensor:
    """``_mel_units`` of the file's sound, decoded from a container of its own: one belongs to one thread."""
    track = _streams.Track()
    with _streams.opened(path) as container:
        _streams.hear(container, track)
    return _mel_units(track, found, starts, config)


def _mel_units(track: _streams.Track | None, found: _streams.Scan, starts: list[float], config: Config) -> Tensor:
    """fp16 [S, Ua, unit * unit]: the mel images of the segments that start at ``starts`` seconds; silence without a
    track.
    """
    clip, audio = config.clip, config.audio
    if track is None:
        return torch.full((clip.segments, audio.units**2, audio.unit**2), SILENCE_DB, dtype=torch.float16)
    wave = track.wave(clip.sample_rate, found.start, found.end)
    samples = round(clip.segment_seconds * clip.sample_rate)
    pieces = [torch.from_numpy(wave[round(s * clip.sample_rate) :][:samples]) for s in starts]
    image = mel_image(torch.stack([log_mel(piece, clip, audio.mel_bins) for piece in pieces]), audio)
    return to_units(image.unsqueeze(1), audio.unit).half()  # [S, 1, spec, spec] -> [S, Ua, unit * unit]


def _shown(
    container: _streams.Container,
    video: _streams.VideoStream,
    found: _streams.Scan,
    times: list[float],
    size: int,
    path: str | Path,
    partial: bool,
    threads: int,
) -> np.ndarray:
    """uint8 [T, size, size, 3] at ``times``; refuses a file of which more than a tenth of them cannot be decoded."""
    pictures, missing = _pictures.at_times(container, video, found, times, size, threads)
    if len(missing) == len(times) > 0:
        raise MediaError(f"{path}: no picture can be decoded; the file is damaged")
    if len(missing) > (1 - _READABLE) * len(times) and not partial:
        raise TruncatedMediaError(
            f"{path}: damaged: {len(times) - len(missing)} of {len(times)} sampled pictures can be decoded "
            f"(expected at least {_READABLE:.0%})"
        )
    return pictures


def _refuse_truncated(found: _streams.Scan, path: str | Path, partial: bool) -> None:
    for what, readable, declared in found.extents:
        if readable < _READABLE * declared and not partial:
            raise TruncatedMediaError(
                f"{path}: truncated: {readable:.1f} of {declared:.1f} s of the {what} can be read "
                f"(expected at least {_READABLE:.0%})"
            )
