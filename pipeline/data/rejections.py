"""Rows that are not edited, and why: a code for programs, a sentence for people."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from pipeline.data.rows import Row


class RejectionCode(StrEnum):
    """Why a row is not edited; these values appear in column ``code`` of ``rejected.parquet``."""

    INVALID = "invalid"
    """A value is missing or invalid for a request."""
    DUPLICATE = "duplicate"
    """It repeats an earlier row."""
    CONTRADICTION = "contradiction"
    """Another row has the same prompt and subject, but another target."""
    UNFIT = "unfit"
    """The model cannot read it: it is too long, or has no tokens where some are needed."""
    NO_TARGET = "no-target"
    """The optimisation found no target."""


class Reason(NamedTuple):
    """Why a row is not edited.

    Attributes:
        code: the reason for programs.
        text: the reason for people: what is wrong and what to do.
    """

    code: RejectionCode
    text: str


@dataclass(frozen=True)
class Rejection:
    """A row that is not edited, and why.

    row: number of the row over all the input files, from 0.
        row: number of the row over all the input files, from 0.
        reason: what is wrong with it, for people.
        code: the same, for programs.
    """

    row: Row
    reason: str
    code: RejectionCode
