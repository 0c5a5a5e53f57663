"""Headers of safetensors files: the library's own bytes out, and nothing doubtful in."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from pmet.safetensors_header import DTYPES, Entry, Header, read_header, written_header

SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name != "__metadata__"
)


def read(content: bytes, *, size: bool = True) -> Header:
    return read_header(lambda count: content[:count], len(content) if size else None)


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@given(NAMES, SHAPES, st.sampled_from(list(DTYPES.values())), st.text(max_size=3))
def test_a_header_has_the_bytes_that_the_library_writes(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, text: str
) -> None:
    text = text.encode("utf-8", "replace").decode()
    whole = save({name: torch.zeros(shape, dtype=dtype)}, metadata={"key": text})
    head = written_header({name: (dtype, shape)}, {"key": text})
    assert whole.startswith(head)
    size = dtype.itemsize * torch.Size(shape).numel()
    assert len(whole) == len(head) + size
    dtype_name = next(known for known, value in DTYPES.items() if value == dtype)
    entry = Entry(dtype_name, shape, len(head), len(head) + size)
    assert read(whole) == Header({name: entry}, {"key": text})


def test_tensors_follow_one_another(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.full((4,), 2.0)}
    header = written_header({n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, {"k": "v"})
    save_file(tensors, tmp_path / "file", metadata={"k": "v"})
    data = b"".join(t.numpy().tobytes() for t in tensors.values())
    assert (tmp_path / "file").read_bytes() == header + data


def test_only_the_header_is_read() -> None:
    content, asked = save({"w": torch.zeros(1000)}), []

    def first(count: int) -> bytes:
        asked.append(count)
        return content[:count]

    found = read_header(first)
    assert max(asked) == found.tensors["w"].start == len(content) - 4000


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> object:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


WRONG = {
    "nothing": (b"", "it is cut short"),
    "no length": (b"1234567", "it is cut short"),
    "a length alone": (struct.pack("<Q", 9), "it is cut short"),
    "too large": (struct.pack("<Q", 2**40), "its header is too large"),
    "no JSON": (file_of(b"{not JSON"), "Expecting property name"),
    "no UTF-8": (file_of(b'{"\xff": 1}'), "can't decode byte"),
    "nested": (file_of(b"[" * 10**6), "nested too deeply"),
    "a list": (file_of([1]), "its header is none"),
    "no entry": (file_of({"w": 1}), "its header is none"),
    "odd metadata": (file_of({"__metadata__": 1}), "__metadata__ in its header is no object"),
    "twice": (file_of(b'{"w": {}, "w": {}}'), "it names w twice"),
    "no dtype": (file_of({"w": {"shape": [], "data_offsets": [0, 4]}}), "w lacks a dtype"),
    "a dtype's number": (file_of({"w": entry(dtype=4)}), "w lacks a dtype"),
    "a broken shape": (file_of({"w": entry(shape=[1.0])}), "w lacks a dtype, a shape"),
    "a negative shape": (file_of({"w": entry(shape=[-1, -1])}), "w lacks a dtype, a shape"),
    "one offset": (file_of({"w": entry(offsets=[4])}), "or data_offsets"),
    "negative offsets": (file_of({"w": entry(offsets=[-4, 0])}), "or data_offsets"),
    "backwards": (file_of({"w": entry("I8", [0], [4, 0])}), "w does not have the bytes"),
    "another shape": (file_of({"w": entry(shape=[9])}, b"1234"), "w does not have the bytes"),
    "cut": (file_of({"w": entry()}, b"123"), "it is cut short"),
    "an unknown type, cut": (file_of({"w": entry("F8_E4M3")}, b"123"), "it is cut short"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_header_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(content)


def test_without_a_size_the_end_is_not_checked() -> None:
    assert read(file_of({"w": entry()}), size=False).tensors["w"].shape == (1,)
