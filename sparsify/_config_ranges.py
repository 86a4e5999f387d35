"""The ranges of the configuration's values, and which of them have to fit each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify.errors import ConfigError

if TYPE_CHECKING:
    from sparsify.config import AudioConfig, Config, VisionConfig

__all__ = ["check_ranges"]

_INPUTS = ("both", "blind", "deaf", "textonly")


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
    "train": (
        "lr",
        "encoder_lr",
        "weight_decay",
        "muon",
        "matching",
        "clip_norm",
        "seed",
        "workers",
        "save_seconds",
        "keep_last",
    ),
}
_BELOW_ONE = {"text": ("dropout",), "fusion": ("dropout",), "select": ("skip",), "train": ("warmup", "label_smoothing")}


def check_ranges(config: Config) -> None:
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
    m, s, t = config.mask, config.select, config.train
    _require(0 < m.keep <= 1, "mask.keep", "a share in (0, 1]", m.keep)
    _require(all(0 < k <= 1 for k in m.schedule), "mask.schedule", "shares in (0, 1]", m.schedule)
    _require(m.kind in ("unit", "time"), "mask.kind", "unit or time", m.kind)
    if m.kind == "time":
        a = config.audio
        _require(a.mel_bins % a.unit == 0, "audio.unit", f"with mask.kind time a divisor of {a.mel_bins} bins", a.unit)
    _require(s.unit in ("video", "question"), "select.unit", "video or question", s.unit)
    _require(0 <= s.until <= 1, "select.until", "a share in [0, 1]", s.until)
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
