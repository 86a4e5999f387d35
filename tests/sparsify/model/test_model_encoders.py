"""The encoders: without a mask they are the libraries' own, stage by stage."""

from __future__ import annotations

import torch

from sparsify.data.units import to_units
from sparsify.model.audio import AudioEncoder
from sparsify.model.vision import VisionEncoder


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
