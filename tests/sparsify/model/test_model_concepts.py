"""Concepts: pooling that does not normalise, words that read them, and questions matched with videos."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sparsify.model import SparsifyModel
from sparsify.model.concepts import ConceptReading, Concepts, QuestionMatching, strongest_and_mean


def test_strongest_and_mean_of_a_table():
    evidence = torch.tensor([[[1.0, -3.0], [4.0, -1.0], [9.0, 9.0]]])
    size = torch.tensor([[3.0, 1.0, 7.0]])
    valid = torch.tensor([[True, True, False]])
    strongest, mean = strongest_and_mean(evidence, size, valid)
    assert strongest.tolist() == [[4.0, -1.0]]
    assert mean.tolist() == [[(3 * 1.0 + 4.0) / 4, (3 * -3.0 - 1.0) / 4]]


def test_the_strongest_has_a_gradient_when_compiled_in_bf16():
    """The compiled maximum is rounded, and what it is the maximum of is not: nothing may ask whether both are equal."""
    torch.manual_seed(0)
    project = torch.nn.Linear(16, 16)
    tokens, size = torch.randn(3, 20, 16), torch.ones(3, 20)

    def strongest(x):
        return strongest_and_mean(F.gelu(project(x)), size, torch.ones(3, 20, dtype=torch.bool))[0]

    def gradient(function):
        project.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            function(tokens).float().square().sum().backward()
        return project.weight.grad.clone()

    found = gradient(torch.compile(strongest, fullgraph=True))
    torch.testing.assert_close(found, gradient(strongest), rtol=0.02, atol=0.02)


def test_concepts_tell_the_modalities_apart_and_see_no_empty_slot(tiny, make_model, make_batch):
    config = tiny(merge__fence=1.5)
    video, _, _ = make_batch(config)
    tokens = make_model(config).encode(video)
    assert not tokens.valid.all(), "some slots must be empty for this to mean anything"
    torch.manual_seed(1)
    concepts = Concepts(16)
    found = concepts(tokens)
    assert found.shape == (3, 64)
    noise = torch.where(tokens.valid.unsqueeze(-1), tokens.tokens, 77.0)
    assert torch.equal(concepts(tokens._replace(tokens=noise)), found)
    slots = tokens.visual.tokens.shape[1]
    raw = concepts.norm.forward
    concepts.norm.forward = lambda x: x  # the norm mixes all parts
    louder = tokens.tokens.clone()
    louder[:, slots:] = louder[:, slots:].flip(-1)
    before, after = concepts(tokens), concepts(tokens._replace(tokens=louder))
    concepts.norm.forward = raw
    assert torch.equal(before[:, :32], after[:, :32])
    assert not torch.allclose(before[:, 32:], after[:, 32:])


def test_a_word_reads_the_product_of_what_it_asks_and_what_is_there():
    torch.manual_seed(0)
    reading = ConceptReading(8)
    words, concepts = torch.randn(2, 5, 8), torch.randn(2, 32)
    read = reading(words, concepts) - words
    nothing = reading(words, torch.zeros(2, 32)) - words
    twice = reading(words, 2 * concepts) - words
    torch.testing.assert_close(nothing, reading.out.bias.expand(2, 5, 8))
    torch.testing.assert_close(twice - nothing, 2 * (read - nothing))
    assert not torch.allclose(read[:, 0], read[:, 1]), "two words of one question read different things"


def test_matching_is_a_scaled_cosine_and_needs_the_answer():
    torch.manual_seed(0)
    matching = QuestionMatching(16, 42)
    words, valid = torch.randn(6, 5, 16), torch.rand(6, 5) < 0.7
    valid[:, 0] = True
    label, concepts = torch.arange(6), torch.randn(4, 64)
    logits = matching(words, valid, label, concepts)
    assert logits.shape == (6, 4)
    assert logits.dtype == torch.float32
    assert logits.abs().max() <= 10.0 + 1e-4
    torch.testing.assert_close(matching(words, valid, label, 3 * concepts)[:, 0] > -11, torch.ones(6, dtype=torch.bool))
    noise = torch.where(valid.unsqueeze(-1), words, 50.0)
    torch.testing.assert_close(matching(noise, valid, label, concepts), logits)
    assert not torch.allclose(matching(words, valid, label.flip(0), concepts), logits)


def test_the_logits_beside_the_matching_are_the_answers(tiny, make_model, make_batch):
    config = tiny(train__matching=1.0)
    model = make_model(config).train()
    video, questions, masking = make_batch(config)
    label = torch.arange(len(questions.video_index))
    logits, matching = model(video, questions, masking, label)
    assert matching.shape == (6, 3)
    torch.testing.assert_close(logits, model(video, questions, masking))
    F.cross_entropy(matching, questions.video_index).backward()
    reached = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached >= {"vision", "audio", "visual_tokens", "audio_tokens", "text", "concepts", "matching"}
    assert "head" not in reached


def test_a_model_that_does_not_match_has_nothing_of_it(tiny, make_model, make_batch):
    model = make_model(tiny())
    assert not [n for n, _ in model.named_parameters() if n.startswith("matching")]
    video, questions, masking = make_batch(tiny())
    assert model(video, questions, masking, torch.zeros(6, dtype=torch.int64)).matching is None


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_checkpoint_keeps_the_matching(tiny, make_model, weight, tmp_path):
    model = make_model(tiny(train__matching=weight))
    model.save_pretrained(tmp_path / "m")
    again = SparsifyModel.from_pretrained(tmp_path / "m")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert (again.matching is None) == (weight == 0)
