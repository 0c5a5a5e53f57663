"""Lines of compressed files."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.facts import lines
from jobs.facts.lines import read_lines
from pipeline.errors import FactDumpError, StorageError


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.lists(st.binary(max_size=9).map(lambda b: b.replace(b"\n", b"")), max_size=9))
def test_lines_do_not_depend_on_blocks(tmp_path: Path, data: list[bytes]) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"".join(line + b"\n" for line in data)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK", 4)
        found = list(read_lines(str(path), longest=6))
    assert found == [line if len(line) <= 6 else None for line in data]


def test_compression_follows_the_name(tmp_path: Path) -> None:
    (tmp_path / "x.bz2").write_bytes(bz2.compress(b"a\n") + bz2.compress(b"b"))
    assert list(read_lines(f"file://{tmp_path}/x.bz2")) == [b"a", b"b"]
    (tmp_path / "y.gz").write_bytes(b"not compressed")
    with pytest.raises(FactDumpError, match=r"y.gz is damaged or incomplete \(.*\); download it"):
        list(read_lines(str(tmp_path / "y.gz")))
    with pytest.raises(StorageError, match=r"cannot open .*z.gz"):
        list(read_lines(str(tmp_path / "z.gz")))


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "compr", {})
    (tmp_path / "x.zst").write_bytes(b"")
    with pytest.raises(FactDumpError, match=r"no library to decompress it; install zstandard"):
        list(read_lines(str(tmp_path / "x.zst")))
