"""``pmet report``: regenerates a run's page, or compares two runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.refresh.report import quarantined
from pipeline.evaluation import duration, figure_of, is_number, show, show_change, show_special
from pipeline.report import (
    PAGE,
    Comparison,
    Pair,
    compare_runs,
    group_figures,
    show_setting,
    visible,
    write_comparison,
    write_report,
)
from pipeline.run_folder import require_results
from pipeline.storage import Store, holds_text, refuse_foreign_file

TITLE = "Two edit runs side by side"
"""The title of a comparison's page."""
SHOWN_GROUPS = 10
SHOWN_REQUESTS = 5
_LONGEST = 60


def rewrite(run_folder: str, console: Console) -> None:
    """Regenerate a run's ``report.html`` from the files in its folder.

    Raises:
        RunFolderError: the folder holds no finished run.
        StorageError: a file cannot be read or written.
    """
    store = Store(run_folder)
    require_results(store)
    write_report(store, quarantined=quarantined(store))
    console.print(store.join("report.html"), soft_wrap=True, markup=False)


def compare(a: str, b: str, output: str | None, console: Console) -> None:
    """Compare two runs: write a page and print tables.

    Args:
        a: the first run's folder.
        b: the second run's folder.
        output: folder or file of the page; None: the second run's folder.
        console: where the tables are printed.

    Raises:
        RunFolderError: a folder holds no finished run.
        StorageError: a file cannot be read or written.
    """
    first, second = Store(a), Store(b)
    comparison = compare_runs(first, second)
    store, name = _place(output, second)
    refuse_foreign_file(store, name, holds_text(f"<title>{TITLE}</title>"))
    write_comparison(comparison, store, name)
    show_comparison(comparison, console)
    console.print(store.join(name), soft_wrap=True, markup=False)


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Print what differs between two runs."""
    a, b = comparison.a, comparison.b
    for letter, run in (("A", a), ("B", b)):
        console.print(_text(f"{letter}: {run.store.url} ({run.run['status']})"), soft_wrap=True)
    scores = [
        (
            figure.label,
            show(a.after.get(figure.name), figure.name),
            show(b.after.get(figure.name), figure.name),
            show_change(b.after.get(figure.name), a.after.get(figure.name), figure.name),
        )
        for figure in comparison.figures
    ]
    _table(console, ("after the edit", "A", "B", "B − A"), scores)
    _table(console, ("gate", "A", "B"), [_gate(pair) for pair in comparison.gates])
    settings = [(p.name, show_setting(p.a), show_setting(p.b)) for p in comparison.settings]
    _table(console, ("setting", "A", "B"), settings)
    counts = [(p.name, show_setting(p.a), show_setting(p.b)) for p in comparison.counts]
    _table(console, ("count", "A", "B"), counts)
    _groups(comparison, console)
    _verdicts(comparison, console)
    norms = [(p.name, *(_norm(layer) for layer in (p.a, p.b))) for p in comparison.layers]
    _table(console, ("‖Δ‖ / ‖W‖", "A", "B"), norms)
    seconds = [(p.name, duration(p.a), duration(p.b)) for p in comparison.stages]
    seconds.append(("whole run", duration(a.seconds()), duration(b.seconds())))
    _table(console, ("time", "A", "B"), seconds)


def _place(output: str | None, beside: Store) -> tuple[Store, str]:
    """Return the folder and the file name of the page."""
    if output is None:
        return beside, PAGE
    if not output.endswith(".html"):
        return Store(output), PAGE
    folder, slash, name = output.rpartition("/")
    return Store(folder or slash or "."), name


def _table(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    table = Table(*head)
    for row in rows:
        table.add_row(*map(_text, row))
    console.print(table)


def _text(value: str) -> Text:
    """Return untrusted text with terminal control characters made visible."""
    return Text(visible(value if len(value) <= _LONGEST * 4 else f"{value[: _LONGEST * 4]}…"))


def _gate(pair: Pair) -> tuple[str, str, str]:
    def said(gate: Any) -> str:
        if gate is None:
            return "–"
        verdict = "passed" if gate.passed else "not passed"
        return f"{gate.asked}: {gate.reached}, {verdict}"

    return pair.name, said(pair.a), said(pair.b)


def _norm(layer: Any) -> str:
    share = None if layer is None else layer["share"]
    return f"{100 * share:.3f} %" if is_number(share) else show_special(share)


def _groups(comparison: Comparison, console: Console) -> None:
    """Print the groups that changed most."""
    names = group_figures(comparison.groups)

    def moved(group: dict[str, Any]) -> float:
        ends = [(group["before"].get(n), group["after"].get(n)) for n in names]
        return max((abs(b - a) for a, b in ends if None not in (a, b)), default=0.0)

    groups = sorted(comparison.groups, key=moved, reverse=True)[:SHOWN_GROUPS]
    rows = [
        (str(g["name"]), *(show_change(g["after"].get(n), g["before"].get(n), n) for n in names))
        for g in groups
    ]
    heads = [f"{figure_of(name).label}, B − A" for name in names]
    _table(console, ("groups that changed most", *heads), rows)


def _verdicts(comparison: Comparison, console: Console) -> None:
    """Print how many requests only one of the runs has right, with examples."""
    verdicts = comparison.verdicts
    console.print(
        f"of {verdicts.both:,} requests measured in both, {len(verdicts.lost):,} are right only in "
        f"A, {len(verdicts.gained):,} only in B; {verdicts.only_a:,} results are only in A, "
        f"{verdicts.only_b:,} only in B",
        soft_wrap=True,
    )
    rows = [
        (where, str(b["row"]), *(_short(b[name]) for name in ("prompt", "subject", "target_new")))
        for where, pairs in (("only in A", verdicts.lost), ("only in B", verdicts.gained))
        for _, b in pairs[:SHOWN_REQUESTS]
    ]
    _table(console, ("right", "row in B", "prompt", "subject", "wanted"), rows)


def _short(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
