"""A whole training run: decode, build or resume the model, train, judge the best checkpoint, write what it found."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import sparsify
from sparsify.config import Config
from sparsify.data.cache import ClipCache
from sparsify.data.dataset import VideoDataset, cores, prepare
from sparsify.data.music_avqa import DataRoot, Split
from sparsify.data.subset import apply_subset
from sparsify.data.vocabulary import Vocabulary
from sparsify.errors import CheckpointError, DataError, TrainingError, UsageError
from sparsify.model import SparsifyModel
from sparsify.progress import Advance, format_seconds, progress_bar, say
from sparsify.report.scores import floor_of
from sparsify.seal import check_seal
from sparsify.training.checkpoints import keep_epoch, kept, resumable, tidy, write_text
from sparsify.training.evaluate import EvalResult, evaluate_dataset, masked_keep, write_predictions
from sparsify.training.loading import gather_skipped, share, worker_died
from sparsify.training.optim import Precision, choose_precision
from sparsify.training.run import RunState, claim_run, lock_run, read_state
from sparsify.training.stopping import InterruptedRun
from sparsify.training.trainer import Trainer, TrainingData

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["train"]


def train(
    config: Config | None,
    root: DataRoot,
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    init: str | os.PathLike[str] | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Train on ``root``'s training split into the run folder ``output``; the test split judges validation's best epoch.

    Args:
        config: what to train; None with ``resume`` takes the run's own.
        root: the data folder; needs a training and a validation split.
        output: the run folder. It must not hold a run yet, unless ``resume``.
        resume: go on from ``output/last``; from the beginning where the run had not come to save one.
        init: a checkpoint folder whose weights to start from.
        cache_folder: decoded clips; ``root/cache`` by default.
        progress: bars and messages on stderr.
        stop_after: stop after so many steps, as Ctrl-C does.

    Returns:
        What ``output/results.json`` holds: configuration, splits, scores, seconds, machine, versions. Beside it,
        ``predictions.json`` has the best checkpoint's answer to every question of the judged split, unmasked.

    Raises:
        UsageError: the folder is in use or holds another run.
        DataError, CheckpointError: the data, or the checkpoint to start from, is not as it should be.
        TrainingError: the loss is not finite, or a data loading process died.
        InterruptedRun: (a ``KeyboardInterrupt``) SIGINT or SIGTERM; ``output/last`` is saved.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    output = Path(output)
    # Autocast is ours: evaluation and training share it. Accelerate joins torchrun's processes on a CPU only if told.
    # Of the shares of a data set that processes decode, one may be done minutes before another: more than NCCL waits.
    accelerator = Accelerator(
        mixed_precision="no",
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=1))],
    )
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(lock_run(output))
            config = claim_run(output, config, resume)
        elif config is None:
            config = claim_run(output, None, True)
        experiment = _Experiment(accelerator, config, root, output, Path(cache_folder or root.root / "cache"), progress)
        try:
            return experiment.run(resume, Path(init) if init is not None else None, stop_after)
        except InterruptedRun as stopped:
            experiment.say(str(stopped))
            raise
        except RuntimeError as error:  # amid a step, in one of several processes, or in the last evaluation
            if not worker_died(error):
                raise
            raise TrainingError(f"a data loading process died (out of memory?): {error}; {kept(output)}") from error


@dataclass
class _Experiment:
    accelerator: Accelerator
    config: Config
    root: DataRoot
    output: Path
    cache_folder: Path
    progress: bool
    versions: dict[str, str] = field(init=False)  # as the run begins: files may change under it

    def run(self, resume: bool, init: Path | None, stop_after: int | None) -> dict[str, Any]:
        """The steps of a run, one after the other."""
        config, output, main = self.config, self.output, self.accelerator.is_main_process
        self.versions = _versions()
        if main:
            tidy(output)
        self.accelerator.wait_for_everyone()
        source = self.checkpoint() if resume else None
        if source is not None and (output / "results.json").exists():
            self.say(f"{output}: this run is complete; {output / 'results.json'} holds its results")
            return json.loads((output / "results.json").read_text(encoding="utf-8"))
        precision = choose_precision(config.train.precision, self.accelerator.device)
        self.say(self.introduction(precision))
        started = time.monotonic()
        cache = ClipCache(self.cache_folder, config)
        splits = self.splits()
        skipped = {name: self.decode(split, cache) for name, split in splits.items()}
        state = self.state(source, splits, skipped["train"])
        state.seconds["prepare"] += time.monotonic() - started
        if main and source is None:
            write_text(output / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
        if source is not None:
            model = SparsifyModel.from_pretrained(source)
        else:
            model = self.load_model(init) if init else self.new_model(splits["train"])

        def dataset(name: str) -> VideoDataset:
            return VideoDataset(
                self.root, splits[name], config, model.vocabulary, cache, config.train.inputs, skipped[name]
            )

        usable = _usable(splits["train"], state)
        data = TrainingData(
            dataset("train"), splits["train"], usable, dataset("val"), splits["val"], floor_of(self.root)
        )
        trainer = Trainer(
            config,
            model,
            data,
            output,
            self.accelerator,
            precision,
            state,
            source,
            progress=self.progress,
            stop_after=stop_after,
        )
        trainer.run()
        judged = "test" if "test" in splits else "val"
        results = self.finish(trainer, splits, judged, dataset(judged), skipped)
        if main:
            write_text(output / "results.json", json.dumps(results, indent=1) + "\n")
        self.accelerator.wait_for_everyone()
        return results

    def introduction(self, precision: Precision) -> str:
        """The configuration and what it runs on, once."""
        processes = self.accelerator.num_processes
        return (
            f"config: {json.dumps(self.config.to_dict())}\n"
            f"run folder {self.output}; {processes} x {self.accelerator.device}, {torch.get_num_threads()} threads; "
            f"{precision.name}: {precision.reason}"
        )

    def splits(self) -> dict[str, Split]:
        """The splits by name; of the training split the part that the configuration names."""
        names = ("train", "val", "test") if self.root.has("test") else ("train", "val")
        splits = {name: self.root.split(name) for name in names}
        select = self.config.select
        if select.subset is not None:
            evaluated = [split for name, split in splits.items() if name != "train"]
            splits["train"], leaks = apply_subset(
                splits["train"], select.subset, evaluated, filter_leaks=select.filter_leaks
            )
            for name, count in leaks.items():
                self.say(f"{select.subset}: left out {count} questions of the split {name!r}, which judges the run")
        return splits

    def decode(self, split: Split, cache: ClipCache) -> dict[str, str]:
        """Every clip of ``split`` into the cache, a share by each process; the unreadable videos with the reason."""
        self.say(split.describe())
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = set(share(list(split.videos), rank, world))
        part = replace(split, questions=tuple(q for q in split.questions if q.video_id in mine))
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", world))  # processes on this machine
        workers = None if world == 1 else max(1, cores() // beside)
        with self.bar(f"decode {split.name}", len(mine)) as advance:
            report = prepare(self.root, part, self.config, cache, progress=advance, workers=workers)
        unreadable = gather_skipped(report.skipped, world)
        skipped = {video: unreadable[video] for video in split.videos if video in unreadable}
        for video, reason in skipped.items():
            self.say(f"  skipped {video}: {reason}")
        return skipped

    def checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole; the others are spoken of."""
        source, wrong = resumable(self.output)
        if wrong:
            self.say(f"{wrong}; going on from {source}")
        return source

    def state(self, source: Path | None, splits: dict[str, Split], unreadable: dict[str, str]) -> RunState:
        """Where the run is: at its beginning, or where ``source`` says."""
        if source is None:
            fingerprints = {name: split.fingerprint for name, split in splits.items()}
            state = RunState(fingerprints=fingerprints, left_out=list(unreadable))
        else:
            state = self.load_state(source, splits)
        state.train_file = str(self.root.annotation_path("train").resolve())
        state.skipped |= unreadable
        return state

    def load_state(self, source: Path, splits: dict[str, Split]) -> RunState:
        """The state in ``source``; ``UsageError`` when the data is no longer the run's."""
        state = read_state(source)
        for name, split in splits.items():
            used = state.fingerprints.get(name)
            if used != split.fingerprint:
                raise UsageError(f"{split.path}: fingerprint {split.fingerprint}, but the run to resume used {used}")
        ended = source == self.output / "last" and state.step == 0 and state.epoch > 0
        if ended and self.accelerator.is_main_process:  # a kill may have come after the save and before this
            keep_epoch(self.output, state.epoch - 1, self.config.train.keep_last)
        self.say(f"resuming in epoch {state.epoch + 1} after {state.step} of its steps")
        return state

    def new_model(self, split: Split) -> SparsifyModel:
        torch.manual_seed(self.config.train.seed)
        return SparsifyModel(self.config, Vocabulary.build(question.text for question in split.questions))

    def load_model(self, folder: Path) -> SparsifyModel:
        """A model of this configuration with the weights in ``folder``."""
        source = SparsifyModel.from_pretrained(folder)
        torch.manual_seed(self.config.train.seed)
        model = SparsifyModel(self.config, source.vocabulary, pretrained=False)
        ours, theirs = model.state_dict(), source.state_dict()
        for name in ours.keys() | theirs.keys():
            if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
                raise CheckpointError(
                    f"{folder}: {name!r} does not fit the configured model; expected a checkpoint of the same sizes"
                )
        model.load_state_dict(theirs)
        return model

    def finish(
        self,
        trainer: Trainer,
        splits: dict[str, Split],
        judged: str,
        dataset: VideoDataset,
        skipped: dict[str, dict[str, str]],
    ) -> dict[str, Any]:
        """Evaluate the best checkpoint on ``judged``, unmasked and masked; write its answers, gather the results."""
        state, config = trainer.state, self.config
        check_seal(self.output / "best")
        model = SparsifyModel.from_pretrained(self.output / "best").to(self.accelerator.device)
        found = {"unmasked": self.judge(model, splits[judged], dataset, trainer, 1.0)}
        if (keep := masked_keep(config)) < 1:
            found["masked"] = self.judge(model, splits[judged], dataset, trainer, keep)
        state.seconds["evaluate"] += sum(result.seconds for result in found.values())
        if self.accelerator.is_main_process:
            write_predictions(self.output / "predictions.json", found["unmasked"].predictions)
        main = found["masked" if config.mask.eval and "masked" in found else "unmasked"]
        self.say(
            f"best epoch {(state.best_epoch or 0) + 1}, {100 * state.best_accuracy:.2f} % on validation; on {judged}:"
        )
        self.say(main.scores.table())
        if "masked" in found:
            parts = (f"{name} {100 * result.accuracy:.2f} %" for name, result in found.items())
            self.say(f"{', '.join(parts)} (masked: {keep:.0%} of the input encoded)")
        self.say(f"{format_seconds(sum(state.seconds.values()))} in all; results in {self.output / 'results.json'}")
        return {
            "config": config.to_dict(),
            "inputs": config.train.inputs,
            "precision": trainer.precision._asdict(),
            "splits": {
                name: {
                    "file": split.path.name,
                    "fingerprint": split.fingerprint,
                    "videos": len(split.videos),
                    "questions": len(split.questions),
                    "skipped": skipped[name] | (state.skipped if name == "train" else {}),
                }
                for name, split in splits.items()
            },
            "best": {"epoch": state.best_epoch, "val_accuracy": state.best_accuracy},
            "history": state.history,
            "selection": _selection(config, state),
            "judged": judged,
            "evaluation": {name: result.to_dict() for name, result in found.items()},
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": state.steps,
            "seconds": state.seconds | {"total": sum(state.seconds.values())},
            "machine": _machine(self.accelerator),
            "versions": self.versions,
        }

    def judge(
        self, model: SparsifyModel, split: Split, dataset: VideoDataset, trainer: Trainer, keep: float
    ) -> EvalResult:
        train = self.config.train
        mine = share(range(len(dataset)), trainer.rank, trainer.world)
        with self.bar(f"{split.name}{'' if keep == 1 else ' masked'}", len(mine)) as advance:
            return evaluate_dataset(
                model,
                dataset,
                split,
                floor=trainer.data.floor,
                batch_size=2 * train.videos,
                keep=keep,
                inputs=train.inputs,
                seed=train.seed,
                precision=trainer.precision.name,
                workers=train.workers,
                advance=advance,
                accelerator=self.accelerator,
            )

    def bar(self, description: str, total: int) -> contextlib.AbstractContextManager[Advance]:
        return progress_bar(description, total, quiet=not self.progress or not self.accelerator.is_main_process)

    def say(self, text: str) -> None:
        if self.progress and self.accelerator.is_main_process:
            say(text)


def _usable(split: Split, state: RunState) -> list[int]:
    """The indices of the videos of ``split`` that could be read when the run began."""
    left_out = set(state.left_out)
    usable = [i for i, video in enumerate(split.videos) if video not in left_out]
    if not usable:
        reason = next(iter(state.skipped.values()))
        raise DataError(f"{split.path}: none of the {len(state.skipped)} videos can be read ({reason})")
    return usable


def _selection(config: Config, state: RunState) -> dict[str, Any]:
    """What the run skipped, as shares of what its epochs would have trained on without selection."""
    shares = {}
    for kind in ("questions", "videos"):
        skipped = sum(line[f"{kind}_skipped"] for line in state.history)
        shares[f"{kind}_skipped"] = skipped / max(1, skipped + sum(line[kind] for line in state.history))
    return {"unit": config.select.unit, "skip": config.select.skip} | shares


def _machine(accelerator: Accelerator) -> dict[str, Any]:
    device = accelerator.device
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.cpu.get_capabilities().get("cpu_name", "")
    )
    return {
        "platform": platform.platform(),
        "device": str(device),
        "name": name or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
    }


def _versions() -> dict[str, str]:
    packages = ("torch", "timm", "transformers", "accelerate", "av")
    found = {"sparsify": sparsify.__version__, "python": platform.python_version()}
    if (commit := _commit()) is not None:
        found["commit"] = commit
    return found | {package: importlib.metadata.version(package) for package in packages}


def _commit() -> str | None:
    """The commit that this package runs from, "-dirty" where files differ from it; None outside a checkout of it."""
    folder = Path(sparsify.__file__).parent
    if not (folder.parent / ".git").exists():  # installed: a repository further up would be someone else's
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        describe = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None
