"""The key subset: which samples a run kept coming back to, by the ids it kept in each epoch.

Diao et al., ACL 2025 (arXiv 2506.01319): epochs are taken in groups, a sample counts once for every epoch
of a group that kept it, earlier groups weigh more, and the samples with the highest sums are the key subset.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from functools import cache
from numbers import Real
from operator import index

__all__ = ["key_scores", "select_key_subset"]


def select_key_subset(records: Iterable[Iterable[int]], size: int, group: int = 5, decay: float = 0.618) -> list[int]:
    """The ``size`` ids that the epochs of a run kept most, best first.

    ``score(i) = sum over g of decay^(g-1) * group / len(g) * #{epochs of group g that kept i}``, where group g = 1, 2,
    ... are ``group`` consecutive epochs and the last one may be shorter. Scores are compared exactly, ``decay`` being
    taken as the decimal number it is written as; ties go to the lower id.

    Args:
        records: for each epoch, in order, the ids of the samples that it kept; an id named twice counts once.
        size: how many ids, at least 0.
        group: epochs a group.
        decay: weight of a group relative to the one before it.

    Returns:
        A list of ``size`` ids.

    Raises:
        ValueError: ``size`` is more than the number of ids that any epoch kept; an argument is out of its range.
        TypeError: an argument, or an id, is of the wrong type.
    """
    size = _integer("size", size, least=0)
    scores = key_scores(records, group, decay)
    if size > len(scores):
        raise ValueError(
            f"select_key_subset: size must be at most {len(scores)}, the ids kept in any epoch, got {size}"
        )
    return sorted(scores, key=lambda i: (-scores[i], i))[:size]


def key_scores(records: Iterable[Iterable[int]], group: int = 5, decay: float = 0.618) -> dict[int, Fraction]:
    """The score of every id that an epoch kept; arguments and errors as ``select_key_subset``."""
    group = _integer("group", group, least=1)
    if not isinstance(decay, Real) or isinstance(decay, bool):
        raise TypeError(f"select_key_subset: decay must be a number, got {type(decay).__name__}")
    if not math.isfinite(decay) or decay < 0:
        raise ValueError(f"select_key_subset: decay must be a finite number of at least 0, got {decay}")
    epochs = _epochs(records)
    groups = [epochs[start : start + group] for start in range(0, len(epochs), group)]
    factor = Fraction(str(float(decay)))
    weights = [factor**place * Fraction(group, len(members)) for place, members in enumerate(groups)]
    counts: dict[int, list[int]] = {}
    for place, members in enumerate(groups):
        for kept in members:
            for i in kept:
                counts.setdefault(i, [0] * len(groups))[place] += 1

    @cache  # thousands of ids share a few patterns of counts
    def total(pattern: tuple[int, ...]) -> Fraction:
        return sum((count * weight for count, weight in zip(pattern, weights, strict=True)), Fraction(0))

    return {i: total(tuple(pattern)) for i, pattern in counts.items()}


def _epochs(records: Iterable[Iterable[int]]) -> list[set[int]]:
    if not isinstance(records, Iterable):
        raise TypeError(
            "select_key_subset: records must be an iterable with one iterable of ids an epoch, "
            f"got {type(records).__name__}"
        )
    epochs = []
    for epoch, kept in enumerate(records):
        if not isinstance(kept, Iterable):
            raise TypeError(
                f"select_key_subset: records[{epoch}] must be an iterable of integer ids, got {type(kept).__name__}"
            )
        epochs.append({_id(epoch, i) for i in kept})
    return epochs


def _id(epoch: int, value: object) -> int:
    try:
        if not isinstance(value, bool):
            return index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise TypeError(f"select_key_subset: records[{epoch}] must hold integer ids, got {type(value).__name__}")


def _integer(name: str, value: object, least: int) -> int:
    try:
        number = None if isinstance(value, bool) else index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"select_key_subset: {name} must be an integer, got {type(value).__name__}")
    if number < least:
        raise ValueError(f"select_key_subset: {name} must be at least {least}, got {number}")
    return number
