"""What can be wrong with a row of a dump: one list, whose places are the codes of rows.

A row has the first problem that is found, and is set aside. Levels say what to think of it: an
*error* is to be mended; a *warning* loses nothing, but should be looked at; a *note* is what a good
dump may hold, a fact that has run out or one that a newer row replaces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "note"]

MAX_CHARACTERS = 1_000
"""Of a subject, relation or object: names, not texts."""


@dataclass(frozen=True)
class Problem:
    """A kind of problem.

    Attributes:
        kind: what it is, in a few words.
        level: how bad it is.
        reason: why the row is set aside and what to do; ``{row}`` stands for another row.
    """

    kind: str
    level: Level
    reason: str


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
"""Of rows that are fine otherwise, so without a code."""

FINE = 0
FIRST_TIME = 1 + len(_TEXTS) * len(_TEXT_PROBLEMS)
NO_TEMPLATE = FIRST_TIME + len(_TIMES)
EXPIRED, DUPLICATE, CONTRADICTION, REPLACED, UNCHANGED = range(NO_TEMPLATE + 1, NO_TEMPLATE + 6)
NAMES_ANOTHER_ROW = (DUPLICATE, CONTRADICTION, REPLACED)


def text_code(name: str, problem: int) -> int:
    """The code of a text column's problem, one of ``NULL`` to ``TOO_LONG``."""
    return 1 + _TEXTS.index(name) * len(_TEXT_PROBLEMS) + problem


def time_code(name: str) -> int:
    """The code of a column of times that holds something else."""
    return FIRST_TIME + _TIMES.index(name)


def is_contradiction(reason: str) -> bool:
    """Whether a row's reason is that it contradicts another row."""
    return reason.startswith(PROBLEMS[CONTRADICTION].reason.partition("{row}")[0])
