"""A run's results: a row for each request, and the model's figures."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.data import FIRST_LOSS, RequestTable, Row, readable, with_columns
from pipeline.evaluation import intervals, of_perplexity, of_shares, rounded
from pipeline.run_folder import read_columns
from pipeline.stages.measurement import Measurement
from pipeline.storage import Store
from pmet.evaluation import AMISS, METRICS, OF_TEXT, SAID, neighbors_said, summarize

_COURSE = ("row", "steps", "loss", FIRST_LOSS)
Measured = Mapping[Row, Mapping[str, Any]]


def results_table(
    table: RequestTable,
    status: Mapping[Row, str],
    targets: Sequence[pa.Table],
    before: Measured,
    after: Measured,
) -> pa.Table:
    """Build a row for every request that was not rejected: its input columns, the optimisation
    of its target, and its figures.

    Bytes in an extra column that are not UTF-8 are written as ``\\xNN``, so that any reader can
    open the table. If null or empty texts were left out of lists, ``left_out`` names them.

    Args:
        table: the input.
        status: by input row: ``edited``, or ``known`` for a request that needs no target.
        targets: target shards, with columns ``row``, ``steps``, ``loss`` and optionally
            ``first_loss``.
        before: figures and answers of measured rows on the base model.
        after: the same on the edited model.
    """
    course = {row: own for shard in targets for row, *own in courses_of(shard)}
    rows = sorted(status)
    courses = [[None] * 3 if status[row] == "known" else course[row] for row in rows]
    columns = {
        "row": pa.array(rows, pa.int64()),
        "status": pa.array([status[row] for row in rows], pa.string()),
        "steps": pa.array([steps for steps, _, _ in courses], pa.int32()),
        "loss": pa.array([loss for _, loss, _ in courses], pa.float32()),
        FIRST_LOSS: pa.array([first for _, _, first in courses], pa.float32()),
    }
    for when, measured in (("before", before), ("after", after)):
        texts = [measured.get(row, {}).get("text") for row in rows]
        written = any(text is not None for text in texts)
        for metric in (*METRICS, *SAID, *AMISS, *(OF_TEXT if written else ())):
            values = [measured.get(row, {}).get(metric) for row in rows]
            columns[f"{when}_{metric}"] = pa.array(values, pa.float64())
        for answer in ("answer", "chat_answer"):
            said = [measured.get(row, {}).get(answer) for row in rows]
            columns[f"{when}_{answer}"] = pa.array(said, pa.string())
        neighbors = [neighbors_said(measured.get(row, {})) or None for row in rows]
        columns[f"{when}_neighborhood_answers"] = pa.array(neighbors, pa.list_(pa.string()))
        if written:
            columns[f"{when}_text"] = pa.array(texts, pa.string())
    locality = [after.get(row, {}).get("locality") for row in rows]
    columns["after_locality"] = pa.array(locality, pa.float64())
    if table.left_out:
        left_out = [", ".join(table.left_out.get(row, ())) or None for row in rows]
        columns["left_out"] = pa.array(left_out, pa.string())
    return with_columns(readable(table.table.take(columns["row"])), columns)


def read_courses(store: Store, file: str) -> pa.Table:
    """Read a shard of targets without the target vectors, for `courses_of`."""
    return read_columns(store, file, _COURSE)


def courses_of(shard: pa.Table) -> Iterator[tuple[Any, ...]]:
    """Row, steps, last and first loss of each target; the first loss is None if unknown."""
    nothing = [None] * len(shard)
    there = [shard.column(n).to_pylist() if n in shard.column_names else nothing for n in _COURSE]
    for row, steps, loss, first in zip(*there, strict=True):
        yield row, steps, loss, None if first is None or math.isnan(first) else first


def answered(asked: Collection[Row], right: Collection[Row]) -> dict[Row, dict[str, Any]]:
    """The only figure of requests that were asked just for their answer, by input row."""
    return {row: {"efficacy_strict": float(row in right)} for row in asked}


def model_metrics(before: Measurement, after: Measurement, rows: Sequence[Row]) -> dict[str, Any]:
    """The figures of both models over the given input rows, as far as they were measured.

    Returns:
        ``before`` and ``after``: each figure, None if not measured; ``intervals``: the same for
        their 95 % intervals, if there are any.
    """
    return {
        "before": figures_of(before, rows),
        "after": figures_of(after, rows, before),
        "intervals": {
            "before": intervals_of(before, rows),
            "after": intervals_of(after, rows, before),
        },
    }


def figures_of(
    measured: Measurement, rows: Sequence[Row], base: Measurement | None = None
) -> dict[str, float | None]:
    """A model's figures over the measured ones of these input rows, and on held-out text.

    Args:
        measured: the model's measurements.
        rows: input rows.
        base: the unedited model's, to compute agreement with; None: without agreement.
    """
    own = [measured.rows[row] for row in rows if row in measured.rows]
    figures = {**summarize(own), "perplexity": measured.perplexity}
    if base is not None:
        agreed, counts = measured.agreed(base)
        figures["agreement"] = sum(agreed) / sum(counts) if sum(counts) else None
        kept = measured.kept(base)
        figures["locality_unrelated"] = sum(kept) / len(kept) if kept else None
    return figures


def intervals_of(
    measured: Measurement, rows: Sequence[Row], base: Measurement | None = None
) -> dict[str, list[float]]:
    """The 95 % intervals of these figures, if there are any (see `pipeline.evaluation`)."""
    found = intervals([measured.rows[row] for row in rows if row in measured.rows])
    nll = [text.nll for text in measured.texts]
    if perplexity := of_perplexity(nll, [len(text.greedy) for text in measured.texts]):
        found["perplexity"] = perplexity
    if base is not None and (agreement := of_shares(*measured.agreed(base))):
        found["agreement"] = agreement
    if base is not None:
        kept = measured.kept(base)
        if unrelated := of_shares(kept, [1] * len(kept)):
            found["locality_unrelated"] = unrelated
    return rounded(found)
