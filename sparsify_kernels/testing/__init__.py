"""For whoever writes a kernel: shapes, inputs, oracles and assertions, the same that test the kernels of this package.

A new kernel ``mine`` with the signature of a public function is tested by swapping it in::

    from sparsify_kernels import testing

    for shape in testing.ATTENTION_SHAPES:
        inputs = testing.attention_inputs(shape, torch.bfloat16, valid=True, poison=True)
        with testing.poisoned_memory():
            ours = mine(**inputs)
        testing.assert_accurate(
            ours.received,
            eager=testing.attention_scores_eager(**inputs).received,
            truth=testing.attention_scores_oracle(**inputs).received,
        )

- *Oracles* (``*_oracle``) are plain Python loops over fp64 numbers, independent of everything else here; slow, for
  small shapes.
- *Eager* (``*_eager``) is what one writes with ordinary PyTorch operations at the dtype of the inputs: the baseline
  whose error ours may exceed by a factor of two, and with fp64 inputs the truth for gradients.
- ``assert_accurate`` is that tolerance; no test sets one by hand.
"""

from sparsify_kernels.testing.asserts import (
    assert_accurate,
    assert_alone,
    assert_assignment,
    assert_compiles,
    assert_same,
    compiled_anew,
)
from sparsify_kernels.testing.eager import attention_scores_eager, merge_tokens_eager, window_attention_eager
from sparsify_kernels.testing.inputs import (
    LAYOUTS,
    SCORE_KINDS,
    attention_inputs,
    merge_inputs,
    merge_keys,
    relayout,
    score_inputs,
    window_inputs,
)
from sparsify_kernels.testing.memory import (
    Guarded,
    at_the_edge,
    guarded,
    guarded_memory,
    peak_memory,
    peak_of_tensors,
    poisoned_memory,
)
from sparsify_kernels.testing.oracles import (
    attention_scores_oracle,
    gather_tokens_oracle,
    key_tokens_oracle,
    merge_tokens_oracle,
    window_attention_oracle,
)
from sparsify_kernels.testing.shapes import (
    ATTENTION_SHAPES,
    KEY_SHAPES,
    MERGE_SHAPES,
    WINDOW_SHAPES,
    AttentionShape,
    KeyShape,
    MergeShape,
    WindowShape,
)
from sparsify_kernels.testing.traces import MEMORY_OPS, RecordedOps, Traced, traced

__all__ = [
    "ATTENTION_SHAPES",
    "KEY_SHAPES",
    "LAYOUTS",
    "MEMORY_OPS",
    "MERGE_SHAPES",
    "SCORE_KINDS",
    "WINDOW_SHAPES",
    "AttentionShape",
    "Guarded",
    "KeyShape",
    "MergeShape",
    "RecordedOps",
    "Traced",
    "WindowShape",
    "assert_accurate",
    "assert_alone",
    "assert_assignment",
    "assert_compiles",
    "assert_same",
    "at_the_edge",
    "attention_inputs",
    "attention_scores_eager",
    "attention_scores_oracle",
    "compiled_anew",
    "gather_tokens_oracle",
    "guarded",
    "guarded_memory",
    "key_tokens_oracle",
    "merge_inputs",
    "merge_keys",
    "merge_tokens_eager",
    "merge_tokens_oracle",
    "peak_memory",
    "peak_of_tensors",
    "poisoned_memory",
    "relayout",
    "score_inputs",
    "traced",
    "window_attention_eager",
    "window_attention_oracle",
    "window_inputs",
]
