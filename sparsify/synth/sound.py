"""Render the sound of a scene: instruments through a General MIDI sound font, a voiceover from formants, at the
scene's levels and times.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import UsageError
from sparsify.synth.babble import babble
from sparsify.synth.instruments import INSTRUMENT_SOUNDS, InstrumentSound
from sparsify.synth.scene import Interval, Scene, Voice, duration

__all__ = ["SAMPLE_RATE", "check_sound_font", "loudness", "render_sound", "render_voice"]

SAMPLE_RATE = 24_000  # Hz
REFERENCE = -21.0  # dB below full scale of a voice at level 0
NOISE = -62.0  # dB below full scale of the room
PEAK = 0.97
FADE = 0.04  # s in which a voice dies away at the end of an interval
SCALE = (0, 2, 4, 7, 9)  # semitones: any two voices on it fit together
STEP = 0.03  # s between two pitch bends
VELOCITY = 100

Event = tuple[float, int, str, int]  # s, order at equal times, what, key or bend

_MISSING = "synth: {} is missing; install it with: pip install {}"


def check_sound_font() -> Path:
    """Path of the sound font; ``UsageError`` says what to install when it or its player is missing."""
    if importlib.util.find_spec("tinysoundfont") is None:
        raise UsageError(_MISSING.format("tinysoundfont, which plays the sound font,", "--no-deps tinysoundfont"))
    spec = importlib.util.find_spec("pretty_midi")  # found, never imported: only its sound font is needed
    path = Path(spec.origin).parent / "TimGM6mb.sf2" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UsageError(_MISSING.format("the sound font TimGM6mb.sf2 of pretty_midi", "pretty_midi"))
    return path


@functools.cache
def _synth() -> tuple[Any, int]:
    path = check_sound_font()
    import tinysoundfont

    synth = tinysoundfont.Synth(gain=-6, samplerate=SAMPLE_RATE)
    return synth, synth.sfload(str(path))


def render_sound(scene: Scene) -> NDArray[np.float32]:
    """The mix, float32 ``[seconds * SAMPLE_RATE]`` in [-1, 1]; deterministic in the scene."""
    samples = round(scene.seconds * SAMPLE_RATE)
    rng = np.random.default_rng(scene.seed)
    mix = _room(samples, rng)
    voices = list(scene.heard)
    if scene.voiceover is not None:
        voices.append(scene.voiceover)
    for voice in voices:
        mix += render_voice(voice, samples, rng)
    return mix * np.float32(min(1.0, PEAK / float(np.abs(mix).max())))


def render_voice(voice: Voice, samples: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """One voice alone at its level, silent outside its intervals: float32 ``[samples]``."""
    if voice.instrument in INSTRUMENT_SOUNDS:
        wave = _play(voice, samples, rng)
    else:
        wave = babble(voice.sounding, voice.rate, samples, SAMPLE_RATE, rng)
    wave *= _gate(voice.sounding, samples)
    gain = 10 ** ((REFERENCE + voice.level - loudness(wave, voice.sounding)) / 20)
    return wave * np.float32(gain)


def loudness(wave: NDArray[np.float32], sounding: tuple[Interval, ...]) -> float:
    """K-weighted level (ITU-R BS.1770) in dB below full scale of a wave that is silent outside ``sounding``."""
    spectrum = np.fft.rfft(wave, n=_fast_length(len(wave)))
    power = float(np.dot(spectrum.real**2 + spectrum.imag**2, _k_weights(len(spectrum)))) * 2 / _fast_length(len(wave))
    return 10 * np.log10(max(power, 1e-12) / (duration(sounding) * SAMPLE_RATE))


@functools.cache
def _fast_length(n: int) -> int:
    """The least length >= n with no prime factor above 5."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


@functools.cache
def _k_weights(bins: int) -> NDArray[np.float32]:
    """Squared gain of BS.1770's two filters: a high pass at 38 Hz (Q 0.5) and a shelf of +4 dB above 1682 Hz (Q
    0.71).
    """
    s = 1j * np.linspace(0, SAMPLE_RATE / 2, bins)
    high_pass = s**2 / (s**2 + s * 38.1 / 0.5003 + 38.1**2)
    top = 10 ** (4.0 / 20)
    f, q = 1681.97, 0.7072
    shelf = (top * s**2 + np.sqrt(top) * s * f / q + f**2) / (s**2 + s * f / q + f**2)
    return (np.abs(high_pass * shelf) ** 2).astype(np.float32)


def _gate(sounding: tuple[Interval, ...], samples: int) -> NDArray[np.float32]:
    gate = np.zeros(samples, np.float32)
    fade = round(FADE * SAMPLE_RATE)
    for start, end in sounding:
        a, b = round(start * SAMPLE_RATE), min(samples, round(end * SAMPLE_RATE))
        gate[a:b] = 1
        gate[max(a, b - fade) : b] = np.linspace(1, 0, b - max(a, b - fade), dtype=np.float32)
    return gate


@functools.cache
def _noise(length: int) -> NDArray[np.float32]:
    """Pink noise at ``NOISE`` dB."""
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(length).astype(np.float32))
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 20))
    noise = np.fft.irfft(spectrum, length)
    return (noise * 10 ** (NOISE / 20) / noise.std()).astype(np.float32)


def _room(samples: int, rng: np.random.Generator) -> NDArray[np.float32]:
    return np.roll(_noise(samples), int(rng.integers(samples)))


def _play(voice: Voice, samples: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """The sound font's rendering of a random melody, before levels: float32 ``[samples]``."""
    sound = INSTRUMENT_SOUNDS[voice.instrument]
    synth, font = _synth()
    synth.sounds_off(0)
    synth.program_select(
        0, font, 128 if sound.percussion else 0, 0 if sound.percussion else sound.program, bool(sound.percussion)
    )
    synth.pitchbend(0, 8192)
    wave = np.zeros((samples, 2), np.float32)
    at = 0
    for seconds, _, what, value in sorted(_events(voice, sound, rng)):
        until = min(samples, round(seconds * SAMPLE_RATE))
        if until > at:
            synth.generate(until - at, wave[at:until].data.cast("B"))
            at = until
        if what == "on":
            synth.noteon(0, value, VELOCITY)
        elif what == "off":
            synth.noteoff(0, value)
        else:
            synth.pitchbend(0, value)
    if at < samples:
        synth.generate(samples - at, wave[at:].data.cast("B"))
    synth.sounds_off(0)
    return (wave[:, 0] + wave[:, 1]) * np.float32(0.5)


def _events(voice: Voice, sound: InstrumentSound, rng: np.random.Generator) -> list[Event]:
    """Notes at ``voice.rate``, the first exactly at each onset, as timed events."""
    events: list[Event] = []
    period = 1 / voice.rate
    keys = [k for k in range(sound.low, sound.high + 1) if k % 12 in SCALE]
    place = int(rng.integers(len(keys))) if keys else 0
    hit = 0
    for start, end in voice.sounding:
        for key in sound.drone:
            events += [(start, 1, "on", key), (end, 0, "off", key)]
        count = max(1, int((end - start) / period + 0.3))
        for i in range(count):
            on = start + i * period
            off = min(on + period * sound.length, end) if i < count - 1 else end
            if sound.percussion:
                chord = sound.percussion[hit % len(sound.percussion)]
                hit += 1
            else:
                place = _next_place(place, len(keys), rng)
                # A further voice of the instrument plays a fourth up, then down: never in unison with the first.
                base = keys[place] + (0, 5, -5, 9, -9)[voice.part % 5]
                chord = tuple(base + interval for interval in sound.chord)
            for j, key in enumerate(chord):
                events += [
                    (on + j * sound.spread, 1, "on", key),
                    (max(off, on + j * sound.spread + 0.02), 0, "off", key),
                ]
            events += _bends(sound, on, off)
    return events


def _next_place(place: int, count: int, rng: np.random.Generator) -> int:
    """A neighbouring note of the scale, turning round at the ends of the register."""
    step = int(rng.choice((-2, -1, 1, 2)))
    return place + step if 0 <= place + step < count else max(0, min(count - 1, place - step))


def _bends(sound: InstrumentSound, on: float, off: float) -> list[Event]:
    if not sound.glide and not sound.vibrato:
        return []
    times = np.arange(on, off, STEP)
    since = times - on
    glide = -sound.glide * np.clip(1 - since / 0.12, 0, 1)
    vibrato = sound.vibrato * np.sin(2 * np.pi * 5.5 * since) * np.clip((since - 0.1) / 0.1, 0, 1)
    bends = np.clip(8192 + (glide + vibrato) * 4096, 0, 16383).astype(int)  # the wheel reaches two semitones
    return [(float(t), 0, "bend", int(b)) for t, b in zip(times, bends, strict=True)]
