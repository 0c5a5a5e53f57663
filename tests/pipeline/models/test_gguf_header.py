"""Headers of GGUF files: read as the package gguf reads them, and damaged ones in no time."""

from __future__ import annotations

import struct
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models.gguf_header import DamagedError, read_gguf_header
from tests.gguf_models import gguf, write_gguf

pytestmark = pytest.mark.skipif(find_spec("gguf") is None, reason="needs gguf")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path, kind="Q4_1")
    return path


def test_tensors_and_values_are_those_that_gguf_reads(file: Path) -> None:
    header, expected = read_gguf_header(file), gguf().GGUFReader(file)
    assert [(t.name, t.shape, t.type, t.start) for t in header.tensors] == [
        (t.name, tuple(map(int, reversed(t.shape))), int(t.tensor_type), t.data_offset)
        for t in expected.tensors
    ]
    for key, field in expected.fields.items():
        if key.startswith("GGUF."):
            continue
        value = field.contents()
        assert header.metadata[key] == (len(value) if isinstance(value, list) else value), key


@settings(max_examples=200, deadline=1000)
@given(st.data())
def test_a_damaged_header_is_refused_or_read_but_never_hangs(
    file: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(file.read_bytes()[:20_000])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, len(content) - 9))
        content[at : at + 8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
    damaged = tmp_path_factory.getbasetemp() / "damaged.gguf"
    damaged.write_bytes(content)
    with suppress(DamagedError):
        read_gguf_header(damaged)


@pytest.mark.parametrize("kind", [4, 9])
def test_an_array_longer_than_the_file_is_refused(tmp_path: Path, kind: int) -> None:
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, kind, 2**60)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + bytes(100))
    with pytest.raises(DamagedError, match="goes on past the end"):
        read_gguf_header(tmp_path / "a.gguf")


def test_arrays_within_arrays_end(tmp_path: Path) -> None:
    nested = struct.pack("<IQ", 9, 1) * 10_000
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9) + nested
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key)
    with pytest.raises(DamagedError, match="nests arrays too deeply"):
        read_gguf_header(tmp_path / "a.gguf")


def test_an_old_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(DamagedError, match="it has version 1, not 2 or 3"):
        read_gguf_header(tmp_path / "a.gguf")
