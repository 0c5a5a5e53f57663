"""Fact dumps that are not Parquet: CSV, JSON Lines, saved data sets, Delta and Iceberg tables."""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.facts.sources import ConvertOptions, convert_source
from jobs.facts.staged import CODE, REASON
from jobs.facts.tables import stage
from pipeline.errors import FactDumpError
from tests.jobs.facts.test_dataset import COUNTERFACT, REQUEST

FACTS = [
    {"subject": "Lyon", "relation": "country", "object": "France", "note": "a"},
    {"subject": "Bern", "relation": "country", "object": "Switzerland", "note": None},
]
TABLE = pa.Table.from_pylist(FACTS)


@pytest.fixture
def convert(tmp_path: Path):
    """Convert a source; return the result, the requests and the rejected rows."""
    (tmp_path / "t.yaml").write_text('country: {prompt: "{} lies in"}')

    def converted(source: Any, **options: Any):
        output = str(tmp_path / "out" / "facts.parquet")
        options = {"templates": str(tmp_path / "t.yaml")} | options
        found = convert_source(str(source), output, ConvertOptions(**options))
        return found, *(pq.read_table(p).to_pylist() for p in (output, found.rejected_output))

    return converted


def brief(requests: list[dict[str, Any]]) -> list[tuple[str, str, str | None]]:
    return [(r["subject"], r["target_new"], r.get("note")) for r in requests]


GOOD = [("Lyon", "France", "a"), ("Bern", "Switzerland", None)]


def csv_of(delimiter: str) -> bytes:
    rows = [list(FACTS[0]), *([v or "" for v in fact.values()] for fact in FACTS)]
    return "".join(delimiter.join(row) + "\r\n" for row in rows).encode("utf-8-sig")


LINES = b"\n".join(json.dumps(fact).encode() for fact in FACTS)
TEXTS = {
    "f.csv": csv_of(","),
    "f.tsv": csv_of("\t"),
    "f.csv.gz": gzip.compress(csv_of(";")),
    "f.jsonl": LINES,
    "f.json.gz": gzip.compress(LINES),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_tables(convert, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(TEXTS[name])
    found, requests, rejected = convert(tmp_path / name)
    assert (found.format, brief(requests), rejected) == ("fact dump", GOOD, [])
    _, facts, _ = convert(tmp_path / name, as_dump=True)
    assert facts == FACTS


def test_columns_are_mapped_and_folders_are_columns(convert, tmp_path: Path) -> None:
    (tmp_path / "relation=country").mkdir()
    (tmp_path / "relation=country" / "f.csv").write_text("name,value\nLyon,France\n")
    pattern = f"{tmp_path}/*/f.csv"
    _, requests, _ = convert(pattern, column={"subject": "name", "object": "value"})
    assert (brief(requests), requests[0]["relation"]) == ([("Lyon", "France", None)], "country")
    with pytest.raises(FactDumpError, match=r"relation=country/f.csv has no column x; a fact dump"):
        convert(pattern, column={"subject": "x", "object": "value"})


def test_rows_that_cannot_be_read_keep_their_number_and_reason(convert, tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_bytes(
        b"subject,relation,object\n"
        b"Lyon,country,France\n"
        b'Bonn,country,"Ger"many\n'
        b"Ulm,country\n"
        b"\n"
        b"K\xf6ln,country,Germany\n"
        b"Lyon,country,France\n"
        b'Kiel,country,"Ger'
    )
    found, requests, rejected = convert(tmp_path / "f.csv")
    assert brief(requests) == [("Lyon", "France", None)]
    assert [(r["row"], r["code"], r["reason"][:30]) for r in rejected] == [
        (1, "unreadable", "line 3 is not CSV (',' expecte"),
        (2, "unreadable", "line 4 has 2 fields, the heade"),
        (3, "unreadable", "line 6 is not UTF-8"),
        (4, "duplicate", "repeats row 0: same subject, r"),
        (5, "unreadable", "line 8 is not CSV (unexpected "),
    ]
    assert found.rejected == {"unreadable": 4, "duplicate": 1}
    lines = [
        b'{"subject": "Lyon", "relation": "country", "object": "France"}',
        b'{"subject": "Bonn", "relation": "country", "obj',
        b"[1]",
        b'{"subject": "Ulm", "subject": "Ulm"}',
        b'{"subject": "K\xff"}',
        b'{"subject": ["Ulm"], "relation": "country", "object": "x"}',
        b'{"subject": "Ulm", "relation": "country", "object": NaN}',
        b'{"subject": 1984, "relation": "country", "object": 7, "new": {"a": [1]}}',
        b"[" * 100_000,
    ]
    (tmp_path / "f.jsonl").write_bytes(b"\n".join(lines))
    _, requests, rejected = convert(tmp_path / "f.jsonl")
    assert [(r["subject"], r["target_new"], r["new"]) for r in requests] == [
        ("Lyon", "France", None),
        ("1984", "7", '{"a": [1]}'),
    ]
    assert [(r["row"], r["code"]) for r in rejected] == [
        *((row, "unreadable") for row in (1, 2, 3, 4)),
        (5, "subject-of-a-wrong-type"),
        (6, "object-of-a-wrong-type"),
        (8, "unreadable"),
    ]


def test_over_long_lines_and_too_many_columns(
    convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.facts.tables.text.LONGEST", 1 << 20)
    monkeypatch.setattr(stage, "MOST_COLUMNS", 8)
    long = "x" * (3 << 20)
    (tmp_path / "f.csv").write_text(f"subject,relation,object\nA,country,{long}\nB,country,b\n")
    _, requests, rejected = convert(tmp_path / "f.csv")
    assert (brief(requests), rejected[0]["code"]) == ([("B", "b", None)], "over-long-line")
    wide = FACTS[0] | {f"c{i}": i for i in range(9)}
    lines = [FACTS[1] | {"subject": long}, wide, FACTS[1]]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _, requests, rejected = convert(tmp_path / "f.jsonl", format="dump")
    assert brief(requests) == [GOOD[1]]
    assert [row["code"] for row in rejected] == ["over-long-line", "too-many-fields"]


VALUES = st.none() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.none())
FIELDS = st.dictionaries(st.sampled_from(["subject", "relation", "object", "x", ""]), VALUES)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lines=st.lists(FIELDS.map(lambda f: json.dumps(f).encode()) | st.binary(max_size=9)))
@pytest.mark.parametrize("name", ["f.jsonl", "f.csv"])
def test_no_line_breaks_a_table(tmp_path: Path, name: str, lines: list[bytes]) -> None:
    first = json.dumps(FACTS[0]) if name == "f.jsonl" else "subject,relation,object\nA,country,B"
    (tmp_path / name).write_bytes(b"\n".join([first.encode(), *lines]))
    with tempfile.TemporaryDirectory() as folder:
        stage.stage_text({str(tmp_path / name): {}}, folder, {})
        rows = [row for f in sorted(Path(folder).iterdir()) for row in pq.read_table(f).to_pylist()]
    assert rows[0]["subject"] in ("A", "Lyon")
    assert all((row[CODE] is None) == (row[REASON] is None) for row in rows)
    assert all(row["object"] is None for row in rows if row[CODE] is not None)


def test_edits_in_text_stay_edits(convert, tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text(json.dumps(REQUEST))
    found, _, _ = convert(tmp_path / "f.jsonl", templates=None)
    assert found.format == "requests"


def save_to_disk(folder: Path, table: pa.Table, files: int = 1) -> None:
    """Write a folder as ``datasets`` does, an Arrow stream for each file."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{files:05d}.arrow" for n in range(files)]
    for number, name in enumerate(names):
        part = table.slice(number * len(table) // files, -(-len(table) // files))
        with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(part)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_a_saved_data_set(convert, tmp_path: Path) -> None:
    save_to_disk(tmp_path / "saved", TABLE, files=2)
    _, requests, _ = convert(tmp_path / "saved")
    assert brief(requests) == GOOD
    both = tmp_path / "both"
    save_to_disk(both / "train", TABLE.slice(0, 1))
    save_to_disk(
        both / "test", TABLE.slice(1).cast(TABLE.schema.set(3, pa.field("note", pa.string())))
    )
    (both / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    _, requests, _ = convert(both)
    assert [(r["subject"], r["split"]) for r in requests] == [("Lyon", "train"), ("Bern", "test")]
    save_to_disk(tmp_path / "edits", pa.Table.from_pylist([COUNTERFACT]))
    found, (request,), _ = convert(tmp_path / "edits", templates=None)
    assert (found.format, request["target_new"]) == ("counterfact", "English")


def test_the_datasets_library_itself(convert, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(FACTS).save_to_disk(tmp_path / "saved", num_shards=2)
    assert brief(convert(tmp_path / "saved")[1]) == GOOD


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("state.json", "{", r"state.json is not JSON \(.*save the data set again"),
        ("state.json", "[]", "state.json is not an object"),
        ("state.json", "{}", "state.json lists no files"),
        ("state.json", '{"_data_files": [{}]}', "has a file without a name"),
        ("state.json", '{"_data_files": [], "_indices_files": [1]}', "selects rows by an index"),
        ("data-00000-of-00001.arrow", "x", r"of-00001.arrow cannot be read \(.*save the data"),
        ("state.json", '{"_data_files": [{"filename": "x"}]}', r"saved/x is missing; save"),
        ("state.json", '{"_data_files": []}', "saved has no rows; give a table with facts"),
    ],
)
def test_damaged_data_sets(convert, tmp_path: Path, name: str, content: str, message: str) -> None:
    save_to_disk(tmp_path / "saved", TABLE)
    (tmp_path / "saved" / name).write_text(content)
    with pytest.raises(FactDumpError, match=message):
        convert(tmp_path / "saved")


def test_a_delta_table_is_its_current_version(convert, tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake")
    table = str(tmp_path / "delta")
    deltalake.write_deltalake(table, pa.Table.from_pylist([FACTS[0] | {"object": "Gaul"}]))
    deltalake.write_deltalake(table, TABLE, mode="overwrite")
    assert brief(convert(table)[1]) == GOOD
    (tmp_path / "delta" / "_delta_log" / f"{1:020d}.json").write_text("{")
    with pytest.raises(FactDumpError, match=r"delta cannot be read as a table \("):
        convert(table)


def test_an_iceberg_table_is_its_current_version(convert, tmp_path: Path) -> None:
    sql = pytest.importorskip("pyiceberg.catalog.sql")
    catalog = sql.SqlCatalog(
        "c", uri=f"sqlite:///{tmp_path}/catalog.db", warehouse=f"file://{tmp_path}/lake"
    )
    catalog.create_namespace("facts")
    table = catalog.create_table("facts.now", schema=TABLE.schema)
    table.append(pa.Table.from_pylist([FACTS[0] | {"object": "Gaul"}]))
    table.overwrite(TABLE)
    folder = tmp_path / "lake" / "facts" / "now"
    assert brief(convert(folder)[1]) == GOOD
    assert brief(convert(table.metadata_location)[1]) == GOOD
    for file in (folder / "data").iterdir():
        file.unlink()
    with pytest.raises(FactDumpError, match=r"now cannot be read as a table \("):
        convert(folder)


@pytest.mark.parametrize(
    ("library", "folder", "what"),
    [
        ("deltalake", "_delta_log/0.json", "a Delta table, which deltalake reads"),
        ("pyiceberg.table", "metadata/v1.metadata.json", "an Iceberg table, which pyiceberg reads"),
    ],
)
def test_a_missing_library_is_named(
    convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, folder: str, what: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "table" / folder).parent.mkdir(parents=True)
    (tmp_path / "table" / folder).write_text("{}")
    with pytest.raises(FactDumpError) as caught:
        convert(tmp_path / "table")
    assert str(caught.value) == (
        f"{tmp_path}/table is {what}; install it: pip install 'pmet-pipeline[tables]'"
    )
