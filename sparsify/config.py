"""The configuration: one frozen dataclass, two presets, saved as JSON in every checkpoint.

``Config.preset("demo")`` trains on a CPU in minutes with small instances of the same classes;
``Config.preset("paper")`` is the setting of Diao et al., ACL 2025 (arXiv 2506.01319); ``adaptive`` is ``paper`` with
Tukey's outlier fence for the key tokens.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from sparsify._config_ranges import check_ranges
from sparsify.errors import ConfigError

__all__ = [
    "AudioConfig",
    "ClipConfig",
    "Config",
    "FusionConfig",
    "MaskConfig",
    "MergeConfig",
    "PRESETS",
    "SelectConfig",
    "TextConfig",
    "TrainConfig",
    "VisionConfig",
]

CONFIG_VERSION = 1


@dataclass(frozen=True)
class ClipConfig:
    """How a video is sampled. Everything here decides the content of the cache."""

    frames: int = 10  # sampled at the middles of equal parts of the clip
    segments: int = 6  # audio segments, spread evenly over the clip
    segment_seconds: float = 10.0
    sample_rate: int = 48_000  # Hz
    fft: int = 1024  # samples per analysis window
    hop: int = 480  # samples between analysis windows
    f_min: float = 50.0  # Hz
    f_max: float = 14_000.0  # Hz


@dataclass(frozen=True)
class VisionConfig:
    """Swin-V2 over frames. ``weights`` (a timm name or a local path) overrides nothing: it must have this geometry."""

    weights: str | None = None
    image_size: int = 256  # pixels
    patch_size: int = 4  # pixels
    window_size: int = 8  # tokens
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    pretrained_windows: tuple[int, ...] = ()  # tokens, one a stage, where ``weights`` had other windows
    unit: int = 32  # pixels: side of a mask unit

    @property
    def units(self) -> int:
        """Mask units along one side of a frame."""
        return self.image_size // self.unit

    @property
    def out_dim(self) -> int:
        return self.embed_dim * 2 ** (len(self.depths) - 1)


@dataclass(frozen=True)
class AudioConfig:
    """HTS-AT (CLAP's audio encoder) over log-mel images of ``spec_size`` x ``spec_size``."""

    weights: str | None = None
    spec_size: int = 256
    mel_bins: int = 64
    patch_size: int = 4
    window_size: int = 8
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (4, 8, 16, 32)
    unit: int = 32  # mel bins x mel frames: side of a mask unit

    @property
    def units(self) -> int:
        """Mask units along one side of a mel image."""
        return self.spec_size // self.unit

    @property
    def mel_frames(self) -> int:
        """Mel frames of a segment after the resize: the image folds ``spec_size / mel_bins`` runs of ``spec_size``."""
        return self.spec_size * (self.spec_size // self.mel_bins)

    @property
    def out_dim(self) -> int:
        return self.embed_dim * 2 ** (len(self.depths) - 1)


@dataclass(frozen=True)
class TextConfig:
    """Question encoder: a transformer over words, or a Hugging Face encoder when ``weights`` names one."""

    weights: str | None = None
    dim: int = 256
    layers: int = 2
    heads: int = 4
    max_words: int = 64
    dropout: float = 0.1


@dataclass(frozen=True)
class MaskConfig:
    """Sparse masking (paper, section 3.2): which epochs train on a random part of the input."""

    keep: float = 0.5
    kind: str = "unit"  # unit: a share of each frame's and each segment's units; time: the same seconds of both
    stratified: bool = True  # the same number in every 2x2 units, where keep is 1/4, 1/2 or 3/4; else drawn freely
    epochs: tuple[int, int | None] = (0, 3)  # a Python slice: (0, 3) the first three, (0, -1) all but the last
    schedule: tuple[float, ...] = ()  # keep ratio of each epoch (the last one goes on); replaces keep and epochs
    eval: bool = False  # evaluate masked, too


@dataclass(frozen=True)
class MergeConfig:
    """Adaptive sparse merging (paper, section 3.3)."""

    enabled: bool = True
    fence: float = 0.0  # 0: upper quartile (the paper); 1.5: Tukey's outliers
    capacity: float | None = None  # key tokens kept at most, as a share of the tokens; None: a quarter
    heads: int = 4


@dataclass(frozen=True)
class FusionConfig:
    """Adapters between the encoders, the transformer over super-tokens, and the question's attention to them."""

    dim: int = 256
    heads: int = 4
    adapter_latents: int = 8
    adapter_dim: int = 64
    mixer_layers: int = 1  # transformer layers over a video's super-tokens, once a video
    layers: int = 2  # question layers: self-attention, attention to the super-tokens, MLP
    dropout: float = 0.1


@dataclass(frozen=True)
class SelectConfig:
    """Selection of samples (paper, section 3.4), anew in each epoch (InfoBatch, arXiv 2303.04947) and beforehand."""

    skip: float = 0.0  # share of the easy samples (loss at most the mean) that an epoch skips; 0: every epoch is whole
    unit: str = "video"  # what is skipped: a video with all of its questions, which is then not encoded; or a question
    until: float = 0.875  # share of the epochs that skip; the first, which knows no losses, and the rest are whole
    subset: str | None = None  # a file of `sparsify select`, or annotations: train on these questions alone
    filter_leaks: bool = False  # leave out questions of ``subset`` that are in an evaluated split, instead of refusing


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = 15
    videos: int = 16  # videos a step
    lr: float = 1e-4  # of everything new
    encoder_lr: float = 1e-4  # of the two encoders (lower when they are pretrained)
    weight_decay: float = 0.05
    muon: float = 0.0  # above 0: matrices follow Muon, at this multiple of their learning rate; 0: AdamW for all
    matching: float = 0.0  # weight of a second loss: which of a step's (and process's) videos is a question about?
    warmup: float = 0.05  # share of the run
    clip_norm: float = 1.0
    label_smoothing: float = 0.0
    precision: str = "auto"  # auto, fp32 or bf16
    seed: int = 0
    workers: int = 0  # data loading processes
    save_seconds: float = 900.0  # between two checkpoints within an epoch; there is one at its end in any case
    keep_last: int = 0  # checkpoints of ends of epochs that are kept beside last/ and best/
    inputs: str = "both"  # both; blind (no frames), deaf (no audio), textonly (neither): the controls


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. ``dense`` switches masking, merging and selection off: the baseline."""

    clip: ClipConfig = field(default_factory=ClipConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    text: TextConfig = field(default_factory=TextConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    dense: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)

    @staticmethod
    def preset(name: str) -> Config:
        """The preset called ``name``; ``ConfigError`` names the known ones."""
        if name not in PRESETS:
            raise ConfigError(f"--preset: no preset {name!r}; the presets are {', '.join(sorted(PRESETS))}")
        return PRESETS[name]

    def keep_at(self, epoch: int) -> float:
        """Share of the mask units that epoch ``epoch`` (0-based) trains on; 1.0: not masked."""
        if self.dense:
            return 1.0
        if self.mask.schedule:
            return self.mask.schedule[min(epoch, len(self.mask.schedule) - 1)]
        masked = range(self.train.epochs)[slice(*self.mask.epochs)]
        return self.mask.keep if epoch in masked else 1.0

    def units(self, keep: float) -> int:
        """Mask units of one video that are encoded at ``keep``, both modalities together."""
        images = ((self.clip.frames, self.vision.units**2), (self.clip.segments, self.audio.units**2))
        return sum(count * max(1, math.floor(keep * units + 0.5)) for count, units in images)

    def skip_at(self, epoch: int) -> float:
        """Share of the easy samples that epoch ``epoch`` (0-based) skips; 0.0: it is whole."""
        # The share as the decimal number it is written as: 0.29 of 100 epochs are 29, which binary floats make 28.
        pruned = math.floor(Fraction(str(self.select.until)) * self.train.epochs)
        return self.select.skip if 0 < epoch < pruned and not self.dense else 0.0

    def replace(self, **changes: Any) -> Config:
        """A copy with dotted keys changed: ``config.replace(**{"train.lr": 3e-4, "dense": True})``."""
        data = dataclasses.asdict(self)
        for key, value in changes.items():
            *parents, leaf = key.split(".")
            node: Any = data
            for parent in parents:
                node = node.get(parent) if isinstance(node, dict) else None
            if not isinstance(node, dict) or leaf not in node or isinstance(node[leaf], dict):
                near = difflib.get_close_matches(key, config_keys(), 3, 0.5)
                hint = f"; did you mean {' or '.join(near)}?" if near else ""
                raise ConfigError(f"config: no key {key!r}{hint} (`sparsify info --preset demo` lists the keys)")
            node[leaf] = value
        return Config.from_dict(data | {"version": CONFIG_VERSION})

    def with_options(self, options: list[str]) -> Config:
        """A copy changed by ``KEY=VALUE`` strings; values are JSON, else taken as text."""
        changes: dict[str, Any] = {}
        for option in options:
            key, equals, text = option.partition("=")
            if not equals:
                raise ConfigError(f"--set: expected KEY=VALUE, got {option!r}")
            try:
                changes[key.strip()] = json.loads(text)
            except json.JSONDecodeError:
                changes[key.strip()] = text
        return self.replace(**changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"version": CONFIG_VERSION}

    @staticmethod
    def from_dict(data: dict[str, Any], source: str = "config") -> Config:
        """The inverse of ``to_dict``. Unknown keys, wrong types and another version are refused by name."""
        if not isinstance(data, dict):
            raise ConfigError(f"{source}: expected an object, got {type(data).__name__}")
        version = data.get("version")
        if version != CONFIG_VERSION:
            raise ConfigError(f"{source}: version {version!r}; this release reads version {CONFIG_VERSION}")
        return _build(Config, {k: v for k, v in data.items() if k != "version"}, source)


def config_keys() -> list[str]:
    """Every dotted key of the configuration."""
    keys = []
    for f in dataclasses.fields(Config):
        section = typing.get_type_hints(Config)[f.name]
        if dataclasses.is_dataclass(section):
            keys += [f"{f.name}.{g.name}" for g in dataclasses.fields(section)]
        else:
            keys.append(f.name)
    return keys


def _build(cls: type, data: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; expected {', '.join(hints)}")
    values = {}
    for name, value in data.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise ConfigError(f"{where}.{name}: expected an object, got {value!r}")
            values[name] = _build(typing.cast(type, hint), value, f"{where}.{name}")
        else:
            values[name] = _coerce(hint, value, f"{where}.{name}")
    return cls(**values)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the annotated type ``hint``; JSON has no tuples and writes whole floats as integers."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _coerce(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_coerce(args[0], v, where) for v in value)
        if len(value) != len(args):
            raise ConfigError(f"{where}: expected {len(args)} values, got {value!r}")
        return tuple(_coerce(a, v, where) for a, v in zip(args, value, strict=True))
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if hint is not float and isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")


_PAPER = Config(select=SelectConfig(skip=0.5, unit="question"), train=TrainConfig(encoder_lr=1e-5))
_DEMO = Config(
    clip=ClipConfig(frames=4, segments=1, segment_seconds=4.0, sample_rate=24_000, fft=512, hop=384, f_max=11_000.0),
    vision=VisionConfig(image_size=128, patch_size=8, window_size=4, embed_dim=32, depths=(1, 2, 1), heads=(2, 4, 8)),
    audio=AudioConfig(spec_size=128, patch_size=8, window_size=4, embed_dim=32, depths=(1, 2, 1), heads=(2, 4, 8)),
    text=TextConfig(dim=128, layers=1, dropout=0.0),
    mask=MaskConfig(epochs=(0, -1)),
    fusion=FusionConfig(dim=128, adapter_latents=4, adapter_dim=32, layers=1, dropout=0.0),
    train=TrainConfig(epochs=7, videos=24, lr=1e-3, encoder_lr=1e-3, muon=3.0, matching=1.0, precision="fp32"),
)

PRESETS: dict[str, Config] = {
    "demo": _DEMO,
    "paper": _PAPER,
    "adaptive": dataclasses.replace(_PAPER, merge=MergeConfig(fence=1.5, capacity=0.125)),
}
