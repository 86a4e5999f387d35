"""The whole model: two encoders with adapters between them, merging, a mixer, and a question's way to its answer.

frames   --mask--> Swin-V2 --+                 +-- visual tokens --+
                             | adapters        |    score, merge   +--> mixer --> super-tokens
log-mel  --mask--> HTS-AT  --+                 +-- audio tokens  --+                   |
questions --> text transformer --> fusion: words attend to the super-tokens <----------+   --> 42 answers
"""

from __future__ import annotations

import math
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
from sparsify.model.masking import KeptUnits, draw_units
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
        self.vision = VisionEncoder(config.vision, dense=config.dense)
        self.audio = AudioEncoder(config.audio, dense=config.dense)
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
        kept_v = kept_a = None
        if masking is None:
            v, a = self.vision.embed(video.frames.flatten(0, 1)), self.audio.embed(video.mel.flatten(0, 1))
        else:
            kept_v, kept_a = draw_units(video, masking, self.config, self.vision.masked, self.audio.masked)
            v, a = self.vision.embed_kept(kept_v), self.audio.embed_kept(kept_a)
        last = len(self.adapters)
        for stage in range(last + 1):
            v = self.vision.stage(stage, v, kept_v.plan if kept_v else None)
            a = self.audio.stage(stage, a, kept_a.plan if kept_a else None)
            if stage < last:
                v, a = self._adapt(stage, v, a, video, kept_v, kept_a)

        visual_time = video.frame_time.unsqueeze(-1).expand(-1, -1, self.vision.side(last) ** 2).flatten(1)
        audio_time = self._audio_time(video, self.audio.side(last)).flatten(1)
        visual, visual_kept = self._leave(self.vision, v, kept_v, self.visual_tokens, visual_time, video)
        audio, audio_kept = self._leave(self.audio, a, kept_a, self.audio_tokens, audio_time, video)
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
        mask = key_mask(valid, size) if self.merging.enabled else None
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
        return video.segment_time.unsqueeze(-1) + self._audio_offsets(side, video)

    def _audio_offsets(self, side: int, video: Video) -> Tensor:
        starts = video.segment_time
        return audio_offsets(self.config.audio, side, self.config.clip.segment_seconds, starts.device).to(starts.dtype)

    def _time_features(self, seconds: Tensor, video: Video) -> Tensor:
        return time_features(seconds, video.duration).to(self.visual_tokens.row.dtype)

    def _adapt(
        self, stage: int, v: Tensor, a: Tensor, video: Video, kept_v: KeptUnits | None, kept_a: KeptUnits | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens after ``stage``, dense or packed, after reading each other: [V, groups, tokens, C] for the adapter."""
        videos, frames, segments = len(video.frames), video.frame_time, video.segment_time
        offsets = self._audio_offsets(self.audio.side(stage), video)
        if kept_v is None or kept_a is None:
            groups = frames.shape[1], segments.shape[1]
            seconds = frames.unsqueeze(-1), segments.unsqueeze(-1) + offsets  # [V, T, 1], [V, S, m]
        else:
            groups = kept_v.groups, kept_a.groups
            seen = frames.flatten()[kept_v.plan.image].view(videos, groups[0], -1)  # of each unit of a frame
            cells = kept_a.plan.cells(self.audio.side(stage) // kept_a.plan.grid)
            heard = segments.flatten()[kept_a.plan.image].unsqueeze(1) + offsets[cells]
            seconds = seen[:, :, :1], heard.view(videos, groups[1], -1)
        times = [self._time_features(x, video) for x in seconds]
        out = self.adapters[stage](
            v.reshape(videos, groups[0], -1, v.shape[-1]), a.reshape(videos, groups[1], -1, a.shape[-1]), *times
        )
        return out[0].reshape(v.shape), out[1].reshape(a.shape)

    def _leave(
        self,
        encoder: VisionEncoder | AudioEncoder,
        x: Tensor,
        kept: KeptUnits | None,
        head: TokenHead,
        seconds: Tensor,
        video: Video,
    ) -> tuple[Tensor, Tensor]:
        """The last stage, [V * images, side, side, C] or packed, as tokens [V, N, D] in the order of their dense token
        indices int64 [V, N].
        """
        videos, tokens = seconds.shape
        area = encoder.side(len(encoder.stage_dims) - 1) ** 2
        x = encoder.finish(x).reshape(videos, -1, x.shape[-1])
        if kept is None:
            dense = torch.arange(tokens, device=x.device).expand(videos, -1)
        else:
            plan = kept.plan
            inside = plan.cells(math.isqrt(area) // plan.grid)  # [M, u * u]
            dense = (plan.image % (tokens // area) * area).unsqueeze(1) + inside
            dense = dense.view(videos, -1)
            if inside.shape[1] > 1:  # units of several tokens: their rows lie between each other
                dense, order = dense.sort(dim=1)
                x = gather_rows(x, order)
        return head(x, dense % area, self._time_features(seconds.gather(1, dense), video)), dense


def _visual_head(encoder: VisionEncoder, dim: int) -> TokenHead:
    side = encoder.side(len(encoder.stage_dims) - 1)
    cell = torch.arange(side * side)
    return TokenHead(encoder.stage_dims[-1], dim, cell // side, cell % side)


def _audio_head(encoder: AudioEncoder, dim: int) -> TokenHead:
    config, side = encoder.config, encoder.side(len(encoder.stage_dims) - 1)
    bands = max(1, config.mel_bins * side // config.spec_size)  # tokens from the lowest mel bin to the highest
    row = torch.arange(side * side) // side
    return TokenHead(encoder.stage_dims[-1], dim, row % bands, torch.zeros_like(row))
