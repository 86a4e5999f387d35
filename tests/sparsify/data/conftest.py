"""Real video files, written on the spot: every frame carries its number, the sound is a tone."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

BITS = 8


def numbered(number: int, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: eight upright bars, black or white, that spell ``number``."""
    bars = [(number >> bit) & 1 for bit in range(BITS)]
    columns = np.arange(width) * BITS // width
    return np.broadcast_to((np.array(bars)[columns] * 255).astype(np.uint8)[None, :, None], (height, width, 3)).copy()


def number_of(picture: Any) -> int:
    """The number that ``numbered`` drew, read in the middle of each bar."""
    picture = np.asarray(picture)
    height, width, _ = picture.shape
    return sum(
        int(picture[height // 2, (2 * bit + 1) * width // (2 * BITS)].mean() > 127) << bit for bit in range(BITS)
    )


def write_video(
    path: Path,
    *,
    frames: int | Sequence[np.ndarray] = 32,
    fps: int = 8,
    times: Sequence[float] | None = None,
    size: tuple[int, int] = (128, 96),
    codec: str | None = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    rotation: int | None = None,
    audio: str | None = "aac",
    rate: int = 44_100,
    layout: str = "stereo",
    tones: Sequence[float] = (440.0, 440.0),
    audio_seconds: float | None = None,
    audio_start: float = 0.0,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Write a file and return its path. ``times`` (seconds of each frame) makes the frame rate vary; ``codec=None``
    writes no picture.
    """
    with av.open(str(path), "w", options=container_options or {}) as container:
        video = None
        count = frames if isinstance(frames, int) else len(frames)
        if codec is not None:
            video = container.add_stream(codec, rate=fps, options=options or {})
            video.width, video.height, video.pix_fmt = *size, pix_fmt
            if times is not None:
                video.codec_context.time_base = Fraction(1, 1000)
            if rotation is not None:
                video.set_display_rotation(rotation)
        sound = container.add_stream(audio, rate=rate, layout=layout) if audio else None
        packets = []
        if video is not None:
            for n in range(count):
                image = numbered(n, *size) if isinstance(frames, int) else frames[n]
                frame = av.VideoFrame.from_ndarray(image, "rgb24")
                if times is not None:
                    frame.pts, frame.time_base = round(times[n] * 1000), Fraction(1, 1000)
                packets += video.encode(frame)
            packets += video.encode()
        if sound is not None:
            seconds = count / fps if audio_seconds is None else audio_seconds
            at = np.arange(round(seconds * rate)) / rate
            channels = sound.codec_context.layout.nb_channels
            wave = np.stack([0.25 * np.sin(2 * np.pi * tones[c] * at) for c in range(channels)]).astype(np.float32)
            resampler = av.AudioResampler(format=sound.codec_context.format.name)
            for begin in range(0, wave.shape[1], 1024):
                frame = av.AudioFrame.from_ndarray(wave[:, begin : begin + 1024].copy(), "fltp", layout)
                frame.sample_rate, frame.pts = rate, begin + round(audio_start * rate)
                frame.time_base = Fraction(1, rate)
                for part in resampler.resample(frame):
                    packets += sound.encode(part)
            packets += sound.encode()
        packets.sort(key=lambda p: float((p.dts or 0) * p.time_base))
        container.mux(packets)
    return path


@pytest.fixture(scope="session")
def media() -> SimpleNamespace:
    """``write_video``, ``numbered`` and ``number_of``."""
    return SimpleNamespace(write=write_video, numbered=numbered, number_of=number_of)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 numbered frames at 24 a second, groups of 16 with B frames, and 4 s of stereo AAC. Only to be read."""
    options = {"x264-params": "keyint=16:min-keyint=16:scenecut=0:bframes=3:b-adapt=0"}
    return write_video(tmp_path_factory.mktemp("media") / "plain.mp4", frames=96, fps=24, options=options)
