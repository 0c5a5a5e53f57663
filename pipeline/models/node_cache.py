"""Models on a node: copied there once, by whichever process needs one first, and used by all.

A worker is told what the job names, not where the driver has put its own copy: that folder is on
the driver's machine. What is copied is checked against the digest that the driver has found.
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
from pipeline.models.checkpoint import Checkpoint, open_model_folder
from pipeline.models.fetching import is_hub_id
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
"""Seconds that a copy stays which nobody asks for: a night's model is another one every night."""


def default_cache() -> Path:
    """Where models are copied to on this machine: in this user's cache (`cache_folder`).

    Raises:
        InputError, StorageError: as `cache_folder`.
    """
    return cache_folder() / "models"


def name_for_nodes(model: str, folder: Path) -> str:
    """What another machine finds a model by.

    Args:
        model: as the job names it.
        folder: where it has been opened from here.

    Returns:
        A URL or hub id as it is; of what is on a disk here, or in the memory of this process, the
        folder.
    """
    if model.startswith("memory://") or _local_folder(model) is not None:
        return str(folder)
    return model


def model_on_node(model: str, digest: str | None, cache_dir: Path | None = None) -> Path:
    """A folder of this machine with a model.

    Copies that nobody has asked for in `KEPT_S` go when another model is asked for. Whoever reads
    one of them meanwhile can go on.

    Args:
        model: a folder, a URL or a hub id.
        digest: what a copy has to have (`Checkpoint.digest`); folders are used as they are.
        cache_dir: where copies are; by default where all processes of this machine look.

    Raises:
        ModelError: it is not here, or is another model than it was when the run began.
        StorageError: it cannot be copied.
    """
    if (folder := _local_folder(model)) is not None:
        if folder.is_dir():
            return folder
        raise ModelError(
            f"model {model} is not on {platform.node()}: put it on a disk that all nodes of the "
            "cluster share, or give a URL"
        )
    cache = cache_dir or default_cache()
    name = hashlib.sha256(model.encode()).hexdigest()[:32]
    make_cache(cache)
    # Processes that come later wait, and find it there.
    with _locked(cache / f"{name}.lock"):
        _forget_unused(cache)
        folder = open_model_folder(model, cache)
        if not _marked_as_used(folder, cache):
            # Somebody else has found it unused, and removed it right now.
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
    """Note that a copy is used; False where it is gone."""
    if folder.parent == cache:
        try:
            os.utime(folder)
        except FileNotFoundError:
            return False
    return True


def _forget_unused(cache: Path) -> None:
    """Remove copies, parts of copies and marks that no run has asked for in a long time.

    The user names the cache, and may keep other models there: only names that are drawn from
    digests are taken for copies.
    """
    for entry in cache.iterdir():
        if _COPY.fullmatch(entry.name) is None or entry.is_symlink():
            continue
        # Files of another user, or gone meanwhile, are left alone.
        with suppress(OSError):
            if time.time() - entry.stat().st_mtime < KEPT_S:
                continue
            if entry.is_dir():
                # Renamed first: a process that opened it now would find half a model.
                entry = entry.rename(cache / f"{uuid4().hex}{TEMPORARY_SUFFIX}")
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _check(model: str, folder: Path, digest: str, cache: Path) -> None:
    """Read a copy once, and remember that it is what it should be."""
    remembered = hashlib.sha256(f"{folder} {digest}".encode()).hexdigest()[:32]
    mark = cache / f"{remembered}.checked"
    if not mark.exists() and Checkpoint.open(folder).digest() != digest:
        raise ModelError(
            f"model {model} has changed since the run began, or was damaged on its way to "
            f"{platform.node()}: delete {folder} there and run the job again"
        )
    # Also where it is there: what is used is not old.
    with failures("write", str(mark)):
        mark.touch()


def _local_folder(model: str) -> Path | None:
    """The folder that a model's name stands for; None for what has to be fetched."""
    if "://" not in model:
        return None if is_hub_id(model) else Path(model).expanduser()
    try:
        return Store(model).local_path()
    except StorageError:
        return None
