"""A checkpoint is a folder: ``config.json``, ``vocabulary.json``, ``model.safetensors``; never a pickle.

With a Hugging Face text encoder there is also ``text.json``, its architecture. Loading reads this folder alone, and
checks it first where training has sealed it (``sparsify.seal``).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparsify.config import Config
from sparsify.errors import CheckpointError, ConfigError
from sparsify.model.text import HuggingFaceText, TokenizerVocabulary, WordVocabulary
from sparsify.seal import check_seal, is_sealed

if TYPE_CHECKING:
    from sparsify.model.model import SparsifyModel

__all__ = ["load", "save"]

CONFIG, VOCABULARY, MODEL, TEXT = "config.json", "vocabulary.json", "model.safetensors", "text.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def save(model: SparsifyModel, folder: Path) -> None:
    """Write ``model`` into ``folder``. A crash leaves each file as it was or as it shall be, never half."""
    from safetensors.torch import save_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / CONFIG, _json(model.config.to_dict()))
        _write(folder / VOCABULARY, model.vocabulary.to_json())
        if isinstance(model.text, HuggingFaceText):
            _write(folder / TEXT, _json(model.text.encoder.config.to_dict()))
        state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        _replace(folder / MODEL, lambda path: save_file(state, path))
    except OSError as error:
        raise CheckpointError(f"{folder}: the checkpoint could not be written: {error.strerror or error}") from error


def load(folder: Path) -> SparsifyModel:
    """The model in ``folder``, in evaluation mode, on the CPU."""
    from sparsify.model.model import SparsifyModel

    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a checkpoint folder with {CONFIG}, {VOCABULARY} and {MODEL}")
    if is_sealed(folder):
        check_seal(folder)
    try:
        config = Config.from_dict(_read_json(folder / CONFIG), source=str(folder / CONFIG))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    vocabulary = _read_vocabulary(folder / VOCABULARY)
    state = _read_state(folder / MODEL)
    architecture = None if config.text.weights is None else _read_json(folder / TEXT)
    model = SparsifyModel(config, vocabulary, pretrained=False, text_architecture=architecture)
    _check(model.state_dict(), state, folder / MODEL)
    model.load_state_dict(state)
    return model.eval()


def _check(wanted: dict[str, Tensor], state: dict[str, Tensor], path: Path) -> None:
    missing, unknown = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    if missing:
        raise CheckpointError(f"{path}: {missing[0]} is missing ({len(missing)} of {len(wanted)} tensors)")
    if unknown:
        raise CheckpointError(
            f"{path}: {unknown[0]} is unknown to the model of {CONFIG} ({len(unknown)} unknown tensors)"
        )
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(state[name].shape)}, "
                f"{CONFIG} and {VOCABULARY} expect {list(tensor.shape)}"
            )


def _read_state(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        pickles = sorted(p.name for p in path.parent.iterdir() if p.suffix in _PICKLES)
        hint = f"; {pickles[0]} is a pickle, which is never read" if pickles else ""
        raise CheckpointError(f"{path}: the file is missing{hint}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: expected a safetensors file (a pickle is never read): {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: could not be read: {error.strerror or error}") from error


def _read_vocabulary(path: Path) -> WordVocabulary:
    data = _read_json(path)
    if isinstance(data, dict) and data.get("format") == TokenizerVocabulary.format:
        return TokenizerVocabulary.from_json(path.read_text(encoding="utf-8"), source=str(path))
    from sparsify.data.vocabulary import Vocabulary

    return Vocabulary.from_json(path.read_text(encoding="utf-8"), source=str(path))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, not JSON
        raise CheckpointError(f"{path}: expected JSON: {error}") from error


def _json(data: Any) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
