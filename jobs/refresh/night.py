"""One refresh: ledger changes, their targets, one update from the pristine base, promotion.

    dump ─▶ ledger ─▶ requests of all live facts ─▶ run (targets from the store, update from base,
    publish, measure, gates) ─▶ ledger, report ─▶ CURRENT

Every refresh edits the base model with all live facts at once; an edited model is never edited
again. So the thirtieth version is as good as the first, and leaving a fact out retracts it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, Literal
from zoneinfo import ZoneInfo

import pyarrow as pa
import torch

from jobs.refresh.config import RefreshConfig
from jobs.refresh.home import (
    CHANGES,
    LEDGER,
    NIGHT,
    NIGHT_FILES,
    REQUESTS,
    SET_ASIDE,
    TEMPLATES,
    VERSIONS,
    CurrentMovedError,
    Home,
    Promotion,
    path,
)
from jobs.refresh.ledger import (
    Key,
    Ledger,
    LedgerChange,
    Outcome,
    State,
    VersionStamp,
    changes_table,
    concluded,
    merged,
)
from jobs.refresh.report import quarantined, write_night_report
from jobs.refresh.tonight import Tonight, keys, of_facts, read_dump, sorted_requests
from pipeline.cluster import asks, check_gpus, deferred
from pipeline.data import RejectionCode
from pipeline.errors import FactDumpError
from pipeline.events import StageName
from pipeline.job import JobConfig
from pipeline.models import Checkpoint, checked_digest, default_cache, open_model_folder, publish
from pipeline.places import hparams_places, model_places, pattern_places
from pipeline.plan import Plan
from pipeline.progress import Progress
from pipeline.report import write_report
from pipeline.run import RunResult, how_it_ended, plan_run, run_plan
from pipeline.run_folder import MODEL, STATUS, Lease, RunFolder
from pipeline.storage import Store, locate, now_text, refuse_overlap
from pmet.errors import PMETError

METRICS = "metrics.json"
_OVER = ("promoted", "held", "superseded")

Status = Literal["promoted", "held", "unchanged"]


@dataclass(frozen=True)
class Refreshed:
    """The result of a refresh.

    Attributes:
        status: ``promoted``; ``held`` if a gate held the version back; ``unchanged`` if the version
            in use already matches the dump.
        version: the new version, or the one in use if unchanged.
        home: the home of the versions.
        night: content of the version's ``night.json``.
    """

    status: Status
    version: int
    home: Home
    night: dict[str, Any]


@dataclass(frozen=True)
class Preview:
    """What a refresh would change.

    Attributes:
        changes: changes to the ledger.
        ledger: the ledger as it would be, before anything is computed.
        tonight: content of the dump.
    """

    changes: list[LedgerChange]
    ledger: Ledger
    tonight: Tonight


def refresh(
    config: RefreshConfig,
    *,
    night: date | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
    address: str | None = None,
) -> Refreshed:
    """Update a model to match the latest dump.

    A killed refresh is resumed; its finished work is not repeated.

    Args:
        config: the settings of the refresh.
        night: date of the dump to read; today if None.
        progress: shows the stages; silent if None.
        fresh: start over, even if an earlier attempt left work or nothing has changed.
        address: Ray cluster to run on; None: start one on this machine.

    Raises:
        InputError: the dump, the templates or the job cannot be used; CURRENT does not move, as
            with every other error.
        FolderBusyError: another refresh of this home is running.
        CurrentMovedError: CURRENT was moved during the refresh.
        PMETError: a stage failed; the same call resumes the refresh.
    """
    check_gpus(asks(config), address)
    home = Home(config.home)
    now = datetime.now(UTC)
    day = night or _today(config, now)
    refuse_overlaps(config, day)
    home.refuse_foreign()
    with Lease.acquire(home.store) as lease:
        home.write_current()
        version, earlier = _version(home)
        if earlier.get("date") == day.isoformat():
            # The time of the start decides which facts are valid until the end.
            now = datetime.fromisoformat(earlier["as_of"])
        work = _Work(config, home, lease, progress or Progress(), day, version, now, home.current())
        return work.run(fresh, address)


def preview(config: RefreshConfig, *, night: date | None = None) -> Preview:
    """Return what a refresh would change; start and write nothing.

    Raises:
        InputError: the dump or the templates cannot be used.
        StorageError: something cannot be read.
    """
    home, now = Home(config.home), datetime.now(UTC)
    day = night or _today(config, now)
    refuse_overlaps(config, day)
    home.refuse_foreign()
    tonight = read_dump(config, day, now)
    version = max(home.versions(), default=0) + 1
    ledger, changes = _merged(
        config, home, home.current(), tonight, VersionStamp(_iso(now), version)
    )
    return Preview(changes, ledger, tonight)


def refuse_overlaps(config: RefreshConfig, day: date) -> None:
    """Refuse a home that overlaps with the inputs, or versions that overlap with stores.

    Raises:
        JobError: there are overlaps; one line for each.
        StorageError: a path cannot be resolved.
    """
    home = Store(config.home)
    read = {
        "model": model_places(config.model),
        "facts": pattern_places(config.facts_of(day)),
        "baseline": pattern_places(config.baseline or ()),
        "corpus": pattern_places(config.corpus or ()),
        "templates": locate(config.templates),
        "hparams": hparams_places(config.hparams),
    }
    shared = {
        "context_templates": config.context_templates,
        "second_moments": config.second_moments,
        "targets.store": config.targets.store,
        "evaluate.store": config.evaluate.store,
    }
    # Symbolic links in the home may lead out of it.
    for name in ("", *(name for name in home.entries() if home.is_link(name))):
        refuse_overlap(("home", home.join(name) if name else home.url), read.items())
    stores = [(key, locate(url)) for key, url in shared.items() if url is not None]
    refuse_overlap((f"home's {VERSIONS}", home.join(VERSIONS)), stores)


def job_of(config: RefreshConfig, home: Home, version: int) -> JobConfig:
    """Build the job of a refresh: requests of its live facts, and files shared by all versions."""
    store, templates = home.store, config.context_templates
    if templates is None and store.exists(TEMPLATES):
        # Generated only once: other templates would mean other targets.
        templates = store.join(TEMPLATES)
    targets = config.targets
    if targets.store is None:
        targets = targets.model_copy(update={"store": store.join("targets")})
    evaluate = config.evaluate
    if evaluate.store is None:
        evaluate = evaluate.model_copy(update={"store": store.join("measurements")})
    if evaluate.last is None:
        evaluate = evaluate.model_copy(update={"last": _last_run(home, version)})
    shared = JobConfig.model_fields.keys() & RefreshConfig.model_fields.keys()
    settings = {name: getattr(config, name) for name in shared}
    return JobConfig(
        **settings
        | {
            "requests": (store.join(path(version, REQUESTS)),),
            "output": store.join(path(version)),
            "second_moments": config.second_moments or store.join("second_moments"),
            "context_templates": templates,
            "targets": targets,
            "evaluate": evaluate,
        }
    )


def _last_run(home: Home, version: int) -> str | None:
    """Return the run folder of the version in use; None if there is none with figures."""
    current = home.current()
    # A refresh that is resumed after its promotion is not compared with itself.
    if current is None or current.version == version:
        return None
    if not home.store.exists(path(current.version, METRICS)):
        return None
    return home.store.join(path(current.version))


class _Work:
    """One refresh in progress."""

    def __init__(
        self,
        config: RefreshConfig,
        home: Home,
        lease: Lease,
        progress: Progress,
        day: date,
        version: int,
        as_of: datetime,
        current: Promotion | None,
    ) -> None:
        self._config, self._home, self._lease, self._progress = config, home, lease, progress
        self._store, self._day, self._as_of, self._current = home.store, day, as_of, current
        self._night = VersionStamp(_iso(as_of), version)
        self._said: dict[str, Any] = {
            "version": version,
            "status": "running",
            "date": day.isoformat(),
            "as_of": as_of.isoformat(),
            "started_at": now_text(),
            "finished_at": None,
            "follows": None if current is None else current.version,
            "facts": config.facts_of(day),
            "model": None,
            "error": None,
        }

    def run(self, fresh: bool, address: str | None) -> Refreshed:
        """Run the refresh."""
        with self._progress.stage("facts"):
            tonight = read_dump(self._config, self._day, self._as_of)
            ledger, changes = _merged(self._config, self._home, self._current, tonight, self._night)
            requests = self._requests(tonight, ledger)
        job = job_of(self._config, self._home, self._night.version)
        # Whether an earlier attempt already wrote to this version's folder.
        begun = self._store.exists(self._path(NIGHT))
        if not len(requests):
            # Files of an attempt with other facts must not stay beside an unedited model.
            self._home.discard(self._night.version)
        self._write(REQUESTS, requests)
        plan = None
        if len(requests):
            with self._progress.stage(StageName.PLAN):
                plan = plan_run(job, address=address, beside=NIGHT_FILES)
        self._said["settings"] = _settings(job, self._config)
        if not (fresh or begun or changes) and (current := self._unchanged(plan)) is not None:
            self._home.discard(self._night.version)
            return Refreshed("unchanged", current, self._home, self._home.night(current))
        try:
            self._say(rows=_rows(tonight))
            self._write(SET_ASIDE, tonight.set_aside)
            result = self._edited(plan, fresh, address)
            return self._conclude(requests, ledger, changes, result)
        except BaseException as error:
            self._end_early(error)
            raise

    def _end_early(self, error: BaseException) -> None:
        """Record how the refresh ended after an error or a signal."""
        status, text = how_it_ended(error)
        if status == "stopped" and self._said["status"] != "running":
            # The version is finished; CURRENT decides whether it is in use.
            return
        if isinstance(error, CurrentMovedError):
            status = "superseded"
        # If recording fails, the original error matters more.
        with deferred(), suppress(PMETError):
            self._say(status=status, error=text, finished_at=now_text())
            if status == "superseded":
                self._report()

    def _requests(self, tonight: Tonight, ledger: Ledger) -> pa.Table:
        """Return the requests of all live facts, sorted."""
        live = ledger.live()
        wanted = of_facts(tonight.requests, live)
        kept = live - set(keys(wanted))
        if not kept:
            return wanted
        # The dump contradicts itself about these facts: they keep their previous requests.
        assert self._current is not None
        before = self._store.read_table(path(self._current.version, REQUESTS))
        tables = [wanted, of_facts(before, kept)]
        # Only some versions have a column of separators.
        return sorted_requests(pa.concat_tables(tables, promote_options="default"))

    def _unchanged(self, plan: Plan | None) -> int | None:
        """Return the version in use if this refresh would produce the same; else None."""
        current = self._current
        if current is None or self._home.night(current.version).get("settings") is None:
            return None
        version, run = current.version, self._run_of(current.version)
        same = self._home.night(version)["settings"] == self._said["settings"]
        if plan is None or not run:
            same = same and plan is None and not run
        else:
            same = same and not _differing(run, plan)
        return version if same else None

    def _run_of(self, version: int) -> dict[str, Any]:
        name = path(version, STATUS)
        return dict(self._store.read_json(name)) if self._store.exists(name) else {}

    def _edited(self, plan: Plan | None, fresh: bool, address: str | None) -> RunResult | None:
        """Edit the base with all live facts; return None if there are none."""
        if plan is None:
            self._lease.check()
            base = Checkpoint.open(open_model_folder(self._config.model, default_cache()))
            checked_digest(base)
            RunFolder(self._store.join(self._path()), self._lease.check).clear_model(base.files())
            publish(base, (), _untouched, self._store, self._path(MODEL), on_file=lambda _: None)
            return None
        # Work left here by another dump or other settings is useless.
        stale = bool(_differing(self._run_of(self._night.version), plan))
        result = run_plan(plan, progress=self._progress, fresh=fresh or stale, address=address)
        if self._config.context_templates is None and not self._store.exists(TEMPLATES):
            self._store.write_bytes(TEMPLATES, self._store.read_bytes(self._path(TEMPLATES)))
        return result

    def _conclude(
        self,
        requests: pa.Table,
        ledger: Ledger,
        changes: list[LedgerChange],
        result: RunResult | None,
    ) -> Refreshed:
        """Record the outcomes and promote the version unless a gate holds it back."""
        outcomes = {} if result is None else _outcomes(keys(requests), result)
        patience = self._config.quarantine_after
        ledger, left_out = concluded(ledger, outcomes, patience=patience, night=self._night)
        changes = [*changes, *left_out]
        self._write(LEDGER, ledger.table())
        self._write(CHANGES, changes_table(changes))
        self._say(
            status="finished",
            model=self._path(MODEL),
            changes=dict(Counter(change.change for change in changes)),
            ledger=ledger.counts(),
            metrics=None if result is None else result.metrics,
            targets=self._targets(),
            finished_at=now_text(),
        )
        if result is not None and result.status == "held":
            self._say(status="held")
            self._report()
            return self._refreshed("held")
        expected = 0 if self._current is None else self._current.promotion
        self._report()
        promotion = self._home.promote(self._night.version, expected=expected, by="refresh")
        self._say(status="promoted", promotion=promotion.promotion)
        self._home.prune(self._config.keep)
        return self._refreshed("promoted")

    def _report(self) -> None:
        self._lease.check()
        write_night_report(self._home, self._config, self._night.version)
        run = Store(self._store.join(self._path()))
        # The run's own report was written before the ledger and lacks only these facts.
        if run.exists(STATUS) and (facts := quarantined(run)):
            write_report(run, quarantined=facts)

    def _targets(self) -> dict[str, int]:
        """Return the number of targets computed and the number found in the store."""
        stages = self._run_of(self._night.version).get("stages", [])
        details = [stage["detail"] for stage in stages if stage["name"] == StageName.TARGETS]
        return {n: sum(detail.get(n, 0) for detail in details) for n in ("found", "stored")}

    def _refreshed(self, status: Status) -> Refreshed:
        version = self._night.version
        return Refreshed(status, version, self._home, self._home.night(version))

    def _path(self, *names: str) -> str:
        return path(self._night.version, *names)

    def _write(self, name: str, table: pa.Table) -> None:
        self._lease.check()
        self._store.write_table(self._path(name), table)

    def _say(self, **what: Any) -> None:
        self._lease.check()
        self._said |= what
        self._store.write_json(self._path(NIGHT), self._said)


def _merged(
    config: RefreshConfig,
    home: Home,
    current: Promotion | None,
    tonight: Tonight,
    night: VersionStamp,
) -> tuple[Ledger, list[LedgerChange]]:
    """Return the new ledger, based on that of the version in use.

    Raises:
        FactDumpError: the dump removes more facts than allowed.
    """
    last = Ledger()
    if current is not None:
        last = Ledger.read(home.store.read_table(path(current.version, LEDGER)))
    said = home.retractions().items()
    ledger, changes = merged(
        last,
        tonight.facts(),
        undecided=tonight.undecided,
        retracted={key: r.reason for key, r in said if r.action == "retract"},
        restored={key: r.at for key, r in said if r.action == "restore"},
        night=night,
    )
    live, most = last.live(), config.most_removed
    gone = sum(c.change == "removed" and (c.relation, c.subject) in live for c in changes)
    if most is not None and gone > most * len(live):
        raise FactDumpError(
            f"{', '.join(config.facts)}: {gone:,} of {len(live):,} live facts are no longer there, "
            f"and most_removed allows {most:.0%}; is the dump complete? If it is, run once "
            "with --set most_removed=1"
        )
    return ledger, changes


def _version(home: Home) -> tuple[int, dict[str, Any]]:
    """Return the version number for this refresh, and the record of an earlier attempt at it."""
    versions, current = home.versions(), home.current()
    if not versions:
        return 1, {}
    last = versions[-1]
    said = home.night(last)
    if current is not None and current.version == last and said.get("status") == "finished":
        # The attempt died right after it moved CURRENT.
        said |= {"status": "promoted", "promotion": current.promotion}
        home.store.write_json(path(last, NIGHT), said)
    return (last + 1, {}) if said.get("status") in _OVER else (last, said)


def _settings(job: JobConfig, config: RefreshConfig) -> str:
    """Return a digest of everything but the facts that a version's weights depend on."""
    given = {"requests": ("tonight",), "context_templates": config.context_templates}
    return job.model_copy(update=given).digest()


def _differing(run: Mapping[str, Any], plan: Plan) -> list[str]:
    """Return the names of the digests in which a run differs from the plan."""
    digests = run.get("digests", plan.digests if not run else {})
    return [
        name
        for name, digest in plan.digests.items()
        # The job names this version's files, and the first refresh generates its templates.
        if name not in ("job", "context_templates") and digests.get(name) != digest
    ]


def _outcomes(facts: list[Key], result: RunResult) -> dict[Key, Outcome]:
    """Return the outcome of each live fact; rows are numbered like the requests."""
    outcomes: dict[Key, Outcome] = {}
    rejected = result.folder.read_table("rejected.parquet", ["row", "code", "reason"])
    for row, code, reason in zip(*(column.to_pylist() for column in rejected.columns), strict=True):
        state: State = "quarantined" if code == RejectionCode.NO_TARGET else "rejected"
        outcomes[facts[row]] = Outcome(state, reason)
    names = ["row", "after_efficacy", "after_efficacy_strict"]
    results = result.folder.read_table("results.parquet", names)
    for row, likely, said in zip(*(column.to_pylist() for column in results.columns), strict=True):
        figure = likely if likely is not None else said
        outcomes[facts[row]] = Outcome("live", None, None if figure is None else figure >= 1)
    return outcomes


def _rows(tonight: Tonight) -> dict[str, int]:
    """Return the number of the dump's rows by outcome."""
    found = tonight.conversion
    return {"read": found.rows, "to tell": found.converted, "as the baseline": found.unchanged} | (
        dict(found.rejected)
    )


def _untouched(name: str, base: torch.Tensor) -> torch.Tensor:
    raise AssertionError(f"{name} is not edited")


def _today(config: RefreshConfig, now: datetime) -> date:
    return now.astimezone(ZoneInfo(config.time_zone)).date()


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
