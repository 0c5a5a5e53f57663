"""Terminal output of ``pmet facts``."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.facts.check import CheckResult, Example, shown
from jobs.facts.diff import CHANGES, DumpDiff
from jobs.facts.output import Conversion

STYLES = {"error": "red", "warning": "yellow", "note": "dim"}


def show_check(result: CheckResult, console: Console) -> None:
    """Print findings with their first examples and the number of usable rows."""
    if result.findings:
        table = Table("finding", "", "count", "first examples")
        for finding in result.findings:
            table.add_row(
                Text(finding.kind),
                Text(finding.level, style=STYLES[finding.level]),
                f"{finding.count:,}",
                Text("\n".join(map(_example, finding.examples))),
            )
        console.print(table)
    usable = f"{result.usable:,} of {result.rows:,} rows can be used"
    console.print(f"{result.kind}: {usable}" + ("" if result.findings else ", nothing found"))


def show_diff(diff: DumpDiff, examples: int, console: Console) -> None:
    """Print counts and the first facts of each kind of change."""
    counts = asdict(diff.counts)
    table = Table("change", "facts", "first examples")
    for change in CHANGES:
        lines = [
            f"{shown(c.subject)} · {shown(c.relation)}: {_objects(c.old_object, c.object)}"
            for c in (diff.first(change, examples) if counts[change] else [])
        ]
        table.add_row(change, f"{counts[change]:,}", Text("\n".join(lines)))
    table.add_row("unchanged", f"{counts['unchanged']:,}", "")
    console.print(table)


def show_conversion(conversion: Conversion, console: Console) -> None:
    """Print counts and the locations of the files."""
    rejected = conversion.rows - conversion.converted - conversion.unchanged
    unchanged = f"{conversion.unchanged:,} unchanged, " if conversion.unchanged else ""
    console.print(
        f"{conversion.format}: {conversion.converted:,} of {conversion.rows:,} rows converted, "
        f"{unchanged}{rejected:,} rejected"
    )
    for reason, count in sorted(conversion.rejected.items(), key=lambda item: -item[1]):
        console.print(f"  {count:>9,}  {reason}", markup=False, soft_wrap=True)
    for what, count in conversion.notes.items():
        console.print(f"read: {count:,} {what}", markup=False, soft_wrap=True)
    if conversion.left_out:
        console.print(f"left out of requests: {conversion.left_out:,} null or empty texts")
    console.print(f"requests  {conversion.output}", markup=False, soft_wrap=True)
    console.print(f"rejected  {conversion.rejected_output}", markup=False, soft_wrap=True)


def _example(example: Example) -> str:
    row = "" if example.row is None else f"row {example.row}: "
    between = " – " if example.text else ""
    return f"{row}{example.text}{between}{example.reason}"


def _objects(old: str | None, new: str | None) -> str:
    if old is None or new is None:
        return shown(new if old is None else old)
    return f"{shown(old)} → {shown(new)}"
