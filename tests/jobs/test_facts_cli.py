"""``pmet facts`` on the command line."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import boto3
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from pipeline.data.tables import read_requests
from pipeline.storage.store import Store, read_parquet
from tests.jobs.conftest import Invoke
from tests.jobs.facts.test_dataset import ZSRE
from tests.jobs.facts.wikidata.conftest import dump_of, entity, ref

OLD = [("Lyon", "country", "France"), ("Nice", "country", "Italy"), ("Rome", "country", "Italy")]
NEW = [("Nice", "country", "France"), ("Bern", "country", ""), ("Lyon", "country", "France")]
TEMPLATES = 'country: {prompt: "{} lies in", paraphrases: ["Where is {}? In"]}\n'


def parquet(rows: list[tuple[str, ...]], names: tuple[str, ...] = ()) -> bytes:
    columns = names or ("subject", "relation", "object")
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in rows])
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def facts(pmet: Invoke) -> Invoke:
    """Run ``pmet facts``; return exit status, output and error output."""
    return partial(pmet, "facts")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in (("old", OLD), ("new", NEW)):
        (tmp_path / f"{name}.parquet").write_bytes(parquet(rows))
    (tmp_path / "t.yaml").write_text(TEMPLATES)
    (tmp_path / "zsre.json").write_text(json.dumps([ZSRE]))
    return tmp_path


def test_help_says_what_there_is(facts: Invoke, pmet: Invoke) -> None:
    assert "facts" in pmet("--help")[1]
    status, out, _ = facts("--help")
    assert status == 0
    for command in ("convert", "check", "diff"):
        assert command in out
        assert facts(command, "--help")[0] == 0


def through(facts: Invoke, store: Store) -> None:
    """Check, compare and convert a dump, and read the requests as a run does."""
    for name, rows in (("old.parquet", OLD), ("tonight/r=1/new.parquet", NEW)):
        store.write_bytes(name, parquet(rows))
    store.write_bytes("t.yaml", TEMPLATES.encode())
    old, new = store.join("old.parquet"), store.join("tonight")
    status, out, _ = facts("check", new, "--templates", store.join("t.yaml"))
    assert (status, "2 of 3 rows can be used" in out) == (0, True)
    status, out, _ = facts("diff", old, new, "--output", store.join("diff.parquet"))
    assert (status, "Nice · country: Italy → France" in out) == (0, True)
    changes = read_parquet(store.join("diff.parquet")).to_pylist()
    assert [(c["change"], c["subject"]) for c in changes] == [
        ("changed", "Nice"),
        ("removed", "Rome"),
    ]
    output = store.join("requests/facts.parquet")
    status, out, _ = facts(
        "convert", new, output, "--templates", store.join("t.yaml"), "--previous", old
    )
    assert (status, "2 of 3 rows converted, 1 rejected" in out) == (0, True)
    assert output in out
    requests = read_requests(store.join("requests")).requests
    assert [(r.subject, r.target_new, r.target_true) for r in requests] == [
        ("Nice", "France", "Italy"),
        ("Lyon", "France", None),
    ]
    rejected = read_parquet(store.join("requests/rejected/facts.parquet")).to_pylist()
    assert [(r["row"], r["r"]) for r in rejected] == [(1, "1")]


def test_a_night_on_the_disk(facts: Invoke, tmp_path: Path) -> None:
    through(facts, Store(tmp_path / "a folder"))


def test_a_night_in_memory(facts: Invoke) -> None:
    through(facts, Store(f"memory://{uuid.uuid4().hex}"))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    s3 = fsspec.get_filesystem_class("s3")
    s3.clear_instance_cache()
    boto3.client("s3").create_bucket(Bucket="facts")
    yield "s3://facts"
    s3.clear_instance_cache()
    server.stop()


def test_a_night_on_an_object_store(facts: Invoke, bucket: str) -> None:
    through(facts, Store(f"{bucket}/nights"))


def test_wikidata_and_tables(facts: Invoke, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("P19: {prompt: '{} was born in'}")
    (tmp_path / "w.json").write_bytes(
        dump_of([entity("Q1", "Ada", P19=ref("Q2"), P31=ref("Q5")), entity("Q2", "Ur")])
    )
    given = ("--templates", tmp_path / "m.yaml", "--languages", "en, en", "--instance-of", "Q5")
    status, out, _ = facts("convert", tmp_path / "w.json", tmp_path / "o.parquet", *given)
    assert (status, "Wikidata dump: 1 of 1 rows converted, 0 rejected" in out) == (0, True)
    assert "read: 1 without these properties" in out
    status, _, err = facts("convert", tmp_path / "w.json", tmp_path / "o.parquet")
    assert (status, "properties need templates" in err) == (2, True)
    (tmp_path / "t.yaml").write_text(TEMPLATES)
    (tmp_path / "f.csv").write_text("name;relation;value\nLyon;country;France\n")
    given = ("--templates", tmp_path / "t.yaml", "--columns", "subject=name,object=value")
    status, out, _ = facts("convert", tmp_path / "f.csv", tmp_path / "c.parquet", *given)
    assert (status, "fact dump: 1 of 1 rows converted" in out) == (0, True)


def test_findings_for_machines(facts: Invoke, folder: Path) -> None:
    status, out, _ = facts("check", folder / "new.parquet", "--json")
    said = json.loads(out)
    assert (status, said["rows"], said["usable"], said["is_usable"]) == (0, 3, 2, True)
    assert said["findings"] == [
        {
            "kind": "empty object",
            "level": "error",
            "count": 1,
            "examples": [
                {
                    "row": 1,
                    "text": "Bern · country · ''",
                    "reason": "object is empty; give text that is more than white space",
                }
            ],
        }
    ]


def test_the_exit_status_says_whether_it_can_be_used(facts: Invoke, folder: Path) -> None:
    good, new = folder / "old.parquet", folder / "new.parquet"
    assert facts("check", good, "--strict")[0] == 0
    assert facts("check", new)[0] == 0
    assert facts("check", new, "--strict")[0] == 2
    (folder / "t.yaml").write_text('other: {prompt: "{} is"}')
    status, out, _ = facts("check", good, "--templates", folder / "t.yaml")
    assert (status, "0 of 3 rows can be used" in out) == (2, True)
    good.write_bytes(good.read_bytes()[:-20])
    status, out, _ = facts("check", good)
    assert (status, "damaged file" in out) == (2, True)


def test_a_request_table_is_checked_as_one(facts: Invoke, folder: Path) -> None:
    names = ("prompt", "subject", "target_new")
    (folder / "r.parquet").write_bytes(parquet([("{} is", "A", "x"), ("is", "A", "x")], names))
    status, out, _ = facts("check", folder / "r.parquet")
    assert (status, "edit requests: 1 of 2 rows can be used" in out) == (0, True)
    assert "row 1: prompt 'is' holds 0 places for the subject" in out


def test_columns_are_mapped_in_every_command(facts: Invoke, folder: Path) -> None:
    (folder / "m.parquet").write_bytes(parquet(OLD, ("entity", "relation", "object")))
    mapped = ("--column", "subject=entity")
    assert facts("check", folder / "m.parquet", *mapped)[0] == 0
    assert (
        "│ unchanged │ 3" in facts("diff", folder / "m.parquet", folder / "m.parquet", *mapped)[1]
    )
    output = folder / "out" / "m.parquet"
    arguments = (folder / "m.parquet", output, "--templates", folder / "t.yaml")
    assert facts("convert", *arguments, *mapped)[0] == 0
    assert len(read_requests(str(output)).requests) == 3


def test_time_can_be_set(facts: Invoke, folder: Path) -> None:
    names = ("subject", "relation", "object", "valid_until")
    rows = [(*row, "2020-01-01") for row in OLD]
    (folder / "v.parquet").write_bytes(parquet(rows, names))
    assert facts("check", folder / "v.parquet")[0] == 2
    assert facts("check", folder / "v.parquet", "--as-of", "2020-01-01T12:00")[0] == 0
    versus = (folder / "v.parquet", folder / "v.parquet")
    assert "│ removed   │ 3" in facts("diff", *versus)[1]
    assert "│ removed   │ 0" in facts("diff", *versus, "--old-as-of", "2026-01-01")[1]
    assert "│ unchanged │ 3" in facts("diff", *versus, "--as-of", "2020-01-01T12:00")[1]


def test_a_data_set_of_edits_is_converted(facts: Invoke, folder: Path) -> None:
    output = folder / "out" / "zsre.parquet"
    status, out, _ = facts("convert", folder / "zsre.json", output)
    assert (status, "zsre: 1 of 1 rows converted, 0 rejected" in out) == (0, True)
    assert read_requests(str(output)).requests[0].subject == "Watts Humphrey"


def test_an_output_may_lie_beside_what_is_read(
    facts: Invoke, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for source, output in (("new.parquet", "out.parquet"), ("n*.parquet", "out/new.parquet")):
        assert facts("convert", source, output, "--templates", "t.yaml")[0] == 0


def test_markup_in_facts_is_shown_as_it_is(facts: Invoke, folder: Path) -> None:
    (folder / "m.parquet").write_bytes(parquet([("[red]A[/red]", "r", ""), ("B", "[b]", "x")]))
    assert "[red]A[/red]" in facts("check", folder / "m.parquet")[1]
    assert "B · [b]: x" in facts("diff", folder / "old.parquet", folder / "m.parquet")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("check none.parquet", "none.parquet matches no file"),
        ("check zsre.json", "cannot read"),
        ("check new.parquet --column subject", "--column subject: write it as subject=NAME"),
        ("check new.parquet --column who=subject", "--column who: a dump has no such column"),
        ("check new.parquet --column subject=a --column subject=b", "subject is given twice"),
        (
            "check new.parquet --as-of noon",
            "--as-of: 'noon' is not a time; write it like 2026-11-23",
        ),
        ("check new.parquet --templates none.yaml", "templates: cannot read"),
        ("diff old.parquet none.parquet", "none.parquet matches no file"),
        ("diff old.parquet new.parquet --output old.parquet", "one of the input files"),
        ("convert . out.parquet --templates t.yaml", "read as part of . next time"),
        ("convert n*.parquet n2.parquet --templates t.yaml", "read as part of n*.parquet next"),
        ("diff old.parquet . --output a/b.parquet", "would be read as part of . next time"),
        ("convert new.parquet out.parquet", "give a templates file with --templates"),
        ("convert new.parquet new.parquet --templates t.yaml", "one of the input files"),
        (
            "convert new.parquet out.parquet --format xml",
            "--format: 'xml' is not a format; use one",
        ),
        ("convert zsre.json out.parquet --templates t.yaml", "--templates is for fact dumps"),
        ("convert zsre.json out.parquet --format counterfact", "none of 1 rows can be converted"),
        ("convert t.yaml out.parquet", "not Parquet, JSON"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_2(
    facts: Invoke,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    status, out, err = facts(*arguments.split())
    assert status == 2
    assert message in err + out
    assert "Traceback" not in out + err
    assert len(err.splitlines()) <= 1
    assert {path: path.read_bytes() for path in folder.glob("*.*")} == before


def test_more_files_than_two_are_refused_before_one_is_overwritten(
    facts: Invoke, folder: Path
) -> None:
    """As if the shell had expanded a glob."""
    assert facts("convert", *sorted(folder.glob("*.parquet")), folder / "x", "y")[0] == 2


def test_requests_in_other_forms_are_converted_and_empty_texts_counted(
    facts: Invoke, tmp_path: Path
) -> None:
    row = {"prompt": "{} is", "subject": "A", "target_new": "B", "paraphrase_prompts": ["a", None]}
    (tmp_path / "f.json").write_text(json.dumps({"records": [row]}))
    (tmp_path / "f.csv").write_text('prompt,subject,target_new\n"{} is",A,B\n')
    output = tmp_path / "o" / "requests.parquet"
    status, out, _ = facts("convert", str(tmp_path / "f.json"), str(output))
    assert (status, "requests: 1 of 1 rows converted, 0 rejected" in out) == (0, True)
    assert "left out of requests: 1 null or empty texts" in out
    assert read_requests(str(output)).requests[0].paraphrase_prompts == ("a",)
    status, out, _ = facts("convert", str(tmp_path / "f.csv"), str(output))
    assert (status, "left out" in out) == (0, False)
    assert read_requests(str(output)).requests[0].target_new == "B"


def test_parquet_is_a_data_set_only_where_it_is_no_dump(facts: Invoke, tmp_path: Path) -> None:
    rewrite = {"prompt": "{} is", "subject": "A", "target_new": {"str": "B", "id": "Q1"}}
    pq.write_table(pa.Table.from_pylist([{"requested_rewrite": rewrite}]), tmp_path / "hub.parquet")
    output = str(tmp_path / "o" / "requests.parquet")
    status, out, _ = facts("convert", str(tmp_path / "hub.parquet"), output)
    assert (status, "counterfact: 1 of 1 rows converted" in out) == (0, True)
    status, _, error = facts(
        "convert", str(tmp_path / "hub.parquet"), output, "--templates", "t.yaml"
    )
    assert (status, "--templates is for fact dumps" in error) == (2, True)
    (tmp_path / "dump.parquet").write_bytes(parquet(OLD))
    status, _, error = facts("convert", str(tmp_path / "dump.parquet"), output)
    assert (status, "is a fact dump, so its relations need templates" in error) == (
        2,
        True,
    )
    status, _, error = facts(
        *("convert", str(tmp_path / "hub.parquet"), output, "--column", "subject=x"),
        *("--templates", "t.yaml"),
    )
    assert (status, "t.yaml" in error or "has no column" in error) == (2, True)


def test_files_of_the_users_are_not_replaced(facts: Invoke, folder: Path) -> None:
    convert = ("convert", folder / "new.parquet")
    templates = ("--templates", folder / "t.yaml")
    # Its own output may be overwritten.
    for _ in range(2):
        assert facts(*convert, folder / "requests.parquet", *templates)[0] == 0
        assert (
            facts(
                "diff",
                folder / "old.parquet",
                folder / "new.parquet",
                "--output",
                folder / "d.parquet",
            )[0]
            == 0
        )
    (folder / "link.parquet").symlink_to(folder / "new.parquet")
    (folder / "rejected" / "mine.parquet").write_text("mine")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for output, reason in (
        ("old.parquet", "old.parquet already exists and was not written by this command"),
        ("zsre.json", "zsre.json already exists"),
        ("t.yaml", "is one of the input files"),
        ("link.parquet", "is one of the input files"),
        (f"../{folder.name}/new.parquet", "is one of the input files"),
        ("mine.parquet", "rejected/mine.parquet already exists"),
    ):
        status, _, err = facts(*convert, folder / output, *templates)
        assert (status, reason in err) == (2, True), err
    status, _, err = facts(
        "convert", folder / "zsre.json", f"file://{folder}/zsre.json", "--format", "zsre"
    )
    assert (status, "is one of the input files" in err) == (2, True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
