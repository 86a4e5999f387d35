"""Reading a minute of real video, and serving clips to training.
 Decoding needs SPARSIFY_MUSIC_AVQA, a folder with ``videos/00003491.mp4`` (60 s of 640 x 360 H.264 at 60 frames a
second, MP3): 10 frames and 6 log-mel images in the geometry of the paper. To reach on two cores: decoded in 0.6 s,
from the cache in 20 ms. The clips of the built-in set's size (4 s, 128 px, 8 frames a second) are written here: to
reach are 13 ms a clip in one process, and 0.1 ms an item when training.
"""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from sparsify.config import Config
from sparsify.data.cache import ClipCache
from sparsify.data.dataset import Item, collate
from sparsify.data.media import read_audio, read_clip, read_frames

DEMO_CLIPS = 16


@pytest.fixture(scope="module")
def minute() -> Path:
    root = os.environ.get("SPARSIFY_MUSIC_AVQA")
    if not root or not (path := Path(root) / "videos" / "00003491.mp4").exists():
        pytest.skip("SPARSIFY_MUSIC_AVQA does not name a folder with videos/00003491.mp4: real video was not measured")
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Clips of the built-in set's size: a moving pattern, a chord in stereo."""
    folder = tmp_path_factory.mktemp("clips")
    return [_write(folder / f"{n}.mp4", n) for n in range(DEMO_CLIPS)]


def _write(path: Path, seed: int) -> Path:
    tiles = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    at = np.arange(4 * 44_100) / 44_100
    chord = sum(0.1 * np.sin(2 * np.pi * (220 + 40 * seed) * k * at) for k in (1, 2, 3)).astype(np.float32)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=8)
        video.width, video.height, video.pix_fmt = 128, 128, "yuv420p"
        sound = container.add_stream("aac", rate=44_100, layout="stereo")
        for n in range(32):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.roll(tiles, 3 * n, 1), "rgb24")))
        container.mux(video.encode())
        for begin in range(0, len(chord), 1024):
            part = chord[begin : begin + 1024]
            frame = av.AudioFrame.from_ndarray(np.stack([part, part]), "fltp", "stereo")
            frame.sample_rate, frame.pts, frame.time_base = 44_100, begin, Fraction(1, 44_100)
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return path


@pytest.mark.parametrize("threads", [0, 1])
def test_decode_a_minute(benchmark, minute: Path, threads: int) -> None:
    config = Config.preset("paper")
    clip = benchmark(read_clip, minute, config, threads=threads)
    assert clip.frames.shape == (10, 64, 3072)


def test_ten_frames_of_a_minute(benchmark, minute: Path) -> None:
    benchmark(read_frames, minute, 10, 256)


def test_sound_of_a_minute(benchmark, minute: Path) -> None:
    benchmark(read_audio, minute, 48_000)


@pytest.mark.parametrize("first", [True, False], ids=["first time in a process", "again"])
def test_a_minute_from_the_cache(benchmark, minute: Path, tmp_path: Path, first: bool) -> None:
    config = Config.preset("paper")
    cache = ClipCache(tmp_path, config)
    cache.get(minute)
    clip = benchmark(lambda: (ClipCache(tmp_path, config) if first else cache).get(minute))
    assert clip.frames.shape == (10, 64, 3072)


def test_decode_a_small_clip(benchmark, small: list[Path]) -> None:
    """The time is that of all clips."""
    config = Config.preset("demo")
    benchmark(lambda: [read_clip(path, config, threads=1) for path in small])


def test_items_from_the_cache(benchmark, small: list[Path], tmp_path: Path) -> None:
    """The time is that of all clips."""
    cache = ClipCache(tmp_path, Config.preset("demo"))
    benchmark(lambda: [cache.get(path) for path in small])


def test_collate(benchmark, small: list[Path], tmp_path: Path) -> None:
    cache = ClipCache(tmp_path, Config.preset("demo"))
    items = [Item(str(n), cache.get(path), (), ([2, 3, 4],) * 4) for n, path in enumerate(small)]
    benchmark(collate, items, epoch=0, run_seed=0, keep=0.5)
