"""Checkpoints: what is saved comes back, everything else is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify.errors import CheckpointError
from sparsify.model import SparsifyModel, checkpoint


@pytest.fixture
def saved(tiny, make_model, tmp_path):
    model = make_model(tiny())
    model.save_pretrained(tmp_path / "run" / "best")
    return model, tmp_path / "run" / "best"


def test_a_saved_model_comes_back_whole(saved, make_batch):
    model, folder = saved
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "vocabulary.json"]
    again = SparsifyModel.from_pretrained(folder)
    assert not again.training
    assert again.config == model.config
    assert again.vocabulary == model.vocabulary
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    video, questions, _ = make_batch(model.config)
    assert torch.equal(model.eval()(video, questions), again(video, questions))


def test_loading_fetches_no_weights_that_the_config_names(saved):
    _, folder = saved
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data["vision"]["weights"] = data["audio"]["weights"] = "/nowhere/weights"
    path.write_text(json.dumps(data))
    assert SparsifyModel.from_pretrained(folder).config.vision.weights == "/nowhere/weights"


def test_saving_again_replaces_and_a_failed_save_leaves_the_old_file(saved, tiny, make_model, monkeypatch):
    _, folder = saved
    before = (folder / "model.safetensors").read_bytes()

    def full(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(CheckpointError, match="best: the checkpoint could not be written: No space left on device"):
            make_model(tiny(), seed=1).save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert len(list(folder.iterdir())) == 3, "no temporary file stays behind"
    make_model(tiny(), seed=1).save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, name):
    _, folder = saved
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: the file is missing"):
        SparsifyModel.from_pretrained(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="none: expected a checkpoint folder"):
        SparsifyModel.from_pretrained(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=99), r"config.json: version 99; this release reads version 1"),
        (lambda d: d.update(colour="red"), r"config.json: unknown key 'colour'"),
        (lambda d: d["fusion"].update(dim="wide"), r"config.json.fusion.dim: expected int, got 'wide'"),
        (
            lambda d: d["fusion"].update(adapter_dim=4),
            r"model.safetensors: adapters.0.visual.latents has shape \[2, 8\], .* expect \[2, 4\]",
        ),
        (lambda d: d["fusion"].update(layers=2), r"model.safetensors: head.layers.1.\S+ is missing"),
        (lambda d: d["fusion"].update(mixer_layers=0), r"model.safetensors: mixer.0.\S+ is unknown"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(saved, change, message):
    _, folder = saved
    data = json.loads((folder / "config.json").read_text())
    change(data)
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message):
        SparsifyModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[]"])
def test_what_is_not_json_is_refused(saved, name, content):
    _, folder = saved
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        SparsifyModel.from_pretrained(folder)


def test_a_pickle_is_never_read(saved):
    model, folder = saved
    path = folder / "model.safetensors"
    torch.save(model.state_dict(), path)
    with pytest.raises(CheckpointError, match="expected a safetensors file"):
        SparsifyModel.from_pretrained(folder)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle, which is never read"):
        SparsifyModel.from_pretrained(folder)


def test_a_truncated_file_is_refused(saved):
    _, folder = saved
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="expected a safetensors file"):
        SparsifyModel.from_pretrained(folder)


def test_another_dtype_is_read_as_the_models_own(saved):
    _, folder = saved
    path = folder / "model.safetensors"
    save_file({k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}, path)
    assert SparsifyModel.from_pretrained(folder).words.weight.dtype == torch.float32


def test_file_names_are_public_knowledge():
    assert (checkpoint.CONFIG, checkpoint.VOCABULARY, checkpoint.MODEL) == (
        "config.json",
        "vocabulary.json",
        "model.safetensors",
    )
