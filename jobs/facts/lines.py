"""Reads a compressed text file line by line, in blocks, without ever holding an over-long line."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from lzma import LZMAError
from pathlib import PurePosixPath
from typing import BinaryIO

import fsspec
from fsspec.compression import compr

from pipeline.errors import FactDumpError
from pipeline.storage import failures

BLOCK = 1 << 20
LONGEST = 64 << 20
"""Maximum length of a line in bytes; Wikidata's own limit for an entity is far below it."""


@contextmanager
def open_stream(url: str) -> Iterator[BinaryIO]:
    """Open a file anywhere; its ending says how it is compressed (.gz, .bz2, .xz, .zst).

    Raises:
        FactDumpError: there is no library for its compression, or it is damaged.
        StorageError: it cannot be opened.
    """
    ending = PurePosixPath(url).suffix
    if ending == ".zst" and ending[1:] not in compr:
        raise FactDumpError(
            f"{url}: there is no library to decompress it; install zstandard, or compress it with "
            "gzip or bzip2"
        )
    with failures("open", url):
        opened = fsspec.open(url, "rb", compression="infer").open()
    with opened as stream:
        yield stream


def blocks(url: str, stream: BinaryIO) -> Iterator[bytes]:
    """Yield a stream in blocks.

    Raises:
        FactDumpError: the file is damaged or incomplete.
        StorageError: it cannot be read.
    """
    while block := _read(url, stream):
        yield block


def read_lines(url: str, *, longest: int = LONGEST) -> Iterator[bytes | None]:
    r"""Yield the lines of a file without ``\n``; None for a line longer than ``longest`` bytes.

    Raises:
        FactDumpError: the file is damaged or incomplete.
        StorageError: it cannot be read.
    """
    with open_stream(url) as stream:
        rest: list[bytes] = []
        size = 0
        for block in blocks(url, stream):
            first, *others = block.split(b"\n")
            size += len(first)
            if size <= longest:
                rest.append(first)
            else:
                rest.clear()
            if not others:
                continue
            yield b"".join(rest) if size <= longest else None
            *whole, last = others
            # A block is shorter than the longest line.
            yield from whole
            rest, size = [last], len(last)
        if size:
            yield b"".join(rest) if size <= longest else None


def _read(url: str, stream: BinaryIO) -> bytes:
    with failures("read", url):
        block = _block(stream)
    if isinstance(block, bytes):
        return block
    raise FactDumpError(f"{url} is damaged or incomplete ({reason_of(block)}); download it again")


def reason_of(error: Exception) -> str:
    """Return an error's text as a part of a sentence."""
    return " ".join(str(error).split()).rstrip(".")


def _block(stream: BinaryIO) -> bytes | Exception:
    """Return the next block, or what is wrong with the compressed data."""
    try:
        return stream.read(BLOCK)
    except (EOFError, zlib.error, LZMAError) as error:
        return error
    except OSError as error:
        # gzip and bz2 report corrupt data as OSError without a number.
        if error.errno is not None:
            raise
        return error
