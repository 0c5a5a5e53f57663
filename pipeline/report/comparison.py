"""Comparison of two runs: what the second does better or worse, and which settings differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

from pipeline.evaluation import (
    Figure,
    GateText,
    figure_of,
    is_fraction,
    is_number,
    measured,
    read_gate,
)
from pipeline.job import YAMLTextError, by_key, parse_yaml
from pipeline.report.charts import group_chart, score_chart
from pipeline.report.html import Cut, page
from pipeline.report.run_report import (
    group_figures,
    groups_of,
    intervals_of,
    number,
    verdict,
    weakest_groups,
)
from pipeline.run_folder import (
    REQUEST,
    Row,
    RunRecord,
    layers,
    read_finished,
    show_rate,
    throughput,
)
from pipeline.storage import Store

PAGE = "compare.html"


@dataclass(frozen=True)
class Pair:
    """A value of each run; None for a run that does not have it.

    Attributes:
        name: the value's name.
        a: the first run's value.
        b: the second run's value.
    """

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Verdicts:
    """The outcomes of the requests that both runs measured.

    Attributes:
        lost: (the first run's row, the second's) of requests that are correct in the first run and
            wrong in the second.
        gained: the same for the opposite case.
        both: requests measured in both runs.
        only_a: the number of results that only the first run has.
        only_b: the number of results that only the second run has.
    """

    lost: list[tuple[Row, Row]]
    gained: list[tuple[Row, Row]]
    both: int
    only_a: int
    only_b: int

    @property
    def chance(self) -> float:
        """The probability of such an uneven split of the changed requests if both runs were equally
        good: the sign test, two-sided."""
        changed = len(self.lost) + len(self.gained)
        fewer = min(len(self.lost), len(self.gained))
        ways = sum(comb(changed, count) for count in range(fewer + 1))
        return min(1.0, 2 * ways / 2**changed)


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        a: the first run.
        b: the second run.
        figures: figures of either edited model.
        gates: by name, as `GateText`.
        settings: keys of the job whose values differ, with both values; None for a missing key.
        digests: the inputs of the runs that differ, by name.
        counts: numbers of requests.
        groups: figures of the edited models by group: ``name``, ``requests``, ``before`` (the first
            run's), ``after`` (the second's), ``intervals``.
        verdicts: the outcomes of single requests.
        layers: by parameter, as in ``run.json``, with Δ's ``share``.
        stages: seconds by stage.
        rates: throughput per second, by stage.
    """

    a: RunRecord
    b: RunRecord
    figures: list[Figure]
    gates: list[Pair]
    settings: list[Pair]
    digests: list[Pair]
    counts: list[Pair]
    groups: list[dict[str, Any]]
    verdicts: Verdicts
    layers: list[Pair]
    stages: list[Pair]
    rates: dict[str, tuple[str, str]]


def compare_runs(a: Store, b: Store) -> Comparison:
    """Compare the finished runs in two folders.

    Raises:
        RunFolderError: a folder holds no finished run.
        StorageError: a file cannot be read.
    """
    first, second = read_finished(a), read_finished(b)
    return Comparison(
        a=first,
        b=second,
        figures=measured(first.after, second.after),
        gates=_pairs(*(_gates_of(run) for run in (first, second))),
        settings=_differing(*(_settings(run.job) for run in (first, second))),
        digests=_differing(first.run["digests"], second.run["digests"]),
        counts=_pairs(first.counts, second.counts),
        groups=_groups(first, second),
        verdicts=_verdicts(first.results, second.results),
        layers=_pairs(*({x["parameter"]: x for x in layers(r.run)} for r in (first, second))),
        stages=_pairs(*(_seconds(run) for run in (first, second))),
        rates=_rates(first, second),
    )


def write_comparison(comparison: Comparison, store: Store, name: str = PAGE) -> None:
    """Write a comparison as one self-contained HTML page.

    Args:
        comparison: the two runs.
        store: the folder for the page.
        name: the page's file name.

    Raises:
        StorageError: it cannot be written.
    """
    names = group_figures(comparison.groups)
    text = page("compare.html.j2").render(
        c=comparison,
        verdict_a=verdict(comparison.a),
        verdict_b=verdict(comparison.b),
        groups=Cut(comparison.groups),
        group_figures=names,
        lost=Cut(comparison.verdicts.lost),
        gained=Cut(comparison.verdicts.gained),
        charts=_charts(comparison, names),
    )
    store.write_bytes(name, text.encode(errors="backslashreplace"))


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Pair]:
    """The values of two mappings under each key, in the order of the first."""
    return [Pair(str(name), a.get(name), b.get(name)) for name in {**a, **b}]


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Pair]:
    return [pair for pair in _pairs(a, b) if pair.a != pair.b]


def _gates_of(run: RunRecord) -> dict[str, GateText]:
    return {gate.name: gate for gate in map(read_gate, run.gates)}


def _settings(job: str) -> dict[str, Any]:
    """A job's values by key, sections written as ``section.key``."""
    try:
        values = parse_yaml(job)
    except YAMLTextError:
        return {}
    return dict(by_key(values)) if isinstance(values, dict) else {}


def _seconds(run: RunRecord) -> dict[str, float]:
    return {stage["name"]: stage["seconds"] for stage in run.run["stages"]}


def _rates(a: RunRecord, b: RunRecord) -> dict[str, tuple[str, str]]:
    first, second = (
        {stage["name"]: show_rate(throughput(stage, run)) for stage in run.run["stages"]}
        for run in (a, b)
    )
    return {name: (first.get(name, ""), second.get(name, "")) for name in {**first, **second}}


def _groups(a: RunRecord, b: RunRecord) -> list[dict[str, Any]]:
    """The groups of both runs, if both are grouped by the same column."""
    columns = {(run.metrics.get("groups") or {}).get("column") for run in (a, b)}
    if len(columns) != 1:
        return []
    nothing: dict[str, Any] = {"requests": 0, "after": {}, "intervals": {}}
    of = [{group["name"]: group for group in groups_of(run)} for run in (a, b)]
    joined = []
    for name in {**of[0], **of[1]}:
        first, second = (groups.get(name, nothing) for groups in of)
        ends = [(group.get("intervals") or {}).get("after") or {} for group in (first, second)]
        joined.append(
            {
                "name": name,
                "requests": max(first["requests"], second["requests"]),
                "before": first["after"],
                "after": second["after"],
                "intervals": {"before": ends[0], "after": ends[1]},
            }
        )
    return joined


def _verdicts(a: Sequence[Row], b: Sequence[Row]) -> Verdicts:
    pairs = _matched(a, b)
    lost: list[tuple[Row, Row]] = []
    gained: list[tuple[Row, Row]] = []
    both = 0
    for first, second in pairs:
        name = next((n for n in _RIGHT if is_number(first[n]) and is_number(second[n])), None)
        if name is None:
            continue
        both += 1
        if (was := first[name] >= 1) != (second[name] >= 1):
            (lost if was else gained).append((first, second))
    return Verdicts(lost, gained, both, len(a) - len(pairs), len(b) - len(pairs))


# A request is correct if its own prompt is: the more likely target, else the greedy answer.
_RIGHT = ("after_efficacy", "after_efficacy_strict")


def _matched(a: Sequence[Row], b: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Match the requests of two runs: by prompt, subject and new target; the rest by subject and
    case id, since their prompt or target may differ between the runs."""
    pairs, left_a, left_b = _joined(a, b, lambda row: tuple(row[name] for name in REQUEST[1:]))
    known_a, known_b = ([r for r in rows if r["case_id"] is not None] for rows in (left_a, left_b))
    more, *_ = _joined(known_a, known_b, lambda row: (row["case_id"], row["subject"]))
    places = {id(row): place for place, row in enumerate(a)}
    return sorted([*pairs, *more], key=lambda pair: places[id(pair[0])])


def _joined(
    a: Sequence[Row], b: Sequence[Row], key: Callable[[Row], Any]
) -> tuple[list[tuple[Row, Row]], list[Row], list[Row]]:
    """Pairs of rows that alone share a key, and the rows that are in no pair."""
    counts = [Counter(map(key, rows)) for rows in (a, b)]
    there = {key(row): row for row in b}
    alone = {k for k in there if counts[0][k] == counts[1][k] == 1}
    pairs = [(row, there[key(row)]) for row in a if key(row) in alone]
    left_a, left_b = ([row for row in rows if key(row) not in alone] for rows in (a, b))
    return pairs, left_a, left_b


def _charts(comparison: Comparison, names: Sequence[str]) -> dict[str, str]:
    a, b = comparison.a, comparison.b
    charts = {"scores": "", "groups": ""}
    drawn = [figure.name for figure in comparison.figures if is_fraction(figure.name)]
    if drawn:
        ends = [intervals_of(run, drawn)["after"] for run in (a, b)]
        charts["scores"] = score_chart(
            {name: number(a.after.get(name)) for name in drawn},
            {name: number(b.after.get(name)) for name in drawn},
            {},
            intervals={"before": ends[0], "after": ends[1]},
            labels={name: figure_of(name).label for name in drawn},
            series=("A", "B"),
            axis="prompts, or tokens (%)",
        )
    if names:
        shown = weakest_groups(comparison.groups, names)
        charts["groups"] = group_chart(
            shown, {name: figure_of(name).label for name in names}, series=("A", "B")
        )
    return charts
