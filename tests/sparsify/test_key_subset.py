"""The key subset of a run: literal tables of how epochs are counted, weighted and ranked, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sparsify.training import select_key_subset


def test_the_score_is_the_count_of_a_group_weighted_by_its_place() -> None:
    """Two groups of two epochs, decay 1/2:

    id  group 1  group 2  score
     7     2        0      2
     3     1        2      2      a tie: the lower id is first
     5     1        1      1.5
     9     0        2      1
    """
    records = [[7, 3], [7, 5], [3, 9, 5], [3, 9]]
    assert select_key_subset(records, 4, group=2, decay=0.5) == [3, 7, 5, 9]


def test_the_defaults_are_the_paper_s_groups_of_five_and_0_618() -> None:
    """15 epochs. Kept in all of group 1: 5. In all of groups 2 and 3: 5 * (0.618 + 0.381924) = 4.99962, just less. In
    four of group 1 and two of group 2: 4 + 1.236 = 5.236. In two of group 3: 0.763848."""
    kept = {1: range(5), 2: range(5, 15), 3: [0, 1, 2, 3, 8, 9], 4: [13, 14]}
    records = [[i for i, epochs in kept.items() if epoch in epochs] for epoch in range(15)]
    assert select_key_subset(records, 4) == [3, 1, 2, 4]


def test_a_short_last_group_counts_as_if_it_were_whole() -> None:
    """Seven epochs: the last group has two, scaled by 5/2. id 2: 1 * 5/2 = 2.5 beats id 1's two of the first five."""
    records = [[1], [1], [], [], [], [2], [8]]
    assert select_key_subset(records, 3, decay=1.0) == [2, 8, 1]
    assert select_key_subset(records, 3, decay=0.618) == [1, 2, 8]  # 2.5 * 0.618 = 1.545


def test_one_short_group_alone() -> None:
    assert select_key_subset([[4, 2], [2]], 2) == [2, 4]


def test_scores_that_are_equal_on_paper_are_equal() -> None:
    """Once in group 1 and ten times in group 2 at a tenth; 0.1 is no binary fraction. So three thirds."""
    assert select_key_subset([[1], *[[]] * 9, *[[2]] * 10], 2, group=10, decay=0.1) == [1, 2]
    assert select_key_subset([[9], [9], [9], [9], [9], [1], [1], [1]], 2, group=5, decay=1.0) == [1, 9]


def test_ids_that_were_never_kept_are_no_candidates() -> None:
    records = [[10, 12], [12]]
    assert select_key_subset(records, 2) == [12, 10]
    with pytest.raises(
        ValueError, match=r"select_key_subset: size must be at most 2, the ids kept in any epoch, got 3"
    ):
        select_key_subset(records, 3)
    with pytest.raises(ValueError, match="at most 0"):
        select_key_subset([], 1)
    assert select_key_subset([], 0) == []


def test_an_epoch_keeps_an_id_once_however_often_it_is_named() -> None:
    assert select_key_subset([[5, 5, 5], [3], [3]], 2) == [3, 5]


def test_any_integers_in_any_iterable_and_beyond_what_a_half_or_float_holds() -> None:
    big = 2**40 + 20001
    records = [np.array([big, 3]), torch.tensor([big, big - 1]), (i for i in [big - 1]), {big}]
    chosen = select_key_subset(iter(records), 3)
    assert chosen == [big, big - 1, 3]
    assert all(type(i) is int for i in chosen)


def test_the_order_in_which_an_epoch_names_its_ids_does_not_matter() -> None:
    generator = np.random.default_rng(0)
    records = [generator.choice(200, 90, replace=False).tolist() for _ in range(12)]
    shuffled = [generator.permutation(record).tolist() for record in records]
    assert select_key_subset(records, 150) == select_key_subset(shuffled, 150)
    assert select_key_subset(records, 20) == select_key_subset(records, 150)[:20]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": -1}, ValueError, "size must be at least 0, got -1"),
        ({"size": 1.0}, TypeError, "size must be an integer, got float"),
        ({"size": True}, TypeError, "size must be an integer, got bool"),
        ({"group": 0}, ValueError, "group must be at least 1, got 0"),
        ({"group": 2.5}, TypeError, "group must be an integer, got float"),
        ({"decay": -0.5}, ValueError, "decay must be a finite number of at least 0, got -0.5"),
        ({"decay": math.nan}, ValueError, "decay must be a finite number of at least 0, got nan"),
        ({"decay": "half"}, TypeError, "decay must be a number, got str"),
        ({"records": [[1], 2]}, TypeError, r"records\[1\] must be an iterable of integer ids, got int"),
        ({"records": [[1], [2.0]]}, TypeError, r"records\[1\] must hold integer ids, got float"),
        ({"records": [[True]]}, TypeError, r"records\[0\] must hold integer ids, got bool"),
        ({"records": 5}, TypeError, "records must be an iterable with one iterable of ids an epoch, got int"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"select_key_subset: {message}"):
        select_key_subset(**{"records": [[1]], "size": 1} | options)
