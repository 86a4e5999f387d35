"""HTS-AT over log-mel images, stage by stage: transformers' CLAP audio encoder, or its modules over kept units alone.

The log-mel of a segment is folded into a square (``ClapAudioEncoder.reshape_mel2img``): row ``r`` of the image is mel
bin ``r % mel_bins`` of run ``r // mel_bins``, and the runs follow each other in time.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparsify._torchvision import ensure_torchvision
from sparsify.config import AudioConfig
from sparsify.data.units import from_units
from sparsify.errors import ConfigError
from sparsify.model.masked import MaskedHTSAT, rows_normalised, wrap
from sparsify.model.masking import KeptUnits
from sparsify.model.plan import UnitPlan

__all__ = ["AudioEncoder"]

# Log-mel of music in dB lies between the -100 of silence and about +20. Random weights get these as the batch norm's
# running statistics, which are never updated: CLAP's own are learnt and come with its weights.
_MEL_MEAN, _MEL_STD = -30.0, 30.0  # dB


class AudioEncoder(nn.Module):
    """transformers' ``ClapAudioEncoder`` in steps: ``embed``, ``stage`` 0, 1, ..., ``finish``.

    Raises ``ConfigError`` for a geometry that cannot be masked exactly, unless it is ``dense`` and never will be.
    """

    def __init__(self, config: AudioConfig, *, dense: bool = False) -> None:
        super().__init__()
        self.config = config
        self.htsat = build_htsat(config)
        self.masked = None if dense else wrap(MaskedHTSAT, self.htsat, config.unit, "audio")

    @property
    def stage_dims(self) -> list[int]:
        """Channels after each stage: a stage ends with its patch merging, the last one has none."""
        last = len(self.config.depths) - 1
        return [self.config.embed_dim * 2 ** min(i + 1, last) for i in range(last + 1)]

    def side(self, stage: int) -> int:
        """Tokens along one side of an image, as ``stage`` returns them."""
        last = len(self.config.depths) - 1
        return self.config.spec_size // self.config.patch_size // 2 ** min(stage + 1, last)

    def embed(self, mel: Tensor) -> Tensor:
        """Log-mel in dB, in units [B, U, p*p], as patch embeddings [B, side, side, C].

        The batch norm over mel bins uses its running statistics in training too, as ``rows_normalised`` says.
        """
        image = from_units(mel, self.config.unit, (self.config.units, self.config.units))
        scale, shift = (x.unsqueeze(1) for x in rows_normalised(self.htsat))
        image = image.to(scale.dtype) * scale + shift
        side = self.config.spec_size // self.config.patch_size
        return self.htsat.patch_embed(image).view(-1, side, side, self.config.embed_dim)

    def embed_kept(self, kept: KeptUnits) -> Tensor:
        """Log-mel in dB of kept units as patch embeddings [M * u * u, C]; normalised as ``embed`` says."""
        assert self.masked is not None  # a dense model draws no units
        side = self.config.unit
        mel = kept.values.view(-1, 1, side, side).to(self.htsat.batch_norm.weight.dtype)
        return self.masked.embed(mel, kept.plan)

    def stage(self, index: int, x: Tensor, plan: UnitPlan | None) -> Tensor:
        """Stage ``index``: [B, H, W, C] by transformers' own forward, or with a ``plan`` the packed tokens [N, C] of
        kept units.
        """
        if plan is not None:
            assert self.masked is not None
            return self.masked.stage(index, x, plan)
        side = x.shape[1]
        x = self.htsat.layers[index](x.flatten(1, 2), (side, side))[0]
        return x.unflatten(1, (self.side(index), self.side(index)))

    def finish(self, x: Tensor) -> Tensor:
        """The final norm: of [B, side, side, out_dim] or [N, out_dim]."""
        return self.htsat.norm(x)


def build_htsat(config: AudioConfig) -> Any:
    """A ``ClapAudioEncoder`` of this geometry with random weights, without feature fusion and without dropout."""
    ensure_torchvision()
    from transformers import ClapAudioConfig
    from transformers.models.clap.modeling_clap import ClapAudioModel

    last_side = config.spec_size // config.patch_size // 2 ** (len(config.depths) - 1)
    if last_side < config.window_size:
        raise ConfigError(
            f"config.audio.window_size: expected at most the {last_side} tokens of the last stage's side, "
            f"got {config.window_size}"
        )
    clap = ClapAudioConfig(
        spec_size=config.spec_size,
        num_mel_bins=config.mel_bins,
        window_size=config.window_size,
        patch_size=config.patch_size,
        patch_stride=[config.patch_size, config.patch_size],
        patch_embeds_hidden_size=config.embed_dim,
        hidden_size=config.out_dim,
        depths=list(config.depths),
        num_attention_heads=list(config.heads),
        num_hidden_layers=len(config.depths),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    htsat: Any = ClapAudioModel(clap).audio_encoder
    htsat.batch_norm.running_mean.fill_(_MEL_MEAN)
    htsat.batch_norm.running_var.fill_(_MEL_STD**2)
    return htsat
