from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from sparsify.config import Config
from sparsify.data import _pictures
from sparsify.data.media import frame_times, probe, read_audio, read_clip, read_frames, segment_starts
from sparsify.data.units import from_units


def numbers(media: SimpleNamespace, path: Path, times: list[float] | int, size: int = 64) -> list[int]:
    return [media.number_of(picture) for picture in read_frames(path, times, size)[0]]


def dominant(wave: np.ndarray, rate: int) -> float:
    """Hz of the strongest component."""
    return float(np.abs(np.fft.rfft(wave * np.hanning(len(wave)))).argmax() * rate / len(wave))


def test_times_and_starts() -> None:
    assert frame_times(60.0, 4) == [7.5, 22.5, 37.5, 52.5]
    assert segment_starts(60.0, 6, 10.0) == [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]
    assert segment_starts(12.0, 3, 10.0) == [0.0, 1.0, 2.0]
    assert segment_starts(4.0, 3, 10.0) == [0.0, 0.0, 0.0]  # shorter than a segment
    assert segment_starts(30.0, 1, 10.0) == [10.0]  # one: the middle


def test_probe(plain: Path) -> None:
    info = probe(plain)
    assert info[1:] == (128, 96, 24.0, 0, True)
    assert info.duration == pytest.approx(4.0, abs=0.06)


def test_every_frame_in_one_pass(plain: Path, media: SimpleNamespace) -> None:
    times = [(n + 0.5) / 24 for n in range(96)]
    assert numbers(media, plain, times) == list(range(96))


@pytest.mark.parametrize("open_gop", [0, 1])
def test_single_frames_by_seeking(open_gop: int, tmp_path: Path, media: SimpleNamespace) -> None:
    options = {"x264-params": f"keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0:open-gop={open_gop}"}
    path = media.write(tmp_path / "gop.mp4", frames=72, fps=24, options=options)
    for n in range(0, 72, 5):
        assert numbers(media, path, [(n + 0.5) / 24]) == [n]
    assert numbers(media, path, [60.5 / 24, 3.5 / 24, 60.5 / 24, 33.5 / 24]) == [60, 3, 60, 33]  # any order, twice


def test_skipping_frames_changes_no_pixel(plain: Path) -> None:
    with av.open(str(plain)) as container:
        whole = [f.reformat(48, 48, "rgb24", interpolation="AREA").to_ndarray() for f in container.decode(video=0)]
    for n in (0, 7, 17, 38, 62, 95):
        assert np.array_equal(read_frames(plain, [(n + 0.5) / 24], 48)[0][0].numpy(), whole[n])


def test_few_frames_decode_little(tmp_path: Path, media: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"x264-params": "keyint=30:min-keyint=30:scenecut=0"}
    path = media.write(tmp_path / "long.mp4", frames=240, fps=24, options=options, audio=None)
    fed = []
    decode = _pictures._decode
    monkeypatch.setattr(_pictures, "_decode", lambda video, packet: fed.append(packet) or decode(video, packet))
    assert numbers(media, path, [31.5 / 24, 211.5 / 24]) == [31, 211]
    assert len(fed) < 20
    fed.clear()
    numbers(media, path, [(n + 0.5) / 24 for n in range(0, 240, 4)])
    assert len(fed) <= 241  # once through, and the flush


def test_a_count_takes_the_middles(plain: Path, media: SimpleNamespace) -> None:
    pictures, times = read_frames(plain, 4, 64)
    assert pictures.shape == (4, 64, 64, 3)
    assert pictures.dtype == torch.uint8
    assert times.tolist() == pytest.approx([0.5, 1.5, 2.5, 3.5], abs=0.05)
    assert [media.number_of(p) for p in pictures] == [int(t * 24 + 1e-3) for t in times.tolist()]


def test_times_outside_the_clip_show_its_ends(plain: Path, media: SimpleNamespace) -> None:
    assert numbers(media, plain, [-5.0, 0.0, 100.0]) == [0, 0, 95]


def test_a_varying_frame_rate_goes_by_timestamps(tmp_path: Path, media: SimpleNamespace) -> None:
    shown = [0.0, 0.04, 0.08, 1.0, 1.01, 1.5, 3.0]
    path = media.write(tmp_path / "vfr.mp4", frames=7, times=shown, fps=100, audio=None)
    times = [0.0, 0.039, 0.04, 0.5, 0.999, 1.0, 1.005, 1.2, 2.9, 3.0]
    assert numbers(media, path, times) == [0, 0, 1, 2, 2, 3, 3, 4, 5, 6]


@pytest.mark.parametrize(("degrees", "upright"), [(0, 0), (90, 1), (180, 2), (-90, 3)])
def test_rotation(degrees: int, upright: int, tmp_path: Path, media: SimpleNamespace) -> None:
    corners = np.zeros((96, 128, 3), np.uint8)  # red | green over blue | white
    corners[:48, :64, 0] = corners[:48, 64:, 1] = corners[48:, :64, 2] = 255
    corners[48:, 64:] = 255
    path = media.write(tmp_path / "turned.mp4", frames=[corners] * 4, fps=4, rotation=degrees)
    info = probe(path)
    assert info.rotation == degrees % 360
    assert (info.width, info.height) == ((96, 128) if upright % 2 else (128, 96))
    picture = read_frames(path, [0.5], 64)[0][0].numpy()
    expected = np.rot90(corners, upright)
    for row, column in ((1, 1), (1, 3), (3, 1), (3, 3)):  # the middles of the quarters
        got = picture[row * 16, column * 16].astype(int)
        height, width, _ = expected.shape
        assert np.abs(got - expected[row * height // 4, column * width // 4].astype(int)).max() < 60


@pytest.mark.parametrize(
    ("size", "codec", "pix_fmt", "suffix"),
    [
        ((321, 239), "libx264", "yuv444p", ".mp4"),
        ((321, 239), "mpeg4", "yuv420p", ".avi"),
        ((35, 177), "mjpeg", "yuvj422p", ".mov"),
        ((130, 98), "libx264", "yuv420p", ".mkv"),
    ],
)
def test_odd_sizes_and_other_codecs(
    size: tuple[int, int], codec: str, pix_fmt: str, suffix: str, tmp_path: Path, media: SimpleNamespace
) -> None:
    path = media.write(
        tmp_path / f"odd{suffix}", frames=20, fps=10, size=size, codec=codec, pix_fmt=pix_fmt, audio=None
    )
    assert probe(path)[1:3] == size
    assert numbers(media, path, [0.0, 0.55, 1.95], size=80) == [0, 5, 19]


@pytest.mark.slow
def test_long_and_fast(tmp_path: Path, media: SimpleNamespace) -> None:
    path = media.write(
        tmp_path / "minute.mp4", frames=3600, fps=60, size=(64, 48), options={"preset": "ultrafast"}, audio="mp3"
    )
    assert probe(path).duration == pytest.approx(60, abs=0.1)
    assert numbers(media, path, [3.01, 33.35, 59.99]) == [180, 2001 % 256, 3599 % 256]


def test_sound_is_the_mean_of_the_channels(tmp_path: Path, media: SimpleNamespace) -> None:
    path = media.write(tmp_path / "two.mp4", frames=16, fps=8, tones=(441.0, 1323.0))
    wave, has_audio = read_audio(path, 48_000)
    assert has_audio
    assert wave.dtype == np.float32
    assert len(wave) == pytest.approx(96_000, abs=3000)
    spectrum = np.abs(np.fft.rfft(wave[4800:52_800])) / 24_000  # 1 Hz a bin; amplitude
    assert spectrum[441] == pytest.approx(0.125, rel=0.05)  # half of 0.25: the other channel is silent there
    assert spectrum[1323] == pytest.approx(0.125, rel=0.05)


@pytest.mark.parametrize(
    ("codec", "suffix", "rate", "layout"),
    [("mp3", ".mp4", 44_100, "stereo"), ("pcm_s16le", ".mov", 8000, "mono"), ("aac", ".mkv", 48_000, "mono")],
)
def test_sound_of_other_codecs_rates_and_layouts(
    codec: str, suffix: str, rate: int, layout: str, tmp_path: Path, media: SimpleNamespace
) -> None:
    path = media.write(tmp_path / f"sound{suffix}", frames=16, fps=8, audio=codec, rate=rate, layout=layout)
    wave, has_audio = read_audio(path, 16_000)
    assert has_audio
    assert len(wave) == pytest.approx(32_000, abs=1600)
    assert dominant(wave[1600:30_000], 16_000) == pytest.approx(440, abs=1)
    assert np.abs(wave[4000:28_000]).max() == pytest.approx(0.25, rel=0.1)


def test_sound_that_starts_late_is_in_its_place(tmp_path: Path, media: SimpleNamespace) -> None:
    path = media.write(tmp_path / "late.mp4", frames=24, fps=8, audio_start=1.0, audio_seconds=2.0)
    wave, _ = read_audio(path, 16_000)
    assert np.abs(wave[:14_000]).max() < 0.02
    assert np.abs(wave[18_000:46_000]).max() == pytest.approx(0.25, rel=0.1)


def test_picture_that_starts_late_is_in_its_place(tmp_path: Path, media: SimpleNamespace) -> None:
    times = [1.0 + n / 8 for n in range(16)]
    path = media.write(tmp_path / "late.mp4", frames=16, times=times, audio_seconds=3.0)
    assert numbers(media, path, [0.1, 1.06, 1.9, 2.9]) == [0, 0, 7, 15]


def test_a_file_clock_that_does_not_start_at_zero(tmp_path: Path, media: SimpleNamespace) -> None:
    options = {"x264-params": "keyint=12"}
    path = media.write(
        tmp_path / "stream.ts", frames=48, fps=24, options=options, container_options={"output_ts_offset": "100"}
    )
    with av.open(str(path)) as container:
        assert container.start_time > 99_000_000
    assert numbers(media, path, [0.02, 0.52, 1.52]) == pytest.approx([0, 12, 36], abs=1)  # AAC's lead-in: 20 ms
    assert len(read_audio(path, 16_000)[0]) == pytest.approx(32_000, abs=1600)


def test_no_audio_stream_is_silence_and_said(tmp_path: Path, media: SimpleNamespace, tiny_config: Config) -> None:
    path = media.write(tmp_path / "mute.mp4", audio=None)
    assert not probe(path).has_audio
    wave, has_audio = read_audio(path, 16_000)
    assert (len(wave), has_audio) == (0, False)
    clip = read_clip(path, tiny_config)
    assert not clip.has_audio
    assert (clip.mel == -100).all()


@pytest.mark.parametrize("threads", [0, 1])
def test_a_clip(threads: int, plain: Path, media: SimpleNamespace) -> None:
    config = Config.preset("demo")
    clip = read_clip(plain, config, threads=threads)
    assert {name: (list(t.shape), t.dtype) for name, t in clip._asdict().items()} == {
        "frames": ([4, 16, 3072], torch.uint8),
        "mel": ([1, 16, 1024], torch.float16),
        "frame_time": ([4], torch.float32),
        "segment_time": ([1], torch.float32),
        "duration": ([], torch.float32),
        "has_audio": ([], torch.bool),
    }
    assert clip.has_audio
    assert clip.duration.item() == pytest.approx(4, abs=0.06)
    pictures = from_units(clip.frames, 32, (4, 4)).permute(0, 2, 3, 1)
    assert torch.equal(pictures, read_frames(plain, 4, 128)[0])
    assert [media.number_of(p) for p in pictures] == [int(t * 24 + 1e-3) for t in clip.frame_time.tolist()]
    assert torch.equal(clip.mel, read_clip(plain, config).mel)
    assert clip.mel.std() > 5


def test_segments_hear_their_own_part(tmp_path: Path, media: SimpleNamespace, tiny_config: Config) -> None:
    config = tiny_config.replace(**{"clip.segments": 3})
    path = media.write(tmp_path / "half.mp4", frames=32, fps=8, audio_start=2.0, audio_seconds=2.0)
    clip = read_clip(path, config)  # 4 s: segments at 0, 1.5 and 3 s
    assert clip.segment_time.tolist() == pytest.approx([0, 1.5, 3], abs=0.05)
    loudness = clip.mel.float().amax(dim=(1, 2))
    assert loudness[0] < -50
    assert loudness[1:].min() > 0


def test_shorter_than_a_segment_and_fewer_frames_than_asked(tmp_path: Path, media: SimpleNamespace) -> None:
    config = Config.preset("demo").replace(**{"clip.frames": 8, "clip.segments": 2})
    path = media.write(tmp_path / "short.mp4", frames=3, fps=6, audio_seconds=0.5)
    clip = read_clip(path, config)
    pictures = from_units(clip.frames, 32, (4, 4)).permute(0, 2, 3, 1)
    assert [media.number_of(p) for p in pictures] == sorted(media.number_of(p) for p in pictures)
    assert {media.number_of(p) for p in pictures} == {0, 1, 2}
    assert clip.segment_time.tolist() == [0, 0]
    image = from_units(clip.mel[0].float(), 32, (4, 4))[0]
    loudest = image.reshape(2, 64, 128).amax(dim=1)  # of each mel frame
    assert (loudest < -50).float().mean() < 0.15  # repeated whole as often as it fits: only the rest is silent


def test_what_is_not_wanted_is_not_decoded(plain: Path, tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_clip(plain, tiny_config)
    monkeypatch.setattr("sparsify.data._pictures.at_times", None)
    blind = read_clip(plain, tiny_config, frames=False)
    assert not blind.frames.any()
    assert blind.frames.shape == whole.frames.shape
    assert torch.equal(blind.mel, whole.mel)
    monkeypatch.undo()
    monkeypatch.setattr("sparsify.data._streams.Track.hear", None)
    deaf = read_clip(plain, tiny_config, audio=False)
    assert torch.equal(deaf.frames, whole.frames)
    assert (deaf.mel == -100).all()
    assert deaf.mel.shape == whole.mel.shape
    assert not deaf.has_audio


def test_a_name_that_looks_like_a_protocol(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "http:x%20é.mp4").write_bytes(plain.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert probe("http:x%20é.mp4").width == 128


def test_the_real_clip() -> None:
    root = os.environ.get("SPARSIFY_MUSIC_AVQA")
    if not root or not (path := Path(root) / "videos" / "00003491.mp4").exists():
        pytest.skip("SPARSIFY_MUSIC_AVQA does not name a folder with videos/00003491.mp4: no real video was decoded")
    info = probe(path)  # H.264 at 60 frames a second, MP3 in MP4
    assert info == (info.duration, 640, 360, 60.0, 0, True)
    clip = read_clip(path, Config.preset("paper"))
    assert clip.duration.item() == pytest.approx(60, abs=0.1)
    assert clip.has_audio
    assert len({f.float().mean().item() for f in clip.frames}) == 10
    assert clip.mel.float().std(dim=(1, 2)).min() > 5
