from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparsify.batch import Clip
from sparsify.config import Config
from sparsify.data import cache as cache_module
from sparsify.data.cache import ClipCache
from sparsify.data.media import read_clip
from sparsify.errors import MediaError, SparsifyError


@pytest.fixture
def video(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(plain, tmp_path / "video.mp4"))


def same(a: Clip, b: Clip) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def clips(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def leftovers(folder: Path) -> list[Path]:
    return [f for f in folder.rglob("*") if f.name.startswith(".") or f.suffix == ".tmp"]


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def called(*args: object, **kwargs: object) -> None:
        raise AssertionError("called, though there was nothing to do")

    for name in names:
        monkeypatch.setattr(cache_module, name, called)


def test_a_clip_is_kept(video: Path, tmp_path: Path, tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ClipCache(tmp_path / "a" / "cache", tiny_config)
    assert not cache.has(video)
    first = cache.get(video)
    assert same(first, read_clip(video, tiny_config))
    assert len(clips(cache.folder)) == 1
    assert not leftovers(cache.folder)
    forbid(monkeypatch, "read_clip", "_content_key")  # neither decoded nor read again
    other = ClipCache(cache.folder, tiny_config)
    assert other.has(video)
    assert same(other.get(video), first)
    assert other.get(video) is other.get(video)  # from memory


def test_keyed_by_content(
    video: Path, tmp_path: Path, tiny_config: Config, media: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ClipCache(tmp_path / "cache", tiny_config)
    first = cache.get(video)
    with monkeypatch.context() as patch:
        forbid(patch, "read_clip")
        os.utime(video, (1, 1))
        assert same(cache.get(video), first)  # touched
        copied = shutil.copy(video, tmp_path / "copied.mp4")
        assert same(cache.get(copied), first)
    assert len(clips(cache.folder)) == 1
    changed = bytearray(video.read_bytes())
    place = changed.index(b"mdat") + len(changed) // 2
    changed[place] ^= 1
    video.write_bytes(changed)  # the same size
    assert not cache.has(video)
    cache.get(video)
    assert len(clips(cache.folder)) == 2
    media.write(video, frames=8, fps=8, audio=None)
    assert not cache.get(video).has_audio


@pytest.mark.parametrize(
    "change",
    [
        {"clip.frames": 3},
        {"clip.hop": 400},
        {"clip.f_min": 60.0},
        {"vision.image_size": 128},
        {"vision.unit": 32},
        {"audio.mel_bins": 32},
        {"audio.unit": 32},
    ],
)
def test_keyed_by_what_shapes_a_clip(change: dict[str, Any], video: Path, tmp_path: Path, tiny_config: Config) -> None:
    cache = ClipCache(tmp_path / "cache", tiny_config)
    cache.get(video)
    config = tiny_config.replace(**change)
    other = ClipCache(cache.folder, config)
    assert not other.has(video)
    assert same(other.get(video), read_clip(video, config))
    assert cache.has(video)
    assert len(clips(cache.folder)) == 2


def test_what_does_not_shape_a_clip_shares_it(video: Path, tmp_path: Path, tiny_config: Config) -> None:
    ClipCache(tmp_path, tiny_config).get(video)
    other = tiny_config.replace(**{"train.lr": 1.0, "mask.keep": 0.25, "vision.depths": [1, 2], "dense": True})
    assert ClipCache(tmp_path, other).has(video)


def _damages() -> dict[str, Callable[[Path], object]]:
    def flip(file: Path, place: float) -> None:
        data = bytearray(file.read_bytes())
        data[int(place * (len(data) - 1))] ^= 0xFF
        file.write_bytes(data)

    def cut(file: Path, share: float) -> None:
        os.truncate(file, int(share * file.stat().st_size))

    return {
        "empty": lambda f: cut(f, 0),
        "cut in its header": lambda f: os.truncate(f, 20),
        "cut": lambda f: cut(f, 0.7),
        "longer": lambda f: f.write_bytes(f.read_bytes() + b"x"),
        "a byte of a frame": lambda f: flip(f, 0.5),
        "the last byte": lambda f: flip(f, 1.0),
        "zeros": lambda f: f.write_bytes(f.read_bytes()[:-2000] + bytes(2000)),
        "another file": lambda f: save_file({"frames": torch.zeros(3)}, f),
        "text": lambda f: f.write_text("{}"),
    }


@pytest.mark.parametrize("damage", _damages())
def test_a_damaged_file_is_written_again(damage: str, video: Path, tmp_path: Path, tiny_config: Config) -> None:
    cache = ClipCache(tmp_path / "cache", tiny_config)
    cache.get(video)
    (file,) = clips(cache.folder)
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(whole)
    _damages()[damage](file)
    assert file.read_bytes() != whole
    assert same(ClipCache(cache.folder, tiny_config).get(video), read_clip(video, tiny_config))
    assert file.read_bytes() == whole


@pytest.mark.parametrize("text", ["", "00", "g" * 40, "0" * 40, "é"])
def test_a_damaged_note_is_written_again(
    text: str, video: Path, tmp_path: Path, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ClipCache(tmp_path / "cache", tiny_config)
    first = cache.get(video)
    (note,) = [f for f in (cache.folder / "seen").rglob("*") if f.is_file()]
    whole = note.read_text()
    note.write_text(text)
    forbid(monkeypatch, "read_clip")
    assert same(ClipCache(cache.folder, tiny_config).get(video), first)
    assert note.read_text() == whole


def test_a_broken_video_is_not_kept(tmp_path: Path, tiny_config: Config) -> None:
    cache = ClipCache(tmp_path / "cache", tiny_config)
    (text := tmp_path / "text.mp4").write_text("no video")
    for path, reason in ((text, "not a readable video"), (tmp_path / "missing.mp4", "No such file")):
        with pytest.raises(MediaError, match=f"{path.name}: .*{reason}"):
            cache.get(path)
    assert not clips(cache.folder)


@pytest.mark.parametrize(("code", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "Permission denied")])
@pytest.mark.parametrize("step", ["write", "replace"])
def test_a_cache_that_cannot_be_written(
    step: str, code: int, said: str, video: Path, tmp_path: Path, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ClipCache(tmp_path / "cache", tiny_config)

    def half_written(path: Path, data: bytes) -> int:
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(code, os.strerror(code))

    def not_moved(source: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(Path, "write_bytes", half_written)
        else:
            patch.setattr(os, "replace", not_moved)
        with pytest.raises(SparsifyError, match=f"{cache.folder}: cannot write the clip cache: {said}") as caught:
            cache.get(video)
    assert not isinstance(caught.value, MediaError)  # the video is fine: it must not be skipped
    assert not [f for f in cache.folder.rglob("*") if f.is_file()]
    assert same(cache.get(video), read_clip(video, tiny_config))


def test_a_folder_that_cannot_be_made(tmp_path: Path, tiny_config: Config) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SparsifyError, match="file/cache: cannot write the clip cache: Not a directory"):
        ClipCache(tmp_path / "file" / "cache", tiny_config)


def test_it_travels_light(video: Path, tmp_path: Path, tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ClipCache(tmp_path / "cache", tiny_config)
    first = cache.get(video)
    sent = pickle.dumps(cache)
    assert len(sent) < 5000
    forbid(monkeypatch, "read_clip")
    assert same(pickle.loads(sent).get(video), first)


def test_reading_maps_the_file(video: Path, tmp_path: Path, tiny_config: Config) -> None:
    clip = ClipCache(tmp_path / "cache", tiny_config).get(video)
    (file,) = clips(tmp_path / "cache")
    begin = clip.frames.data_ptr()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        ranges = [line.split("-", 1) for line in maps if str(file) in line]
    spans = [(int(low, 16), int(rest.split(" ", 1)[0], 16)) for low, rest in ranges]
    assert any(low <= begin < high for low, high in spans)


def _hammer(folder: Path, config: Config, videos: list[Path], expected: list[Clip], rounds: int) -> None:
    torch.set_num_threads(1)
    for n in range(rounds):
        for path, clip in zip(videos, expected, strict=True):
            assert same(ClipCache(folder, config).get(path, threads=1), clip)
        if n % 2:  # a clip that is deleted or cut while others read it
            for file in clips(folder)[: n % 3]:
                file.unlink(missing_ok=True)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_many_processes_share_a_folder(tmp_path: Path, tiny_config: Config, media: Any) -> None:
    videos = [media.write(tmp_path / f"{n}.mp4", frames=8 + n, size=(64, 64), audio_seconds=0.5) for n in range(3)]
    expected = [read_clip(path, tiny_config, threads=1) for path in videos]
    folder = tmp_path / "cache"
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_hammer, args=(folder, tiny_config, videos, expected, 6), daemon=True) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert not leftovers(folder)


def test_many_threads_share_one_cache(tmp_path: Path, tiny_config: Config, media: Any) -> None:
    videos = [media.write(tmp_path / f"{n}.mp4", frames=8 + n, size=(64, 64), audio=None) for n in range(3)]
    expected = [read_clip(path, tiny_config) for path in videos]
    cache = ClipCache(tmp_path / "cache", tiny_config)
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(cache.get, videos * 8))
    assert all(same(clip, expected[n % 3]) for n, clip in enumerate(got))
    assert len(clips(cache.folder)) == 3
