"""Advice follows from the kind of a failure, and the kind from the error."""

import pytest

from pipeline.cluster.process import cause_here
from pipeline.errors import StorageError
from pipeline.failures import MEMORY_OF_WORKERS, FailureKind, remedy
from pmet.errors import OutOfMemoryError


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OutOfMemoryError("memory was short"), FailureKind.MEMORY),
        (MemoryError(), FailureKind.MEMORY),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"),
            FailureKind.MEMORY,
        ),
        (StorageError("cannot write x (no room)"), FailureKind.STORAGE),
        (ValueError("StorageError: MemoryError"), FailureKind.OTHER),
        (RuntimeError("fell over"), FailureKind.OTHER),
    ],
)
def test_the_kind_follows_from_the_error_not_from_its_words(
    error: Exception, kind: FailureKind
) -> None:
    assert cause_here(error).kind is kind


def test_where_memory_may_have_been_short_the_advice_says_what_to_lower() -> None:
    assert remedy([FailureKind.OTHER, FailureKind.MEMORY], MEMORY_OF_WORKERS) == (
        "lower targets.batch_size or targets.workers if memory is short, and run the same job again"
    )


def test_otherwise_the_advice_does_not_speak_of_memory() -> None:
    said = remedy([FailureKind.OTHER, FailureKind.STORAGE], MEMORY_OF_WORKERS)
    assert said == "remove the cause and run the same job again"
