"""Files in a folder anywhere that fsspec reaches, each written completely or not at all.

On the local disk a file is written under a temporary name in the same folder, flushed to disk and
renamed. On an object store it is put in one operation, which either completes or leaves the
previous file. Large files are spooled to a local temporary file first, so that an exception
half-way uploads nothing. If the storage is unreachable, operations are retried for a while
(`pipeline.storage.retries`).
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, BinaryIO, TypeVar
from uuid import uuid4

import fsspec
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipeline.errors import RequestTableError, StorageError
from pipeline.storage import json_text
from pipeline.storage.retries import is_transient, patiently

Result = TypeVar("Result")

CHUNK_BYTES = 4 * 2**20
TEMPORARY_SUFFIX = ".tmp"
# fsspec's memory file system checks whether a file exists, and then writes it.
_MEMORY = Lock()
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Error codes with which object stores report that a file exists, or is being created by another.
_TAKEN = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "412"})


class Store:
    """A folder, local or remote; names inside it are relative, with ``/`` between their parts.

    A store can be pickled and sent to another process. If the storage fails, every method raises
    ``StorageError``, naming the file and the remedy.
    """

    def __init__(self, url: str | Path) -> None:
        """Open the folder ``url``; it need not exist, the first write creates it."""
        self.fs, root = opened(str(url))
        self.root = root.rstrip("/") or root
        self.is_local = is_local(self.fs)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    @property
    def url(self) -> str:
        """The folder itself: an absolute path on the local disk, else a URL."""
        return _url(self.fs, self.root)

    def join(self, *parts: str) -> str:
        """The full path or URL of a name in this folder."""
        return _url(self.fs, self._path("/".join(parts)))

    def local_path(self, name: str = "") -> Path | None:
        """The path of a name on the local disk; None if the store is remote."""
        if not self.is_local:
            return None
        return Path(self._path(name) if name else self.root)

    def exists(self, name: str) -> bool:
        """Whether there is a file or a folder of this name."""
        return bool(attempt("look for", self.join(name), self._fresh, "exists", self._path(name)))

    def glob(self, pattern: str) -> list[str]:
        """Names of matching files directly in this folder, sorted; for example ``*.npz``."""
        where = self.join(pattern)
        found: list[str] = attempt("list", where, self._glob, self._path(pattern))
        return sorted(PurePosixPath(path).name for path in found)

    def entries(self) -> list[str]:
        """Names of files and folders directly in this folder, sorted; none if it does not exist."""

        def names() -> list[str]:
            try:
                return [*self._fresh("ls", self.root, detail=False)]
            except (FileNotFoundError, NotADirectoryError):
                return []

        found = attempt("list", self.url, names)
        return sorted({PurePosixPath(path).name for path in found if path.rstrip("/") != self.root})

    def _glob(self, path: str) -> list[str]:
        if not self.is_local:
            return list(self._fresh("glob", path))
        # The library treats an unreadable folder as empty.
        folder, _, pattern = path.rpartition("/")
        try:
            return [os.path.join(folder, n) for n in os.listdir(folder) if fnmatchcase(n, pattern)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def list(self, prefix: str = "", *, unfinished: bool = False) -> list[str]:
        """Names of all files whose name starts with the folder ``prefix``, sorted.

        Files being written, or left by a writer that died, are excluded unless ``unfinished`` is
        set.
        """
        folder = self._path(prefix) if prefix else self.root
        self.fs.invalidate_cache()
        found = attempt("list", _url(self.fs, folder), _files_below, self.fs, folder)
        names = (path.removeprefix(self.root).lstrip("/") for path in found)
        return sorted(n for n in names if unfinished or not n.endswith(TEMPORARY_SUFFIX))

    def is_file(self) -> bool:
        """Whether there is a file in place of this folder."""
        return attempt("look for", self.url, self._fresh, "isfile", self.root) is True

    def is_link(self, name: str) -> bool:
        """Whether a name on the local disk is a symbolic link."""
        path = self.local_path(name)
        return path is not None and path.is_symlink()

    @contextmanager
    def read_stream(self, name: str) -> Iterator[BinaryIO]:
        """A seekable file to read from; only the parts that are read are fetched."""
        with attempt("read", self.join(name), self.fs.open, self._path(name), "rb") as stream:
            yield stream

    def read_bytes(self, name: str) -> bytes:
        """The content of a file."""
        return bytes(attempt("read", self.join(name), self.fs.cat_file, self._path(name)))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file completely or not at all, replacing an existing one."""
        if self.is_local:
            with self.write_stream(name) as stream:
                stream.write(data)
        else:
            attempt("write", self.join(name), self.fs.pipe_file, self._path(name), data)

    def create_bytes(self, name: str, data: bytes) -> bool:
        """Write a file if the name is free; return whether it was written.

        If several try at once, only one succeeds, provided that ``creates_exclusively``.
        """
        return attempt("write", self.join(name), self._create, self._path(name), data)

    def _create(self, path: str, data: bytes) -> bool:
        try:
            if self.is_local:
                _link_into_place(Path(path), data)
            else:
                with _MEMORY if _protocol(self.fs) == "memory" else nullcontext():
                    self.fs.pipe_file(path, data, mode="create")
        except OSError as error:
            if isinstance(error, FileExistsError) or _error_code(error) in _TAKEN:
                return False
            raise
        return True

    @property
    def creates_exclusively(self) -> bool:
        """Whether the storage itself prevents two writers from creating a file, per its library.

        Other fsspec libraries at best check first and then write. A service may still ignore what
        its library requests, so test it.
        """
        if self.is_local or _protocol(self.fs) == "memory":
            return True
        kind = type(self.fs)
        write = kind._pipe_file if kind.async_impl else kind.pipe_file
        known = "mode" in inspect.signature(write).parameters
        return known and write is not fsspec.AbstractFileSystem.pipe_file

    def modified(self, name: str) -> datetime | None:
        """When a file was written, by the storage's clock; None if it does not report this."""

        def look() -> datetime | None:
            try:
                when: datetime = self._fresh("modified", self._path(name))
            except NotImplementedError:
                return None
            return when

        return attempt("look for", self.join(name), look)

    def read_json(self, name: str) -> Any:
        """The value that a JSON file holds."""
        try:
            return json_text.loads(self.read_bytes(name))
        except ValueError as error:
            raise StorageError(
                f"{self.join(name)} is not JSON ({error}); it is damaged, delete it and run again"
            ) from None

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON: UTF-8, indented, keys in the order given; see `json_text`."""
        self.write_bytes(name, json_bytes(value))

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a Parquet file, or the named columns of it."""
        return read_parquet(self.join(name), columns)

    def dataset(self, names: Sequence[str]) -> ds.Dataset:
        """Open Parquet files as one, with pyarrow's filters; their checksums are verified."""
        options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        kind = ds.ParquetFileFormat(default_fragment_scan_options=options)
        paths = [self._path(name) for name in names]
        with failures("read", self.url):
            return ds.dataset(paths, format=kind, filesystem=self.fs)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a Parquet file, compressed with zstd."""
        with failures("write", self.join(name)), self.write_stream(name) as stream:
            pq.write_table(table, stream, compression="zstd")

    @contextmanager
    def write_stream(self, name: str) -> Iterator[BinaryIO]:
        """A seekable file to write to; it gets its name when the block ends without an error.

        An exception in the block leaves any previous file of this name. For a remote store, the
        local temporary folder needs space for the file.
        """
        if self.is_local:
            with self._renamed_into_place(Path(self._path(name))) as stream:
                yield stream
        else:
            with self._uploaded(name) as stream:
                yield stream

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A local path to read a file from, for libraries that need one; a copy if it is remote."""
        local = self.local_path(name)
        if local is not None:
            yield local
            return
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / PurePosixPath(name).name
            attempt("read", self.join(name), fetch, self.fs, self._path(name), copy)
            yield copy

    @contextmanager
    def local_target(self, name: str) -> Iterator[Path]:
        """A local path to write to; it appears as ``name`` if the block ends without an error."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / PurePosixPath(name).name
            with _room(str(path)):
                yield path
            with path.open("rb") as source, self.write_stream(name) as target:
                shutil.copyfileobj(source, target, CHUNK_BYTES)

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with its contents; do nothing if the name does not exist."""

        def delete() -> None:
            if self._fresh("exists", self._path(name)):
                self.fs.rm(self._path(name), recursive=True)

        attempt("delete", self.join(name), delete)

    def delete_files(self, names: Iterable[str]) -> None:
        """Delete files, and on the local disk the folders inside this one that become empty."""
        folders = set()
        for name in names:
            self.delete(name)
            folders |= {str(parent) for parent in PurePosixPath(name).parents}
        if self.is_local:
            for folder in sorted(folders - {"."}, key=len, reverse=True):
                # Folders that still hold something stay.
                with suppress(OSError):
                    Path(self._path(folder)).rmdir()

    def size(self, name: str) -> int:
        """The size of a file in bytes."""
        return int(attempt("look for", self.join(name), self._fresh, "size", self._path(name)))

    def sha256(self, name: str) -> str:
        """The SHA-256 of a file's bytes, in hexadecimal."""

        def read() -> str:
            digest = hashlib.sha256()
            with self.fs.open(self._path(name), "rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
            return digest.hexdigest()

        return attempt("read", self.join(name), read)

    def _fresh(self, method: str, path: str, **options: Any) -> Any:
        """Query the file system's current state, not its cache."""
        self.fs.invalidate_cache()
        return getattr(self.fs, method)(path, **options)

    def _path(self, name: str) -> str:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts:
            raise StorageError(
                f"{name!r} is not a name inside {self.url}; give a relative path without '..'"
            )
        return "/".join((self.root.rstrip("/"), *parts))

    @contextmanager
    def _renamed_into_place(self, path: Path) -> Iterator[BinaryIO]:
        with failures("write", str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid4().hex}{TEMPORARY_SUFFIX}")
            stream = temporary.open("xb")
        try:
            with _room(str(path)), _closed_after_error(stream):
                yield stream
                with failures("write", str(path)):
                    stream.flush()
                    os.fsync(stream.fileno())
                    stream.close()
            with failures("write", str(path)):
                temporary.replace(path)
                _flush_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @contextmanager
    def _uploaded(self, name: str) -> Iterator[BinaryIO]:
        with tempfile.NamedTemporaryFile() as spool:
            with _room(spool.name), _closed_after_error(spool):  # type: ignore[arg-type]
                yield spool  # type: ignore[misc]
                spool.flush()
            attempt("write", self.join(name), self.fs.put_file, spool.name, self._path(name))


def json_bytes(value: Any) -> bytes:
    """Encode a value as for JSON files: UTF-8, indented, keys in order; see `json_text`."""
    return (json_text.dumps(value, indent=2) + "\n").encode()


def read_file(url: str, *, limit: int | None = None) -> bytes:
    """The bytes of any file, or the first ``limit`` of them.

    Raises:
        StorageError: it cannot be read.
    """
    fs, path = opened(url)

    def read() -> bytes:
        with fs.open(path, "rb") as file:
            return bytes(file.read(-1 if limit is None else limit))

    return attempt("read", url, read)


def read_parquet(url: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file from anywhere, or the named columns of it.

    Raises:
        StorageError: it cannot be read, is damaged, or has no such column.
    """
    fs, path = opened(url)

    def read() -> pa.Table:
        with fs.open(path, "rb") as stream:
            file = pq.ParquetFile(stream)
            for name in columns or ():
                if name not in file.schema_arrow.names:
                    raise StorageError(f"{url} has no column {name!r}; write the file again")
            return file.read(columns=None if columns is None else list(columns))

    return attempt("read", url, read)


def expand(patterns: str | Sequence[str], *, deep: bool = False) -> list[str]:
    """Return the files that paths, URLs, globs and folders stand for.

    A folder stands for every ``*.parquet`` directly in it or in its Hive partitions, which are
    (nested) folders such as ``relation=capital/``; with ``deep``, for all files anywhere below it.
    Patterns keep their order, the files of each are sorted by name, and a file that matches
    several patterns is listed once.

    Returns:
        Absolute local paths and URLs.

    Raises:
        RequestTableError: a pattern matches no file.
        StorageError: the storage cannot be listed.
    """
    given = [patterns] if isinstance(patterns, str) else patterns
    return list(dict.fromkeys(file for pattern in given for file in _matches(pattern, deep)))


def fetch(fs: fsspec.AbstractFileSystem, source: str, target: Path) -> None:
    """Copy a file to this machine."""
    with _room(str(target)):
        fs.get_file(source, str(target))


def _matches(pattern: str, deep: bool) -> list[str]:
    fs, path = opened(pattern)
    found = attempt("look for", pattern, _found, fs, path, deep)
    if not found:
        raise RequestTableError(
            f"{pattern} matches no file; give a Parquet file, a folder of *.parquet or a glob"
        )
    return [_url(fs, p) for p in sorted(found)]


def _found(fs: fsspec.AbstractFileSystem, path: str, deep: bool) -> list[str]:
    fs.invalidate_cache()
    kind = _kind(fs, path)
    if kind == "directory":
        below = _files_below(fs, path) if deep else _with_partitions(fs, path)
        return [p for p in below if _is_visible_parquet(p.removeprefix(path))]
    if kind is not None:
        return [path]
    matches: dict[str, dict] = fs.glob(path, detail=True)
    return [p for p, info in matches.items() if info["type"] != "directory"]


def _with_partitions(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """The files directly in a folder, and those of its Hive partitions."""
    found: list[str] = []
    for inside in fs.ls(path, detail=False):
        if not _is_partition(inside.rstrip("/")):
            found.append(inside)
            continue
        files = _files_below(fs, inside)
        # A file with such a name, which is not a folder, yields only itself.
        found += [file for file in files if all(map(_is_partition, _folders(file, path)))]
    return found


def _folders(file: str, path: str) -> tuple[str, ...]:
    """The folders between a folder and a file in it."""
    return PurePosixPath(file.removeprefix(path).lstrip("/")).parts[:-1]


def _is_partition(path: str) -> bool:
    name, equals, _ = PurePosixPath(path).name.partition("=")
    return bool(name and equals)


def _files_below(fs: fsspec.AbstractFileSystem, folder: str) -> list[str]:
    """All files below a folder; unlike ``fs.find``, an unreadable folder is an error."""
    if not is_local(fs) or os.path.isfile(folder):
        found: list[str] = fs.find(folder)
        return found

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    walked = os.walk(folder, onerror=refuse, followlinks=True)
    return [os.path.join(where, name) for where, _, names in walked for name in names]


def _kind(fs: fsspec.AbstractFileSystem, path: str) -> str | None:
    """``file``, ``directory`` or None; unlike ``fs.isfile``, a denied access is an error."""
    try:
        return str(fs.info(path)["type"])
    except FileNotFoundError:
        return None


def _is_visible_parquet(path: str) -> bool:
    """Whether it is Parquet, and neither it nor a folder around it is hidden or unfinished."""
    *folders, name = PurePosixPath(path).parts
    hidden = name.startswith(".") or any(folder.startswith((".", "_")) for folder in folders)
    return name.endswith(".parquet") and not hidden


def opened(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system and the path in it that a URL names; local paths become absolute."""
    with failures("open", url):
        fs, path = fsspec.core.url_to_fs(url)
    if is_local(fs) and ".." in path.split("/"):
        path = _without_dots(path)
    return fs, path


def _without_dots(path: str) -> str:
    """An absolute path without ``..``, as the system reads it, whether or not it exists.

    Otherwise ``nowhere/../out`` does not exist, but the first write creates ``nowhere``, and from
    then on it is ``out``.
    """
    found = ""
    for part in path.split("/"):
        if part == "..":
            # Links before it are followed.
            found = os.path.dirname(os.path.realpath(found or "/")).rstrip("/")
        elif part not in ("", "."):
            found = f"{found}/{part}"
    return found or "/"


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether the files are on a disk of this machine."""
    return isinstance(fs, fsspec.implementations.local.LocalFileSystem)


def _protocol(fs: fsspec.AbstractFileSystem) -> str:
    return fs.protocol if isinstance(fs.protocol, str) else str(fs.protocol[0])


def _error_code(error: OSError) -> str:
    """The error code from the service, if the error came from one."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _link_into_place(path: Path, data: bytes) -> None:
    """Write a complete file, and link it to its name only if the name is free.

    Raises:
        FileExistsError: the name is taken.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.link(temporary, path)
        _flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _url(fs: fsspec.AbstractFileSystem, path: str) -> str:
    return path if is_local(fs) else str(fs.unstrip_protocol(path))


@contextmanager
def _closed_after_error(stream: BinaryIO) -> Iterator[None]:
    try:
        yield
    except BaseException:
        # Closing flushes the rest. On a full disk that fails again, and would hide the first error.
        with suppress(OSError):
            stream.close()
        raise


def _flush_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power failure, if folders can be flushed."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def attempt(action: str, where: str, call: Callable[..., Result], *args: Any) -> Result:
    """Return the result of ``call``, retrying for a while if the storage is unreachable.

    Raises:
        StorageError: the operation failed.
    """
    with failures(action, where):
        return patiently(lambda: call(*args))


@contextmanager
def failures(action: str, where: str) -> Iterator[None]:
    """Convert the exceptions of the storage libraries: each back end has its own."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StorageError(
            f"cannot {action} {where} ({reason}); {_remedy(action, error)}"
        ) from error


@contextmanager
def _room(where: str) -> Iterator[None]:
    """Convert only errors of a full disk: other exceptions of a block are not the storage's."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        with failures("write", where):
            raise


def _remedy(action: str, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in _FULL:
        return "make room there, then run the same job again: finished work is kept"
    if isinstance(error, FileNotFoundError):
        return "check the path"
    if action == "read" and isinstance(error, pa.ArrowException):
        return "the file is damaged or not Parquet, write it again"
    if isinstance(error, ImportError):
        return "install the package it names"
    if isinstance(error, PermissionError) or "redential" in type(error).__name__:
        return "check the credentials and the permissions"
    if is_transient(error):
        return (
            "check that the storage can be reached, then run the same job again: finished work "
            "is kept"
        )
    return "check that the storage can be reached and has room"
