"""The question: a transformer over words, or a Hugging Face encoder with its own tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsify.config import TextConfig
from sparsify.errors import CheckpointError, UsageError
from sparsify.model.layers import TransformerLayer, key_mask

__all__ = [
    "HuggingFaceText",
    "TokenizerVocabulary",
    "WordTransformer",
    "WordVocabulary",
    "empty_text_encoder",
    "load_text_encoder",
    "vocabulary_for",
]


_SCALE = 0.5  # standard deviation of new embeddings


class WordVocabulary(Protocol):
    """What the model needs of a vocabulary: ids of words (0 is padding), and how it is saved."""

    def __len__(self) -> int: ...

    def encode(self, text: str, max_words: int) -> list[int]: ...

    def unknown(self, text: str) -> list[str]: ...

    def to_json(self) -> str: ...


class WordTransformer(nn.Module):
    """Word and position embeddings, pre-norm transformer layers. The first output stands for the whole question."""

    def __init__(self, config: TextConfig, words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, config.dim)
        # As large as the words: "the cello louder than the violin" is the violin's opposite from the first step on.
        self.positions = nn.Parameter(_SCALE * torch.randn(config.max_words, config.dim))
        self.whole = nn.Parameter(_SCALE * torch.randn(config.dim))
        self.layers = nn.ModuleList(
            TransformerLayer(config.dim, config.heads, config.dropout) for _ in range(config.layers)
        )
        self.dim = config.dim
        nn.init.normal_(self.words.weight, std=_SCALE)

    def forward(self, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Word ids [Q, L] -> [Q, 1 + L, dim] and which of them are there."""
        if tokens.shape[1] > len(self.positions):
            raise UsageError(f"question: expected at most {len(self.positions)} words, got {tokens.shape[1]}")
        x = self.words(tokens) + self.positions[: tokens.shape[1]]
        x = torch.cat([self.whole.expand(len(x), 1, -1), x], dim=1)
        valid = torch.cat([valid.new_ones(len(valid), 1), valid], dim=1)
        mask = key_mask(valid)
        for layer in self.layers:
            x = layer(x, mask)
        return x, valid


class HuggingFaceText(nn.Module):
    """A Hugging Face encoder; its first token (``[CLS]``, ``<s>``) stands for the whole question."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.dim = encoder.config.hidden_size

    def forward(self, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Ids of ``TokenizerVocabulary`` [Q, L] -> [Q, L, dim] and which of them are there."""
        hidden = self.encoder(input_ids=(tokens - 1).clamp_min(0), attention_mask=valid.long()).last_hidden_state
        return hidden, valid


class TokenizerVocabulary:
    """A fast tokenizer in the place of a word vocabulary: its own ids plus one, so that 0 stays padding."""

    format = "sparsify-tokenizer"

    def __init__(self, tokenizer: Any) -> None:
        """``tokenizer``: a ``tokenizers.Tokenizer``; its own padding and truncation are switched off."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, name: str) -> TokenizerVocabulary:
        """The tokenizer that goes with ``text.weights``: a name or a local folder."""
        from sparsify._torchvision import ensure_torchvision

        ensure_torchvision()
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"text.weights: no tokenizer could be read from {name!r}: {_line(error)}") from error
        if not tokenizer.is_fast:
            raise CheckpointError(f"text.weights: {name!r} has no fast tokenizer (tokenizer.json)")
        return cls(tokenizer.backend_tokenizer)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size() + 1

    def encode(self, text: str, max_words: int) -> list[int]:
        """Ids of ``text``, special tokens included. ``UsageError`` for no word, or more than ``max_words`` tokens."""
        if not text.strip():
            raise UsageError("question: expected at least one word, got an empty text")
        ids = self._tokenizer.encode(text).ids
        if len(ids) > max_words:
            raise UsageError(f"question: expected at most {max_words} tokens, got {len(ids)}")
        return [i + 1 for i in ids]

    def unknown(self, text: str) -> list[str]:
        """Nothing is unknown to a subword tokenizer."""
        return []

    def to_json(self) -> str:
        """A JSON text that ``from_json`` reads back."""
        return (
            json.dumps({"format": self.format, "tokenizer": json.loads(self._tokenizer.to_str())}, ensure_ascii=False)
            + "\n"
        )

    @classmethod
    def from_json(cls, text: str, source: str = "vocabulary") -> TokenizerVocabulary:
        """The inverse of ``to_json``; ``CheckpointError`` naming ``source`` for anything else."""
        from tokenizers import Tokenizer

        try:
            return cls(Tokenizer.from_str(json.dumps(json.loads(text)["tokenizer"])))
        except Exception as error:  # the tokenizers library raises Exception itself
            raise CheckpointError(f"{source}: not a tokenizer: {error}") from error


def vocabulary_for(config: TextConfig, questions: Iterable[str]) -> WordVocabulary:
    """What turns a question into ids for this encoder: its own tokenizer, or the words of training ``questions``."""
    if config.weights is not None:
        return TokenizerVocabulary.from_pretrained(config.weights)
    from sparsify.data.vocabulary import Vocabulary

    return Vocabulary.build(questions)


def load_text_encoder(name: str) -> HuggingFaceText:
    """The encoder called ``text.weights``, all of whose parameters must be in the checkpoint (a pooler is left out)."""
    from sparsify._torchvision import ensure_torchvision

    ensure_torchvision()
    from transformers import AutoModel

    try:
        encoder, info = AutoModel.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"text.weights: {name!r} could not be read: {_line(error)}") from error
    missing = sorted(k for k in info["missing_keys"] if not k.startswith("pooler."))
    if missing or info["mismatched_keys"]:
        first = (missing or sorted(str(k) for k in info["mismatched_keys"]))[0]
        raise CheckpointError(f"text.weights: {name!r} has no (or another shape of) {first}")
    return HuggingFaceText(_without_pooler(encoder))


def empty_text_encoder(config: dict[str, Any]) -> HuggingFaceText:
    """An encoder of a saved architecture, with random weights: a checkpoint fills them."""
    from sparsify._torchvision import ensure_torchvision

    ensure_torchvision()
    from transformers import AutoConfig, AutoModel

    kind = config.get("model_type")
    return HuggingFaceText(
        _without_pooler(AutoModel.from_config(AutoConfig.for_model(**config | {"model_type": kind})))
    )


def _without_pooler(encoder: Any) -> Any:
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    return encoder


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
