"""Masked encoders against the libraries' own modules, whose attention is kept from masked tokens by hooks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from masked_oracle import htsat_oracle, kept_tokens, swin_oracle
from torch import Tensor, nn

from sparsify.config import AudioConfig, VisionConfig
from sparsify.data.units import to_units
from sparsify.model.audio import build_htsat
from sparsify.model.masked import MaskedHTSAT, MaskedSwinV2
from sparsify.model.plan import UnitPlan
from sparsify.model.vision import build_swin
from sparsify_kernels import random_mask
from sparsify_kernels.testing import assert_accurate

SMALL = {"patch_size": 4, "embed_dim": 8, "depths": (2, 2, 2), "heads": (1, 2, 2)}


class Case(NamedTuple):
    """An encoder of the library, the masked one around it, and images [B, C, H, W]."""

    library: nn.Module
    masked: MaskedSwinV2 | MaskedHTSAT
    images: Tensor


def make(name: str, size: int, window: int, unit: int, dtype: torch.dtype = torch.float64, images: int = 3) -> Case:
    torch.manual_seed(size + window)
    if name == "swin":
        library = build_swin(VisionConfig(image_size=size, window_size=window, unit=unit, **SMALL))
    else:
        library = build_htsat(AudioConfig(spec_size=size, mel_bins=size // 2, window_size=window, unit=unit, **SMALL))
    with torch.no_grad():
        for key, p in library.named_parameters():
            if p.ndim <= 1 or key.endswith("relative_position_bias_table"):
                p.copy_(0.5 * torch.randn_like(p))  # norms and tables start at values that hide mistakes
            if "cpb_mlp" in key or "qkv.weight" in key or (".self." in key and p.ndim == 2):
                p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5 * 2)  # attention that makes a difference
    library = library.to(dtype)
    wrapper = MaskedSwinV2 if name == "swin" else MaskedHTSAT
    return Case(library, wrapper(library, unit), torch.randn(images, 3 if name == "swin" else 1, size, size).to(dtype))


def draw(case: Case, keep: float, stratified: bool, seed: int = 1) -> Tensor:
    """bool [B, grid, grid]: another mask for each image."""
    grid = case.masked.grid
    units = torch.arange(grid * grid).expand(len(case.images), -1).unsqueeze(-1)
    index = random_mask(units, keep, seed=seed, grid=(grid, grid) if stratified else None, stratified=stratified).index
    kept = torch.zeros(len(case.images), grid * grid, dtype=torch.bool).scatter(1, index, True)
    return kept.unflatten(1, (grid, grid))


def ours(case: Case, kept: Tensor, images: Tensor | None = None) -> Tensor:
    plan, units = planned(case, kept, case.images if images is None else images)
    return case.masked(units, plan)


def planned(case: Case, kept: Tensor, images: Tensor) -> tuple[UnitPlan, Tensor]:
    unit = images.shape[-1] // case.masked.grid
    image, number = kept.flatten(1).nonzero(as_tuple=True)
    units = to_units(images, unit)[image, number].unflatten(1, (images.shape[1], unit, unit))
    return case.masked.plan(image, number, len(images)), units


def oracle(case: Case, kept: Tensor, images: Tensor | None = None) -> Tensor:
    run = swin_oracle if isinstance(case.masked, MaskedSwinV2) else htsat_oracle
    return kept_tokens(run(case.library, case.images if images is None else images, kept), kept)


def gradients(case: Case, out: Tensor) -> list[Tensor]:
    parameters = [p for key, p in case.library.named_parameters() if "batch_norm" not in key]
    torch.manual_seed(7)
    return list(torch.autograd.grad((out * torch.randn(out.shape).to(out)).sum(), parameters))


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


def as_grid(case: Case) -> Tensor:
    everything = torch.ones(len(case.images), case.masked.grid, case.masked.grid, dtype=torch.bool)
    return (swin_oracle if isinstance(case.masked, MaskedSwinV2) else htsat_oracle)(
        case.library, case.images, everything
    )


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["swin", "htsat"])
def test_as_accurate_as_the_library_in_single_and_half(name, dtype):
    """Each kind of parameter, over blocks and six masks together: the library may hit a few numbers by luck."""
    truth, case = make(name, 96, 6, 16), make(name, 96, 6, 16)
    case.library.to(dtype)
    images = truth.images.to(dtype)
    names = ["output", *(key for key, _ in case.library.named_parameters() if "batch_norm" not in key)]
    kinds = [re.sub(r"^layers\.\d+\.(blocks\.\d+\.)?", "", key) for key in names]
    # One projection, as Swin-V2's is: alone, the true gradient of a key bias is 0, and those of queries cancel.
    kinds = [re.sub("(query|key|value).*", "qkv", kind) for kind in kinds]
    results: list[list[list[Tensor]]] = [[], [], []]
    for seed in range(6):
        kept = draw(truth, 0.5, True, seed)
        runs = ours(case, kept, images), oracle(case, kept, images), oracle(truth, kept)
        if dtype == torch.float32:
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
    truth, case = make(name, 96, 6, 16), make(name, 96, 6, 16, torch.float32)
    kept = [draw(truth, 0.5, True, seed) for seed in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.stack([ours(case, mask, truth.images.float()).float() for mask in kept])
        eager = torch.stack([oracle(case, mask, truth.images.float()).float() for mask in kept])
    assert_accurate(found, eager=eager, truth=torch.stack([oracle(truth, mask) for mask in kept]))


PUBLISHED = [
    ("swinv2_tiny_window8_256", ()),
    ("swinv2_small_window8_256", ()),
    ("swinv2_base_window8_256", ()),
    ("HTS-AT tiny", (96, (2, 2, 6, 2))),
    ("HTS-AT base", (128, (2, 2, 12, 2))),
]


@pytest.mark.parametrize(("name", "size"), PUBLISHED)
def test_published_encoders(name, size):
    """Swin-V2-T, -S and -B as timm names them, HTS-AT in its two sizes: one image at 256 px, in fp32."""
    import timm

    torch.manual_seed(0)
    if size:
        config = AudioConfig(embed_dim=size[0], depths=size[1])
        library, wrapper, channels = build_htsat(config), MaskedHTSAT, 1
    else:
        library, wrapper, channels = timm.create_model(name, num_classes=0), MaskedSwinV2, 3
    with torch.no_grad():
        for key, p in library.named_parameters():
            if p.ndim <= 1 and "norm" in key:
                p.normal_()
    case = Case(library.eval(), wrapper(library, 32), torch.randn(1, channels, 256, 256))
    kept = draw(case, 0.5, True)
    with torch.no_grad():
        found, expected = ours(case, kept), oracle(case, kept)
    assert found.shape == (32, library.num_features)
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("name", ["swin", "htsat"])
def test_a_plan_moved_by_one_position_is_seen(name):
    case = make(name, 64, 4, 16)
    kept = draw(case, 0.5, True)
    plan, units = planned(case, kept, case.images)
    expected = oracle(case, kept)
    for field, move in (
        ("place", lambda w: w.place ^ 1),  # neighbours change places
        ("member", lambda w: w.member.roll(1)),
        ("start", lambda w: torch.cat([w.start[:1], (w.start[1:-1] + 1).clamp(max=len(w.member)), w.start[-1:]])),
        ("region", lambda w: None if w.region is None else 1 - (w.region > 4).long()),
    ):
        wrong = {cut: w._replace(**{field: move(w)}) for cut, w in plan.windows.items()}
        try:
            moved = case.masked(units, UnitPlan(plan.image, plan.unit, plan.images, plan.grid, wrong))
        except ValueError:
            continue  # two tokens at one place: the op itself refuses
        assert (moved - expected).abs().max() > 1e-3, f"{field} has no effect"


@pytest.mark.parametrize("name", ["swin", "htsat"])
def test_stochastic_depth_drops_the_images_that_the_library_drops(name):
    case = make(name, 64, 4, 16, images=6)
    from timm.layers import DropPath
    from transformers.models.clap.modeling_clap import ClapDropPath

    for module in list(case.library.modules()):
        for key in ("drop_path", "drop_path1", "drop_path2"):
            if hasattr(module, key):
                setattr(module, key, DropPath(0.4) if name == "swin" else ClapDropPath(0.4))
    kept = draw(case, 0.5, True)
    case.library.train()
    results = []
    for run in (ours, oracle):
        torch.manual_seed(3)
        results.append(run(case, kept))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    still = ours(Case(case.library.eval(), case.masked, case.images), kept)
    assert (still - results[0]).abs().max() > 0.05


@pytest.mark.parametrize("name", ["swin", "htsat"])
def test_dropout_of_projections_and_mlps_is_the_librarys(name):
    """In training it drops, and scales what stays; in evaluation it does nothing."""
    case = make(name, 64, 4, 16)
    kept = draw(case, 0.5, True)
    still = ours(case, kept)
    for module in case.library.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    assert torch.equal(ours(Case(case.library.eval(), case.masked, case.images), kept), still)
    case.library.train()
    for key, module in case.library.named_modules():
        if key.endswith(("attn_drop", "self.dropout")):
            module.p = 0.0
    torch.manual_seed(0)
    one, other = ours(case, kept), ours(case, kept)
    assert (one - other).abs().max() > 0.01
    assert all(gradient.isfinite().all() for gradient in gradients(case, one))


@pytest.mark.parametrize("name", ["swin", "htsat"])
def test_gradient_checkpointing_computes_blocks_twice_and_the_same(name):
    case = make(name, 64, 4, 16)
    kept = draw(case, 0.5, True)
    case.library.train()
    plain = ours(case, kept)
    wanted = gradients(case, plain)
    calls = []
    case.library.layers[1].blocks[0].register_forward_hook(lambda *_: calls.append(1))
    mlp = case.library.layers[1].blocks[0].mlp if name == "swin" else case.library.layers[1].blocks[0].intermediate
    mlp.register_forward_hook(lambda *_: calls.append(1))
    for layer in case.library.layers:
        setattr(layer, "grad_checkpointing" if name == "swin" else "gradient_checkpointing", True)
    again = ours(case, kept)
    assert torch.equal(again, plain)
    assert len(calls) == 1
    for a, b in zip(gradients(case, again), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["swin", "htsat"])
def test_compiles_whole(name):
    case = make(name, 64, 4, 16, torch.float32)
    kept = draw(case, 0.5, True)
    image, number = kept.flatten(1).nonzero(as_tuple=True)
    _, units = planned(case, kept, case.images)

    def run(units, image, number):
        return case.masked(units, case.masked.plan(image, number, 3))

    expected = run(units, image, number)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(units, image, number)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients(case, found), gradients(case, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["swin", "htsat"])
def test_nothing_of_the_library_changes(name):
    case = make(name, 64, 4, 16)
    state = {key: value.clone() for key, value in case.library.state_dict().items()}
    modules = [(key, type(module)) for key, module in case.library.named_modules()]
    before = as_grid(case)
    ours(case, draw(case, 0.5, True)).sum().backward()
    assert [(key, type(module)) for key, module in case.library.named_modules()] == modules
    assert list(case.library.state_dict()) == list(state)
    assert all(torch.equal(case.library.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(as_grid(case), before)


def test_an_image_does_not_depend_on_the_others():
    case = make("swin", 64, 4, 16)
    kept = draw(case, 0.5, True)
    together = ours(case, kept)
    alone = ours(case, kept[1:2], case.images[1:2])
    torch.testing.assert_close(together[len(alone) : 2 * len(alone)], alone, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_exact_is_refused_with_the_reason():
    swin = build_swin(VisionConfig(image_size=64, window_size=4, unit=16, **SMALL))
    with pytest.raises(ValueError, match=r"MaskedSwinV2: a mask unit must be whole tokens of 16 px .* got 8 px"):
        MaskedSwinV2(swin, 8)
    with pytest.raises(ValueError, match="MaskedSwinV2: mask units of 48 px must tile the image of 64 px"):
        MaskedSwinV2(swin, 48)
    padded = build_swin(VisionConfig(image_size=96, window_size=8, unit=16, **SMALL))
    with pytest.raises(ValueError, match="windows of 8 tokens must tile the 12 x 12 tokens of stage 1"):
        MaskedSwinV2(padded, 16)
    swin.layers[0].blocks[0].window_size = (4, 2)
    with pytest.raises(ValueError, match="windows must be square, got 4 x 2"):
        MaskedSwinV2(swin, 16)

    def htsat(**changes):
        config = AudioConfig(spec_size=64, mel_bins=32, window_size=4, unit=16, **SMALL)
        encoder = build_htsat(config)
        for key, value in changes.items():
            setattr(encoder, key, value)
        return encoder

    with pytest.raises(ValueError, match="feature fusion mixes all of an image into every patch"):
        MaskedHTSAT(htsat(enable_fusion=True), 16)
    overlapping = htsat()
    overlapping.patch_embed.proj.stride = (2, 2)
    with pytest.raises(ValueError, match=r"must be square and lie side by side, got \(4, 4\) every \(2, 2\) px"):
        MaskedHTSAT(overlapping, 16)
    large = htsat()
    large.layers[2].blocks[0].attention.self.window_size = (8, 8)
    with pytest.raises(ValueError, match="windows of 8 tokens are larger than a grid of 4 x 4"):
        MaskedHTSAT(large, 16)


def test_attention_dropout_is_refused_in_training_alone():
    case = make("swin", 64, 4, 16)
    kept = draw(case, 0.5, True)
    case.library.layers[0].blocks[0].attn.attn_drop.p = 0.1
    case.library.eval()
    ours(case, kept)
    case.library.train()
    with pytest.raises(ValueError, match=r"attention dropout must be 0 in training, got 0\.1"):
        ours(case, kept)


def test_the_example_of_the_docs_runs():
    page = (Path(__file__).resolve().parents[3] / "docs" / "masked_encoders.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0].replace("pretrained=True", "pretrained=False")
    names: dict[str, object] = {}
    with torch.no_grad():
        exec(code, names)
    assert names["tokens"].shape == (4 * 32, 768)
