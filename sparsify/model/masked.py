"""Swin-V2 and HTS-AT over kept units alone: the libraries' modules, run on packed tokens.

``MaskedSwinV2(swin, unit)`` wraps timm's ``SwinTransformerV2`` and ``MaskedHTSAT(htsat, unit)`` transformers'
``ClapAudioEncoder``. They own no parameters and change nothing in what they wrap: state, training mode, gradient
checkpointing and pretrained weights are the library's. Given the kept units of some images and their ``UnitPlan``,
they return exactly what the library's forward would for these tokens if no token ever attended to a masked one; masked
units are not asked for, let alone computed. (HTS-AT's batch norm over mel bins keeps to its running statistics, in
training too.)

Source: section 3.2 of Diao et al., ACL 2025 (arXiv 2506.01319), on Swin-V2 (arXiv 2111.09883) and HTS-AT (arXiv
2202.00874).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparsify.errors import ConfigError
from sparsify.model.layers import select_rows
from sparsify.model.plan import Cut, UnitPlan
from sparsify_kernels import window_attention

__all__ = ["MaskedHTSAT", "MaskedSwinV2", "rows_normalised", "wrap"]

_MAX_LOGIT_SCALE = math.log(100)  # Swin-V2, section 3.2: temperatures are at least 0.01


class _Masked:
    """What both wrappers are: stages of blocks over packed tokens."""

    encoder: Any  # the library's module
    grid: int  # mask units along one side of an image
    unit_tokens: list[int]  # tokens along one side of a unit, in the blocks of each stage
    cuts: list[list[Cut]]  # of each block of each stage
    needs: tuple[int, tuple[Cut, ...]]  # grid and cuts, all that a plan depends on: who needs the same shares one

    def plan(self, image: Tensor, unit: Tensor, images: int) -> UnitPlan:
        """The plan of units ``unit`` of ``image`` (int64 [M] each; images ascending) for this encoder."""
        grid, cuts = self.needs
        return UnitPlan.of(image, unit, images=images, grid=grid, cuts=cuts)

    def __call__(self, units: Tensor, plan: UnitPlan) -> Tensor:
        """The kept units [M, channels, unit, unit], as the library takes them, through all stages and the last norm:
        [N, C].
        """
        x = self.embed(units, plan)
        for stage in range(len(self.cuts)):
            x = self.stage(stage, x, plan)
        return self.finish(x)

    def embed(self, units: Tensor, plan: UnitPlan) -> Tensor:
        """Kept units [M, channels, unit, unit] as patch embeddings [M * u * u, C]."""
        x = self.encoder.patch_embed.proj(units).flatten(2).transpose(1, 2)  # [M, u * u, C]
        return self.encoder.patch_embed.norm(x).flatten(0, 1)

    def stage(self, index: int, x: Tensor, plan: UnitPlan) -> Tensor:
        """Stage ``index``: [N, C] -> [N', C']."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """The last norm: [N, C]."""
        return self.encoder.norm(x)

    def _lay_out(self, name: str, side: int, patch: int, unit: int, cuts: list[list[tuple[int, int]]]) -> None:
        """Take the geometry over: ``side`` tokens along an image, windows and shifts of every block; refuse what
        could not be exact.
        """
        stages = len(cuts)
        last = patch * 2 ** (stages - 1)
        if unit % last:
            raise ValueError(f"{name}: a mask unit must be whole tokens of {last} px in the last stage, got {unit} px")
        if side * patch % unit:
            raise ValueError(f"{name}: mask units of {unit} px must tile the image of {side * patch} px")
        self.grid = side * patch // unit
        self.unit_tokens = [unit // patch // 2**stage for stage in range(stages)]
        self.cuts = [
            [Cut(u, window, shift) for window, shift in stage] for u, stage in zip(self.unit_tokens, cuts, strict=True)
        ]
        self.needs = self.grid, tuple(sorted({cut for stage in self.cuts for cut in stage}))
        for stage, blocks in enumerate(self.cuts):
            for _, window, _ in blocks:
                if (side >> stage) % window:
                    raise ValueError(
                        f"{name}: windows of {window} tokens must tile the {side >> stage} x {side >> stage} tokens of "
                        f"stage {stage}: the library pads them with tokens that all others attend to"
                    )


class MaskedSwinV2(_Masked):
    """timm's ``SwinTransformerV2`` over kept units of ``unit`` x ``unit`` pixels.

    Raises ``ValueError``, with the reason, for a geometry that cannot be exact: images or windows that are not square,
    windows that timm pads, units that are not whole tokens in the last stage.
    """

    def __init__(self, swin: Any, unit: int) -> None:
        self.encoder = swin
        (height, width), (patch, other) = swin.patch_embed.img_size, swin.patch_embed.patch_size
        if height != width or patch != other:
            raise ValueError(
                f"MaskedSwinV2: images and patches must be square, got {height} x {width} and {patch} x {other}"
            )
        blocks = [[(*block.window_size, *block.shift_size) for block in layer.blocks] for layer in swin.layers]
        for wh, ww, sh, sw in (cut for layer in blocks for cut in layer):
            if wh != ww or sh != sw:
                raise ValueError(f"MaskedSwinV2: windows must be square, got {wh} x {ww} shifted by {sh} x {sw}")
        cuts = [[(window, shift) for window, _, shift, _ in layer] for layer in blocks]
        self._lay_out("MaskedSwinV2", height // patch, patch, unit, cuts)

    def stage(self, index: int, x: Tensor, plan: UnitPlan) -> Tensor:
        """Stage ``index``: patch merging (but in the first), then its blocks. [N, C] -> [N', C']."""
        layer = self.encoder.layers[index]
        if index:
            before = self.unit_tokens[index - 1]
            x = layer.downsample(x.view(-1, before, before, x.shape[-1])).flatten(0, 2)
        for block, cut in zip(layer.blocks, self.cuts[index], strict=True):
            x = _perhaps_checkpointed(layer.grad_checkpointing, _swin_block, block, x, plan, cut)
        return x


class MaskedHTSAT(_Masked):
    """transformers' ``ClapAudioEncoder`` over kept units of ``unit`` x ``unit`` pixels of the folded log-mel image.

    Raises ``ValueError``, with the reason, for a geometry that cannot be exact: feature fusion, overlapping patches,
    windows that the library pads or that are larger than a stage's grid, units that are not whole tokens in the last
    stage.
    """

    def __init__(self, htsat: Any, unit: int) -> None:
        self.encoder = htsat
        embed = htsat.patch_embed
        (height, width), patch = embed.img_size, embed.proj.kernel_size
        if htsat.enable_fusion:
            raise ValueError("MaskedHTSAT: feature fusion mixes all of an image into every patch")
        if patch != embed.proj.stride or patch[0] != patch[1]:
            raise ValueError(
                f"MaskedHTSAT: patches must be square and lie side by side, got {patch} every {embed.proj.stride} px"
            )
        if height != width:
            raise ValueError(f"MaskedHTSAT: images must be square, got {height} x {width}")
        side = height // patch[0]
        cuts = [[self._cut(block, side >> stage) for block in layer.blocks] for stage, layer in enumerate(htsat.layers)]
        self._lay_out("MaskedHTSAT", side, patch[0], unit, cuts)

    def embed(self, units: Tensor, plan: UnitPlan) -> Tensor:
        """Log-mel of kept units [M, 1, unit, unit] as patch embeddings [M * u * u, C], after the library's batch norm
        over mel bins, of which each row of an image holds one.
        """
        side = units.shape[-1]
        row = plan.unit // plan.grid
        scale, shift = (select_rows(x.view(-1, 1, side, 1), row) for x in rows_normalised(self.encoder))
        return super().embed(units * scale + shift, plan)

    @staticmethod
    def _cut(block: Any, side: int) -> tuple[int, int]:
        """Window and shift, as the library sets them in its first forward: a grid of one window is not shifted."""
        window = int(block.attention.self.window_size[0])
        if window > side:
            raise ValueError(f"MaskedHTSAT: windows of {window} tokens are larger than a grid of {side} x {side}")
        return window, 0 if window == side else int(block.shift_size)

    def stage(self, index: int, x: Tensor, plan: UnitPlan) -> Tensor:
        """Stage ``index``: its blocks, then patch merging (but in the last). [N, C] -> [N', C']."""
        layer = self.encoder.layers[index]
        for block, cut in zip(layer.blocks, self.cuts[index], strict=True):
            x = _perhaps_checkpointed(
                layer.gradient_checkpointing and layer.training, _htsat_block, block, x, plan, cut
            )
        if layer.downsample is not None:
            u = self.unit_tokens[index]
            x = layer.downsample(x.view(-1, u * u, x.shape[-1]), (u, u)).flatten(0, 1)
        return x


def rows_normalised(htsat: Any) -> tuple[Tensor, Tensor]:
    """The batch norm over mel bins as scale and shift of each row of an image: two [spec_size].

    By its running statistics, in training too: those of a batch would make a sample depend on its neighbours.
    """
    norm = htsat.batch_norm
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)  # [mel_bins]
    shift = norm.bias - norm.running_mean * scale
    runs = htsat.patch_embed.img_size[0] // len(scale)
    return scale.repeat(runs), shift.repeat(runs)


_Wrapper = TypeVar("_Wrapper", bound=_Masked)


def wrap(wrapper: Callable[[Any, int], _Wrapper], encoder: Any, unit: int, section: str) -> _Wrapper:
    """``wrapper(encoder, unit)``; a geometry that it refuses is one of ``config``'s ``section``: ``ConfigError``."""
    try:
        return wrapper(encoder, unit)
    except ValueError as error:
        raise ConfigError(f"config.{section}: {error}") from error


def _swin_block(block: Any, x: Tensor, plan: UnitPlan, cut: Cut) -> Tensor:
    x = x + _dropped(block.drop_path1, block.norm1(_swin_attention(block.attn, x, plan, cut)), plan)
    return x + _dropped(block.drop_path2, block.norm2(block.mlp(x)), plan)


def _swin_attention(attn: Any, x: Tensor, plan: UnitPlan, cut: Cut) -> Tensor:
    """timm's ``WindowAttention``: cosines, a learnt temperature, a bias from log-spaced coordinates."""
    _refuse_dropout(attn.attn_drop)
    bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    qkv = F.linear(x, attn.qkv.weight, bias).unflatten(-1, (3, attn.num_heads, -1))  # [N, 3, H, d]
    table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table)[0].permute(2, 0, 1))  # [H, 2w - 1, 2w - 1]
    scale = attn.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp().flatten()
    out = window_attention(qkv, table, plan.windows[cut], scale=scale, cosine=True)
    return attn.proj_drop(attn.proj(out.flatten(1)))


def _htsat_block(block: Any, x: Tensor, plan: UnitPlan, cut: Cut) -> Tensor:
    out = block.attention.output(_htsat_attention(block.attention.self, block.layernorm_before(x), plan, cut), x)
    x = x + _dropped(block.drop_path, out, plan)
    return x + block.output(block.intermediate(block.layernorm_after(x)))


def _htsat_attention(attn: Any, x: Tensor, plan: UnitPlan, cut: Cut) -> Tensor:
    """transformers' ``ClapAudioSelfAttention``: scaled dot products and a table of biases."""
    _refuse_dropout(attn.dropout)
    linears = attn.query, attn.key, attn.value
    if all(map(_is_plain, linears)):
        bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
        qkv = F.linear(x, torch.cat([linear.weight for linear in linears]), bias)
    else:
        qkv = torch.cat([linear(x) for linear in linears], dim=-1)
    width = 2 * cut.window - 1
    table = attn.relative_position_bias_table.T.unflatten(1, (width, width))  # [H, 2w - 1, 2w - 1]
    qkv = qkv.unflatten(-1, (3, attn.num_attention_heads, -1))  # [N, 3, H, d]
    return window_attention(qkv, table, plan.windows[cut]).flatten(1)


def _is_plain(linear: torch.nn.Module) -> bool:
    """Whether weight and bias say all of it: no adapter, no quantisation, no hook."""
    return type(linear) is torch.nn.Linear and not (linear._forward_hooks or linear._forward_pre_hooks)


def _dropped(drop_path: Any, x: Tensor, plan: UnitPlan) -> Tensor:
    """Stochastic depth: the library draws once an image, whatever is kept of it."""
    if not drop_path.training or isinstance(drop_path, torch.nn.Identity):
        return x
    factor = drop_path(x.new_ones(plan.images, 1))[plan.image]  # [M, 1]: 0 or 1 / (1 - p)
    return (x.view(len(factor), -1) * factor).view_as(x)


def _refuse_dropout(dropout: torch.nn.Dropout) -> None:
    if dropout.training and dropout.p > 0:
        raise ValueError(
            f"masked encoder: attention dropout must be 0 in training, got {dropout.p}: weights are never in memory"
        )


def _perhaps_checkpointed(again: bool, block: Callable[..., Tensor], *args: Any) -> Tensor:
    return checkpoint(block, *args, use_reentrant=False) if again else block(*args)
