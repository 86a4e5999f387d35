"""A voice that speaks no words: pulses of the glottis through the formants of changing vowels, with hissed
consonants between them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparsify.synth.scene import Interval

__all__ = ["babble"]

# Formants F1, F2, F3 in Hz of a, e, i, o, u.
_VOWELS = np.array([[800, 1200, 2500], [530, 1850, 2500], [300, 2250, 3000], [500, 900, 2450], [330, 800, 2300]], float)
_BANDWIDTHS = np.array([90.0, 110.0, 160.0])
_LEVELS = np.array([1.0, 0.6, 0.3])
_FFT = 1024
_HOP = 256


def babble(
    sounding: tuple[Interval, ...], rate: float, samples: int, sample_rate: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Speech-like sound, ``rate`` syllables a second, in the given intervals: float32 ``[samples]`` at any level."""
    wave = np.zeros(samples, np.float32)
    pitch = float(rng.uniform(105, 210))  # Hz: a man's or a woman's
    stretch = 0.85 + 0.2 * (pitch - 105) / 105  # the shorter throat has the higher formants
    for start, end in sounding:
        a, b = round(start * sample_rate), min(samples, round(end * sample_rate))
        wave[a:b] = _utterance(b - a, rate, pitch, stretch, sample_rate, rng)
    return wave


def _utterance(
    n: int, rate: float, pitch: float, stretch: float, sample_rate: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    t = np.arange(n) / sample_rate
    syllables = int(n / sample_rate * rate) + 2
    # Pitch falls over the sentence and moves with every syllable.
    bends = np.interp(t * rate, np.arange(syllables), rng.uniform(0.85, 1.2, syllables))
    f0 = pitch * bends * (1.1 - 0.2 * t / max(t[-1], 1e-3))
    phase = np.cumsum(f0 / sample_rate)
    pulses = (np.diff(np.floor(phase), prepend=0.0) > 0).astype(np.float32)
    breath = rng.standard_normal(n).astype(np.float32) * 0.02
    inside = (t * rate) % 1.0
    voiced = np.clip(np.minimum((inside - 0.18) / 0.1, (0.98 - inside) / 0.1), 0, 1).astype(np.float32)
    hiss = np.where(inside < 0.16, 0.012 * (rng.random(syllables) < 0.6)[(t * rate).astype(int)], 0.0)
    noise = rng.standard_normal(n).astype(np.float32)
    consonants = np.diff(noise, prepend=noise[:1]) * hiss.astype(np.float32)
    formants = _VOWELS[rng.integers(len(_VOWELS), size=syllables)] * stretch
    return _filter((pulses + breath) * voiced, formants, rate, sample_rate) + consonants.astype(np.float32)


def _filter(
    source: NDArray[np.float32], formants: NDArray[np.float64], rate: float, sample_rate: int
) -> NDArray[np.float32]:
    """Overlap-add: every frame's spectrum times the resonances of its syllable's vowel."""
    n = len(source)
    frames = n // _HOP + 4
    padded = np.zeros((frames + 4) * _HOP, np.float32)
    padded[_FFT // 2 : _FFT // 2 + n] = source
    window = np.hanning(_FFT).astype(np.float32)
    blocks = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[::_HOP][:frames] * window  # [frames, fft]
    at = np.arange(len(blocks)) * _HOP / sample_rate * rate
    vowel = np.stack([np.interp(at, np.arange(len(formants)), formants[:, k]) for k in range(3)], axis=1)  # [frames, 3]
    f = np.fft.rfftfreq(_FFT, 1 / sample_rate)
    gain = (_LEVELS / (1 + ((f[None, :, None] - vowel[:, None, :]) / _BANDWIDTHS) ** 2)).sum(axis=2)  # [frames, bins]
    shaped = np.fft.irfft(np.fft.rfft(blocks, axis=1) * gain, _FFT, axis=1)
    out = np.zeros(len(padded) + _FFT, np.float32)
    for i, block in enumerate(shaped):
        out[i * _HOP : i * _HOP + _FFT] += block
    return out[_FFT // 2 : _FFT // 2 + n]
