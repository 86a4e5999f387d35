"""Draws ``docs/masked_encoder.png``: how mask units go through the four stages of a masked encoder.

    python docs/draw_masked_encoder.py

Needs matplotlib. Which tokens share a window comes from the plan itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle

from sparsify.model.plan import Cut, UnitPlan
from sparsify_kernels import random_mask

GRID, WINDOW, FOLLOWED = 8, 8, 27  # units along an image, tokens along a window, the unit that is followed
STAGES = (8, 4, 2, 1)  # tokens along a unit
KEPT, MASKED, UNIT, INK, SHIFTED = "#cfe3f3", "#f3f3f1", "#f28c28", "#24323d", "#b3261e"


def kept_units() -> torch.Tensor:
    """A stratified half in which the followed unit is kept: int64 [32]."""
    units = torch.zeros(1, GRID * GRID, 1)
    for seed in range(100):
        index = random_mask(units, 0.5, seed=seed, grid=(GRID, GRID), stratified=True).index[0]
        if FOLLOWED in index.tolist():
            return index
    raise AssertionError("one seed in two keeps it")


def draw_stage(axes: Any, units: torch.Tensor, stage: int) -> str:
    """One stage's grid; returns what is said below it."""
    u = STAGES[stage]
    side = GRID * u
    shift = WINDOW // 2 if side > WINDOW else 0
    cuts = [Cut(u, WINDOW, 0), Cut(u, WINDOW, shift)]
    plan = UnitPlan.of(torch.zeros_like(units), units, images=1, grid=GRID, cuts=cuts)
    axes.set_xlim(-0.2, GRID + 0.2)
    axes.set_ylim(GRID + 0.2, -0.2)
    axes.set_aspect("equal")
    axes.axis("off")
    for unit in range(GRID * GRID):
        y, x = divmod(unit, GRID)
        colour = UNIT if unit == FOLLOWED else KEPT if unit in units.tolist() else MASKED
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.8))
        if colour != MASKED:
            for i in range(1, u):
                axes.plot([x + i / u] * 2, [y, y + 1], color="white", linewidth=0.35)
                axes.plot([x, x + 1], [y + i / u] * 2, color="white", linewidth=0.35)
    step = WINDOW / u
    at = 0.0
    while at <= GRID:
        axes.plot([at, at], [0, GRID], color=INK, linewidth=1.1)
        axes.plot([0, GRID], [at, at], color=INK, linewidth=1.1)
        at += step
    plain = plan.windows[cuts[0]].start.diff()
    said = f"a unit is {u} x {u} tokens\npacked: [32 x {u * u}, C]\n{held(plain)}"
    if shift:
        windows = plan.windows[cuts[1]]
        y, x = divmod(FOLLOWED, GRID)
        first = units.tolist().index(FOLLOWED) * u * u
        window = int(torch.searchsorted(windows.start, (windows.member == first).nonzero()[0, 0], right=True)) - 1
        across = side // WINDOW
        top, left = ((window // across * WINDOW + shift) / u, (window % across * WINDOW + shift) / u)
        axes.add_patch(
            Rectangle((left, top), step, step, fill=False, edgecolor=SHIFTED, linewidth=1.8, linestyle=(0, (4, 2)))
        )
        counts = windows.start.diff()
        least, most = int(counts.min()), int(counts.max())
        said += f"\nshifted by {shift}: {most if least == most else f'{least} to {most}'} of {WINDOW * WINDOW}"
    else:
        said += "\none window: never shifted"
    return said


def held(counts: torch.Tensor) -> str:
    found = sorted(set(counts.tolist()))
    return f"windows hold {' or '.join(map(str, found))} of {WINDOW * WINDOW}"


def main() -> None:
    units = kept_units()
    figure, all_axes = plt.subplots(1, 4, figsize=(13.2, 4.5))
    for stage, axes in enumerate(all_axes):
        said = draw_stage(axes, units, stage)
        axes.set_title(f"stage {stage}", fontsize=12, color=INK, loc="left")
        axes.text(0, GRID + 0.35, said, fontsize=10, va="top", color=INK, linespacing=1.5)
    for axes in all_axes[:-1]:
        axes.text(GRID + 0.92, GRID / 2, "2 x 2\n→", ha="center", va="center", fontsize=10, color=INK)
    figure.text(
        0.012,
        0.03,
        "blue: kept units     orange: one of them, followed     grey: masked, never read     dark lines: windows     "
        "red: the shifted window of the followed unit's first token",
        fontsize=10,
        color=INK,
    )
    figure.subplots_adjust(left=0.012, right=0.988, top=0.93, bottom=0.30, wspace=0.14)
    figure.savefig(Path(__file__).with_name("masked_encoder.png"), dpi=140, facecolor="white")


if __name__ == "__main__":
    main()
