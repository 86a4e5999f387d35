"""``sparsify info``: this installation, a preset, or a run."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sparsify
from sparsify.cli._run import RUN_HELP, checkpoint_folder
from sparsify.config import PRESETS, Config
from sparsify.errors import CheckpointError, ConfigError, UsageError

__all__ = ["add", "run"]

DESCRIPTION = """\
Shows what is installed and which kernels serve which device; with RUN the configuration, size and scores of a run; with
--preset the configuration of a preset, key by key."""

EPILOG = """\
examples:
  sparsify info                    versions, processor, GPU, kernels
  sparsify info runs/demo          what a run is and what it scored
  sparsify info --preset paper     every key that `train --set` can change"""

PACKAGES = (
    "torch",
    "triton",
    "timm",
    "torchvision",
    "transformers",
    "accelerate",
    "safetensors",
    "av",
    "rich",
    "matplotlib",
)


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="show versions and kernels, a preset, or a run with its scores",
        usage="sparsify info [RUN | --preset NAME]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, nargs="?", help=RUN_HELP)
    parser.add_argument("--preset", metavar="NAME", help=", ".join(PRESETS))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.run_folder is not None and args.preset is not None:
        raise UsageError("info: expected RUN or --preset, got both")
    if args.preset is not None:
        _print_config(Config.preset(args.preset))
    elif args.run_folder is not None:
        _print_run(args.run_folder)
    else:
        _print_installation()
    return 0


def _print_rows(title: str, rows: Sequence[tuple[str, object]]) -> None:
    width = max(len(name) for name, _ in rows)
    print(f"{title}\n" + "\n".join(f"  {name:<{width}}  {value}" for name, value in rows))


def _print_config(config: Config) -> None:
    rows: list[tuple[str, object]] = []
    for section, values in config.to_dict().items():
        if isinstance(values, dict):
            rows += [(f"{section}.{key}", json.dumps(value)) for key, value in values.items()]
        elif section != "version":
            rows.append((section, json.dumps(values)))
    _print_rows("config", rows)


def _print_installation() -> None:
    rows: list[tuple[str, object]] = [("sparsify", sparsify.__version__), ("python", platform.python_version())]
    rows += [(package, _version(package)) for package in PACKAGES]
    _print_rows("versions", rows)
    import torch

    import sparsify_kernels

    info = dict(sparsify_kernels.backend_info())
    gpu = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none"
    machine: list[tuple[str, object]] = [
        ("processor", torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()),
        ("instructions", info.pop("isa", None) or "unknown"),
        ("threads", torch.get_num_threads()),
        ("gpu", gpu),
    ]
    _print_rows("\nmachine", machine)
    reasons = info.pop("reasons", {})
    kernels = [
        (op, ", ".join(f"{device} {backend}" for device, backend in devices.items())) for op, devices in info.items()
    ]
    _print_rows("\nkernels", kernels)
    if reasons:
        _print_rows("\nwhy a fast path is off", list(reasons.items()))
    rows = []
    for name in PRESETS:
        c = PRESETS[name]
        sound = f"{c.clip.segments} x {c.clip.segment_seconds:g} s of sound"
        frames = f"{c.clip.frames} frames of {c.vision.image_size} px, {sound}"
        rows.append((name, f"{frames}, {c.train.epochs} epochs of {c.train.videos} videos a step"))
    _print_rows("\npresets", rows)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _print_run(folder: Path) -> None:
    checkpoint = checkpoint_folder(folder)
    path = checkpoint / "config.json"
    try:
        config = Config.from_dict(_read_json(path), str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    rows: list[tuple[str, object]] = [("checkpoint", checkpoint), ("parameters", f"{_parameters(checkpoint):,}")]
    if (folder / "results.json").is_file():
        rows += _scores(_read_json(folder / "results.json"), folder / "results.json")
    else:
        rows.append(("scores", "none: the run is not finished, or this is a checkpoint alone"))
    _print_rows(str(folder), rows)
    print()
    _print_config(config)


def _parameters(checkpoint: Path) -> int:
    """Number of values in the checkpoint, from its header alone: no tensor is read."""
    path = checkpoint / "model.safetensors"
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file ({error})") from None
    total = 0
    for shape in shapes:
        size = 1
        for side in shape:
            size *= side
        total += size
    return total


def _scores(results: dict[str, Any], path: Path) -> list[tuple[str, object]]:
    try:
        rows: list[tuple[str, object]] = []
        for name, found in results["evaluation"].items():
            overall = found["scores"]["overall"]
            floor = "" if overall["floor"] is None else f", floor {overall['floor']:.2%}"
            rows.append(
                (
                    f"{results['judged']} {name}",
                    f"{found['accuracy']:.2%}{floor} ({found['scored']} of {found['asked']})",
                )
            )
        rows.append(("trained in", f"{results['seconds']['total']:.0f} s, {results['steps']} steps"))
        rows += [
            (f"split {name}", f"{s['questions']} questions, fingerprint {s['fingerprint']}")
            for name, s in results["splits"].items()
        ]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is not the results of a run ({error} is missing)") from None
    return rows


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
