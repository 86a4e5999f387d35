"""Sparse masking in oracle form: all is computed, masked tokens are never attended to and never leave the encoder.

A mask unit is a square of pixels whose side is a multiple of the last stage's token, so it is whole tokens at every
stage and no 2x2 patch merging crosses it. Inside a window, a kept token attends to kept tokens alone; a masked token
sees itself and them, which keeps its softmax finite, and nothing ever reads what it becomes: its outputs and its
gradients are exactly zero where they could matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_kernels import random_mask

__all__ = ["KeptUnits", "join_windows", "split_windows"]


class KeptUnits:
    """The kept units of B square images of ``grid`` x ``grid`` units, and the masks that follow from them.

    Masks are made once for each resolution, window and shift, and shared by the blocks of a stage.
    """

    def __init__(self, index: Tensor, grid: int) -> None:
        """``index``: int64 [B, K], row-major unit numbers, ascending."""
        self.index = index
        self.grid = grid
        self._tokens: dict[int, Tensor] = {}
        self._windows: dict[tuple[int, int, int], Tensor] = {}

    @classmethod
    def draw(cls, seed: Tensor, keep: float, grid: int, *, stratified: bool) -> KeptUnits:
        """Draw for each of the B images from its own ``seed`` (int64 [B]).

        ``stratified`` keeps the same number in every 2x2 block, where the ratio (1/4, 1/2, 3/4) and an even grid allow
        it; other ratios are drawn freely.
        """
        units = torch.arange(grid * grid, device=seed.device).expand(len(seed), -1)  # [B, U]
        if keep >= 1:
            return cls(units, grid)
        blocks = stratified and grid % 2 == 0 and keep in (0.25, 0.5, 0.75)
        drawn = random_mask(
            units.unsqueeze(-1), keep, seed=seed, grid=(grid, grid) if blocks else None, stratified=blocks
        )
        return cls(drawn.index, grid)

    def tokens(self, side: int) -> Tensor:
        """Which tokens of a ``side`` x ``side`` grid are kept: bool [B, side, side]."""
        if side not in self._tokens:
            kept = torch.zeros(len(self.index), self.grid * self.grid, dtype=torch.bool, device=self.index.device)
            kept = kept.scatter(1, self.index, True).view(-1, self.grid, self.grid)
            scale = side // self.grid
            self._tokens[side] = kept.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        return self._tokens[side]

    def cells(self, side: int) -> Tensor:
        """Row-major numbers, ascending, of the kept tokens of a ``side`` x ``side`` grid: int64 [B, K * scale^2]."""
        scale = side // self.grid
        corner = (self.index // self.grid) * scale * side + (self.index % self.grid) * scale  # [B, K]
        step = torch.arange(scale, device=corner.device)
        inside = (step[:, None] * side + step).flatten()  # [scale^2]
        return (corner.unsqueeze(-1) + inside).flatten(1).sort(dim=1).values

    def window_mask(self, side: int, window: int, shift: int, wrap: Tensor | None) -> Tensor:
        """What is added to the attention logits of each window: [B * windows, n, n] with n = window^2.

        0 where a kept key, or a token itself, stands; -inf at other masked keys; plus ``wrap`` [windows, n, n], the
        library's own penalty between parts that a cyclic ``shift`` brings together.
        """
        name = (side, window, shift)
        if name not in self._windows:
            kept = self.tokens(side)
            if shift:
                kept = torch.roll(kept, (-shift, -shift), (1, 2))
            keys = split_windows(kept.unsqueeze(-1), window).transpose(1, 2)  # [B * windows, 1, n]
            itself = torch.eye(window * window, dtype=torch.bool, device=keys.device)
            dtype = torch.get_default_dtype() if wrap is None else wrap.dtype
            mask = torch.zeros(keys.shape[0], *itself.shape, dtype=dtype, device=keys.device)
            mask.masked_fill_(~(keys | itself), -torch.inf)
            if wrap is not None:
                mask = (mask.view(-1, *wrap.shape) + wrap).view_as(mask)
            self._windows[name] = mask
        return self._windows[name]


def split_windows(x: Tensor, window: int) -> Tensor:
    """[B, H, W, C] as [B * windows, window^2, C], row-major on both levels."""
    b, h, w, c = x.shape
    x = x.view(b, h // window, window, w // window, window, c).transpose(2, 3)
    return x.reshape(-1, window * window, c)


def join_windows(x: Tensor, window: int, side: int) -> Tensor:
    """The inverse of ``split_windows`` for a ``side`` x ``side`` grid: [B, side, side, C]."""
    n = side // window
    return x.view(-1, n, n, window, window, x.shape[-1]).transpose(2, 3).reshape(-1, side, side, x.shape[-1])
