"""The sections of a report for which checkpoints are asked: curves over keep ratio and fence, likeness, examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.errors import SparsifyError
from sparsify.progress import Advance
from sparsify.report import figures_probe, probe
from sparsify.report._charts import Chart
from sparsify.report.page import Picture, Section
from sparsify.report.runs import Group, Run

if TYPE_CHECKING:
    from sparsify.data.music_avqa import DataRoot, Question, Split

__all__ = ["Asker", "TITLES"]

EXAMPLES = 3  # clips
SHOWN = 3  # questions a clip
TITLES = {
    "keep": "Accuracy against keep ratio and fence",
    "likeness": "How alike neighbours are",
    "examples": "Examples with their key tokens",
}
HOW = "`sparsify report RUN... --data ROOT` asks the checkpoints."


class Asker:
    """Asks the best checkpoint of the first run of each group about the split of ``data`` that judged it, or about
    so many ``clips`` spread over it.

    ``data`` None: every section says what it lacks. ``cache`` holds decoded clips.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        output: Path,
        data: DataRoot | None,
        cache: Path | None = None,
        clips: int | None = None,
    ) -> None:
        self.groups, self.output, self.clips = groups, output, clips
        self.cache_folder = cache or (data.root / "cache" if data is not None else None)
        self.answers = probe.Answers(output / "probe.json")
        self.why: list[str] = [] if data is not None else [f"No data folder was named: {HOW}"]
        self._root = data

    def sections(self, advance: Advance) -> dict[str, Section]:
        """The three sections by their keys in ``TITLES``."""
        keep: list[tuple[Group, list[tuple[float, float, float]]]] = []
        fence: list[tuple[Group, list[tuple[float, float, float]]]] = []
        likeness: list[Chart] = []
        pictures: list[Picture] = []
        for group, run, judged in self._judged():
            config = judged.model.config
            what = group.name
            keeps = [1.0] if config.dense else list(probe.KEEPS)
            found = [(k, probe.accuracy_at(judged, k, config.merge.fence, self.answers, advance)) for k in keeps]
            keep.append((group, [(k, f["accuracy"], f["super_tokens"]) for k, f in found]))
            if config.merge.enabled and not config.dense:
                fences = [(f, probe.accuracy_at(judged, 1.0, f, self.answers, advance)) for f in probe.FENCES]
                fence.append((group, [(x, f["accuracy"], f["super_tokens"]) for x, f in fences]))
            alike = probe.neighbours(judged, self.answers, advance)
            likeness.append(figures_probe.likeness(alike, f"likeness-{group.number + 1}", what))
            if not pictures and config.merge.enabled and not config.dense:
                pictures = list(self._examples(judged, run, advance))
        floor = next((run.floor for group, _ in keep for run in group.runs if run.floor is not None), None)
        curves = [figures_probe.accuracy_against("keep", keep, floor)] if keep else []
        if fence:
            curves.append(figures_probe.accuracy_against("fence", fence, None))
        no_fence = ["No run here merges tokens, so no fence can be tried."] if keep and not fence else []
        no_picture = ["No run here merges tokens, so there are no key tokens to show."] if keep and not pictures else []
        leads = {
            "keep": f"The best checkpoint of each setting's first seed, asked anew{self._about()}.",
            "likeness": "Cosine between tokens as they leave the encoders, over the first clips of the judged split.",
            "examples": "Clips of the judged split, what became of their tokens, and what the model answers.",
        }
        parts: dict[str, tuple[Sequence[Chart | Picture], list[str]]] = {
            "keep": (curves, no_fence),
            "likeness": (likeness, []),
            "examples": (pictures, no_picture),
        }
        return {
            key: Section(key, TITLES[key], leads[key] if charts else "", charts, missing=[*why, *self.why])
            for key, (charts, why) in parts.items()
        }

    def steps(self) -> int:
        """Videos that ``sections`` is going to encode, at most."""
        if self._root is None:
            return 0
        split = self._split(self.groups[0].runs[0])
        videos = 0 if split is None else len(split.videos)
        return len(self.groups) * (len(probe.KEEPS) + len(probe.FENCES) - 1) * videos

    def _judged(self) -> Iterator[tuple[Group, Run, probe.Judged]]:
        """Each group with a checkpoint and its split; why the others have none goes to ``why``."""
        if self._root is None:
            return
        from sparsify.data.cache import ClipCache
        from sparsify.data.dataset import VideoDataset
        from sparsify.model import SparsifyModel
        from sparsify.report.scores import floor_of

        for group in self.groups:
            run = group.runs[0]
            split = self._split(run)
            if run.best is None or split is None:
                lacks = "has no best/ to ask" if run.best is None else f"was not judged by a split of {self._root.root}"
                self.why.append(f"{group.name} is left out: {run.folder} {lacks}.")
                continue
            try:
                model = SparsifyModel.from_pretrained(run.best).to(_device())
                cache = ClipCache(self.cache_folder or Path(), model.config)
                inputs = model.config.train.inputs
                dataset = VideoDataset(self._root, split, model.config, model.vocabulary, cache, inputs)
            except SparsifyError as error:
                self.why.append(f"{group.name} is left out: {error}")
                continue
            yield group, run, probe.Judged(model, dataset, split, floor_of(self._root), probe.digest(run.best))

    def _split(self, run: Run) -> Split | None:
        """The split that judged ``run``, if it is what the data folder has."""
        judged = None if run.results is None else run.results.get("judged")
        if self._root is None or judged is None or not self._root.has(judged):
            return None
        split = self._root.split(judged)
        return self._part(split) if split.fingerprint == run.fingerprint else None

    def _part(self, split: Split) -> Split:
        """``clips`` of the videos of ``split``, spread over it."""
        if self.clips is None or self.clips >= len(split.videos):
            return split
        videos = list(split.videos)
        chosen = {videos[i * len(videos) // self.clips] for i in range(self.clips)}
        part = tuple(question for question in split.questions if question.video_id in chosen)
        return replace(split, questions=part, fingerprint=f"{split.fingerprint}, {self.clips} videos")

    def _about(self) -> str:
        return "" if self.clips is None else f" about {self.clips:,} clips (all, where there are no more)"

    def _examples(self, judged: probe.Judged, run: Run, advance: Advance) -> Iterator[Picture]:
        """Pictures of clips spread over the split, each asked questions of different types."""
        from sparsify.ask import ask
        from sparsify.report.explain import draw

        assert self._root is not None
        videos = list(judged.split.videos.items())
        places = sorted({int((i + 0.5) * len(videos) / EXAMPLES) for i in range(min(EXAMPLES, len(videos)))})
        for place in places:
            video, questions = videos[place]
            some = _different(questions)
            truth = "; ".join(f"{q.text} {q.answer}" for q in some)
            asked = {"ask": "example", "checkpoint": judged.digest, "split": judged.split.fingerprint, "video": video}
            path = self.output / f"example-{video}-{judged.digest[:8]}.png"  # of this model and this clip

            def compute(video: str = video, some: list[Question] = some, path: Path = path) -> bool:
                assert self._root is not None
                found = ask(judged.model, self._root.video_path(video), [q.text for q in some])
                draw(found.clip, found.tokens, judged.model.config, found.answers, path, source=video)
                return True

            try:
                if not path.exists():
                    self.answers.forget(asked)
                self.answers.get(asked, compute)
            except SparsifyError as error:
                self.why.append(f"{video} is not shown: {error}")
                continue
            advance(1)
            yield Picture(
                path,
                f"Clip {video}: its frames and spectrogram with key tokens outlined, merged tokens tinted in the "
                f"colour of their key, and the likeliest answers. True answers: {truth}.",
                f"{video}, answered by {run.folder.name}. True answers: {truth}.",
            )


def _different(questions: Sequence[Question]) -> list[Question]:
    """Up to ``SHOWN`` questions, of as many types as there are."""
    first: dict[str, Question] = {}
    for question in questions:
        first.setdefault(str(question.type), question)
    rest = [q for q in questions if q not in first.values()]
    return [*first.values(), *rest][:SHOWN]


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
