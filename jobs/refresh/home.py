"""The home of a model that is kept up to date: versions side by side, and which one is in use.

    CURRENT                     the version in use, as JSON, for people and programs
    promotions/000012.json      every move of CURRENT; the highest number counts
    versions/0007/              a night: its run folder, ledger, changes and report
    retractions/000003.json     facts taken back, or given back
    lease/                      one refresh at a time
    targets/, measurements/, second_moments/, context_templates.json    what nights share

CURRENT moves by compare-and-swap: who has read promotion N creates N + 1, and of several that try
the storage lets one succeed. The file ``CURRENT`` is written after that, from the highest
promotion; whoever dies in between leaves a file that names an earlier version, whole and kept, and
the next to come puts it right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, TypeVar

import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from pipeline.errors import FactDumpError, RunFolderError, StorageError
from pipeline.run_folder import MODEL, files_made, has_lease, leases
from pipeline.storage import Store, json_bytes, last_number, now_text, numbered
from pmet.errors import PMETError

CURRENT, PROMOTIONS, VERSIONS, RETRACTIONS = "CURRENT", "promotions", "versions", "retractions"
TEMPLATES = "context_templates.json"
NIGHT, LEDGER, PRUNED = "night.json", "ledger.parquet", "pruned.json"
REQUESTS, SET_ASIDE = "requests.parquet", "set_aside.parquet"
REPORT, CHANGES = "night.html", "changes.parquet"
NIGHT_FILES = (NIGHT, LEDGER, PRUNED, REQUESTS, SET_ASIDE, REPORT, CHANGES)
"""What a night writes into its version's folder, beside what the run in it writes."""
_LARGE = (f"{MODEL}/", "delta/", "targets/", "second_moments/", "records/", REQUESTS)
_TRIES = 16

Mover = Literal["refresh", "rollback"]


class CurrentMovedError(PMETError):
    """CURRENT was moved by somebody else in the meantime; it was left where they put it."""


@dataclass(frozen=True)
class Promotion:
    """One move of CURRENT.

    Attributes:
        promotion: its number, from 1.
        version: that is in use since.
        model: its checkpoint, relative to the home.
        at: when, ISO 8601 in UTC.
        by: ``refresh`` or ``rollback``.
    """

    promotion: int
    version: int
    model: str
    at: str
    by: Mover


@dataclass(frozen=True)
class Retraction:
    """A fact taken back, or given back.

    Attributes:
        subject: of the fact.
        relation: of the fact.
        action: ``retract`` or ``restore``.
        reason: in the words of who did it; may be empty.
        at: when, ISO 8601 in UTC.
    """

    subject: str
    relation: str
    action: Literal["retract", "restore"]
    reason: str
    at: str


Record = TypeVar("Record", Promotion, Retraction)


class Home:
    """The folder.

    Attributes:
        store: its files.
    """

    def __init__(self, url: str) -> None:
        self.store = Store(url)

    def refuse_foreign(self) -> None:
        """Refuse a folder that holds files and in which no refresh was ever begun.

        Raises:
            RunFolderError: naming some of what it holds.
        """
        if (names := self.store.entries()) and not has_lease(self.store):
            raise RunFolderError(
                f"home: {self.store.url} holds {', '.join(names[:3])} and is no home of versions; "
                "name a folder that is empty or does not exist"
            )

    @classmethod
    def open(cls, url: str) -> Home:
        """A home that there is.

        Raises:
            RunFolderError: no night was ever begun there.
        """
        home = cls(url)
        if not home.versions():
            raise RunFolderError(
                f"{home.store.url} is no home of versions: it has no {VERSIONS}/; name the home of "
                "a refresh file"
            )
        return home

    def current(self) -> Promotion | None:
        """The version in use; None before the first promotion."""
        return self._promotion(last_number(self.store, PROMOTIONS))

    def promote(self, version: int, *, expected: int, by: Mover) -> Promotion:
        """Put a version to use.

        Args:
            version: its number.
            expected: number of the promotion that is to be followed; 0 for none.
            by: who does it.

        Raises:
            CurrentMovedError: another promotion has followed it.
            StorageError: the home cannot be written.
        """
        promotion = Promotion(expected + 1, version, path(version, MODEL), now_text(), by)
        name = numbered(PROMOTIONS, promotion.promotion)
        data = json_bytes(asdict(promotion))
        # A request that was answered too late and sent again finds its own file.
        if not (self.store.create_bytes(name, data) or self.store.read_bytes(name) == data):
            raise CurrentMovedError(
                f"{self.store.join(CURRENT)} was moved in the meantime, to version "
                f"{self.store.read_json(name)['version']}; version {version} is kept and not in "
                "use: run the refresh again, or pmet rollback --to it"
            )
        self.write_current()
        return promotion

    def write_current(self) -> None:
        """Make the file ``CURRENT`` say what the highest promotion says."""
        while (promotion := self.current()) is not None:
            data = json_bytes(asdict(promotion))
            if not self.store.exists(CURRENT) or self.store.read_bytes(CURRENT) != data:
                self.store.write_bytes(CURRENT, data)
            if last_number(self.store, PROMOTIONS) == promotion.promotion:
                return

    def rollback(self, to: int | None = None) -> Promotion:
        """Put an earlier version to use, at once, also while a refresh is under way.

        Args:
            to: its number; None: the one that was in use before the current one.

        Raises:
            RunFolderError: there is no such version, or it was not kept.
            CurrentMovedError: CURRENT was moved in the meantime.
        """
        current = self.current()
        if current is None:
            raise RunFolderError(f"nothing was ever promoted at {self.store.url}")
        version = self._before(current) if to is None else to
        self._refuse_unless_kept(version)
        promotion = self.promote(version, expected=current.promotion, by="rollback")
        # It may have been pruned just now: who prunes marks first, and then looks what is in use.
        self._refuse_unless_kept(version)
        return promotion

    def versions(self) -> list[int]:
        """The numbers of all nights, ascending, also of those that came to nothing."""
        names = self.store.list(VERSIONS)
        parts = {PurePosixPath(name).parts[1] for name in names}
        return sorted(int(part) for part in parts if part.isdecimal())

    def night(self, version: int) -> dict[str, Any]:
        """What ``night.json`` says of a version; empty where it says nothing."""
        name = path(version, NIGHT)
        return dict(self.store.read_json(name)) if self.store.exists(name) else {}

    def is_kept(self, version: int) -> bool:
        """Whether a version can be put to use."""
        return (
            not self.store.exists(path(version, PRUNED))
            and self.night(version).get("model") is not None
            and self.store.exists(path(version, MODEL, "config.json"))
        )

    def scores(self, version: int | None) -> dict[str, Any]:
        """The figures of a version's model; empty where nothing was measured."""
        night = {} if version is None else self.night(version)
        return dict((night.get("metrics") or {}).get("after", {}))

    def prune(self, keep: int) -> list[int]:
        """Delete the models of old versions; returns their numbers.

        Kept are the version in use, the ``keep`` last that were promoted, and what gates held back
        since the first of these. Of the others the ledger, the figures and the report stay.
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
        """Delete all that a night and its run have written of a version; other files stay."""
        self._delete(version, lambda _: True)

    def _delete(self, version: int, chosen: Callable[[str], bool]) -> None:
        folder = Store(self.store.join(path(version)))
        written = [name for name in folder.list() if name in NIGHT_FILES]
        names = [*files_made(folder), *written, *leases(folder)]
        folder.delete_files(name for name in names if chosen(name))

    def retract(
        self, subject: str, relation: str, action: Literal["retract", "restore"], reason: str = ""
    ) -> Retraction:
        """Take a fact back, or give it back; the next refresh does what is said last.

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
            f"{self.store.join(RETRACTIONS)} is being written by many at once; try again"
        )

    def refuse_unknown(self, subject: str, relation: str, action: str) -> None:
        """Refuse a fact that is not in the ledger, or of which this has been said already.

        Raises:
            FactDumpError: naming facts that are like it.
        """
        said = self.retractions().get((relation, subject))
        if said is not None and said.action == action:
            raise FactDumpError(
                f"{subject!r}, {relation!r}: {action} was said at {said.at} already"
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
        """What was said last of each fact of which something was said, by relation and subject."""
        found: dict[tuple[str, str], Retraction] = {}
        for name in self.store.list(RETRACTIONS):
            retraction = self._record(name, Retraction)
            found[retraction.relation, retraction.subject] = retraction
        return found

    def _promotion(self, number: int) -> Promotion | None:
        name = numbered(PROMOTIONS, number)
        return self._record(name, Promotion) if self.store.exists(name) else None

    def _record(self, name: str, kind: type[Record]) -> Record:
        """A record of the home, whose fields are of the types that they were written with.

        Raises:
            RunFolderError: they are not, or one is missing.
        """
        try:
            return TypeAdapter(kind).validate_python(self.store.read_json(name))
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or 'it'}: {item['msg']}"
                for item in error.errors(include_url=False)
            )
            raise RunFolderError(
                f"{self.store.join(name)} is not a {kind.__name__.lower()} as this command writes "
                f"them ({wrong}); restore the file from a copy, or delete it"
            ) from None

    def _before(self, current: Promotion) -> int:
        """The version that was in use before the current one."""
        for number in range(current.promotion - 1, 0, -1):
            earlier = self._promotion(number)
            if earlier and earlier.version != current.version and self.is_kept(earlier.version):
                return earlier.version
        raise RunFolderError(
            f"there is no version to go back to from version {current.version} at "
            f"{self.store.url}; kept are {self._kept()}"
        )

    def _refuse_unless_kept(self, version: int) -> None:
        if not self.is_kept(version):
            raise RunFolderError(
                f"there is no model of version {version} at {self.store.url}; kept are "
                f"{self._kept()}"
            )

    def _kept(self) -> str:
        return ", ".join(map(str, filter(self.is_kept, self.versions()))) or "none"


def path(version: int, *names: str) -> str:
    """The name of a version's folder in the home, or of something in it."""
    return "/".join((VERSIONS, f"{version:04d}", *names))
