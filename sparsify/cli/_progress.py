"""A bar for work that tells ``(done, total)`` only once it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from sparsify.progress import Advance, progress_bar

__all__ = ["counting_bar"]


@contextlib.contextmanager
def counting_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """``with counting_bar("render") as progress: ...; progress(done, total)``: the bar appears with the first call."""
    with contextlib.ExitStack() as stack:
        advance: Advance | None = None
        before = 0

        def progress(done: int, total: int) -> None:
            nonlocal advance, before
            if advance is None:
                advance = stack.enter_context(progress_bar(description, total))
            advance(done - before)
            before = done

        yield progress
