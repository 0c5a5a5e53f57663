"""The report of a refresh: changes, facts not learned, scores, time and cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from jobs.refresh.config import RefreshConfig
from jobs.refresh.home import CHANGES, LEDGER, REPORT, Home, path
from pipeline.evaluation import ALWAYS, GateText, measured, read_gate
from pipeline.report import Cut, page, trend_chart
from pipeline.run_folder import STATUS
from pipeline.storage import Store

TREND = ("efficacy", "generalization", "specificity")
TREND_NIGHTS = 60
NOTHING_EDITED: dict[str, Any] = {"before": {}, "after": {}, "gates": [], "counts": {"edited": 0}}
EXPLAINED = {
    "quarantined": "Left out of the model until the dump changes them or pmet facts restore "
    "restores them.",
    "rejected": "These facts cannot be edited into this model.",
    "retracted": "Retracted by a person; left out, whatever the dump says.",
}


def write_night_report(home: Home, config: RefreshConfig, version: int) -> None:
    """Write ``night.html`` beside a version's ledger, from the files in its folder.

    Raises:
        StorageError: a file cannot be read or written.
    """
    store, night = home.store, home.night(version)
    ledger = store.read_table(path(version, LEDGER)).to_pylist()
    metrics = night["metrics"] or NOTHING_EDITED
    run = path(version, STATUS)
    seconds = _seconds(night)
    text = page("night.html.j2", "jobs").render(
        home=store.url,
        night=night,
        edited=metrics["counts"]["edited"],
        verdict=_verdict(night, metrics["gates"]),
        base=metrics["before"],
        last=home.scores(night["follows"]),
        tonight=metrics["after"],
        figures=measured(metrics["before"], metrics["after"], always=ALWAYS),
        gates=_gates(metrics["gates"]),
        trend=_trend(home, version),
        changes=Cut(store.read_table(path(version, CHANGES)).to_pylist()),
        unlearned=Cut([f for f in ledger if f["state"] == "live" and f["learned"] is False]),
        left_out={s: Cut([f for f in ledger if f["state"] == s]) for s in EXPLAINED},
        explained=EXPLAINED,
        patience=config.quarantine_after,
        stages=store.read_json(run)["stages"] if store.exists(run) else [],
        seconds=seconds,
        cost=_cost(seconds, config.price_per_hour),
    )
    store.write_bytes(path(version, REPORT), text.encode(errors="backslashreplace"))


def quarantined(store: Store) -> list[dict[str, Any]]:
    """Return the facts quarantined in a version's ledger; empty for other runs.

    Raises:
        StorageError: the ledger cannot be read.
    """
    if not store.exists(LEDGER):
        return []
    facts = store.read_table(LEDGER).to_pylist()
    return [fact for fact in facts if fact.get("state") == "quarantined"]


def _verdict(night: Mapping[str, Any], gates: list[Mapping[str, Any]]) -> dict[str, str]:
    match night["status"]:
        case "held":
            names = ", ".join(read_gate(gate).name for gate in gates if not gate["passed"])
            last = night["follows"]
            stays = "" if last is None else f" Version {last} stays in use."
            return {
                "kind": "bad",
                "title": "Held back",
                "text": f"Gates not passed: {names}.{stays}",
            }
        case "superseded":
            return {"kind": "bad", "title": "Not promoted", "text": str(night["error"])}
        case _:
            text = "All gates passed." if gates else "The refresh file sets no gates."
            return {"kind": "good", "title": "Promoted", "text": text}


def _gates(gates: Iterable[Mapping[str, Any]]) -> dict[str, list[GateText]]:
    """Return the gates as text, by the figure that they check."""
    found: dict[str, list[GateText]] = {}
    for gate in map(read_gate, gates):
        found.setdefault(gate.figure, []).append(gate)
    return found


def _trend(home: Home, version: int) -> str:
    """Return a chart of the latest versions' scores; empty if only one was measured."""
    numbers = [number for number in home.versions() if number <= version][-TREND_NIGHTS:]
    nights = [night for number in numbers if (night := home.night(number)).get("metrics")]
    if len(nights) < 2:
        return ""
    figures = [night["metrics"]["after"] for night in nights]
    return trend_chart(
        [str(night["date"]) for night in nights],
        {name: [figure.get(name) for figure in figures] for name in TREND},
    )


def _seconds(night: Mapping[str, Any]) -> float:
    start, end = (datetime.fromisoformat(night[f"{when}_at"]) for when in ("started", "finished"))
    return (end - start).total_seconds()


def _cost(seconds: float, price: float | None) -> str | None:
    return None if price is None else f"{price * seconds / 3600:,.2f}"
