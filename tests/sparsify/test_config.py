"""The configuration: presets, changes by dotted key, what is refused and how, and the way through JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from sparsify.config import PRESETS, Config, MaskConfig, MergeConfig, TrainConfig, config_keys
from sparsify.errors import ConfigError

PAPER = Config.preset("paper")
DEMO = Config.preset("demo")


class TestPresets:
    def test_the_three_are_there(self):
        assert set(PRESETS) >= {"demo", "paper", "adaptive"}
        assert all(Config.preset(name) is config for name, config in PRESETS.items())

    def test_an_unknown_one_names_the_known(self):
        with pytest.raises(ConfigError, match="--preset: no preset 'papr'; the presets are adaptive, demo, paper"):
            Config.preset("papr")

    def test_paper_is_the_setting_of_the_paper(self):
        assert (PAPER.mask.keep, PAPER.mask.epochs, PAPER.mask.eval) == (0.5, (0, 3), False)
        assert (PAPER.merge.enabled, PAPER.merge.fence, PAPER.merge.capacity) == (True, 0.0, None)
        assert (PAPER.select.skip, PAPER.select.unit, PAPER.select.until) == (0.5, "question", 0.875)
        assert PAPER.train.epochs == 15
        assert not PAPER.dense

    def test_adaptive_is_paper_with_tukeys_fence(self):
        adaptive = Config.preset("adaptive")
        assert adaptive.merge.fence == 1.5
        assert adaptive.merge.capacity is not None
        assert dataclasses.replace(adaptive, merge=PAPER.merge) == PAPER

    def test_both_encoders_have_the_geometry_that_units_need(self):
        for encoder, size in ((PAPER.vision, PAPER.vision.image_size), (PAPER.audio, PAPER.audio.spec_size)):
            assert (size, encoder.unit, encoder.units, encoder.out_dim) == (256, 32, 8, 768)
        assert PAPER.audio.mel_frames == 1024
        assert (DEMO.vision.units, DEMO.audio.units) == (4, 4)

    def test_a_configuration_cannot_be_changed_in_place(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            PAPER.train.lr = 1.0


class TestReplace:
    def test_dotted_keys_change_one_value_each(self):
        changed = PAPER.replace(**{"train.lr": 3e-4, "dense": True, "mask.schedule": [0.25, 0.5]})
        assert (changed.train.lr, changed.dense, changed.mask.schedule) == (3e-4, True, (0.25, 0.5))
        assert changed.replace(**{"train.lr": 1e-4, "dense": False, "mask.schedule": ()}) == PAPER

    @pytest.mark.parametrize("key", ["lr", "train", "train.rate", "train.lr.x", "trian.lr", "version", ""])
    def test_an_unknown_key_is_refused_and_says_where_the_known_are(self, key):
        with pytest.raises(ConfigError, match=rf"config: no key '{key}'.*`sparsify info --preset demo` lists the keys"):
            PAPER.replace(**{key: 1})

    def test_a_mistyped_key_gets_the_nearest(self):
        with pytest.raises(ConfigError, match=r"no key 'train\.learning'; did you mean .*train\."):
            PAPER.replace(**{"train.learning": 1})

    def test_config_keys_are_the_leaves(self):
        keys = config_keys()
        assert {"train.lr", "mask.epochs", "dense"} <= set(keys)
        assert "train" not in keys
        assert all(PAPER.replace(**{key: _get(PAPER, key)}) == PAPER for key in keys)


def _get(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


class TestOptions:
    """``--set KEY=VALUE``."""

    @pytest.mark.parametrize(
        ("option", "key", "value"),
        [
            ("train.lr=3e-4", "train.lr", 3e-4),
            ("train.lr=1", "train.lr", 1.0),  # JSON has no whole floats
            ("train.epochs=2", "train.epochs", 2),
            ("dense=true", "dense", True),
            ("mask.epochs=[0, null]", "mask.epochs", (0, None)),
            ("vision.weights=/models/a=b.pt", "vision.weights", "/models/a=b.pt"),  # text needs no quotes
            (" train.inputs =blind", "train.inputs", "blind"),
            ("merge.capacity=null", "merge.capacity", None),
            ("merge.capacity=0.1", "merge.capacity", 0.1),
        ],
    )
    def test_values_are_json_or_text(self, option, key, value):
        changed = Config.preset("adaptive").with_options([option])
        assert _get(changed, key) == value
        assert type(_get(changed, key)) is type(value)

    def test_several_and_none(self):
        assert PAPER.with_options([]) == PAPER
        changed = PAPER.with_options(["train.epochs=1", "train.seed=7", "train.epochs=2"])
        assert (changed.train.epochs, changed.train.seed) == (2, 7)  # the last one counts

    def test_keys_that_only_fit_together(self):
        sizes = ["vision.image_size=192", "vision.window_size=12", "vision.unit=64"]
        assert PAPER.with_options(sizes).vision.units == 3
        with pytest.raises(
            ConfigError, match=r"config\.vision\.window_size: expected windows of 32 px that tile 240 px"
        ):
            PAPER.with_options(["vision.image_size=240"])

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ("train.lr", "--set: expected KEY=VALUE, got 'train.lr'"),
            ("train.rate=1", "no key 'train.rate'"),
            ("train.lr=fast", r"train\.lr: expected float, got 'fast'"),
            ("train.lr=NaN", r"train\.lr: expected float, got nan"),
            ("train.lr=Infinity", r"train\.lr: expected float, got inf"),
            ("train.lr=true", r"train\.lr: expected float, got True"),
            ("train.lr=null", r"train\.lr: expected float, got None"),
            ("train.epochs=2.5", r"train\.epochs: expected int, got 2\.5"),
            ("train.epochs=true", r"train\.epochs: expected int, got True"),
            ("dense=1", "dense: expected bool, got 1"),
            ("vision.weights=3", r"vision\.weights: expected str, got 3"),
            ("mask.epochs=3", r"mask\.epochs: expected a list, got 3"),
            ("mask.epochs=[1, 2, 3]", r"mask\.epochs: expected 2 values"),
            ('mask.schedule=[0.5, "half"]', r"mask\.schedule: expected float, got 'half'"),
        ],
    )
    def test_what_does_not_fit_is_named(self, option, message):
        with pytest.raises(ConfigError, match=message):
            PAPER.with_options([option])


RANGES = {
    "mask.keep": [0, 1.1, -0.5],
    "mask.schedule": [[0.5, 0]],
    "mask.kind": ["frame"],
    "merge.fence": [-0.1],
    "merge.capacity": [0, 1.5],
    "select.skip": [-0.1, 1],
    "select.unit": ["frame"],
    "select.until": [-0.1, 1.1],
    "train.precision": ["fp16"],
    "train.inputs": ["mute"],
    "train.epochs": [0],
    "train.videos": [0],
    "train.warmup": [1, -0.1],
    "clip.frames": [0],
    "clip.segments": [0],
    "clip.sample_rate": [0],
    "clip.fft": [0],
    "clip.hop": [-1],
    "clip.segment_seconds": [0],
    "vision.heads": [[3, 6], [3, 6, 12, 25]],
    "vision.window_size": [7],
    "vision.unit": [48, 16],  # no divisor of 256; smaller than a token of the last stage
    "audio.unit": [24],
    "vision.patch_size": [0],
    "vision.depths": [[2, 0, 6, 2], []],
    "audio.mel_bins": [0],
    "text.heads": [0, 3],
    "text.max_words": [0],
    "text.dropout": [1.0],
    "fusion.heads": [5],
    "fusion.mixer_layers": [-1],
    "merge.heads": [3],
    "train.lr": [-1e-4],
    "train.muon": [-1],
    "train.clip_norm": [-1],
    "train.label_smoothing": [1.0],
    "train.seed": [-1, 2**63],
    "train.workers": [-1],
    "clip.f_min": [-1.0, 14_000.0],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in RANGES.items() for value in values])
def test_a_value_outside_its_range_names_key_range_and_value(key, value):
    with pytest.raises(ConfigError, match=rf"^config\.{key}: expected .*, got ") as caught:
        PAPER.replace(**{key: value})
    assert "\n" not in str(caught.value)


def test_mel_bins_fold_into_a_square():
    with pytest.raises(ConfigError, match=r"config\.audio\.spec_size: expected a multiple of mel_bins = 100, got 256"):
        PAPER.replace(**{"audio.mel_bins": 100})


def test_both_encoders_need_as_many_stages():
    with pytest.raises(ConfigError, match=r"audio\.depths: expected as many stages as vision\.depths \(4\)"):
        PAPER.replace(**{"audio.depths": [2, 2, 6], "audio.heads": [4, 8, 16]})


def test_a_range_is_checked_without_replace_too():
    with pytest.raises(ConfigError, match=r"config\.mask\.keep"):
        Config(mask=MaskConfig(keep=2.0))
    with pytest.raises(ConfigError, match=r"config\.merge\.fence"):
        Config(merge=MergeConfig(fence=-1.0))


class TestKeepAt:
    """What share of the input an epoch trains on."""

    @staticmethod
    def keeps(config):
        return [config.keep_at(epoch) for epoch in range(config.train.epochs)]

    def mask(self, **changes):
        return self.keeps(Config(mask=MaskConfig(keep=0.25, **changes), train=TrainConfig(epochs=5)))

    def test_a_range_of_epochs_is_a_python_slice(self):
        assert self.mask(epochs=(0, 3)) == [0.25, 0.25, 0.25, 1.0, 1.0]
        assert self.mask(epochs=(0, -1)) == [0.25, 0.25, 0.25, 0.25, 1.0]
        assert self.mask(epochs=(1, None)) == [1.0, 0.25, 0.25, 0.25, 0.25]
        assert self.mask(epochs=(0, 0)) == [1.0] * 5
        assert self.mask(epochs=(0, 99)) == [0.25] * 5
        assert self.mask(epochs=(-2, None)) == [1.0, 1.0, 1.0, 0.25, 0.25]

    def test_a_schedule_replaces_keep_and_epochs_and_goes_on(self):
        assert self.mask(schedule=(0.5, 0.75)) == [0.5, 0.75, 0.75, 0.75, 0.75]
        assert self.mask(schedule=(1.0,), epochs=(0, 3)) == [1.0] * 5

    def test_dense_masks_nothing(self):
        assert self.keeps(PAPER.replace(dense=True)) == [1.0] * 15
        assert self.keeps(PAPER.replace(**{"dense": True, "mask.schedule": [0.5]})) == [1.0] * 15

    def test_the_presets(self):
        assert self.keeps(PAPER) == [0.5] * 3 + [1.0] * 12
        assert self.keeps(DEMO) == [0.5] * 6 + [1.0]


def test_units_are_counted_over_frames_and_segments():
    """10 frames and 6 segments of 8 x 8 units; a unit at least is kept of each."""
    assert [PAPER.units(keep) for keep in (1.0, 0.5, 0.001)] == [16 * 64, 16 * 32, 16]
    assert DEMO.units(0.25) == 5 * 4


class TestSkipAt:
    """What share of the easy samples an epoch skips."""

    @pytest.mark.parametrize(
        ("epochs", "until", "pruned"),
        [
            (15, 0.875, range(1, 13)),  # 13.125
            (30, 0.875, range(1, 26)),  # 26.25
            (16, 0.875, range(1, 14)),  # 14 exactly
            (100, 0.29, range(1, 29)),  # 29 exactly, of which a binary fraction falls short
            (1, 0.875, range(0)),
            (2, 1.0, range(1, 2)),
            (8, 0.0, range(0)),
        ],
    )
    def test_all_but_the_first_and_the_last_epochs_skip(self, epochs, until, pruned):
        config = PAPER.replace(**{"train.epochs": epochs, "select.until": until})
        assert [epoch for epoch in range(epochs) if config.skip_at(epoch)] == list(pruned)
        assert {config.skip_at(epoch) for epoch in pruned} <= {0.5}

    def test_dense_and_skip_0_skip_nothing(self):
        for config in (PAPER.replace(dense=True), PAPER.replace(**{"select.skip": 0}), DEMO):
            assert [config.skip_at(epoch) for epoch in range(15)] == [0.0] * 15


class TestJson:
    @pytest.mark.parametrize("name", sorted(PRESETS))
    def test_round_trip(self, name):
        config = Config.preset(name)
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    def test_the_way_through_json_keeps_types(self):
        config = PAPER.replace(**{"train.lr": 1, "mask.schedule": [1, 0.5], "mask.epochs": [1, None]})
        again = Config.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
        assert (again.train.lr, again.mask.schedule, again.mask.epochs) == (1.0, (1.0, 0.5), (1, None))
        assert hash(again) == hash(config)  # tuples, not lists

    def test_what_is_left_out_has_its_default(self):
        assert Config.from_dict({"version": 1}) == Config()
        assert Config.from_dict({"version": 1, "train": {"seed": 3}}) == Config(train=TrainConfig(seed=3))

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({}, "run/config.json: version None; this release reads version 1"),
            ({"version": 2}, "run/config.json: version 2; this release reads version 1"),
            ({"version": "1"}, "run/config.json: version '1'; this release reads version 1"),
            ([], "run/config.json: expected an object, got list"),
            ({"version": 1, "colour": 3}, "run/config.json: unknown key 'colour'; expected clip, vision, "),
            ({"version": 1, "train": {"rate": 3}}, r"run/config.json\.train: unknown key 'rate'; expected epochs, "),
            ({"version": 1, "train": 3}, r"run/config.json\.train: expected an object, got 3"),
            ({"version": 1, "train": {"lr": "3"}}, r"run/config.json\.train\.lr: expected float, got '3'"),
            ({"version": 1, "vision": {"depths": 2}}, r"run/config.json\.vision\.depths: expected a list, got 2"),
            ({"version": 1, "vision": {"depths": ["2"]}}, r"run/config.json\.vision\.depths: expected int, got '2'"),
        ],
    )
    def test_what_does_not_fit_is_refused_by_name(self, data, message):
        with pytest.raises(ConfigError, match=message):
            Config.from_dict(data, source="run/config.json")
