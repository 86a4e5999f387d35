"""What a masked encoder has to give, by the libraries' own forward: all tokens are computed, and hooks on the attention
of every block let none attend to a masked one.

Nothing here comes from the masked encoders: kept tokens are a picture of the image, cut and rolled as the libraries
cut and roll their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def blind_to(attentions: list[tuple[nn.Module, int, int, int]], kept: Tensor) -> Iterator[None]:
    """Inside, the attention modules of ``(module, side, window, shift)`` see only ``kept`` bool [B, grid, grid].

    A masked token sees itself too, so that its softmax is finite; nobody reads what becomes of it.
    """

    def hide(side: int, window: int, shift: int) -> Any:
        picture = kept.repeat_interleave(side // kept.shape[1], 1).repeat_interleave(side // kept.shape[2], 2)
        picture = torch.roll(picture, (-shift, -shift), (1, 2))
        rows = picture.unfold(1, window, window).unfold(2, window, window)  # [B, n, n, window, window]
        seen = rows.reshape(-1, 1, window * window) | torch.eye(window * window, dtype=torch.bool)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            (x, *rest) = args
            own = kwargs.get("mask", rest[0] if rest else None)  # [windows of an image, n, n]: -100 at the wrap-around
            mask = torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, -math.inf)
            if own is not None:
                mask = (mask.unflatten(0, (-1, len(own))) + own).flatten(0, 1)
            if "mask" in kwargs:
                return args, {**kwargs, "mask": mask}
            return (x, mask, *rest[1:]), kwargs

        return hook

    handles = [m.register_forward_pre_hook(hide(*cut), with_kwargs=True) for m, *cut in attentions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attentions_of(layer: Any, side: int) -> list[tuple[nn.Module, int, int, int]]:
    """What ``blind_to`` takes of a stage of timm's Swin-V2 or transformers' HTS-AT over ``side`` x ``side`` tokens."""
    found = []
    for block in layer.blocks:
        if hasattr(block, "attn"):
            found.append((block.attn, side, block.window_size[0], block.shift_size[0]))
        else:
            block.set_shift_and_window_size((side, side))  # as every call does
            found.append((block.attention, side, block.window_size, block.shift_size))
    return found


def swin_oracle(swin: Any, images: Tensor, kept: Tensor) -> Tensor:
    """timm's ``forward_features`` of normalised ``images`` [B, 3, H, W]: its grid of tokens [B, side, side, C]."""
    attentions, side = [], swin.patch_embed.grid_size[0]
    for stage, layer in enumerate(swin.layers):
        attentions += attentions_of(layer, side >> stage)
    with blind_to(attentions, kept):
        return swin.forward_features(images)


def htsat_oracle(htsat: Any, images: Tensor, kept: Tensor) -> Tensor:
    """transformers' batch norm (as in evaluation), patch embedding, stages and norm of folded log-mel images
    [B, 1, H, W]: the last grid of tokens [B, side, side, C].
    """
    attentions, side = [], htsat.patch_embed.grid_size[0]
    for stage, layer in enumerate(htsat.layers):
        attentions += attentions_of(layer, side >> stage)
    with blind_to(attentions, kept):
        x = htsat.patch_embed(_normalised(htsat.batch_norm, images))
        for stage, layer in enumerate(htsat.layers):
            x = layer(x, (side >> stage, side >> stage))[0]
    last = side >> len(htsat.layers) - 1
    return htsat.norm(x).unflatten(1, (last, last))


def _normalised(norm: nn.BatchNorm2d, images: Tensor) -> Tensor:
    """By the module's own forward: unfolded, images have mel bins for channels."""
    training = norm.training
    runs = images.squeeze(1).unflatten(1, (-1, norm.num_features)).transpose(1, 2)  # [B, mel_bins, runs, W]
    x = norm.eval()(runs)
    norm.train(training)
    return x.transpose(1, 2).flatten(1, 2).unsqueeze(1)


def kept_tokens(grid: Tensor, kept: Tensor) -> Tensor:
    """The kept tokens of [B, side, side, C], image after image, unit after unit (row-major), row-major inside."""
    units, u = kept.shape[1], grid.shape[1] // kept.shape[1]
    blocks = grid.unflatten(2, (units, u)).unflatten(1, (units, u)).transpose(2, 3)  # [B, gh, gw, u, u, C]
    return blocks[kept].flatten(0, 2)
