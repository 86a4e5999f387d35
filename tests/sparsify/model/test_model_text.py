"""The question encoders: words, and a Hugging Face encoder with its tokenizer, from a local folder."""

from __future__ import annotations

import pytest
import torch

from sparsify.errors import CheckpointError, UsageError
from sparsify.model import SparsifyModel
from sparsify.model.text import TokenizerVocabulary, WordTransformer, load_text_encoder, vocabulary_for

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "how", "many", "instruments", "are", "sounding", "?", "pia", "##no"]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def test_the_tokenizer_stands_in_for_the_vocabulary(bert_folder):
    vocabulary = TokenizerVocabulary.from_pretrained(str(bert_folder))
    ids = vocabulary.encode("How many piano?", max_words=16)
    assert ids == [3, 5, 6, 11, 12, 10, 4], "the tokenizer's ids plus one: 0 is padding"
    assert len(vocabulary) == len(WORDS) + 1
    again = TokenizerVocabulary.from_json(vocabulary.to_json())
    assert again.encode("How many piano?", max_words=16) == ids
    with pytest.raises(UsageError, match="expected at least one word"):
        vocabulary.encode("  ", max_words=16)
    with pytest.raises(UsageError, match="at most 4 tokens, got 7"):
        vocabulary.encode("How many piano?", max_words=4)
    with pytest.raises(CheckpointError, match=r"vocabulary.json: not a tokenizer"):
        TokenizerVocabulary.from_json("{}", source="vocabulary.json")


def test_the_vocabulary_follows_the_encoder(bert_folder, tiny):
    assert isinstance(vocabulary_for(tiny(text__weights=str(bert_folder)).text, ["how"]), TokenizerVocabulary)
    words = vocabulary_for(tiny().text, ["how many zithers"])
    assert words.encode("zithers", 4) != words.encode("kazoos", 4)


def test_the_encoder_is_loaded_whole_and_runs_as_its_own(bert_folder):
    from transformers import BertModel

    theirs = BertModel.from_pretrained(bert_folder, add_pooling_layer=False).eval()
    ours = load_text_encoder(str(bert_folder)).eval()
    expected = theirs.state_dict()
    assert ours.encoder.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in ours.encoder.state_dict().items())
    ids = torch.tensor([[2, 4, 5, 3], [2, 6, 3, 0]])
    valid = ids > 0
    hidden, _ = ours((ids + 1) * valid, valid)
    torch.testing.assert_close(hidden, theirs(input_ids=ids, attention_mask=valid.long()).last_hidden_state)


def test_a_model_with_it_trains_and_comes_back_without_the_original(bert_folder, tiny, make_batch, tmp_path):
    config = tiny(text__weights=str(bert_folder))
    model = SparsifyModel(config, TokenizerVocabulary.from_pretrained(str(bert_folder))).train()
    video, questions, _ = make_batch(config)
    questions = questions._replace(tokens=questions.tokens.clamp_max(len(WORDS)))
    model(video, questions).sum().backward()
    model.save_pretrained(tmp_path / "run")
    config_file = tmp_path / "run" / "config.json"
    config_file.write_text(config_file.read_text().replace(str(bert_folder), "/nowhere/bert"))
    again = SparsifyModel.from_pretrained(tmp_path / "run")
    assert again.vocabulary.encode("how many", 8) == model.vocabulary.encode("how many", 8)
    assert torch.equal(again(video, questions), model.eval()(video, questions))
    assert {id(p) for p in again.text.parameters()} <= {id(p) for p in again.encoder_parameters()}


def test_a_missing_text_parameter_is_named(bert_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(bert_folder, tmp_path / "bert")
    path = tmp_path / "bert" / "model.safetensors"
    state = load_file(path)
    del state["encoder.layer.0.output.dense.bias"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"text.weights: .* encoder.layer.0.output.dense.bias"):
        load_text_encoder(str(tmp_path / "bert"))


def test_a_folder_without_an_encoder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"text.weights: .* could not be read"):
        load_text_encoder(str(tmp_path))


def test_too_many_words_are_refused(tiny):
    text = WordTransformer(tiny().text, 100)
    with pytest.raises(UsageError, match="at most 16 words, got 17"):
        text(torch.ones(1, 17, dtype=torch.long), torch.ones(1, 17, dtype=torch.bool))
