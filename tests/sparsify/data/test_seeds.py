from __future__ import annotations

import pytest

from sparsify.data.seeds import mask_seed

TABLE = [
    ((0, 0, "00003491", "visual", 0), 8301985443156756919),
    ((0, 0, "00003491", "audio", 0), 4470426035754600316),
    ((0, 0, "00003491", "visual", 1), 3873490825513619877),
    ((0, 1, "00003491", "visual", 0), 3102070497493790294),
    ((1, 0, "00003491", "visual", 0), 7025284921379533709),
    ((1099511627776, 14, "ü 7", "audio", 5), 1492631896792745458),
]


@pytest.mark.parametrize(("what", "seed"), TABLE)
def test_the_layout_never_changes(what: tuple[int, int, str, str, int], seed: int) -> None:
    assert mask_seed(*what) == seed


def test_seeds_differ_and_stay_in_range() -> None:
    seeds = {
        mask_seed(run, epoch, video, modality, index)
        for run in (0, 1)
        for epoch in range(12)
        for video in ("1", "11", "1 1")
        for modality in ("visual", "audio")
        for index in range(12)
    }
    assert len(seeds) == 2 * 12 * 3 * 2 * 12
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    assert max(seeds) > 2**62  # not a 32-bit hash


def test_another_modality_is_refused() -> None:
    with pytest.raises(ValueError, match="'visual' or 'audio', got 'mel'"):
        mask_seed(0, 0, "1", "mel", 0)
