"""Checks a fact dump or a request table: findings with counts and first examples."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.facts.dump.files import FACT, Dump, open_dump
from jobs.facts.dump.problems import CONTROLS, FINE, PROBLEMS, Level, RowProblem
from jobs.facts.dump.rows import JudgedRows
from jobs.facts.dump.survey import Side, Survey, survey
from jobs.facts.sharing import Keys, of_requests
from jobs.facts.templates import Templates
from pipeline.data import (
    REQUIRED_COLUMNS,
    Rejection,
    RejectionCode,
    RequestTable,
    read_requests,
    readable,
)
from pipeline.errors import RequestTableError, StorageError
from pipeline.storage import expand, parquet_footer

EXAMPLES = 5
_LONGEST_SHOWN = 80
"""Maximum length, in characters, of a text that a finding shows."""


@dataclass(frozen=True)
class Example:
    """A row that a finding is about.

    Attributes:
        row: row number over all files, from 0; None if the finding is about a file.
        text: the row's content in brief; empty if the reason contains it.
        reason: what is wrong with it, and what to do.
    """

    row: int | None
    text: str
    reason: str


@dataclass(frozen=True)
class Finding:
    """One kind of problem.

    Attributes:
        kind: name of the problem.
        level: ``error``, ``warning`` or ``note`` (see ``problems``).
        count: number of rows or files.
        examples: the first occurrences.
    """

    kind: str
    level: Level
    count: int
    examples: list[Example]


@dataclass(frozen=True)
class CheckResult:
    """What a check found.

    Attributes:
        kind: ``fact dump`` or ``edit requests``.
        rows: number of rows.
        usable: number of rows that can be converted or edited.
        damaged: number of files that cannot be read.
        findings: errors first, then warnings, then notes.
    """

    kind: str
    rows: int
    usable: int
    damaged: int
    findings: list[Finding]

    @property
    def is_usable(self) -> bool:
        """Whether all files can be read and at least one row can be used."""
        return self.usable > 0 and not self.damaged

    @property
    def is_clean(self) -> bool:
        """Whether there are no errors and no warnings."""
        return not any(finding.level != "note" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return asdict(self) | {"is_usable": self.is_usable, "is_clean": self.is_clean}


def check(
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    templates: Templates | None = None,
    as_of: datetime | None = None,
) -> CheckResult:
    """Check ``source``, either a fact dump or a request table.

    Args:
        source: paths, URLs, globs or folders of Parquet.
        columns: the dump's column names by ours, as for ``open_dump``.
        templates: if given, relations without a template are reported too.
        as_of: facts whose ``valid_until`` is at or before this time have expired; now if None.

    Raises:
        FactDumpError: a readable file lacks a required column.
        RequestTableError: no file was found.
        StorageError: the storage cannot be listed.
    """
    if not columns and _holds_requests(source):
        try:
            return check_requests(read_requests(source))
        except RequestTableError as error:
            return CheckResult("edit requests", 0, 0, 1, [_damage([str(error)])])
    dump = open_dump(source, columns, keep_damaged=True)
    return check_dump(dump, templates=templates, as_of=as_of)


def check_dump(
    dump: Dump, *, templates: Templates | None = None, as_of: datetime | None = None
) -> CheckResult:
    """Check every row of a dump by itself and against the others.

    Args:
        dump: the dump; open it with ``keep_damaged`` to report damaged files as findings.
        templates: if given, relations without a template are reported too.
        as_of: facts whose ``valid_until`` is at or before this time have expired; now if None.
    """
    damaged: list[str] = []
    read = np.zeros(dump.rows, bool)
    keys = None if templates is None else Keys(dump.rows, templates)

    def note(judged: JudgedRows) -> None:
        read[judged.first : judged.first + len(judged.codes)] = True
        if keys is not None:
            keys.add(judged.facts)

    relations = None if templates is None else templates.keys()
    found = survey(Side(dump, as_of or datetime.now(UTC), relations, damaged, note))
    kinds = [
        (PROBLEMS[code], np.flatnonzero(found.codes == code))
        for code in np.unique(found.codes)
        if code != FINE
    ]
    kinds.append((CONTROLS, found.controls[found.codes[found.controls] == FINE]))
    fine = np.flatnonzero((found.codes == FINE) & read)
    shared = [] if keys is None else keys.groups(fine)
    firsts = np.array([group[0] for group in shared[:EXAMPLES]], np.int64)
    texts = _texts(dump, [*(rows[:EXAMPLES] for _, rows in kinds), firsts])
    findings = [_of_rows(problem, rows, texts, found) for problem, rows in kinds if len(rows)]
    if damaged := dump.damaged + damaged:
        findings.append(_damage(damaged))
    if shared:
        findings.append(_shared([(int(g[0]), texts.get(int(g[0]), ""), len(g)) for g in shared]))
    return CheckResult("fact dump", dump.rows, len(fine), len(damaged), _in_order(findings))


def check_requests(table: RequestTable) -> CheckResult:
    """Report the rejected rows of a request table, grouped by reason."""
    by_kind: dict[str, list[Rejection]] = defaultdict(list)
    for rejection in table.rejected:
        by_kind[reason_kind(rejection.code, rejection.reason)].append(rejection)
    findings = [
        Finding(
            kind,
            "warning" if kind == "duplicate" else "error",
            len(rejected),
            [Example(r.row, "", r.reason) for r in rejected[:EXAMPLES]],
        )
        for kind, rejected in by_kind.items()
    ]
    requests, rows = table.requests, table.rows
    if groups := of_requests(requests):
        findings.append(
            _shared(
                [(rows[g[0]], f"subject {shown(requests[g[0]].subject)}", len(g)) for g in groups]
            )
        )
    return CheckResult("edit requests", len(table.table), len(requests), 0, _in_order(findings))


def _holds_requests(source: str) -> bool:
    """Whether the first readable file has the columns of edit requests."""
    for file in expand(source, deep=True):
        with suppress(StorageError):
            names = set(parquet_footer(file)[0].names)
            return names >= set(REQUIRED_COLUMNS)
    return False


def reason_kind(code: RejectionCode, reason: str) -> str:
    """Return the code of a reason, or its text without the parts specific to one row."""
    if code in (RejectionCode.DUPLICATE, RejectionCode.CONTRADICTION):
        return code
    what = reason.partition(";")[0]
    # Replace text in either of Python's quotes, then numbers.
    what = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "…", what)
    return re.sub(r"\d+", "N", what)


def _of_rows(
    problem: RowProblem, rows: np.ndarray, texts: Mapping[int, str], found: Survey
) -> Finding:
    first = rows[:EXAMPLES]
    reasons = [problem.reason] * len(first)
    if problem is not CONTROLS:
        reasons = found.reasons(first).to_pylist()
    examples = [
        Example(int(row), texts.get(int(row), ""), reason)
        for row, reason in zip(first, reasons, strict=True)
    ]
    return Finding(problem.kind, problem.level, len(rows), examples)


def _shared(groups: Sequence[tuple[int, str, int]]) -> Finding:
    """The finding of groups of facts that share a key: first row, its text, number of facts."""
    examples = [
        Example(
            row,
            text,
            f"{count} facts of this subject are stated after the same text; they get one target, "
            "and the more there are, the fewer are learned (docs/method.md)",
        )
        for row, text, count in groups[:EXAMPLES]
    ]
    return Finding("shared key", "note", sum(count for _, _, count in groups), examples)


def _damage(messages: Sequence[str]) -> Finding:
    examples = [Example(None, "", message) for message in messages[:EXAMPLES]]
    return Finding("damaged file", "error", len(messages), examples)


def _in_order(findings: list[Finding]) -> list[Finding]:
    levels = ("error", "warning", "note")
    return sorted(findings, key=lambda finding: levels.index(finding.level))


def _texts(dump: Dump, rows: Sequence[np.ndarray]) -> dict[int, str]:
    """Return the content of some rows of a dump, in brief."""
    wanted = np.unique(np.concatenate([np.zeros(0, np.int64), *rows]))
    files = [
        file
        for file in dump.files
        if ((wanted >= file.first) & (wanted < file.first + file.rows)).any()
    ]
    texts: dict[int, str] = {}
    for batch in Dump(files).batches(FACT, damaged=[]):
        here = wanted[(wanted >= batch.first) & (wanted < batch.first + len(batch.table))]
        if len(here):
            table = readable(batch.table.take(pa.array(here - batch.first)))
            texts |= zip(here.tolist(), map(_text, table.to_pylist()), strict=True)
        if len(texts) == len(wanted):
            break
    return texts


def _text(row: Mapping[str, Any]) -> str:
    return " · ".join(shown(value) for value in row.values())


def shown(value: Any) -> str:
    """Return a value for the terminal: invisible characters escaped, long text truncated."""
    if value is None:
        return "null"
    # Python's repr without the quotes.
    text = repr(value)[1:-1] if isinstance(value, str) else repr(value)
    text = text or "''"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 1]}…"
