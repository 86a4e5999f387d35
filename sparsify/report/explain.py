"""One picture of how a clip was answered: what was seen and heard, what was masked, what merged into what."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparsify.errors import UsageError
from sparsify.report._page import ACCENT, FAINT, INK, STYLE, Page
from sparsify.report._sidebar import answers_height, draw_answers, draw_legend, legend_height
from sparsify.report._token_map import Rect, TokenMap, audio_cells, frame_cells, token_map, unfold

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sparsify.ask import Answer
    from sparsify.batch import Clip
    from sparsify.config import Config
    from sparsify.model.outputs import SuperTokens

__all__ = ["FORMATS", "check_path", "draw"]

FORMATS = (".png", ".pdf", ".svg", ".jpg")
MOST_IMAGES = 12  # frames, and segments, drawn at most; more are thinned evenly
MOST_ANSWERS = 6  # questions that the page grows for; more are drawn where there is room
MARGIN, GAP, SIDEBAR, LABELS, HEADER = 0.3, 0.07, 3.8, 0.62, 1.1  # inches
ROWS = ("input", "merged", "attention")


class _Strip(NamedTuple):
    """A row of pictures of one modality and the tokens on them."""

    name: str
    pictures: np.ndarray  # [n, H, W, 3] or grey [n, H, W], in [0, 1]
    images: list[int]  # which of the clip's images each picture is
    labels: list[str]  # when each picture was
    total: int  # images of the clip
    cells: list[list[Rect]]  # rectangles of each token of a picture
    tokens: TokenMap
    size: tuple[float, float]  # of a picture, inches
    upwards: bool  # y grows upwards

    @property
    def rows(self) -> tuple[str, ...]:
        return ROWS[:1] if self.tokens.score is None else ROWS

    @property
    def width(self) -> float:
        return len(self.images) * (self.size[0] + GAP) - GAP

    @property
    def height(self) -> float:
        return len(self.rows) * (self.size[1] + GAP) - GAP


def check_path(path: str | Path) -> Path:
    """``path`` if a picture can be written there, else ``UsageError``; asked before the model runs."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--explain {path}: expected a file name that ends in {', '.join(FORMATS)}")
    if path.is_dir():
        raise UsageError(f"--explain {path}: is a folder; expected a file name")
    if not path.parent.is_dir():
        raise UsageError(f"--explain {path}: the folder {path.parent} does not exist")
    return path


def draw(
    clip: Clip,
    tokens: SuperTokens,
    config: Config,
    answers: Sequence[Answer],
    path: str | Path,
    *,
    source: str = "clip",
) -> Path:
    """Draw the clip, its tokens and ``answers`` into the file ``path`` (its suffix is the format) and return the path.

    Left, from top to bottom: the sampled frames as the model sees them, where on the clip they and the audio segments
    lie, and the segments' spectrograms. Under each picture: its tokens in the colour of the key token they merged into,
    and the attention each received. Masked cells are hatched. Right: the questions, the five likeliest answers, the
    legend. ``source`` names the video.

    The file appears whole or not at all. Raises ``UsageError`` for an unknown suffix or a missing folder.
    """
    path = check_path(path)
    from matplotlib import rc_context

    seen = _frames(clip, tokens, config)
    heard = _sound(clip, tokens, config, max(seen.width, 8.6))
    left, wide = MARGIN + LABELS, max(seen.width, heard.width)
    merged = len(seen.rows) > 1
    sidebar = answers_height(answers, MOST_ANSWERS) + legend_height(merged=merged)
    height = HEADER + max(sidebar, seen.height + heard.height + 1.85)
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a question in another script shows boxes
        page = Page(left + wide + 0.45 + SIDEBAR + MARGIN, height)
        _header(page, seen, heard, source, clip)
        y = _draw_strip(page, seen, left, HEADER)
        y = _timeline(page, left, y, wide, clip, config)
        _draw_strip(page, heard, left, y)
        x, legend = left + wide + 0.45, height - legend_height(merged=merged)
        draw_answers(page, x, HEADER, SIDEBAR, legend, answers)
        masked = not (seen.tokens.encoded.all() and heard.tokens.encoded.all())
        brightest = max(_brightest(seen), _brightest(heard))
        draw_legend(page, x, legend, masked=masked, merged=merged, brightest=brightest)
        for strip in (seen, heard):
            _draw_pictures(page, strip, left, HEADER if strip is seen else y, brightest, config)
        page.save(path)
    return path


def _thin(n: int) -> list[int]:
    return list(range(n)) if n <= MOST_IMAGES else [int((i + 0.5) * n / MOST_IMAGES) for i in range(MOST_IMAGES)]


def _frames(clip: Clip, tokens: SuperTokens, config: Config) -> _Strip:
    from sparsify.data.units import from_units

    vision = config.vision
    cells = [[rect] for rect in frame_cells(vision)]
    index = _thin(len(clip.frames))
    # uint8 [n, 3, H, W]
    pictures = from_units(clip.frames[index], vision.unit, (vision.units, vision.units)).cpu().numpy()
    labels = [f"{float(clip.frame_time[i]):.1f} s" for i in index]
    side = float(np.clip(12.6 / len(index), 1.28, 2.1))
    total = len(clip.frames)
    which = token_map(tokens.visual, total * len(cells))
    return _Strip(
        "frames", np.moveaxis(pictures, 1, -1) / 255.0, index, labels, total, cells, which, (side, side), False
    )


def _sound(clip: Clip, tokens: SuperTokens, config: Config, wide: float) -> _Strip:
    from sparsify.data.units import from_units

    audio = config.audio
    cells = audio_cells(audio)
    index = _thin(len(clip.mel))
    # [n, 1, spec, spec]
    images = from_units(clip.mel[index], audio.unit, (audio.units, audio.units)).float().cpu().numpy()
    pictures = unfold(images[:, 0], audio.mel_bins)  # dB [n, mel, frames]
    low, high = np.percentile(pictures, [2, 99.8])
    pictures = np.clip((pictures - low) / max(high - low, 1e-6), 0, 1)
    size = ((wide + GAP) / len(index) - GAP, 1.2)
    duration, seconds = float(clip.duration), config.clip.segment_seconds
    labels = []
    for start in (float(clip.segment_time[i]) for i in index):
        repeats = "  (repeated to fill the segment)" if duration - start < seconds - 0.05 and size[0] > 4 else ""
        labels.append(f"{start:.1f} to {min(start + seconds, duration):.1f} s{repeats}")
    total = len(clip.mel)
    return _Strip(
        "sound", pictures, index, labels, total, cells, token_map(tokens.audio, total * len(cells)), size, True
    )


def _header(page: Page, seen: _Strip, heard: _Strip, source: str, clip: Clip) -> None:
    name = source if len(source) <= 70 else source[:45] + "…" + source[-24:]
    page.text(MARGIN, 0.25, name, size=15, weight="bold")
    hidden = [1 - strip.tokens.encoded.mean() for strip in (seen, heard)]
    facts = [
        f"{float(clip.duration):.1f} s",
        _counts(seen, "visual"),
        _counts(heard, "audio"),
        f"masked: {hidden[0]:.0%} of the picture, {hidden[1]:.0%} of the sound"
        if any(hidden)
        else "nothing was masked",
    ]
    if not bool(clip.has_audio):
        facts.append("no sound: it heard silence")
    page.text(MARGIN, 0.6, "   ·   ".join(facts), size=10.5, color=FAINT)


def _counts(strip: _Strip, what: str) -> str:
    tokens = strip.tokens
    seen = "" if tokens.encoded.all() else f" → {tokens.encoded.sum()} unmasked"
    return f"{tokens.total} {what} tokens{seen} → {tokens.after}"


def _draw_strip(page: Page, strip: _Strip, left: float, y: float) -> float:
    """The words of one strip, its upper edge at ``y``; returns the y below it."""
    what = "what it saw" if strip.name == "frames" else "what it heard"
    shown = "" if len(strip.images) == strip.total else f"   ({len(strip.images)} of {strip.total} {strip.name} shown)"
    page.text(left, y, what + shown, size=11, weight="bold")
    for row, caption in enumerate(strip.rows):
        middle = y + 0.45 + row * (strip.size[1] + GAP) + strip.size[1] / 2
        page.text(left - 0.5, middle, caption, rotation=90, va="center", ha="center", color=FAINT, size=9)
    for column, label in enumerate(strip.labels):
        page.text(left + column * (strip.size[0] + GAP), y + 0.41, label, va="bottom", size=8.5)
    return y + 0.45 + strip.height + 0.1


def _draw_pictures(page: Page, strip: _Strip, left: float, y: float, brightest: float, config: Config) -> None:
    for row, caption in enumerate(strip.rows):
        for column in range(len(strip.images)):
            x, top = left + column * (strip.size[0] + GAP), y + 0.45 + row * (strip.size[1] + GAP)
            axes = page.axes(x, top, *strip.size)
            _picture(axes, strip, column, caption, brightest)
            if strip.upwards and column == 0:
                _frequency_axis(axes, config)


def _frequency_axis(axes: Axes, config: Config) -> None:
    """Ticks in kHz on a mel axis."""
    low, high = _mel(config.clip.f_min), _mel(config.clip.f_max)
    ticks = [hz for hz in (200, 1000, 5000) if config.clip.f_min < hz < config.clip.f_max]
    where = [(_mel(hz) - low) / (high - low) * config.audio.mel_bins for hz in ticks]
    axes.set_yticks(where, [f"{hz / 1000:g}k" for hz in ticks], fontsize=7.5)
    axes.tick_params(axis="y", length=2, pad=1.5)


def _mel(hz: float) -> float:
    """Slaney's mel scale, as CLAP's filters use it: linear up to 1 kHz, logarithmic above."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * float(np.log(hz / 1000)) / float(np.log(6.4))


def _picture(axes: Axes, strip: _Strip, column: int, caption: str, brightest: float) -> None:
    """One picture with one layer on it: the input with its keys, the clusters, or the attention received."""
    from matplotlib import colormaps

    picture = strip.pictures[column]
    height, width = picture.shape[:2]
    if caption != "input":  # grey, so that the layer's colours speak
        grey = picture.mean(-1) if picture.ndim == 3 else picture
        picture = np.repeat((0.25 + 0.75 * grey)[..., None], 3, axis=-1)
    elif picture.ndim == 2:
        picture = colormaps["magma"](picture)[..., :3]
    extent = (0, width, 0, height) if strip.upwards else (0, width, height, 0)
    axes.imshow(picture, origin="lower" if strip.upwards else "upper", extent=extent, aspect="auto")
    axes.set(xticks=[], yticks=[])
    first = strip.images[column] * len(strip.cells)
    here = slice(first, first + len(strip.cells))
    tokens = strip.tokens
    colours = _colours(tokens.cluster[here])
    if caption == "merged":
        _fill(axes, strip, tokens.cluster[here] >= 0, facecolor=colours, alpha=0.6)
    if caption == "attention" and tokens.score is not None:
        heat = colormaps["inferno"](np.clip(np.nan_to_num(tokens.score[here]) / brightest, 0, 1))
        _fill(axes, strip, tokens.encoded[here], facecolor=heat, alpha=0.72)
    masked = ~tokens.encoded[here]
    _fill(axes, strip, masked, facecolor=_same("#eceef1", masked), alpha=0.84)
    _fill(axes, strip, masked, facecolor=_same("none", masked), edgecolor="#9aa1ab", linewidth=0, hatch="////")
    if caption != "attention":
        _outline_keys(axes, strip, here, colours)
    axes.set(xlim=extent[:2], ylim=extent[2:])


def _same(colour: str, cells: np.ndarray) -> np.ndarray:
    from matplotlib.colors import to_rgba

    return np.tile(to_rgba(colour), (len(cells), 1))


def _fill(axes: Axes, strip: _Strip, chosen: np.ndarray, *, facecolor: np.ndarray, **style: Any) -> None:
    """Paint the chosen cells; ``facecolor`` has a row a cell."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    owner = [int(cell) for cell in np.flatnonzero(chosen) for _ in strip.cells[cell]]
    patches = [Rectangle((x, y), w, h) for cell in np.flatnonzero(chosen) for x, y, w, h in strip.cells[cell]]
    looks: dict[str, Any] = {"edgecolor": "none", "antialiased": False} | style
    axes.add_collection(PatchCollection(patches, facecolor=facecolor[owner], **looks))


def _outline_keys(axes: Axes, strip: _Strip, here: slice, colours: np.ndarray) -> None:
    """Outline the key tokens in their cluster's colour, wider for more attention, with a dark edge to show anywhere."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    tokens = strip.tokens
    if tokens.score is None or not tokens.key[here].any():
        return
    scores = tokens.score[tokens.key]
    finest = 0.75 if len(strip.cells) * len(strip.images) > 300 else 1.0
    height, width = strip.pictures.shape[1:3]
    per_point = (width / strip.size[0] / 72, height / strip.size[1] / 72)  # picture units in a point
    patches, edges, widths = [], [], []
    for cell in np.flatnonzero(tokens.key[here]):
        share = (tokens.score[here][cell] - scores.min()) / max(np.ptp(scores), 1e-9)
        line = (0.9 + 1.9 * share) * finest
        # inside the cell, so that neighbours do not hide each other
        dx, dy = ((line / 2 + 0.8) * scale for scale in per_point)
        for x, y, w, h in strip.cells[cell]:
            patches.append(Rectangle((x + dx, y + dy), w - 2 * dx, h - 2 * dy))
            edges.append(colours[cell])
            widths.append(line)
    under: dict[str, Any] = {"facecolor": "none", "joinstyle": "miter"}
    axes.add_collection(PatchCollection(patches, edgecolor="black", linewidth=np.add(widths, 1.2), **under))
    axes.add_collection(PatchCollection(patches, edgecolor=edges, linewidth=widths, **under))


def _brightest(strip: _Strip) -> float:
    """The attention to show in the brightest colour, in multiples of the mean."""
    return 1.5 if strip.tokens.score is None else float(max(np.nanpercentile(strip.tokens.score, 99), 1.5))


def _colours(cluster: np.ndarray) -> np.ndarray:
    """RGBA [n, 4] of cluster numbers: hues a golden angle apart, so that neighbouring numbers differ most."""
    from matplotlib.colors import hsv_to_rgb

    number = np.maximum(cluster, 0)
    hue = (0.58 + number * 0.61803399) % 1.0
    saturation = np.choose(number % 3, [0.85, 0.6, 0.95])
    value = np.choose(number // 3 % 2, [1.0, 0.82])
    rgb = hsv_to_rgb(np.stack([hue, saturation, value], -1))
    return np.concatenate([rgb, np.ones_like(rgb[..., :1])], -1)


def _timeline(page: Page, left: float, y: float, wide: float, clip: Clip, config: Config) -> float:
    """Where on the clip the frames (marks) and the audio segments (bars) lie; returns the y below."""
    duration = max(float(clip.duration), 1e-3)
    axes = page.axes(left, y + 0.03, wide, 0.22)
    for start in clip.segment_time.tolist():
        length = min(config.clip.segment_seconds, duration - start)
        axes.barh(0.28, length, left=start, height=0.36, color=ACCENT, alpha=0.35, edgecolor="white", linewidth=0.8)
    axes.plot(clip.frame_time.tolist(), [0.76] * len(clip.frame_time), "v", color=INK, markersize=4.5)
    axes.set(xlim=(0, duration), ylim=(0, 1), yticks=[])
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.tick_params(axis="x", length=2, pad=1.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} s")
    return y + 0.62
