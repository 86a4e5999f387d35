"""One training step of the whole model, profiled: the ops that it is made of, and that kernels served them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from sparsify.batch import Masking, Questions, Video
from sparsify.config import Config
from sparsify.model import SparsifyModel
from sparsify_kernels import _registry
from sparsify_kernels.testing import Traced, traced

ROOT = Path(__file__).resolve().parents[3]
NEEDS_CPP = pytest.mark.skipif(
    not (_registry.has_cpp("random_mask") or _registry.REFERENCE_ONLY), reason="the C++ extension is not built"
)

Make = Callable[..., Any]


def training_step(model: SparsifyModel, batch: tuple[Video, Questions, Masking]) -> Any:
    """The profile of one step in bf16 with masks, merging and an optimiser."""
    optimiser = torch.optim.AdamW(model.parameters())
    video, questions, masking = batch
    target = torch.zeros(len(questions.video_index), dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as result:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(video, questions, masking=masking).float(), target)
        loss.backward()
        optimiser.step()
    assert loss.isfinite()
    return result


@pytest.fixture(scope="module")
def calls(make_model: Make, make_batch: Make, tiny: Callable[..., Config]) -> list[Traced]:
    config = tiny(merge__enabled=True, merge__fence=0.0, merge__capacity=None)
    model = make_model(config).train()
    return traced(training_step(model, make_batch(config)))


@NEEDS_CPP
def test_a_training_step_is_made_of_our_ops(calls: list[Traced]) -> None:
    """Each modality is masked, scored and merged once; the frozen choices have no backward."""
    count = Counter(call.kernel for call in calls)
    for op in ("attention_scores", "key_tokens", "merge_tokens"):
        assert count[op] == 2, count
    assert count["random_mask"] >= 2, count
    assert count["attention_scores_backward"] == count["merge_tokens_backward"] == 2, count


@NEEDS_CPP
def test_kernels_served_every_op_of_a_training_step(calls: list[Traced]) -> None:
    fallbacks = sorted({call.kernel for call in calls if not call.fused})
    assert not fallbacks, f"served by the reference: {', '.join(fallbacks)}"


@NEEDS_CPP
@pytest.mark.skipif(_registry.REFERENCE_ONLY, reason="this is the run that has to fail")
def test_a_step_on_the_reference_turns_this_red() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__)), "-k", "served_every_op"],
        env=os.environ | {"SPARSIFY_BACKEND": "reference"},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 1, done.stdout
    assert "served by the reference: attention_scores, attention_scores_backward, key_tokens" in done.stdout
