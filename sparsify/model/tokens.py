"""From an encoder's last stage to tokens that can be compared: one width, a time, a place and a modality for each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.model.layers import select_rows
from sparsify.model.time import TIME_FEATURES

__all__ = ["TokenHead", "gather_rows"]


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """``x`` [B, N, D] at ``index`` int64 [B, K]: [B, K, D]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class TokenHead(nn.Module):
    """Width ``in_dim`` to ``dim``, plus embeddings of time and of the cell in the frame or mel image.

    ``rows`` and ``columns`` [cells] number what a cell's place means: row and column of a frame, or the band of mel
    bins (an image's columns are time, which is embedded as such).
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, in_dim: int, dim: int, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.project, self.norm = nn.Linear(in_dim, dim), nn.LayerNorm(dim)
        self.time = nn.Linear(TIME_FEATURES, dim, bias=False)
        self.row = nn.Parameter(0.3 * torch.randn(int(rows.max()) + 1, dim))
        self.column = nn.Parameter(0.3 * torch.randn(int(columns.max()) + 1, dim))
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, x: Tensor, cell: Tensor, time: Tensor) -> Tensor:
        """``x`` [V, N, in_dim] at ``cell`` int64 [V, N] with ``time`` features [V, N, TIME_FEATURES] -> [V, N, dim]."""
        place = select_rows(self.row, self.rows[cell]) + select_rows(self.column, self.columns[cell])
        return self.norm(self.project(x)) + place + self.time(time)
