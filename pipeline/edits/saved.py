"""A saved edit, wherever it is: a run, its export, an edit file, or a folder of edit files."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from pipeline.edits.arithmetic import Part
from pipeline.edits.output import is_claimed
from pipeline.errors import RunFolderError
from pipeline.run_folder import STATUS, is_run_record
from pipeline.storage import (
    CHUNK_BYTES,
    Store,
    attempt,
    digest_of,
    fetch,
    file_digest,
    is_local,
    opened,
)
from pmet.delta import FORMAT, saved_delta, saved_original
from pmet.errors import EditFileError
from pmet.safetensors_header import DTYPES, Entry, Header, read_header

EXPORT = "export.json"
"""What an export is of, in its folder; `pipeline.export` writes it."""
_KINDS = ("delta", "original")
_ENDED = ("complete", "held")


@dataclass(frozen=True)
class SavedWeight:
    """The edit of one weight.

    Attributes:
        file: file on this machine.
        parameter: name of the weight in the loaded model.
        shape: its shape.
        digest: SHA-256 over Δ and the original values.
    """

    file: Path
    parameter: str
    shape: tuple[int, ...]
    digest: str

    def part(self, expert: int | None = None) -> Part:
        """The part of the edit in the weight's stored tensor, or in that of one expert."""
        return Part(
            delta=partial(saved_delta, self.file, self.parameter, expert),
            original=partial(self._original, expert),
        )

    def _original(self, expert: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        # Ranks on a CPU compute in float32, and save what a 16-bit checkpoint holds in float32.
        saved = saved_original(self.file, self.parameter, expert)
        cast = saved.to(dtype)
        return cast if torch.equal(cast.to(saved.dtype), saved) else None


@dataclass(frozen=True)
class SavedEdit:
    """A saved edit whose files are on this machine.

    Attributes:
        source: absolute path or URL, from which it can be opened again.
        weights: by the parameter's name.
        digest: identifies the edit, however its files are named or divided.
        base: digest of the model that it was made for; None without a run.
        warning: what the user should know about it, or None.
    """

    source: str
    weights: Mapping[str, SavedWeight]
    digest: str
    base: str | None = None
    warning: str | None = None


@contextmanager
def opened_edit(source: str) -> Iterator[SavedEdit]:
    """Open an edit; copies of remote files are deleted at the end of the block.

    Args:
        source: path or URL of a run folder, of an exported edit, of an edit file, or of a folder
            of edit files.

    Raises:
        RunFolderError: the run has no finished update, or lacks files.
        EditFileError: there is no edit, or a file is damaged.
        StorageError: a file cannot be read.
    """
    with ExitStack() as stack:
        store = Store(source)
        if store.is_file():
            yield _edit(store.url, [(_local_file(source, stack), source)])
        elif store.exists(STATUS):
            yield _edit_of_run(store, stack)
        elif store.exists(EXPORT):
            yield _edit_of_export(store, stack)
        else:
            yield _edit_of_folder(store, stack)


def _edit_of_export(store: Store, stack: ExitStack) -> SavedEdit:
    try:
        export = json.loads(store.read_bytes(EXPORT))
        kind, base = export["format"], str(export["base"]["digest"])
        files = (
            [] if kind == "adapter" else [(str(f["name"]), f["sha256"]) for f in export["files"]]
        )
    except (ValueError, KeyError, TypeError):
        raise EditFileError(
            f"{store.join(EXPORT)} is damaged or was not written by pmet export; export the run "
            "again"
        ) from None
    if kind == "adapter":
        raise EditFileError(
            f"{store.url} holds an adapter, whose factors are rounded: pmet cannot apply or revert "
            "them exactly; open it with peft, or export the run with --format delta"
        )
    return replace(_edit(store.url, _checked(store, files, EXPORT, stack)), base=base)


def _edit_of_folder(store: Store, stack: ExitStack) -> SavedEdit:
    if is_claimed(store):
        raise EditFileError(
            f"{store.url} is not finished: the command that writes it was killed or is still "
            "running; wait until it ends, or run it again"
        )
    names = store.glob("*.safetensors")
    if not names:
        holds = f"it has neither {STATUS} nor *.safetensors" if store.entries() else "nothing there"
        raise EditFileError(
            f"{store.url} is neither a run nor a saved edit ({holds}); name a run folder, its "
            "delta folder, or an edit file"
        )
    return _edit(
        store.url, [(stack.enter_context(store.local_copy(n)), store.join(n)) for n in names]
    )


def _edit_of_run(store: Store, stack: ExitStack) -> SavedEdit:
    status = _status(store)
    files = [(layer["file"], layer["sha256"]) for layer in _layers(store, status)]
    return replace(
        _edit(store.url, _checked(store, files, STATUS, stack)),
        base=status["digests"].get("model"),
        warning=_warning(store, status),
    )


def _checked(
    store: Store, files: Iterable[tuple[str, str]], record: str, stack: ExitStack
) -> Iterator[tuple[Path, str]]:
    """Local copies of files, and where they are from, if their SHA-256 is the recorded one."""
    again = "run its job again" if record == STATUS else "export the run again"
    for name, digest in files:
        where = store.join(name)
        if not store.exists(name):
            raise RunFolderError(
                f"{where} is missing, which {record} names as part of the edit; copy the whole "
                f"folder, or {again}"
            )
        path = stack.enter_context(store.local_copy(name))
        if file_digest(path) != digest:
            raise EditFileError(
                f"{where} is damaged: its SHA-256 is not the one in {record}; copy it again, or "
                f"{again}"
            )
        yield path, where


def _status(store: Store) -> dict[str, Any]:
    try:
        status = json.loads(store.read_bytes(STATUS))
    except ValueError as error:
        raise RunFolderError(
            f"{store.join(STATUS)} is damaged ({error}); name the delta folder of the run instead"
        ) from None
    if not is_run_record(status):
        raise RunFolderError(
            f"{store.join(STATUS)} was not written by a run of pmet; name a run folder, its delta "
            "folder, or an edit file"
        )
    return dict(status)


def _layers(store: Store, status: Mapping[str, Any]) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = status.get("layers") or []
    if layers and all({"file", "sha256"} <= set(layer) for layer in layers):
        return layers
    if layers:
        raise RunFolderError(
            f"{store.join(STATUS)} does not say which files hold the edit; name the delta folder "
            "of the run instead"
        )
    if status.get("status") in _ENDED:
        raise RunFolderError(
            f"the run in {store.url} edited nothing, because the model knew all facts; there is no "
            "edit to apply, revert or export"
        )
    raise RunFolderError(
        f"the run in {store.url} has no finished update (it is {status.get('status')}); run its "
        "job again until it ends"
    )


def _warning(store: Store, status: Mapping[str, Any]) -> str | None:
    match status.get("status"):
        case "complete":
            return None
        case "held":
            return f"a gate held the edited model of {store.url} back; see its report"
        case other:
            return f"the run in {store.url} has not finished (it is {other}): nothing measured it"


def _edit(source: str, files: Iterable[tuple[Path, str]]) -> SavedEdit:
    weights: dict[str, SavedWeight] = {}
    for path, where in files:
        for weight in _weights(path, where):
            if weight.parameter in weights:
                raise EditFileError(
                    f"{source} holds two edits of {weight.parameter}; name one edit file, or the "
                    "run folder, whose run.json says which files count"
                )
            weights[weight.parameter] = weight
    listing = sorted((weight.parameter, weight.digest) for weight in weights.values())
    return SavedEdit(source, weights, digest_of(listing))


def _weights(path: Path, where: str) -> Iterator[SavedWeight]:
    """The edits in a file, after a check of its header.

    Raises:
        EditFileError: it is damaged, or no saved edit.
    """
    header = _header(path, where)
    if header.metadata.get("format") != FORMAT:
        raise EditFileError(
            f"{where} is not a saved edit ({FORMAT}); name a run or its delta folder"
        )
    names = {name.partition(".")[2] for name in header.tensors}
    for parameter in sorted(names):
        entries = [header.tensors.get(f"{kind}.{parameter}") for kind in _KINDS]
        shapes = {entry.shape for entry in entries if entry is not None}
        known = all(entry is not None and entry.dtype in DTYPES for entry in entries)
        if len(shapes) != 1 or not known or len(header.tensors) != 2 * len(names):
            raise EditFileError(
                f"{where} holds no complete edit of {parameter}: it needs delta.{parameter} and "
                f"original.{parameter} in one shape; save the edit again"
            )
        digest = _content_digest(path, [entry for entry in entries if entry is not None])
        yield SavedWeight(path, parameter, shapes.pop(), digest)
    if not names:
        raise EditFileError(f"{where} holds no edit: it has no tensors; save the edit again")


def _header(path: Path, where: str) -> Header:
    def first(count: int) -> bytes:
        with path.open("rb") as file:
            return file.read(count)

    try:
        return read_header(first, path.stat().st_size)
    except ValueError as error:
        raise EditFileError(
            f"{where} cannot be read as a saved edit ({error}); is the file complete?"
        ) from None


def _local_file(url: str, stack: ExitStack) -> Path:
    fs, path = opened(url)
    if is_local(fs):
        return Path(path)
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    copy = Path(folder) / PurePosixPath(path).name
    attempt("read", url, fetch, fs, path, copy)
    return copy


def _content_digest(path: Path, entries: Iterable[Entry]) -> str:
    """SHA-256 over dtype, shape and bytes of tensors in a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for entry in entries:
            digest.update(f"{entry.dtype} {entry.shape}".encode())
            file.seek(entry.start)
            for start in range(entry.start, entry.stop, CHUNK_BYTES):
                digest.update(file.read(min(CHUNK_BYTES, entry.stop - start)))
    return digest.hexdigest()
