"""The plan of kept units: literal tables, and a plain loop over tokens for the rest."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from sparsify.model.plan import Cut, UnitPlan
from sparsify_kernels import window_attention


def plan_of(image, unit, *, images, grid, cuts):
    return UnitPlan.of(torch.tensor(image), torch.tensor(unit), images=images, grid=grid, cuts=cuts)


def test_the_plan_of_the_docstring():
    """Two units of 2 x 2 tokens, at opposite corners of a 4 x 4 grid that is one window."""
    cut, shifted = Cut(2, 4, 0), Cut(2, 4, 2)
    windows = plan_of([0, 0], [0, 3], images=1, grid=2, cuts=[cut, shifted]).windows
    assert windows[cut].member.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert windows[cut].start.tolist() == [0, 8]
    assert windows[cut].place.tolist() == [0, 1, 4, 5, 10, 11, 14, 15]
    assert windows[cut].region is None
    assert windows[shifted].member.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    assert windows[shifted].place.tolist() == [0, 1, 4, 5, 10, 11, 14, 15]
    assert windows[shifted].region.tolist() == [4, 4, 4, 4, 8, 8, 8, 8]


def test_windows_smaller_than_a_unit_and_windows_of_no_token():
    """Image 1 alone keeps a unit: its lower left one, of 2 x 2 tokens, in windows of one token."""
    cut = Cut(2, 1, 0)
    windows = plan_of([1], [2], images=2, grid=2, cuts=[cut]).windows[cut]
    assert windows.member.tolist() == [0, 1, 2, 3]
    assert windows.place.tolist() == [0, 0, 0, 0]
    held = [b - a for a, b in zip(windows.start.tolist(), windows.start.tolist()[1:], strict=False)]
    assert held == [0] * 16 + [0] * 8 + [1, 1, 0, 0, 1, 1, 0, 0]


def test_regions_of_a_shifted_grid():
    """3 x 3 units of one token, windows of 3 shifted by 1: the first row and column come from over the edge."""
    cut = Cut(1, 3, 1)
    windows = plan_of([0] * 9, list(range(9)), images=1, grid=3, cuts=[cut]).windows[cut]
    assert windows.member.tolist() == [4, 5, 3, 7, 8, 6, 1, 2, 0]
    assert windows.place.tolist() == list(range(9))
    assert windows.region.tolist() == [4, 4, 5, 4, 4, 5, 7, 7, 8]


def test_cells_of_two_units():
    plan = plan_of([0, 0], [0, 3], images=1, grid=2, cuts=[])
    assert plan.cells(1).tolist() == [[0], [3]]
    assert plan.cells(2).tolist() == [[0, 1, 4, 5], [10, 11, 14, 15]]


@pytest.mark.parametrize(
    ("grid", "cut"),
    [
        (4, Cut(4, 4, 0)),
        (4, Cut(4, 4, 2)),
        (4, Cut(2, 4, 2)),
        (4, Cut(1, 4, 0)),
        (6, Cut(8, 12, 6)),
        (6, Cut(2, 12, 6)),
        (6, Cut(1, 6, 0)),
        (3, Cut(4, 6, 1)),
        (6, Cut(4, 3, 2)),
    ],
)
def test_against_a_loop_over_tokens(grid, cut):
    generator = torch.Generator().manual_seed(grid + 10 * cut.unit + cut.shift)
    image, unit = (torch.rand(3, grid * grid, generator=generator) < 0.6).nonzero(as_tuple=True)
    plan = UnitPlan.of(image, unit, images=3, grid=grid, cuts=[cut])
    side, across = grid * cut.unit, grid * cut.unit // cut.window
    held: dict[int, list[tuple[int, int, int]]] = {}
    token = 0
    for b, number in zip(image.tolist(), unit.tolist(), strict=True):
        for y in range(cut.unit):
            for x in range(cut.unit):
                r = (number // grid * cut.unit + y - cut.shift) % side
                c = (number % grid * cut.unit + x - cut.shift) % side
                region = 3 * sum(r >= side - e for e in (cut.window, cut.shift))
                region += sum(c >= side - e for e in (cut.window, cut.shift))
                window = (b * across + r // cut.window) * across + c // cut.window
                place = r % cut.window * cut.window + c % cut.window
                held.setdefault(window, []).append((place, token, region))
                token += 1
    rows = [sorted(held.get(w, [])) for w in range(3 * across * across)]
    windows = plan.windows[cut]
    assert windows.start.tolist() == [sum(len(row) for row in rows[:w]) for w in range(len(rows) + 1)]
    assert windows.member.tolist() == [token for row in rows for _, token, _ in row]
    assert windows.place.tolist() == [place for row in rows for place, _, _ in row]
    if cut.shift:
        assert windows.region.tolist() == [region for row in rows for _, _, region in row]
    else:
        assert windows.region is None


def test_a_plan_splits_into_the_plans_of_its_parts():
    cuts = [Cut(2, 4, 0), Cut(2, 4, 2), Cut(1, 2, 1)]
    image, unit = [0, 0, 1, 2, 2, 2], [0, 5, 15, 1, 2, 12]
    first, second = plan_of(image, unit, images=4, grid=4, cuts=cuts).split(2, 3)
    for part, expected in (
        (first, plan_of([0, 0, 1], [0, 5, 15], images=2, grid=4, cuts=cuts)),
        (second, plan_of([0, 0, 0], [1, 2, 12], images=2, grid=4, cuts=cuts)),
    ):
        assert part.images == 2
        assert torch.equal(part.image, expected.image)
        assert torch.equal(part.unit, expected.unit)
        for cut in cuts:
            for ours, theirs in zip(part.windows[cut], expected.windows[cut], strict=True):
                assert (ours is None) == (theirs is None)
                assert ours is None or torch.equal(ours, theirs)


def test_a_stratified_mask_fills_unshifted_windows_alike():
    """Two of every 2 x 2 units: windows of 8 over 8 x 8 units hold 32 of 64 tokens in each stage but the first."""
    rows = torch.tensor([[0, 3], [1, 2], [0, 1], [2, 3]]).repeat(4, 1)  # of each of the 16 blocks
    block = torch.arange(16).unsqueeze(1)
    units = ((block // 4 * 2 + rows // 2) * 8 + block % 4 * 2 + rows % 2).flatten().sort().values
    cuts = [Cut(8, 8, 0), Cut(4, 8, 0), Cut(2, 8, 0), Cut(1, 8, 0)]
    plan = UnitPlan.of(torch.zeros_like(units), units, images=1, grid=8, cuts=cuts)
    assert set(plan.windows[cuts[0]].start.diff().tolist()) == {0, 64}
    for cut in cuts[1:]:
        assert set(plan.windows[cut].start.diff().tolist()) == {32}


def test_windows_must_tile_the_grid():
    with pytest.raises(ValueError, match="windows of 5 tokens must tile a grid of 8 x 8"):
        plan_of([0], [0], images=1, grid=4, cuts=[Cut(2, 5, 0)])


WRONG = [([0, 0], [1, 4]), ([0, 0], [-1, 2]), ([0, 2], [0, 0]), ([-1, 0], [0, 0]), ([1, 0], [0, 0]), ([0, 0], [2, 2])]
NAMES = ["unit above", "unit below", "image above", "image below", "images that descend", "one unit twice"]


@pytest.mark.parametrize(("image", "unit"), WRONG, ids=NAMES)
def test_wrong_numbers_are_refused(image, unit):
    """Not wrapped around: unit 4 of 2 x 2 would be unit 0."""
    with pytest.raises(
        ValueError, match=r"image in \[0, 2\), ascending, and unit in \[0, 4\), .* got image \[.*\], unit \["
    ):
        plan_of(image, unit, images=2, grid=2, cuts=[Cut(2, 4, 2)])


SHIFTED = Cut(2, 4, 2)


def attend(image: torch.Tensor, unit: torch.Tensor, images: int, cut: Cut = SHIFTED) -> torch.Tensor:
    windows = UnitPlan.of(image, unit, images=images, grid=2, cuts=[cut]).windows[cut]
    qkv = torch.arange(len(windows.member) * 3, dtype=torch.float32).view(-1, 3, 1, 1)
    return window_attention(qkv, torch.zeros(1, 7, 7), windows)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("image", "unit"), WRONG, ids=NAMES)
def test_wrong_numbers_are_refused_in_the_end_where_they_are_not_read(image, unit, backend):
    """A compiled plan has no window, whatever came; window_attention, which looks, refuses it."""
    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    right = torch.tensor([0, 1]), torch.tensor([3, 0])
    torch.testing.assert_close(compiled(*right, 2), attend(*right, 2))
    with pytest.raises(RuntimeError, match="window_attention: "):
        compiled(torch.tensor(image), torch.tensor(unit), 2)


def test_a_wrong_unit_of_one_token_is_refused_where_it_is_not_read():
    """Its one token would make a whole window, wherever it stands."""
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="window_attention: "):
        compiled(torch.tensor([0]), torch.tensor([4]), 1, Cut(1, 2, 0))


def test_another_batch_size_is_compiled_once():
    counter = CompileCounter()
    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    for images in (2, 3, 4, 5):
        numbers = torch.arange(images)
        torch.testing.assert_close(compiled(numbers, numbers % 4, images), attend(numbers, numbers % 4, images))
    assert counter.frame_count == 2  # the first size, and any


def test_the_plan_waits_for_no_value():
    """Under fake tensors, which have no values to wait for."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        image, unit = torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)
        plan = UnitPlan.of(image, unit, images=3, grid=4, cuts=[Cut(2, 4, 2)])
        assert plan.windows[Cut(2, 4, 2)].start.shape == (13,)
        assert plan.split(1, 2)[1].cells(2).shape == (4, 4)
