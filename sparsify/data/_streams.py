"""Containers, streams and sound of ``sparsify.data.media``: what PyAV says, with errors that name the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias

import av
import av.error
import numpy as np

from sparsify.errors import MediaError

__all__ = [
    "Container",
    "Scan",
    "Sound",
    "VideoStream",
    "audio_stream",
    "declared_seconds",
    "opened",
    "picture_stream",
    "resampled",
    "scan",
    "video_stream",
]

Container: TypeAlias = av.container.InputContainer
VideoStream: TypeAlias = av.VideoStream

_GAP = 0.1  # seconds of missing sound that are filled with silence; less is rounding of timestamps
_LEAST = 1e-3  # seconds: a file that holds less is empty


class Sound(NamedTuple):
    """A run of sound at one rate."""

    samples: np.ndarray  # float32 [n], mean of the channels
    rate: int  # Hz


class Scan(NamedTuple):
    """What reading every packet of a file once tells. Packets are in decoding order; times in the video stream's ticks."""

    pts: list[int | None]  # when the frame of a packet is shown
    dts: list[int | None]  # when it is decoded
    key: list[bool]  # decoding can start here
    shown: list[bool]  # false: decoded for others' sake and never shown (an edit list cuts it)
    start: float  # seconds: the file's clock at clip time 0
    end: float  # seconds of clip time: where the last readable packet ends
    extents: list[tuple[str, float, float]]  # (stream, readable seconds, declared seconds)
    sound: list[Sound]  # empty: no audio stream (or not asked for)


@contextmanager
def opened(path: str | Path) -> Iterator[Container]:
    """The open container of ``path``; ``MediaError`` with the reason when it cannot be opened."""
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise MediaError(f"{path}: cannot read the video: {error.strerror}") from error
    if os.path.isdir(path):
        raise MediaError(f"{path}: is a folder; expected a video file")
    if size == 0:
        raise MediaError(f"{path}: the file is empty (0 bytes); expected a video")
    try:
        # "file:" keeps a name such as "a:b.mp4" from being taken for a protocol.
        container = av.open(f"file:{os.path.abspath(path)}", metadata_errors="replace")
    except av.error.InvalidDataError as error:
        raise MediaError(f"{path}: not a readable video file{_why_unreadable(path)}") from error
    except (OSError, av.error.FFmpegError) as error:
        raise MediaError(f"{path}: cannot read the video: {error.strerror or error}") from error
    with container:
        yield container


def _why_unreadable(path: str | Path) -> str:
    """A more exact reason where an MP4 file lacks its index, which is what an interrupted recording or download leaves."""
    with open(path, "rb") as file:
        head, position, size = file.read(12), 0, os.fstat(file.fileno()).st_size
        if head[4:8] != b"ftyp":
            return " (not a media format that FFmpeg knows)"
        while position + 8 <= size:
            file.seek(position)
            box = file.read(16)
            if box[4:8] == b"moov":
                return " (its index is damaged)"
            length = int.from_bytes(box[:4], "big")
            if length == 1:  # the length stands in the next eight bytes
                length = int.from_bytes(box[8:16], "big")
            if length < 8:
                break
            position += length
    return " (an MP4 file without its index, the moov box: it was cut off before its end)"


def picture_stream(container: Container) -> VideoStream | None:
    """The first video stream that is not a cover picture."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    return None


def video_stream(container: Container, path: str | Path) -> VideoStream:
    """The file's pictures; ``MediaError`` that says what the file holds instead."""
    stream = picture_stream(container)
    if stream is None:
        held = "only sound" if container.streams.audio else "neither picture nor sound"
        raise MediaError(f"{path}: no video stream: the file holds {held}; expected a video")
    if stream.codec_context is None:
        raise MediaError(f"{path}: no decoder for its video stream")
    return stream


def audio_stream(container: Container) -> av.AudioStream | None:
    """The first audio stream that has a decoder."""
    return next((s for s in container.streams.audio if s.codec_context is not None), None)


def declared_seconds(container: Container, stream: av.stream.Stream) -> float:
    """The duration that the stream, or else the file, declares; 0 when neither does."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else 0.0


def scan(container: Container, video: VideoStream | None, audio: av.AudioStream | None) -> Scan:
    """Read every packet from the start: note the pictures' timestamps, decode the sound, see how far the file goes.

    Raises ``MediaError`` when there is nothing to read.
    """
    table: tuple[list[int | None], list[int | None], list[bool], list[bool]] = ([], [], [], [])
    start = container.start_time / av.time_base if container.start_time else 0.0
    declared_all = container.duration / av.time_base if container.duration else 0.0
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    ears = _Ears(start, declared_all) if audio is not None else None
    streams = [s for s in container.streams if s.type in ("video", "audio")]
    try:
        for packet in container.demux(streams):
            at = packet.pts if packet.pts is not None else packet.dts
            if at is None:  # the flush at the end of each stream
                if ears is not None and packet.stream_index == audio.index:
                    ears.hear(packet)
                continue
            index = packet.stream_index
            if not packet.is_corrupt:
                begin = float(at * packet.time_base)
                first[index] = min(begin, first.get(index, begin))
                last[index] = max(begin + float((packet.duration or 0) * packet.time_base), last.get(index, begin))
            if video is not None and index == video.index:
                table[0].append(packet.pts)
                table[1].append(packet.dts)
                table[2].append(packet.is_keyframe)
                table[3].append(not packet.is_discard)
            elif ears is not None and index == audio.index:
                ears.hear(packet)
    except av.error.FFmpegError:
        pass  # the rest cannot be read: the extents below say how much that is
    if not last:
        raise MediaError(f"{container.name.removeprefix('file:')}: holds no picture and no sound that can be read")
    end = max(max(last.values()) - start, _LEAST)
    extents = [("file", end, declared_all)]
    for stream, name in ((video, "picture"), (audio, "sound")):
        # Only what a stream declares of itself: a sound that ends before the picture does is whole.
        if stream is not None and stream.duration is not None and stream.time_base is not None:
            readable = last[stream.index] - first[stream.index] if stream.index in last else 0.0
            extents.append((name, readable, float(stream.duration * stream.time_base)))
    return Scan(*table, start, end, extents, ears.sound() if ears is not None else [])


class _Ears:
    """Gathers the decoded sound of a stream, its channels averaged, each sample in its place on the clip's clock."""

    def __init__(self, start: float, declared: float) -> None:
        self._start = start
        self._limit = declared + 60.0  # seconds: a timestamp beyond this is damaged, and no reason to add hours of silence
        self._pieces: dict[int, list[np.ndarray]] = {}  # per rate, in order
        self._rates: list[int] = []
        self._runs: list[list[np.ndarray]] = []
        self._seconds = 0.0
        self._planar: av.AudioResampler | None = None

    def hear(self, packet: av.Packet) -> None:
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            return  # a damaged packet: the next one's timestamp leaves a gap of silence
        for frame in frames:
            for part in self._as_planar(frame):
                self._add(part)

    def _as_planar(self, frame: av.AudioFrame) -> list[av.AudioFrame]:
        if frame.format.name == "fltp":
            return [frame]
        if self._planar is None:
            self._planar = av.AudioResampler(format="fltp")
        return self._planar.resample(frame)

    def _add(self, frame: av.AudioFrame) -> None:
        rate, samples = frame.sample_rate, frame.samples
        if not self._rates or self._rates[-1] != rate:
            self._rates.append(rate)
            self._runs.append([])
        if frame.time is not None:
            gap = frame.time - self._start - self._seconds
            if _GAP < gap < self._limit:
                silence = round(gap * rate)
                self._runs[-1].append(np.zeros(silence, np.float32))
                self._seconds += silence / rate
        channels = [np.frombuffer(plane, np.float32, samples) for plane in frame.planes]
        mono = channels[0].copy() if len(channels) == 1 else sum(channels[1:], channels[0]) / np.float32(len(channels))
        self._runs[-1].append(mono)
        self._seconds += samples / rate

    def sound(self) -> list[Sound]:
        """The runs heard; one of no samples where a stream is there and nothing of it could be decoded."""
        if not self._runs:
            return [Sound(np.zeros(0, np.float32), 48_000)]
        return [Sound(np.concatenate(run), rate) for run, rate in zip(self._runs, self._rates, strict=True)]


def resampled(sound: list[Sound], rate: int) -> np.ndarray:
    """All runs of ``sound`` one after the other at ``rate`` Hz: float32 [n]."""
    return np.concatenate([np.zeros(0, np.float32)] + [_resample(run, rate) for run in sound])


def _resample(sound: Sound, rate: int) -> np.ndarray:
    if sound.rate == rate or len(sound.samples) == 0:
        return sound.samples
    frame = av.AudioFrame.from_ndarray(sound.samples[None], format="fltp", layout="mono")
    frame.sample_rate = sound.rate
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate)
    parts = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([part.to_ndarray()[0] for part in parts])
