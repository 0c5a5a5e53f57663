"""``pmet refresh``, ``rollback``, ``versions`` and the fact commands of a home."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from jobs.refresh.home import CURRENT, LEDGER, NIGHT, Home, path
from jobs.refresh.ledger import Entry, Ledger
from jobs.refresh.night import Refreshed
from pipeline.run_folder.lease import Lease
from tests.jobs.conftest import Invoke
from tests.jobs.test_facts_cli import OLD, parquet

METRICS = {
    "before": {"efficacy": 0.0},
    "after": {"efficacy": 0.875, "specificity": 0.5},
    "gates": [{"name": "efficacy", "threshold": 0.9, "value": 0.875, "passed": False}],
}


def entry(subject: str, object_: str, version: int = 1) -> Entry:
    return Entry("country", subject, object_, "{} lies in", "live", None, "2026-11-01", version)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """Two versions, the second in use."""
    return refresh_home(tmp_path / "home")


def refresh_home(folder: Path) -> Home:
    home = Home(str(folder))
    # As every refresh leaves it.
    Lease.acquire(home.store).release()
    for version in (1, 2):
        model = path(version, "model")
        home.store.write_bytes(f"{model}/config.json", b"{}")
        entries = [entry("Lyon", "France"), entry("Nice", "Italy", version)][:version]
        ledger = Ledger({e.key: e for e in entries})
        home.store.write_table(path(version, LEDGER), ledger.table())
        night = {
            "version": version,
            "status": "promoted",
            "date": f"2026-11-0{version}",
            "model": model,
            "follows": version - 1 or None,
            "changes": {"added": 1},
            "ledger": ledger.counts(),
            "targets": {"found": 1, "stored": version - 1},
            "metrics": METRICS,
        }
        home.store.write_json(path(version, NIGHT), night)
        home.promote(version, expected=version - 1, by="refresh")
    return home


@pytest.fixture
def refresh_file(home: Home, tmp_path: Path) -> Path:
    (tmp_path / "dump.parquet").write_bytes(parquet(OLD))
    (tmp_path / "t.yaml").write_text('country: {prompt: "{} lies in"}\n')
    settings = {
        "model": "gpt2",
        "facts": str(tmp_path / "dump.parquet"),
        "templates": str(tmp_path / "t.yaml"),
        "home": home.store.url,
        "hparams": "gpt-j-6b",
    }
    file = tmp_path / "refresh.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def test_a_dry_run_says_what_the_night_would_change(pmet: Invoke, refresh_file: Path) -> None:
    status, out, _ = pmet("refresh", refresh_file, "--dry-run")
    assert status == 0
    assert out.splitlines() == [
        "changes: 1 added",
        "  added Rome · country: Italy",
        "facts: 3 live",
    ]


@pytest.mark.parametrize(
    ("status", "exit_status", "words"),
    [
        ("promoted", 0, "version 2 is in use: "),
        ("held", 3, "held back: efficacy is 87.5 %, the gate requires at least 90.0 %"),
        ("unchanged", 0, "nothing has changed; version 2 stays in use"),
    ],
)
def test_the_exit_status_says_how_the_night_ended(
    pmet: Invoke,
    home: Home,
    refresh_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: str,
    exit_status: int,
    words: str,
) -> None:
    found = Refreshed(status, 2, home, home.night(2))  # type: ignore[arg-type]
    monkeypatch.setattr("jobs.refresh.night.refresh", lambda *_, **__: found)
    got, out, _ = pmet("refresh", refresh_file)
    assert got == exit_status
    assert words in out


def test_wrong_input_is_one_line(pmet: Invoke, refresh_file: Path) -> None:
    for arguments, words in (
        (["--date", "tomorrow"], "--date: 'tomorrow' is not a date"),
        (["--set", "keep=0"], "keep: 0 is not allowed"),
        (["--dry-run", "--set", "facts=nowhere/*.parquet"], "nowhere/*.parquet"),
    ):
        status, _, err = pmet("refresh", refresh_file, *arguments)
        assert (status, len(err.splitlines())) == (2, 1)
        assert words in err


def test_versions_shows_what_is_in_use(pmet: Invoke, home: Home) -> None:
    _, out, _ = pmet("versions", home.store.url)
    first, second = out.splitlines()[-2:]
    assert "promoted" in first
    assert "in use" in second
    assert "87.5 %" in second
    _, out, _ = pmet("versions", home.store.url, "--current")
    assert out.strip() == home.store.join("versions/0002/model")


def test_rolling_back_moves_current(pmet: Invoke, home: Home) -> None:
    status, out, _ = pmet("rollback", home.store.url)
    assert (status, json.loads(home.store.read_bytes(CURRENT))["version"]) == (0, 1)
    assert out.strip() == f"version 1 is in use: {home.store.join('versions/0001/model')}"
    status, _, err = pmet("rollback", home.store.url, "--to", 5)
    assert (status, "no model of version 5" in err) == (2, True)


def test_a_fact_is_retracted_and_restored(pmet: Invoke, home: Home) -> None:
    fact = ("--subject", "Nice", "--relation", "country")
    status, out, _ = pmet("facts", "retract", home.store.url, *fact, "--reason", "asked for")
    assert (status, out.strip()) == (0, "Nice · country: the next refresh leaves it out")
    assert home.retractions()["country", "Nice"].reason == "asked for"
    assert pmet("facts", "retract", home.store.url, *fact)[0] == 2
    _, out, _ = pmet("facts", "restore", home.store.url, *fact)
    assert out.strip() == "Nice · country: the next refresh includes it again"


def test_the_ledger_is_shown(pmet: Invoke, home: Home) -> None:
    _, out, _ = pmet("facts", "ledger", home.store.url)
    assert out.startswith("version 2: 2 live\n")
    assert "Nice" in out
    _, out, _ = pmet("facts", "ledger", home.store.url, "--version", 1, "--limit", 0)
    assert out.startswith("version 1: 1 live\n")
    assert "Lyon" not in out
    status, _, err = pmet("facts", "ledger", home.store.url, "--state", "dead")
    assert (status, "use one of live" in err) == (2, True)
    assert pmet("facts", "ledger", home.store.url, "--version", 9)[0] == 2


def test_a_folder_that_is_no_home_is_refused(pmet: Invoke, tmp_path: Path) -> None:
    for command in (["versions"], ["rollback"], ["facts", "ledger"]):
        status, _, err = pmet(*command, tmp_path)
        assert (status, "is not a home folder" in err) == (2, True)


def test_a_night_on_gpus_that_are_not_there_is_refused(
    pmet: Invoke, refresh_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    settings = ["--set", f"home={tmp_path / 'new'}", "--set", "update.gpus_per_rank=1"]
    status, _, err = pmet("refresh", refresh_file, *settings)
    assert status == 2
    assert "update.gpus_per_rank: 1, but this machine has no GPU" in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("error", "status", "ended"),
    [(KeyboardInterrupt(), "stopped", 130), (RuntimeError("a bug"), "failed", 1)],
)
def test_an_interrupted_refresh_is_recorded(
    pmet: Invoke,
    refresh_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: str,
    ended: int,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    plan = SimpleNamespace(digests={})
    monkeypatch.setattr("jobs.refresh.night.plan_run", lambda *_, **__: plan)
    monkeypatch.setattr("jobs.refresh.night.run_plan", broken)
    found, _, err = pmet("refresh", refresh_file, "--set", f"home={tmp_path / 'new'}")
    assert found == ended, err
    night = Home(str(tmp_path / "new")).night(1)
    assert night["status"] == status
    assert night["finished_at"]
