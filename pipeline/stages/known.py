"""Facts that the base model already knows: found before the edit, and checked again after it.

All accepted requests are asked, not a sample, because the answer decides what is edited. They are
asked in parts that depend only on the job.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pipeline.cluster import Task
from pipeline.data import Place, Row, places_from
from pipeline.events import StageName
from pipeline.models import ModelSource
from pipeline.stages.context import Context

ASKED_TOGETHER = 256
_STAGES = {"before": StageName.KNOWN_BEFORE, "after": StageName.KNOWN_AFTER}


def find_known(run: Context) -> frozenset[Row]:
    """Input rows whose target is the base's greedy answer; none unless the job skips them."""
    if not run.plan.job.skip_known:
        return frozenset()
    return _answered(run, "before", run.plan.base, places_from(0, len(run.plan.table.requests)))


def still_known(run: Context, known: Collection[Row], source: ModelSource) -> frozenset[Row]:
    """The known rows that a model still answers as wanted."""
    places = [Place(place) for place, row in enumerate(run.plan.table.rows) if row in known]
    return _answered(run, "after", source, places) if places else frozenset()


def _answered(
    run: Context, when: str, source: ModelSource, places: Sequence[Place]
) -> frozenset[Row]:
    if record := run.folder.recorded(f"known-{when}"):
        return frozenset(record["rows"])
    table, known = run.plan.table, set[Row]()
    starts = range(0, len(places), ASKED_TOGETHER)
    parts = {f"known {when} {i}": places[i : i + ASKED_TOGETHER] for i in starts}
    with run.stage(_STAGES[when], len(places)) as (bar, detail):

        def take(task: Task, answers: list[bool]) -> None:
            part = parts[task.key]
            rows = [table.rows[place] for place in part]
            known.update(row for row, right in zip(rows, answers, strict=True) if right)
            bar.advance(len(part))

        run.map(
            "find_known",
            [
                Task(key, (source, [table.requests[place] for place in part]))
                for key, part in parts.items()
            ],
            take,
        )
        detail |= {"asked": len(places), "known": len(known)}
    run.folder.record(f"known-{when}", {"rows": sorted(known)})
    return frozenset(known)
