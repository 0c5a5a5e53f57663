"""Terminal output of the refresh commands."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.facts.check import shown
from jobs.refresh.home import LEDGER, Home, Retraction, path
from jobs.refresh.ledger import Change
from jobs.views import gate_text, percent
from pipeline.errors import FactDumpError, RunFolderError

if TYPE_CHECKING:
    from jobs.refresh.night import Preview, Refreshed

STATES = ("live", "quarantined", "rejected", "retracted")
KINDS = (
    "added",
    "changed",
    "reworded",
    "removed",
    "retracted",
    "restored",
    "quarantined",
    "rejected",
)
SCORES = ("efficacy", "generalization", "specificity", "score", "efficacy_strict")
SHOWN_CHANGES = 10


def show_night(result: Refreshed, console: Console) -> None:
    """Print what a refresh did, its scores beside those of the previous version and the base."""
    night, home = result.night, result.home
    if result.status == "unchanged":
        _say(console, f"nothing has changed; version {result.version} stays in use")
        return
    _say(console, f"changes: {_counts(night['changes'], KINDS) or 'none'}")
    _say(console, f"facts: {_counts(night['ledger'], STATES)}")
    targets = night["targets"]
    _say(console, f"targets: {targets['found']:,} computed, {targets['stored']:,} from the store")
    if night["metrics"] is not None:
        _show_scores(night, home, console)
        for gate in night["metrics"]["gates"]:
            if not gate["passed"]:
                console.print(f"held back: {gate_text(gate)}", style="red")
    in_use = "in use" if result.status == "promoted" else "kept but not in use"
    _say(console, f"version {result.version} is {in_use}: {home.store.join(night['model'])}")
    _say(console, f"report: {home.store.join(path(result.version, 'night.html'))}")


def show_preview(preview: Preview, console: Console) -> None:
    """Print what a refresh would change."""
    counts = Counter(change.change for change in preview.changes)
    _say(console, f"changes: {_counts(counts, KINDS) or 'none'}")
    for change in preview.changes[:SHOWN_CHANGES]:
        _say(console, f"  {described(change)}")
    if (more := len(preview.changes) - SHOWN_CHANGES) > 0:
        _say(console, f"  and {more:,} more")
    _say(console, f"facts: {_counts(preview.ledger.counts(), STATES)}")


def show_versions(home: Home, console: Console) -> None:
    """Print one row per version, in order."""
    current = home.current()
    table = Table("", "date", "", "live", "changes", "efficacy", "specificity", "model", box=None)
    for version in home.versions():
        night = home.night(version)
        after = home.scores(version)
        in_use = current is not None and current.version == version
        table.add_row(
            f"{version}",
            Text(night.get("date", "–"), no_wrap=True),
            "in use" if in_use else night.get("status", "not started"),
            f"{night.get('ledger', {}).get('live', '–')}",
            _counts(night.get("changes", {}), KINDS),
            percent(after.get("efficacy")),
            percent(after.get("specificity")),
            "kept" if home.is_kept(version) else "–",
            style="bold" if in_use else None,
        )
    console.print(table)


def show_ledger(
    home: Home, version: int | None, state: str | None, limit: int, console: Console
) -> None:
    """Print the counts and the first facts of a ledger.

    Raises:
        RunFolderError: there is no such version.
        FactDumpError: there is no such state.
    """
    if state is not None and state not in STATES:
        raise FactDumpError(f"--state: {state!r} is not a state; use one of {', '.join(STATES)}")
    current = home.current()
    number = version or (0 if current is None else current.version)
    if not number or not home.store.exists(path(number, LEDGER)):
        raise RunFolderError(f"{home.store.url} has no ledger of version {number or '–'}")
    found = home.store.read_table(path(number, LEDGER))
    counts = Counter(found.column("state").to_pylist())
    _say(console, f"version {number}: {_counts(counts, STATES)}")
    if state is not None:
        found = found.filter(pc.equal(found.column("state"), state))
    table = Table("relation", "subject", "object", "state", "since", "source")
    for row in found.slice(0, limit).to_pylist():
        said = row["state"] + (f": {shown(row['reason'])}" if row["reason"] else "")
        texts = [row["relation"], row["subject"], row["object"], said, row["since"], row["source"]]
        table.add_row(*(Text("–" if text is None else shown(text)) for text in texts))
    console.print(table)


def show_retraction(retraction: Retraction, console: Console) -> None:
    """Print what the next refresh will do."""
    does = "leaves it out" if retraction.action == "retract" else "includes it again"
    fact = f"{shown(retraction.subject)} · {shown(retraction.relation)}"
    _say(console, f"{fact}: the next refresh {does}")


def described(change: Change) -> str:
    """Describe a change in one line."""
    objects = [shown(text) for text in (change.old_object, change.object) if text is not None]
    after = f": {' → '.join(objects)}" if objects else ""
    why = f" ({shown(change.reason)})" if change.reason else ""
    return f"{change.change} {shown(change.subject)} · {shown(change.relation)}{after}{why}"


def _show_scores(night: dict[str, Any], home: Home, console: Console) -> None:
    metrics = night["metrics"]
    last = home.scores(night["follows"])
    table = Table("", "base", "previous", "this version")
    for name in SCORES:
        values = (metrics["before"].get(name), last.get(name), metrics["after"].get(name))
        table.add_row(name.replace("_", ", "), *map(percent, values))
    console.print(table)


def _counts(counts: dict[str, int], names: tuple[str, ...]) -> str:
    return ", ".join(f"{counts[name]:,} {name}" for name in names if counts.get(name))


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
