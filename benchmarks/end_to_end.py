"""Masked encoders and the whole model against dense: FLOP, time and peak memory, all in one run.

    python -m benchmarks.end_to_end [--json FILE] [--device cpu|cuda] [--quick] [--only TABLE]

*encoders*: Swin-V2-T at 256 px and HTS-AT with all, half and a quarter of their units, and ``dense=True``, against the
libraries' own forward of all tokens. *model*: a training step with masks and merging against ``dense=True``. *clips*:
the same as clips grow from 4 to 60 frames at one a second. On a GPU, in bf16 and with batches that fill it, times are
shares of the faster of the baseline and the same compiled. Everything that masking costs is inside the times: the draw,
the gather of kept units, the plan. Runs that are compared take turns, and medians are compared. Memory is the peak
beyond weights, their gradients, the optimiser's state and the input: of tensors, and on a CPU of the pages of a process
of its own, which hold what kernels and allocators take as well.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import sparsify_kernels.flops  # noqa: F401
from sparsify.batch import Masking, Questions, Video
from sparsify.config import Config
from sparsify.data.units import from_units
from sparsify.data.vocabulary import Vocabulary
from sparsify.model import SparsifyModel
from sparsify.model.audio import AudioEncoder
from sparsify.model.masking import KeptUnits, draw_units
from sparsify.model.vision import VisionEncoder
from sparsify_kernels import random_mask
from sparsify_kernels.testing import peak_memory, peak_of_tensors

TABLES = ("encoders", "model", "clips")
WORDS = 14
COMPILED = ", compiled"  # of a name
Functions = dict[str, Callable[[], None]]


class Case(NamedTuple):
    """What is compared: ``functions(device, size)`` gives calls by name, the baseline first."""

    table: str
    name: str
    functions: Callable[[str, int], Functions]
    size: int  # images or videos
    gpu_size: int = 1  # so many on a GPU
    rounds: int = 7


class Row(NamedTuple):
    """One call against the baseline: shares of its FLOP, time (or the compiled baseline's, if that is faster) and peak
    memory, and what that took.

    ``pages`` is the share of the process's memory, ``None`` on a GPU.
    """

    table: str
    case: str
    name: str
    flop: float
    time: float
    memory: float
    pages: float | None
    base_gflop: float
    base_ms: float
    base_mib: float


def cases() -> Iterator[Case]:
    for passes in ("forward", "forward + backward"):
        yield Case("encoders", f"Swin-V2-T, {passes}", lambda d, n, p=passes: encoder_calls(vision(), d, n, p), 8, 128)
        yield Case("encoders", f"HTS-AT, {passes}", lambda d, n, p=passes: encoder_calls(audio(), d, n, p), 8, 128)
    step = partial(model_calls, frames=10, segments=6)
    yield Case("model", "training step, 10 frames, 6 segments", step, 1, 8)
    for frames in (4, 10, 20, 40, 60):
        step = partial(model_calls, frames=frames, segments=-(-frames // 10))
        rounds = 1 if frames == 60 else 3  # a dense step of 60 s takes half a minute on two cores
        yield Case("clips", f"training step, {frames} s", step, 1, rounds=rounds)


def vision() -> VisionEncoder:
    return VisionEncoder(Config.preset("paper").vision)


def audio() -> AudioEncoder:
    return AudioEncoder(Config.preset("paper").audio)


def encoder_calls(encoder: VisionEncoder | AudioEncoder, device: str, images: int, passes: str) -> Functions:
    """An encoder over ``images`` random images in units: dense, and masked, with all, a half and a quarter of them."""
    encoder.to(device).train()
    grid, unit = encoder.config.units, encoder.config.unit
    values = 3 * unit**2 if isinstance(encoder, VisionEncoder) else unit**2
    units = torch.randint(0, 256, (images, grid**2, values), dtype=torch.uint8, device=device)
    if isinstance(encoder, AudioEncoder):
        units = (units * 0.3 - 60).half()
    _give_gradients(encoder)
    backward = passes != "forward"

    def run(x: Tensor, kept: KeptUnits | None) -> None:
        for stage in range(len(encoder.stage_dims)):
            x = encoder.stage(stage, x, None if kept is None else kept.plan)
        x = encoder.finish(x)
        if backward:
            x.float().square().mean().backward()

    images_whole = from_units(units, unit, (grid, grid)).float()

    def library(forward: Callable[..., Tensor]) -> Callable[[], None]:
        def call() -> None:
            with torch.set_grad_enabled(backward), autocast(device):
                x = forward(encoder, images_whole)
                if backward:
                    x.float().square().mean().backward()

        return call

    def dense() -> None:
        with torch.set_grad_enabled(backward), autocast(device):
            run(encoder.embed(units), None)

    def masked(keep: float) -> Callable[[], None]:
        def call() -> None:
            with torch.set_grad_enabled(backward), autocast(device):
                seed = torch.arange(images, device=device)
                where = {"grid": (grid, grid), "stratified": True} if keep < 1 else {}
                tokens, index = random_mask(units, keep, seed=seed, **where)
                image = torch.arange(images, device=device).repeat_interleave(index.shape[1])
                assert encoder.masked is not None
                kept = KeptUnits(tokens.flatten(0, 1), encoder.masked.plan(image, index.flatten(), images), images)
                run(encoder.embed_kept(kept), kept)

        return call

    calls = {"library": library(_forward_of_the_library)}
    if device == "cuda":
        calls["library" + COMPILED] = library(torch.compile(_forward_of_the_library))
    return calls | {"dense=True": dense, "keep 1": masked(1), "keep 1/2": masked(0.5), "keep 1/4": masked(0.25)}


def _forward_of_the_library(encoder: VisionEncoder | AudioEncoder, images: Tensor) -> Tensor:
    """All tokens of all stages, as timm or transformers computes them, without pooling."""
    if isinstance(encoder, VisionEncoder):
        return encoder.swin.forward_features(images)
    x = encoder.htsat.patch_embed(images)
    for layer, resolution in zip(encoder.htsat.layers, encoder.htsat.input_resolutions, strict=True):
        x = layer(x, resolution)[0]
    return encoder.htsat.norm(x)


def model_calls(device: str, videos: int, frames: int, segments: int) -> Functions:
    """A training step of the paper's model on random clips, four questions each: masks and merging, and dense."""
    config = Config.preset("paper").replace(**{"clip.frames": frames, "clip.segments": segments})
    torch.manual_seed(0)
    sparse = SparsifyModel(config, Vocabulary.build(), pretrained=False).to(device).train()
    dense = SparsifyModel(config.replace(dense=True), Vocabulary.build(), pretrained=False).to(device).train()
    v, a = config.vision, config.audio
    video = Video(
        torch.randint(0, 256, (videos, frames, v.units**2, 3 * v.unit**2), dtype=torch.uint8),
        (20 * torch.randn(videos, segments, a.units**2, a.unit**2) - 40).half(),
        torch.arange(frames).float().expand(videos, -1),
        10 * torch.arange(segments).float().expand(videos, -1),
        torch.full((videos,), float(frames)),
    )
    count = 4 * videos
    questions = Questions(
        torch.randint(2, len(sparse.vocabulary), (count, WORDS)),
        torch.ones(count, WORDS, dtype=torch.bool),
        torch.arange(videos).repeat_interleave(4),
        torch.arange(4).repeat(videos),
        4,
    )
    masking = Masking(
        torch.arange(videos * frames).view(videos, -1), 1000 + torch.arange(videos * segments).view(videos, -1), 0.5
    )
    video, questions, masking = (type(x)(*(_on(y, device) for y in x)) for x in (video, questions, masking))
    target = torch.zeros(count, dtype=torch.int64, device=device)
    optimisers = {model: torch.optim.AdamW(model.parameters(), fused=True) for model in (sparse, dense)}
    for model, optimiser in optimisers.items():
        _give_gradients(model)
        optimiser.step()  # makes its state

    def step(model: SparsifyModel, masks: Masking | None, *, compiled: bool = False) -> Callable[[], None]:
        answer = torch.compile(model) if compiled else model

        def call() -> None:
            optimisers[model].zero_grad(set_to_none=False)
            with autocast(device):
                loss = F.cross_entropy(answer(video, questions, masks).float(), target)
            loss.backward()
            optimisers[model].step()

        return call

    def draw() -> None:
        draw_units(video, masking, config, sparse.vision.masked, sparse.audio.masked)

    calls = {"dense": step(dense, None)}
    if device == "cuda":
        calls["dense" + COMPILED] = step(dense, None, compiled=True)
    return calls | {"masks and merging": step(sparse, masking), "of it: draw, gather, plan": draw}


def _on(x: Any, device: str) -> Any:
    return x.to(device) if isinstance(x, Tensor) else x


def _give_gradients(module: torch.nn.Module) -> None:
    """So that they are there before a peak is measured."""
    for p in module.parameters():
        p.grad = torch.zeros_like(p)


def autocast(device: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def measure(case: Case, device: str, rounds: int) -> list[Row]:
    """A row for each call but the baseline."""
    flop, seconds = _apart(_flop_and_seconds, case, device, rounds)
    memory = {name: _apart(_peak, case, device, name) for name in seconds}
    first = next(iter(seconds))
    base = (flop[first], min(seconds[first], seconds.get(first + COMPILED, math.inf)), memory[first].tensors)
    pages = {name: peak.pages for name, peak in memory.items() if peak.pages is not None}
    return [
        Row(
            case.table,
            case.name,
            name,
            flop[name] / base[0],
            seconds[name] / base[1],
            memory[name].tensors / max(base[2], 1),
            pages[name] / max(pages[first], 1) if pages else None,
            base[0] / 1e9,
            base[1] * 1e3,
            base[2] / 2**20,
        )
        for name in seconds
        if name != first
    ]


def _apart(figures: Callable[[Case, str, Any], Any], case: Case, device: str, asked: Any) -> Any:
    """``figures(case, device, asked)`` in a process of its own, whose memory no other case is left with: the largest
    ones fill most of a small machine. One that dies, of too little memory most likely, is a ``BrokenProcessPool``.
    """
    size = case.gpu_size if device == "cuda" else case.size
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_figures_of, figures, case.table, case.name, size, device, asked).result()


def _figures_of(figures: Callable[[Case, str, Any], Any], table: str, name: str, size: int, *rest: Any) -> Any:
    case = next(case for case in cases() if (case.table, case.name) == (table, name))
    return figures(case._replace(size=size), *rest)


def _flop_and_seconds(case: Case, device: str, rounds: int) -> tuple[dict[str, int], dict[str, float]]:
    functions = case.functions(device, case.size)
    flop = {name: _flop(functions[name.removesuffix(COMPILED)]) for name in functions}  # compiled, nobody counts
    for name, call in functions.items():
        if name.endswith(COMPILED):
            call()  # compiles, before the clock runs
    return flop, _take_turns(functions, rounds, device)


def _flop(call: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def _take_turns(functions: Functions, rounds: int, device: str) -> dict[str, float]:
    """The median seconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, call in functions.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Peak(NamedTuple):
    """Bytes at the peak of one call."""

    tensors: int
    pages: int | None


def _peak(case: Case, device: str, name: str) -> Peak:
    case.functions(device, 1)[name]()  # what libraries allocate once
    call = case.functions(device, case.size)[name]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return Peak(int(torch.cuda.max_memory_allocated() - before), None)
    pages = peak_memory(call)[0]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself
    return Peak(peak_of_tensors(call)[0], pages)


def render(rows: list[Row]) -> str:
    """The rows as Markdown, a share of dense in each column."""
    lines = ["| | | FLOP | time | memory | its pages | baseline: GFLOP, ms, MiB |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {r.case} | {r.name} | {r.flop:.3f} | {r.time:.2f} | {r.memory:.2f} | {_share(r.pages)} "
        f"| {r.base_gflop:.1f}, {r.base_ms:.0f}, {r.base_mib:.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows there, too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu (fp32); cuda is bf16")
    quick = "3 rounds in all tables; otherwise 7, and 3 in clips (one of the longest)"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--only", choices=TABLES, help="one table of the three")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: GPU: not measured", file=sys.stderr)
        return 1
    rows: list[Row] = []
    for case in cases():
        if args.only in (None, case.table):
            try:
                measured = measure(case, args.device, min(case.rounds, 3) if args.quick else case.rounds)
            except BrokenProcessPool:
                print(f"{case.name}: not measured, its process died: too little memory?", file=sys.stderr, flush=True)
                continue
            print(*render(measured).splitlines()[2:], sep="\n", file=sys.stderr, flush=True)
            rows += measured
    print(f"{platform.processor() or platform.machine()}, {args.device}, {torch.get_num_threads()} threads")
    print(render(rows))
    if args.json is not None:
        args.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
