"""Tokens and floating-point operations by stage, for dense, masked and merged."""

from __future__ import annotations

from collections.abc import Sequence

from sparsify.report._charts import Chart, colour, figure, tidy
from sparsify.report._page import INK
from sparsify.report.cost import QUESTIONS, Variant

__all__ = ["by_stage"]


def by_stage(variants: Sequence[Variant], what: str, name: str = "by_stage") -> Chart:
    """Two panels with a row a stage and a bar a variant: tokens, and operations. ``what`` names the configuration."""
    stages = [stage.name for stage in variants[0].stages]
    thick = 0.82 / len(variants)
    made = figure(7.2, 1.7 + 0.42 * len(stages))
    left, right = made.subplots(1, 2, sharey=True)
    largest = max(stage.flop for variant in variants for stage in variant.stages)
    unit, scale = ("GFLOP", 1e9) if largest >= 1e9 else ("MFLOP", 1e6)
    for place, variant in enumerate(variants):
        rows = [i + (place - (len(variants) - 1) / 2) * thick for i in range(len(stages))]
        for axes, values in (
            (left, [stage.tokens for stage in variant.stages]),
            (right, [stage.flop / scale for stage in variant.stages]),
        ):
            axes.barh(rows, values, height=thick * 0.9, color=colour(place), label=variant.name)
            for row, value in zip(rows, values, strict=True):
                text = f" {value:,.0f}" if axes is left or value >= 100 else f" {value:.3g}"
                axes.text(value, row, text, va="center", fontsize=7.5, color=INK)
    left.set_yticks(range(len(stages)), stages)
    left.set_ylim(len(stages) - 0.45, -0.55)
    for axes, label in ((left, "tokens"), (right, unit)):
        axes.set_xlim(0, 1.18 * axes.dataLim.x1)
        axes.set_xlabel(f"{label} a video")
        tidy(axes, grid="x")
    base = variants[0].flop
    totals = [f"{v.name}: {v.flop / scale:,.4g} {unit} ({100 * v.flop / base:.0f} %)" for v in variants]
    made.legend(handles=left.containers, labels=totals, loc="outside upper left", ncols=1, frameon=False, fontsize=9)
    return Chart(
        name,
        made,
        f"Bars of tokens and operations by stage of {what}. In all: " + "; ".join(totals) + ".",
        f"{what}: tokens and operations by stage for one video with {QUESTIONS} questions, a forward pass, counted on "
        "the model itself (a multiply and an add are two operations; products of matrices alone).",
    )
