"""The files that a run owns: it writes only to its own folder, and deletes only its own files.

A folder belongs to a run if it was empty when the first run began, and then carries the run's
records: its lease and ``run.json``. Which files in it a run made is known by name:

    run.json, job.yaml, metrics.json, …                    fixed
    records/*.json                                         the run's records
    targets/<shard>-<32 hex digits>.parquet, delta/…       drawn at random for each attempt
    model/…                                                listed in records before they are written
    second_moments/…                                       see `pipeline.second_moments.collection`

Everything else belongs to the user.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import RunFolderError
from pipeline.storage import TEMPORARY_SUFFIX, Store

STATUS = "run.json"
MODEL = "model"
CARD = "README.md"
"""The model card in ``model/``: written last, replacing a file of this name from the base."""
LEASE = "lease"
PUBLISHING = "publishing"
"""Record of the files that publishing will write, created before it writes the first one."""
PUBLISHED = "published"
OF_EDITED = ("measured-after", "harness-after", "known-after")
"""Records of what was measured on the edited model."""
PARTS = "second_moments.parts"
"""Folder for the parts that second moments are merged from, next to them."""

_FILES = (
    "context_templates.json",
    "job.yaml",
    "metrics.json",
    "rejected.parquet",
    "report.html",
    "results.parquet",
    STATUS,
)
_ATTEMPT = r"[^/]+-[0-9a-f]{32}"
_PART = (
    r"second_moments\.parts/[0-9a-f]{16}-\d+/"
    r"(\d{5}\.json|\d{5}-\d+-[0-9a-f]{32}\.safetensors)"
)
_MADE = re.compile(
    r"records/[^/]+\.json"
    rf"|targets/{_ATTEMPT}\.parquet"
    rf"|delta/{_ATTEMPT}\.safetensors"
    r"|second_moments/second_moments\.(safetensors|json)"
    rf"|second_moments/factors/{_ATTEMPT}\.safetensors"
    rf"|second_moments/{_PART}"
)
_SHOWN = 3
_LEASES = re.compile(rf"{LEASE}/(\d{{6}}\.json|probe-[0-9a-f]{{32}})")
_UNFINISHED = re.compile(rf"(.*/)?\.[^/]+\.[0-9a-f]{{32}}{re.escape(TEMPORARY_SUFFIX)}")


def is_run_record(status: Any) -> bool:
    """Whether the value of a ``run.json`` was written by a run of this project."""
    return (
        isinstance(status, dict)
        and isinstance(status.get("digests"), dict)
        and "pmet-pipeline" in (status.get("versions") or {})
    )


def is_unfinished(name: str) -> bool:
    """Whether a file has a name that `pipeline.storage.store.Store` gives unfinished files."""
    return _UNFINISHED.fullmatch(name) is not None


def made(names: Iterable[str]) -> Iterator[str]:
    """The given names that runs create in a run folder, ``model/`` excluded."""
    for name in names:
        if name in _FILES or _MADE.fullmatch(name):
            yield name


def published_files(store: Store) -> set[str]:
    """Names of the files in ``model/`` that runs in this folder have written or begun to write."""
    names: set[str] = set()
    for record in (PUBLISHING, PUBLISHED):
        name = f"records/{record}.json"
        if store.exists(name):
            names |= _said_files(store.read_json(name))
    return names


def _said_files(record: Mapping[str, Any]) -> set[str]:
    files = {name for name in record.get("files", {}) if name.startswith(f"{MODEL}/")}
    files |= set(record.get("names", ()))
    return files | {f"{MODEL}/{CARD}"} if files else files


def files_made(store: Store) -> list[str]:
    """All files in a run folder that runs made, except leases and unfinished files."""
    names = store.list()
    published = published_files(store)
    return [*made(names), *(name for name in names if name in published)]


def delete_parts(moments: Store) -> None:
    """Delete the parts that second moments in a folder were merged from."""
    parts = re.compile(_PART)
    moments.delete_files(name for name in moments.list(PARTS) if parts.fullmatch(name))


def refuse_foreign_in_model(store: Store) -> None:
    """Refuse to publish beside files in ``model/`` that no record names.

    They would become part of the published model, or be overwritten by it.

    Raises:
        RunFolderError: naming some of them.
        StorageError: the folder cannot be read.
    """
    there = [name for name in store.list(MODEL, unfinished=True) if not is_unfinished(name)]
    published = published_files(store) if there else set()
    if foreign := [name for name in there if name not in published]:
        raise RunFolderError(
            f"{store.join(MODEL)} holds {_some(foreign)}, which no run has written there; move it "
            "elsewhere, or name another output"
        )


def refuse_foreign_folder(store: Store, beside: Collection[str] = ()) -> None:
    """Refuse to run in a folder that holds files but no record of a run.

    Args:
        store: the run folder; it need not exist.
        beside: names of files and folders in it that the caller wrote for this run.

    Raises:
        RunFolderError: the folder is the user's, or has a link in place of a run's own file.
        StorageError: it cannot be read.
    """
    if store.is_file():
        raise RunFolderError(f"{store.url} is a file; name a folder as output")
    if (link := _dangling(store.local_path())) is not None:
        raise RunFolderError(
            f"{store.url}: {link} is a link to {link.readlink()}, which does not exist; make that "
            "folder, or name another output"
        )
    names = store.entries()
    links = [name for name in names if name not in beside and store.is_link(name)]
    if links:
        raise RunFolderError(
            f"{store.join(links[0])} is a link, and a run would write to or delete its target; "
            "replace the link by the target itself, or name another output"
        )
    if STATUS in names:
        if not is_run_record(_status(store)):
            raise RunFolderError(
                f"{store.join(STATUS)} was not written by a run of pmet, so {store.url} is not a "
                "run folder; name another output"
            )
        return
    own = {LEASE, *beside} if has_lease(store) else set(beside)
    foreign = [name for name in names if name not in own and not is_unfinished(name)]
    if foreign:
        raise RunFolderError(
            f"{store.url} holds {_some(foreign)} and is not a run folder (it has no "
            f"{STATUS}); name a folder that is empty or does not exist"
        )


def _status(store: Store) -> Any:
    try:
        return json.loads(store.read_bytes(STATUS))
    except ValueError as error:
        raise RunFolderError(
            f"{store.join(STATUS)} is damaged ({error}), and nothing else shows that {store.url} "
            "is a run folder; name another output"
        ) from None


def _dangling(path: Path | None) -> Path | None:
    """The dangling link in a path; None if there is none."""
    places = () if path is None else (path, *path.parents)
    return next((place for place in places if place.is_symlink() and not place.exists()), None)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def has_lease(store: Store) -> bool:
    """Whether a run or a refresh has ever held a folder."""
    inside = [name for name in store.list(LEASE, unfinished=True) if not is_unfinished(name)]
    return bool(inside) and all(_LEASES.fullmatch(name) for name in inside)


def leases(store: Store) -> list[str]:
    """The files of a folder's leases."""
    return [name for name in store.list(LEASE) if _LEASES.fullmatch(name)]
