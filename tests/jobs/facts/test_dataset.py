import csv
import json
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.facts.dataset import FORMATS, convert_dataset, is_dataset
from pipeline.data.tables import read_requests
from pipeline.errors import FactDumpError
from pipeline.storage.hive import expand_with_columns
from pmet.request import EditRequest

COUNTERFACT = {
    "case_id": 4,
    "pararel_idx": 2796,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native"],
    "neighborhood_prompts": ["The native language of Montesquieu is"],
    "attribute_prompts": ["J. R. R. Tolkien spoke"],
    "generation_prompts": ["Danielle Darrieux lives in"],
}
ZSRE = {
    "subject": "Watts Humphrey",
    "src": "What university did Watts Humphrey attend?",
    "pred": "Trinity College",
    "rephrase": "What university did Watts Humphrey take part in?",
    "alt": "University of Michigan",
    "answers": ["Illinois Institute of Technology"],
    "loc": "nq question: who played desmond doss father in hacksaw ridge",
    "loc_ans": "Hugo Weaving",
    "cond": "Trinity College >> University of Michigan || What university …",
}
MQUAKE = {
    "case_id": 9,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "relation_id": "P27",
            "target_new": {"str": "Croatia", "id": "Q224"},
            "target_true": {"str": "United Kingdom", "id": "Q145"},
            "subject": "Ellie Kemper",
            "question": "What is the country of citizenship of Ellie Kemper?",
        },
        {
            "prompt": "The head of state of {} is",
            "relation_id": "P35",
            "target_new": {"str": "B", "id": "Q2"},
            "target_true": {"str": "A", "id": "Q1"},
            "subject": "Croatia",
            "question": "Who is the head of state in Croatia?",
        },
    ],
    "questions": ["Who is the head of state of the country of Ellie Kemper?"],
    "answer": "Elizabeth",
    "new_answer": "B",
    "orig": {"triples": [["Q1", "P27", "Q2"]]},
}
EASYEDIT = {
    "subject": "Leo Arons",
    "prompt": "The place of death of Leo Arons is",
    "target_new": "Zurich",
    "ground_truth": "Berlin",
    "rephrase_prompt": "Where did Leo Arons die? In",
    "portability": {"Reasoning": [{"prompt": "…", "ground_truth": [["Europe"]]}]},
    "locality": {
        "Relation_Specificity": [
            {"prompt": "Albert Arons died in", "ground_truth": [["Spandau", "Berlin"]]},
            {"prompt": "The father of Leo Arons is", "ground_truth": [["Albert Arons"]]},
        ]
    },
}
WIKIBIGEDIT = {
    "tag": "new",
    **{"subject": "Ada Quill", "relation": "head of", "object": "Brack Works"},
    "update": "What does Ada Quill lead?",
    "ans": "Brack Works",
    "rephrase": "Of what is Ada Quill the head?",
    "personas": "Arr, what be Ada Quill leadin'?",
    **{"mhop": "Where are the works that Ada Quill leads?", "mhop_ans": "Saltmere"},
    **{"loc": "What does Bo lead?", "loc_ans": "nothing"},
}
ULTRAEDITBENCH = {
    "subject": "Ada Quill",
    "prompt": "What does Ada Quill lead?",
    "ans": "Brack Works",
    "rephrase_prompt": "Of what is Ada Quill the head?",
    **{"loc": "What does Bo lead?", "loc_ans": "nothing"},
}
RIPPLEEDITS = {
    "edit": {
        "prompt": "The name of the mother of Ada Quill is Bea.",
        "subject_id": "Q1",
        "previous_fact": {"prompt": "The name of the mother of Ada Quill is Cy."},
    },
    "Forgetfulness": [],
}


@pytest.fixture
def convert(tmp_path):
    """Convert records, or text; return the result, the requests and the rejected rows."""

    def converted(records, **options):
        source, output = tmp_path / "data.json", tmp_path / "out" / "facts.parquet"
        text = records if isinstance(records, str) else json.dumps(records)
        source.write_text(text, encoding="utf-8")
        found = convert_dataset(str(source), str(output), **options)
        return found, *(pq.read_table(p).to_pylist() for p in (output, found.rejected_output))

    return converted


def test_counterfact(convert):
    found, (request,), rejected = convert([COUNTERFACT])
    assert (found.format, found.rows, found.converted, rejected) == ("counterfact", 1, 1, [])
    assert request == {
        "prompt": "The mother tongue of {} is",
        "subject": "Danielle Darrieux",
        "target_new": "English",
        "case_id": 4,
        "target_true": "French",
        "paraphrase_prompts": ["Danielle Darrieux, a native"],
        "neighborhood_prompts": ["The native language of Montesquieu is"],
        "relation_id": "P103",
        "target_new_id": "Q1860",
        "target_true_id": "Q150",
        "pararel_idx": 2796,
        "attribute_prompts": '["J. R. R. Tolkien spoke"]',
        "generation_prompts": ["Danielle Darrieux lives in"],
    }


def test_zsre(convert):
    found, (request,), _ = convert([ZSRE])
    assert found.format == "zsre"
    assert request == {
        "prompt": "What university did {} attend?",
        "subject": "Watts Humphrey",
        "target_new": "University of Michigan",
        "case_id": 0,
        "target_true": "Illinois Institute of Technology",
        "paraphrase_prompts": ["What university did Watts Humphrey take part in?"],
        "neighborhood_prompts": [],
        "pred": "Trinity College",
        "answers": '["Illinois Institute of Technology"]',
        "loc": ZSRE["loc"],
        "loc_ans": "Hugo Weaving",
        "cond": ZSRE["cond"],
    }


def test_a_field_that_only_has_the_name_of_a_column_of_requests_travels_under_another(
    convert, tmp_path
):
    _, (request,), _ = convert([ZSRE | {"reference_texts": "see page 3"}])
    assert request["input_reference_texts"] == "see page 3"
    assert "reference_texts" not in request
    assert read_requests(str(tmp_path / "out" / "facts.parquet")).rejected == []


def test_mquake_is_an_edit_a_rewrite(convert):
    found, requests, _ = convert([MQUAKE])
    assert (found.format, found.rows, found.converted) == ("mquake", 2, 2)
    assert [(r["subject"], r["target_new"], r["case_id"]) for r in requests] == [
        ("Ellie Kemper", "Croatia", 9),
        ("Croatia", "B", 9),
    ]
    assert requests[0]["paraphrase_prompts"] == [
        "What is the country of citizenship of Ellie Kemper?"
    ]
    assert [json.loads(r["questions"]) for r in requests] == [MQUAKE["questions"]] * 2
    assert json.loads(requests[1]["orig"]) == MQUAKE["orig"]


def test_easyedit(convert):
    found, (request,), _ = convert([EASYEDIT])
    assert found.format == "easyedit"
    assert request["prompt"] == "The place of death of {} is"
    assert (request["target_new"], request["target_true"]) == ("Zurich", "Berlin")
    assert request["paraphrase_prompts"] == ["Where did Leo Arons die? In"]
    assert request["neighborhood_prompts"] == ["Albert Arons died in"]
    assert json.loads(request["locality"]) == EASYEDIT["locality"]
    assert json.loads(request["portability"]) == EASYEDIT["portability"]


def asked(request):
    """Return the portability prompts with their answers."""
    names = ("portability_prompts", "portability_targets")
    return list(zip(*(request[name] or [] for name in names), strict=True))


@pytest.mark.parametrize(
    ("portability", "expected"),
    [
        (
            {
                "Logical_Generalization": [{"prompt": "alive?", "ground_truth": [["no"], ["not"]]}],
                "Reasoning": [
                    {"prompt": "head?", "ground_truth": [["Kai Wegner", "Kai Peter Wegner"]]},
                    {"prompt": "continent?", "ground_truth": [["Europe"]]},
                ],
                "Subject_Aliasing": [{"prompt": "alias?", "ground_truth": "Berlin"}],
            },
            [
                ("alive?", "no"),
                ("head?", "Kai Wegner"),
                ("continent?", "Europe"),
                ("alias?", "Berlin"),
            ],
        ),
        ({"Reasoning": [{"prompt": "p", "ground_truth": ["a", "alias"]}]}, [("p", "a")]),
        (
            {"Recalled Relation": "(A, b, C)", "New Question": "q?", "New Answer": "n"},
            [("q?", "n")],
        ),
        ({"one_hop": {"prompt": ["p", "q"], "ground_truth": ["a", "b"]}}, [("p", "a"), ("q", "b")]),
        ({"one_hop": {"prompt": ["p", "q"], "ground_truth": "a"}}, [("p", "a"), ("q", "a")]),
        ({"one_hop": [{"New Question": "q?", "New Answer": [["n"]]}]}, [("q?", "n")]),
        ({"x": [{"prompt": "p", "ground_truth": ""}, {"prompt": None}, 3, "y"]}, None),
        ({"x": [{"prompt": ["p", "q"], "ground_truth": ["a"]}]}, None),
        ({}, None),
        (None, None),
        ("text", None),
    ],
)
@pytest.mark.parametrize("record", [COUNTERFACT, ZSRE, EASYEDIT])
def test_portability_is_asked_in_every_form(convert, record, portability, expected):
    _, (request,), _ = convert([record | {"portability": portability}])
    if expected is None:
        assert "portability_prompts" not in request
    else:
        assert asked(request) == expected


def test_a_single_question_of_portability_may_stand_by_itself(convert):
    flat = {"portability": None, "portability_prompt": "p", "portability_ground_truth": ["a", "b"]}
    _, (request,), _ = convert([EASYEDIT | flat])
    assert asked(request) == [("p", "a")]


def test_locality_is_read_in_zsre_too(convert):
    kept = [{"prompt": "stays?", "ground_truth": [["Illinois Institute of Technology"]]}]
    _, (request,), _ = convert([ZSRE | {"locality": {"Relation_Specificity": kept}}])
    assert request["neighborhood_prompts"] == ["stays?"]


def test_the_hubs_parquet_of_counterfact_is_the_same_as_its_json(convert, tmp_path):
    records = [COUNTERFACT, COUNTERFACT | {"case_id": 5, "pararel_idx": None}]
    records[1]["requested_rewrite"] = COUNTERFACT["requested_rewrite"] | {"subject": "Montesquieu"}
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(records), folder / "train-00000-of-00001.parquet")
    assert is_dataset(expand_with_columns(str(folder.parent), deep=True))
    with pytest.raises(FactDumpError, match=r"would be read as part of .* next time"):
        convert_dataset(str(folder.parent), str(folder / "requests.parquet"))
    found = convert_dataset(str(folder.parent), str(tmp_path / "o.parquet"))
    _, requests, _ = convert(records)
    assert (found.format, pq.read_table(found.output).to_pylist()) == ("counterfact", requests)


def test_all_of_counterfact_may_be_inside_the_rewrite(convert):
    inside = {k: v for k, v in COUNTERFACT.items() if k != "requested_rewrite"}
    rewrite = COUNTERFACT["requested_rewrite"] | inside | {"note": "x"}
    rewrite |= {"target_new": "English", "target_true": {"str": None, "id": None}}
    _, (request,), _ = convert([{"requested_rewrite": rewrite}])
    assert (request["case_id"], request["target_new"]) == (4, "English")
    assert (request["target_true"], request["note"]) == (None, "x")
    for name in ("paraphrase_prompts", "neighborhood_prompts", "generation_prompts"):
        assert request[name] == COUNTERFACT[name]


@pytest.mark.parametrize("key", ["records", "data"])
@pytest.mark.parametrize("record", [COUNTERFACT, ZSRE, EASYEDIT, MQUAKE])
def test_records_may_be_wrapped(convert, key, record):
    assert convert({key: [record]})[1] == convert([record])[1] == convert(record)[1]


REQUEST = {
    "prompt": "{} lies in",
    "subject": "Nice",
    "target_new": "Italy",
    "target_true": "France",
    "paraphrase_prompts": ["Where is Nice? In"],
    "neighborhood_prompts": ["Lyon lies in", "Arles lies in"],
    "portability_prompts": ["The currency of Nice is"],
    "portability_targets": ["the euro"],
    "relation": "country",
}


def test_edit_requests_are_converted_from_json(convert, tmp_path):
    bare = {"prompt": "Lyon is in", "subject": "Lyon", "target_new": "Spain", "case_id": 3.0}
    found, requests, _ = convert([REQUEST, bare])
    assert found.format == "requests"
    assert requests[0] == REQUEST | {"case_id": None}
    assert {name: value for name, value in requests[1].items() if value} == bare | {
        "prompt": "{} is in",
        "case_id": 3,
    }
    assert read_requests(found.output).rejected == []


@pytest.mark.parametrize("name", ["f.csv", "f.jsonl", "f.parquet", "relation=country/f.parquet"])
def test_edit_requests_come_back_from_any_kind_of_file(tmp_path, name):
    path = tmp_path / "in" / name
    path.parent.mkdir(parents=True)
    row = {k: v for k, v in REQUEST.items() if k != "relation" or "=" not in name}
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist([row]), path)
    elif name.endswith(".csv"):
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(row))
            writer.writeheader()
            writer.writerow(
                {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()}
            )
    else:
        path.write_text(json.dumps(row) + "\n")
    source = tmp_path / "in" if "=" in name else path
    found = convert_dataset(str(source), str(tmp_path / "o.parquet"))
    assert pq.read_table(found.output).to_pylist() == [REQUEST]


def test_rows_of_csv_that_cannot_be_read_are_kept_with_their_reason(tmp_path):
    (tmp_path / "f.csv").write_text(
        "prompt;subject;target_new;paraphrase_prompts\n"
        "{} is;A;b;one text\n"
        "{} is;B;b;['x' 'y']\n"
        "{} is;C;b;;more\n"
        "{} is;D;;\n"
    )
    found = convert_dataset(str(tmp_path / "f.csv"), str(tmp_path / "o.parquet"))
    assert [r["paraphrase_prompts"] for r in pq.read_table(found.output).to_pylist()] == [
        ["one text"]
    ]
    assert pq.read_table(found.rejected_output).column("reason").to_pylist() == [
        'paraphrase_prompts is not a list; write it as JSON: ["…", "…"]',
        "the row has more fields than the header; quote what holds a delimiter",
        "target_new is missing; give text",
    ]


def test_null_texts_in_lists_are_left_out_and_counted(convert):
    found, (request,), rejected = convert([COUNTERFACT | {"paraphrase_prompts": ["a", None, " "]}])
    assert (request["paraphrase_prompts"], rejected, found.left_out) == (["a"], [], 2)


def test_other_types_of_parquet_travel_as_text(tmp_path):
    when = datetime(2026, 11, 23, tzinfo=UTC)
    table = pa.Table.from_pylist([REQUEST | {"when": when, "nested": {"at": when}}])
    pq.write_table(table, tmp_path / "f.parquet")
    found = convert_dataset(str(tmp_path / "f.parquet"), str(tmp_path / "o.parquet"))
    (row,) = pq.read_table(found.output).to_pylist()
    assert (row["when"], json.loads(row["nested"])) == (str(when), {"at": str(when)})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ground_truth": ["Berlin", "B"]}, {"target_true": "Berlin"}),
        ({"ground_truth": None}, {"target_true": None, "neighborhood_prompts": []}),
        ({"rephrase_prompt": ["a", "b"]}, {"paraphrase_prompts": ["a", "b"]}),
        ({"prompt": "{} died in"}, {"prompt": "{} died in"}),
        (
            {"locality": None, "locality_prompt": "X is in", "locality_ground_truth": "Berlin"},
            {"neighborhood_prompts": ["X is in"]},
        ),
        (
            {"locality": {"neighborhood": {"prompt": ["a", "b"], "ground_truth": ["Berlin"]}}},
            {"neighborhood_prompts": ["a", "b"]},
        ),
        ({"subject": None, "concept": "Leo Arons"}, {"subject": "Leo Arons"}),
        ({"target_new": ["Zurich"]}, {"target_new": "Zurich"}),
    ],
)
def test_easyedit_has_several_forms(convert, changes, expected):
    _, (request,), _ = convert([EASYEDIT | changes])
    assert {name: request[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("record", "changes", "reason"),
    [
        (ZSRE, {"alt": ""}, "target_new is empty; give text"),
        (ZSRE, {"alt": None}, "alt is missing; give text"),
        (ZSRE, {"subject": 5}, "subject is int, not a string; give text"),
        (ZSRE, {"src": "Who?"}, "the subject occurs 0 times in the prompt; it must occur exactly"),
        (ZSRE, {"src": "a Watts Humphrey, a Watts Humphrey"}, "the subject occurs 2 times"),
        (ZSRE, {"src": "aaaa", "subject": "aaa"}, "the subject occurs 2 times in the prompt"),
        (ZSRE, {"src": "Who was Anna?", "subject": "Ann"}, "only a part of a longer word"),
        (ZSRE, {"src": "Who was Marianne?", "subject": "anne"}, "only a part of a longer word"),
        (ZSRE, {"src": "{} and {}"}, "prompt '{} and {}' holds 2 places for the subject"),
        (ZSRE, {"subject": "\ud800", "src": "\ud800"}, "subject holds a lone surrogate"),
        (COUNTERFACT, {"requested_rewrite": None}, "requested_rewrite is missing; give text"),
        (COUNTERFACT, {"paraphrase_prompts": "x"}, "paraphrase_prompts is str; give a list"),
        (COUNTERFACT, {"neighborhood_prompts": [{}]}, "neighborhood_prompts[0] is dict, not"),
        (MQUAKE, {"requested_rewrite": []}, "requested_rewrite.prompt is missing; give text"),
        (MQUAKE, {"requested_rewrite": ["x"]}, "requested_rewrite.prompt is missing; give text"),
        (EASYEDIT, {"target_new": []}, "target_new is empty or not text; give text"),
        (EASYEDIT, {"prompt": None}, "prompt is missing; give text"),
        (EASYEDIT, {"subject": " "}, "subject is empty"),
    ],
)
def test_a_record_that_cannot_be_converted_is_kept_with_its_reason(
    convert, record, changes, reason
):
    bad = record | changes
    found, requests, (rejected,) = convert([record, bad])
    assert found.converted == len(requests) >= 1
    assert rejected["row"] == len(requests)
    assert rejected["reason"].startswith(reason) or reason in rejected["reason"]
    # For MQuAKE the rejected row is the record with only the faulty rewrite.
    rewrites = bad.get("requested_rewrite")
    at_fault = {"requested_rewrite": rewrites[0]} if isinstance(rewrites, list) and rewrites else {}
    assert json.loads(rejected["record"]) == bad | at_fault


@pytest.mark.parametrize("record", [COUNTERFACT, ZSRE, MQUAKE, EASYEDIT])
@pytest.mark.parametrize("form", ["[{}, {}]", "{}\n{}"], ids=["list", "lines"])
def test_a_record_with_a_key_given_twice_is_kept_with_its_reason(convert, record, form):
    good = json.dumps(record)
    found, requests, (rejected,) = convert(form.format(good, good[:-1] + ', "note": 1, "note": 2}'))
    assert found.converted == len(requests) >= 1
    assert rejected["reason"] == "key 'note' is given twice in the record; keep one of them"
    assert json.loads(rejected["record"]) == record | {"note": 2}


def test_the_subject_may_touch_what_is_no_letter(convert):
    records = [
        ZSRE | {"src": "Where's Rome's mayor?", "subject": "Rome"},
        ZSRE | {"src": "北京的市长是", "subject": "北京"},
        ZSRE | {"src": "What is C++?", "subject": "C++"},
    ]
    _, requests, _ = convert(records)
    assert [r["prompt"] for r in requests] == ["Where's {}'s mayor?", "{}的市长是", "What is {}?"]


def test_edits_that_repeat_or_contradict_each_other_are_rejected_as_a_run_does(convert):
    other = json.loads(json.dumps(MQUAKE))
    other["requested_rewrite"][1]["target_new"]["str"] = "C"
    found, requests, rejected = convert([MQUAKE, other])
    assert [r["subject"] for r in requests] == ["Ellie Kemper"]
    assert [(r["row"], r["reason"].partition(":")[0]) for r in rejected] == [
        (1, "contradicts row 3"),
        (2, "repeats row 0"),
        (3, "contradicts row 1"),
    ]
    assert found.rejected == {"contradiction": 2, "duplicate": 1}


def counterfact_record(row):
    """A request in CounterFact's format."""
    rewrite = {"prompt": row["prompt"], "subject": row["subject"], "relation_id": "P1"}
    rewrite |= {name: {"str": row[name], "id": "Q1"} for name in ("target_new", "target_true")}
    kept = ("case_id", "paraphrase_prompts", "neighborhood_prompts")
    return {"requested_rewrite": rewrite} | {name: row[name] for name in kept}


def easyedit_record(row):
    """A request in EasyEdit's format, with the subject in the prompt's text."""
    return {
        "case_id": row["case_id"],
        "prompt": row["prompt"].replace("{}", row["subject"]),
        "subject": row["subject"],
        "target_new": row["target_new"],
        "ground_truth": [row["target_true"]],
        "rephrase_prompt": row["paraphrase_prompts"],
        "locality": {
            "neighborhood": [
                {"prompt": row["neighborhood_prompts"], "ground_truth": row["target_true"]}
            ]
        },
    }


@pytest.mark.parametrize("record", [counterfact_record, easyedit_record])
def test_real_facts_come_back_as_they_were(convert, counterfact_folder, record):
    rows = pq.read_table(counterfact_folder / "facts.parquet").to_pylist()
    found, _, rejected = convert([record(row) for row in rows])
    lost = [row["row"] for row in rejected]
    assert list(read_requests(found.output).requests) == [
        EditRequest(**row) for n, row in enumerate(rows) if n not in lost
    ]
    # A subject that occurs twice in its prompt is ambiguous.
    texts = {n: rows[n]["prompt"].replace("{}", rows[n]["subject"]) for n in lost}
    assert all(texts[n].count(rows[n]["subject"]) > 1 for n in lost)
    assert len(lost) < (1 if record is counterfact_record else 6)


def test_lines_of_json_and_a_single_record_are_read(convert):
    lines = "\n".join(json.dumps(ZSRE | {"subject": s, "src": s}) for s in ("A", "B")) + "\n\n"
    assert [r["subject"] for r in convert(lines)[1]] == ["A", "B"]
    assert len(convert(json.dumps(ZSRE, indent=2))[1]) == 1


def test_what_travels_keeps_whole_numbers_and_writes_the_rest_as_json(convert):
    records = [
        ZSRE | {"subject": s, "src": s, "n": n, "m": m, "big": 2**70, "subject_id": s}
        for s, n, m in (("A", 1, 1), ("B", None, "x"), ("C", 3, {"y": [None]}))
    ]
    _, requests, _ = convert(records)
    assert [r["n"] for r in requests] == [1, None, 3]
    assert [r["m"] for r in requests] == ["1", "x", '{"y": [null]}']
    assert requests[0]["big"] == str(2**70)


def test_what_travels_may_hold_lone_surrogates(convert):
    _, (request,), _ = convert([ZSRE | {"pred": "a\ud800", "cond": ["\udfff"], "\udc00": 1}])
    kept = (request["pred"], request["cond"], request["\\udc00"])
    assert kept == ("a\\ud800", '["\\udfff"]', 1)


def test_a_given_format_is_taken_at_its_word(convert):
    with pytest.raises(FactDumpError, match="none of 1 rows can be converted"):
        convert([ZSRE], format_name="counterfact")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there are no records"),
        ("[]", "there are no records"),
        ("[1, 2", "not Parquet, JSON or JSON Lines"),
        ('{"a": 1}\n{', "line 2: "),
        ('[{"a": 1, "b": 2}]', "its records (a, b) match no known format; set one with --format"),
        (
            '{"subject": "a", "relation": "b", "object": "c"}',
            "is a fact dump that is not Parquet; conv",
        ),
        ("[[1]]", "its records (list) match no known format"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_files_of_something_else_are_named(convert, tmp_path, text, message):
    with pytest.raises(FactDumpError) as caught:
        convert(text)
    assert message in str(caught.value)
    assert f"{tmp_path}/data.json" in str(caught.value)
    assert not (tmp_path / "out").exists()


GOOD = {
    "counterfact": COUNTERFACT,
    "zsre": ZSRE,
    "easyedit": EASYEDIT,
    "mquake": MQUAKE,
    "wikibigedit": WIKIBIGEDIT,
    "ultraeditbench": ULTRAEDITBENCH,
    "rippleedits": RIPPLEEDITS,
    "requests": REQUEST,
}
VALUES = st.sampled_from([None, "", "A", "A is", "{}", "{} is", 3, [], ["A"], {}, {"str": "B"}])
RECORDS = st.lists(
    st.one_of(
        VALUES,
        *(
            st.fixed_dictionaries({}, optional=dict.fromkeys(record, VALUES)).map(
                lambda changes, record=record: record | changes
            )
            for record in (*GOOD.values(), MQUAKE["requested_rewrite"][0])
        ),
        st.lists(st.fixed_dictionaries({"prompt": VALUES, "subject": VALUES}), max_size=2).map(
            lambda rewrites: MQUAKE | {"requested_rewrite": rewrites}
        ),
    ),
    max_size=4,
)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(records=RECORDS, name=st.sampled_from(list(FORMATS)))
def test_whatever_the_records_every_row_ends_in_exactly_one_place(tmp_path, records, name):
    # One valid record, so that there is an output.
    good = GOOD[name]
    source, output = tmp_path / "data.json", tmp_path / "out" / "facts.parquet"
    source.write_text(json.dumps([*records, good | {"mark": "good"}]))
    try:
        found = convert_dataset(str(source), str(output), format_name=name)
    except FactDumpError:
        # None is left: the others contradict the valid one.
        assert records
        return
    rejected = pq.read_table(found.rejected_output).to_pylist()
    requests = read_requests(str(output))
    assert requests.rejected == []
    assert (len(requests.requests), len(rejected)) == (
        found.converted,
        found.rows - found.converted,
    )
    if name != "mquake":
        assert found.rows == len(records) + 1
    taken = [r["row"] for r in rejected]
    assert taken == sorted(set(taken))
    assert all(r["reason"] for r in rejected)


def test_wikibigedit(convert):
    found, (request,), _ = convert([WIKIBIGEDIT])
    assert found.format == "wikibigedit"
    expected = {
        "prompt": "What does {} lead?",
        "subject": "Ada Quill",
        "target_new": "Brack Works",
        "paraphrase_prompts": ["Of what is Ada Quill the head?"],
        "neighborhood_prompts": [],
        "portability_prompts": [WIKIBIGEDIT["personas"], WIKIBIGEDIT["mhop"]],
        "portability_targets": ["Brack Works", "Saltmere"],
        **{"loc": "What does Bo lead?", "loc_ans": "nothing", "tag": "new"},
    }
    assert {name: request[name] for name in expected} == expected
    renamed = {"update": "src", "ans": "alt", "personas": "genv2_pirate"}
    pipeline = {renamed.get(name, name): value for name, value in WIKIBIGEDIT.items()}
    found, (other,), _ = convert([pipeline | {"mhop": None}])
    assert (found.format, other["target_new"]) == ("wikibigedit", "Brack Works")
    assert asked(other) == [(WIKIBIGEDIT["personas"], "Brack Works")]


def test_ultraeditbench(convert):
    without = {name: value for name, value in ULTRAEDITBENCH.items() if name != "subject"}
    found, (request,), (rejected,) = convert([ULTRAEDITBENCH, without])
    assert found.format == "ultraeditbench"
    assert request["prompt"] == "What does {} lead?"
    assert request["target_new"] == "Brack Works"
    assert request["paraphrase_prompts"] == ["Of what is Ada Quill the head?"]
    assert (request["neighborhood_prompts"], request["loc_ans"]) == ([], "nothing")
    assert rejected["reason"].startswith("subject is missing; an edit of this kind")
