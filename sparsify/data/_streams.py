"""Containers, streams and sound of ``sparsify.data.media``: what PyAV says, with errors that name the file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import av
import av.error
import numpy as np

from sparsify.errors import MediaError

__all__ = [
    "Container",
    "Scan",
    "Track",
    "VideoStream",
    "audio_stream",
    "declared_seconds",
    "hear",
    "opened",
    "scan",
    "video_stream",
]

Container: TypeAlias = av.container.InputContainer
VideoStream: TypeAlias = av.VideoStream

_GAP = 0.1  # seconds of missing sound that are filled with silence; less is rounding of timestamps
_LEAST = 1e-3  # seconds: a file that holds less is empty


class Scan(NamedTuple):
    """What reading every packet of a file once tells. Packets are in decoding order; times in the video stream's
    ticks.
    """

    pts: list[int | None]  # when the frame of a packet is shown
    dts: list[int | None]  # when it is decoded
    key: list[bool]  # decoding can start here
    shown: list[bool]  # false: decoded for others' sake and never shown (an edit list cuts it)
    start: float  # seconds: the file's clock at clip time 0
    end: float  # seconds of clip time: where the last readable packet ends
    extents: list[tuple[str, float, float]]  # (stream, readable seconds, declared seconds)


@contextlib.contextmanager
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
    """A more exact reason where an MP4 file lacks its index, which is what an interrupted recording or download
    leaves.
    """
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


def scan(container: Container, path: str | Path, track: Track | None = None) -> Scan:
    """Read every packet from the start: the pictures' timestamps, and how far the file really goes.

    Nothing is decoded but, where a ``track`` is given, the sound: into it.

    Raises ``MediaError`` when there is nothing to read.
    """
    video, audio = picture_stream(container), audio_stream(container)
    pts: list[int | None] = []
    dts: list[int | None] = []
    key: list[bool] = []
    shown: list[bool] = []
    streams = [s for s in (video, audio) if s is not None]
    tick = {s.index: float(s.time_base or 0) for s in streams}
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    try:
        for packet in container.demux(streams):
            at = packet.pts if packet.pts is not None else packet.dts
            index = packet.stream_index
            if track is not None and audio is not None and index == audio.index:
                track.hear(packet)
            if at is None:  # the flush at the end of each stream
                continue
            if not packet.is_corrupt:
                begin = at * tick[index]
                first[index] = min(begin, first.get(index, begin))
                last[index] = max(begin + (packet.duration or 0) * tick[index], last.get(index, begin))
            if video is not None and index == video.index:
                pts.append(packet.pts)
                dts.append(packet.dts)
                key.append(packet.is_keyframe)
                shown.append(not packet.is_discard)
    except av.error.FFmpegError:
        pass  # the rest cannot be read: the extents say how much that is
    if not last:
        raise MediaError(f"{path}: holds no picture and no sound that can be read")
    start = container.start_time / av.time_base if container.start_time else 0.0
    end = max(max(last.values()) - start, _LEAST)
    extents = [("file", end, container.duration / av.time_base if container.duration else 0.0)]
    for stream, name in ((video, "picture"), (audio, "sound")):
        # Only what a stream declares of itself: a sound that ends before the picture does is whole.
        if stream is not None and stream.duration is not None:
            readable = last[stream.index] - first[stream.index] if stream.index in last else 0.0
            extents.append((name, readable, stream.duration * tick[stream.index]))
    return Scan(pts, dts, key, shown, start, end, extents)


def hear(container: Container, track: Track) -> None:
    """Decode the sound of a container just opened into ``track``, as far as it can be read."""
    audio = audio_stream(container)
    if audio is not None:
        with contextlib.suppress(av.error.FFmpegError):
            for packet in container.demux(audio):
                track.hear(packet)


class Track:
    """The decoded sound of a stream: what PyAV gives, gathered with little work a frame."""

    def __init__(self) -> None:
        self._pieces: list[tuple[float | None, int, np.ndarray]] = []  # (seconds on the file's clock, Hz, samples)
        self._fifo = av.AudioFifo()
        self._kind: tuple[int, str, str] | None = None  # rate, format and layout of what the fifo holds
        self._begin: float | None = None  # when that begins
        self._expected = 0.0  # when it ends

    def hear(self, packet: av.Packet[Any]) -> None:
        """Decode a packet; a damaged one is left out, and the next one's timestamp tells how long the gap is."""
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            return
        for frame in frames:
            assert isinstance(frame, av.AudioFrame)
            time, kind = frame.time, (frame.sample_rate, frame.format.name, frame.layout.name)
            if kind != self._kind or (time is not None and time - self._expected > _GAP):
                self._drain()
                self._kind, self._begin = kind, time
                self._expected = time or 0.0
            self._expected += frame.samples / frame.sample_rate
            frame.pts = None  # the fifo would refuse timestamps that are rounded
            self._fifo.write(frame)

    def _drain(self) -> None:
        """Move what the fifo holds to the pieces, its channels averaged."""
        frame = self._fifo.read()  # None: it is empty
        if frame is not None and self._kind is not None:
            if frame.format.name != "fltp":
                (frame,) = av.AudioResampler(format="fltp").resample(frame)
            self._pieces.append((self._begin, self._kind[0], frame.to_ndarray().mean(axis=0, dtype=np.float32)))
        self._fifo = av.AudioFifo()

    def wave(self, rate: int, start: float, end: float) -> np.ndarray:
        """float32 [n] at ``rate`` Hz, each sample in its place on the clip's clock, gaps silent.

        ``start`` is the file's clock at clip time 0; a piece that would begin after clip time ``end`` is not waited for
        (its timestamp is damaged).
        """
        self._drain()
        parts, length = [np.zeros(0, np.float32)], 0
        for begin, of, samples in self._pieces:
            gap = 0.0 if begin is None else begin - start - length / rate
            if gap > _GAP and begin is not None and begin - start < end:
                parts.append(np.zeros(round(gap * rate), np.float32))
                length += len(parts[-1])
            parts.append(_resample(samples, of, rate))
            length += len(parts[-1])
        return np.concatenate(parts)


def _resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    if rate == wanted:
        return samples
    frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=wanted)
    parts = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([part.to_ndarray()[0] for part in parts])
