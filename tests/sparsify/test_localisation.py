"""Whether scores rank sounding players above the background: literal scenes, and a rank statistic counted by hand."""

from __future__ import annotations

import pytest

from sparsify.errors import DataError
from sparsify.report.localisation import Localisation, frame_auc, label_cells, read_scenes

SCENE = {
    "size": 128,
    "players": [
        {"box": [0, 64, 32, 128], "hidden": False, "voice": {"sounding": [[0.0, 2.0]]}},
        {"box": [64, 64, 96, 128], "hidden": False, "voice": None},
        {"box": [96, 64, 128, 128], "hidden": True, "voice": {"sounding": [[0.0, 4.0]]}},
    ],
}


def test_cells_of_a_sounding_player_count_only_while_it_sounds() -> None:
    before = [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, -1, -1, 1, 0, -1, -1]
    assert label_cells(SCENE, 1.0, 4) == before
    after = [0, 0, 0, 0, 0, 0, 0, 0, -1, 0, -1, -1, -1, 0, -1, -1]
    assert label_cells(SCENE, 2.5, 4) == after


def test_a_cell_that_a_box_only_grazes_is_neither() -> None:
    scene = {"size": 64, "players": [{"box": [0, 0, 40, 32], "hidden": False, "voice": {"sounding": [[0, 9]]}}]}
    assert label_cells(scene, 1.0, 2) == [1, 1, 0, 0]
    scene["players"][0]["box"] = [0, 0, 39, 32]  # 7 of 32 columns: under a quarter
    assert label_cells(scene, 1.0, 2) == [1, -1, 0, 0]


def test_auc_counts_pairs_and_halves_ties() -> None:
    # sounding 3, 1; background 1, 0: wins 1 + 1 + 0.5 + 1 of 4
    assert frame_auc([3.0, 1.0, 1.0, 0.0, 99.0], [1, 1, 0, 0, -1]) == pytest.approx(3.5 / 4)
    assert frame_auc([1.0, 2.0], [1, 1]) is None
    assert frame_auc([1.0, 2.0], [0, -1]) is None


def test_other_data_sets_have_no_scenes(tmp_path) -> None:
    with pytest.raises(DataError, match=r"scenes\.jsonl: missing"):
        read_scenes(tmp_path, "test")


def test_the_sentence_names_what_was_counted() -> None:
    text = Localisation(0.75, 1200, 300, 0.4, 0.1).text()
    assert "AUC 0.750 over 1,200 frames of 300 videos" in text
    assert "40.0 % of sounding" in text
