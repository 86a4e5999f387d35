"""Sparse masking: which units are read, that the others never are, and that only kept tokens leave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsify.config import Config
from sparsify.model import SparsifyModel
from sparsify.model.audio import AudioEncoder
from sparsify.model.masking import draw_units
from sparsify.model.plan import UnitPlan
from sparsify.model.vision import VisionEncoder


def drawn(config, video, masking):
    """What each modality keeps: bool [V, T, U] and [V, S, U], and the draws themselves."""
    kept = draw_units(video, masking, config, VisionEncoder(config.vision).masked, AudioEncoder(config.audio).masked)
    pictures = []
    for x, part in zip((video.frames, video.mel), kept, strict=True):
        seen = torch.zeros(x.shape[:3].numel(), dtype=torch.bool)
        seen[part.plan.image * x.shape[2] + part.plan.unit] = True
        assert torch.equal(part.values, x.flatten(0, 2)[seen]), "units in their order, and as they are"
        pictures.append(seen.view(x.shape[:3]))
    return pictures, kept


@pytest.mark.parametrize(("keep", "expected"), [(0.25, 4), (0.5, 8), (0.6, 10), (1.0, 16)])
def test_each_image_keeps_the_share_drawn_from_its_own_seed(tiny, make_batch, keep, expected):
    config = tiny()
    video, _, masking = make_batch(config, keep=keep)
    masking.frame_seed[2, 1] = masking.mel_seed[0, 1] = masking.frame_seed[0, 0]
    (frames, mel), kept = drawn(config, video, masking)
    assert (frames.sum(2) == expected).all()
    assert (mel.sum(2) == expected).all()
    assert torch.equal(frames[2, 1], frames[0, 0])
    assert torch.equal(mel[0, 1], frames[0, 0])
    assert [part.groups for part in kept] == [2, 2]
    alone = type(video)(*(x[1:2] for x in video))
    seeds = masking._replace(frame_seed=masking.frame_seed[1:2], mel_seed=masking.mel_seed[1:2])
    assert torch.equal(drawn(config, alone, seeds)[0][0][0], frames[1])


def test_stratified_draw_keeps_two_of_every_four(tiny, make_batch):
    config = tiny()
    video, _, masking = make_batch(config, videos=10)
    for seen in drawn(config, video, masking)[0]:
        blocks = seen.view(-1, 2, 2, 2, 2).sum((2, 4))
        assert (blocks == 2).all()
    config = tiny(mask__stratified=False)
    assert (drawn(config, video, masking)[0][0].view(-1, 2, 2, 2, 2).sum((2, 4)) != 2).any()


def test_encoders_of_different_geometry_have_a_plan_each(tiny, make_model, make_batch):
    config = tiny(audio__window_size=2, vision__unit=32)
    video, questions, masking = make_batch(config)
    (frames, mel), kept = drawn(config, video, masking)
    assert (frames.sum(2) == 2).all()
    assert (mel.sum(2) == 8).all()
    assert kept[0].plan.grid == 2
    assert kept[1].plan.grid == 4
    assert make_model(config)(video, questions, masking).isfinite().all()


@pytest.mark.parametrize("kind", ["unit", "time"])
def test_one_plan_serves_both_encoders_whatever_their_depths(tiny, make_model, make_batch, monkeypatch, kind):
    config = tiny(audio__depths=[2, 4, 2], vision__depths=[2, 2, 2], mask__kind=kind)
    model, (video, _, masking) = make_model(config), make_batch(config)
    made = []
    real = UnitPlan.of
    monkeypatch.setattr(UnitPlan, "of", lambda *args, **kwargs: made.append(real(*args, **kwargs)) or made[-1])
    model.encode(video, masking)
    assert len(made) == 1
    assert made[0].images == 3 * (2 + 2)
    made.clear()
    other = tiny(audio__window_size=2, mask__kind=kind)
    make_model(other).encode(*make_batch(other)[::2])
    assert len(made) == 2


class OnOneDevice(TorchDispatchMode):
    """Notes what is made on a CPU, and what is copied between devices: on a GPU the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.strangers: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(x.device.type == "cpu" for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)):
            self.strangers.append(func.name())
        return out


@pytest.mark.parametrize("kind", ["unit", "time"])
def test_masks_plans_and_times_are_made_on_the_device_without_waiting_for_it(tiny, make_model, make_batch, kind):
    """All of ``encode`` on the device "meta", whose tensors have no values to wait for."""
    config = tiny(mask__kind=kind, merge__fence=0.0)
    model, (video, _, masking) = make_model(config).to("meta"), make_batch(config)
    video, masking = (type(x)(*(y.to("meta") if isinstance(y, Tensor) else y for y in x)) for x in (video, masking))
    with OnOneDevice() as seen:
        out = model.encode(video, masking)
    assert out.tokens.device.type == "meta"
    assert seen.strangers == []


SIZES = {  # of README: vision.embed_dim, depths, heads; audio.embed_dim, depths
    "swinv2_small_window8_256": (96, (2, 2, 18, 2), (3, 6, 12, 24), 96, (2, 2, 6, 2)),
    "swinv2_base_window8_256": (128, (2, 2, 18, 2), (4, 8, 16, 32), 128, (2, 2, 12, 2)),
}


@pytest.mark.parametrize("name", SIZES)
def test_larger_encoders_in_the_model(make_batch, vocabulary, name):
    """Swin-V2-S with HTS-AT tiny, Swin-V2-B with HTS-AT base: geometry alone, on the device "meta"."""
    import timm

    width, depths, heads, audio_width, audio_depths = SIZES[name]
    config = Config.preset("paper").replace(
        **{
            "vision.embed_dim": width, "vision.depths": depths, "vision.heads": heads,
            "audio.embed_dim": audio_width, "audio.depths": audio_depths, "clip.frames": 2, "clip.segments": 1,
        }
    )  # fmt: skip
    model = SparsifyModel(config, vocabulary, pretrained=False).to("meta")
    with torch.device("meta"):
        library = timm.create_model(name, num_classes=0)
    shapes = {key: value.shape for key, value in library.state_dict().items() if not key.startswith("head")}
    assert {key: value.shape for key, value in model.vision.swin.state_dict().items()} == shapes
    video, _, masking = make_batch(config, videos=1)
    video, masking = (type(x)(*(y.to("meta") if isinstance(y, Tensor) else y for y in x)) for x in (video, masking))
    assert model.encode(video, masking).tokens.device.type == "meta"


def time_config(tiny):
    """Four frames of 1 s; two segments of 2 s in two runs of 1 s each, of two columns: eight columns of 0.5 s."""
    return tiny(mask__kind="time", clip__frames=4, audio__unit=32, vision__unit=32)


def time_batch(make_batch, config, **changes):
    video, questions, masking = make_batch(config, **changes)
    seconds = torch.tensor([0.5, 1.5, 2.5, 3.5]).expand(len(video.frames), -1)
    return video._replace(frame_time=seconds), questions, masking


def test_time_keeps_the_same_seconds_of_both(tiny, make_batch):
    config = time_config(tiny)
    video, _, masking = time_batch(make_batch, config, videos=20)
    (frames, mel), kept = drawn(config, video, masking)
    assert [part.groups for part in kept] == [2, 1]
    whole = frames.all(2)  # [V, T]
    assert torch.equal(whole, frames.any(2)), "whole frames"
    assert (whole.sum(1) == 2).all()
    assert len({tuple(row.tolist()) for row in whole}) == 6, "of six pairs, each is drawn"
    # A unit is a whole column here: [V, S, runs, columns of 0.5 s], two to a frame's second.
    assert torch.equal(mel.view(20, 4, 2), whole.unsqueeze(2).expand(-1, -1, 2))


def test_time_takes_whole_columns_and_the_nearest(tiny, make_batch):
    """Of three frames one is kept; 16 px units: two bands of mel bins, eight columns of 0.25 s a segment."""
    config = tiny(mask__kind="time", clip__frames=3)
    video, _, masking = make_batch(config, keep=1 / 3)
    video = video._replace(frame_time=torch.tensor([0.6, 2.0, 3.4]).expand(3, -1))
    (frames, mel), _ = drawn(config, video, masking)
    columns = mel.view(3, 2, 2, 2, 4)  # [V, S, runs, bands, columns]
    assert torch.equal(columns[:, :, :, 0], columns[:, :, :, 1]), "all mel bins of a column"
    columns = columns[:, :, :, 0].flatten(1)  # [V, 16] of 0.25 s
    middle = torch.arange(16) * 0.25 + 0.125
    for v in range(3):
        kept = video.frame_time[v, frames[v].all(1)]
        assert len(kept) == 1
        nearest = (middle - kept).abs().argsort(stable=True)[:5]
        assert columns[v].nonzero().flatten().tolist() == sorted(nearest.tolist())


def test_time_mask_encodes_the_kept_seconds(tiny, make_model, make_batch):
    """As many tokens, and in their order; nothing of the other seconds matters."""
    config = time_config(tiny)
    model = make_model(config)
    video, questions, masking = time_batch(make_batch, config, dtype=torch.float32)
    (frames, mel), _ = drawn(config, video, masking)
    out = model.encode(video, masking)
    assert out.visual.kept.shape == (3, 2 * 16)
    assert out.audio.kept.shape == (3, 4 * 4)
    assert torch.equal(out.visual.kept, frames.all(2).repeat_interleave(16, 1).nonzero()[:, 1].view(3, -1))
    other = video._replace(
        frames=torch.where(frames.unsqueeze(3), video.frames, torch.nan),
        mel=torch.where(mel.unsqueeze(3), video.mel, torch.nan),
    )
    assert torch.equal(model(other, questions, masking), model(video, questions, masking))


@pytest.mark.parametrize("unit", [16, 32])
@pytest.mark.parametrize("kind", ["unit", "time"])
def test_masked_path_with_everything_kept_is_the_unmasked_one(tiny, make_model, make_batch, kind, unit):
    config = tiny(vision__unit=unit, audio__unit=unit, mask__kind=kind)
    model = make_model(config).double()
    video, questions, masking = make_batch(config, keep=1.0)
    masked, plain = model.encode(video, masking), model.encode(video)
    assert torch.equal(masked.visual.kept, plain.visual.kept)
    torch.testing.assert_close(masked.tokens, plain.tokens, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.answer(masked, questions), model.answer(plain, questions), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("keep", "stratified", "unit"), [(0.5, True, 16), (0.25, False, 16), (0.5, True, 32)])
def test_masked_pixels_and_mels_reach_nothing(tiny, make_model, make_batch, keep, stratified, unit):
    config = tiny(vision__unit=unit, audio__unit=unit, mask__stratified=stratified)
    model = make_model(config).train()
    video, questions, masking = make_batch(config, keep=keep, dtype=torch.float32)
    hidden = [~seen for seen in drawn(config, video, masking)[0]]

    def run(frames, mel):
        model.zero_grad()
        frames, mel = frames.requires_grad_(), mel.requires_grad_()
        logits = model(video._replace(frames=frames, mel=mel), questions, masking)
        logits.sin().sum().backward()
        return logits.detach(), [p.grad.clone() for p in model.parameters()], frames.grad, mel.grad

    logits, grads, frame_grad, mel_grad = run(video.frames.clone(), video.mel.clone())
    other = [x.clone() for x in (video.frames, video.mel)]
    for x, mask in zip(other, hidden, strict=True):
        x[mask] = 1e4 * torch.randn_like(x[mask])
    logits2, grads2, _, _ = run(*other)
    assert torch.equal(logits, logits2)
    for a, b in zip(grads, grads2, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    for grad, mask in zip((frame_grad, mel_grad), hidden, strict=True):
        assert (grad[mask] == 0).all()
        assert (grad[~mask].abs().sum(-1) > 0).all(), "every kept unit matters"


def test_only_kept_tokens_leave(tiny, make_model, make_batch):
    config = tiny()
    model = make_model(config)
    video, _, masking = make_batch(config)
    out = model.encode(video, masking)
    expected = drawn(config, video, masking)[0][0].flatten(1).nonzero()[:, 1].view(3, 16)
    assert torch.equal(out.visual.kept, expected)
    assert out.audio.kept.shape == (3, 16)


def test_a_dense_model_takes_no_mask(tiny, make_model, make_batch):
    config = tiny(dense=True)
    video, _, masking = make_batch(config)
    with pytest.raises(ValueError, match="dense model takes no masking"):
        make_model(config).encode(video, masking)
