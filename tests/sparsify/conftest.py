"""Shared by the tests of training and evaluation: a data folder of twelve tiny clips and a configuration to match."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.config import (
    AudioConfig,
    ClipConfig,
    Config,
    FusionConfig,
    MaskConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from sparsify.data.music_avqa import DataRoot

SIZE, FPS, RATE = 64, 4, 16_000
COLOURS = {"violin": (220, 40, 40), "piano": (40, 220, 40), "tuba": (40, 40, 220)}


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    """Two stages, two frames, one second of sound: a step takes some 20 ms."""
    return Config(
        clip=ClipConfig(frames=2, segments=1, segment_seconds=1.0, sample_rate=RATE, f_max=8000.0),
        vision=VisionConfig(
            image_size=SIZE, patch_size=8, window_size=2, embed_dim=16, depths=(1, 1), heads=(2, 4), unit=16
        ),
        audio=AudioConfig(
            spec_size=SIZE, mel_bins=16, patch_size=8, window_size=2, embed_dim=16, depths=(1, 1), heads=(2, 4), unit=16
        ),
        text=TextConfig(dim=32, layers=1, heads=2, dropout=0.1),
        mask=MaskConfig(epochs=(0, -1)),
        fusion=FusionConfig(dim=32, heads=2, adapter_latents=2, adapter_dim=8, layers=1, dropout=0.1),
        train=TrainConfig(epochs=3, videos=3, lr=3e-3, encoder_lr=3e-3, precision="fp32"),
    )


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 training, 2 validation and 2 test clips of one colour and one tone each, three questions a clip."""
    root = tmp_path_factory.mktemp("tiny")
    (root / "annotations").mkdir()
    (root / "videos").mkdir()
    number = 0
    for split, clips in (("train", 8), ("val", 2), ("test", 2)):
        rows = []
        for _ in range(clips):
            name = f"{number:08d}"
            instrument = list(COLOURS)[number % 3]
            write_clip(root / "videos" / f"{name}.mp4", COLOURS[instrument], pitch=200.0 * (1 + number % 2))
            rows += questions(name, 3 * number, instrument, low=number % 2 == 0)
            number += 1
        (root / "annotations" / f"avqa-{split}.json").write_text(json.dumps(rows))
    return root


@pytest.fixture
def tiny_root(tiny_files: Path, tmp_path: Path) -> DataRoot:
    """The same folder, its own for every test (videos are links), so that a test may break a file."""
    root = tmp_path / "root"
    (root / "videos").mkdir(parents=True)
    (root / "annotations").mkdir()
    for path in (tiny_files / "annotations").iterdir():
        (root / "annotations" / path.name).write_bytes(path.read_bytes())
    for path in (tiny_files / "videos").iterdir():
        (root / "videos" / path.name).symlink_to(path)
    return DataRoot(root)


@pytest.fixture
def cache_folder(tmp_path_factory: pytest.TempPathFactory, tiny_files: Path) -> Path:
    """Decoded clips, shared by all tests."""
    return tiny_files / "cache"


@pytest.fixture
def run(tiny_config: Config, tiny_root: DataRoot, cache_folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``train`` into a folder of the test's own, by name."""
    from sparsify.training import train

    def go(name: str = "run", config: Config | None = tiny_config, **options: Any) -> dict[str, Any]:
        options.setdefault("progress", False)
        return train(config, tiny_root, tmp_path / name, cache_folder=cache_folder, **options)

    return go


class Scattered(TorchDispatchMode):
    """The gradients that are scattered into a tensor: its shape, and whether PyTorch was told to keep to an order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[tuple[int, ...], bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "index_put" in func.__name__ and len(args) > 3 and args[3]:
            self.found.append((tuple(args[0].shape), torch.are_deterministic_algorithms_enabled()))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def scattered() -> Scattered:
    """A mode to enter around a step."""
    return Scattered()


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def _silent_model() -> Iterator[None]:
    """Random initialisation is said aloud: not here."""
    logger = logging.getLogger("sparsify")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def questions(video: str, first_id: int, instrument: str, low: bool) -> list[dict[str, object]]:
    rows = (
        ("Visual", "Location", "What kind of musical instrument is it?", [], instrument),
        ("Audio", "Counting", "Is there a <Object> sound?", ["flute"], "yes" if low else "no"),
        ("Visual", "Counting", "Is there a <Object> in the entire video?", [instrument], "yes"),
    )
    return [
        {
            "video_id": video,
            "question_id": first_id + i,
            "type": json.dumps([modality, kind]),
            "question_content": text,
            "templ_values": json.dumps(values),
            "question_deleted": 0,
            "anser": answer,
        }
        for i, (modality, kind, text, values, answer) in enumerate(rows)
    ]


def write_clip(path: Path, colour: tuple[int, int, int], pitch: float) -> None:
    """One second of one colour and one tone."""
    import av

    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=FPS, width=SIZE, height=SIZE, pix_fmt="yuv420p")
        audio = file.add_stream("aac", rate=RATE, layout="mono")
        picture = np.full((SIZE, SIZE, 3), colour, np.uint8)
        for i in range(FPS):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            file.mux(video.encode(frame))
        file.mux(video.encode(None))
        tone = np.sin(2 * np.pi * pitch * np.arange(RATE) / RATE).astype(np.float32)
        sound = av.AudioFrame.from_ndarray(tone[None] / 2, format="fltp", layout="mono")
        sound.sample_rate, sound.pts = RATE, 0
        file.mux(audio.encode(sound))
        file.mux(audio.encode(None))
