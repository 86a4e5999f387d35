"""Several processes on one machine, as torchrun starts them: the run of one process, shared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsify.config import Config
from sparsify.data.music_avqa import DataRoot

pytestmark = [pytest.mark.usefixtures("_silent_model"), pytest.mark.slow]
Run = Callable[..., dict[str, Any]]
SCRIPT = """
import json, os, sys
from sparsify.config import Config
from sparsify.data import dataset
from sparsify.data.dataset import VideoDataset
from sparsify.data.music_avqa import DataRoot
from sparsify.errors import MediaError
from sparsify.training import train
from sparsify.training.trainer import Trainer

take_step, clip, decode = Trainer.take_step, VideoDataset._clip, dataset._try

def try_to_decode(path, *args, **options):
    with open(f"{sys.argv[3]}-decoded.txt", "a") as file:
        file.write(path.stem + "\\n")
    return decode(path, *args, **options)

dataset._try = try_to_decode

def read(self, path):
    if path.stem == os.environ["BROKEN_VIDEO"]:
        raise MediaError(f"{path}: broken")
    return clip(self, path)

VideoDataset._clip = read

def spy(self, loaded, steps, counts):
    seen = loaded.batch.question_id.tolist() if counts and loaded.batch is not None else []
    with open(f"{sys.argv[3]}-{self.rank}.jsonl", "a") as file:
        masking = loaded.batch.masking if seen else None
        seeds = [] if masking is None else masking.frame_seed.tolist() + masking.mel_seed.tolist()
        file.write(json.dumps([self.state.steps, seen, seeds]) + "\\n")
    take_step(self, loaded, steps, counts)

Trainer.take_step = spy
config, root, output, cache = sys.argv[1:]
train(Config.from_dict(json.loads(config)), DataRoot(root), output, cache_folder=cache)
"""


def launch(
    config: Config, root: DataRoot, output: Path, cache: Path, processes: int, broken: str = ""
) -> list[list[list[Any]]]:
    """Train with so many processes; what each of them saw: a list of [step, question ids, mask seeds]. Beside the run
    folder, what they said is in ``.said``.

    The video ``broken`` can be read when the run begins, and no more when it is trained on.
    """
    script = output.with_suffix(".py")
    script.write_text(SCRIPT)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
            str(script), json.dumps(config.to_dict()), str(root.root), str(output), str(cache),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "BROKEN_VIDEO": broken},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    output.with_suffix(".said").write_text(done.stderr)
    files = [output.with_name(f"{output.name}-{rank}.jsonl") for rank in range(processes)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


@pytest.mark.parametrize("videos", [3, 7])
@pytest.mark.parametrize("unit", ["video", "question"])
def test_two_processes_train_as_one(
    run: Run, tiny_config: Config, tiny_root: DataRoot, cache_folder: Path, tmp_path: Path, videos: int, unit: str
) -> None:
    """8 videos in steps of 3 leave a last step of 2, and steps of 7 one of 1, which one process has no video for; what
    selection leaves of them divides no better."""
    config = tiny_config.replace(
        **{
            "text.dropout": 0.0, "fusion.dropout": 0.0, "train.videos": videos, "train.epochs": 4, "select.skip": 0.5,
            "select.unit": unit,
        }
    )  # fmt: skip
    alone = run("alone", config=config)
    (one,) = launch(config, tiny_root, tmp_path / "single", cache_folder, 1)
    two = launch(config, tiny_root, tmp_path / "both", cache_folder, 2)
    together = json.loads((tmp_path / "both" / "results.json").read_text())
    assert together["machine"]["processes"] == 2
    assert together["evaluation"]["unmasked"]["scored"] == 6
    assert len(json.loads((tmp_path / "both" / "predictions.json").read_text())) == 6
    work = [0, 0]
    for (step, questions, seeds), *parts in zip(one, *two, strict=True):
        assert [part[0] for part in parts] == [step, step]
        assert sorted(questions) == sorted(i for part in parts for i in part[1])
        assert sorted(seeds) == sorted(seed for part in parts for seed in part[2])
        shares = [len({i // 3 for i in part[1]}) for part in parts]  # videos
        assert max(shares) - min(shares) <= 1
        work = [before + share for before, share in zip(work, shares, strict=True)]
    assert max(work) - min(work) <= len(alone["history"]), "over an epoch, too"
    counts = ("questions", "questions_skipped", "videos", "videos_skipped")
    for ours, theirs in zip(alone["history"], together["history"], strict=True):
        assert [ours[key] for key in counts] == [theirs[key] for key in counts]
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-3)
    ours, theirs = (load_file(tmp_path / name / "last" / "selection.safetensors") for name in ("alone", "both"))
    assert torch.equal(ours["kept"], theirs["kept"])
    torch.testing.assert_close(theirs["losses"], ours["losses"], rtol=0.01, atol=1e-3)
    ours, theirs = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("alone", "both"))
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=0.02, atol=2e-3, msg=name)


@pytest.mark.parametrize("broken", [2, 4])
def test_a_process_whose_videos_cannot_be_read_keeps_the_other_company(
    tiny_config: Config, tiny_root: DataRoot, cache_folder: Path, tmp_path: Path, broken: int
) -> None:
    """The first epoch's order is 1, 4, 0, 2, 7, 6, 5, 3: of its first step the second process has video 4 alone, and of
    the next one the first process has video 2.
    """
    config = tiny_config.replace(**{"train.videos": 2, "train.epochs": 1})
    seen = launch(config, tiny_root, tmp_path / "both", cache_folder, 2, broken=f"{broken:08d}")
    for part, videos in zip(seen, ([1, 2, 7, 3], [4, 0, 6, 5]), strict=True):
        assert [[i // 3 for i in step[1][::3]] for step in part] == [[] if v == broken else [v] for v in videos]
    results = json.loads((tmp_path / "both" / "results.json").read_text())
    assert list(results["splits"]["train"]["skipped"]) == [f"{broken:08d}"]
    assert (tmp_path / "both.said").read_text().count(f"skipped {broken:08d}: ") == 1, "the second process says it, too"
    assert [results["history"][0][key] for key in ("questions", "videos", "videos_unreadable")] == [21, 7, 1]


def test_processes_share_the_decoding_and_what_cannot_be_read_is_known_to_all(
    tiny_config: Config, tiny_root: DataRoot, tmp_path: Path
) -> None:
    path = tiny_root.video_path("00000003")  # the second process tries it
    path.unlink()
    path.write_bytes(b"")
    config = tiny_config.replace(**{"train.epochs": 1})
    seen = launch(config, tiny_root, tmp_path / "both", tmp_path / "cache", 2)
    decoded = (tmp_path / "both-decoded.txt").read_text().split()
    assert sorted(decoded) == [f"{i:08d}" for i in range(12)]
    assert sorted(i for part in seen for step in part for i in step[1]) == [*range(9), *range(12, 24)]


def test_a_run_of_torchrun_that_loses_a_process_ends_and_goes_on_bit_for_bit(
    tiny_config: Config, tiny_root: DataRoot, cache_folder: Path, tmp_path: Path
) -> None:
    """The command of the README, killed as soon as there is a checkpoint: torchrun ends what is left of it."""
    config = tiny_config.replace(
        **{"train.videos": 2, "train.epochs": 6, "train.workers": 1, "train.save_seconds": 0.0, "select.skip": 0.5}
    )

    def command(name: str) -> subprocess.Popen[str]:
        output = tmp_path / name
        output.mkdir(exist_ok=True)
        if not (output / "config.json").exists():
            (output / "config.json").write_text(json.dumps(config.to_dict()))
        return subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
                "sparsify", "train", str(tiny_root.root), "--resume", "--output", str(output),
                "--cache", str(cache_folder),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip

    whole = command("whole")
    said, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0, said
    cut = command("cut")
    while not (tmp_path / "cut" / "last" / "training.json").exists():
        assert cut.poll() is None, cut.communicate()[0]
        time.sleep(0.01)
    workers = Path(f"/proc/{cut.pid}/task/{cut.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    said, _ = cut.communicate(timeout=600)
    assert cut.returncode != 0, said
    assert not (tmp_path / "cut" / "results.json").exists()
    again = command("cut")
    said, _ = again.communicate(timeout=600)
    assert again.returncode == 0, said
    for name in ("model", "optimizer", "selection"):
        ours, theirs = (tmp_path / run / "last" / f"{name}.safetensors" for run in ("whole", "cut"))
        assert ours.read_bytes() == theirs.read_bytes(), name
