"""Masked encoders against the libraries' own modules, whose attention is kept from masked tokens by hooks."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from masked_cases import Case, as_grid, draw, gradients, make, oracle, ours, planned, randomised
from masked_oracle import kept_tokens
from torch import Tensor

from sparsify.config import AudioConfig, VisionConfig
from sparsify.model.audio import build_htsat
from sparsify.model.masked import MaskedHTSAT, MaskedSwinV2
from sparsify.model.plan import UnitPlan
from sparsify.model.vision import build_swin
from sparsify_kernels._checks import InvalidValue
from sparsify_kernels.testing import assert_accurate

# Uniform windows; windows that units straddle, as of 12 tokens at 192 px and of 24 at 384; odd grids; one large unit.
GEOMETRIES = [(64, 4, 16), (96, 6, 16), (96, 12, 32), (96, 3, 16), (64, 4, 32)]


MASKS = [
    pytest.param(geometry, keep, stratified, id=f"{'-'.join(map(str, geometry))}-{keep}-{stratified}")
    for geometry in GEOMETRIES
    for keep in (0.25, 0.5, 0.75, 1.0)
    for stratified in (True, False)
    if not stratified or (keep < 1 and geometry[0] // geometry[2] % 2 == 0)  # a part of every 2 x 2 units
]


@pytest.mark.parametrize(("geometry", "keep", "stratified"), MASKS)
@pytest.mark.parametrize("name", ["swin", "htsat"])
def test_kept_tokens_and_gradients_are_the_librarys(name, geometry, keep, stratified):
    if name == "htsat" and geometry[1] == 12:
        geometry = (192, 12, 32)  # 48, 24 and 12 tokens: the library's windows may not outgrow a grid
    case = make(name, *geometry)
    kept = draw(case, keep, stratified)
    found, expected = ours(case, kept), oracle(case, kept)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    if keep < 1:
        blind = kept_tokens(as_grid(case), kept)
        assert (expected - blind).abs().max() > 1e-3, "the mask must matter, or this proves nothing"
    for a, b in zip(gradients(case, found), gradients(case, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["swin", "htsat"])
def test_images_may_keep_different_numbers_of_units_and_none(name):
    case = make(name, 64, 4, 16)
    kept = draw(case, 0.5, False)
    kept[0] = False
    kept[1, 2] = True
    torch.testing.assert_close(ours(case, kept), oracle(case, kept), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "size", "window", "unit"), [("swin", 192, 12, 32), ("swin", 384, 24, 32)])
def test_published_geometries_at_full_size(name, size, window, unit):
    """192 px with windows of 12, as LAVisH and DG-SCT use, and 384 px with windows of 24: four stages."""
    torch.manual_seed(0)
    config = VisionConfig(
        image_size=size, window_size=window, unit=unit, embed_dim=8, depths=(1, 2, 1, 1), heads=(1, 1, 2, 2)
    )
    swin = build_swin(config).double()
    with torch.no_grad():
        for p in swin.parameters():
            if p.ndim <= 1:
                p.copy_(0.5 * torch.randn_like(p))
    case = Case(swin, MaskedSwinV2(swin, unit), torch.randn(1, 3, size, size).double())
    for stratified in (True, False):
        kept = draw(case, 0.5, stratified)
        torch.testing.assert_close(ours(case, kept), oracle(case, kept), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("keep", "stratified"), [(0.5, True), (0.25, False)])
def test_gradients_of_windows_of_24_made_from_windows_of_12(keep, stratified):
    """384 px, as timm's swinv2_*_window12to24: log-spaced coordinates are those of the windows before."""
    torch.manual_seed(0)
    config = VisionConfig(
        image_size=384, window_size=24, pretrained_windows=(12, 12, 12, 6), embed_dim=8, depths=(2, 2, 2, 2),
        heads=(1, 1, 2, 2),
    )  # fmt: skip
    swin = randomised(build_swin(config)).double()
    case = Case(swin, MaskedSwinV2(swin, 32), torch.randn(1, 3, 384, 384).double())
    kept = draw(case, keep, stratified)
    found, expected = ours(case, kept), oracle(case, kept)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(case, found), gradients(case, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["swin", "htsat"])
def test_as_accurate_as_the_library_in_single_and_half(name, dtype):
    truth, case = make(name, 96, 6, 16), make(name, 96, 6, 16)
    case.library.to(dtype)
    compare(truth, case, truth.images.to(dtype), None)


def compare(truth: Case, case: Case, images: Tensor, autocast: torch.dtype | None) -> None:
    """Each kind of parameter, over blocks and six masks together: the library may hit a few numbers by luck."""
    names = ["output", *(key for key, _ in case.library.named_parameters())]
    kinds = [re.sub(r"^layers\.\d+\.(blocks\.\d+\.)?", "", key) for key in names]
    # One projection, as Swin-V2's is: alone, the true gradient of a key bias is 0, and those of queries cancel.
    kinds = [re.sub("(query|key|value).*", "qkv", kind) for kind in kinds]
    results: list[list[list[Tensor]]] = [[], [], []]
    for seed in range(6):
        kept = draw(truth, 0.5, True, seed)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            runs = ours(case, kept, images), oracle(case, kept, images), oracle(truth, kept)
        if images.dtype == torch.float32 and autocast is None:
            assert (runs[0] - runs[2]).norm() / runs[2].norm() < 1e-5
        for result, owner, out in zip(results, (case, case, truth), runs, strict=True):
            result.append([out.detach(), *gradients(owner, out)])
    for kind in sorted(set(kinds)):
        found, eager, expected = (
            torch.cat([x.flatten() for draw in result for x, k in zip(draw, kinds, strict=True) if k == kind])
            for result in results
        )
        assert_accurate(found, eager=eager, truth=expected, what=kind)


@pytest.mark.parametrize("name", ["swin", "htsat"])
def test_under_autocast_as_accurate_as_the_library(name):
    """As a model is trained in bf16: parameters and their gradients in fp32."""
    truth, case = make(name, 96, 6, 16), make(name, 96, 6, 16, torch.float32)
    compare(truth, case, truth.images.float(), torch.bfloat16)


PUBLISHED = [
    ("swinv2_tiny_window8_256", ()),
    ("swinv2_small_window8_256", ()),
    ("swinv2_base_window8_256", ()),
    ("HTS-AT tiny", (96, (2, 2, 6, 2))),
    ("HTS-AT base", (128, (2, 2, 12, 2))),
]


def published(name: str, size: tuple) -> Case:
    """Swin-V2-T, -S and -B as timm names them, HTS-AT in its two sizes, and one image at 256 px, in fp32."""
    import timm

    torch.manual_seed(0)
    if size:
        config = AudioConfig(embed_dim=size[0], depths=size[1])
        library, wrapper, channels = build_htsat(config), MaskedHTSAT, 1
    else:
        library, wrapper, channels = timm.create_model(name, num_classes=0), MaskedSwinV2, 3
    randomised(library)
    return Case(library.eval(), wrapper(library, 32), torch.randn(1, channels, 256, 256))


@pytest.mark.parametrize(("name", "size"), PUBLISHED)
def test_published_encoders(name, size):
    case = published(name, size)
    kept = draw(case, 0.5, True)
    with torch.no_grad():
        found, expected = ours(case, kept), oracle(case, kept)
    assert found.shape == (32, case.library.num_features)
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), PUBLISHED)
def test_gradients_of_published_encoders(name, size):
    case = published(name, size)
    case.library.double()
    case = case._replace(images=case.images.double())
    kept = draw(case, 0.5, True)
    found, expected = ours(case, kept), oracle(case, kept)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(case, found), gradients(case, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["swin", "htsat"])
def test_a_plan_moved_by_one_position_is_seen(name):
    case = make(name, 64, 4, 16)
    kept = draw(case, 0.5, True)
    plan, units = planned(case, kept, case.images)
    expected = oracle(case, kept)
    reached: set[str] = set()
    for field, move in (
        ("place", lambda w: w.place ^ 1),  # neighbours change places
        ("member", lambda w: w.member.roll(1)),
        ("start", lambda w: torch.cat([w.start[:1], (w.start[1:-1] + 1).clamp(max=len(w.member)), w.start[-1:]])),
        ("region", lambda w: 1 - (w.region > 4).long()),
    ):
        fits = {cut: w for cut, w in plan.windows.items() if getattr(w, field) is not None}
        for cuts in ([*fits], *([cut] for cut in fits)):  # all together, and each by itself
            wrong = {**plan.windows, **{cut: fits[cut]._replace(**{field: move(fits[cut])}) for cut in cuts}}
            try:
                moved = case.masked(units, UnitPlan(plan.image, plan.unit, plan.images, plan.grid, wrong))
            except InvalidValue:  # of the op: two tokens at one place
                continue
            reached.add(field)
            # One cut of many moves less: still ten thousand times what the two may differ by.
            least = 1e-3 if len(cuts) == len(fits) else 1e-6
            assert (moved - expected).abs().max() > least, f"{field} of {cuts} has no effect"
    assert {"place", "member", "region"} <= reached


def test_an_image_does_not_depend_on_the_others():
    case = make("swin", 64, 4, 16)
    kept = draw(case, 0.5, True)
    together = ours(case, kept)
    alone = ours(case, kept[1:2], case.images[1:2])
    torch.testing.assert_close(together[len(alone) : 2 * len(alone)], alone, rtol=1e-12, atol=1e-12)


def test_the_oracle_knows_nothing_of_the_masked_encoders():
    tree = ast.parse((Path(__file__).resolve().parents[2] / "oracles" / "masked_oracle.py").read_text(encoding="utf-8"))
    imported = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    imported += [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
    assert "torch" in imported
    assert not [name for name in imported if name.startswith("sparsify")]


def test_the_example_of_the_docs_runs():
    page = (Path(__file__).resolve().parents[3] / "docs" / "masked_encoders.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0].replace("pretrained=True", "pretrained=False")
    names: dict[str, object] = {}
    with torch.no_grad():
        exec(code, names)
    assert names["tokens"].shape == (4 * 32, 768)
