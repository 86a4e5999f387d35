"""The tables of benchmarks.end_to_end: what does not depend on the clock is held to what the project promises."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool

import pytest
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
    assert list(rows) == ["dense=True", "keep 1", "keep 1/2", "keep 1/4"]
    assert rows["dense=True"].flop == 1
    assert rows["dense=True"].memory == pytest.approx(1, abs=0.01)
    assert rows["keep 1/4"].flop <= 0.247
    assert all(row.time > 0 and row.pages is not None and row.pages > 0 for row in rows.values())


def test_times_are_shares_of_the_faster_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"dense": 4.0, "dense" + end_to_end.COMPILED: 2.0, "masks": 1.0}
    case = end_to_end.Case("model", "a step", lambda device, size: {}, 1)
    asked = {
        end_to_end._peak: end_to_end.Peak(100, 100),
        end_to_end._flop_and_seconds: (dict.fromkeys(seconds, 8), seconds),
    }
    monkeypatch.setattr(end_to_end, "_apart", lambda figures, *_: asked[figures])
    rows = {row.name: row for row in end_to_end.measure(case, "cpu", rounds=1)}
    assert list(rows) == ["dense" + end_to_end.COMPILED, "masks"]
    assert (rows["masks"].time, rows["masks"].base_ms) == (0.5, 2000.0)


def test_a_case_whose_process_dies_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of too little memory, say."""

    def killed(case: end_to_end.Case, device: str, rounds: int) -> list[end_to_end.Row]:
        if case.name == "training step, 60 s":
            raise BrokenProcessPool
        return [end_to_end.Row(case.table, case.name, "masks", 0.5, 0.5, 0.5, None, 1.0, 1.0, 1.0)]

    monkeypatch.setattr(end_to_end, "measure", killed)
    assert end_to_end.main(["--only", "clips"]) == 0
    out, err = capsys.readouterr()
    assert "training step, 60 s: not measured, its process died: too little memory?" in err
    assert "training step, 40 s | masks" in out
    assert "60 s" not in out


def test_a_table_has_a_line_for_each_row() -> None:
    row = end_to_end.Row("model", "training step", "masks", 0.49, 0.451, 0.5, 0.6, 12.34, 5300.4, 2048.0)
    on_a_gpu = row._replace(pages=None)
    assert end_to_end.render([row, on_a_gpu]).splitlines()[2:] == [
        "| training step | masks | 0.490 | 0.45 | 0.50 | 0.60 | 12.3, 5300, 2048 |",
        "| training step | masks | 0.490 | 0.45 | 0.50 |  | 12.3, 5300, 2048 |",
    ]
