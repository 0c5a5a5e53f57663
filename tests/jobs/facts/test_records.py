"""Records of JSON, JSON Lines, CSV and Parquet."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.facts.records import read_records, unwrapped
from pipeline.errors import FactDumpError

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
RECORDS = st.lists(
    st.dictionaries(st.sampled_from("abc"), st.one_of(st.none(), st.integers(), TEXT), min_size=1),
    min_size=1,
    max_size=4,
)


def is_record(value: Any) -> bool:
    return isinstance(value, dict) and set(value) <= set("abc")


@given(records=RECORDS, names=st.lists(st.sampled_from(["data", "records", "train"]), max_size=3))
def test_wrappers_are_taken_off(records: list[Any], names: list[str]) -> None:
    wrapped: Any = records
    for name in names:
        wrapped = {name: wrapped}
    assert unwrapped(wrapped, is_record) == records
    assert unwrapped({"version": "1.0", "data": records}, is_record) == records


@pytest.mark.parametrize(
    "value", [{"a": [{"b": 1}]}, {"success": [{"q": 1}], "locality": [{"q": 2}]}, [], 3, {"x": []}]
)
def test_what_is_no_wrapper_stays(value: Any) -> None:
    assert unwrapped(value, is_record) == value


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(st.tuples(TEXT, TEXT, st.lists(TEXT, max_size=3)), max_size=5),
    delimiter=st.sampled_from(",;\t"),
    bom=st.booleans(),
)
def test_a_table_comes_back_as_it_was_written(
    tmp_path: Path, rows: list[tuple[str, str, list[str]]], delimiter: str, bom: bool
) -> None:
    stream = io.StringIO(newline="")
    names = ["prompt", "note", "paraphrase_prompts"]
    writer = csv.writer(stream, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerow(names)
    writer.writerows([prompt, note, json.dumps(texts)] for prompt, note, texts in rows)
    path = tmp_path / "t.csv"
    path.write_bytes(stream.getvalue().encode("utf-8-sig" if bom else "utf-8"))
    assert read_records(str(path), {}) == [
        dict(zip(names, (prompt or None, note or None, texts), strict=True))
        for prompt, note, texts in rows
    ]


def test_fields_of_a_table_keep_their_text(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("case_id,subject,paraphrase_prompts\n7,NA,one text\n007,3,\n1,2,3,4\n")
    assert read_records(str(path), {}) == [
        {"case_id": 7, "subject": "NA", "paraphrase_prompts": ["one text"]},
        {"case_id": "007", "subject": "3", "paraphrase_prompts": None},
        {"case_id": 1, "subject": "2", "paraphrase_prompts": ["3"], None: ["4"]},
    ]


def test_what_is_no_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('a,b\n1,"x\n')
    with pytest.raises(
        FactDumpError, match=r"t\.csv: line 1 is not valid CSV \(.*\); write it again"
    ):
        read_records(str(path), {})
    path.write_text("a,a\n1,2\n")
    with pytest.raises(FactDumpError, match="has two columns named 'a'; rename one"):
        read_records(str(path), {})


def test_parquet_whose_text_is_not_utf8_is_read_and_stays_legible(tmp_path: Path) -> None:
    inside = pa.StructArray.from_arrays([pa.array([b"a\xff"]).view(pa.string())], ["str"])
    pq.write_table(pa.table({"target": inside}), tmp_path / "t.parquet")
    found = read_records(str(tmp_path / "t.parquet"), {"relation": "a"})
    assert found == [{"relation": "a", "target": {"str": "a\\xff"}}]
