"""Pretrained weights: read by path, every tensor compared, anything missing named."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import save_file

from sparsify.config import Config
from sparsify.errors import CheckpointError
from sparsify.model import SparsifyModel
from sparsify.model.audio import build_htsat
from sparsify.model.vision import build_swin
from sparsify.model.weights import load_audio_weights, load_vision_weights


@pytest.fixture
def swin_state(tiny):
    """What timm saves of a Swin-V2 with a classifier."""
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    v = tiny().vision
    torch.manual_seed(1)
    swin = SwinTransformerV2(
        img_size=v.image_size,
        patch_size=v.patch_size,
        window_size=v.window_size,
        embed_dim=v.embed_dim,
        depths=v.depths,
        num_heads=v.heads,
        num_classes=5,
    )
    with torch.no_grad():
        for p in swin.parameters():
            p.normal_()
    return swin.state_dict()


def clap(tiny, **changes):
    from transformers import ClapAudioConfig, ClapConfig, ClapModel, ClapTextConfig

    a = tiny().audio
    audio = {
        "spec_size": a.spec_size,
        "num_mel_bins": a.mel_bins,
        "window_size": a.window_size,
        "patch_size": a.patch_size,
        "patch_stride": [a.patch_size] * 2,
        "patch_embeds_hidden_size": a.embed_dim,
        "hidden_size": a.out_dim,
        "depths": list(a.depths),
        "num_attention_heads": list(a.heads),
        "num_hidden_layers": 3,
        "projection_dim": 8,
    }
    text = ClapTextConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    torch.manual_seed(2)
    config = ClapConfig(text_config=text, audio_config=ClapAudioConfig(**(audio | changes)), projection_dim=8)
    model = ClapModel(config)
    with torch.no_grad():
        for p in model.audio_model.parameters():
            p.normal_()
        model.audio_model.audio_encoder.batch_norm.running_mean.normal_()
    return model


def compare(module, state):
    ours = module.state_dict()
    assert ours
    for name, tensor in ours.items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("form", ["w.safetensors", "w.pth", "folder", "wrapped.pth"])
def test_timm_checkpoints_load_by_path_tensor_by_tensor(tiny, swin_state, tmp_path, form):
    path = tmp_path / form
    if form == "folder":
        path.mkdir()
        save_file(swin_state, path / "model.safetensors")
    elif form.endswith("safetensors"):
        save_file(swin_state, path)
    else:
        torch.save({"model": swin_state} if form.startswith("wrapped") else swin_state, path)
    swin = build_swin(tiny().vision)
    load_vision_weights(swin, str(path))
    compare(swin, swin_state)


@pytest.mark.parametrize("fused", [False, True])
def test_clap_checkpoints_load_by_path_tensor_by_tensor(tiny, tmp_path, fused):
    model = clap(tiny, **({"enable_fusion": True, "fusion_type": "aff_2d"} if fused else {}))
    model.save_pretrained(tmp_path)
    htsat = build_htsat(tiny().audio)
    load_audio_weights(htsat, str(tmp_path))
    compare(htsat, model.audio_model.audio_encoder.state_dict())


def test_the_model_reads_the_weights_that_its_config_names(tiny, vocabulary, swin_state, tmp_path, caplog):
    save_file(swin_state, tmp_path / "swin.safetensors")
    other = clap(tiny)
    other.save_pretrained(tmp_path / "clap")
    config = tiny(vision__weights=str(tmp_path / "swin.safetensors"), audio__weights=str(tmp_path / "clap"))
    caplog.set_level(logging.WARNING, logger="sparsify")
    model = SparsifyModel(config, vocabulary)
    compare(model.vision.swin, swin_state)
    compare(model.audio.htsat, other.audio_model.audio_encoder.state_dict())
    assert "random" not in caplog.text


def test_a_missing_parameter_is_named(tiny, swin_state, tmp_path):
    del swin_state["layers.1.blocks.0.attn.q_bias"]
    save_file(swin_state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"vision.weights: .* has no layers.1.blocks.0.attn.q_bias \(1 of"):
        load_vision_weights(build_swin(tiny().vision), str(tmp_path / "w.safetensors"))


def test_a_missing_audio_parameter_is_named(tiny, tmp_path):
    from safetensors.torch import load_file

    clap(tiny).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["audio_model.audio_encoder.layers.0.blocks.1.layernorm_after.bias"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"audio.weights: .* has no layers.0.blocks.1.layernorm_after.bias"):
        load_audio_weights(build_htsat(tiny().audio), str(tmp_path))


@pytest.mark.parametrize(
    ("change", "parameter"),
    [
        ({"embed_dim": 16}, r"\S+"),
        ({"patch_size": 8, "window_size": 2, "unit": 32}, "patch_embed.proj.weight"),
        ({"heads": [1, 1, 1]}, r"\S+"),
    ],
)
def test_another_vision_geometry_is_an_error(tiny, swin_state, tmp_path, change, parameter):
    save_file(swin_state, tmp_path / "w.safetensors")
    config = tiny(**{f"vision__{k}": v for k, v in change.items()})
    with pytest.raises(
        CheckpointError, match=f"vision.weights: .* holds {parameter} of shape .* the config's geometry expects"
    ):
        load_vision_weights(build_swin(config.vision), str(tmp_path / "w.safetensors"))


def test_more_blocks_in_the_file_than_in_the_config_is_an_error(tiny, swin_state, tmp_path):
    save_file(swin_state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="which this geometry does not"):
        load_vision_weights(build_swin(tiny(vision__depths=[2, 1, 1]).vision), str(tmp_path / "w.safetensors"))


def test_another_audio_geometry_is_an_error(tiny, tmp_path):
    clap(tiny).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"audio.weights: .* of shape"):
        load_audio_weights(build_htsat(tiny(audio__embed_dim=16).audio), str(tmp_path))


def test_what_holds_no_weights_is_an_error(tiny, tmp_path):
    (tmp_path / "w.safetensors").write_text("no weights")
    swin, htsat = build_swin(tiny().vision), build_htsat(tiny().audio)
    with pytest.raises(CheckpointError, match="is not a file of weights"):
        load_vision_weights(swin, str(tmp_path / "w.safetensors"))
    with pytest.raises(CheckpointError, match=r"holds none of model.safetensors"):
        load_vision_weights(swin, str(tmp_path))
    with pytest.raises(CheckpointError, match="could not be read"):
        load_audio_weights(htsat, str(tmp_path))


def test_an_unknown_name_is_an_error_and_never_random_weights(tiny):
    with pytest.raises(CheckpointError, match="'swinv2_of_nowhere' is no local path and could not be fetched"):
        load_vision_weights(build_swin(tiny().vision), "swinv2_of_nowhere")


def test_random_initialisation_is_said_aloud(tiny, vocabulary, caplog):
    caplog.set_level(logging.WARNING, logger="sparsify")
    SparsifyModel(tiny(), vocabulary)
    assert [r.message for r in caplog.records] == [
        "vision: no weights given, Swin-V2 starts from random initialisation",
        "audio: no weights given, HTS-AT starts from random initialisation",
    ]


def test_windows_of_the_pretraining_change_the_bias_coordinates(tiny):
    plain, other = build_swin(tiny().vision), build_swin(tiny(vision__pretrained_windows=[8, 8, 8]).vision)
    name = "layers.0.blocks.0.attn.relative_coords_table"
    assert not torch.equal(plain.get_buffer(name), other.get_buffer(name))


def test_the_paper_preset_has_the_geometry_of_the_published_models():
    """Swin-V2-T at 256 px with window 8, as timm names it; HTS-AT as CLAP's default configuration."""
    import timm
    from transformers import ClapAudioConfig
    from transformers.models.clap.modeling_clap import ClapAudioModel

    config = Config.preset("paper")
    with torch.device("meta"):
        published = timm.create_model("swinv2_tiny_window8_256", num_classes=0)
        htsat = ClapAudioModel(ClapAudioConfig()).audio_encoder
        ours = build_swin(config.vision), build_htsat(config.audio)
    for a, b in zip(ours, (published, htsat), strict=True):
        assert {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}
