"""Pretrained weights, strictly: every parameter is there, in its shape, or an error names the one that is not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify._torchvision import ensure_torchvision
from sparsify.errors import CheckpointError

__all__ = ["load_audio_weights", "load_vision_weights"]

logger = logging.getLogger("sparsify")

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def load_vision_weights(swin: nn.Module, name: str | None) -> None:
    """Fill timm's ``SwinTransformerV2`` from a timm name or a local path; ``None`` leaves it random and says so."""
    if name is None:
        logger.warning("vision: no weights given, Swin-V2 starts from random initialisation")
        return
    ensure_torchvision()
    from timm.models.swin_transformer_v2 import checkpoint_filter_fn

    if Path(name).exists():
        state = _read(Path(name), "vision.weights")
        native = state.get("model", state)
        patch, theirs = "patch_embed.proj.weight", dict(swin.named_parameters())["patch_embed.proj.weight"]
        if patch in native and native[patch].shape != theirs.shape:  # the filter below would resample them silently
            raise CheckpointError(_shape_text("vision.weights", name, patch, native[patch], theirs))
        state, other = checkpoint_filter_fn(state, swin), None
    else:
        other = _published_swin(name)
        state = other.state_dict()
    _fill(swin, state, "vision.weights", name, ignored=("head.",))
    if other is not None:
        _same_bias_coordinates(swin, other, name)


def load_audio_weights(htsat: nn.Module, name: str | None) -> None:
    """Fill transformers' ``ClapAudioEncoder`` from a CLAP checkpoint; ``None`` leaves it random and says so.

    CLAP checkpoints are read through ``ClapAudioModelWithProjection``: ``ClapAudioModel.from_pretrained`` finds none of
    its names in them, leaves every weight random and only logs it. The parts for feature fusion (several crops of a
    long sound) are left out.
    """
    if name is None:
        logger.warning("audio: no weights given, HTS-AT starts from random initialisation")
        return
    ensure_torchvision()
    from transformers import ClapAudioModelWithProjection

    loader: Any = ClapAudioModelWithProjection
    try:
        model, info = loader.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"audio.weights: {name!r} could not be read: {_first_line(error)}") from error
    prefix = "audio_model.audio_encoder."
    absent = sorted(
        k for k in info["missing_keys"] if k.startswith(prefix) and not k.endswith("relative_position_index")
    )
    if absent:
        raise CheckpointError(
            f"audio.weights: {name!r} has no {absent[0].removeprefix(prefix)} ({len(absent)} missing)"
        )
    if info["mismatched_keys"]:
        first = sorted(str(k) for k in info["mismatched_keys"])[0]
        raise CheckpointError(f"audio.weights: {name!r} contradicts its own config at {first}")
    state = model.audio_model.audio_encoder.state_dict()
    _fill(htsat, state, "audio.weights", name, ignored=("patch_embed.fusion_model.", "patch_embed.mel_conv2d."))


def _fill(module: nn.Module, state: dict[str, Tensor], key: str, name: str, *, ignored: tuple[str, ...]) -> None:
    """``load_state_dict`` with errors that name the first parameter at fault."""
    wanted = module.state_dict()
    state = {k: v for k, v in state.items() if not k.startswith(ignored)}
    missing, unknown = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    if missing:
        raise CheckpointError(f"{key}: {name!r} has no {missing[0]} ({len(missing)} of {len(wanted)} missing)")
    for k, v in wanted.items():
        if state[k].shape != v.shape:
            raise CheckpointError(_shape_text(key, name, k, state[k], v))
    if unknown:
        raise CheckpointError(
            f"{key}: {name!r} has {unknown[0]}, which this geometry does not ({len(unknown)} unknown)"
        )
    module.load_state_dict(state)


def _shape_text(key: str, name: str, parameter: str, got: Tensor, expected: Tensor) -> str:
    return (
        f"{key}: {name!r} holds {parameter} of shape {list(got.shape)}, "
        f"the config's geometry expects {list(expected.shape)}"
    )


def _read(path: Path, key: str) -> dict[str, Any]:
    """A state dict from a .safetensors file, a torch file (tensors only), or a folder with one of them."""
    if path.is_dir():
        found = [path / f for f in _WEIGHT_FILES if (path / f).is_file()]
        if not found:
            raise CheckpointError(f"{key}: {str(path)!r} holds none of {', '.join(_WEIGHT_FILES)}")
        path = found[0]
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and pickle raise half a dozen classes for one thing: not a weight file
        raise CheckpointError(f"{key}: {str(path)!r} is not a file of weights: {_first_line(error)}") from error


def _published_swin(name: str) -> Any:
    import timm

    try:
        return timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # unknown name, no weights, no network: timm and the hub have a class for each
        raise CheckpointError(
            f"vision.weights: {name!r} is no local path and could not be fetched: {_first_line(error)}; "
            "give a local path, or null for random initialisation"
        ) from error


def _same_bias_coordinates(swin: nn.Module, other: nn.Module, name: str) -> None:
    """Swin-V2's position bias is computed from coordinates that depend on the windows of the pre-training."""
    theirs = dict(other.named_buffers())
    for k, ours in swin.named_buffers():
        if k.endswith("relative_coords_table") and not torch.equal(ours, theirs[k]):
            raise CheckpointError(
                f"vision.weights: {name!r} has other windows at {k}; see vision.window_size, pretrained_windows"
            )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
