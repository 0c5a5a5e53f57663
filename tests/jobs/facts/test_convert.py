from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.facts import neighbors
from jobs.facts.convert import convert_dump
from jobs.facts.dump import partitions
from jobs.facts.dump.files import open_dump
from jobs.facts.templates import parse_templates
from pipeline.data.tables import read_requests
from pipeline.errors import FactDumpError, OutputError
from tests.jobs.facts.conftest import NOW, fact, table
from tests.jobs.facts.dump.test_files import damage_pages
from tests.jobs.facts.test_diff import DAYS

TEMPLATES = parse_templates(
    {
        "country": {
            "prompt": "{} lies in",
            "paraphrases": ["Where is {}? In", "The country of {} is"],
            "neighborhood": ["I know that {} is in", "{} is a city in"],
        },
        "currency": {"prompt": "In {} one pays with", "target": "the {}"},
        "mayor": {"prompt": "{}'s mayor is", "neighborhood": []},
    },
    "templates",
)


@pytest.fixture
def convert(dump, tmp_path):
    """Convert rows; return the result, the requests and the rejected rows."""

    def converted(rows, previous=None, **options):
        if previous is not None:
            options["previous"] = dump(previous, "previous.parquet")
        options = {"as_of": NOW} | options
        output = tmp_path / "out" / "facts.parquet"
        found = convert_dump(dump(rows), TEMPLATES, str(output), **options)
        assert found.output == str(output)
        return found, *(pq.read_table(p).to_pylist() for p in (output, found.rejected_output))

    return converted


def test_facts_are_put_into_words(convert):
    _, requests, rejected = convert([fact(" Lyon "), fact("Chile", "currency", "peso")])
    assert requests == [
        {
            "prompt": "{} lies in",
            "subject": "Lyon",
            "target_new": "France",
            "target_true": None,
            "paraphrase_prompts": ["Where is Lyon? In", "The country of Lyon is"],
            "neighborhood_prompts": [],
            "relation": "country",
            "object": "France",
        },
        {
            "prompt": "In {} one pays with",
            "subject": "Chile",
            "target_new": "the peso",
            "target_true": None,
            "paraphrase_prompts": [],
            "neighborhood_prompts": [],
            "relation": "currency",
            "object": "peso",
        },
    ]
    assert rejected == []


def test_questions_are_asked_of_the_relations_that_have_them(dump, tmp_path):
    templates = parse_templates(
        {
            "country": {"prompt": "{} lies in", "question": ["Where is {}?", "{} is where?"]},
            "mayor": {"prompt": "{}'s mayor is", "question": "Who governs {}?"},
            "river": {"prompt": "{} lies on the"},
        },
        "templates",
    )
    rows = [fact("Lyon", relation) for relation in ("country", "river", "mayor")]
    found = convert_dump(dump(rows), templates, str(tmp_path / "o.parquet"), as_of=NOW)
    assert [r.question_prompts for r in read_requests(found.output).requests] == [
        ("Where is Lyon?", "Lyon is where?"),
        (),
        ("Who governs Lyon?",),
    ]


def test_a_subject_may_look_like_a_place(convert):
    _, requests, _ = convert([fact("The {} of"), fact("a\\1")])
    assert [r["paraphrase_prompts"][0] for r in requests] == [
        "Where is The {} of? In",
        "Where is a\\1? In",
    ]


def test_a_run_takes_every_request(convert):
    found, _, _ = convert([fact(c, r) for c in "ABC" for r in ("country", "mayor")])
    table = read_requests(found.output)
    assert (len(table.requests), table.rejected) == (6, [])
    folder = Path(found.output).parent
    assert len(read_requests([str(folder), f"{folder}/*.parquet"]).requests) == 6


def test_all_columns_travel(convert):
    more = {"case_id": 7, "source": "wiki", "n": [1], "prompt": "mine", "updated_at": DAYS[1]}
    _, (request,), (rejected,) = convert([fact(**more), fact("B", "none", **more)])
    kept = {k: request[k] for k in ("case_id", "source", "n", "updated_at", "input_prompt")}
    assert kept == {"input_prompt": more["prompt"]} | {k: more[k] for k in kept if k in more}
    assert list(request)[:4] == ["prompt", "subject", "target_new", "case_id"]
    assert rejected == fact("B", "none", **more) | {
        "row": 1,
        "code": "relation-without-template",
        "reason": "the relation has no template; write one for it",
    }


def test_old_objects_come_from_the_dump_before(convert):
    old = [fact("A", object="Gaul"), fact("B"), fact("D", object="1"), fact("D", object="2")]
    _, requests, _ = convert([fact("A"), fact("B"), fact("C"), fact("D")], old)
    assert [r["target_true"] for r in requests] == ["Gaul", None, None, None]


def test_a_dump_may_hold_old_objects_itself(convert):
    rows = [
        fact("A", "currency", "euro", target_true="franc"),
        fact("B", "currency", "euro", target_true="euro"),
        fact("C", "currency", "euro", target_true=None),
    ]
    _, requests, _ = convert(rows, [fact("A", "currency", "x"), fact("C", "currency", "peso")])
    assert [r["target_true"] for r in requests] == ["the franc", None, "the peso"]


NEIGHBORS = [
    fact("Nice", object="Italy"),
    *(fact(name, object="France") for name in ("Lyon", "Paris", "Lille")),
    fact("Metz", object="France"),
    fact("Rome", object="Italy"),
    fact("Paris", "mayor", "France"),
]
BEFORE = [fact("Nice", object="France"), fact("Metz", object="Prussia")]


def test_neighbors_have_the_old_object_and_have_not_changed(convert):
    _, requests, _ = convert(NEIGHBORS, BEFORE)
    prompts = requests[0]["neighborhood_prompts"]
    named = {p.removeprefix("I know that ").partition(" is ")[0] for p in prompts}
    assert named == {"Lyon", "Paris", "Lille"}
    assert [p.startswith("I know that ") for p in prompts] == [True, False, True]
    assert all(p.endswith((" is in", " is a city in")) for p in prompts)
    assert all(r["neighborhood_prompts"] == [] for r in requests[1:])
    assert requests[4]["target_true"] == "Prussia"


def test_neighbors_do_not_depend_on_the_order_of_rows(convert):
    forth, back = (convert(rows, BEFORE)[1] for rows in (NEIGHBORS, NEIGHBORS[::-1]))
    assert forth == back[::-1]


def test_a_relation_without_neighborhood_has_none(convert):
    rows = [fact(c, "mayor", "X") for c in "ABC"] + [fact("D", "mayor", "Y")]
    _, requests, _ = convert(rows, [fact("D", "mayor", "X")])
    assert requests[3]["target_true"] == "X"
    assert [r["neighborhood_prompts"] for r in requests] == [[]] * 4


def test_neighbors_are_bounded_and_differ_from_fact_to_fact(convert, monkeypatch):
    monkeypatch.setattr(neighbors, "POOL", 12)
    rows = [fact(f"s{i}") for i in range(50)] + [fact(f"c{i}", object="I") for i in range(20)]
    _, requests, _ = convert(rows, [fact(f"c{i}") for i in range(20)])
    drawn = [tuple(r["neighborhood_prompts"]) for r in requests[50:]]
    assert {len(prompts) for prompts in drawn} == {10}
    assert all(len(set(prompts)) == 10 for prompts in drawn)
    assert 2 <= len(set(drawn)) <= 12
    used = {p.removeprefix("I know that ").partition(" is ")[0] for ps in drawn for p in ps}
    assert len(used) <= 12


def test_counts_are_by_kind(convert):
    found, _, rejected = convert([fact("A"), fact("A"), fact("", object=""), fact("B", "x")])
    assert (found.rows, found.converted) == (4, 1)
    assert found.rejected == {
        "duplicate": 1,
        "empty subject": 1,
        "relation without template": 1,
    }
    assert [r["row"] for r in rejected] == [1, 2, 3]


def test_rejected_rows_that_are_not_utf8_stay_legible(convert):
    column = pa.array([b"b\xff", b"Lyon"]).view(pa.string())
    rows = pa.table({"subject": column, "relation": ["country"] * 2, "object": ["France"] * 2})
    _, requests, rejected = convert(rows)
    assert (len(requests), rejected[0]["subject"]) == (1, "b\\xff")


def test_where_nothing_can_be_converted_the_output_stays(convert, tmp_path):
    found, before, _ = convert([fact()])
    with pytest.raises(FactDumpError) as caught:
        convert([fact(relation="x")])
    assert str(caught.value) == (
        f"none of 1 rows can be converted; the reasons are in {found.rejected_output}"
    )
    assert pq.read_table(found.output).to_pylist() == before
    assert len(pq.read_table(found.rejected_output)) == 1
    with pytest.raises(FactDumpError, match="there are no rows"):
        convert([])


def test_damage_leaves_nothing(dump, write, tmp_path):
    path = write([fact(str(i)) for i in range(1000)])
    opened = open_dump(path)
    damage_pages(path)
    with pytest.raises(FactDumpError, match="cannot read"):
        convert_dump(opened, TEMPLATES, str(tmp_path / "out" / "f.parquet"), as_of=NOW)
    assert not (tmp_path / "out").exists()


def test_inputs_are_never_overwritten(dump):
    source = dump([fact()])
    with pytest.raises(OutputError, match="is one of the input files"):
        convert_dump(source, TEMPLATES, source.files[0].url, as_of=NOW)
    with pytest.raises(FactDumpError, match="has no file name"):
        convert_dump(source, TEMPLATES, "out/", as_of=NOW)


TEXT = st.sampled_from(["A", "B", " A", "", None, "{}", "x" * 1001, "ü\t"])
ROWS = st.lists(
    st.tuples(
        TEXT,
        st.sampled_from(["country", "mayor", "none", None]),
        TEXT,
        st.sampled_from(DAYS),
        st.sampled_from([None, datetime(2026, 1, 1, tzinfo=UTC)]),
        st.sampled_from([None, "B", ""]),
    ),
    min_size=1,
    max_size=14,
)
NAMES = ("subject", "relation", "object", "updated_at", "valid_until", "target_true")


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=ROWS, cut=st.integers(0, 14), size=st.sampled_from([3, 100]))
def test_every_row_ends_in_exactly_one_place(tmp_path, rows, cut, size):
    """Rows are numbered by a copied column, over two files, and with partitions on disk."""
    numbered = [dict(zip(NAMES, row, strict=True), n=n) for n, row in enumerate(rows)]
    for name, part in (("a", numbered[:cut]), ("b", numbered[cut:])):
        schema = table([*numbered, fact(n=0)]).schema
        pq.write_table(pa.Table.from_pylist(part, schema), tmp_path / f"{name}.parquet")
    output = tmp_path / "out" / "facts.parquet"
    output.unlink(missing_ok=True)
    was = partitions.PARTITION_ROWS
    partitions.PARTITION_ROWS = size
    try:
        dump = open_dump([str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")])
        try:
            found = convert_dump(dump, TEMPLATES, str(output), as_of=NOW)
        except FactDumpError:
            assert not output.exists()
            found = None
    finally:
        partitions.PARTITION_ROWS = was
    requests = pq.read_table(output).to_pylist() if found else []
    rejected = pq.read_table(output.parent / "rejected" / "facts.parquet").to_pylist()
    assert sorted(r["n"] for r in requests + rejected) == list(range(len(rows)))
    assert [r["row"] for r in rejected] == [r["n"] for r in rejected]
    assert all(r["reason"] for r in rejected)
    if found:
        assert (found.converted, sum(found.rejected.values())) == (len(requests), len(rejected))
        taken = read_requests(str(output))
        assert taken.rejected == []
        facts = Counter((r.prompt, r.subject) for r in taken.requests)
        assert max(facts.values()) == 1


def test_what_the_earlier_dump_holds_too_can_be_left_out(convert):
    old = [fact("Nice"), fact("Lyon"), fact("Paris"), fact("Arles", object=None)]
    new = [fact("Nice", object="Italy"), *old[1:], fact("Turin", object="Italy"), fact("Nizza")]
    found, requests, rejected = convert(new, previous=old, only_changed=True)
    assert [r["subject"] for r in requests] == ["Nice", "Turin", "Nizza"]
    # They are neighbors; Nizza, which will be edited, is not.
    assert sorted(requests[0]["neighborhood_prompts"]) == [
        "I know that Paris is in",
        "Lyon is a city in",
    ]
    assert [r["row"] for r in rejected] == [3]
    assert (found.rows, found.converted, found.unchanged) == (6, 3, 2)


def test_that_nothing_has_changed_may_be_well(convert):
    found, requests, rejected = convert(
        [fact()], previous=[fact()], only_changed=True, may_be_none=True
    )
    assert (found.converted, found.unchanged, requests, rejected) == (0, 1, [], [])


def test_an_earlier_dump_in_another_unicode_form_holds_the_same(convert):
    rows = [fact("Zürich", object="Schweiz ü"), fact("Nice", object="Italy")]
    previous = [fact("Zu\u0308rich", object="Schweiz  u\u0308"), fact("Nice", object="France")]
    found, requests, _ = convert(rows, previous)
    assert [(r["subject"], r["target_new"], r["target_true"]) for r in requests] == [
        ("Zürich", "Schweiz ü", None),
        ("Nice", "Italy", "France"),
    ]
    found, requests, _ = convert(rows, previous, only_changed=True)
    assert (found.unchanged, [r["subject"] for r in requests]) == (1, ["Nice"])
    own = [
        fact("Köln", object="ü", target_true="u\u0308"),
        fact("Bonn", object="a", target_true="b"),
    ]
    _, requests, _ = convert(own)
    assert [r["target_true"] for r in requests] == [None, "b"]


def test_a_separator_is_the_facts_own_or_that_of_its_relation(dump, tmp_path):
    templates = parse_templates(
        {
            "country": {"prompt": "{} lies in", "separator": ""},
            "mayor": {"prompt": "{}'s mayor is"},
        },
        "templates",
    )
    facts = [fact("Lyon"), fact("Bonn", "mayor", "Ann"), fact("Nice")]
    rows = [f | {"separator": s} for f, s in zip(facts, (None, None, ": "), strict=True)]
    output = tmp_path / "facts.parquet"
    convert_dump(dump(rows), templates, str(output), as_of=NOW)
    assert [r.separator for r in read_requests(str(output)).requests] == ["", None, ": "]
