"""The home folder of a refreshed model: its versions, and which one is in use.

    CURRENT                     the version in use, as JSON, for people and programs
    promotions/000012.json      every move of CURRENT; the highest number counts
    versions/0007/              a refresh: its run folder, ledger, changes and report
    retractions/000003.json     facts retracted or restored
    lease/                      allows one refresh at a time
    targets/, measurements/, second_moments/, context_templates.json    shared by all versions

CURRENT moves by compare-and-swap: a process that has read promotion N creates N + 1, and if several
try, the storage lets only one succeed. The file ``CURRENT`` is written afterwards from the highest
promotion. A process that dies in between leaves a file that names an earlier version, which is
complete and still kept; the next process corrects it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, TypeVar

import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from pipeline.errors import FactDumpError, RunFolderError, StorageError
from pipeline.run_folder import MODEL, STATUS, files_made, has_lease, leases
from pipeline.storage import Store, json_bytes, last_number, now_text, numbered
from pmet.errors import PMETError

CURRENT, PROMOTIONS, VERSIONS, RETRACTIONS = "CURRENT", "promotions", "versions", "retractions"
TEMPLATES = "context_templates.json"
NIGHT, LEDGER, PRUNED = "night.json", "ledger.parquet", "pruned.json"
REQUESTS, SET_ASIDE = "requests.parquet", "set_aside.parquet"
REPORT, CHANGES = "night.html", "changes.parquet"
NIGHT_FILES = (NIGHT, LEDGER, PRUNED, REQUESTS, SET_ASIDE, REPORT, CHANGES)
"""Files that a refresh writes into its version's folder, besides those of the run there."""
_LARGE = (f"{MODEL}/", "delta/", "targets/", "second_moments/", "records/", REQUESTS)
_TRIES = 16

Mover = Literal["refresh", "rollback"]


class CurrentMovedError(PMETError):
    """Another process moved CURRENT in the meantime; it was left as that process set it."""


@dataclass(frozen=True)
class Promotion:
    """One move of CURRENT.

    Attributes:
        promotion: its number, from 1.
        version: the version put into use.
        model: its checkpoint, relative to the home.
        at: time of the move, ISO 8601 in UTC.
        by: ``refresh`` or ``rollback``.
    """

    promotion: int
    version: int
    model: str
    at: str
    by: Mover


@dataclass(frozen=True)
class Retraction:
    """The retraction or restoration of a fact.

    Attributes:
        subject: subject of the fact.
        relation: relation of the fact.
        action: ``retract`` or ``restore``.
        reason: the user's reason; may be empty.
        at: time of the action, ISO 8601 in UTC.
    """

    subject: str
    relation: str
    action: Literal["retract", "restore"]
    reason: str
    at: str


Record = TypeVar("Record", Promotion, Retraction)


class Home:
    """A home folder.

    Attributes:
        store: its files.
    """

    def __init__(self, url: str) -> None:
        self.store = Store(url)

    def refuse_foreign(self) -> None:
        """Refuse a folder that holds files but in which no refresh was ever started.

        Raises:
            RunFolderError: the folder is not a home; the message names some of its files.
        """
        if (names := self.store.entries()) and not has_lease(self.store):
            raise RunFolderError(
                f"home: {self.store.url} holds {', '.join(names[:3])} and is not a home folder; "
                "name a folder that is empty or does not exist"
            )

    @classmethod
    def open(cls, url: str) -> Home:
        """Open an existing home.

        Raises:
            RunFolderError: no refresh was ever started there.
        """
        home = cls(url)
        if not home.versions():
            raise RunFolderError(
                f"{home.store.url} is not a home folder: it has no {VERSIONS}/; name the home of "
                "a refresh file"
            )
        return home

    def current(self) -> Promotion | None:
        """The version in use; None before the first promotion."""
        return self._promotion(last_number(self.store, PROMOTIONS))

    def promote(self, version: int, *, expected: int, by: Mover) -> Promotion:
        """Put a version into use.

        Args:
            version: number of the version.
            expected: number of the latest promotion; 0 if there is none.
            by: what moves CURRENT.

        Raises:
            CurrentMovedError: a later promotion exists.
            StorageError: the home cannot be written.
        """
        promotion = Promotion(expected + 1, version, path(version, MODEL), now_text(), by)
        name = numbered(PROMOTIONS, promotion.promotion)
        data = json_bytes(asdict(promotion))
        # A request that timed out and was retried finds its own file.
        if not (self.store.create_bytes(name, data) or self.store.read_bytes(name) == data):
            raise CurrentMovedError(
                f"{self.store.join(CURRENT)} was moved in the meantime, to version "
                f"{self.store.read_json(name)['version']}; version {version} is kept but not in "
                "use: run the refresh again, or pmet rollback --to it"
            )
        self.write_current()
        return promotion

    def write_current(self) -> None:
        """Make the file ``CURRENT`` match the highest promotion."""
        while (promotion := self.current()) is not None:
            data = json_bytes(asdict(promotion))
            if not self.store.exists(CURRENT) or self.store.read_bytes(CURRENT) != data:
                self.store.write_bytes(CURRENT, data)
            if last_number(self.store, PROMOTIONS) == promotion.promotion:
                return

    def rollback(self, to: int | None = None) -> Promotion:
        """Put an earlier version into use immediately, even while a refresh is running.

        Args:
            to: number of the version; None: the one in use before the current one.

        Raises:
            RunFolderError: there is no such version, or its model was deleted.
            CurrentMovedError: CURRENT was moved in the meantime.
        """
        current = self.current()
        if current is None:
            raise RunFolderError(f"no version at {self.store.url} was ever promoted")
        version = self._before(current) if to is None else to
        self._refuse_unless_kept(version)
        promotion = self.promote(version, expected=current.promotion, by="rollback")
        # It may have just been pruned: pruning marks a version first, then checks what is in use.
        self._refuse_unless_kept(version)
        return promotion

    def versions(self) -> list[int]:
        """Return the numbers of all versions, ascending, including failed ones."""
        names = self.store.list(VERSIONS)
        parts = {PurePosixPath(name).parts[1] for name in names}
        return sorted(int(part) for part in parts if part.isdecimal())

    def night(self, version: int) -> dict[str, Any]:
        """Return the content of a version's ``night.json``; empty if there is none."""
        name = path(version, NIGHT)
        return dict(self.store.read_json(name)) if self.store.exists(name) else {}

    def is_kept(self, version: int) -> bool:
        """Whether a version can be put into use."""
        return (
            not self.store.exists(path(version, PRUNED))
            and self.night(version).get("model") is not None
            and self.store.exists(path(version, MODEL, "config.json"))
        )

    def scores(self, version: int | None) -> dict[str, Any]:
        """Return the figures of a version's model; empty if none were measured."""
        night = {} if version is None else self.night(version)
        return dict((night.get("metrics") or {}).get("after", {}))

    def prune(self, keep: int) -> list[int]:
        """Delete the models of old versions; return the numbers of those versions.

        It keeps the version in use, the last ``keep`` promoted versions, and those held back by
        gates since the first of these. Pruned versions keep their ledger, figures and report.
        """
        numbers = range(1, 1 + last_number(self.store, PROMOTIONS))
        promoted = [p.version for n in numbers if (p := self._promotion(n)) is not None]
        if not promoted:
            return []
        recent = sorted(set(promoted))[-keep:]
        kept = {*recent, promoted[-1]}
        pruned = []
        for version in self.versions():
            held = version not in promoted and version > recent[0]
            if version in kept or held or self.store.exists(path(version, PRUNED)):
                continue
            self.store.write_json(path(version, PRUNED), {"at": now_text()})
            current = self.current()
            if current is not None and current.version == version:
                self.store.delete(path(version, PRUNED))
                continue
            self._delete(version, lambda name: name.startswith(_LARGE))
            pruned.append(version)
        return pruned

    def discard(self, version: int) -> None:
        """Delete all files that a refresh and its run wrote for a version; keep other files."""
        self._delete(version, lambda _: True)

    def _delete(self, version: int, chosen: Callable[[str], bool]) -> None:
        folder = Store(self.store.join(path(version)))
        written = [name for name in folder.list() if name in NIGHT_FILES]
        names = [*files_made(folder), *written, *leases(folder)]
        folder.delete_files(name for name in names if chosen(name))

    def retract(
        self, subject: str, relation: str, action: Literal["retract", "restore"], reason: str = ""
    ) -> Retraction:
        """Retract or restore a fact; the next refresh follows the latest action.

        Raises:
            StorageError: the home cannot be written.
        """
        retraction = Retraction(subject, relation, action, reason, now_text())
        data = json_bytes(asdict(retraction))
        for _ in range(_TRIES):
            number = last_number(self.store, RETRACTIONS) + 1
            if self.store.create_bytes(numbered(RETRACTIONS, number), data):
                return retraction
        raise StorageError(
            f"{self.store.join(RETRACTIONS)}: several processes are writing at once; try again"
        )

    def refuse_unknown(self, subject: str, relation: str, action: str) -> None:
        """Refuse a fact that is not in the ledger or already has this action.

        Raises:
            FactDumpError: the fact is refused; the message names similar facts.
        """
        said = self.retractions().get((relation, subject))
        if said is not None and said.action == action:
            raise FactDumpError(
                f"{subject!r}, {relation!r}: {action} was already recorded at {said.at}"
            )
        if said is not None:
            return
        current = self.current()
        ledger = pa.table({"relation": [], "subject": []})
        if current is not None:
            ledger = self.store.read_table(path(current.version, LEDGER), ["relation", "subject"])
        facts = list(zip(*(column.to_pylist() for column in ledger.columns), strict=True))
        if (relation, subject) not in facts:
            like = [f"{s!r}, {r!r}" for r, s in facts if subject.lower() in s.lower()][:3]
            beside = f"; there is {'; '.join(like)}" if like else ""
            raise FactDumpError(
                f"the ledger of {self.store.url} has no fact {subject!r}, {relation!r}{beside}: "
                "write subject and relation as the dump does"
            )

    def retractions(self) -> dict[tuple[str, str], Retraction]:
        """Return the latest retraction or restoration of each fact, by relation and subject."""
        found: dict[tuple[str, str], Retraction] = {}
        for name in self.store.list(RETRACTIONS):
            retraction = self._record(name, Retraction)
            found[retraction.relation, retraction.subject] = retraction
        return found

    def _promotion(self, number: int) -> Promotion | None:
        name = numbered(PROMOTIONS, number)
        return self._record(name, Promotion) if self.store.exists(name) else None

    def _record(self, name: str, kind: type[Record]) -> Record:
        """Read a record of the home and validate its fields.

        Raises:
            RunFolderError: a field is missing or has the wrong type.
        """
        try:
            return TypeAdapter(kind).validate_python(self.store.read_json(name))
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or 'it'}: {item['msg']}"
                for item in error.errors(include_url=False)
            )
            raise RunFolderError(
                f"{self.store.join(name)} is not a valid {kind.__name__.lower()} record "
                f"({wrong}); restore the file from a copy, or delete it"
            ) from None

    def _before(self, current: Promotion) -> int:
        """Return the version that was in use before the current one."""
        for number in range(current.promotion - 1, 0, -1):
            earlier = self._promotion(number)
            if earlier and earlier.version != current.version and self.is_kept(earlier.version):
                return earlier.version
        raise RunFolderError(
            f"there is no version before version {current.version} to roll back to at "
            f"{self.store.url}; kept versions: {self._kept()}"
        )

    def _refuse_unless_kept(self, version: int) -> None:
        if not self.is_kept(version):
            raise RunFolderError(
                f"{self.store.url} has no model of version {version}; kept versions: {self._kept()}"
            )

    def _kept(self) -> str:
        return ", ".join(map(str, filter(self.is_kept, self.versions()))) or "none"


def model_in_use(place: str) -> str | None:
    """The run folder of the version in use, if a place is a home or its file ``CURRENT``.

    Args:
        place: path or URL.

    Raises:
        RunFolderError: no version has been promoted yet, or the one in use was not edited.
    """
    folder, _, name = place.rstrip("/").rpartition("/")
    home = Home(folder or "." if name == CURRENT else place)
    if home.store.exists(STATUS) or not home.store.exists(VERSIONS):
        return None
    current = home.current()
    if current is None:
        raise RunFolderError(f"no version in {home.store.url} has been promoted yet")
    if not home.store.exists(path(current.version, STATUS)):
        raise RunFolderError(
            f"version {current.version}, which is in use at {home.store.url}, is the base model: "
            "its refresh found no facts to edit, and there is no run to push"
        )
    return home.store.join(path(current.version))


def path(version: int, *names: str) -> str:
    """Return the name of a version's folder in the home, or of a file in it."""
    return "/".join((VERSIONS, f"{version:04d}", *names))
