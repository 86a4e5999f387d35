"""How each of the 22 instruments sounds: its General MIDI program, register and way of playing.

Chinese and folk instruments that General MIDI lacks take its nearest program. Registers are the instruments' own,
narrowed so that two that share a timbre do not share a register.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["INSTRUMENT_SOUNDS", "InstrumentSound"]


@dataclass(frozen=True, slots=True)
class InstrumentSound:
    """``low`` to ``high`` are MIDI keys of the melody; every note adds ``chord`` (semitones above it,
    ``spread`` s apart).
    """

    program: int
    low: int
    high: int
    chord: tuple[int, ...] = (0,)
    spread: float = 0.0
    length: float = 0.92  # share of a note's time that the key is down
    drone: tuple[int, ...] = ()  # keys held as long as the instrument sounds
    glide: float = 0.0  # semitones that a note starts below (above, if negative) its pitch
    vibrato: float = 0.0  # semitones
    percussion: tuple[
        tuple[int, ...], ...
    ] = ()  # General MIDI drum keys hit together, in turn; replaces program and melody


INSTRUMENT_SOUNDS: dict[str, InstrumentSound] = {
    "accordion": InstrumentSound(21, 57, 69, chord=(0, 4, 7, 12), length=0.96),
    "acoustic_guitar": InstrumentSound(25, 45, 57, chord=(0, 7, 12), spread=0.03),
    "bagpipe": InstrumentSound(109, 67, 79, length=1.0, drone=(45, 57)),
    "banjo": InstrumentSound(105, 62, 74, chord=(0, 12), spread=0.05, length=0.6),
    "bassoon": InstrumentSound(70, 38, 50),
    "cello": InstrumentSound(42, 40, 54, length=0.98, vibrato=0.15),
    "clarinet": InstrumentSound(71, 62, 74),
    "congas": InstrumentSound(0, 0, 0, percussion=((63,), (64,), (62,))),
    "drum": InstrumentSound(0, 0, 0, percussion=((36, 42), (38, 46))),
    "electric_bass": InstrumentSound(33, 28, 40),
    "erhu": InstrumentSound(110, 67, 79, glide=2.0, vibrato=0.4, length=0.98),
    "flute": InstrumentSound(73, 79, 93),
    "guzheng": InstrumentSound(107, 55, 74, chord=(0, 3, 5, 8, 12), spread=0.045),
    "piano": InstrumentSound(0, 52, 66, chord=(-19, -12, 0, 4)),
    "pipa": InstrumentSound(106, 67, 81, length=0.5),
    "saxophone": InstrumentSound(66, 50, 62),
    "suona": InstrumentSound(111, 74, 86, glide=-2.0, length=0.98),
    "trumpet": InstrumentSound(56, 64, 76),
    "tuba": InstrumentSound(58, 29, 41),
    "ukulele": InstrumentSound(24, 67, 76, chord=(0, 4, 7, 12), spread=0.012, length=0.5),
    "violin": InstrumentSound(40, 76, 90, vibrato=0.25, length=0.98),
    "xylophone": InstrumentSound(13, 84, 98),
}
