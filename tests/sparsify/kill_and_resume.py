"""Kills training runs with SIGKILL at random moments, resumes them, and compares them with runs that were left alone.

    python tests/sparsify/kill_and_resume.py --kills 100
    python tests/sparsify/kill_and_resume.py --kills 40 --processes 2
    python tests/sparsify/kill_and_resume.py --kills 40 --threads 2

Each run loads in two worker processes, masks, selects (by video and by question in turn), drops out, steps by Muon and
matches. Two kills of four are of runs that save after every step, the others save at ends of epochs alone; every fifth
run has to decode its clips. The moment of a kill is uniform over the wall time of a whole run, from the start
of ``train`` to its results.
Runs are forked from this process, which has imported everything, so that a run takes seconds; several processes of one
run find each other by the variables that torchrun sets, and die one after the other.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

SMALL = {
    "clip.frames": 2, "clip.segment_seconds": 1.0, "vision.depths": [1, 1, 1], "audio.depths": [1, 1, 1],
    "vision.embed_dim": 16, "audio.embed_dim": 16,
}  # fmt: skip
ALL_ON = {
    "train.epochs": 4, "train.videos": 2, "train.workers": 2, "train.muon": 3.0,
    "train.matching": 1.0, "train.save_seconds": 0.0, "train.keep_last": 1,
    "text.dropout": 0.1, "fusion.dropout": 0.1, "mask.epochs": [0, -1], "select.skip": 0.5,
}  # fmt: skip
TIMES = ("seconds", "train_seconds", "evaluate_seconds", "save_seconds", "questions_per_s", "videos_per_s")
FILES = ("model.safetensors", "optimizer.safetensors", "selection.safetensors")


class Setting(NamedTuple):
    """What all runs have in common."""

    root: Path
    cache: Path
    processes: int  # of one run
    threads: int  # of one process


def start(config: Any, setting: Setting, output: Path, resume: bool) -> list[int]:
    """Processes that train into ``output``; returns their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [fork(config, setting, output, resume, rank, port) for rank in range(setting.processes)]


def fork(config: Any, setting: Setting, output: Path, resume: bool, rank: int, port: int) -> int:
    """The process number ``rank`` of a run."""
    import torch

    from sparsify.data.music_avqa import DataRoot
    from sparsify.training import train

    child = os.fork()
    if child:
        return child
    if setting.processes > 1:
        world = {"WORLD_SIZE": setting.processes, "LOCAL_WORLD_SIZE": setting.processes, "MASTER_PORT": port}
        own = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({key: str(value) for key, value in (world | own).items()})
    code = 1
    try:
        with output.with_suffix(".log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            torch.set_num_threads(setting.threads)
            train(config, DataRoot(setting.root), output, cache_folder=setting.cache, resume=resume, progress=False)
            code = 0
    except BaseException:  # noqa: BLE001 (a forked process must not return into its parent's code)
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(children: list[int], output: Path) -> None:
    """Wait for a run that is to succeed."""
    running = set(children)
    while running:
        child, status = os.wait()
        running.discard(child)
        if status:
            kill(running)
            raise SystemExit(f"{output}: the run failed:\n{output.with_suffix('.log').read_text()}")


def kill_after(children: list[int], seconds: float) -> bool:
    """Kill the processes after ``seconds``; whether any was still running."""
    running = set(children)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        running -= {child for child in running if os.waitpid(child, os.WNOHANG)[0]}
        if not running:
            return False
        time.sleep(min(0.002, max(0.0, deadline - time.monotonic())))
    kill(running)
    return True


def kill(children: Iterable[int]) -> None:
    """SIGKILL, the last process first: the one that writes may work for a moment beside a dead one."""
    for child in sorted(children, reverse=True):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def where(output: Path) -> str:
    """What the kill interrupted, as far as the run folder tells."""
    if not output.exists():
        return "before the run folder"
    for name in ("last", "best"):
        if (output / f".{name}.partial").exists() or (output / f".{name}.old").exists():
            return f"writing {name}/"
    if not (output / "last" / "training.json").exists():
        return "before the first checkpoint"
    state = json.loads((output / "last" / "training.json").read_text())
    if state["epoch"] == ALL_ON["train.epochs"]:
        return "judging"
    if state["step"] == 0:
        return "between epochs"
    return "within an epoch that skips" if state["epoch"] in (1, 2) else "within a whole epoch"


def told(output: Path) -> dict[str, Any]:
    """What a finished run says of itself, without times."""
    results = json.loads((output / "results.json").read_text())
    state = json.loads((output / "last" / "training.json").read_text())
    for key in ("seconds", "metrics_bytes"):
        del state[key]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    evaluation = results["evaluation"]
    for line in (*state["history"], *lines, *evaluation.values()):
        for key in TIMES:
            line.pop(key, None)
    return {"state": state, "metrics": lines, "evaluation": evaluation, "machine": results["machine"]}


def difference(whole: Path, cut: Path) -> str | None:
    """The first thing in which two finished runs are not the same."""
    names = [f"last/{name}" for name in FILES] + ["best/model.safetensors"]
    for name in names:
        if (whole / name).read_bytes() != (cut / name).read_bytes():
            return name
    ours, theirs = told(whole), told(cut)
    for key, value in ours.items():
        if value != theirs[key]:
            return f"{key}:\n{json.dumps(value)}\n{json.dumps(theirs[key])}"
    left = {path.name for path in cut.iterdir()} ^ {path.name for path in whole.iterdir()}
    return f"files: {', '.join(sorted(left))}" if left else None


def check(config: Any, setting: Setting, folder: Path, kills: int, seed: int) -> None:
    """``SystemExit`` for the first run that did not go on as if nothing had happened."""
    draw = random.Random(seed)
    configs, seconds = {}, {}  # of runs that are left alone: those that save less, or decode, end alike
    for unit in ("video", "question")[:kills]:
        configs[unit] = config.replace(**ALL_ON | {"select.unit": unit})
        begun = time.monotonic()
        finish(start(configs[unit], setting, folder / unit, False), folder / unit)
        seconds[unit] = time.monotonic() - begun
        machine = told(folder / unit)["machine"]
        assert (machine["processes"], machine["threads"]) == (setting.processes, setting.threads)
    counts: collections.Counter[str] = collections.Counter()
    done = 0
    while done < kills:
        unit, save_seconds = ("video", "question")[done % 2], (0.0, 1e9)[done // 2 % 2]
        how = configs[unit].replace(**{"train.save_seconds": save_seconds})
        fresh = setting._replace(cache=folder / f"cache-{done}") if done % 5 == 4 else setting
        output = folder / f"{unit}-{done}"
        moment = draw.uniform(0, seconds[unit])
        if not kill_after(start(how, fresh, output, False), moment):
            shutil.rmtree(output)  # faster than the run that was timed: no kill
            shutil.rmtree(fresh.cache if fresh is not setting else output, ignore_errors=True)
            continue
        place = where(output)
        finish(start(how, fresh, output, True), output)
        if wrong := difference(folder / unit, output):
            raise SystemExit(f"{output}: killed after {moment:.3f} s, {place}; differs in {wrong}")
        shutil.rmtree(output)
        counts[place] += 1
        done += 1
        print(f"{done} of {kills}: killed after {moment:.3f} s, {place}: the same", flush=True)
    print(f"{done} kills, all the same: " + ", ".join(f"{count} {place}" for place, count in counts.most_common()))


def warm_up(config: Any) -> None:
    """Import here, once, what a run imports on its way. One thread: a pool of them would not survive the
    fork; each run makes its own.

    Several processes ask for a save only in the steps that they log: here in all.
    """
    import torch
    import torch.utils.tensorboard

    from sparsify.data.vocabulary import Vocabulary
    from sparsify.model import SparsifyModel
    from sparsify.training import trainer

    trainer.LOG_EVERY = 1
    torch.set_num_threads(1)
    SparsifyModel(config, Vocabulary.build())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1, help="of each run")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, help="a data folder (default: one of 16 rendered clips)")
    parser.add_argument("--config", type=Path, help="a configuration for it, as JSON")
    args = parser.parse_args()
    from sparsify.config import Config

    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        folder = Path(name)
        if args.root is None:
            from sparsify import synth

            synth.write(folder / "data", train=10, val=3, test=3, seconds=3.0, size=64, workers=1)
        config = Config.from_dict(json.loads(args.config.read_text())) if args.config else None
        warm_up(config or Config.preset("demo").replace(**SMALL))
        root = args.root or folder / "data"
        setting = Setting(root, root / "cache", args.processes, args.threads)
        check(config or Config.preset("demo").replace(**SMALL), setting, folder, args.kills, args.seed)


if __name__ == "__main__":
    main()
