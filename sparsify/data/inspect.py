"""A look at one media file, cheap enough for a whole data set: can it be read to its end, and is there anything to
hear?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.errors import MediaError

if TYPE_CHECKING:
    from av import AudioFrame
    from av.container import InputContainer

__all__ = ["READABLE_SHARE", "SILENCE", "MediaState", "inspect_media"]

READABLE_SHARE = 0.9  # of the declared duration must be there, else the file counts as truncated
SILENCE = 1e-3  # a sound whose peak never passes this (-60 dB of full scale) cannot be heard

_FULL_SCALE = {"u8": 128.0, "s16": 32_768.0, "s32": 2_147_483_648.0, "s64": 2.0**63}  # others are floats in [-1, 1]


@dataclass(frozen=True, slots=True)
class MediaState:
    """What is wrong with a file, each a reason or None: ``broken`` cannot be used, ``silent`` has nothing to hear."""

    broken: str | None = None
    silent: str | None = None


def inspect_media(path: Path) -> MediaState:
    """Open ``path``, read it to its end, decode one frame of its picture and its sound until it is audible.

    Packets are read but not decoded beyond that, so a minute of video takes some ten milliseconds; only a silent one
    is decoded whole.
    """
    import av

    from sparsify.data.media import probe

    try:
        probe(path)
        with av.open(str(path)) as container:
            return _read_through(container)
    except MediaError as error:
        return MediaState(broken=str(error).removeprefix(f"{path}: "))
    except (av.FFmpegError, OSError) as error:
        return MediaState(broken=str(error))


def _read_through(container: InputContainer) -> MediaState:
    import av

    picture = container.streams.video[0]
    sound = container.streams.audio[0] if container.streams.audio else None
    end = 0.0  # seconds
    peak = 0.0
    has_frame = has_sound = False
    for packet in container.demux([picture] if sound is None else [picture, sound]):
        if packet.stream is picture and packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        try:
            if packet.stream is picture and not has_frame:
                has_frame = bool(packet.decode())
            elif packet.stream is sound and peak <= SILENCE:
                for frame in packet.decode():
                    if isinstance(frame, av.AudioFrame):
                        has_sound, peak = True, max(peak, _peak(frame))
        except av.FFmpegError:
            continue  # one bad packet is no reason to give a file up: it must only bring some frame and some sound
    if not has_frame:
        return MediaState(broken="no frame of the video stream can be decoded")
    declared = (container.duration or 0) / av.time_base
    readable = end - (container.start_time or 0) / av.time_base
    if readable < READABLE_SHARE * declared:
        return MediaState(broken=f"truncated: {readable:.1f} of {declared:.1f} s can be read")
    if sound is None:
        return MediaState(silent="no audio stream")
    if not has_sound:
        return MediaState(silent="no sound can be decoded")
    return MediaState(silent=None if peak > SILENCE else "no sound above -60 dB")


def _peak(frame: AudioFrame) -> float:
    """The largest absolute sample of a frame, of full scale."""
    import numpy as np

    samples = frame.to_ndarray().astype(np.float64)
    name = frame.format.name.removesuffix("p")
    if name == "u8":
        samples -= 128.0
    return float(np.abs(samples).max(initial=0.0)) / _FULL_SCALE.get(name, 1.0)
