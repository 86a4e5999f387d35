"""Write one clip as an mp4 file:

H.264 (yuv420p) pictures, AAC sound. The same scene gives the same pictures and sound on any number of workers.
"""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import numpy as np

from sparsify.synth.picture import paint_frames
from sparsify.synth.scene import Scene
from sparsify.synth.sound import SAMPLE_RATE, render_sound

__all__ = ["render_clip"]

# One thread: the encoder's output then does not depend on the machine's cores.
_VIDEO = {"preset": "ultrafast", "tune": "zerolatency", "crf": "18", "x264-params": "scenecut=0:log-level=error"}
_AUDIO = {"aac_coder": "fast", "aac_pns": "0"}
_BIT_RATE = 128_000  # of the sound, bits a second


def render_clip(scene: Scene, path: Path, fps: int) -> None:
    """Render ``scene`` to ``path``, which appears whole or not at all."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part")
    try:
        _encode(scene, temporary, fps)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _encode(scene: Scene, path: Path, fps: int) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=fps, options=_VIDEO)
        video.width = video.height = scene.size
        video.pix_fmt = "yuv420p"
        video.thread_count = 1
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono", options=_AUDIO)
        audio.bit_rate = _BIT_RATE
        for i, picture in enumerate(paint_frames(scene, fps)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        wave = av.AudioFrame.from_ndarray(np.ascontiguousarray(render_sound(scene)[None]), format="fltp", layout="mono")
        wave.sample_rate, wave.pts, wave.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
        container.mux(audio.encode(wave))
        container.mux(audio.encode(None))
