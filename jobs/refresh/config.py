"""Refresh files: where the facts come from, where the versions go and how each refresh runs."""

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
Columns = Annotated[dict[_Name, _Name], allowed("a mapping from our column names to the dump's")]
Versions = Annotated[Annotated[int, Field(ge=1)], allowed("a whole number, 1 or more")]
Zone = Annotated[TimeZone, allowed("a time zone, such as UTC or Europe/Berlin")]


class _Nights(Section):
    model: Text = Field(description="The pristine base model: a path, a URL or a hub id.")
    facts: Paths = Field(
        description="The fact dump: paths, globs or folders; {date} stands for the refresh's date."
    )
    templates: Text = Field(description="YAML file with a template per relation.")
    home: Text = Field(description="Folder for the versions, their ledgers and shared files.")
    baseline: PathsOrNull = Field(
        default=None,
        description="The fact dump that the base model knows: its facts are not edited, and its "
        "objects are the true targets; null: all facts are edited.",
    )
    columns: Columns = Field(
        default={}, description="The dump's own column names, such as subject: entity."
    )
    time_zone: Zone = Field(default="UTC", description="Time zone of the refresh's date.")
    keep: Versions = Field(
        default=7, description="Number of versions to keep for rollback, including the current one."
    )
    quarantine_after: CountOrNull = Field(
        default=3,
        description="Number of consecutive refreshes that may fail to teach a fact before it is "
        "quarantined; null: no limit.",
    )
    most_removed: FractionOrNull = Field(
        default=0.5,
        description="Maximum fraction of the live facts that a dump may remove; null: no limit.",
    )
    price_per_hour: Maximum = Field(
        default=None, description="Cost of the machines per hour; null: report no cost."
    )


# pydantic puts the fields of the last base class first.
class RefreshConfig(EditSettings, _Nights):
    """The settings of a refresh.

    ``second_moments``, ``context_templates`` and ``targets.store`` are kept in the home unless they
    are set.
    """

    def facts_of(self, night: date) -> tuple[str, ...]:
        """Return the paths of a date's dump."""
        return tuple(path.replace(DATE, night.isoformat()) for path in self.facts)


def load_refresh(source: str | Path, overrides: Sequence[str] = ()) -> RefreshConfig:
    """Read a refresh file and apply overrides; arguments and errors are those of ``load_job``."""
    return load_settings(RefreshConfig, source, overrides, what="refresh")
