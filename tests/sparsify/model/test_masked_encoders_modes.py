"""Masked encoders in training: dropout, stochastic depth, checkpointing, compiled; what they leave alone and refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from masked_cases import SMALL, Case, as_grid, draw, gradients, make, oracle, ours, planned
from torch import Tensor, nn

from sparsify.config import AudioConfig, VisionConfig
from sparsify.errors import ConfigError
from sparsify.model.audio import build_htsat
from sparsify.model.masked import MaskedHTSAT, MaskedSwinV2
from sparsify.model.vision import VisionEncoder, build_swin


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


class ChannelDropout(nn.Dropout):
    """Drops the same channels wherever it is: what it does can be compared, packed or not."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        kept = torch.arange(x.shape[-1]) % 3 > 0
        return x * kept.to(x) * 1.5


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("swin", "proj_drop"),
        ("swin", "mlp.drop1"),
        ("swin", "mlp.drop2"),
        ("htsat", "attention.output.dropout"),
        ("htsat", "1.output.dropout"),  # of a block's MLP
    ],
)
def test_dropout_is_where_the_library_has_it(name, kind):
    """Each kind alone; in evaluation it does nothing."""
    case = make(name, 64, 4, 16)
    kept = draw(case, 0.5, True)
    still = ours(case, kept)
    replaced = 0
    for key, module in list(case.library.named_modules()):
        if key.endswith(kind):
            assert isinstance(module, nn.Dropout)
            parent, _, last = key.rpartition(".")
            setattr(case.library.get_submodule(parent), last, ChannelDropout(0.3))
            replaced += 1
    assert replaced > 2 or kind[0] == "1"
    case.library.eval()
    assert torch.equal(ours(case, kept), still)
    case.library.train()
    dropped = ours(case, kept)
    assert (dropped - still).abs().max() > 0.01
    torch.testing.assert_close(dropped, oracle(case, kept), rtol=1e-10, atol=1e-10)


def test_an_adapter_on_a_projection_is_called():
    """As LoRA replaces linear layers, and as hooks follow them; timm's Swin-V2 reads the weights alone, itself."""
    case = make("htsat", 64, 4, 16)
    kept = draw(case, 0.5, True)
    still = ours(case, kept)
    attention = case.library.layers[1].blocks[1].attention.self
    attention.query = nn.Sequential(attention.query, nn.Tanh())
    replaced = ours(case, kept)
    torch.testing.assert_close(replaced, oracle(case, kept), rtol=1e-10, atol=1e-10)
    attention.value.register_forward_hook(lambda module, args, out: 2 * out)
    hooked = ours(case, kept)
    torch.testing.assert_close(hooked, oracle(case, kept), rtol=1e-10, atol=1e-10)
    assert min((a - b).abs().max() for a, b in ((still, replaced), (replaced, hooked))) > 1e-3


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
    if name == "swin":
        case.library.set_grad_checkpointing()
    else:  # transformers has no switch for this encoder, but looks at it
        for layer in case.library.layers:
            layer.gradient_checkpointing = True
    again = ours(case, kept)
    assert torch.equal(again, plain)
    assert len(calls) == 1
    for a, b in zip(gradients(case, again), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert len(calls) == 2
    for module in case.library.modules():
        if isinstance(module, nn.Dropout) and module not in attention_dropouts(case.library):
            module.p = 0.3
    torch.manual_seed(5)
    once = ours(case, kept)
    found = gradients(case, once)
    for layer in case.library.layers:
        setattr(layer, "grad_checkpointing" if name == "swin" else "gradient_checkpointing", False)
    torch.manual_seed(5)
    wanted = gradients(case, ours(case, kept))
    assert (once - plain).abs().max() > 0.01
    for a, b in zip(found, wanted, strict=True):  # what is computed again drops the same
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def attention_dropouts(library: nn.Module) -> list[nn.Module]:
    return [module for key, module in library.named_modules() if key.endswith(("attn_drop", "self.dropout"))]


@pytest.mark.parametrize("geometry", [(64, 4, 16), (96, 6, 16)], ids=["uniform", "ragged"])
@pytest.mark.parametrize("name", ["swin", "htsat"])
def test_compiles_whole(name, geometry):
    case = make(name, *geometry)
    kept = draw(case, 0.5, geometry[0] == 64)
    image, number = kept.flatten(1).nonzero(as_tuple=True)
    _, units = planned(case, kept, case.images)

    def run(units, image, number):
        return case.masked(units, case.masked.plan(image, number, 3))

    expected = run(units, image, number)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(units, image, number)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(case, found), gradients(case, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["swin", "htsat"])
def test_nothing_of_the_library_changes(name):
    """Not by being wrapped, and not by being run: parameters, buffers, modules, hooks."""
    case = make(name, 64, 4, 16)
    library = type(case.masked)(copy.deepcopy(case.library), 16).encoder  # wrapped, but not compared with yet

    def shape_of(module: nn.Module) -> list[tuple[str, type, int, list[str]]]:
        return [
            (key, type(m), len(m._forward_hooks) + len(m._forward_pre_hooks), [name for name, _ in m.named_buffers()])
            for key, m in module.named_modules()
        ]

    state = {key: value.clone() for key, value in case.library.state_dict().items()}
    untouched = copy.deepcopy(case.library)
    before = as_grid(Case(untouched, case.masked, case.images))
    for wrapped in (library, case.library):
        assert shape_of(wrapped) == shape_of(untouched)
        assert all(torch.equal(wrapped.state_dict()[key], value) for key, value in state.items())
    ours(case, draw(case, 0.5, True)).sum().backward()
    assert shape_of(case.library) == shape_of(untouched)
    assert list(case.library.state_dict()) == list(state)
    assert all(torch.equal(case.library.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(as_grid(case), before)


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


def test_images_and_patches_must_be_square():
    swin = build_swin(VisionConfig(image_size=64, window_size=4, unit=16, **SMALL))
    swin.patch_embed.img_size = (64, 32)
    with pytest.raises(ValueError, match="MaskedSwinV2: images and patches must be square, got 64 x 32 and 4 x 4"):
        MaskedSwinV2(swin, 16)
    htsat = build_htsat(AudioConfig(spec_size=64, mel_bins=32, window_size=4, unit=16, **SMALL))
    with pytest.raises(ValueError, match="MaskedHTSAT: mask units of 48 px must tile the image of 64 px"):
        MaskedHTSAT(htsat, 48)
    htsat.patch_embed.img_size = (64, 32)
    with pytest.raises(ValueError, match="MaskedHTSAT: images must be square, got 64 x 32"):
        MaskedHTSAT(htsat, 16)


def test_what_cannot_be_masked_may_be_dense():
    config = VisionConfig(image_size=96, window_size=8, unit=16, **SMALL)
    with pytest.raises(ConfigError, match=r"config\.vision: MaskedSwinV2: windows of 8 tokens must tile"):
        VisionEncoder(config)
    assert VisionEncoder(config, dense=True).masked is None
