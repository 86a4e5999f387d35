"""The whole model: samples are alone, every parameter learns, merging is accounted for, videos are encoded once."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sparsify.batch import Questions, Video
from sparsify.config import Config
from sparsify.model.adapters import CrossModalAdapter
from sparsify.model.fusion import pack_questions, unpack_questions
from sparsify.model.time import TIME_FEATURES


def take(x, index):
    return type(x)(*(value[index] if torch.is_tensor(value) else value for value in x))


def one_video(batch, i):
    video, questions, masking = batch
    mine = questions.video_index == i
    asked = Questions(
        questions.tokens[mine],
        questions.valid[mine],
        torch.zeros(int(mine.sum()), dtype=torch.long),
        questions.rank[mine],
        int(mine.sum()),
    )
    return take(video, slice(i, i + 1)), asked, take(masking, slice(i, i + 1)), mine


@pytest.mark.parametrize(("dense", "masked"), [(True, False), (False, False), (False, True)])
def test_a_sample_does_not_depend_on_its_batch_mates_in_training_mode(tiny, make_model, make_batch, dense, masked):
    config = tiny(dense=dense, merge__fence=0.5)
    model = make_model(config).double().train()
    batch = make_batch(config, videos=8)
    together = model(batch[0], batch[1], batch[2] if masked else None)
    assert together.std(dim=0).min() > 1e-3, "the samples must differ for this test to mean anything"
    for i in range(8):
        video, asked, masking, mine = one_video(batch, i)
        alone = model(video, asked, masking if masked else None)
        torch.testing.assert_close(alone, together[mine], rtol=1e-6, atol=1e-6)  # logits are fp32


@pytest.mark.parametrize("kind", ["masked", "unmasked", "dense", "unmerged", "demo"])
def test_every_parameter_has_a_gradient_within_three_steps(tiny, make_model, make_batch, kind):
    config = tiny(dense=kind == "dense", merge__enabled=kind != "unmerged")
    config = Config.preset("demo") if kind == "demo" else config
    model = make_model(config, randomised=False).train()
    video, questions, masking = make_batch(config, videos=4, questions=3)
    labels = torch.arange(12)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    learnt = set()
    for _ in range(3):
        optimiser.zero_grad()
        logits, matching = model(video, questions, masking if kind == "masked" else None, labels)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        if matching is not None:
            loss = loss + torch.nn.functional.cross_entropy(matching, questions.video_index)
        loss.backward()
        learnt |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimiser.step()
    assert not {name for name, p in model.named_parameters() if p.requires_grad} - learnt


def test_merging_shrinks_and_says_where_every_token_went(tiny, make_model, make_batch):
    config = tiny()
    video, _, masking = make_batch(config)
    out = make_model(config).encode(video, masking)
    for side in (out.visual, out.audio):
        assert side.kept.shape == (3, 16)
        assert side.tokens.shape == (3, 4, 16)
        torch.testing.assert_close(side.scores.sum(1), torch.ones(3))
        assert side.valid.any(1).all()
        assert torch.equal(side.size.sum(1), torch.full((3,), 16.0))
        for v in range(3):
            assert torch.equal(side.assign[v].bincount(minlength=4).float(), side.size[v])
            keys = side.position[v][side.valid[v]]
            where = torch.searchsorted(side.kept[v], keys)
            assert torch.equal(side.kept[v][where], keys)
            assert torch.equal(side.assign[v][where], torch.arange(len(keys))), "a key joins itself"
            assert side.scores[v][where].min() >= side.scores[v].quantile(0.75) - 1e-6
    assert out.tokens.shape == (3, 8, 16)
    assert out.tokens.shape[:2] == out.size.shape == out.valid.shape == out.time.shape


def test_super_tokens_carry_the_time_of_their_keys(tiny, make_model, make_batch):
    config = tiny()
    video, _, masking = make_batch(config)
    out = make_model(config).encode(video, masking)
    frame = out.visual.position // 16
    assert torch.equal(out.time[:, :4][out.visual.valid], frame.float()[out.visual.valid])
    # A mel image of 64 px folds two runs of 32 mel bins, one second each: 4 columns a run, rows 0-1 come first.
    cell = out.audio.position % 16
    expected = 2.0 * (out.audio.position // 16) + (cell // 4 // 2) + (cell % 4 + 0.5) / 4
    torch.testing.assert_close(out.time[:, 4:][out.audio.valid], expected[out.audio.valid])


def test_capacity_is_a_share_of_the_tokens(tiny, make_model, make_batch):
    config = tiny(merge__capacity=0.125)
    video, _, masking = make_batch(config)
    assert make_model(config).encode(video, masking).visual.tokens.shape[1] == 2


@pytest.mark.parametrize("change", [{"dense": True}, {"merge__enabled": False}])
def test_without_merging_every_token_is_its_own(tiny, make_model, make_batch, change):
    config = tiny(**change)
    video, _, _ = make_batch(config)
    out = make_model(config).encode(video)
    assert out.visual.scores is None
    assert out.visual.tokens.shape == (3, 32, 16)
    assert torch.equal(out.visual.kept, torch.arange(32).expand(3, -1))
    assert torch.equal(out.visual.assign, out.visual.kept)
    assert torch.equal(out.visual.size, torch.ones(3, 32))


class _Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.namespace)
        return func(*args, **(kwargs or {}))


def test_dense_contains_no_op_of_ours_and_sparse_does(tiny, make_model, make_batch):
    seen = {}
    for dense in (True, False):
        config = tiny(dense=dense)
        video, questions, _ = make_batch(config)
        with _Names() as names:
            make_model(config)(video, questions)
        seen[dense] = names.seen
    assert "sparsify_kernels" in seen[False]
    assert "sparsify_kernels" not in seen[True]


@pytest.mark.parametrize("dense", [True, False])
def test_dense_attends_without_a_mask_and_merged_tokens_with_one(tiny, make_model, make_batch, monkeypatch, dense):
    """A mask of zeros would be one as well: it keeps a GPU from the kernel that knows none."""
    config = tiny(dense=dense, merge__fence=0.0)
    video, questions, _ = make_batch(config)
    model = make_model(config).train()
    masks, real = [], torch.nn.functional.scaled_dot_product_attention

    def attend(q, k, v, mask=None, **kwargs):
        masks.append((k.shape[-2], mask is not None))
        return real(q, k, v, mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    tokens = model.encode(video)
    model.answer(tokens, questions)
    over_tokens = [masked for keys, masked in masks if keys == tokens.tokens.shape[1]]
    assert over_tokens == 2 * [not dense]  # the mixer, and the words of a question


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("changed", ["frames", "mel"])
def test_gates_start_closed(tiny, make_model, make_batch, changed, masked):
    """A new model's encoders do not disturb each other: other sound, same visual tokens, and the other way round."""
    config = tiny(merge__enabled=False)
    video, _, masking = make_batch(config)
    other = video._replace(**{changed: getattr(make_batch(config, seed=1)[0], changed)})
    for randomised in (False, True):
        model = make_model(config, randomised=randomised)
        a, b = (model.encode(x, masking if masked else None) for x in (video, other))
        own, others = ("visual", "audio") if changed == "mel" else ("audio", "visual")
        assert torch.equal(getattr(a, own).tokens, getattr(b, own).tokens) != randomised
        assert not torch.allclose(getattr(a, others).tokens, getattr(b, others).tokens)


def test_adapters_cost_as_much_again_for_twice_the_tokens():
    adapter = CrossModalAdapter(8, 16, latents=4, width=32)

    def flop(frames: int) -> int:
        times = torch.zeros(1, frames, 1, TIME_FEATURES), torch.zeros(1, frames, 1, TIME_FEATURES)
        with FlopCounterMode(display=False) as counter:
            adapter(torch.zeros(1, frames, 10, 8), torch.zeros(1, frames, 20, 16), *times)
        return counter.get_total_flops()

    once, twice, four = flop(4), flop(8), flop(16)
    assert four - twice == 2 * (twice - once)
    assert twice - once > 0.9 * once, "what does not grow with the tokens is small"


@pytest.mark.parametrize("change", [{}, {"dense": True}])
def test_a_video_is_encoded_once_for_1_4_and_20_questions(tiny, make_model, make_batch, change):
    config = tiny(**change)
    model = make_model(config).eval()
    calls = []
    model.vision.swin.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    video, questions, _ = make_batch(config, videos=2, questions=20)
    tokens = model.encode(video)
    whole = model.answer(tokens, questions)
    assert whole.shape == (40, 42)
    assert whole.dtype == torch.float32
    for n in (1, 4, 20):
        first = questions.rank < n
        asked = Questions(*(x[first] for x in questions[:4]), n)
        torch.testing.assert_close(model.answer(tokens, asked), whole[first], rtol=1e-4, atol=1e-5)
    assert len(calls) == 1


def test_questions_are_packed_by_video_and_rank(make_batch, tiny):
    questions = Questions(
        torch.zeros(3, 2, dtype=torch.long),
        torch.ones(3, 2, dtype=torch.bool),
        torch.tensor([1, 0, 1]),
        torch.tensor([1, 0, 0]),
        2,
    )
    x = torch.arange(1.0, 7).view(3, 2, 1)
    packed = pack_questions(x, questions, videos=2)
    assert packed.squeeze(-1).tolist() == [[3, 4, 0, 0], [5, 6, 1, 2]]
    assert torch.equal(unpack_questions(packed, questions), x)


def test_words_beyond_the_end_of_a_question_change_nothing(tiny, make_model, make_batch):
    config = tiny()
    model = make_model(config).eval()
    video, questions, _ = make_batch(config)
    noise = torch.where(questions.valid, questions.tokens, torch.full_like(questions.tokens, 9))
    assert torch.equal(model(video, questions), model(video, questions._replace(tokens=noise)))


def test_silence_and_black_frames_give_finite_answers_and_gradients(tiny, make_model, make_batch):
    config = tiny()
    model = make_model(config).train()
    video, questions, masking = make_batch(config)
    dark = Video(torch.zeros_like(video.frames), torch.full_like(video.mel, -100), *video[2:])
    logits = model(dark, questions, masking)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_bf16_autocast_trains(tiny, make_model, make_batch):
    config = tiny()
    model = make_model(config).train()
    video, questions, masking = make_batch(config)
    plain = model(video, questions, masking)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(video, questions, masking)
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert torch.nn.functional.cosine_similarity(logits, plain).mean() > 0.9


def test_encoder_parameters_are_the_encoders(tiny, make_model):
    model = make_model(tiny())
    ours = {id(p) for p in model.encoder_parameters()}
    names = {n.split(".")[0] for n, p in model.named_parameters() if id(p) in ours}
    assert names == {"vision", "audio"}
