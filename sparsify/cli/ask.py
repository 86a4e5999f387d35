"""``sparsify ask``: answers to questions about one video."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.cli._parser import seed
from sparsify.cli._run import RUN_HELP, checkpoint_folder, load_model
from sparsify.errors import MediaError, UsageError

if TYPE_CHECKING:
    from sparsify.ask import Answer, AskResult

__all__ = ["add", "run"]

DESCRIPTION = """\
Answers questions about a video. The video is encoded once, however many questions there are; each answer comes with its
probability and the next four."""

EPILOG = """\
examples:
  sparsify ask runs/demo clip.mp4 "How many instruments are sounding in the video?"
  sparsify ask runs/demo clip.mp4 "Is there a violin sound?" \\
                                  "Is the violin always playing?" --explain out.png
  sparsify ask runs/demo clip.mp4 "Is there a voiceover?" --json

the answers are MUSIC-AVQA's 42: yes, no, zero to more than ten, places, and 22 instruments"""

SHOWN = 5  # answers a question
BAR = 24  # characters


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "ask",
        help="answer questions about a video, and draw what the answers were drawn from",
        usage='sparsify ask RUN VIDEO "question" ["another" ...] [options]',
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, help=RUN_HELP)
    parser.add_argument("video", metavar="VIDEO", type=Path, help="a video file: mp4, or whatever FFmpeg reads")
    parser.add_argument("questions", metavar="QUESTION", nargs="+", help="a question in English, in quotes")
    parser.add_argument(
        "--explain",
        metavar="FILE",
        type=Path,
        help="draw frames, spectrogram, key tokens and clusters (.png, .pdf, .svg)",
    )
    parser.add_argument(
        "--partial", action="store_true", help="answer about a truncated video, from what can be read of it"
    )
    parser.add_argument("--masked", action="store_true", help="hide a part of the input, as in training (mask.keep)")
    parser.add_argument("--seed", metavar="SEED", type=seed, default=0, help="which part --masked hides")
    parser.add_argument(
        "--json", action="store_true", help="print JSON: every question with its five likeliest answers"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from sparsify.report.explain import check_path, draw

    if args.explain is not None:
        check_path(args.explain)
    if not args.video.exists():
        raise MediaError(f"VIDEO {args.video}: no such file")
    if not all(question.strip() for question in args.questions):
        raise UsageError("QUESTION: expected a question, got an empty one")
    checkpoint_folder(args.run_folder)
    from sparsify.ask import ask

    model = load_model(args.run_folder)
    result = ask(
        model, args.video, args.questions, partial=args.partial, masked_seed=args.seed if args.masked else None
    )
    if args.explain is not None:
        draw(result.clip, result.tokens, model.config, result.answers, args.explain, source=args.video.name)
    if args.json:
        print(json.dumps(_as_json(result, args), indent=2))
    else:
        _print(result, args)
    return 0


def _token_counts(result: AskResult) -> dict[str, dict[str, int]]:
    return {
        name: {"encoded": tokens.kept.shape[1], "merged": int(tokens.valid.sum())}
        for name, tokens in (("visual", result.tokens.visual), ("audio", result.tokens.audio))
    }


def _as_json(result: AskResult, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "video": str(args.video),
        "seconds": round(float(result.clip.duration), 3),
        "has_audio": bool(result.clip.has_audio),
        "tokens": _token_counts(result),
        "answers": [
            {
                "question": answer.question,
                "answer": answer.text,
                "probability": round(answer.probability, 6),
                "ranked": [{"answer": text, "probability": round(p, 6)} for text, p in answer.ranked[:SHOWN]],
                "unknown_words": list(answer.unknown),
            }
            for answer in result.answers
        ],
    }


def _print(result: AskResult, args: argparse.Namespace) -> None:
    counts = _token_counts(result)
    merged = ", ".join(f"{n['encoded']} {name} tokens merged into {n['merged']}" for name, n in counts.items())
    print(f"{args.video.name}: {float(result.clip.duration):.1f} s, {merged}")
    if not bool(result.clip.has_audio):
        print("no sound: the model heard silence")
    for answer in result.answers:
        print_answer(answer, "━" if _prints("━") else "#")
    if args.explain is not None:
        print(f"\npicture: {args.explain}")


def print_answer(answer: Answer, mark: str) -> None:
    """The question and its likeliest answers, each with its probability and a bar of ``mark``."""
    print(f"\n{answer.question}")
    if answer.unknown:
        print(f"  (not known to the model: {', '.join(answer.unknown)})")
    for text, probability in answer.ranked[:SHOWN]:
        print(f"  {text:<16}{probability:>6.1%}  {mark * round(probability * BAR)}".rstrip())


def _prints(character: str) -> bool:
    """Whether stdout's encoding has ``character``."""
    try:
        character.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
