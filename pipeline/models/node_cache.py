"""Models on a node: copied once, by the first process that needs one, and shared by all.

A worker gets the model's name from the job, not the driver's own copy, which is on the driver's
machine. A copy is checked against the digest that the driver computed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock

from pipeline.errors import ModelError, StorageError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.fetching import is_gguf, is_hub_id
from pipeline.models.opening import open_model_folder
from pipeline.storage import (
    TEMPORARY_SUFFIX,
    Store,
    cache_failures,
    cache_folder,
    failures,
    make_cache,
)

_COPY = re.compile(rf"[0-9a-f]{{32}}((\.[0-9a-f]{{32}})?{re.escape(TEMPORARY_SUFFIX)}|\.checked)?")
KEPT_S = 2 * 24 * 3600.0
"""Seconds that an unused copy is kept: a nightly job uses another model every night."""


def default_cache() -> Path:
    """The folder for copies of models on this machine, in this user's cache (`cache_folder`).

    Raises:
        InputError, StorageError: as for `cache_folder`.
    """
    return cache_folder() / "models"


def name_for_nodes(model: str, folder: Path) -> str:
    """Return the name by which another machine finds a model.

    Args:
        model: as named in the job.
        folder: the local folder it was opened from.

    Returns:
        A URL or hub id unchanged; the path of a GGUF file, which each machine dequantises itself;
        for any other model on a local disk or in this process's memory, the folder.
    """
    if model.startswith("memory://"):
        return str(folder)
    if (path := _local_path(model)) is not None:
        return str(path.absolute() if is_gguf(model) else folder)
    return model


def model_on_node(model: str, digest: str | None, cache_dir: Path | None = None) -> Path:
    """Return a folder on this machine that holds a model.

    Copies that have not been used for `KEPT_S` are removed when another model is requested. A
    process that is reading one of them can go on.

    Args:
        model: a folder, a GGUF file, a URL of either, or a hub id.
        digest: required digest of a copy (`Checkpoint.digest`); folders are used unchecked.
        cache_dir: where copies are kept; by default a folder shared by all processes here.

    Raises:
        ModelError: it is not here, or has changed since the run began.
        StorageError: it cannot be copied.
    """
    path = _local_path(model)
    if path is not None and path.is_dir():
        return path
    if path is not None and not (is_gguf(model) and path.is_file()):
        raise ModelError(
            f"model {model} is not on {platform.node()}: put it on a disk that all nodes of the "
            "cluster share, or give a URL"
        )
    cache = cache_dir or default_cache()
    name = hashlib.sha256(model.encode()).hexdigest()[:32]
    make_cache(cache)
    # Later processes wait, and find the copy there.
    with _locked(cache / f"{name}.lock"):
        _forget_unused(cache)
        folder = open_model_folder(model, cache)
        if not _marked_as_used(folder, cache):
            # Another process has just removed it as unused.
            folder = open_model_folder(model, cache)
        if digest is not None:
            _check(model, folder, digest, cache)
    return folder


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    lock = FileLock(file)
    with cache_failures(file.parent):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _marked_as_used(folder: Path, cache: Path) -> bool:
    """Record that a copy is used; False if it is gone."""
    if folder.parent == cache:
        try:
            os.utime(folder)
        except FileNotFoundError:
            return False
    return True


def _forget_unused(cache: Path) -> None:
    """Remove copies, partial copies and marks that no run has used for a long time.

    The user names the cache, and may keep other models there: only names derived from digests
    count as copies.
    """
    for entry in cache.iterdir():
        if _COPY.fullmatch(entry.name) is None or entry.is_symlink():
            continue
        # Leave alone files that belong to another user or have disappeared.
        with suppress(OSError):
            if time.time() - entry.stat().st_mtime < KEPT_S:
                continue
            if entry.is_dir():
                # Renamed first: a process opening it now would find half a model.
                entry = entry.rename(cache / f"{uuid4().hex}{TEMPORARY_SUFFIX}")
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _check(model: str, folder: Path, digest: str, cache: Path) -> None:
    """Verify a copy by reading it once, and remember the result."""
    remembered = hashlib.sha256(f"{folder} {digest}".encode()).hexdigest()[:32]
    mark = cache / f"{remembered}.checked"
    if not mark.exists() and Checkpoint.open(folder).digest() != digest:
        raise ModelError(
            f"model {model} has changed since the run began, or was damaged on its way to "
            f"{platform.node()}: delete {folder} there and run the job again"
        )
    # Touch it even if it exists, so that a copy in use never counts as old.
    with failures("write", str(mark)):
        mark.touch()


def _local_path(model: str) -> Path | None:
    """The local path that a model's name refers to; None for one that has to be fetched."""
    if "://" not in model:
        return None if is_hub_id(model) else Path(model).expanduser()
    try:
        return Store(model).local_path()
    except StorageError:
        return None
