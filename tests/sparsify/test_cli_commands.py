"""The commands from nothing to an answer, on a rendered data set of a dozen clips, and how options become a run."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import sparsify
from sparsify.ask import Answer
from sparsify.cli import ask as ask_command
from sparsify.cli import main
from sparsify.config import Config

QUESTION = "How many instruments are sounding in the video?"
TINY = ["--set", "vision.depths=[1,1,1]", "--set", "audio.depths=[1,1,1]", "--set", "clip.frames=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data``, a rendered data set, and ``run``, one epoch on it."""
    place = tmp_path_factory.mktemp("place")
    data, run = str(place / "data"), str(place / "run")
    assert main(["synth", data, "--train", "6", "--val", "3", "--test", "3", "--seconds", "3", "--workers", "1"]) == 0
    assert main(["train", data, "--output", run, "--epochs", "1", "--set", "train.videos=3", *TINY]) == 0
    return place


def test_synth_wrote_the_layout_and_check_finds_nothing_wrong(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list((place / "data" / "videos").glob("*.mp4"))) == 12
    report = place / "check.json"
    assert main(["data", "check", str(place / "data"), "--json", str(report)]) == 0
    out = capsys.readouterr().out
    assert "train" in out
    assert "12 here, 0 missing" in out
    assert {name: split["videos"] for name, split in json.loads(report.read_text())["splits"].items()} == {
        "train": 6,
        "val": 3,
        "test": 3,
    }


def test_check_exits_with_3_when_something_is_wrong(place: Path, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "videos").mkdir()
    rows = (place / "data" / "annotations" / "avqa-test.json").read_text()
    for name in ("train", "test"):  # every question is in two splits: a leak
        (tmp_path / "annotations" / f"avqa-{name}.json").write_text(rows)
    assert main(["data", "check", str(tmp_path), "--no-media"]) == 3


def test_standins_give_a_root_of_real_annotations_videos(place: Path, tmp_path: Path) -> None:
    annotations = place / "data" / "annotations" / "avqa-val.json"
    root = tmp_path / "root"
    arguments = [
        "synth",
        str(root),
        "--standins",
        str(annotations),
        "--videos",
        "2",
        "--seconds",
        "3",
        "--workers",
        "1",
    ]
    assert main(arguments) == 0
    assert len(list((root / "videos").glob("*.mp4"))) == 2
    assert (root / "annotations" / "avqa-val.json").read_bytes() == annotations.read_bytes()


def test_eval_prints_the_table_and_writes_what_it_is_asked_to(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions, scores = place / "answers.csv", place / "scores.json"
    arguments = ["eval", str(place / "run"), str(place / "data")]
    assert main([*arguments, "--predictions", str(predictions), "--json", str(scores)]) == 0
    out = capsys.readouterr().out
    questions = json.loads((place / "data" / "annotations" / "avqa-test.json").read_text())
    n = len(questions)
    for words in ("Audio-Visual Temporal", "floor", f"{n} of {n} questions scored", "fingerprint", "saw everything"):
        assert words in out
    rows = predictions.read_text().splitlines()
    assert rows[0] == "question_id,type,answer,probability,correct"
    assert [int(row.split(",")[0]) for row in rows[1:]] == [question["question_id"] for question in questions]
    assert json.loads(scores.read_text())["scored"] == n


def test_eval_tells_where_the_scores_look(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(place / "run"), str(place / "data"), "--localisation"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    auc = re.fullmatch(r"scores rank .* AUC (0\.\d{3}) over \d+ frames of 3 videos; key tokens: .*", last)
    assert auc is not None
    assert 0 < float(auc[1]) < 1


def test_synth_asks_as_many_questions_as_told(tmp_path: Path) -> None:
    arguments = ["--train", "4", "--val", "0", "--test", "4", "--seconds", "3", "--size", "64", "--workers", "1"]
    asked = ["--questions", "11", "12", "--eval-questions", "1", "2"]
    assert main(["synth", str(tmp_path / "set"), *arguments, *asked]) == 0
    for split, least, most in (("train", 5 * 4, 12), ("test", 4, 2)):
        rows = json.loads((tmp_path / "set" / "annotations" / f"avqa-{split}.json").read_text())
        count = Counter(row["video_id"] for row in rows)
        assert len(count) == 4
        assert max(count.values()) <= most
        assert len(rows) >= least  # a scene of one player cannot answer eleven; together they do answer many


def test_eval_masked_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(place / "run" / "best"), str(place / "data"), "--split", "val", "--masked", "--seed", "3"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "the model saw 50% of the input" in out
    assert out.startswith("val: ")


def test_eval_counts_the_videos_it_skips(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "annotations").symlink_to(place / "data" / "annotations")
    videos = sorted((place / "data" / "videos").glob("*.mp4"))
    asked = sorted({q["video_id"] for q in json.loads((tmp_path / "annotations" / "avqa-test.json").read_text())})
    for video in videos:
        (tmp_path / "videos" / video.name).symlink_to(video)
    (tmp_path / "videos" / f"{asked[0]}.mp4").unlink()
    (tmp_path / "videos" / f"{asked[0]}.mp4").write_text("no video")
    assert main(["eval", str(place / "run"), str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "(1 unreadable videos skipped)" in out
    assert f"skipped {asked[0]}: " in out


def test_ask_prints_five_answers_a_question_and_draws(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = min((place / "data" / "videos").glob("*.mp4"))
    picture = place / "out.png"
    arguments = ["ask", str(place / "run"), str(video), QUESTION, "Is the theremin louder?", "--explain", str(picture)]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{video.name}: 3.0 s, 32 visual tokens merged into 8, 16 audio tokens merged into 4"
    assert lines[2] == QUESTION
    assert all(line.startswith("  ") and "%" in line for line in lines[3:8])
    assert "  (not known to the model: theremin)" in lines
    assert sum("%" in line for line in lines) == 10
    assert lines[-1] == f"picture: {picture}"
    assert picture.stat().st_size > 50_000


def test_ask_json_and_masked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = min((place / "data" / "videos").glob("*.mp4"))
    assert main(["ask", str(place / "run"), str(video), QUESTION, "--json", "--masked", "--seed", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tokens"]["visual"] == {"encoded": 16, "merged": 4}
    (answer,) = told["answers"]
    assert answer["question"] == QUESTION
    assert len(answer["ranked"]) == 5
    assert answer["ranked"][0] == {"answer": answer["answer"], "probability": answer["probability"]}


def test_info_shows_the_run_the_preset_and_the_installation(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(place / "run")]) == 0
    run = capsys.readouterr().out
    for words in ("parameters", "test unmasked", "test masked", "fingerprint", "clip.frames", "2"):
        assert words in run
    assert main(["info", "--preset", "paper"]) == 0
    paper = capsys.readouterr().out
    assert "vision.depths" in paper
    assert "[2, 2, 6, 2]" in paper
    assert main(["info"]) == 0
    installation = capsys.readouterr().out
    for words in (sparsify.__version__, "torch", "threads", "random_mask", "demo", "adaptive"):
        assert words in installation


def test_a_second_run_into_one_folder_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.stat().st_mtime_ns for path in (place / "run").rglob("*"))
    assert main(["train", str(place / "data"), "--output", str(place / "run")]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert sorted(path.stat().st_mtime_ns for path in (place / "run").rglob("*")) == before


@pytest.fixture
def trained_with(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What ``sparsify train`` hands to the trainer, which is not run."""
    seen: dict[str, object] = {}

    def train(config: object, root: object, output: object, **options: object) -> dict[str, object]:
        seen.update(options, config=config, root=root, output=output)
        overall = {"floor": 0.5}
        return {"judged": "test", "evaluation": {"unmasked": {"accuracy": 0.75, "scores": {"overall": overall}}}}

    module = ModuleType("sparsify.training")
    module.train = train
    monkeypatch.setitem(sys.modules, "sparsify.training", module)
    return seen


def test_train_options_become_a_config(
    tmp_path: Path, trained_with: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    files = [part for name in ("train", "val", "test") for part in (f"--{name}", str(tmp_path / f"{name}.json"))]
    shortcuts = ["--epochs", "3", "--seed", "7", "--workers", "2", "--skip", "0.25", "--deaf", "--filter-leaks"]
    part = tmp_path / "part.json"
    part.touch()
    weights = ["--vision-weights", "a/b", "--audio-weights", "c", "--text-weights", "d"]
    extra = [
        "--preset",
        "adaptive",
        "--set",
        "train.lr=3e-4",
        "--set",
        "mask.epochs=[0,null]",
        "--cache",
        str(tmp_path),
        "--subset",
        str(part),
    ]
    assert main(["train", str(tmp_path), "--output", "here", *shortcuts, *weights, *files, *extra]) == 0
    changes = {
        "train.epochs": 3,
        "train.seed": 7,
        "train.workers": 2,
        "select.skip": 0.25,
        "select.subset": str(part),
        "select.filter_leaks": True,
        "train.inputs": "deaf",
        "train.lr": 3e-4,
        "mask.epochs": (0, None),
        "vision.weights": "a/b",
        "audio.weights": "c",
        "text.weights": "d",
    }
    assert trained_with["config"] == Config.preset("adaptive").replace(**changes)
    assert trained_with["output"] == Path("here")
    assert (trained_with["resume"], trained_with["cache_folder"]) == (False, tmp_path)
    assert trained_with["root"].annotation_path("val") == tmp_path / "val.json"
    assert capsys.readouterr().out == "test accuracy 75.00%, floor 50.00%; the model is in here/best\n"


def test_of_several_processes_the_first_prints(
    tmp_path: Path, trained_with: dict[str, object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert main(["train", str(tmp_path), "--output", "here"]) == 0
        assert capsys.readouterr().out.count("\n") == lines


def test_train_defaults(tmp_path: Path, trained_with: dict[str, object]) -> None:
    assert main(["train", str(tmp_path), "--dense"]) == 0
    assert trained_with["config"] == Config.preset("demo").replace(dense=True)
    assert str(trained_with["output"]).startswith("runs/demo-20")
    assert trained_with["cache_folder"] is None


def test_resume_takes_the_runs_own_config(tmp_path: Path, trained_with: dict[str, object]) -> None:
    config = Config.preset("paper").replace(**{"train.seed": 5})
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert main(["train", str(tmp_path), "--resume", "--output", str(tmp_path)]) == 0
    assert (trained_with["config"], trained_with["resume"]) == (None, True)
    assert main(["train", str(tmp_path), "--resume", "--output", str(tmp_path), "--workers", "2"]) == 0
    assert trained_with["config"] == config.replace(**{"train.workers": 2})


def test_answers_print_where_the_terminal_has_no_bars(capsys: pytest.CaptureFixture[str]) -> None:
    answer = Answer(QUESTION, (("two", 0.5), ("more than ten", 0.25), ("one", 0.25)), ())
    ask_command.print_answer(answer, "#")
    assert capsys.readouterr().out.splitlines()[2:] == [
        "  two              50.0%  ############",
        "  more than ten    25.0%  ######",
        "  one              25.0%  ######",
    ]
