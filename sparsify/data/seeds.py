"""Seeds of the masks: hashed from what is masked, so that batch, rank, worker and resume do not matter."""

from __future__ import annotations

import hashlib

__all__ = ["mask_seed"]

_MAX = 2**63 - 1


def mask_seed(run_seed: int, epoch: int, video_id: str, modality: str, index: int) -> int:
    """The seed of one frame's or one audio segment's mask in one epoch.

    ``blake2b-64("run_seed epoch modality index video_id") mod 2^63``, the text in UTF-8 with single spaces, the digest
    read little-endian. This layout is fixed: a saved run goes on with the same masks. (The id comes last because it
    alone may hold spaces.)

    Args:
        run_seed: seed of the run.
        epoch: 0-based epoch.
        video_id: name of the video.
        modality: ``"visual"`` or ``"audio"``.
        index: frame or segment of the clip.

    Returns:
        An int in [0, 2^63), as ``sparsify_kernels.random_mask`` takes it.

    Raises:
        ValueError: the modality is neither of the two.
    """
    if modality not in ("visual", "audio"):
        raise ValueError(f"mask_seed: modality must be 'visual' or 'audio', got {modality!r}")
    text = f"{run_seed} {epoch} {modality} {index} {video_id}"
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") & _MAX
