"""Pictures of ``sparsify.data.media``: which packets to decode for the frames wanted, and no more."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import av.error
import numpy as np
from av.stream import Discard
from av.video.reformatter import VideoReformatter

from sparsify.data._streams import Container, Scan, VideoStream
from sparsify.errors import MediaError

__all__ = ["at_times", "first", "quarter_turns"]

_NEAR = 24  # packets: decoding on to the next key frame costs no more than a seek
_LAG = 0.1  # of the clip: pictures missing for longer at its end are damage
_EPSILON = 1e-6  # seconds: timestamps are rational numbers, wanted times are floats


class _LostError(Exception):
    """The packets' timestamps do not lead to the frames wanted: the file has to be decoded in one pass."""


class _Table(NamedTuple):
    """The packets of the pictures in decoding order: ``Scan`` where every timestamp is there and there once."""

    pts: list[int]
    dts: list[int]
    key: list[bool]
    begins: list[float]  # clip time of the packet's frame
    shown: list[int]  # packets whose frame is shown, in the order of being shown


def _table(scan: Scan, tick: float) -> _Table:
    pts = [t for t in scan.pts if t is not None]
    dts = [t for t in scan.dts if t is not None]
    packets = len(scan.pts)
    shown = sorted((i for i in range(packets) if scan.shown[i]), key=pts.__getitem__) if len(pts) == packets else []
    if not shown or len(set(pts)) < packets or len(set(dts)) < packets:
        raise _LostError
    return _Table(pts, dts, scan.key, [t * tick - scan.start for t in pts], shown)


def first(container: Container, video: VideoStream, path: str | Path) -> av.VideoFrame:
    """The first frame of the file, which is left at its start again; ``MediaError`` when none can be decoded."""
    video.thread_type = "AUTO"
    try:
        for packet in container.demux(video):
            for frame in _decode(video, packet):
                container.seek(0)
                return frame
    except av.error.FFmpegError:
        pass
    raise MediaError(f"{path}: no picture can be decoded; the file is damaged")


def quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise quarter turns that show a frame upright, in [0, 4)."""
    return round(frame.rotation / 90) % 4


def at_times(
    container: Container, video: VideoStream, scan: Scan, times: list[float], size: int, threads: int
) -> tuple[np.ndarray, list[int]]:
    """The pictures shown at ``times`` (seconds of clip time), and which of them could not be decoded.

    Returns:
        uint8 [T, size, size, 3] in RGB, and indices into ``times``: there the nearest picture decoded stands in (zeros
        if none was).
    """
    video.thread_type = "AUTO"
    if video.codec_context.thread_count != threads and not video.codec_context.is_open:
        video.codec_context.thread_count = threads
    for stream in container.streams:
        if stream.index != video.index:
            stream.discard = Discard.all  # not even read
    try:
        found = _by_runs(container, video, _table(scan, _tick(video)), times, size)
    except (_LostError, av.error.FFmpegError):
        found = _in_one_pass(container, video, scan, times, size)
    missing = [i for i in range(len(times)) if i not in found]
    pictures = np.zeros((len(times), size, size, 3), np.uint8)
    for i in range(len(times)):
        if found:
            pictures[i] = found[i] if i in found else found[min(found, key=lambda j: abs(times[j] - times[i]))]
    return pictures, missing


def _tick(video: VideoStream) -> float:
    """Seconds of one unit of the stream's timestamps."""
    return float(video.time_base or 0)


def _by_runs(
    container: Container, video: VideoStream, table: _Table, times: list[float], size: int
) -> dict[int, np.ndarray]:
    """Decode the frames at ``times`` by the packet table: from key frames on, leaving out what nothing else needs."""
    begins = [table.begins[i] for i in table.shown]
    wanted = [table.shown[max(0, bisect_right(begins, t + _EPSILON) - 1)] for t in times]  # packets
    pictures: dict[int, np.ndarray] = {}  # by timestamp
    scaler = VideoReformatter()  # keeps its tables from frame to frame
    # In H.264 a frame marked as not for reference changes no other frame, so it is only decoded where it is wanted
    # itself. (HEVC's mark speaks of one temporal layer alone.)
    skip = video.codec_context.name == "h264"
    for start, stop in _runs(table, wanted):
        keep = {table.pts[i] for i in wanted if start <= i < stop}
        for frame in _decode_run(container, video, table, start, stop, keep if skip else None):
            if frame.pts in keep:
                pictures[frame.pts] = _picture(frame, size, scaler)
    return {n: pictures[table.pts[i]] for n, i in enumerate(wanted) if table.pts[i] in pictures}


def _runs(table: _Table, wanted: list[int]) -> list[tuple[int, int]]:
    """Ranges of packets [start, stop) to decode, each from a key frame on, so that every wanted packet can be
    decoded.
    """
    keys = [i for i, key in enumerate(table.key) if key]
    runs: list[tuple[int, int]] = []
    for i in sorted(set(wanted)):
        k = bisect_right(keys, i) - 1
        # A frame shown before its key frame but stored after it (an open group of pictures) needs the group before,
        # too.
        while k > 0 and table.pts[keys[k]] > table.pts[i]:
            k -= 1
        start = keys[k] if k >= 0 else 0
        if runs and start <= runs[-1][1] + _NEAR:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((start, i + 1))
    return runs


def _decode_run(
    container: Container, video: VideoStream, table: _Table, start: int, stop: int, only: set[int] | None
) -> Iterator[av.VideoFrame]:
    """Every frame of packets [start, stop); with ``only``, frames that are neither needed nor at these timestamps are
    left out.
    """
    place = {dts: i for i, dts in enumerate(table.dts)}
    container.seek(table.dts[start], stream=video, backward=True, any_frame=False)
    reached = False
    for packet in container.demux(video):
        i = -1 if packet.dts is None else place.get(packet.dts, -1)
        if not reached:
            if i > start or packet.dts is None:  # behind the key frame, or at the end of the file
                raise _LostError
            reached = i == start
        if reached and i >= 0:
            if only is not None:
                video.codec_context.skip_frame = "DEFAULT" if packet.pts in only else "NONREF"
            yield from _decode(video, packet)
            if i + 1 >= stop:
                break
    yield from _decode(video, None)


def _in_one_pass(
    container: Container, video: VideoStream, scan: Scan, times: list[float], size: int
) -> dict[int, np.ndarray]:
    """Decode the whole file and take the frames as they come by: for files without usable timestamps or seeking."""
    container.seek(container.start_time or 0)
    video.codec_context.skip_frame = "DEFAULT"
    order = sorted(range(len(times)), key=lambda n: times[n])
    rate = float(video.average_rate or video.guessed_rate or 25)
    found: dict[int, np.ndarray] = {}
    scaler = VideoReformatter()
    before: av.VideoFrame | None = None
    at, count = 0.0, 0
    for frame in _all_frames(container, video):
        ticks = frame.pts if frame.pts is not None else frame.dts
        at = ticks * _tick(video) - scan.start if ticks is not None else count / rate
        while order and times[order[0]] + _EPSILON < at:
            found[order.pop(0)] = _picture(before or frame, size, scaler)
        before, count = frame, count + 1
        if not order:
            break
    if before is not None:
        # The last frame stays on screen; but where packets went on far behind the last frame they gave, it is damage.
        ticks = max((t for t in (*scan.pts, *scan.dts) if t is not None), default=0)
        last = ticks * _tick(video) - scan.start
        found |= {n: _picture(before, size, scaler) for n in order if min(times[n], last) - at <= _LAG * scan.end}
    return found


def _all_frames(container: Container, video: VideoStream) -> Iterator[av.VideoFrame]:
    try:
        for packet in container.demux(video):
            yield from _decode(video, packet)
    except av.error.FFmpegError:
        return  # the rest cannot be read


def _decode(video: VideoStream, packet: av.Packet | None) -> list[av.VideoFrame]:
    """The frames that come out when ``packet`` goes in (None: what is still inside); none for a damaged packet."""
    try:
        return video.codec_context.decode(packet)
    except av.error.EOFError:
        return []  # flushed already
    except av.error.FFmpegError:
        return []


def _picture(frame: av.VideoFrame, size: int, scaler: VideoReformatter) -> np.ndarray:
    """uint8 [size, size, 3] in RGB, upright. AREA averages what a pixel covers: no aliasing, and cheaper than
    bicubic.
    """
    square = scaler.reformat(frame, width=size, height=size, format="rgb24", interpolation="AREA")
    # Turning the square is turning the frame: the resize makes width and height the same.
    return np.ascontiguousarray(np.rot90(square.to_ndarray(), quarter_turns(frame)))
