"""Consecutive refreshes of a model: what each computes, and which version it leaves in use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.refresh.config import RefreshConfig, load_refresh
from jobs.refresh.home import CURRENT, LEDGER, CurrentMovedError, Home, path
from jobs.refresh.ledger import Ledger
from jobs.refresh.night import Refreshed, job_of, preview, refresh
from pipeline.errors import FactDumpError, FolderBusyError, NoPresetError
from pipeline.job.config import GatesConfig
from pipeline.models import Checkpoint
from pipeline.run import run_job
from pipeline.run_folder.lease import Lease
from tests.conftest import GOLDEN

FIRST = 24

pytestmark = pytest.mark.slow


@dataclass
class Place:
    """A folder with dumps, a refresh file and a home, and the content of the current dump.

    Attributes:
        folder: where it is.
        url: location of the home.
        objects: objects in the dump that differ from the baseline, by subject.
    """

    folder: Path
    url: str
    objects: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Home:
        return Home(self.url)

    def config(self, **changes: Any) -> RefreshConfig:
        return load_refresh(self.file()).model_copy(update=changes)

    def file(self) -> Path:
        return self.folder / "refresh.yaml"

    def write(self, name: str = "tonight", more: list[dict[str, Any]] | None = None) -> None:
        rows = [
            {
                "subject": fact["subject"],
                "relation": fact["relation"],
                "object": self.objects.get(fact["subject"], fact["target_true"]),
            }
            for fact in FACTS
        ]
        table = pa.Table.from_pylist(rows + (more or []))
        pq.write_table(table, self.folder / f"{name}.parquet")

    def tonight(self, **changes: Any) -> Refreshed:
        self.write()
        return refresh(self.config(**changes))

    def weights(self, version: int) -> bytes:
        return self.home.store.read_bytes(path(version, "model", "model.safetensors"))

    def tell(self, start: int, stop: int) -> list[str]:
        """Put the new objects of some golden facts into the dump; return their subjects."""
        self.objects |= {f["subject"]: f["target_new"] for f in FACTS[start:stop]}
        return [fact["subject"] for fact in FACTS[start:stop]]


FACTS = json.loads((GOLDEN / "facts.json").read_text())


def place(folder: Path, url: str | None = None) -> Place:
    """A home of the golden model before its first refresh, beside its dumps or at a URL."""
    url = url or str(folder / "home")
    folder.mkdir(parents=True, exist_ok=True)
    texts = json.loads((GOLDEN / "corpus.json").read_text())
    pq.write_table(pa.table({"text": texts}), folder / "corpus.parquet")
    templates = {f["relation"]: {"prompt": f["prompt"]} for f in FACTS}
    (folder / "templates.yaml").write_text(yaml.safe_dump(templates))
    golden = GOLDEN / "gpt2"
    settings = {
        "model": str(golden / "model"),
        "facts": str(folder / "tonight.parquet"),
        "baseline": str(folder / "baseline.parquet"),
        "templates": str(folder / "templates.yaml"),
        "home": url,
        "hparams": str(golden / "hparams.json"),
        "second_moments": str(golden / "second_moments.safetensors"),
        "context_templates": str(golden / "context_templates.json"),
        "targets": {"workers": 0, "shard_size": 8},
        "update": {"ranks": 0},
    }
    (folder / "refresh.yaml").write_text(yaml.safe_dump(settings))
    found = Place(folder, url)
    found.write("baseline")
    found.tell(0, FIRST)
    return found


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Any]:
    """A home after a refresh with 24 facts and one with 3 added, one changed, one removed."""
    found = place(tmp_path_factory.mktemp("nights"))
    first = found.tonight()
    gone, changed = FACTS[0], FACTS[1]
    del found.objects[gone["subject"]]
    found.objects[changed["subject"]] = "Bob"
    found.tell(FIRST, FIRST + 2)
    return found, (first, found.tonight())


def test_a_night_computes_what_the_dump_changes(nights: tuple[Place, Any]) -> None:
    found, (first, second) = nights
    assert first.night["targets"] == {"found": FIRST, "stored": 0}
    assert second.night["targets"] == {"found": 3, "stored": FIRST - 2}
    assert second.night["changes"] == {"added": 2, "changed": 1, "removed": 1}
    stages = found.home.store.read_json(path(2, "run.json"))["stages"]
    (before,) = [s["detail"] for s in stages if s["name"] == "measure before"]
    # Most facts kept their prompts, for which the base's answers are stored.
    assert FIRST // 2 < before["stored"] <= FIRST - 2
    ledger = Ledger.read(found.home.store.read_table(path(2, LEDGER)))
    assert {e.subject: e.object for e in ledger.entries.values()} == found.objects
    assert json.loads(found.home.store.read_bytes(CURRENT))["version"] == 2


def test_its_weights_are_those_of_one_batch_on_the_base(
    nights: tuple[Place, Any], tmp_path: Path
) -> None:
    found, (_, second) = nights
    job = job_of(found.config(), found.home, second.version)
    run_job(job.model_copy(update={"output": str(tmp_path / "run")}))
    fresh = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    assert fresh == found.weights(second.version) != found.weights(1)


def test_a_night_takes_what_a_search_has_found_for_its_model(tmp_path: Path) -> None:
    found, tuned, golden = place(tmp_path), tmp_path / "tuned", GOLDEN / "gpt2"
    tuned.mkdir()
    shutil.copy(golden / "second_moments.safetensors", tuned)
    values = json.loads((golden / "hparams.json").read_text())
    fixed = values.pop("mom2_update_weight")
    values["mom2_update_share"] = 0.5
    (tuned / "hparams.yaml").write_text(yaml.safe_dump(values))
    automatic = {"hparams": "auto", "second_moments": str(tuned / "second_moments.safetensors")}
    with pytest.raises(NoPresetError, match="find one with pmet tune"):
        found.tonight(**automatic)
    about = {"model": Checkpoint.open(golden / "model").digest()}
    (tuned / "tune.json").write_text(json.dumps({"about": about}))
    result = found.tonight(**automatic)
    assert result.status == "promoted"
    record = found.home.store.read_json(path(result.version, "run.json"))
    assert record["origins"]["hyper-parameters"].endswith("hparams.yaml, found by pmet tune")
    assert all(layer["weight"] != fixed for layer in record["layers"])


def test_a_night_without_news_starts_nothing(nights: tuple[Place, Any]) -> None:
    found, _ = nights
    versions = found.home.versions()
    result = found.tonight()
    assert (result.status, result.version) == ("unchanged", 2)
    assert found.home.versions() == versions


def test_a_preview_says_what_would_change_and_writes_nothing(nights: tuple[Place, Any]) -> None:
    found, _ = nights
    before = found.home.store.list()
    found.write()
    (added,) = preview(found.config(baseline=None)).changes[:1]
    assert added.change == "added"
    assert found.home.store.list() == before


def test_a_retracted_fact_leaves_the_weights_as_if_it_had_never_been(
    tmp_path: Path,
) -> None:
    found = place(tmp_path)
    found.objects = dict(list(found.objects.items())[:8])
    found.tonight(quarantine_after=None)
    (subject,) = found.tell(30, 31)
    found.tonight(quarantine_after=None)
    relation = FACTS[30]["relation"]
    found.home.retract(subject, relation, "retract", "asked for")
    result = found.tonight(quarantine_after=None)
    assert result.night["changes"] == {"retracted": 1}
    assert found.weights(3) == found.weights(1) != found.weights(2)
    # And back: at once by rollback, with the next refresh by restore.
    assert found.home.rollback().version == 2
    assert found.home.rollback().version == 3
    found.home.retract(subject, relation, "restore")
    assert found.tonight(quarantine_after=None).night["changes"] == {"restored": 1}
    assert found.weights(4) == found.weights(2)


def test_a_gate_holds_a_version_back(nights: tuple[Place, Any], tmp_path: Path) -> None:
    found, _ = nights
    current = found.home.current()
    # No fraction can be more than 1 above the previous one; a job file could not require that.
    gates = GatesConfig.model_construct(efficacy=0.0, efficacy_strict_drop_since_last=-1.1)
    found.tell(40, 41)
    result = found.tonight(gates=gates)
    assert result.status == result.night["status"] == "held"
    metrics = result.night["metrics"]
    assert current is not None
    last = found.home.scores(current.version)
    assert metrics["last"]["after"] == last
    _, held_by = metrics["gates"]
    drop = last["efficacy_strict"] - metrics["after"]["efficacy_strict"]
    assert held_by["value"] == pytest.approx(drop)
    assert found.home.current() == current
    # It is kept, so that a person may still promote it.
    assert found.home.is_kept(result.version)
    del found.objects[FACTS[40]["subject"]]


def test_a_rollback_during_a_night_stays(nights: tuple[Place, Any], monkeypatch) -> None:
    found, _ = nights
    moved = []

    def while_it_is_measured(*_: Any) -> None:
        moved.append(found.home.rollback(1))

    monkeypatch.setattr("jobs.refresh.night.concluded", _and_then(while_it_is_measured))
    found.tell(50, 51)
    with pytest.raises(CurrentMovedError, match="moved in the meantime, to version 1"):
        found.tonight()
    assert found.home.current() == moved[0]
    found.home.rollback(2)
    del found.objects[FACTS[50]["subject"]]


def _and_then(do: Callable[..., None]) -> Callable[..., Any]:
    from jobs.refresh.ledger import concluded

    def both(*args: Any, **kwargs: Any) -> Any:
        do()
        return concluded(*args, **kwargs)

    return both


def test_what_the_dump_contradicts_stays_as_it_was(nights: tuple[Place, Any]) -> None:
    found, _ = nights
    fact = FACTS[2]
    found.write(more=[{"subject": fact["subject"], "relation": fact["relation"], "object": "Eve"}])
    result = refresh(found.config())
    assert (result.status, result.version) == ("unchanged", 2)


def test_a_dump_that_has_lost_most_facts_is_refused(nights: tuple[Place, Any]) -> None:
    found, _ = nights
    current, objects = found.home.current(), found.objects
    found.objects = {}
    with pytest.raises(FactDumpError, match="25 of 25 live facts are no longer there"):
        found.tonight()
    assert found.home.current() == current
    result = found.tonight(most_removed=None)
    assert found.weights(result.version) == (GOLDEN / "gpt2/model/model.safetensors").read_bytes()
    assert found.tonight().status == "unchanged"
    found.objects = objects
    found.home.rollback(2)


def test_of_two_refreshes_at_once_one_runs(nights: tuple[Place, Any]) -> None:
    found, _ = nights
    refused = pytest.raises(FolderBusyError, match="is being written by another run")
    with Lease.acquire(found.home.store), refused:
        found.tonight()
