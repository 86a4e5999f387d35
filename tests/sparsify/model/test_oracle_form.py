"""The whole model in oracle form: its encoders compute every token by the libraries' own stages, whose attention sees
no masked one, and hand on the kept ones. Answers and every gradient are those of the model that skips the rest.
"""

from __future__ import annotations

import pytest
import torch
from masked_oracle import attentions_of, blind_to, kept_tokens
from torch import Tensor

from sparsify.model.masking import draw_units
from sparsify_kernels import random_mask


def in_oracle_form(monkeypatch, encoder, units: Tensor, kept: Tensor) -> None:
    """``encoder`` computes all of ``units`` [B, U, P], whole images; ``kept`` bool [B, grid, grid] of them leave."""
    count, grid = kept.shape[:2]

    def embed_kept(drawn):
        return kept_tokens(encoder.embed(units), kept)

    def stage(index: int, x: Tensor, plan) -> Tensor:
        u = round((len(x) / int(kept.sum())) ** 0.5)
        blocks = torch.full((count, grid, grid, u, u, x.shape[-1]), 3.0, dtype=x.dtype)  # no masked token is read
        blocks[kept] = x.view(-1, u, u, x.shape[-1])
        image = blocks.transpose(2, 3).reshape(count, grid * u, grid * u, -1)
        side = encoder.config.units * (encoder.config.unit // encoder.config.patch_size) >> index
        with blind_to(attentions_of(layers[index], side), kept):
            return kept_tokens(library(index, image, None), kept)

    library, layers = encoder.stage, (encoder.swin if hasattr(encoder, "swin") else encoder.htsat).layers
    monkeypatch.setattr(encoder, "embed_kept", embed_kept)
    monkeypatch.setattr(encoder, "stage", stage)


def drawn(images: Tensor, seed: Tensor, keep: float, stratified: bool) -> Tensor:
    grid = round(images.shape[1] ** 0.5)
    shape = (grid, grid) if stratified else None
    index = random_mask(images, keep, seed=seed.flatten(), grid=shape, stratified=stratified).index
    kept = torch.zeros(len(images), grid * grid, dtype=torch.bool).scatter(1, index, True)
    return kept.unflatten(1, (grid, grid))


@pytest.mark.parametrize(
    ("kind", "keep", "stratified", "unit"),
    [
        ("unit", 0.5, True, 16),
        ("unit", 0.25, True, 16),
        ("unit", 0.6, False, 16),
        ("unit", 0.5, True, 32),
        ("time", 0.5, False, 16),
        ("time", 0.5, False, 32),
    ],
)
def test_answers_and_gradients_are_those_of_the_oracle(
    tiny, make_model, make_batch, monkeypatch, kind, keep, stratified, unit
):
    config = tiny(vision__unit=unit, audio__unit=unit, mask__stratified=stratified, mask__kind=kind)
    model = make_model(config).double().train()
    video, questions, masking = make_batch(config, keep=keep)

    def run() -> tuple[Tensor, list[Tensor], Tensor]:
        tokens = model.encode(video, masking)
        logits = model.answer(tokens, questions)
        gradients = torch.autograd.grad(logits.sin().sum(), list(model.parameters()), allow_unused=True)
        return logits.detach(), [x for x in gradients if x is not None], tokens.tokens.detach()

    logits, gradients, tokens = run()
    draws = draw_units(video, masking, config, model.vision.masked, model.audio.masked)
    for encoder, x, seed, draw in (
        (model.vision, video.frames, masking.frame_seed, draws[0]),
        (model.audio, video.mel, masking.mel_seed, draws[1]),
    ):
        images, grid = x.flatten(0, 1), encoder.config.units
        if kind == "unit":
            kept = drawn(images, seed, keep, stratified)
        else:  # which seconds are drawn is tested elsewhere
            kept = torch.zeros(len(images), grid, grid, dtype=torch.bool)
            kept[draw.plan.image, draw.plan.unit // grid, draw.plan.unit % grid] = True
        in_oracle_form(monkeypatch, encoder, images, kept)
    logits2, gradients2, tokens2 = run()
    torch.testing.assert_close(tokens, tokens2, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logits, logits2, rtol=1e-6, atol=1e-6)  # fp32
    assert len(gradients) == len(gradients2) > 100
    for a, b in zip(gradients, gradients2, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
