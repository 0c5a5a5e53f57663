"""Values of options."""

from __future__ import annotations

import pytest

from jobs.arguments import whole_or_auto
from pipeline.errors import JobError


def test_a_whole_number_or_auto() -> None:
    assert whole_or_auto("--workers", "auto") is None
    assert whole_or_auto("--workers", "0") == 0
    assert whole_or_auto("--tokens", "12", least=1) == 12


@pytest.mark.parametrize("text", ["", "-1", "1.5", "many", "9" * 5000])
def test_anything_else_is_named(text: str) -> None:
    with pytest.raises(JobError, match=r"^--workers: .* is neither auto nor a whole number$"):
        whole_or_auto("--workers", text)


def test_limits_are_kept() -> None:
    with pytest.raises(JobError, match=r"--tokens: '0' is neither auto nor a whole number above 0"):
        whole_or_auto("--tokens", "0", least=1)
    with pytest.raises(JobError, match="'1000'"):
        whole_or_auto("--answers", "1000", digits=3)
