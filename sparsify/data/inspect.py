"""A look at one media file, cheap enough for a whole data set: can all of it be read, and is there anything to hear?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.errors import MediaError

if TYPE_CHECKING:
    from av import AudioFrame

__all__ = ["SILENCE", "MediaState", "inspect_media"]

SILENCE = 1e-3  # of full scale (-60 dB): a sound whose peak never passes this cannot be heard

_FULL_SCALE = {"u8": 128.0, "s16": 32_768.0, "s32": 2_147_483_648.0, "s64": 2.0**63}  # the others are floats in [-1, 1]


@dataclass(frozen=True, slots=True)
class MediaState:
    """What is wrong with a file, each a reason or None: ``broken`` cannot be used, ``silent`` has nothing to hear."""

    broken: str | None = None
    silent: str | None = None


def inspect_media(path: Path) -> MediaState:
    """Read the file at ``path`` to its end, decode its first picture, and its sound until it is audible.

    A file that is not ``broken`` here is one that ``media.read_clip`` takes, unless later pictures are damaged: of
    those only the packets are read. Only a silent file has all of its sound decoded.
    """
    from sparsify.data.media import read_frames

    try:
        read_frames(path, [0.0], size=8, threads=1)  # refuses a truncated file, too
        return MediaState(silent=_why_silent(path))
    except (MediaError, OSError) as error:
        return MediaState(broken=str(error).removeprefix(f"{path}: "))


def _why_silent(path: Path) -> str | None:
    """Why nothing can be heard in the file; None when something can."""
    import av

    with av.open(str(path.absolute())) as container:
        if not container.streams.audio:
            return "no audio stream"
        heard = False
        for packet in container.demux(container.streams.audio[0]):
            try:
                peak = max((_peak(frame) for frame in packet.decode()), default=None)
            except av.FFmpegError:
                continue  # a damaged packet: the others are what is heard
            heard |= peak is not None
            if peak is not None and peak > SILENCE:
                return None
    return "no sound above -60 dB" if heard else "no sound that can be decoded"


def _peak(frame: AudioFrame) -> float:
    """The largest absolute sample of a frame, of full scale."""
    import numpy as np

    samples = frame.to_ndarray().astype(np.float64)
    name = frame.format.name.removesuffix("p")
    if name == "u8":
        samples -= 128.0
    return float(np.abs(samples).max(initial=0.0)) / _FULL_SCALE.get(name, 1.0)
