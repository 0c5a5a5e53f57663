"""Remedies for each reason."""

import pytest

from pipeline.remedies import MEMORY_OF_WORKERS, remedy


@pytest.mark.parametrize(
    "reason",
    [
        "OutOfMemoryError: memory was short",
        "MemoryError (a.py:3 in f)",
        "its worker process has died without a word, as after signal 9 (SIGKILL)",
        "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
    ],
)
def test_where_memory_may_have_been_short_it_says_what_to_lower(reason: str) -> None:
    assert remedy(reason, MEMORY_OF_WORKERS) == (
        "lower targets.batch_size or targets.workers if memory is short, and run the same job again"
    )


def test_else_it_does_not() -> None:
    said = remedy("RuntimeError: fell over", MEMORY_OF_WORKERS)
    assert said == "remove the cause and run the same job again"
