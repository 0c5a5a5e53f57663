"""Refresh files: where the facts come from, where the versions go, and how a night is done."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Annotated

from pydantic import Field

from jobs.schedule.records import TimeZone
from pipeline.job import (
    CountOrNull,
    EditSettings,
    FractionOrNull,
    Maximum,
    Paths,
    PathsOrNull,
    Section,
    Text,
    allowed,
    load_settings,
)

DATE = "{date}"


_Name = Annotated[str, Field(min_length=1)]
Columns = Annotated[dict[_Name, _Name], allowed("our names of columns with the dump's names")]
Versions = Annotated[Annotated[int, Field(ge=1)], allowed("a whole number, 1 or more")]
Zone = Annotated[TimeZone, allowed("a time zone, such as UTC or Europe/Berlin")]


class _Nights(Section):
    model: Text = Field(description="The pristine base model: a path, a URL or a hub id.")
    facts: Paths = Field(
        description="The fact dump: paths, globs or folders; {date} stands for the night's date."
    )
    templates: Text = Field(description="YAML file that puts relations into words.")
    home: Text = Field(description="Folder of the versions, their ledgers and what they share.")
    baseline: PathsOrNull = Field(
        default=None,
        description="The fact dump that the base model knows: its facts are not told again, and "
        "its objects are the true targets; null: all facts are told.",
    )
    columns: Columns = Field(
        default={}, description="For dumps that name their columns otherwise: subject: entity."
    )
    time_zone: Zone = Field(default="UTC", description="Of the night's date.")
    keep: Versions = Field(
        default=7, description="Versions kept to go back to, the current one among them."
    )
    quarantine_after: CountOrNull = Field(
        default=3,
        description="Nights in a row that a fact may be told and not learned before it is left "
        "out; null: any number.",
    )
    most_removed: FractionOrNull = Field(
        default=0.5,
        description="Largest fraction of the live facts that may be gone from a dump; null: all.",
    )
    price_per_hour: Maximum = Field(
        default=None, description="What an hour of the machines costs; null: no cost is reported."
    )


# The fields of the last base come first.
class RefreshConfig(EditSettings, _Nights):
    """What every night is told.

    ``second_moments``, ``context_templates`` and ``targets.store`` are kept in the home where they
    are not given.
    """

    def facts_of(self, night: date) -> tuple[str, ...]:
        """The dump of a night."""
        return tuple(path.replace(DATE, night.isoformat()) for path in self.facts)


def load_refresh(source: str | Path, overrides: Sequence[str] = ()) -> RefreshConfig:
    """Read a refresh file and put overrides in its place; arguments and errors as ``load_job``."""
    return load_settings(RefreshConfig, source, overrides, what="refresh")
