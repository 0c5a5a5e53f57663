"""What a push uploads: the files that a run or an export recorded as its own, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.edits import EXPORT, is_claimed
from pipeline.errors import RunFolderError
from pipeline.export import ADAPTER_CONFIG
from pipeline.report import base_model, is_model_card
from pipeline.run_folder import CARD, MODEL, PUBLISHED, STATUS, read_finished
from pipeline.storage import Store, json_bytes

RECORD = ".pmet_push.json"
"""What a push wrote, beside it; hidden, so that it is no part of a model."""
_FORMAT = "pmet-push-1"
_NAMES = {"model": "edited model", "adapter": "LoRA adapter", "delta": "deltas"}

Kind = Literal["model", "adapter", "delta"]


@dataclass(frozen=True)
class Contents:
    """Files to push, and what they are.

    Attributes:
        store: the folder that holds them.
        kind: what they are.
        files: SHA-256 of each, by name.
        last: the file without which nothing opens the folder.
        run: digest of the run.
        base: the base model, as the job names it.
        facts: how many facts were edited.
        held: whether a gate held the edited model back.
        warning: what no gate has checked, or None.
    """

    store: Store
    kind: Kind
    files: Mapping[str, str]
    last: str
    run: str
    base: str
    facts: int
    held: bool
    warning: str | None = None

    @property
    def title(self) -> str:
        """One line that says what is pushed: ``Edited model of 40 facts, run 0a1b2c3d4e5f``."""
        facts = f"{self.facts:,} fact{'' if self.facts == 1 else 's'}"
        held = ", held back by a gate" if self.held else ""
        name = _NAMES[self.kind]
        return f"{name[0].upper()}{name[1:]} of {facts}, run {self.run[:12]}{held}"

    @property
    def description(self) -> str:
        """The lines below the title."""
        return f"Base model: {self.base or 'not recorded'}\nRun: {self.run}"

    @property
    def record(self) -> bytes:
        """The contents of `RECORD`: the same for every push of the same files."""
        files = dict(sorted(self.files.items()))
        return json_bytes({"format": _FORMAT, "kind": self.kind, "run": self.run, "files": files})


def contents_of(source: str) -> Contents:
    """Find out what a push of a run or an export uploads.

    Args:
        source: path or URL of the folder of a finished run, or of an export.

    Raises:
        RunFolderError: it is neither, is not finished, or lacks files.
        StorageError: a file cannot be read.
    """
    store = Store(source)
    if store.exists(STATUS):
        return _of_run(store)
    if store.exists(EXPORT) and not is_claimed(store):
        return _of_export(store)
    if is_claimed(store):
        raise RunFolderError(
            f"{store.url} is not finished: the command that writes it was killed or is still "
            "running; wait until it ends, or run it again"
        )
    raise RunFolderError(
        f"{store.url} is neither a run nor an export (it has neither {STATUS} nor {EXPORT}); name "
        "a run folder, the output of pmet export, or the home of a refresh"
    )


def written_files(record: Any) -> dict[str, str] | None:
    """The files that an earlier push wrote, from its record; None if that is no such record."""
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        return None
    files = record.get("files")
    return {str(k): str(v) for k, v in files.items()} if isinstance(files, dict) else None


def _of_run(store: Store) -> Contents:
    run = read_finished(store)
    record = f"records/{PUBLISHED}.json"
    if not store.exists(record):
        raise RunFolderError(
            f"{store.url} has no published model any more ({record} is missing): it was deleted, "
            "or is a version that a refresh has pruned; run its job again"
        )
    model = Store(store.join(MODEL))
    try:
        named = dict(store.read_json(record)["files"])
    except (KeyError, TypeError, ValueError):
        raise RunFolderError(
            f"{store.join(record)} is damaged, so it is unknown which files the run published; "
            "run its job again with --fresh"
        ) from None
    files = {name.removeprefix(f"{MODEL}/"): str(digest) for name, digest in named.items()}
    _require(model, [*files, CARD])
    card = model.read_bytes(CARD)
    if not is_model_card(card.decode(errors="replace")):
        raise RunFolderError(
            f"{model.join(CARD)} is not the card that the run wrote; bring that back, or run the "
            "job again with --fresh"
        )
    held = run.run["status"] == "held"
    ungated = "no gate has checked this model: its job demands none" if not run.gates else None
    return Contents(
        model,
        "model",
        files | {CARD: hashlib.sha256(card).hexdigest()},
        "config.json",
        str(run.run.get("digest") or "unknown"),
        base_model(run.job),
        run.counts.get("edited") or 0,
        held,
        ungated,
    )


def _of_export(store: Store) -> Contents:
    export = store.read_json(EXPORT)
    try:
        kind: Kind = export["format"]
        last = {"adapter": ADAPTER_CONFIG, "delta": EXPORT}[kind]
        files = {str(file["name"]): str(file["sha256"]) for file in export["files"]}
        run, base, facts = export["digest"], export["base"]["model"], int(export["facts"])
        held = export["status"] == "held"
        partial = kind == "adapter" and not export["exact"]
    except (KeyError, TypeError, ValueError):
        raise RunFolderError(
            f"{store.join(EXPORT)} is damaged or was not written by pmet export; export the run "
            "again"
        ) from None
    small = {CARD, EXPORT, last}
    _require(store, [*files, *small])
    files |= {name: store.sha256(name) for name in small}
    warning = (
        "the adapter has only a part of the edit: the gates have checked the run's model, not it"
        if partial
        else None
    )
    return Contents(
        store, kind, files, last, str(run or "unknown"), str(base or ""), facts, held, warning
    )


def _require(store: Store, names: list[str]) -> None:
    if missing := [name for name in names if not store.exists(name)]:
        raise RunFolderError(
            f"{store.join(missing[0])} is missing, which belongs to what is to be pushed; copy the "
            "whole folder, or make it again"
        )
