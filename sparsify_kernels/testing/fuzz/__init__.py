"""Random cases for the kernels of one backend, each against the reference: ``python -m sparsify_kernels.testing.fuzz
--help``.

A case is a handful of plain values, and the tensors follow from them. So a failure is one line that runs it again, and
Hypothesis, which draws the cases, makes it simple first. Indices, masks, bytes, and assignments by exact metrics must
be equal; sums may err as ``assert_accurate`` allows: twice what the reference errs. Needs Hypothesis, which
``sparsify-avqa[test]`` brings.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from sparsify_kernels import _registry
from sparsify_kernels.testing.fuzz import attention_scores, key_tokens, merge_tokens, random_mask, window_attention
from sparsify_kernels.testing.fuzz.parts import Kernels, check

__all__ = ["CASES", "again", "fuzz"]

CASES: dict[str, Any] = {
    "random_mask": random_mask.Case,
    "attention_scores": attention_scores.Case,
    "key_tokens": key_tokens.Case,
    "merge_tokens": merge_tokens.Case,
    "window_attention": window_attention.Case,
}


def fuzz(op: str, cases: int, *, backend: str = "cpp", start: int | None = None) -> None:
    """Check ``cases`` cases of ``op``: always the same ones, or those that follow from the seed ``start``.

    Raises ``AssertionError`` for the simplest case found that fails, with the line that runs it again;
    ``LookupError`` where ``backend`` does not serve ``op``.
    """
    found = _registry.implementations(op)
    if backend not in found:
        raise LookupError(f"fuzz: {op} has no backend {backend} here, only {', '.join(found)}")
    kernels = Kernels(backend)
    failed: list[Any] = []

    def check_one(case: Any) -> None:
        try:
            check(case, kernels)
        except Exception:
            failed.append(case)
            raise

    run = settings(
        max_examples=cases,
        derandomize=start is None,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )(given(CASES[op].strategy())(check_one))
    try:
        (run if start is None else seed(start)(run))()
    except Exception as error:
        if not failed:
            raise
        case = json.dumps({"op": op, **dataclasses.asdict(failed[-1])})
        line = f"python -m sparsify_kernels.testing.fuzz --backend {backend} --case '{case}'"
        raise AssertionError(f"{op}: {error}\nreproduce: {line}") from error


def again(text: str, *, backend: str = "cpp") -> None:
    """Check the one case that ``fuzz`` wrote as ``text``."""
    values = json.loads(text)
    case = CASES[values.pop("op")]
    check(case(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}), Kernels(backend))
