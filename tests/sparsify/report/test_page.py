"""``sparsify report``: the page that comes out, what it says is missing, and what the command refuses."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsify.cli import main
from sparsify.report import cost
from sparsify.report.published import UPDATED_V1

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting a model takes seconds and has a test of its own."""
    stages = (cost.Stage("frames", 64, 1000), cost.Stage("sound", 16, 500))
    monkeypatch.setattr(cost, "count", lambda config: [cost.Variant("dense", stages)])


def report(tmp_path: Path, *arguments: object) -> str:
    assert main(["report", *map(str, arguments), "--output", str(tmp_path / "report")]) == 0
    return (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_the_page_needs_nothing_beside_it(make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = report(tmp_path, make_run("dense", {"dense": True}), make_run("sparse"))
    assert capsys.readouterr().out == f"{tmp_path / 'report' / 'index.html'}\n"
    sources = re.findall(r'\b(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    assert not re.search(r"<script|<link|@import|url\(", page)
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) == 4  # radar, time, curves, and the cost of the model that both are
    assert all(re.search(r'alt="[^"]{20,}"', image) for image in images)
    anchors = re.findall(r'href="#([^"]*)"', page)
    assert len(anchors) == 10
    assert all(f'id="{anchor}"' in page for anchor in anchors)
    assert "<title>Sparsify: 2 settings compared</title>" in page
    assert 'name="viewport"' in page


def test_charts_are_beside_the_page_as_png(make_run: Make, tmp_path: Path) -> None:
    report(tmp_path, make_run("a"))
    found = {path.name for path in (tmp_path / "report").iterdir()}
    assert found == {
        "index.html", "cost.json", "radar.png", "training_time.png", "accuracy_over_time.png", "by_stage-1.png",
    }  # fmt: skip
    assert (tmp_path / "report" / "radar.png").read_bytes().startswith(b"\x89PNG")


def test_published_rows_only_beside_their_own_split(make_run: Make, tmp_path: Path) -> None:
    ours = report(tmp_path, make_run("ours"))
    assert "QA-TIGER" not in ours
    assert "AVST" not in ours
    assert "Published systems are not shown: the runs were judged by the split 0123456789ab" in ours
    theirs = report(tmp_path, make_run("theirs", asked=tuple(UPDATED_V1.values())))
    for name in ("AVST", "LAVisH", "DG-SCT", "TSPM", "QA-TIGER", "Sparsify (paper)", "Amuse", "arXiv 2506.01319"):
        assert name in theirs


def test_runs_judged_by_different_splits_are_drawn_apart(make_run: Make, tmp_path: Path) -> None:
    page = report(tmp_path, make_run("a", {"dense": True}), make_run("b", fingerprint="ba9876543210"))
    assert "judged by different splits" in page
    assert (tmp_path / "report" / "radar-ba9876543210.png").exists()


def test_subsets_are_held_against_full_runs_judged_alike(make_run: Make, tmp_path: Path) -> None:
    subset = {"select.subset": "random.json"}
    runs = [
        make_run("a"),
        make_run("b", subset),
        make_run("c", subset | {"train.epochs": 2}, fingerprint="ba9876543210"),
    ]
    page = report(tmp_path, *runs)
    assert (tmp_path / "report" / "subsets.png").exists()
    assert (tmp_path / "report" / "subsets-1.png").exists()
    assert "No run on the full training set is judged alike" in page


def test_sections_say_what_they_lack(make_run: Make, tmp_path: Path) -> None:
    page = re.sub("</?span>", "", html.unescape(report(tmp_path, make_run("run"))))
    for why in (
        "No run here trained on a key subset. Choose one with <code>sparsify select RUN --size 25% --unit video</code>",
        "No dense run is among these",
        "No run here skipped samples",
    ):
        assert why in page
    assert page.count("No data folder was named") == 3


def test_an_unfinished_run_is_shown_as_such(make_run: Make, tmp_path: Path) -> None:
    page = report(tmp_path, make_run("run", finished=False))
    assert "No run is finished yet" in page
    assert "not finished" in page
    assert (tmp_path / "report" / "accuracy_over_time.png").exists()


def test_numbers_of_every_run_are_in_the_table(make_run: Make, tmp_path: Path) -> None:
    page = report(
        tmp_path,
        make_run("a", {"train.seed": 5}, accuracy=0.7123, floor=0.3579),
        make_run("b", {"train.seed": 6}, accuracy=0.7234),
    )
    for number in ("71.23", "72.34", "35.79", "0123456789ab", "a processor", "not recorded", "1,000,000"):
        assert f">{number}<" in page
    assert ">71.79 (71.2 to 72.3)<" in page  # the group, by type table


def test_what_was_counted_is_not_counted_again(make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("run")
    first = report(tmp_path, run)
    monkeypatch.setattr(cost, "count", lambda config: pytest.fail("counted again"))
    assert report(tmp_path, run) == first


def test_labels_name_runs(make_run: Make, tmp_path: Path) -> None:
    run = make_run("run")
    assert ">before &lt;it&gt;<" in report(tmp_path, run, "--label", f"{run}=before <it>")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 5, "RUN nowhere: expected a run folder of `sparsify train`, found no folder"),
        (["."], 5, "RUN .: expected a run folder of `sparsify train`, with config.json and metrics.jsonl in it"),
        (["run", "run"], 2, "report: expected every RUN once"),
        (["run", "--label", "mine"], 2, "--label: expected RUN=NAME, got 'mine'"),
        (["run", "--label", "other=mine"], 2, "--label other=mine: other is not among the runs"),
        (["run", "--output", "run/config.json"], 2, "--output run/config.json: is a file; expected a folder"),
        (["run", "--data", "nowhere"], 3, "nowhere"),
        (["run", "--data", ".", "--clips", "0"], 2, "--clips 0: expected at least one clip"),
    ],
)
def test_what_the_command_refuses(
    make_run: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    make_run("run")
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith("sparsify: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report" / "index.html").exists()


def test_a_broken_cache_is_begun_anew(make_run: Make, tmp_path: Path) -> None:
    run = make_run("run")
    first = report(tmp_path, run)
    (tmp_path / "report" / "cost.json").write_text("{", encoding="utf-8")
    assert report(tmp_path, run) == first
    assert json.loads((tmp_path / "report" / "cost.json").read_text())
