"""The problems that a row of a dump can have: one list, whose indices are the codes of rows.

A row gets the first problem found and is rejected. The level says how serious it is: an *error*
needs fixing; a *warning* loses no information but needs a look; a *note* is normal in a good dump,
such as an expired fact or one that a newer row replaces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "note"]

MAX_CHARACTERS = 1_000
"""Maximum length of a subject, relation or object: these are names, not texts."""


@dataclass(frozen=True)
class Problem:
    """A kind of problem.

    Attributes:
        kind: short name.
        level: severity.
        reason: why the row is rejected and what to do; ``{row}`` stands for another row.
    """

    kind: str
    level: Level
    reason: str

    @property
    def code(self) -> str:
        """The kind as programs read it, in the column ``code`` of rejected rows."""
        return self.kind.replace(" ", "-").lower()


_TEXT_PROBLEMS = (
    ("null {}", "{} is null; give text"),
    ("{} of a wrong type", "{} is not text; store the column as text"),
    ("{} is not UTF-8", "{} is not UTF-8; write it as UTF-8"),
    ("empty {}", "{} is empty; give text that is more than white space"),
    (
        "over-long {}",
        f"{{}} has more than {MAX_CHARACTERS:,} characters; a fact is made of names, not of texts",
    ),
)
NULL, WRONG_TYPE, NOT_UTF8, EMPTY, TOO_LONG = range(len(_TEXT_PROBLEMS))
_TEXTS = ("subject", "relation", "object", "target_true")
_TIMES = ("updated_at", "valid_until")

PROBLEMS = (
    Problem("fine", "note", ""),
    *(
        Problem(kind.format(name), "error", reason.format(name))
        for name in _TEXTS
        for kind, reason in _TEXT_PROBLEMS
    ),
    *(
        Problem(
            f"{name} is not a time",
            "error",
            f"{name} is not a time; store a timestamp, a date or ISO 8601 text",
        )
        for name in _TIMES
    ),
    Problem("relation without template", "error", "the relation has no template; write one for it"),
    Problem("no longer valid", "note", "valid_until is past: the fact no longer holds"),
    Problem(
        "duplicate",
        "warning",
        "repeats row {row}: same subject, relation and object; keep one",
    ),
    Problem(
        "contradiction",
        "error",
        "contradicts row {row}: same subject and relation, another object, and updated_at does "
        "not decide; keep one",
    ),
    Problem("replaced by a newer row", "note", "replaced by row {row}, whose updated_at is later"),
    Problem("unchanged", "note", "the previous dump holds the same fact"),
)
CONTROLS = Problem(
    "control character",
    "warning",
    "holds a control character, such as a tab or a line break; the row is used as it is",
)
"""A problem of rows that are used anyway, so it has no code."""

FINE = 0
FIRST_TIME = 1 + len(_TEXTS) * len(_TEXT_PROBLEMS)
NO_TEMPLATE = FIRST_TIME + len(_TIMES)
EXPIRED, DUPLICATE, CONTRADICTION, REPLACED, UNCHANGED = range(NO_TEMPLATE + 1, NO_TEMPLATE + 6)
NAMES_ANOTHER_ROW = (DUPLICATE, CONTRADICTION, REPLACED)


def text_code(name: str, problem: int) -> int:
    """Return the code of a text column's problem, one of ``NULL`` to ``TOO_LONG``."""
    return 1 + _TEXTS.index(name) * len(_TEXT_PROBLEMS) + problem


def time_code(name: str) -> int:
    """Return the code for a time column with a value that is not a time."""
    return FIRST_TIME + _TIMES.index(name)
