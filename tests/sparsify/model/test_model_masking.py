"""Oracle masking: what is masked is never attended to and never leaves."""

from __future__ import annotations

import math

import pytest
import torch

from sparsify.model.masking import KeptUnits, join_windows, split_windows


def test_tokens_and_cells_of_two_units():
    kept = KeptUnits(torch.tensor([[0, 3]]), grid=2)
    assert kept.tokens(4).int().tolist() == [[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]]
    assert kept.cells(2).tolist() == [[0, 3]]
    assert kept.cells(4).tolist() == [[0, 1, 4, 5, 10, 11, 14, 15]]


def test_window_mask_of_one_shifted_window_by_hand():
    """Grid 2x2, window 2, shift 1: one window that holds cells 3, 2, 1, 0 in this order."""
    kept = KeptUnits(torch.tensor([[0, 3]]), grid=2)
    wrap = torch.full((1, 4, 4), -100.0)
    mask = kept.window_mask(2, 2, 1, wrap)
    out = -math.inf
    assert (mask[0] + 100).tolist() == [[0, out, out, 0], [0, 0, out, 0], [0, out, 0, 0], [0, out, out, 0]]


def test_windows_are_split_row_major_and_joined_back():
    x = torch.arange(2 * 8 * 8 * 3).view(2, 8, 8, 3)
    windows = split_windows(x, 4)
    assert torch.equal(windows[1, 5], x[0, 1, 5])
    assert torch.equal(windows[4 + 2, 0], x[1, 4, 0])
    assert torch.equal(join_windows(windows, 4, 8), x)


@pytest.mark.parametrize(("keep", "expected"), [(0.25, 4), (0.5, 8), (0.6, 10), (1.0, 16)])
def test_draw_keeps_the_share_and_depends_on_its_seed_alone(keep, expected):
    seeds = torch.tensor([5, 6, 5])
    drawn = KeptUnits.draw(seeds, keep, 4, stratified=True).index
    assert drawn.shape == (3, expected)
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(KeptUnits.draw(seeds[1:2], keep, 4, stratified=True).index, drawn[1:2])


def test_stratified_draw_keeps_two_of_every_four():
    kept = KeptUnits.draw(torch.arange(20), 0.5, 4, stratified=True).tokens(4)
    blocks = kept.view(20, 2, 2, 2, 2).sum((2, 4))
    assert (blocks == 2).all()


@pytest.mark.parametrize("unit", [16, 32])
def test_masked_path_with_everything_kept_is_the_unmasked_one(tiny, make_model, make_batch, unit):
    config = tiny(vision__unit=unit, audio__unit=unit)
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
    hidden = []
    for x, seed, grid in ((video.frames, masking.frame_seed, 64 // unit), (video.mel, masking.mel_seed, 64 // unit)):
        kept = KeptUnits.draw(seed.flatten(), keep, grid, stratified=stratified).tokens(grid)
        hidden.append(~kept.view(*x.shape[:3]))

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
    expected = KeptUnits.draw(masking.frame_seed.flatten(), 0.5, 4, stratified=True).index.view(3, 2, 8)
    assert torch.equal(out.visual.kept.view(3, 2, 8), expected + torch.tensor([[0], [16]]))
    assert out.audio.kept.shape == (3, 16)


def test_a_dense_model_takes_no_mask(tiny, make_model, make_batch):
    config = tiny(dense=True)
    video, _, masking = make_batch(config)
    with pytest.raises(ValueError, match="dense model takes no masking"):
        make_model(config).encode(video, masking)
