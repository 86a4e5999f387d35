"""The whole model: two encoders with adapters between them, merging, a mixer, and a question's way to its answer.

frames   --mask--> Swin-V2 --+                 +-- visual tokens --+
                             | adapters        |    score, merge   +--> mixer --> super-tokens
log-mel  --mask--> HTS-AT  --+                 +-- audio tokens  --+                   |
questions --> text transformer --> fusion: words attend to the super-tokens <----------+   --> 42 answers
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.batch import Masking, Questions, Video
from sparsify.config import Config
from sparsify.model.adapters import CrossModalAdapter
from sparsify.model.audio import AudioEncoder
from sparsify.model.concepts import Concepts, QuestionMatching
from sparsify.model.fusion import AnswerHead
from sparsify.model.layers import TransformerLayer, key_mask
from sparsify.model.masking import KeptUnits
from sparsify.model.merging import CrossModalMerging
from sparsify.model.outputs import SuperTokens, TrainingLogits
from sparsify.model.text import WordTransformer, WordVocabulary, empty_text_encoder, load_text_encoder
from sparsify.model.time import audio_offsets, time_features
from sparsify.model.tokens import TokenHead, gather_rows
from sparsify.model.vision import VisionEncoder
from sparsify.model.weights import load_audio_weights, load_vision_weights

__all__ = ["ANSWER_COUNT", "SparsifyModel"]

ANSWER_COUNT = 42  # MUSIC-AVQA's fixed list


class SparsifyModel(nn.Module):
    """Answers questions about music videos. Nothing up to ``SuperTokens`` depends on the question.

    A sample's output depends on that sample alone, in training mode too: no batch statistics anywhere.
    """

    def __init__(
        self,
        config: Config,
        vocabulary: WordVocabulary,
        *,
        pretrained: bool = True,
        text_architecture: dict[str, Any] | None = None,
    ) -> None:
        """A new model; weights that ``config`` names are loaded, else random initialisation is logged as a warning.

        ``pretrained=False`` reads and says nothing: a checkpoint will fill everything; ``text_architecture`` is then
        the saved configuration of a Hugging Face text encoder, if there is one. Raises ``CheckpointError`` where
        weights are missing or do not fit, ``ConfigError`` for an impossible geometry.
        """
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.vision, self.audio = VisionEncoder(config.vision), AudioEncoder(config.audio)
        fusion, text = config.fusion, config.text
        self.adapters = nn.ModuleList(
            CrossModalAdapter(v, a, fusion.adapter_latents, fusion.adapter_dim)
            for v, a in zip(self.vision.stage_dims[:-1], self.audio.stage_dims[:-1], strict=True)
        )
        self.visual_tokens = _visual_head(self.vision, fusion.dim)
        self.audio_tokens = _audio_head(self.audio, fusion.dim)
        self.merging = CrossModalMerging(fusion.dim, config.merge, enabled=config.merge.enabled and not config.dense)
        self.mixer = nn.ModuleList(
            TransformerLayer(fusion.dim, fusion.heads, fusion.dropout) for _ in range(fusion.mixer_layers)
        )
        if text_architecture is not None:
            self.text: nn.Module = empty_text_encoder(text_architecture)
        elif text.weights is not None:
            self.text = load_text_encoder(text.weights)
        else:
            self.text = WordTransformer(text, len(vocabulary))
        self.words = nn.Linear(self.text.dim, fusion.dim)
        self.concepts, self.head = Concepts(fusion.dim), AnswerHead(fusion, ANSWER_COUNT)
        self.matching = QuestionMatching(fusion.dim, ANSWER_COUNT) if config.train.matching else None
        if pretrained:
            load_vision_weights(self.vision.swin, config.vision.weights)
            load_audio_weights(self.audio.htsat, config.audio.weights)

    def encode(self, video: Video, masking: Masking | None = None) -> SuperTokens:
        """Everything that does not depend on a question, once a video. ``masking`` None: nothing is masked."""
        config = self.config
        if masking is not None and config.dense:
            raise ValueError("encode: a dense model takes no masking; expected None")
        frames, segments = video.frames.shape[1], video.mel.shape[1]
        kept_v = kept_a = None
        if masking is not None:
            stratified = config.mask.stratified
            kept_v = KeptUnits.draw(
                masking.frame_seed.flatten(), masking.keep, config.vision.units, stratified=stratified
            )
            kept_a = KeptUnits.draw(masking.mel_seed.flatten(), masking.keep, config.audio.units, stratified=stratified)
        v, a = self.vision.embed(video.frames.flatten(0, 1)), self.audio.embed(video.mel.flatten(0, 1))
        last = len(self.adapters)
        for stage in range(last + 1):
            v, a = self.vision.stage(stage, v, kept_v), self.audio.stage(stage, a, kept_a)
            if stage < last:
                v, a = self._adapt(stage, v, a, video, kept_v, kept_a)

        visual_time = video.frame_time.unsqueeze(-1).expand(-1, -1, self.vision.side(last) ** 2).flatten(1)
        audio_time = self._audio_time(video, self.audio.side(last)).flatten(1)
        visual, visual_kept = self._leave(self.vision, v, kept_v, self.visual_tokens, visual_time, video, frames)
        audio, audio_kept = self._leave(self.audio, a, kept_a, self.audio_tokens, audio_time, video, segments)
        visual_out, audio_out = self.merging(visual, audio, visual_kept, audio_kept)

        tokens, size, valid = (
            torch.cat(pair, dim=1)
            for pair in zip(
                (visual_out.tokens, visual_out.size, visual_out.valid),
                (audio_out.tokens, audio_out.size, audio_out.valid),
                strict=True,
            )
        )
        seconds = torch.cat(
            [visual_time.gather(1, visual_out.position), audio_time.gather(1, audio_out.position)], dim=1
        )
        mask = key_mask(valid, size)
        for layer in self.mixer:
            tokens = layer(tokens, mask)
        return SuperTokens(tokens, size, valid, seconds * valid, visual_out, audio_out)

    def answer(self, tokens: SuperTokens, questions: Questions) -> Tensor:
        """Logits fp32 [Q, 42] of questions about encoded videos."""
        return self._judge(tokens, questions, None).answer

    def forward(
        self, video: Video, questions: Questions, masking: Masking | None = None, label: Tensor | None = None
    ) -> Tensor | TrainingLogits:
        """``answer(encode(video, masking), questions)``; in training, with the true answers ``label`` int64 [Q], these
        logits and those of the matching.
        """
        judged = self._judge(self.encode(video, masking), questions, label)
        return judged.answer if label is None else judged

    def _judge(self, tokens: SuperTokens, questions: Questions, label: Tensor | None) -> TrainingLogits:
        hidden, valid = self.text(questions.tokens, questions.valid)
        words, concepts = self.words(hidden), self.concepts(tokens)
        logits = self.head(words, valid, questions, tokens, concepts)
        if label is None or self.matching is None:
            return TrainingLogits(logits, None)
        return TrainingLogits(logits, self.matching(words, valid, label, concepts))

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that ``train.encoder_lr`` is for: Swin-V2, HTS-AT, and a Hugging Face text encoder."""
        yield from self.vision.parameters()
        yield from self.audio.parameters()
        if not isinstance(self.text, WordTransformer):
            yield from self.text.parameters()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json``, ``vocabulary.json``, ``model.safetensors``; each appears whole or not at all."""
        from sparsify.model.checkpoint import save

        save(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SparsifyModel:
        """The model in ``folder``; nothing is downloaded. Raises ``CheckpointError`` naming the file and the fault."""
        from sparsify.model.checkpoint import load

        return load(Path(folder))

    def _audio_time(self, video: Video, side: int) -> Tensor:
        """Seconds of every audio token on a ``side`` x ``side`` grid: [V, S, side * side]."""
        offsets = audio_offsets(self.config.audio, side, self.config.clip.segment_seconds).to(video.segment_time)
        return video.segment_time.unsqueeze(-1) + offsets

    def _time_features(self, seconds: Tensor, video: Video) -> Tensor:
        return time_features(seconds, video.duration).to(self.visual_tokens.row.dtype)

    def _adapt(
        self, stage: int, v: Tensor, a: Tensor, video: Video, kept_v: KeptUnits | None, kept_a: KeptUnits | None
    ) -> tuple[Tensor, Tensor]:
        videos, sides = len(video.frames), (v.shape[1], a.shape[1])
        visual_time = self._time_features(video.frame_time.unsqueeze(-1), video)  # [V, T, 1, F]
        audio_time = self._time_features(self._audio_time(video, sides[1]), video)  # [V, S, m, F]
        mask_v, mask_a = (
            None if kept is None else kept.tokens(side).view(videos, -1)
            for kept, side in zip((kept_v, kept_a), sides, strict=True)
        )
        shapes = v.shape, a.shape
        v, a = v.flatten(1, 2).unflatten(0, (videos, -1)), a.flatten(1, 2).unflatten(0, (videos, -1))
        v, a = self.adapters[stage](v, a, visual_time, audio_time, mask_v, mask_a)
        return v.reshape(shapes[0]), a.reshape(shapes[1])

    def _leave(
        self,
        encoder: VisionEncoder | AudioEncoder,
        x: Tensor,
        kept: KeptUnits | None,
        head: TokenHead,
        seconds: Tensor,
        video: Video,
        images: int,
    ) -> tuple[Tensor, Tensor]:
        """The last stage [V * images, side, side, C] as kept tokens [V, N, D] and dense token indices int64 [V, N]."""
        side = x.shape[1]
        x = x.flatten(1, 2)
        if kept is None:
            cell = torch.arange(side * side, device=x.device).expand(len(x), -1)
        else:
            cell = kept.cells(side)
            x = gather_rows(x, cell)
        x = encoder.finish(x).unflatten(0, (-1, images)).flatten(1, 2)
        cell = cell.unflatten(0, (-1, images))
        first = side * side * torch.arange(images, device=x.device).unsqueeze(-1)
        dense = (cell + first).flatten(1)
        return head(x, cell.flatten(1), self._time_features(seconds.gather(1, dense), video)), dense


def _visual_head(encoder: VisionEncoder, dim: int) -> TokenHead:
    side = encoder.side(len(encoder.stage_dims) - 1)
    cell = torch.arange(side * side)
    return TokenHead(encoder.stage_dims[-1], dim, cell // side, cell % side)


def _audio_head(encoder: AudioEncoder, dim: int) -> TokenHead:
    config, side = encoder.config, encoder.side(len(encoder.stage_dims) - 1)
    bands = max(1, config.mel_bins * side // config.spec_size)  # tokens from the lowest mel bin to the highest
    row = torch.arange(side * side) // side
    return TokenHead(encoder.stage_dims[-1], dim, row % bands, torch.zeros_like(row))
