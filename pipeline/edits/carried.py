"""The record of the edits that a model carries, kept beside it in a hidden folder.

It is no part of the model: transformers does not read it, and a model's digest does not cover it.
A model that a run published has none; the edit itself then shows what the model holds.

    .pmet_edits/edits.json                  the edits, first applied first, and what each replaced
    .pmet_edits/<edit>-<tensor>.zst         what subtracting Δ would not restore; see `arithmetic`
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from pipeline.edits.stacking import Outcome, Step
from pipeline.errors import ModelError
from pipeline.storage import Store

FOLDER = ".pmet_edits"
_RECORD = f"{FOLDER}/edits.json"
_FORMAT = "pmet-edits-1"


@dataclass(frozen=True)
class Trace:
    """What an edit replaced in one tensor.

    Attributes:
        before: SHA-256 of the tensor's bytes without this edit and those above it; None if it is
            no longer known.
        kept: whether a file has what subtracting Δ would not restore.
    """

    before: str | None
    kept: bool


@dataclass(frozen=True)
class CarriedEdit:
    """One edit that a model carries.

    Attributes:
        id: identifies this application of the edit; part of file names.
        digest: the edit's digest.
        source: where the edit was read from.
        applied_at: when.
        on: digest of the model that it was applied to.
        forced: whether that model was not the one that the edit was made for.
        tensors: by name in the checkpoint's files.
    """

    id: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    digest: str
    source: str
    applied_at: str
    on: str
    forced: bool
    tensors: dict[str, Trace]


@dataclass(frozen=True)
class _Record:
    """The contents of ``edits.json``."""

    format: str
    model: str
    edits: list[CarriedEdit]
    now: dict[str, str]


@dataclass(frozen=True)
class Carried:
    """The edits that a model carries, as far as they are recorded.

    Attributes:
        edits: in the order in which they were applied.
        now: SHA-256 of each edited tensor's bytes.
        model: digest of the model as it was written.
        folder: the model folder; None for a record that has not been written.
    """

    edits: tuple[CarriedEdit, ...] = ()
    now: Mapping[str, str] | None = None
    model: str | None = None
    folder: Path | None = None

    def built_on(self, base: str, model: str) -> bool:
        """Whether a model is a base with these edits and nothing else changed.

        Args:
            base: digest of the base.
            model: digest of the model as it is.
        """
        return model == self.model and base in {edit.on for edit in self.edits}

    def last(self, digest: str) -> CarriedEdit | None:
        """The edit of this digest that was applied last."""
        return next((edit for edit in reversed(self.edits) if edit.digest == digest), None)

    def steps(self, tensor: str, found: str) -> tuple[Step, ...]:
        """What each edit did to a tensor; without details if something else has changed it since.

        Args:
            tensor: its name in the files.
            found: SHA-256 of its bytes.
        """
        known = (self.now or {}).get(tensor) == found
        return tuple(
            Step(
                edit.id,
                edit.digest,
                edit.source,
                edit.tensors[tensor].before if known else None,
                self._kept(edit, tensor) if known else None,
                known=known,
            )
            for edit in self.edits
            if tensor in edit.tensors
        )

    def _kept(self, edit: CarriedEdit, tensor: str) -> bytes | None:
        file = (self.folder or Path()) / kept_name(edit.id, tensor)
        # Without the file, the edit comes off to rounding.
        return file.read_bytes() if edit.tensors[tensor].kept and file.is_file() else None

    def write(self, store: Store) -> None:
        """Write the record, but not what it keeps, to a model folder."""
        edits = [asdict(edit) for edit in self.edits]
        record = {"format": _FORMAT, "model": self.model, "edits": edits, "now": self.now or {}}
        store.write_json(_RECORD, record)

    def copy_kept(self, tensors: Callable[[str], bool], store: Store) -> None:
        """Copy what is kept for some tensors to another model folder."""
        for edit in self.edits:
            for tensor in filter(tensors, edit.tensors):
                if (kept := self._kept(edit, tensor)) is not None:
                    store.write_bytes(kept_name(edit.id, tensor), kept)


def kept_name(edit: str, tensor: str) -> str:
    """Name of the file with what subtracting Δ would not restore of a tensor."""
    return f"{FOLDER}/{edit}-{hashlib.sha256(tensor.encode()).hexdigest()[:16]}.zst"


def after(
    carried: Carried, edits: tuple[CarriedEdit, ...], steps: Mapping[str, Outcome]
) -> Carried:
    """The record of a model once some of its tensors have been rewritten.

    Args:
        carried: the record before.
        edits: the edits that the model then carries.
        steps: the outcome for each rewritten tensor.
    """
    described = tuple(_described(edit, steps) for edit in edits)
    names = {name for edit in described for name in edit.tensors}
    now = dict(carried.now or {}) | {name: outcome.digest for name, outcome in steps.items()}
    return Carried(described, {name: now[name] for name in sorted(names)})


def _described(edit: CarriedEdit, outcomes: Mapping[str, Outcome]) -> CarriedEdit:
    tensors = {name: trace for name, trace in edit.tensors.items() if name not in outcomes}
    for name, outcome in outcomes.items():
        for step in outcome.steps:
            if step.id == edit.id:
                tensors[name] = Trace(step.before, step.kept is not None)
    values = {name: getattr(edit, name) for name in ("id", "digest", "source", "applied_at", "on")}
    return CarriedEdit(**values, forced=edit.forced, tensors=dict(sorted(tensors.items())))


def read_carried(folder: Path) -> Carried:
    """Read the record of a model folder; empty if it has none.

    Raises:
        ModelError: it is damaged.
    """
    file = folder / _RECORD
    if not file.is_file():
        return Carried(folder=folder)
    try:
        record = _RECORDS.validate_json(file.read_bytes())
        if record.format != _FORMAT:
            raise ValueError(f"its format is {record.format!r}, not {_FORMAT}")
        return Carried(tuple(record.edits), record.now, record.model, folder)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{file} is not a record of edits ({reason}); copy the model again, or delete the "
            "file: an edit then comes off only where the weights hold exactly W + Δ"
        ) from None


_RECORDS = TypeAdapter(_Record)
