from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sparsify.config import Config
from sparsify.data.media import probe, read_audio, read_clip, read_frames
from sparsify.errors import MediaError, TruncatedMediaError


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory, media: SimpleNamespace) -> Path:
    """8 s of noise with its index at the front: cut off anywhere, it is still a video file."""
    generator = np.random.default_rng(0)
    frames = [generator.integers(0, 255, (96, 128, 3), np.uint8) for _ in range(64)]
    path = tmp_path_factory.mktemp("noisy") / "noisy.mp4"
    return media.write(
        path, frames=frames, fps=8, container_options={"movflags": "faststart"}, options={"x264-params": "keyint=8"}
    )


def cut(source: Path, target: Path, share: float) -> Path:
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def say_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """FFmpeg's own complaints stay inside."""
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("read", [probe, lambda p: read_frames(p, 2, 32), lambda p: read_audio(p, 16_000)])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.mp4", "cannot read the video: No such file or directory"),
        ("folder.mp4", "is a folder; expected a video file"),
        ("empty.mp4", r"the file is empty \(0 bytes\); expected a video"),
        ("text.mp4", "not a readable video file"),
        ("bytes.mp4", "not a readable video file"),
    ],
)
def test_no_video_at_all(
    name: str, reason: str, read: object, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("How many instruments are sounding in the video?\n" * 40)
    (tmp_path / "bytes.mp4").write_bytes(np.random.default_rng(0).bytes(100_000))
    with pytest.raises(MediaError, match=f"{name}: {reason}"):
        read(tmp_path / name)
    say_nothing(capfd)


def test_only_sound(tmp_path: Path, media: SimpleNamespace, tiny_config: Config) -> None:
    path = media.write(tmp_path / "song.mp4", codec=None, audio_seconds=2.0)
    for read in (probe, lambda p: read_frames(p, 1, 32), lambda p: read_clip(p, tiny_config)):
        with pytest.raises(MediaError, match=r"song.mp4: no video stream: the file holds only sound; expected a video"):
            read(path)
    assert len(read_audio(path, 16_000)[0]) == pytest.approx(32_000, abs=1600)


@pytest.mark.parametrize(("share", "said"), [(0.2, 2), (0.5, 4), (0.8, 6)])
def test_truncated_says_how_much_can_be_read(
    share: float, said: int, noisy: Path, tmp_path: Path, tiny_config: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    path = cut(noisy, tmp_path / "cut.mp4", share)
    with pytest.raises(TruncatedMediaError, match=r"cut.mp4: truncated: .* of 8.0 s of the .* at least 90%") as caught:
        read_clip(path, tiny_config)
    readable = float(str(caught.value).split("truncated: ")[1].split(" of ")[0])
    assert readable == pytest.approx(share * 8, abs=0.8)
    with pytest.raises(TruncatedMediaError):
        read_audio(path, 16_000)
    with pytest.raises(TruncatedMediaError):
        read_frames(path, [0.0], 32)
    clip = read_clip(path, tiny_config, partial=True)
    assert clip.duration.item() == pytest.approx(readable, abs=0.3)
    assert clip.frames.float().std() > 10
    assert clip.has_audio
    assert probe(path).duration == pytest.approx(8, abs=0.1)  # what the file says of itself
    say_nothing(capfd)


def test_almost_whole_is_accepted(noisy: Path, tmp_path: Path, tiny_config: Config) -> None:
    clip = read_clip(cut(noisy, tmp_path / "cut.mp4", 0.96), tiny_config)
    assert clip.duration.item() == pytest.approx(7.7, abs=0.3)  # the clip ends where it can no longer be read


def test_cut_off_before_its_index(plain: Path, tmp_path: Path) -> None:
    path = cut(plain, tmp_path / "cut.mp4", 0.7)
    with pytest.raises(
        MediaError, match=r"cut.mp4: not a readable video file \(an MP4 file without its index, the moov"
    ):
        probe(path)
    with pytest.raises(MediaError, match="moov"):
        read_frames(path, 1, 32, partial=True)


def test_bytes_that_never_arrived(noisy: Path, tmp_path: Path, tiny_config: Config) -> None:
    """A download into a file of the final size: the index promises everything, the rest is zeros."""
    data = bytearray(noisy.read_bytes())
    data[len(data) // 3 :] = bytes(len(data) - len(data) // 3)
    (path := tmp_path / "hollow.mp4").write_bytes(data)
    config = tiny_config.replace(**{"clip.frames": 8})
    with pytest.raises(TruncatedMediaError, match=r"hollow.mp4: damaged: [23] of 8 sampled pictures can be decoded"):
        read_clip(path, config)
    clip = read_clip(path, config, partial=True)
    assert clip.frames.float().std(dim=(1, 2)).min() > 10  # the nearest picture stands in


def test_no_picture_can_be_decoded(noisy: Path, tmp_path: Path, tiny_config: Config) -> None:
    data = bytearray(noisy.read_bytes())
    start = data.index(b"mdat") + 4
    data[start:] = bytes(len(data) - start)
    (path := tmp_path / "zeros.mp4").write_bytes(data)
    for partial in (False, True):
        with pytest.raises(MediaError, match=r"zeros.mp4: no picture can be decoded; the file is damaged"):
            read_clip(path, tiny_config, partial=partial)
    with pytest.raises(MediaError, match="no picture can be decoded"):
        probe(path)


def test_sound_that_ends_early_is_no_truncation(tmp_path: Path, media: SimpleNamespace, tiny_config: Config) -> None:
    for name in ("short.mp4", "short.mkv"):
        path = media.write(tmp_path / name, frames=32, fps=8, audio_seconds=1.0)
        assert read_clip(path, tiny_config).duration.item() == pytest.approx(4, abs=0.1)
