"""The encoders: without a mask they are the libraries' own, stage by stage."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sparsify_kernels.flops  # noqa: F401
from sparsify.config import Config
from sparsify.data.units import to_units
from sparsify.model.audio import AudioEncoder
from sparsify.model.masking import KeptUnits
from sparsify.model.vision import VisionEncoder
from sparsify_kernels import random_mask
from sparsify_kernels.testing import RecordedOps


def run(encoder, units):
    x = encoder.embed(units)
    for stage in range(len(encoder.stage_dims)):
        x = encoder.stage(stage, x, None)
        assert x.shape[1:] == (encoder.side(stage), encoder.side(stage), encoder.stage_dims[stage])
    return encoder.finish(x)


def randomise(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))


def test_vision_is_timms_own_forward(tiny):
    torch.manual_seed(0)
    encoder = VisionEncoder(tiny().vision)
    randomise(encoder)
    image = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = encoder.swin.forward_features((image / 255 - mean) / std)
    torch.testing.assert_close(run(encoder, to_units(image, 16)), expected, rtol=1e-4, atol=1e-5)
    exact = encoder.swin.forward_features(torch.addcmul(encoder.shift, image.float(), encoder.scale))
    assert torch.equal(run(encoder, to_units(image, 16)), exact)


def test_audio_is_claps_own_forward(tiny):
    """From the log-mel itself: batch norm over mel bins, fold, patches, stages, norm."""
    torch.manual_seed(0)
    encoder = AudioEncoder(tiny().audio)
    randomise(encoder)
    htsat = encoder.htsat.eval()
    htsat.batch_norm.running_mean.copy_(-40 + 10 * torch.randn(32))
    htsat.batch_norm.running_var.copy_(400 * torch.rand(32) + 100)
    log_mel = torch.randn(3, 1, 128, 32) * 20 - 40  # [B, 1, time, mel bins]
    seen = []
    handle = htsat.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    htsat(log_mel)
    handle.remove()
    ours = run(encoder, to_units(htsat.reshape_mel2img(log_mel), 16)).flatten(1, 2)
    torch.testing.assert_close(ours, seen[0], rtol=1e-4, atol=1e-5)


def test_batch_norm_keeps_its_running_statistics_in_training(tiny):
    encoder = AudioEncoder(tiny().audio).train()
    before = encoder.htsat.batch_norm.running_mean.clone()
    units = torch.randn(4, 16, 256) * 20 - 40
    alone, together = encoder.embed(units[:1]), encoder.embed(units)
    torch.testing.assert_close(together[:1], alone)
    assert torch.equal(encoder.htsat.batch_norm.running_mean, before)


def test_no_layer_draws_random_numbers(tiny):
    for encoder in (VisionEncoder(tiny().vision), AudioEncoder(tiny().audio)):
        dropped = [m for m in encoder.modules() if getattr(m, "p", 0) or getattr(m, "drop_prob", 0)]
        assert not dropped


def test_a_dense_encoder_calls_what_timm_calls_in_its_order(tiny):
    encoder = VisionEncoder(tiny().vision, dense=True)
    assert encoder.masked is None
    image = torch.randn(4, 3, 64, 64)
    with RecordedOps() as theirs:
        expected = encoder.swin.forward_features(image)
    x = encoder.swin.patch_embed(image)
    with RecordedOps() as ours:
        for stage in range(3):
            x = encoder.stage(stage, x, None)
        x = encoder.finish(x)
    assert torch.equal(x, expected)
    patches = theirs.names[: len(theirs.names) - len(ours.names)]
    assert theirs.names == patches + ours.names
    assert patches.count("aten::convolution") == 1


def test_a_dense_encoder_calls_what_transformers_calls_in_its_order(tiny):
    encoder = AudioEncoder(tiny().audio, dense=True)
    assert encoder.masked is None
    htsat = encoder.htsat
    x = htsat.patch_embed(torch.randn(4, 1, 64, 64))
    with RecordedOps() as theirs:
        expected = x
        for layer, resolution in zip(htsat.layers, htsat.input_resolutions, strict=True):
            expected = layer(expected, resolution)[0]
        expected = htsat.norm(expected)
    x = x.view(4, 16, 16, -1)
    with RecordedOps() as ours:
        for stage in range(3):
            x = encoder.stage(stage, x, None)
        x = encoder.finish(x)
    assert torch.equal(x.flatten(1, 2), expected)
    shapes = {"aten::view", "aten::_unsafe_view", "aten::alias"}
    assert [n for n in ours.names if n not in shapes] == [n for n in theirs.names if n not in shapes]
    assert theirs.names.count("aten::_softmax") == 5


@pytest.mark.parametrize("name", ["vision", "audio"])
def test_counted_operations_by_hand(tiny, name):
    """Linear layers over kept tokens, and the pairs that share a window, counted from a picture of one mask."""
    config = getattr(tiny(), name)
    encoder = VisionEncoder(config) if name == "vision" else AudioEncoder(config)
    units = torch.tensor([0, 3, 5, 6, 9])  # of a 4 x 4 grid
    values = torch.zeros(5, (3 if name == "vision" else 1) * 16 * 16)
    assert encoder.masked is not None
    with FlopCounterMode(display=False) as counter:
        plan = encoder.masked.plan(torch.zeros_like(units), units, 1)
        kept = KeptUnits(values, plan, 1)
        x = encoder.embed_kept(kept)
        for stage in range(3):
            x = encoder.stage(stage, x, plan)
        encoder.finish(x)

    expected = 2 * 5 * 16 * 8 * (3 if name == "vision" else 1) * 4 * 4  # patches: 16 a unit, to 8 channels
    for stage, (dim, heads, depth) in enumerate([(8, 1, 2), (16, 2, 2), (32, 2, 1)]):
        side = 16 >> stage
        u = side // 4
        tokens = 5 * u * u
        if stage:
            expected += 2 * tokens * (4 * dim // 2) * dim  # patch merging
        for block in range(depth):
            expected += 2 * tokens * dim * dim * (3 + 1 + 4 + 4)  # q, k, v; out; the two of the MLP
            if name == "vision":
                expected += 2 * 7 * 7 * (2 * 512 + 512 * heads)  # the bias of each difference of places
            shift = 2 if block % 2 and side > 4 else 0
            window = [0] * (side // 4) ** 2
            for y in range(side):
                for z in range(side):
                    if (y // u * 4 + z // u) in units.tolist():
                        window[(y - shift) % side // 4 * (side // 4) + (z - shift) % side // 4] += 1
            expected += sum(n * n for n in window) * dim * 2 * 2  # q k^T and P v, all heads
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize(("keep", "most"), [(0.5, 0.495), (0.25, 0.247)])
@pytest.mark.parametrize("name", ["vision", "audio"])
def test_what_masking_saves_at_full_size(name, keep, most):
    """Swin-V2-T at 256 px and HTS-AT: less than the kept share of the operations, since fewer tokens share a window."""
    config = getattr(Config.preset("paper"), name)
    encoder = VisionEncoder(config) if name == "vision" else AudioEncoder(config)
    values = torch.zeros(1, 64, (3 if name == "vision" else 1) * 32 * 32)
    assert encoder.masked is not None

    def masked():
        tokens, index = random_mask(values, keep, seed=3, grid=(8, 8), stratified=True)
        plan = encoder.masked.plan(torch.zeros_like(index[0]), index[0], 1)
        x = encoder.embed_kept(KeptUnits(tokens[0], plan, 1))
        for stage in range(4):
            x = encoder.stage(stage, x, plan)
        encoder.finish(x)

    def dense():
        run(encoder, values)

    counts = []
    for function in (masked, dense):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function()
        counts.append(counter.get_total_flops())
    assert counts[0] / counts[1] <= most
