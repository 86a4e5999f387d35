from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsify._torchvision import ensure_torchvision
from sparsify.config import AudioConfig, ClipConfig
from sparsify.data.mel import SILENCE_DB, log_mel, mel_filters, mel_image, unit_times

PAPER, DEMO = AudioConfig(), AudioConfig(spec_size=128)
TEN = ClipConfig()  # 10 s at 48 kHz
FOUR = ClipConfig(segment_seconds=4.0)
TWO = ClipConfig(segment_seconds=2.0, sample_rate=16_000, f_min=0.0, f_max=8000.0)


def waves() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(480_000, dtype=torch.float64) / 48_000
    return {
        "noise": 0.1 * torch.randn(480_000, generator=generator),
        "tone over a whisper": (
            0.9 * torch.sin(2 * math.pi * 440 * t) + 1e-5 * torch.randn(480_000, generator=generator)
        ).float(),
        "fading tone": (torch.sin(2 * math.pi * 1000 * t) * torch.exp(-3 * t)).float(),
        "short": 0.1 * torch.randn(150_001, generator=generator),
        "one sample": torch.tensor([0.5]),
        "silence": torch.zeros(480_000),
    }


@pytest.mark.parametrize("name", waves())
@pytest.mark.parametrize("clip", [TEN, FOUR, TWO])
def test_equals_the_feature_extractor(name: str, clip: ClipConfig) -> None:
    ensure_torchvision()
    from transformers import ClapFeatureExtractor

    extractor = ClapFeatureExtractor(
        feature_size=64,
        sampling_rate=clip.sample_rate,
        hop_length=clip.hop,
        max_length_s=int(clip.segment_seconds),
        fft_window_size=clip.fft,
        frequency_min=clip.f_min,
        frequency_max=clip.f_max,
        truncation="rand_trunc",
        padding="repeatpad",
    )
    wave = waves()[name][: round(clip.segment_seconds * clip.sample_rate)]
    theirs = extractor(wave.numpy(), sampling_rate=clip.sample_rate, return_tensors="pt")["input_features"][0, 0]
    ours = log_mel(wave, clip, 64)
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().max() < 1e-3  # dB


@pytest.mark.parametrize(
    ("rate", "fft", "f_min", "f_max", "bins"),
    [(48_000, 1024, 50.0, 14_000.0, 64), (48_000, 1024, 0.0, 24_000.0, 64), (16_000, 512, 20.0, 8000.0, 16)],
)
def test_filters_equal_transformers(rate: int, fft: int, f_min: float, f_max: float, bins: int) -> None:
    from transformers.audio_utils import mel_filter_bank

    theirs = mel_filter_bank(fft // 2 + 1, bins, f_min, f_max, rate, norm="slaney", mel_scale="slaney")
    assert np.abs(mel_filters(rate, fft, f_min, f_max, bins) - theirs).max() < 1e-15


def test_silence_and_nothing() -> None:
    clip = ClipConfig(segment_seconds=1.0)
    for wave in (torch.zeros(0), torch.zeros(7), torch.zeros(48_000)):
        decibels = log_mel(wave, clip, 64)
        assert decibels.shape == (101, 64)
        assert (decibels == SILENCE_DB).all()


def test_sound_beyond_the_segment_is_cut() -> None:
    clip, wave = ClipConfig(segment_seconds=1.0), torch.randn(96_000)
    assert torch.equal(log_mel(wave, clip, 64), log_mel(wave[:48_000], clip, 64))


@pytest.mark.parametrize(("audio", "frames"), [(PAPER, 1001), (PAPER, 1024), (DEMO, 251), (DEMO, 256), (DEMO, 100)])
def test_image_equals_the_encoder(audio: AudioConfig, frames: int) -> None:
    ensure_torchvision()
    from transformers.models.clap.modeling_clap import ClapAudioEncoder

    decibels = 20 * torch.randn(3, frames, audio.mel_bins) - 40
    encoder = SimpleNamespace(spec_size=audio.spec_size, freq_ratio=audio.spec_size // audio.mel_bins)
    theirs = ClapAudioEncoder.reshape_mel2img(encoder, decibels[:, None])[:, 0]
    ours = mel_image(decibels, audio)
    assert ours.shape == (3, audio.spec_size, audio.spec_size)
    assert torch.equal(ours, theirs)
    assert torch.equal(mel_image(decibels[1], audio), ours[1])


def test_orientation_by_a_literal() -> None:
    audio = AudioConfig(spec_size=4, mel_bins=2)  # two bands of two bins
    decibels = torch.tensor([[10 * t, 10 * t + 1] for t in range(8)]).float()  # tens: frame, ones: bin
    assert mel_image(decibels, audio).tolist() == [
        [0, 10, 20, 30],
        [1, 11, 21, 31],
        [40, 50, 60, 70],
        [41, 51, 61, 71],
    ]


def test_too_many_frames_are_averaged() -> None:
    flicker = torch.tensor([0.0, 100.0] * 256)[:, None].expand(512, 64)  # faster than 256 frames can show
    image = mel_image(flicker, DEMO)
    assert image.shape == (128, 128)
    inside = image.reshape(2, 64, 128)[:, 0].flatten()[4:-4]
    assert (inside - 50).abs().max() < 5
    ramp = torch.linspace(0, 1, 401)[:, None].expand(401, 64)
    along = mel_image(ramp, DEMO).reshape(2, 64, 128)[:, 7].flatten()
    assert (along[4:-4] - torch.linspace(0, 1, 256)[4:-4]).abs().max() < 2e-3


def test_image_refuses_other_bins() -> None:
    with pytest.raises(ValueError, match=r"mel_image: expected 64 mel bins, got shape \[1001, 32\]"):
        mel_image(torch.zeros(1001, 32), PAPER)


def test_times_by_a_literal() -> None:
    audio = AudioConfig(spec_size=8, mel_bins=4, unit=4)  # two bands of 8 frames
    clip = ClipConfig(segment_seconds=1.5, sample_rate=10, hop=1)  # 16 frames, 0.1 s apart: no resize
    assert unit_times(audio, clip).tolist() == pytest.approx([0.15, 0.55, 0.95, 1.35])
    assert unit_times(audio, clip, cell=2).tolist() == pytest.approx(
        [0.05, 0.25, 0.45, 0.65] * 2 + [0.85, 1.05, 1.25, 1.45] * 2
    )
    whole = unit_times(audio, clip, cell=8)  # both bands
    assert whole.tolist() == pytest.approx([0.75])
    assert whole.dtype == torch.float32
    with pytest.raises(ValueError, match="cells of 3 px do not tile a mel image of 8 px"):
        unit_times(audio, clip, cell=3)


@pytest.mark.parametrize(("audio", "clip"), [(PAPER, TEN), (DEMO, FOUR), (DEMO, dataclasses.replace(FOUR, hop=768))])
@pytest.mark.parametrize("share", [0.03, 0.3, 0.52, 0.77, 0.98])
def test_a_click_lights_the_units_of_its_time(audio: AudioConfig, clip: ClipConfig, share: float) -> None:
    at = share * clip.segment_seconds
    wave = torch.zeros(round(clip.segment_seconds * clip.sample_rate))
    wave[round(at * clip.sample_rate)] = 1.0
    image = mel_image(log_mel(wave, clip, audio.mel_bins), audio)
    cell = 8
    n = audio.spec_size // cell
    energy = image.reshape(n, cell, n, cell).amax(dim=(1, 3)).flatten()
    times = unit_times(audio, clip, cell)
    lit = times[energy > -50]
    width = clip.segment_seconds * cell / audio.mel_frames
    assert len(lit)
    assert (lit - at).abs().max() < width + clip.fft / clip.sample_rate
