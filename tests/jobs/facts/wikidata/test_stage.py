"""Wikidata's dumps and their changes, from the file to edit requests and fact dumps."""

from __future__ import annotations

import gzip
import json
import uuid
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.facts.diff import diff_dumps
from jobs.facts.dump.files import open_dump
from jobs.facts.sources import ConvertOptions, convert_source
from jobs.facts.wikidata import reader
from jobs.facts.wikidata.reader import EntityReader, WikidataSettings
from pipeline.data.tables import read_requests
from pipeline.errors import FactDumpError, OutputError
from pipeline.storage.store import Store
from tests.jobs.facts.wikidata.conftest import (
    MAPPING,
    NOW,
    Convert,
    amount,
    dump_of,
    entity,
    export_of,
    line,
    ref,
    statement,
    text,
    time,
    year,
)

KILO = "http://www.wikidata.org/entity/Q11573"
WORLD = [
    entity("Q1", "Ada Quill", P19=ref("Q20"), P569=time("+1931-03-11T00:00:00Z")),
    entity("Q20", "Brackwater", P6=ref("Q1")),
    entity("Q21", "Old Tor", P2048=amount("+80.5", KILO), P1448=text("Tor")),
    entity("Q11573", "metre"),
]


def reasons(rejected: list[dict]) -> dict[str | None, str]:
    return {row["case_id"]: row["code"] for row in rejected}


@pytest.mark.parametrize("name", ["dump.json", "dump.json.gz", "dump.json.bz2"])
def test_facts_are_put_into_words(convert: Convert, name: str) -> None:
    found, requests, rejected = convert(WORLD, name)
    assert (found.format, found.rows, found.converted, rejected) == ("Wikidata dump", 5, 5, [])
    assert requests[0] == {
        "prompt": "{} was born in",
        "subject": "Ada Quill",
        "target_new": "Brackwater",
        "case_id": "Q1-P19",
        "target_true": None,
        "paraphrase_prompts": ["The birthplace of Ada Quill is"],
        "neighborhood_prompts": [],
        "question_prompts": ["Where was Ada Quill born?"],
        "relation": "P19",
        "object": "Brackwater",
        "subject_id": "Q1",
        "object_id": "Q20",
        "valid_until": None,
    }
    assert {r["case_id"]: (r["target_new"], r["object_id"]) for r in requests[1:]} == {
        "Q1-P569": ("11 March 1931", None),
        "Q20-P6": ("Ada Quill", "Q1"),
        "Q21-P2048": ("80.5 metre", None),
        "Q21-P1448": ("Tor", None),
    }
    assert [r.case_id for r in read_requests(found.output).requests] == [
        r["case_id"] for r in requests
    ]
    assert found.notes == {"entities": 4, "without these properties": 1}


def test_what_gives_no_fact_is_kept_with_its_reason(convert: Convert) -> None:
    found, requests, rejected = convert(
        [
            *WORLD,
            entity("Q2", None, P19=ref("Q20")),
            entity("Q3", "C", P19=ref("Q99")),
            entity("Q4", "D", P19="novalue"),
            entity("Q5", "E", P19="somevalue"),
            entity("Q6", "F", P19=[statement(ref("Q20"), "deprecated")]),
            entity("Q7", "G", P6=[statement(ref("Q1"), P582=year(2019))]),
            entity("Q8", "H", P6=[statement(ref("Q1")), statement(ref("Q20"))]),
            entity("Q9", "I", P19={"type": "globe-coordinate", "value": {}}),
            entity("Q10", "J", P19={"type": "wikibase-entityid", "value": {"id": "L7"}}),
            entity("Q11", "K", P19={"type": "time", "value": 3}),
            entity("Q12", "L", P19=[{"rank": "normal"}]),
            entity("Q13", "M", P6=[statement(ref("Q1"), P580=year(2031))]),
            entity("Q14", "N", P569=time("+1500-01-01T00:00:00Z", 6)),
        ]
    )
    assert len(requests) == 5
    assert reasons(rejected) == {
        "Q2-P19": "subject-without-label",
        "Q3-P19": "object-without-label",
        "Q4-P19": "without-a-value",
        "Q5-P19": "of-an-unknown-value",
        "Q6-P19": "deprecated",
        "Q7-P6": "ended",
        "Q8-P6": "several-values",
        "Q9-P19": "value-type",
        "Q10-P19": "value-type",
        "Q11-P19": "unreadable",
        "Q12-P19": "unreadable",
        "Q13-P6": "not-begun",
        "Q14-P569": "coarse-time",
    }
    assert rejected[1]["reason"] == "Q99 has no label in en, mul"
    assert sum(found.rejected.values()) == len(rejected) == found.rows - found.converted
    assert found.rejected["object without label"] == 1
    assert found.notes["statements ended"] == 1


def test_two_entities_of_one_name_contradict_each_other(convert: Convert) -> None:
    two = [
        entity("Q1", "Ada", P569=year(1931)),
        entity("Q2", "Ada", P569=year(1955)),
        entity("Q3", "Bo", P569=year(1955)),
    ]
    _, requests, rejected = convert(two)
    assert [r["case_id"] for r in requests] == ["Q3-P569"]
    assert reasons(rejected) == {"Q1-P569": "contradiction", "Q2-P569": "contradiction"}


def test_damaged_lines_cost_only_themselves(
    convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.facts.wikidata.stage.LONGEST", 1 << 20)
    damaged = [
        line(WORLD[0])[:200],
        b'{"id":"Q7","labels":{"en":{"value":"\xff"}}}',
        b"[" * 100_000,
        b'"' + b"x" * (3 << 20) + b'"',
        b"null",
        line(entity("Q8") | {"labels": 5}),
    ]
    found, requests, rejected = convert([*WORLD, *damaged, entity("L1", "word"), {"id": "M3"}])
    assert len(requests) == 5
    assert [row["code"] for row in rejected] == [
        *["unreadable"] * 3,
        "over-long-line",
        *["unreadable"] * 2,
    ]
    assert "dump.json, line 6: not an entity (" in rejected[0]["reason"]
    assert "line 9: longer than 1 MiB" in rejected[3]["reason"]
    assert found.notes["neither an item nor a property"] == 2


@pytest.mark.parametrize("name", ["dump.json.gz", "dump.json.bz2"])
def test_an_incomplete_file_is_refused(convert: Convert, tmp_path: Path, name: str) -> None:
    convert(WORLD, name)
    path = tmp_path / name
    before = (tmp_path / "out" / "facts.parquet").read_bytes()
    path.write_bytes(path.read_bytes()[:-12])
    options = ConvertOptions(templates=str(tmp_path / "mapping.yaml"))
    with pytest.raises(FactDumpError, match=rf"{name} is damaged or incomplete \(.*download it"):
        convert_source(str(path), str(tmp_path / "out" / "facts.parquet"), options)
    assert (tmp_path / "out" / "facts.parquet").read_bytes() == before


def test_labels_fall_back_to_other_languages(convert: Convert) -> None:
    def named(name: str, **labels: str) -> dict:
        terms = {code: {"language": code, "value": value} for code, value in labels.items()}
        return entity(name, None, P1448=text("x"), P569=time("+1931-03-11T00:00:00Z")) | {
            "labels": terms
        }

    entities = [named("Q1", de="Köln", en="Cologne"), named("Q2", mul="Ur"), named("Q3", en=" ")]
    _, requests, rejected = convert(entities, languages=["de", "mul"])
    assert [(r["subject"], r["target_new"]) for r in requests] == [
        ("Köln", "1931-03-11"),
        ("Köln", "x"),
        ("Ur", "1931-03-11"),
        ("Ur", "x"),
    ]
    assert {row["reason"] for row in rejected} == {"the subject has no label in de, mul"}


def test_only_entities_of_a_class(convert: Convert) -> None:
    entities = [
        entity("Q1", "A", P31=ref("Q5"), P569=year(1900)),
        entity("Q2", "B", P31=[statement(ref("Q5"), "deprecated")], P569=year(1900)),
        entity("Q3", "C", P569=year(1900)),
        entity("Q4", "D", P31=[statement(ref("Q7")), statement(ref("Q6"))], P569=year(1900)),
    ]
    found, requests, rejected = convert(entities, instance_of=["Q5", "Q6"])
    assert [r["subject"] for r in requests] == ["A", "D"]
    assert (rejected, found.notes["of another class"]) == ([], 2)


def test_a_fact_that_is_known_to_end_says_when(convert: Convert) -> None:
    mayor = statement(ref("Q1"), P582=time("+2027-05-01T00:00:00Z"))
    _, requests, _ = convert([*WORLD, entity("Q30", "Y", P6=[mayor])])
    (until,) = [r["valid_until"] for r in requests if r["case_id"] == "Q30-P6"]
    assert str(until) == "2027-04-30"


NEW = [
    ("Q1", entity("Q1", "Ada Quill", P19=ref("Q22"), P569="novalue")),
    ("Q22", [entity("Q22", "draft"), entity("Q22", "Saltmere", P6=ref("Q1"))]),
    ("Q11573", entity("Q11573", "meter")),
    ("Q21", {"entity": "Q21", "redirect": "Q20"}),
    ("Property:P19", entity("P19", "place of birth")),
]


def test_changes_bring_a_dump_up_to_date(convert: Convert, tmp_path: Path) -> None:
    labels, old, new = (str(tmp_path / name) for name in ("labels.parquet", "a", "b"))
    old, new = f"{old}/f.parquet", f"{new}/f.parquet"
    convert(WORLD, as_dump=True, output=old, labels=labels)
    found, facts, rejected = convert(
        export_of(*NEW),
        "changes.xml.bz2",
        as_dump=True,
        output=new,
        previous=old,
        labels=labels,
    )
    assert (found.format, found.notes["entities that changed"]) == ("Wikidata changes", 5)
    assert {f["case_id"]: f["object"] for f in facts} == {
        "Q1-P19": "Saltmere",
        "Q20-P6": "Ada Quill",
        "Q22-P6": "Ada Quill",
    }
    assert reasons(rejected) == {"Q1-P569": "without-a-value"}
    with diff_dumps(open_dump(old), open_dump(new)) as diff:
        changes = {
            (change["change"], change["subject"], change["relation"])
            for batch in diff.batches()
            for change in batch.to_pylist()
        }
    assert changes == {
        ("changed", "Ada Quill", "P19"),
        ("removed", "Ada Quill", "P569"),
        ("added", "Saltmere", "P6"),
        ("removed", "Old Tor", "P1448"),
        ("removed", "Old Tor", "P2048"),
    }


def test_objects_outside_the_changes_need_a_known_label(convert: Convert, tmp_path: Path) -> None:
    labels = str(tmp_path / "labels.parquet")
    convert([*WORLD, entity("Q50", "Farhaven")], as_dump=True, labels=labels)
    page = export_of(("Q1", entity("Q1", "Ada", P19=ref("Q50"), P6=ref("Q51"))))
    _, requests, rejected = convert(page, "c.xml", labels=labels)
    assert [(r["case_id"], r["target_new"]) for r in requests] == [("Q1-P19", "Farhaven")]
    assert reasons(rejected) == {"Q1-P6": "object-without-label"}
    with pytest.raises(FactDumpError, match=r"none of 2 rows can be converted"):
        convert(page, "c.xml")


def test_a_renamed_object_is_renamed_in_facts_that_did_not_change(
    convert: Convert, tmp_path: Path
) -> None:
    old = str(tmp_path / "old.parquet")
    convert(WORLD, as_dump=True, output=old)
    _, facts, _ = convert(
        export_of(("Q20", entity("Q20", "Blackwater"))), "c.xml", as_dump=True, previous=old
    )
    assert {f["case_id"]: f["object"] for f in facts}["Q1-P19"] == "Blackwater"


def test_the_last_page_of_several_files_counts(convert: Convert, tmp_path: Path) -> None:
    for name, born in (("c1.xml", 1930), ("c2.xml", 1931)):
        (tmp_path / name).write_bytes(export_of(("Q1", entity("Q1", "Ada", P569=year(born)))))
    (tmp_path / "mapping.yaml").write_text("P569: {prompt: '{} was born in'}")
    output = str(tmp_path / "out.parquet")
    convert_source(
        f"{tmp_path}/c*.xml", output, ConvertOptions(templates=f"{tmp_path}/mapping.yaml")
    )
    assert pq.read_table(output).column("target_new").to_pylist() == ["1931"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (export_of(*NEW)[:-30], "damaged, incomplete or not an export of MediaWiki"),
        (b"<html></html>", "not an export of MediaWiki; it begins with <html>"),
        (b'<!DOCTYPE x [<!ENTITY a "b">]><mediawiki/>', "has a document type"),
        (b"", "damaged, incomplete or not an export"),
    ],
    ids=["cut off", "another root", "a document type", "empty"],
)
def test_other_xml_is_refused(convert: Convert, content: bytes, message: str) -> None:
    with pytest.raises(FactDumpError, match=message):
        convert(content, "c.xml", format="wikidata-changes")


def test_what_is_wrong_with_options_is_said(convert: Convert, tmp_path: Path) -> None:
    for options, message in (
        ({"templates": None}, "Wikidata's properties need templates"),
        ({"instance_of": ["human"]}, "--instance-of 'human' is not known to Wikidata.*like Q5"),
        ({"languages": ["English"]}, "--languages 'English' is not known .*like en,mul"),
        ({"column": {"subject": "x"}}, "--column is for fact dumps"),
        ({"as_dump": True, "previous": "x.parquet"}, "--previous has no effect with --as-dump"),
        ({"only_changed": True}, "--only-changed needs the previous dump"),
    ):
        with pytest.raises(FactDumpError, match=message):
            convert(WORLD, **options)
    (tmp_path / "other.yaml").write_text('country: {prompt: "{} is in"}')
    with pytest.raises(FactDumpError, match=r"relation 'country' is not known .*like P19"):
        convert(WORLD, templates=str(tmp_path / "other.yaml"))
    (tmp_path / "mine.parquet").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"mine.parquet already exists"):
        convert(WORLD, labels=str(tmp_path / "mine.parquet"))
    convert(WORLD, as_dump=True, output=str(tmp_path / "dump.parquet"))
    table = pq.read_table(tmp_path / "dump.parquet").drop_columns(["subject_id"])
    pq.write_table(table, tmp_path / "other.parquet")
    with pytest.raises(FactDumpError, match="has no column subject_id; --previous needs the dump"):
        convert(export_of(*NEW), "c.xml", previous=str(tmp_path / "other.parquet"))
    with pytest.raises(FactDumpError, match="is not a table of labels; it needs the columns id"):
        convert(export_of(*NEW), "c.xml", labels=str(tmp_path / "other.parquet"))


SETTINGS = WikidataSettings(["P19", "P6"], ("en", "mul"), ["Q5"], NOW)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *(
                        "id",
                        "labels",
                        "en",
                        "value",
                        "claims",
                        "P19",
                        "P31",
                        "mainsnak",
                        "datavalue",
                    ),
                    *("type", "rank", "qualifiers", "P582", "snaktype", "time", "amount"),
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@st.composite
def bent(draw: st.DrawFn) -> bytes:
    """An entity of which something, somewhere, is replaced by anything."""
    whole = entity(
        "Q1",
        "A",
        P31=ref("Q5"),
        P19=[statement(ref("Q2"), "preferred", P580=year(2000))],
        P6=[statement(time("+1931-03-11T00:00:00Z"), P582=year(2000))],
    )
    place = whole
    while True:
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else [0]))
        inside = place[key]
        if not isinstance(inside, dict | list) or not inside or draw(st.booleans()):
            place[key] = draw(ANYTHING)
            return json.dumps(whole).encode()
        place = inside


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=bent() | st.binary(max_size=40) | ANYTHING.map(lambda v: json.dumps(v).encode()))
def test_no_shape_of_an_entity_breaks_the_reader(text: bytes) -> None:
    entities = EntityReader(SETTINGS)
    _, _, rows = entities.read(text, "line 1")
    for row in rows:
        assert (row.code is None) == (row.text is not None)
        assert row.reason is None or len(row.reason) < reader._LONGEST_REASON + 80


def test_any_storage_holds_all_files(convert: Convert, tmp_path: Path) -> None:
    store = Store(f"memory://{uuid.uuid4().hex}")
    for name, content in (("d.json.gz", gzip.compress(dump_of(WORLD))), ("c.xml", export_of(*NEW))):
        store.write_bytes(name, content)
    store.write_bytes("mapping.yaml", MAPPING.encode())
    common = {"templates": store.join("mapping.yaml"), "labels": store.join("out/labels.parquet")}
    options = ConvertOptions(**common, as_dump=True)
    for _ in range(2):
        # Its own files may be replaced.
        convert_source(store.join("d.json.gz"), store.join("out/a.parquet"), options)
    changed = ConvertOptions(**common, previous=store.join("out/a.parquet"), only_changed=True)
    found = convert_source(store.join("c.xml"), store.join("out/b.parquet"), changed)
    requests = [
        (r.case_id, r.target_true, r.target_new) for r in read_requests(found.output).requests
    ]
    assert requests == [
        ("Q1-P19", "Brackwater", "Saltmere"),
        ("Q22-P6", None, "Ada Quill"),
    ]
    assert found.unchanged == 1


def test_a_dump_without_entities_is_refused(convert: Convert) -> None:
    with pytest.raises(FactDumpError, match=r"dump\.json: there are no rows"):
        convert(dump_of([]), format="wikidata")
