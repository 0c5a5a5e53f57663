import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.rejections import Rejection, RejectionCode
from pipeline.data.tables import read_requests, read_targets, targets_table, with_columns
from pipeline.errors import RequestTableError, StorageError
from pmet.request import EditRequest


def fact(subject="Paris", target="Rome", prompt="{} is the capital of"):
    return {"prompt": prompt, "subject": subject, "target_new": target}


def table_of(rows, **types):
    table = pa.Table.from_pylist(rows)
    for name, type_ in types.items():
        index = table.schema.get_field_index(name)
        table = table.set_column(index, name, table.column(name).cast(type_))
    return table


def accepted(found):
    """Return the input columns of the accepted requests, in order."""
    return found.table.take(pa.array(found.rows, pa.int64()))


@pytest.fixture
def read(tmp_path):
    """Write tables to files, in order, and read them as requests."""

    def write_and_read(*tables):
        for index, table in enumerate(tables):
            pq.write_table(table, tmp_path / f"{index:03d}.parquet")
        return read_requests(str(tmp_path))

    return write_and_read


def reasons(found):
    return {rejection.row: rejection.reason for rejection in found.rejected}


def test_rows_become_requests_in_order(read):
    full = fact("A") | {
        "case_id": 7,
        "target_true": "France",
        "paraphrase_prompts": ["A lies in"],
        "neighborhood_prompts": ["B lies in", "C lies in"],
    }
    found = read(table_of([full, full | {"subject": "B", "case_id": 8}]), table_of([fact("C")]))
    assert list(found.requests) == [
        EditRequest(**full),
        EditRequest(**full | {"subject": "B", "case_id": 8}),
        EditRequest(**fact("C")),
    ]
    assert list(found.rows) == [0, 1, 2]
    assert found.rejected == []


def test_files_are_read_in_the_order_of_their_patterns(tmp_path):
    for name, subject in (("b", "B"), ("a", "A")):
        pq.write_table(table_of([fact(subject)]), tmp_path / f"{name}.parquet")
    files = [str(tmp_path / "b.parquet"), str(tmp_path / "a.parquet")]
    assert [request.subject for request in read_requests(files).requests] == ["B", "A"]


@pytest.mark.parametrize(
    "type_",
    [
        pa.string(),
        pa.large_string(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
)
def test_text_may_be_stored_in_any_way(read, type_):
    types = dict.fromkeys(("prompt", "subject", "target_new"), type_)
    found = read(table_of([fact("A"), fact("B")], **types))
    assert list(found.requests) == [EditRequest(**fact("A")), EditRequest(**fact("B"))]
    assert not any(pa.types.is_dictionary(type_) for type_ in found.table.schema.types)


def test_row_groups_may_have_dictionaries_of_their_own(tmp_path):
    table = table_of([fact(s) for s in "ABCDE"], subject=pa.dictionary(pa.int32(), pa.string()))
    pq.write_table(table, tmp_path / "f.parquet", row_group_size=2)
    found = read_requests(str(tmp_path / "f.parquet"))
    assert [request.subject for request in found.requests] == list("ABCDE")


@pytest.mark.parametrize("case_id", [3, "c3", 2**40, None])
def test_case_ids_are_numbers_or_text(read, case_id):
    assert read(table_of([fact() | {"case_id": case_id}])).requests[0].case_id == case_id


def test_whole_case_ids_stored_as_floats_are_whole_again(read):
    rows = [fact(str(i)) | {"case_id": c} for i, c in enumerate((3.0, float("nan"), None, 0.5))]
    found = read(table_of(rows))
    assert [(type(r.case_id), r.case_id) for r in found.requests] == [
        (int, 3),
        (type(None), None),
        (type(None), None),
    ]
    assert reasons(found) == {3: "case_id is 0.5; give a whole number or text"}


def test_extra_columns_travel_untouched(read):
    extra = {"source": "wiki", "when": 20261123, "nested": {"a": [1, 2]}}
    found = read(table_of([fact("A") | extra, fact("B", target="") | extra, fact("C") | extra]))
    wanted = ["prompt", "subject", "target_new", *extra]
    assert found.table.column_names == wanted
    assert accepted(found).to_pylist() == [fact("A") | extra, fact("C") | extra]
    assert found.rejected_table().to_pylist() == [
        fact("B", target="")
        | extra
        | {
            "row": 1,
            "code": "invalid",
            "reason": "target_new is empty; give text that is more than white space",
        }
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": None}, "prompt is null; give text"),
        ({"subject": None}, "subject is null; give text"),
        ({"target_new": None}, "target_new is null; give text"),
        ({"subject": "  "}, "subject is empty; give text that is more than white space"),
        ({"target_new": ""}, "target_new is empty; give text that is more than white space"),
        ({"prompt": "no place"}, "prompt 'no place' holds 0 places for the subject; write"),
        ({"prompt": "{} and {}"}, "prompt '{} and {}' holds 2 places for the subject; write"),
    ],
)
def test_a_bad_row_is_set_aside_with_its_reason(read, change, reason):
    base = {"paraphrase_prompts": ["p"], "neighborhood_prompts": ["n"]}
    rows = [fact("A") | base, fact("B") | base | change, fact("C") | base]
    found = read(table_of(rows))
    assert list(found.rows) == [0, 2]
    assert [rejection.row for rejection in found.rejected] == [1]
    assert found.rejected[0].reason.startswith(reason)


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pa.array([5, 6]), "target_new is int, not a string; give text"),
        (pa.array([float("nan")] * 2), "target_new is NaN; give text"),
        (pa.array([1.5, 2.5]), "target_new is float, not a string; give text"),
        (pa.array([True, False]), "target_new is bool, not a string; give text"),
        (pa.array([b"a", b"b"]), "target_new is bytes, not a string; give text"),
        (pa.nulls(2), "target_new is null; give text"),
    ],
)
def test_a_column_of_another_type_rejects_its_rows_not_the_run(read, column, reason):
    bad = table_of([fact("A"), fact("B")]).set_column(2, "target_new", column)
    found = read(table_of([fact("C")]), bad)
    assert list(found.rows) == [0]
    assert reasons(found) == {1: reason, 2: reason}


def test_a_list_column_that_holds_text_rejects_its_rows(read):
    found = read(table_of([fact() | {"paraphrase_prompts": "one"}]))
    assert reasons(found) == {0: "paraphrase_prompts is str; give a list of strings"}


def test_a_text_column_that_holds_lists_rejects_its_rows(read):
    found = read(table_of([fact(target=["a"])]))
    assert reasons(found) == {0: "target_new is list, not a string; give text"}


SURROGATE = b"\xed\xa0\x80"


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("damage", [b"\xff", SURROGATE, b"\xc3"])
def test_text_that_is_not_utf8_is_set_aside_and_stays_legible(read, tmp_path, type_, damage):
    raw = pa.array([b"Rome", b"ab" + damage, b"Oslo"]).cast(pa.large_binary())
    offsets_type = pa.large_binary() if type_ == pa.large_string() else pa.binary()
    column = raw.cast(offsets_type).view(type_)
    table = table_of([fact("A"), fact("B"), fact("C")]).set_column(2, "target_new", column)
    found = read(table)
    assert [request.target_new for request in found.requests] == ["Rome", "Oslo"]
    assert reasons(found) == {1: "target_new is not UTF-8 at byte 2; write it as UTF-8"}
    pq.write_table(found.rejected_table(), tmp_path / "rejected")
    kept = pq.read_table(tmp_path / "rejected").to_pylist()[0]["target_new"]
    assert kept == "ab" + "".join(f"\\x{byte:02x}" for byte in damage)


def test_lists_of_text_that_is_not_utf8_are_set_aside_and_stay_legible(read):
    text = pa.array([b"fine", b"b\xff"]).view(pa.string())
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 2]), text)
    table = table_of([fact("A"), fact("B"), fact("C")]).append_column("paraphrase_prompts", lists)
    found = read(table)
    assert list(found.rows) == [0, 2]
    assert reasons(found) == {1: "paraphrase_prompts is not UTF-8 at byte 1; write it as UTF-8"}
    assert found.rejected_table().to_pylist()[0]["paraphrase_prompts"] == ["b\\xff"]


def test_an_extra_column_that_is_not_utf8_rejects_nothing(read):
    note = pa.array([b"\xff", b"ok"]).view(pa.string())
    found = read(table_of([fact("A"), fact("B", "")]).append_column("note", note))
    assert list(found.rows) == [0]
    assert accepted(found).column("note").cast(pa.binary()).to_pylist() == [b"\xff"]


def test_a_repeated_row_gives_way_to_the_first(read):
    spaced = fact("Paris ", " Rome")
    found = read(table_of([fact("X"), fact(), fact("Y")]), table_of([spaced, fact()]))
    assert list(found.rows) == [0, 1, 2]
    reason = "repeats row 1: same prompt, subject and target_new; keep one"
    assert reasons(found) == {3: reason, 4: reason}


def test_contradicting_rows_are_all_rejected_and_name_each_other(read):
    rows = [fact(target="Rome"), fact("X"), fact(target="Oslo"), fact(target="Rome")]
    found = read(table_of(rows))
    assert list(found.rows) == [1]
    said = "contradicts row {}: same prompt and subject, another target_new; keep one"
    assert reasons(found) == {0: said.format("2"), 2: said.format("0, 3"), 3: said.format("2")}


def test_contradicting_rows_are_named_in_their_order(read):
    found = read(table_of([fact(target=target) for target in ("Oslo", "Rome", "Oslo", "Bern")]))
    assert found.rejected[3].reason.startswith("contradicts row 0, 1, 2: same prompt")


def test_what_other_tools_noted_about_a_file_is_left_behind(read):
    table = table_of([fact()]).replace_schema_metadata({"pandas": "{}"})
    assert read(table).table.schema.metadata is None


def test_the_same_subject_under_another_prompt_is_another_fact(read):
    found = read(table_of([fact(), fact(target="Oslo", prompt="{} was founded by")]))
    assert list(found.rows) == [0, 1]


def test_an_invalid_row_neither_repeats_nor_contradicts(read):
    found = read(table_of([fact(target=""), fact(), fact(target=None)]))
    assert list(found.rows) == [1]


def test_a_long_list_of_contradictions_is_cut(read):
    found = read(table_of([fact(target=f"T{i}") for i in range(9)]))
    assert found.rejected[0].reason.startswith("contradicts row 1, 2, 3, 4, 5, …: same prompt")
    assert found.rejected[8].reason.startswith("contradicts row 0, 1, 2, 3, 4, …: same prompt")


def test_null_and_empty_texts_are_left_out_and_the_request_is_edited(read):
    texts = {
        "target_true": " ",
        "paraphrase_prompts": ["a", None, " "],
        "neighborhood_prompts": ["", "n"],
        "generation_prompts": None,
        "portability_prompts": ["p", "q", None, "r"],
        "portability_targets": ["1", "", "3", "4"],
    }
    found = read(table_of([fact("A") | texts, fact("B")]))
    assert found.rejected == []
    assert list(found.requests) == [
        EditRequest(
            **fact("A"),
            paraphrase_prompts=["a"],
            neighborhood_prompts=["n"],
            portability_prompts=["p", "r"],
            portability_targets=["1", "4"],
        ),
        EditRequest(**fact("B")),
    ]
    left_out = ["target_true", "paraphrase_prompts[1]", "paraphrase_prompts[2]"]
    left_out += ["neighborhood_prompts[0]", "portability_prompts[2]", "portability_targets[1]"]
    assert found.left_out == {0: left_out}
    assert found.notes == [
        f"null or empty texts left out of requests: 6 in 1 rows (row 0: {', '.join(left_out)}); "
        "the requests are edited"
    ]
    # The input stays as it was.
    assert found.table.column("paraphrase_prompts").to_pylist() == [["a", None, " "], None]


def test_answers_that_do_not_go_with_their_prompts_are_refused_as_they_are(read):
    odd = {"portability_prompts": [None, "x"], "portability_targets": ["a"]}
    found = read(table_of([fact() | odd]))
    assert reasons(found) == {0: "portability_prompts[0] is NoneType, not a string; give text"}


def test_rejected_rows_are_not_among_those_that_do_without_a_text(read):
    found = read(table_of([fact(), fact() | {"paraphrase_prompts": ["a", None]}]))
    assert (len(found.rejected), found.left_out, found.notes) == (1, {}, [])


def test_prompts_that_end_in_a_line_break_are_counted(read):
    chat = "<|user|>\n{}?\n<|assistant|>\n"
    found = read(table_of([fact(), fact(prompt=chat), fact(prompt=chat, target="")]))
    assert found.requests[1].prompt == chat
    assert found.notes == [
        "prompts that end in a line break: 1; it is part of the prompt, and the target follows "
        "without a space"
    ]


DECOMPOSED = "Zu\u0308rich"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (fact("Zürich"), fact(DECOMPOSED)),
        (fact(prompt="{} is  in"), fact(prompt="{} is in")),
        (fact("New\u00a0York"), fact("New York")),
        (fact(prompt="{} is in"), fact(prompt="{} is in\n")),
    ],
)
def test_unicode_forms_and_white_space_hide_neither_contradiction_nor_repetition(read, one, other):
    found = read(table_of([one, other | {"target_new": "Oslo"}, fact("X")]))
    assert list(found.rows) == [2]
    but = "except for white space or Unicode form"
    said = "contradicts row {}: same prompt and subject {}, another target_new; keep one"
    assert reasons(found) == {0: said.format(1, but), 1: said.format(0, but)}
    found = read(table_of([one, other | {"target_new": " Rome "}, fact("X")]))
    assert list(found.rows) == [0, 2]
    assert found.requests[0] == EditRequest(**one)
    assert reasons(found) == {
        1: f"repeats row 0: same prompt, subject and target_new {but}; keep one"
    }


def test_rows_that_are_spelled_alike_count_as_the_same(read):
    rows = [fact(DECOMPOSED), fact(DECOMPOSED, target="a  b"), fact("X", "ü"), fact("X", "u\u0308")]
    assert reasons(read(table_of(rows))) == {
        0: "contradicts row 1: same prompt and subject, another target_new; keep one",
        1: "contradicts row 0: same prompt and subject, another target_new; keep one",
        3: "repeats row 2: same prompt, subject and target_new except for white space or Unicode "
        "form; keep one",
    }


def test_folders_of_a_hive_table_are_columns(tmp_path):
    stored = table_of([fact("B") | {"relation": "own"}])
    for name, table in (
        ("relation=a%20b/x.parquet", table_of([fact("A")])),
        ("relation=c/x.parquet", stored),
        ("subject=Lyon/x.parquet", table_of([fact()]).drop_columns(["subject"])),
    ):
        (tmp_path / name).parent.mkdir()
        pq.write_table(table, tmp_path / name)
    found = read_requests(str(tmp_path))
    assert [request.subject for request in found.requests] == ["A", "B", "Lyon"]
    assert found.table.column("relation").to_pylist() == ["a b", "own", None]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("f.jsonl", '{"prompt": "{} is"}\n'),
        ("f.csv", "prompt,subject\n"),
        ("requests", '\n [{"prompt": "{} is"}]'),
    ],
)
def test_requests_that_are_no_parquet_name_the_command_that_converts_them(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(RequestTableError) as caught:
        read_requests(str(path))
    assert str(caught.value) == (
        f"requests: {path} is CSV or JSON, not Parquet; convert it with 'pmet facts convert {path} "
        "requests.parquet' and name that file"
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"case_id": 1, "requested_rewrite": {"prompt": "{} is"}},
            "; it holds records of a data set of edits: convert it with 'pmet facts convert {} "
            "requests.parquet'",
        ),
        (
            {"subject": "a", "relation": "b", "object": "c"},
            "; it holds a fact dump: convert it with 'pmet facts convert {} requests.parquet "
            "--templates templates.yaml'",
        ),
        ({"subject": "a", "text": "b"}, "and this file has subject, text"),
    ],
)
def test_parquet_of_something_else_names_the_command_that_converts_it(tmp_path, row, said):
    path = tmp_path / "f.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    with pytest.raises(RequestTableError) as caught:
        read_requests(str(path))
    assert str(caught.value).endswith(said.format(path))


TEXT = st.sampled_from(["A", "B", " A", "", " ", None, "{}", "ü"])
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.sampled_from(["{} is", "{} was", "is", None, "{} {}"]),
            "subject": TEXT,
            "target_new": TEXT,
            "paraphrase_prompts": st.one_of(st.none(), st.lists(TEXT, max_size=2)),
        }
    ),
    max_size=12,
)
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("prompt", "subject", "target_new")]
    + [("paraphrase_prompts", pa.list_(pa.string()))]
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=ROWS, cut=st.integers(0, 12))
def test_every_row_ends_in_exactly_one_place(tmp_path, rows, cut):
    for name, part in (("a", rows[:cut]), ("b", rows[cut:])):
        pq.write_table(pa.Table.from_pylist(part, SCHEMA), tmp_path / f"{name}.parquet")
    found = read_requests(str(tmp_path / "*.parquet"))
    rejected = [rejection.row for rejection in found.rejected]
    assert sorted([*found.rows, *rejected]) == list(range(len(rows)))
    assert list(found.rows) == sorted(found.rows)
    assert rejected == sorted(rejected)
    assert found.table.to_pylist() == rows
    assert accepted(found).to_pylist() == [rows[row] for row in found.rows]
    for row, request in zip(found.rows, found.requests, strict=True):
        assert request.subject == rows[row]["subject"].strip()
    facts = [(request.prompt, request.subject) for request in found.requests]
    assert len(facts) == len(set(facts))
    assert all(rejection.reason for rejection in found.rejected)
    assert found.rejected_table().column("row").to_pylist() == rejected


def test_files_with_different_columns_are_put_together(read):
    found = read(
        table_of([fact("A") | {"n": 1}], n=pa.int32()),
        table_of([fact("B") | {"n": 2.5, "m": "x"}], prompt=pa.large_string()),
        table_of([fact("C") | {"n": None}]),
    )
    assert [row["n"] for row in found.table.to_pylist()] == [1, 2.5, None]
    assert [row["m"] for row in found.table.to_pylist()] == [None, "x", None]
    assert list(found.rows) == [0, 1, 2]


def test_numbers_and_text_in_one_column_become_text(read):
    found = read(table_of([fact("A") | {"case_id": 1}]), table_of([fact("B") | {"case_id": "b"}]))
    assert found.table.column("case_id").to_pylist() == ["1", "b"]
    assert [request.case_id for request in found.requests] == [1, "b"]


def test_columns_that_nothing_holds_are_named(read, tmp_path):
    with pytest.raises(RequestTableError) as caught:
        read(table_of([fact("A") | {"n": {"a": 1}}]), table_of([fact("B") | {"n": 1}]))
    assert str(caught.value) == (
        f"column 'n' of {tmp_path}/000.parquet has type struct<a: int64>, which cannot be combined "
        "with the other files; write it with one type everywhere"
    )


def test_a_missing_column_is_named_with_its_file(read, tmp_path):
    bad = table_of([fact()]).drop_columns(["subject"])
    with pytest.raises(RequestTableError) as caught:
        read(table_of([fact()]), bad)
    assert str(caught.value) == (
        f"{tmp_path}/001.parquet has no column subject; requests need prompt, subject, "
        "target_new, and this file has prompt, target_new"
    )


def test_two_columns_of_one_name_are_refused(read, tmp_path):
    bad = table_of([fact()]).append_column("subject", pa.array(["x"]))
    with pytest.raises(RequestTableError) as caught:
        read(bad)
    assert str(caught.value) == (
        f"{tmp_path}/000.parquet has two columns named 'subject'; rename one"
    )


@pytest.mark.parametrize("keep", [0, 3, 200, -1, -200])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "cut.parquet"
    pq.write_table(table_of([fact(str(i)) for i in range(100)]), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RequestTableError) as caught:
        read_requests(str(path))
    assert str(caught.value).startswith(f"requests: cannot read {path} (")
    assert "damaged or not Parquet" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_pages_are_named(tmp_path):
    path = tmp_path / "bad.parquet"
    pq.write_table(table_of([fact(str(i)) for i in range(1000)]), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xaa" * 396
    path.write_bytes(data)
    with pytest.raises(RequestTableError, match=rf"requests: cannot read {path} \("):
        read_requests(str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RequestTableError, match=r"none\.parquet matches no file"):
        read_requests(str(tmp_path / "none.parquet"))


def test_files_without_rows_hold_no_requests(read):
    found = read(table_of([fact()]).slice(0, 0))
    assert list(found.requests) == []
    assert found.rejected_table().column_names == [*fact(), "row", "code", "reason"]


def test_added_columns_keep_those_of_the_input():
    table = pa.table({"row": ["r"], "input_row": ["i"], "a": [1]})
    found = with_columns(table, {"row": pa.array([5]), "reason": pa.array(["bad"])})
    assert found.to_pylist() == [
        {"input_input_row": "r", "input_row": "i", "a": 1, "row": 5, "reason": "bad"}
    ]


def test_rejected_rows_can_be_put_right_and_given_again(read, tmp_path):
    first = read(table_of([fact("A"), fact("B", "")])).rejected_table()
    again = tmp_path / "again"
    again.mkdir()
    pq.write_table(first, again / "r.parquet")
    found = read_requests(str(again)).rejected_table()
    assert found.column_names == [
        *fact(),
        "input_row",
        "input_code",
        "input_reason",
        "row",
        "code",
        "reason",
    ]
    assert found.to_pylist()[0]["input_row"] == 1
    assert found.to_pylist()[0]["row"] == 0


def test_a_rejection_is_a_record():
    code = RejectionCode.INVALID
    assert Rejection(row=1, reason="x", code=code) == Rejection(1, "x", code)


def test_contradictions_without_end_take_seconds(read):
    rows = 30_000
    start = time.perf_counter()
    found = read(table_of([fact(target=f"T{i}") for i in range(rows)]))
    assert len(found.rejected) == rows
    assert time.perf_counter() - start < 15


class TestTargets:
    def table(self, count=3, width=4):
        values = np.arange(count * width, dtype=np.float32).reshape(count, width)
        return values, targets_table(range(10, 10 + count), values, [5] * count, [0.5] * count)

    def test_arrays_are_read_back_bit_for_bit(self, tmp_path):
        values = np.random.default_rng(0).standard_normal((300, 7)).astype(np.float32)
        losses = np.linspace(0, 1, 300, dtype=np.float32)
        table = targets_table(np.arange(300), values, np.arange(300) % 25, losses)
        pq.write_table(table, tmp_path / "t.parquet", compression="zstd", row_group_size=64)
        found = read_targets(pq.read_table(tmp_path / "t.parquet"))
        assert found.values.tobytes() == values.tobytes()
        assert found.losses.tobytes() == losses.tobytes()
        assert found.rows.tolist() == list(range(300))
        assert found.steps.tolist() == [i % 25 for i in range(300)]
        dtypes = [np.int64, np.float32, np.int32, np.float32, np.float32]
        assert [a.dtype for a in found] == dtypes
        assert np.isnan(found.first_losses).all()

    def test_first_losses_are_kept_and_older_tables_have_none(self):
        values = np.zeros((3, 4), np.float32)
        first = np.array([2.5, np.nan, np.inf], np.float32)
        table = targets_table(range(3), values, [1] * 3, [0.5] * 3, first)
        assert read_targets(table).first_losses.tobytes() == first.tobytes()
        assert read_targets(table.drop_columns(["first_loss"])).first_losses is None

    def test_the_schema_is_fixed(self):
        _, table = self.table()
        assert dict(zip(table.column_names, table.schema.types, strict=True)) == {
            "row": pa.int64(),
            "target": pa.list_(pa.float32(), 4),
            "steps": pa.int32(),
            "loss": pa.float32(),
            "first_loss": pa.float32(),
        }

    def test_slices_and_concatenations_are_read(self):
        values, table = self.table(6)
        pieces = pa.concat_tables([table.slice(1, 2), table.slice(4)])
        assert read_targets(pieces).values.tolist() == values[[1, 2, 4, 5]].tolist()
        assert read_targets(pieces).rows.tolist() == [11, 12, 14, 15]

    def test_a_transposed_view_is_stored_as_it_looks(self):
        values = np.arange(6, dtype=np.float32).reshape(2, 3).T
        table = targets_table(range(3), values, [1] * 3, [0.0] * 3)
        assert read_targets(table).values.tolist() == values.tolist()

    def test_no_targets_keep_their_width(self):
        _, table = self.table(0, 5)
        assert read_targets(table).values.shape == (0, 5)

    @pytest.mark.parametrize(
        "values",
        [np.zeros((3, 4)), np.zeros(12, np.float32), np.zeros((2, 4), np.float32)],
    )
    def test_wrong_arrays_are_refused(self, values):
        with pytest.raises(ValueError, match=r"targets need \(E, D\) float32 values"):
            targets_table(range(3), values, [1] * 3, [0.0] * 3)

    def test_other_tables_are_refused(self):
        _, table = self.table()
        holes = table.set_column(2, "steps", pa.array([1, None, 2], pa.int32()))
        for other in (table.drop_columns(["loss"]), table.rename_columns(list("abcde")), holes):
            with pytest.raises(StorageError, match=r"not a table of targets: .*delete the shard"):
                read_targets(other)


def test_a_separator_is_a_column_or_else_that_of_the_job(tmp_path):
    rows = [fact("A") | {"separator": given} for given in (None, "", "\n")]
    pq.write_table(table_of(rows), tmp_path / "0.parquet")
    pq.write_table(table_of([fact("B")]), tmp_path / "1.parquet")
    null = table_of([fact("C") | {"separator": None}], separator=pa.null())
    pq.write_table(null, tmp_path / "2.parquet")
    rest = [EditRequest(**fact(s)) for s in "BC"]
    found = read_requests(str(tmp_path))
    assert [r.separator for r in found.requests] == [None, None, None]
    assert reasons(found) == {
        1: "repeats row 0: same prompt, subject and target_new; keep one",
        2: "repeats row 0: same prompt, subject and target_new; keep one",
    }
    pq.write_table(
        table_of([r | {"subject": str(i)} for i, r in enumerate(rows)]), tmp_path / "0.parquet"
    )
    found = read_requests(str(tmp_path))
    assert [r.separator for r in found.requests] == [None, "", "\n", None, None]
    assert list(found.requests)[3:] == rest
    found = read_requests(str(tmp_path), " – ")
    assert [r.separator for r in found.requests] == [" – ", "", "\n", " – ", " – "]


def test_a_separator_that_is_no_text_is_refused_with_a_reason(read):
    found = read(table_of([fact() | {"separator": 3}]))
    assert reasons(found) == {0: "separator is int, not a string; give text, which may be empty"}
