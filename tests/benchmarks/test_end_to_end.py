"""The tables of benchmarks.end_to_end: what does not depend on the clock is held to what the project promises."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import end_to_end
from sparsify_kernels.testing import peak_of_tensors


@pytest.mark.parametrize("encoder", ["Swin-V2-T", "HTS-AT"])
def test_half_the_input_takes_half_of_the_flop_and_of_the_memory(encoder: str) -> None:
    case = next(case for case in end_to_end.cases() if case.name == f"{encoder}, forward")
    calls = case.functions("cpu", 1)
    flop, memory = {}, {}
    for name in ("library", "keep 1/2"):
        with FlopCounterMode(display=False) as counter:
            memory[name], _ = peak_of_tensors(calls[name])
        flop[name] = counter.get_total_flops()
    assert flop["keep 1/2"] <= 0.495 * flop["library"]
    assert 0 < memory["keep 1/2"] <= 0.53 * memory["library"]


@pytest.mark.slow  # a process for each figure
def test_a_measured_case() -> None:
    case = next(end_to_end.cases())
    rows = {row.name: row for row in end_to_end.measure(case._replace(size=2), "cpu", rounds=1)}
    assert list(rows) == ["dense=True", "keep 1/2", "keep 1/4"]
    assert rows["dense=True"].flop == 1
    assert rows["dense=True"].memory == pytest.approx(1, abs=0.01)
    assert rows["keep 1/4"].flop <= 0.247
    assert all(row.time > 0 and row.pages is not None and row.pages > 0 for row in rows.values())


def test_times_are_shares_of_the_faster_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply() -> None:
        torch.ones(2, 2) @ torch.ones(2, 2)

    seconds = {"dense": 4.0, "dense" + end_to_end.COMPILED: 2.0, "masks": 1.0}
    case = end_to_end.Case("model", "a step", lambda device, size: dict.fromkeys(seconds, multiply), 1)
    monkeypatch.setattr(end_to_end, "_memory_of", lambda *_: end_to_end.Peak(100, 100))
    monkeypatch.setattr(end_to_end, "_take_turns", lambda *_: seconds)
    rows = {row.name: row for row in end_to_end.measure(case, "cpu", rounds=1)}
    assert list(rows) == ["dense" + end_to_end.COMPILED, "masks"]
    assert (rows["masks"].time, rows["masks"].base_ms) == (0.5, 2000.0)


def test_a_table_has_a_line_for_each_row() -> None:
    row = end_to_end.Row("model", "training step", "masks", 0.49, 0.451, 0.5, 0.6, 12.34, 5300.4, 2048.0)
    on_a_gpu = row._replace(pages=None)
    assert end_to_end.render([row, on_a_gpu]).splitlines()[2:] == [
        "| training step | masks | 0.490 | 0.45 | 0.50 | 0.60 | 12.3, 5300, 2048 |",
        "| training step | masks | 0.490 | 0.45 | 0.50 |  | 12.3, 5300, 2048 |",
    ]
