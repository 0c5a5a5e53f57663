"""Copies of remote model folders on this machine."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

import fsspec

from pipeline.errors import ModelError, StorageError
from pipeline.storage import (
    TEMPORARY_SUFFIX,
    attempt,
    failures,
    fetch,
    is_local,
    make_cache,
    opened,
)

GGUF_SUFFIX = ".gguf"


def is_gguf(model: str) -> bool:
    """Whether a model is named by a GGUF file: a path, or a URL without its query."""
    path = model.partition("::")[0]
    return (path.partition("?")[0] if "://" in path else path).lower().endswith(GGUF_SUFFIX)


def is_hub_id(model: str) -> bool:
    """Whether a model is named by a hub id, ``org/name`` or ``name``, and is not a folder here."""
    return (
        "://" not in model
        and not is_gguf(model)
        and model.count("/") <= 1
        and not model.startswith((".", "/", "~"))
        and not Path(model).exists()
    )


def localized(url: str, cache_dir: str | Path) -> str:
    """Return where a model can be opened from; remote folders are copied to ``cache_dir`` once.

    Local paths and hub ids such as ``org/name`` are returned unchanged. A copy is kept under a
    name that changes with the remote files, and becomes visible only when complete.

    Raises:
        ModelError: there are no files at a remote ``url``.
        StorageError: they cannot be copied.
    """
    if "://" not in url:
        return url
    fs, root = opened(url)
    if is_local(fs):
        return str(root)

    def find() -> dict[str, dict]:
        fs.invalidate_cache()
        found: dict[str, dict] = fs.find(root, detail=True)
        return found

    files = attempt("list", url, find)
    if not files:
        raise ModelError(f"there is no model at {url}: no files there; check the URL")
    state = repr([url, *((name, sorted(info.items())) for name, info in sorted(files.items()))])
    make_cache(Path(cache_dir))
    target = Path(cache_dir) / hashlib.sha256(state.encode()).hexdigest()[:32]
    if not target.is_dir():
        _download(fs, root, sorted(files), target)
    return str(target)


def localized_file(url: str, cache_dir: Path) -> Path:
    """Return the local path of a file; a remote one is copied to ``cache_dir`` once.

    Raises:
        StorageError: it does not exist, or cannot be copied.
    """
    if "://" not in url:
        return Path(url).expanduser()
    fs, path = opened(url)
    if is_local(fs):
        return Path(path)

    def find() -> dict[str, Any]:
        fs.invalidate_cache()
        return dict(fs.info(path))

    state = repr(
        [url, sorted((key, str(value)) for key, value in attempt("read", url, find).items())]
    )
    target = cache_dir / hashlib.sha256(state.encode()).hexdigest()[:32]
    name = PurePosixPath(path.partition("?")[0]).name
    if target.is_dir():
        os.utime(target)
    else:
        make_cache(cache_dir)
        _download(fs, path, [path], target, name=name)
    return target / name


def _download(
    fs: fsspec.AbstractFileSystem,
    root: str,
    files: Sequence[str],
    target: Path,
    *,
    name: str | None = None,
) -> None:
    partial = target.with_name(f"{target.name}.{uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        for file in files:
            own = name or file.removeprefix(root).lstrip("/") or PurePosixPath(file).name
            if ".." in PurePosixPath(own).parts:
                raise StorageError(f"{file} would be copied outside its folder; rename it")
            with failures("copy", file):
                (partial / own).parent.mkdir(parents=True, exist_ok=True)
            attempt("copy", file, fetch, fs, file, partial / own)
        with failures("write", str(target)):
            rename_unless_there(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def rename_unless_there(source: Path, target: Path) -> None:
    """Give a complete folder its final name, unless another process has finished the same one."""
    try:
        source.rename(target)
    except OSError:
        # The caller deletes the folder that is left over.
        if not target.is_dir():
            raise
