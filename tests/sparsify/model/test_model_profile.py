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
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
NEEDS_CPP = pytest.mark.skipif(
    not (_registry.has_cpp("random_mask") or _registry.REFERENCE_ONLY), reason="the C++ extension is not built"
)
# Inductor says so of a kernel that reads mels, which are stored in fp16.
pytestmark = pytest.mark.filterwarnings("ignore:bf16 and fp16 are mixed in the scheduler node:UserWarning")

Make = Callable[..., Any]

FRAMES, SEGMENTS = 5, 3  # each modality another number of tokens: a matrix of both is like no other tensor
VISUAL, AUDIO = FRAMES * 8, SEGMENTS * 8  # tokens of a sample that are scored: half of 4 x 4 an image


def training_step(model: SparsifyModel, batch: tuple[Video, Questions, Masking], backend: str | None) -> Any:
    """The profile of one step in bf16 with masks, merging and an optimiser; compiled by ``backend``, or not."""
    optimiser = torch.optim.AdamW(model.parameters())
    video, questions, masking = batch
    target = torch.zeros(len(questions.video_index), dtype=torch.int64)
    answer = model if backend is None else torch.compile(model, fullgraph=True, backend=backend)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(answer(video, questions, masking=masking).float(), target)
        loss.backward()
        optimiser.step()
        assert loss.isfinite()

    if backend is not None:
        step()  # compiles
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as result:
        step()
    return result


@pytest.fixture(scope="module", params=[None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)], ids=str)
def profiled(request: pytest.FixtureRequest, make_model: Make, make_batch: Make, tiny: Callable[..., Config]) -> Any:
    config = tiny(
        clip__frames=FRAMES, clip__segments=SEGMENTS, merge__enabled=True, merge__fence=0.0, merge__capacity=None
    )
    return training_step(make_model(config).train(), make_batch(config), request.param)


@pytest.fixture(scope="module")
def calls(profiled: Any) -> list[Traced]:
    return traced(profiled)


@NEEDS_CPP
def test_a_training_step_is_made_of_our_ops(calls: list[Traced], tiny: Callable[..., Config]) -> None:
    """Each modality is masked, scored and merged once, each block attends in its windows; choices have no backward."""
    count = Counter(call.kernel for call in calls)
    for op in ("attention_scores", "key_tokens", "merge_tokens"):
        assert count[op] == 2, count
    assert count["random_mask"] == 2, count
    blocks = sum(sum(config.depths) for config in (tiny().vision, tiny().audio))
    assert count["window_attention"] == count["window_attention_backward"] == blocks, count
    assert count["attention_scores_backward"] == count["merge_tokens_backward"] == 2, count


@NEEDS_CPP
def test_kernels_served_every_op_of_a_training_step(calls: list[Traced]) -> None:
    fallbacks = sorted({call.kernel for call in calls if not call.fused})
    assert not fallbacks, f"served by the reference: {', '.join(fallbacks)}"


@NEEDS_CPP
def test_no_operation_of_a_step_reads_a_matrix_of_visual_and_audio_tokens(profiled: Any) -> None:
    """Those of the reference do: on it this test turns red."""
    pairs = ([VISUAL, AUDIO], [AUDIO, VISUAL])
    assert [e.name for e in profiled.events() for s in e.input_shapes or [] if list(s[-2:]) in pairs] == []


@NEEDS_CPP
@pytest.mark.skipif(_registry.REFERENCE_ONLY, reason="this is the run that has to fail")
def test_a_step_on_the_reference_turns_this_red() -> None:
    done = subprocess.run(
        [*PYTEST, str(Path(__file__)), "-k", "None and (served_every_op or no_operation)"],
        env=os.environ | {"SPARSIFY_BACKEND": "reference"},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 1, done.stdout
    assert "served by the reference: attention_scores, attention_scores_backward, key_tokens" in done.stdout
    assert "2 failed" in done.stdout
