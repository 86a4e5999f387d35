"""Log-mel images as CLAP's audio encoder takes them, without importing transformers.

``log_mel`` gives what transformers' ``ClapFeatureExtractor`` gives with ``truncation="rand_trunc"``,
``padding="repeatpad"`` (a Hann window, power, Slaney's mel filters, decibels over a floor of 1e-10: -100 dB is
silence). ``mel_image`` gives what ``ClapAudioEncoder.reshape_mel2img`` gives before the patch embedding: the frames are
resized to ``mel_frames`` and folded into a square.

**Orientation.** With ``f = spec_size / mel_bins`` the image holds ``f`` bands of ``mel_bins`` rows. Row ``r`` is mel
bin ``r % mel_bins`` (0 the lowest) of band ``r // mel_bins``; column ``c`` of band ``b`` is mel frame ``b * spec_size +
c``. Time thus runs left to right through a band and goes on in the band below; pitch rises downwards within a band.
``unit_times`` says when each unit (or token) sounds.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from sparsify.config import AudioConfig, ClipConfig

__all__ = ["SILENCE_DB", "log_mel", "mel_filters", "mel_image", "unit_times"]

_FLOOR = 1e-10  # power
SILENCE_DB = -100.0  # 10 * log10 of the floor


def log_mel(wave: Tensor, clip: ClipConfig, mel_bins: int) -> Tensor:
    """The log-mel spectrogram of one segment.

    ``10 log10 max(1e-10, F |STFT(wave)|^2)``, windows centred on multiples of ``hop`` with the ends mirrored. Computed
    in fp64: between a loud and a silent band lie more than the seven digits of fp32.

    Args:
        wave: [n] samples at ``clip.sample_rate``, n at most ``segment_seconds`` long (the rest is cut). A shorter one
            is repeated as often as it fits whole and then padded with zeros (CLAP's ``repeatpad``); an empty one is
            silence.
        clip: rates, window and band.
        mel_bins: bands.

    Returns:
        fp32 [frames, mel_bins] in dB, frames = samples // hop + 1, lowest band first.
    """
    # In numpy and without a matrix product, all in this thread: decoding goes on beside it, and threads of torch's or
    # of BLAS would spin on its cores.
    samples = round(clip.segment_seconds * clip.sample_rate)
    sound = wave[:samples].numpy().astype(np.float64)
    if 0 < len(sound) < samples:
        sound = np.tile(sound, samples // len(sound))
    sound = np.pad(sound, (0, samples - len(sound)))
    sound = np.pad(sound, clip.fft // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(sound, clip.fft)[:: clip.hop]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(clip.fft) / clip.fft)
    bands = _bands(clip.sample_rate, clip.fft, clip.f_min, clip.f_max, mel_bins)
    spectrum = np.fft.rfft(windows * hann)[:, : max(last for _, last, _ in bands)]  # [frames, bins]
    power = spectrum.real**2 + spectrum.imag**2
    mels = np.stack([np.einsum("fb,b->f", power[:, first:last], weights) for first, last, weights in bands], axis=1)
    return torch.from_numpy(10 * np.log10(np.maximum(mels, _FLOOR)).astype(np.float32))


def mel_image(decibels: Tensor, audio: AudioConfig) -> Tensor:
    """Log-mel frames resized to ``audio.mel_frames`` and folded into a square (see the module's orientation).

    Up to ``mel_frames`` frames are resized exactly as CLAP does (bicubic, corners aligned). CLAP refuses more; here
    they are resized the same way but antialiased.

    Args:
        decibels: [..., frames, mel_bins], floating.
        audio: geometry.

    Returns:
        [..., spec_size, spec_size] in the same dtype.
    """
    *lead, frames, bins = decibels.shape
    if bins != audio.mel_bins:
        raise ValueError(f"mel_image: expected {audio.mel_bins} mel bins, got shape {list(decibels.shape)}")
    x = decibels.reshape(-1, 1, frames, bins)
    if frames != audio.mel_frames:
        shrink = frames > audio.mel_frames
        x = torch.nn.functional.interpolate(
            x, (audio.mel_frames, bins), mode="bicubic", align_corners=True, antialias=shrink
        )
    bands = audio.spec_size // bins
    x = x.reshape(-1, bands, audio.spec_size, bins).transpose(2, 3)  # [.., band, bin, column]
    return x.reshape(*lead, audio.spec_size, audio.spec_size)


def unit_times(audio: AudioConfig, clip: ClipConfig, cell: int | None = None) -> Tensor:
    """When each square cell of a mel image sounds: the mean time of its pixels.

    Args:
        audio: geometry of the image.
        clip: duration of a segment and hop of its frames.
        cell: side of a cell in pixels; default the mask unit. ``patch_size * 2 ** (stages - 1)`` gives the last stage's
            tokens.

    Returns:
        fp32 [(spec_size / cell)^2] seconds from the start of the segment, row-major.
    """
    cell = audio.unit if cell is None else cell
    if cell < 1 or audio.spec_size % cell:
        raise ValueError(f"unit_times: cells of {cell} px do not tile a mel image of {audio.spec_size} px")
    frames = round(clip.segment_seconds * clip.sample_rate) // clip.hop + 1
    # Resizing with aligned corners puts image column 0 on mel frame 0 and the last column on the last one.
    step = (frames - 1) / (audio.mel_frames - 1) * clip.hop / clip.sample_rate
    row, column = torch.meshgrid(torch.arange(audio.spec_size), torch.arange(audio.spec_size), indexing="ij")
    seconds = (row // audio.mel_bins * audio.spec_size + column).double() * step
    n = audio.spec_size // cell
    return seconds.reshape(n, cell, n, cell).mean(dim=(1, 3)).flatten().float()


def mel_filters(sample_rate: int, fft: int, f_min: float, f_max: float, mel_bins: int) -> np.ndarray:
    """Slaney's triangular mel filters with unit area: fp64 [fft / 2 + 1, mel_bins].

    The scale (Slaney, Auditory Toolbox, 1998) is linear below 1 kHz, 3 mels each 200 Hz, and logarithmic above, 27 mels
    a factor of 6.4. Each filter rises from the centre of the one below and falls to the centre of the one above, scaled
    by 2 / width in Hz.
    """
    linear, log_step, knee = 3 / 200, 27 / math.log(6.4), 1000.0

    def to_mel(hertz: float) -> float:
        return hertz * linear if hertz < knee else knee * linear + log_step * math.log(hertz / knee)

    mels = np.linspace(to_mel(f_min), to_mel(f_max), mel_bins + 2)
    edges = np.where(mels < knee * linear, mels / linear, knee * np.exp((mels - knee * linear) / log_step))  # Hz
    bins = np.linspace(0, sample_rate // 2, fft // 2 + 1)[:, None]  # Hz
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clip(min=0)
    return triangles * (2 / (high - low))


@functools.lru_cache(maxsize=8)
def _bands(sample_rate: int, fft: int, f_min: float, f_max: float, mel_bins: int) -> list[tuple[int, int, np.ndarray]]:
    """``mel_filters`` without its zeros: for each band the bins [first, last) it takes, and their weights."""
    filters = mel_filters(sample_rate, fft, f_min, f_max, mel_bins)
    taken = [np.flatnonzero(column) for column in filters.T]
    spans = [(int(bins[0]), int(bins[-1]) + 1) if len(bins) else (0, 1) for bins in taken]
    return [(first, last, filters[first:last, m].copy()) for m, (first, last) in enumerate(spans)]
