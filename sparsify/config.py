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
from typing import Any

from sparsify.errors import ConfigError

__all__ = [
    "AudioConfig",
    "ClipConfig",
    "Config",
    "FusionConfig",
    "MaskConfig",
    "MergeConfig",
    "PRESETS",
    "TextConfig",
    "TrainConfig",
    "VisionConfig",
]

CONFIG_VERSION = 1
_INPUTS = ("both", "blind", "deaf", "textonly")


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
class TrainConfig:
    epochs: int = 15
    videos: int = 16  # videos a step
    lr: float = 1e-4  # of everything new
    encoder_lr: float = 1e-4  # of the two encoders (lower when they are pretrained)
    weight_decay: float = 0.05
    muon: float = 0.0  # above 0: matrices follow Muon, at this multiple of their learning rate; 0: AdamW for all
    matching: float = 0.0  # weight of a second loss: which of a step's videos is a question about?
    warmup: float = 0.05  # share of the run
    clip_norm: float = 1.0
    label_smoothing: float = 0.0
    precision: str = "auto"  # auto, fp32 or bf16
    seed: int = 0
    workers: int = 0  # data loading processes
    inputs: str = "both"  # both; blind (no frames), deaf (no audio), textonly (neither): the controls


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. ``dense`` switches masking and merging off: the baseline."""

    clip: ClipConfig = field(default_factory=ClipConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    text: TextConfig = field(default_factory=TextConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    dense: bool = False

    def __post_init__(self) -> None:
        _validate(self)

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


def _require(ok: bool, key: str, expected: str, value: object) -> None:
    if not ok:
        raise ConfigError(f"config.{key}: expected {expected}, got {value!r}")


# Everything that counts something of which there must be at least one.
_AT_LEAST_ONE = {
    "clip": ("frames", "segments", "sample_rate", "fft", "hop"),
    "vision": ("image_size", "patch_size", "window_size", "embed_dim", "depths", "heads", "unit"),
    "audio": ("spec_size", "mel_bins", "patch_size", "window_size", "embed_dim", "depths", "heads", "unit"),
    "text": ("dim", "layers", "heads", "max_words"),
    "merge": ("heads",),
    "fusion": ("dim", "heads", "adapter_latents", "adapter_dim", "layers"),
    "train": ("epochs", "videos"),
}
_NOT_NEGATIVE = {
    "merge": ("fence",),
    "fusion": ("mixer_layers",),
    "train": ("lr", "encoder_lr", "weight_decay", "muon", "matching", "clip_norm", "seed", "workers"),
}
_BELOW_ONE = {"text": ("dropout",), "fusion": ("dropout",), "train": ("warmup", "label_smoothing")}


def _validate(config: Config) -> None:
    """``ConfigError`` for the first value outside its range, or that does not fit another."""
    for section, keys in _AT_LEAST_ONE.items():
        for key in keys:
            value = getattr(getattr(config, section), key)
            least = min(value, default=0) if isinstance(value, tuple) else value
            _require(least >= 1, f"{section}.{key}", "at least 1", value)
    for section, keys in _NOT_NEGATIVE.items():
        for key in keys:
            value = getattr(getattr(config, section), key)
            _require(value >= 0, f"{section}.{key}", "at least 0", value)
    for section, keys in _BELOW_ONE.items():
        for key in keys:
            value = getattr(getattr(config, section), key)
            _require(0 <= value < 1, f"{section}.{key}", "a share in [0, 1)", value)
    _validate_data(config)
    _validate_encoder("vision", config.vision, config.vision.image_size)
    _validate_encoder("audio", config.audio, config.audio.spec_size)
    _validate_model(config)
    m, t = config.mask, config.train
    _require(0 < m.keep <= 1, "mask.keep", "a share in (0, 1]", m.keep)
    _require(all(0 < k <= 1 for k in m.schedule), "mask.schedule", "shares in (0, 1]", m.schedule)
    _require(m.kind in ("unit", "time"), "mask.kind", "unit or time", m.kind)
    if m.kind == "time":
        a = config.audio
        _require(a.mel_bins % a.unit == 0, "audio.unit", f"with mask.kind time a divisor of {a.mel_bins} bins", a.unit)
    _require(t.precision in ("auto", "fp32", "bf16"), "train.precision", "auto, fp32 or bf16", t.precision)
    _require(t.inputs in _INPUTS, "train.inputs", "both, blind, deaf or textonly", t.inputs)
    _require(t.seed < 2**63, "train.seed", "less than 2^63", t.seed)


def _validate_data(config: Config) -> None:
    c, a = config.clip, config.audio
    _require(c.segment_seconds > 0, "clip.segment_seconds", "a positive number of seconds", c.segment_seconds)
    _require(0 <= c.f_min < c.f_max, "clip.f_min", f"at least 0 and below clip.f_max = {c.f_max}", c.f_min)
    _require(a.spec_size % a.mel_bins == 0, "audio.spec_size", f"a multiple of mel_bins = {a.mel_bins}", a.spec_size)


def _validate_encoder(name: str, encoder: VisionConfig | AudioConfig, size: int) -> None:
    stages = len(encoder.depths)
    window = encoder.patch_size * encoder.window_size
    last = encoder.patch_size * 2 ** (stages - 1)
    _require(len(encoder.heads) == stages, f"{name}.heads", f"one number a stage ({stages})", encoder.heads)
    for stage, heads in enumerate(encoder.heads):
        dim = encoder.embed_dim * 2**stage
        _require(
            dim % heads == 0, f"{name}.heads", f"divisors of the stages' dims ({dim} in stage {stage})", encoder.heads
        )
    _require(
        size % window == 0, f"{name}.window_size", f"windows of {window} px that tile {size} px", encoder.window_size
    )
    _require(size % encoder.unit == 0, f"{name}.unit", f"a divisor of {size}", encoder.unit)
    _require(encoder.unit % last == 0, f"{name}.unit", f"a multiple of {last}, the last stage's token", encoder.unit)


def _validate_model(config: Config) -> None:
    v, a, merge = config.vision, config.audio, config.merge
    stages = len(v.depths)
    windows = v.pretrained_windows
    _require(len(windows) in (0, stages), "vision.pretrained_windows", f"{stages} numbers or none", windows)
    _require(len(a.depths) == stages, "audio.depths", f"as many stages as vision.depths ({stages})", a.depths)
    dim = config.text.dim
    _require(dim % config.text.heads == 0, "text.heads", f"a divisor of text.dim = {dim}", config.text.heads)
    dim = config.fusion.dim
    _require(dim % config.fusion.heads == 0, "fusion.heads", f"a divisor of fusion.dim = {dim}", config.fusion.heads)
    _require(dim % merge.heads == 0, "merge.heads", f"a divisor of fusion.dim = {dim}", merge.heads)
    capacity = merge.capacity
    _require(capacity is None or 0 < capacity <= 1, "merge.capacity", "a share in (0, 1] or null", capacity)


_PAPER = Config(train=TrainConfig(encoder_lr=1e-5))
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
