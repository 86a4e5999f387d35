"""The training loop, on Accelerate: one process, or as many as ``torchrun`` or ``accelerate launch`` start.

Everything that decides a step is derived from seed, epoch and step, or is in the checkpoint: data order, masks,
dropout, learning rate. A run stopped and resumed therefore ends in the weights of one never stopped, on a CPU bit for
bit, with as many threads (``ordered_sums``).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsify.config import Config
from sparsify.data.dataset import VideoDataset
from sparsify.data.music_avqa import Split
from sparsify.errors import CheckpointError, TrainingError
from sparsify.progress import Advance, format_seconds, progress_bar, say
from sparsify.report.scores import Floor
from sparsify.training.checkpoints import keep_epoch, kept, write_folder
from sparsify.training.evaluate import EvalResult, evaluate_dataset, masked_keep
from sparsify.training.loading import (
    DeadWorkerError,
    Loaded,
    epoch_order,
    gather_skipped,
    load_batches,
    share,
    step_seed,
    to_device,
)
from sparsify.training.metrics import MetricsLog
from sparsify.training.optim import Precision, build_optimizer, lr_factor, ordered_sums, set_learning_rates
from sparsify.training.run import RunState, restore_optimizer, write_state
from sparsify.training.selection import Selection
from sparsify.training.stopping import InterruptedRun, StopRequest

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sparsify.model import SparsifyModel

__all__ = ["Trainer", "TrainingData"]

LOG_EVERY = 10  # steps


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on and is judged by. ``usable`` are the indices of the training videos that can be read."""

    train: VideoDataset
    train_split: Split
    usable: list[int]
    val: VideoDataset
    val_split: Split
    floor: Floor


class _Taken(NamedTuple):
    """A step whose loss has not been looked at yet: looking makes the host wait for the device."""

    step: int  # of the epoch
    video_id: tuple[str, ...]
    counts: tuple[int, int]  # videos, questions
    values: Tensor  # fp32 [3]: weighted sum of the questions' losses, sum of the weights, gradient norm


@dataclass
class Trainer:
    """Trains ``model`` into the run folder ``output``. ``run`` does it all; the other methods are its parts."""

    config: Config
    model: SparsifyModel
    data: TrainingData
    output: Path
    accelerator: Accelerator
    precision: Precision
    state: RunState = field(default_factory=RunState)
    resume: Path | None = None  # a checkpoint to go on from
    progress: bool = True
    stop_after: int | None = None  # steps of this call

    def __post_init__(self) -> None:
        train = self.config.train
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.model.to(self.device)
        optimizer = build_optimizer(self.model, train, self.device)
        self.selection = Selection(self.data.train_split, self.config, self.device)
        if self.resume is not None:
            restore_optimizer(self.resume, self.model, optimizer)
            self.selection.load(self.resume)
        self.net, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.inner = optimizer  # not wrapped by Accelerate
        videos = list(self.data.train_split.videos.items())
        questions = sum(len(videos[i][1]) for i in self.data.usable)
        # The loss of a step is divided by this, not by its own number of questions: all of an epoch's weigh the same.
        self.nominal = questions / len(self.data.usable) * train.videos
        self.pending: list[_Taken] = []
        self.window: Counter[str] = Counter()  # sums since the last line of metrics
        self.taken = 0  # steps of this call
        self.saved = self.timed = time.monotonic()
        self.spare: Loaded | None = None  # a batch that this process could read
        self.stop = StopRequest()
        self.metrics = MetricsLog(
            self.output,
            keep=self.state.metrics_bytes,
            first_step=self.state.steps,
            enabled=self.accelerator.is_main_process,
        )

    def run(self) -> None:
        """Epochs to the end.

        Raises ``InterruptedRun`` after a signal, all saved; ``TrainingError`` where a loading process died (all saved,
        if no other process trains) or the loss is not finite.
        """
        try:
            with self.stop.on_signals(), ordered_sums(self.device):
                while self.state.epoch < self.config.train.epochs:
                    self.train_epoch()
                    self.end_epoch()
        except InterruptedRun:
            self.save_last()
            raise
        except DeadWorkerError as error:
            if self.world > 1:
                raise  # the others go on until they wait for this process
            self.save_last()
            raise TrainingError(
                f"a data loading process died (out of memory?) in epoch {self.state.epoch + 1} after "
                f"{self.state.step} steps: {error}; {self.how_to_resume()}"
            ) from error
        finally:
            self.metrics.close()

    def train_epoch(self) -> None:
        """The steps that are left of the epoch under way."""
        train, state = self.config.train, self.state
        if state.step == 0:
            self.selection.start_epoch(state.epoch)
        asked_about, asked = self.selection.asked()
        order = [self.data.usable[i] for i in epoch_order(len(self.data.usable), train.seed, state.epoch)]
        order = [i for i in order if asked_about[i]]
        steps = [order[i : i + train.videos] for i in range(0, len(order), train.videos)]
        first = state.step
        left, keep = steps[first:], self.config.keep_at(state.epoch)
        if not left:
            return  # resumed from a stop during the evaluation
        batches = load_batches(
            self.data.train,
            # A process that a short step leaves without a video computes one that does not count: all take part.
            [share(step, self.turn(first + i), self.world) or step[:1] for i, step in enumerate(left)],
            epoch=state.epoch,
            run_seed=train.seed,
            keep=keep,
            workers=train.workers,
            pin=self.device.type == "cuda",
            asked=asked,
        )
        masked = "" if keep == 1 else f", {keep:.0%} of the input"
        self.net.train()
        self.timed = time.monotonic()
        with self.bar(f"epoch {state.epoch + 1}/{train.epochs}{masked}", sum(map(len, left))) as advance:
            for step, loaded in zip(left, batches, strict=True):
                self.take_step(loaded, len(steps), counts=self.turn(state.step) < len(step))
                note = self.log() if state.step == len(steps) or state.steps % LOG_EVERY == 0 else ""
                advance(len(step), note)
                self.between_steps()

    def turn(self, step: int) -> int:
        """The share of the epoch's ``step`` that this process takes: what does not divide goes round."""
        return (self.rank + step) % self.world

    def take_step(self, loaded: Loaded, steps: int, counts: bool) -> None:
        """Forward, backward and update for one batch of this process, in an epoch of ``steps``.

        The loss of the step is ``sum(w_i * l_i)`` over its questions, by the number of questions that a step has on
        average when none is skipped. ``counts=False``: this process only keeps the others company.
        """
        state, train = self.state, self.config.train
        self.note_skipped(loaded.skipped)
        if self.world > 1:  # all processes take part in every step, with an earlier batch if need be
            counts = counts and loaded.batch is not None
            loaded = self.spare = loaded if loaded.batch is not None else self.spare or self.any_video()
        if loaded.batch is not None:
            factor = lr_factor((state.epoch + (state.step + 0.5) / steps) / train.epochs, train.warmup)
            set_learning_rates(self.inner, factor)
            torch.manual_seed(step_seed(train.seed, state.steps, self.rank))
            batch = to_device(loaded.batch, self.device)
            try:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision.name == "bf16"):
                    logits, matching = self.net(batch.video, batch.questions, batch.masking, batch.label)
            except ValueError as error:  # the ops refuse NaN on a CPU
                raise self.diverged(state.step, batch.video_id, str(error)) from error
            losses = F.cross_entropy(
                logits.float(), batch.label, reduction="none", label_smoothing=train.label_smoothing
            )
            places = self.selection.places(loaded.questions).to(self.device, non_blocking=True)
            weights = self.selection.weight[places] * float(counts)  # [Q]
            total = (weights * losses).sum()
            objective = total
            if matching is not None:
                others = F.cross_entropy(matching, batch.questions.video_index, reduction="none")
                objective = total + train.matching * (weights * others).sum()
            # Gradients are averaged over the processes.
            self.accelerator.backward(objective * (self.world / self.nominal))
            norm = self.accelerator.clip_grad_norm_(self.net.parameters(), train.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if counts:
                self.selection.record(places, losses.detach(), batch.questions)
            done = (len(batch.video_id), len(loaded.questions)) if counts else (0, 0)
            values = torch.stack([total.detach(), weights.sum(), norm])
            self.pending.append(_Taken(state.step, batch.video_id, done, values))
        state.step += 1
        state.steps += 1
        self.taken += 1
        if self.device.type == "cpu":
            self.look()  # waits for nothing here

    def any_video(self) -> Loaded:
        """A batch of the first training video that can be read."""
        train, keep = self.config.train, self.config.keep_at(self.state.epoch)
        alone = [[i] for i in self.data.usable]
        found = load_batches(
            self.data.train, alone, epoch=self.state.epoch, run_seed=train.seed, keep=keep, workers=0, pin=False
        )
        for loaded in found:
            if loaded.batch is not None:
                return loaded
        raise TrainingError(f"none of the {len(alone)} training videos can be read any more; {kept(self.output)}")

    def log(self) -> str:
        """Write a line about the steps since the last one, and return a note for the progress bar."""
        self.look()
        now = time.monotonic()
        seconds, self.timed = now - self.timed, now
        self.state.seconds["train"] += seconds
        seen, self.window = self.window, Counter()
        if not seen["questions"]:
            return ""
        rates = {group["encoder"]: group["lr"] for group in self.inner.param_groups}
        loss, keep = seen["loss"] / seen["weight"], self.config.keep_at(self.state.epoch)
        line = {
            "epoch": self.state.epoch,
            "loss": loss,
            "lr": rates.get(False, 0.0),
            "encoder_lr": rates.get(True, 0.0),
            "grad_norm": seen["norm"] / seen["steps"],
            "keep": keep,
            "units": self.config.units(keep),
            "questions_per_s": seen["questions"] / seconds,
            "videos_per_s": seen["videos"] / seconds,
            "seconds": self.state.seconds["train"],
        }
        self.say(self.metrics.write("step", self.state.steps, line))
        return f"loss {loss:.3f}"

    def look(self) -> None:
        """Add the pending steps of all processes to the sums, after making sure that they are finite."""
        if not self.pending:
            return
        counts = torch.tensor([taken.counts for taken in self.pending], dtype=torch.float32, device=self.device)
        table = torch.cat([torch.stack([taken.values for taken in self.pending]), counts], dim=1)  # [steps, 5]
        table = self.accelerator.reduce(table, "sum")
        for taken, (loss, weight, norm, videos, questions) in zip(self.pending, table.tolist(), strict=True):
            norm /= self.world
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise self.diverged(taken.step, taken.video_id, f"loss {loss}, gradient norm {norm}")
            self.state.loss_sum += loss
            self.state.weight_sum += weight
            self.state.questions += int(questions)
            self.state.videos += int(videos)
            self.window.update(loss=loss, weight=weight, norm=norm, videos=videos, questions=questions, steps=1)
        self.pending.clear()

    def diverged(self, step: int, video_id: tuple[str, ...], what: str) -> TrainingError:
        where = f"epoch {self.state.epoch + 1}, step {step + 1}"
        return TrainingError(f"training diverged in {where}: {what}; videos {', '.join(video_id)}; {kept(self.output)}")

    def note_skipped(self, skipped: dict[str, str]) -> None:
        """Videos that could not be read: said once, and left out of what is counted as trained on."""
        for video in skipped.keys() - self.state.skipped.keys():
            self.say(f"skipped {video}: {skipped[video]}")
        self.state.skipped |= skipped

    def between_steps(self) -> None:
        """Stop or save, where asked to. Several processes agree on it, at the steps that are logged."""
        if self.world > 1 and self.state.steps % LOG_EVERY:
            return
        stop = self.stop.requested or (self.stop_after is not None and self.taken >= self.stop_after)
        save = time.monotonic() - self.saved > self.config.train.save_seconds
        if self.world > 1:
            flags = torch.tensor([stop, save], dtype=torch.float32, device=self.device)
            stop, save = (flag > 0 for flag in self.accelerator.reduce(flags, "sum").tolist())
        if stop:
            raise InterruptedRun(
                f"stopped in epoch {self.state.epoch + 1} after {self.state.step} steps; {self.how_to_resume()}"
            )
        if save:
            try:
                self.save_last()
            except CheckpointError as error:  # a full disk may have room again at the next one
                self.state.saves_failed += 1
                self.saved = time.monotonic()
                self.say(f"{error}; training goes on")

    def how_to_resume(self) -> str:
        return f"saved in {self.output / 'last'}; the same command with --resume goes on from there"

    def end_epoch(self) -> None:
        """Evaluate, keep the model if it is the best so far, write the epoch's line, save."""
        state = self.state
        self.selection.synchronise(self.accelerator)
        everywhere = gather_skipped(state.skipped, self.world)
        self.note_skipped(everywhere)  # what another process could not read is not said yet
        state.skipped = everywhere
        skipped = self.selection.skipped()
        result = self.validate()
        state.seconds["evaluate"] += result.seconds
        line = state.epoch_line() | {
            "keep": self.config.keep_at(state.epoch),
            "val_loss": result.loss,
            "val_accuracy": result.accuracy,
            "val_floor": result.scores.overall.floor,
            "super_tokens": result.super_tokens,
            "questions_skipped": skipped.questions,
            "videos_skipped": skipped.videos,
        }
        if result.accuracy > state.best_accuracy:  # a tie stays with the earlier epoch
            state.best_accuracy, state.best_epoch = result.accuracy, state.epoch
            self.write("best", self.model.save_pretrained)
        self.say(self.metrics.write("epoch", state.steps, line))
        state.history.append(line)
        self.say(
            f"epoch {state.epoch + 1}/{self.config.train.epochs}: loss {line['loss']:.3f}, "
            f"validation {100 * result.accuracy:.2f} % (floor {100 * (line['val_floor'] or 0):.2f} %), "
            f"{format_seconds(state.seconds['train'])} trained"
            + (f", {skipped.videos} videos and {skipped.questions} questions skipped" if skipped.questions else "")
            + (", best so far" if state.best_epoch == state.epoch else "")
        )
        self.selection.end_epoch(state.epoch)
        state.next_epoch()
        self.save_last()
        if self.accelerator.is_main_process:
            keep_epoch(self.output, state.epoch - 1, self.config.train.keep_last)

    def validate(self) -> EvalResult:
        """The validation split, unmasked unless ``mask.eval`` says otherwise."""
        config = self.config
        with self.bar("  validation", len(share(range(len(self.data.val)), self.rank, self.world))) as advance:

            def checked(count: int = 1, note: str = "") -> None:
                advance(count, note)
                if self.stop.requested and self.world == 1:
                    raise InterruptedRun(
                        f"stopped after the steps of epoch {self.state.epoch + 1}; {self.how_to_resume()}"
                    )

            return evaluate_dataset(
                self.model,
                self.data.val,
                self.data.val_split,
                floor=self.data.floor,
                batch_size=2 * config.train.videos,
                keep=masked_keep(config) if config.mask.eval else 1.0,
                inputs=config.train.inputs,
                seed=config.train.seed,
                precision=self.precision.name,
                workers=config.train.workers,
                advance=checked,
                accelerator=self.accelerator,
            )

    def save_last(self) -> None:
        """``last/`` becomes the present state, whole; losses are looked at first, so that it has never diverged."""
        if self.pending or self.window:
            self.log()
        self.selection.synchronise(self.accelerator)

        def fill(folder: Path) -> None:
            self.state.metrics_bytes = self.metrics.length
            self.model.save_pretrained(folder)
            write_state(folder, self.state, self.model, self.inner)
            self.selection.save(folder)

        self.write("last", fill)
        self.saved = time.monotonic()

    def write(self, name: str, fill: Callable[[Path], None]) -> None:
        started = time.monotonic()
        try:
            if self.accelerator.is_main_process:
                write_folder(self.output / name, fill)
        finally:
            self.accelerator.wait_for_everyone()
            seconds = time.monotonic() - started
            self.state.seconds["save"] += seconds
            self.timed += seconds  # not of the training

    def bar(self, description: str, total: int) -> AbstractContextManager[Advance]:
        return progress_bar(description, total, quiet=not self.progress or not self.accelerator.is_main_process)

    def say(self, text: str) -> None:
        if text and self.progress and self.accelerator.is_main_process:
            say(text)
