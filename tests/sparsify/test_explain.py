"""The explaining picture: where tokens lie, and that the picture shows what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sparsify.ask import Answer
from sparsify.batch import Clip
from sparsify.config import Config
from sparsify.data.templates import ANSWERS
from sparsify.data.units import to_units
from sparsify.errors import UsageError
from sparsify.model.outputs import ModalityTokens, SuperTokens
from sparsify.report import explain
from sparsify.report._token_map import audio_cells, frame_cells, token_map, unfold

DEMO = Config.preset("demo")
QUESTION = "How many instruments are sounding in the video?"


LOW_DPI = 50  # dots an inch: enough for what is tested here, and faster than the real 130


@pytest.fixture(autouse=True)
def _coarse(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "full_size" not in request.fixturenames:
        monkeypatch.setattr("sparsify.report._page.DPI", LOW_DPI)


@pytest.fixture
def full_size() -> None:
    """The test draws at the real resolution."""


def clip_of(config: Config, *, duration: float = 4.0) -> Clip:
    generator = torch.Generator().manual_seed(0)
    clip, vision, audio = config.clip, config.vision, config.audio
    frames = torch.randint(0, 255, (clip.frames, 3, vision.image_size, vision.image_size), generator=generator)
    mel = torch.randn(clip.segments, 1, audio.spec_size, audio.spec_size, generator=generator) * 20 - 40
    return Clip(
        frames=to_units(frames.to(torch.uint8), vision.unit),
        mel=to_units(mel, audio.unit).half(),
        frame_time=(torch.arange(clip.frames) + 0.5) * duration / clip.frames,
        segment_time=torch.linspace(0, max(0.0, duration - clip.segment_seconds), clip.segments),
        duration=torch.tensor(duration),
        has_audio=torch.tensor(True),
    )


def modality(images: int, cells: int, *, keep: float = 1.0, merge: bool = True) -> ModalityTokens:
    """Tokens of which every fourth is a key; each joins the key before it."""
    kept = torch.cat([torch.arange(i * cells, i * cells + round(keep * cells)) for i in range(images)])
    n = len(kept)
    if not merge:
        ones = torch.ones(1, n)
        return ModalityTokens(ones[..., None], ones, kept[None], ones.bool(), torch.arange(n)[None], None, kept[None])
    slots = -(-n // 4)
    scores = torch.arange(1, n + 1, dtype=torch.float32)
    return ModalityTokens(
        tokens=torch.zeros(1, slots, 8),
        size=torch.full((1, slots), 4.0),
        position=kept[None, ::4],
        valid=torch.ones(1, slots, dtype=torch.bool),
        assign=(torch.arange(n) // 4)[None],
        scores=(scores / scores.sum())[None],
        kept=kept[None],
    )


def tokens_of(config: Config, **options: object) -> SuperTokens:
    cells = len(frame_cells(config.vision)), len(audio_cells(config.audio))
    visual, audio = (
        modality(config.clip.frames, cells[0], **options),
        modality(config.clip.segments, cells[1], **options),
    )
    empty = torch.zeros(1, 0)
    return SuperTokens(empty[..., None], empty, empty.bool(), empty, visual, audio)


def answer(question: str = QUESTION, unknown: tuple[str, ...] = ()) -> Answer:
    probability = torch.linspace(3, -3, 42).softmax(0).tolist()
    return Answer(question, tuple(zip(ANSWERS, probability, strict=True)), unknown)


def picture_of(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)


def texts_of(monkeypatch: pytest.MonkeyPatch, *arguments: object, **options: object) -> list[str]:
    """Every text that ``draw`` puts on its page."""
    texts: list[str] = []
    text = explain.Page.text
    monkeypatch.setattr(
        explain.Page, "text", lambda page, x, y, words, **style: (texts.append(words), text(page, x, y, words, **style))
    )
    explain.draw(*arguments, **options)
    return texts


def test_cells_of_a_frame_are_its_grid_row_by_row() -> None:
    cells = frame_cells(DEMO.vision)
    assert len(cells) == 16
    assert cells[0] == (0, 0, 32, 32)
    assert cells[1] == (32, 0, 32, 32)
    assert cells[4] == (0, 32, 32, 32)


def test_cells_of_a_segment_follow_the_fold() -> None:
    cells = audio_cells(DEMO.audio)  # 128 x 128, two parts of 64 mels: rows 0 and 1 are the first half of the time
    assert [c for cell in cells for c in cell][:4] == [(32 * col, 0, 32, 32) for col in range(4)]
    assert cells[4] == [(0, 32, 32, 32)]  # the upper mels of the first half
    assert cells[8] == [(128, 0, 32, 32)]  # the lower mels of the second half
    assert cells[15] == [(224, 32, 32, 32)]


def test_a_token_taller_than_a_part_has_a_rectangle_in_each() -> None:
    tall = Config.preset("demo").replace(**{"audio.mel_bins": 16}).audio
    assert audio_cells(tall)[0] == [(0, 0, 32, 16), (128, 0, 32, 16)]


def test_cells_tile_the_spectrogram() -> None:
    for config in (DEMO, Config.preset("paper")):
        covered = np.zeros((config.audio.mel_bins, config.audio.mel_frames), dtype=int)
        for cell in audio_cells(config.audio):
            for x, y, width, height in cell:
                covered[int(y) : int(y + height), int(x) : int(x + width)] += 1
        assert (covered == 1).all()


def test_unfold_undoes_the_models_fold() -> None:
    from sparsify.data.mel import mel_image

    decibels = torch.randn(1, DEMO.audio.mel_frames, DEMO.audio.mel_bins)  # as many frames as the image has: no resize
    image = mel_image(decibels, DEMO.audio).numpy()
    np.testing.assert_allclose(unfold(image, DEMO.audio.mel_bins), decibels.transpose(1, 2).numpy(), atol=1e-5)


def test_token_map_places_clusters_keys_and_scores() -> None:
    tokens = ModalityTokens(
        tokens=torch.zeros(1, 3, 4),
        size=torch.tensor([[2.0, 1.0, 0.0]]),
        position=torch.tensor([[1, 6, 0]]),
        valid=torch.tensor([[True, True, False]]),
        assign=torch.tensor([[0, 0, 1]]),
        scores=torch.tensor([[0.5, 0.2, 0.3]]),
        kept=torch.tensor([[1, 3, 6]]),
    )
    found = token_map(tokens, 8)
    assert found.encoded.tolist() == [False, True, False, True, False, False, True, False]
    assert found.cluster.tolist() == [-1, 0, -1, 0, -1, -1, 1, -1]
    assert np.flatnonzero(found.key).tolist() == [1, 6]  # not 0, the position of an empty slot
    np.testing.assert_allclose(found.score[[1, 3, 6]], [1.5, 0.6, 0.9], rtol=1e-6)
    assert np.isnan(found.score[0])
    assert found.after == 2


@pytest.mark.parametrize("preset", ["demo", "paper"])
def test_a_picture_of_sensible_size(preset: str, tmp_path: Path, full_size: None) -> None:
    config = Config.preset(preset)
    path = explain.draw(clip_of(config, duration=60), tokens_of(config), config, [answer()], tmp_path / "out.png")
    height, width = picture_of(path).shape[:2]
    assert 1000 < width < 3200
    assert 900 < height < 2400
    assert list(tmp_path.iterdir()) == [path]  # nothing half-written is left


def test_the_page_says_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer("Is the theremin worth $5 or $6?", ("theremin",))
    texts = texts_of(
        monkeypatch, clip_of(DEMO), tokens_of(DEMO), DEMO, [answer(), asked], tmp_path / "out.png", source="duo.mp4"
    )
    page = "\n".join(texts)
    for words in (
        "duo.mp4",
        "4.0 s",
        "64 visual tokens → 16",
        "16 audio tokens → 4",
        "nothing was masked",
        "How many instruments are sounding in the\nvideo?",
        "Is the theremin worth $5 or $6?",
        "unknown: theremin",
        ANSWERS[0],
        f"{answer().probability:.1%}",
        "key token",
        "merged into the key of this colour",
        "0.5 s",
        "3.5 s",
        "0.0 to 4.0 s",
    ):
        assert words in page
    assert ANSWERS[5] not in texts  # five answers a question
    assert "masked: hidden from the model" not in page


def test_masked_cells_are_covered_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = clip_of(DEMO)
    plain = explain.draw(clip, tokens_of(DEMO), DEMO, [answer()], tmp_path / "plain.png")
    texts = texts_of(monkeypatch, clip, tokens_of(DEMO, keep=0.5), DEMO, [answer()], tmp_path / "masked.png")
    page = "\n".join(texts)
    assert "64 visual tokens → 32 unmasked → 8" in page
    assert "masked: 50% of the picture, 50% of the sound" in page
    assert "masked: hidden from the model" in page
    a, b = picture_of(plain), picture_of(tmp_path / "masked.png")
    # The lower half of the first frame (inches from the upper left corner) is masked: paler, and hardly any colour.
    x, y = (slice(round(inches[0] * LOW_DPI), round(inches[1] * LOW_DPI)) for inches in ((1.0, 2.9), (2.75, 3.6)))
    assert b[y, x, :3].mean() > a[y, x, :3].mean() + 0.2
    assert np.ptp(b[y, x, :3], axis=-1).mean() < 0.5 * np.ptp(a[y, x, :3], axis=-1).mean()
    upper = slice(round(1.75 * LOW_DPI), round(2.5 * LOW_DPI))
    assert abs(b[upper, x, :3].mean() - a[upper, x, :3].mean()) < 0.1


def test_without_merging_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = DEMO.replace(dense=True)
    texts = texts_of(monkeypatch, clip_of(DEMO), tokens_of(DEMO, merge=False), dense, [answer()], tmp_path / "out.png")
    assert "merging is off: every token was kept" in texts
    assert "attention" not in texts
    assert "key token (wider: more attention)" not in texts


def test_many_frames_and_questions_are_thinned_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DEMO.replace(**{"clip.frames": 30})
    asked = [answer(f"Is there a violin sound, number {i}?") for i in range(9)]
    texts = texts_of(monkeypatch, clip_of(config), tokens_of(config), config, asked, tmp_path / "out.png")
    assert "what it saw   (12 of 30 frames shown)" in texts
    assert any(text.startswith("… and ") for text in texts)


def test_silence_and_one_token_do_not_break_it(tmp_path: Path) -> None:
    clip = clip_of(DEMO)._replace(mel=torch.full_like(clip_of(DEMO).mel, -100), has_audio=torch.tensor(False))
    one = modality(1, 16, keep=1 / 16)
    tokens = tokens_of(DEMO)._replace(audio=one)
    assert explain.draw(clip, tokens, DEMO, [], tmp_path / "out.png").stat().st_size > 10_000


def test_other_scripts_and_formats(tmp_path: Path) -> None:
    explain.draw(clip_of(DEMO), tokens_of(DEMO), DEMO, [answer("有几种乐器")], tmp_path / "out.pdf")
    assert (tmp_path / "out.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.doc", r"expected a file name that ends in \.png"),
        ("out", "expected a file name"),
        ("no/out.png", "does not exist"),
    ],
)
def test_paths_that_cannot_be_written(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        explain.draw(clip_of(DEMO), tokens_of(DEMO), DEMO, [answer()], tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_failed_drawing_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    path = tmp_path / "out.png"
    path.write_bytes(b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        explain.draw(clip_of(DEMO), tokens_of(DEMO), DEMO, [answer()], path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
