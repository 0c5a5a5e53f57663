import re
from html.parser import HTMLParser

import pyarrow as pa
import pytest

from pipeline.errors import RunFolderError, StorageError
from pipeline.report import write_report
from pipeline.store import Store

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 79190 * 7907 }}${x}$\u202e"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """A page's elements and text, checked for being closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def figures(value):
    names = ("efficacy", "generalization", "specificity")
    return (
        dict.fromkeys(names, value) | {f"{n}_strict": value / 2 for n in names} | {"score": value}
    )


def results_of(count, **columns):
    plain = {
        "prompt": ["The capital of {} is"] * count,
        "subject": [f"Land {i}" for i in range(count)],
        "target_new": [f"City {i}" for i in range(count)],
        "row": list(range(count)),
        "status": ["edited"] * count,
        "steps": [5 + i % 20 for i in range(count)],
        "loss": [0.01 * (i % 9) for i in range(count)],
        "before_efficacy": [0.0] * count,
        "after_efficacy": [1.0] * count,
        "after_efficacy_strict": [1.0] * count,
        "after_generalization": [None] * count,
        "after_specificity": [0.5] * count,
        "before_answer": [f"Old {i}" for i in range(count)],
        "after_answer": [f"City {i}" for i in range(count)],
    }
    return pa.table(plain | columns)


def rejected_of(count):
    return pa.table(
        {
            "prompt": ["{} is"] * count,
            "subject": [""] * count,
            "target_new": pa.nulls(count, pa.string()),
            "row": [1000 + i for i in range(count)],
            "reason": [f"subject is empty, number {i}" for i in range(count)],
        }
    )


GATES = [
    {"metric": "efficacy", "threshold": 0.95, "value": 0.99, "passed": True},
    {"metric": "specificity", "threshold": 0.7, "value": 0.61, "passed": False},
    {"metric": "perplexity_increase", "threshold": 0.02, "value": None, "passed": False},
]


@pytest.fixture
def store(tmp_path):
    """A run folder with everything in it."""
    store = Store(tmp_path / "run")
    store.write_json(
        "run.json",
        {
            "status": "complete",
            "stages": [
                {"name": "targets", "seconds": 75.04, "detail": {"shards": 2, "reused": 1}},
                {"name": "update", "seconds": 3.25, "detail": {}},
            ],
            "versions": {"torch": "2.13.0", "ray": "2.60.0"},
            "digests": {"job": "abc123", "model": "def456"},
            "counts": {},
            "layers": [
                {"parameter": "h.3.mlp.weight", "delta_norm": 2.0, "weight_norm": 100.0},
                {"parameter": "h.4.mlp.weight", "delta_norm": 3.0, "weight_norm": 200.0},
            ],
            "events": [{"kind": "death", "text": "worker 3 was lost"}],
            "seed": 17,
            "started_at": "2026-11-23T02:00:00+00:00",
            "finished_at": "2026-11-23T03:05:10+00:00",
            "machine": "node-7",
        },
    )
    store.write_json(
        "metrics.json",
        {
            "before": figures(0.1) | {"perplexity": 20.0},
            "after": figures(0.9) | {"perplexity": 21.0},
            "counts": {"requested": 1234, "rejected": 34, "edited": 1200},
            "gates": GATES[:1],
        },
    )
    store.write_table("results.parquet", results_of(30))
    store.write_table("rejected.parquet", rejected_of(3))
    store.write_bytes("job.yaml", b"model: gpt2\nseed: 17\n")
    return store


def change(store, name, **values):
    store.write_json(name, store.read_json(name) | values)


def report(store):
    write_report(store)
    return store.read_bytes("report.html").decode()


def test_the_page_tells_the_whole_run(store):
    text = Page(report(store)).text
    for wanted in (
        "Promoted Every gate was passed.",
        "requested 1,234",
        "edited 1,200",
        "rejected 34",
        "score after 90.0 %",
        "time 1 h 05 min",
        "efficacy at least 95.0 % 99.0 % passed",
        "efficacy 10.0 % 90.0 % +80.0 points",
        "specificity (strict) 5.0 % 45.0 % +40.0 points",
        "perplexity 20 21 +5.00 %",
        "h.3.mlp.weight 2 100 2.000 %",
        "targets 1 min 15 s shards 2, reused 1",
        "update 3.2 s",
        "death worker 3 was lost",
        "1002 subject is empty, number 2 {} is",
        "seed 17",
        "machine node-7",
        "versions torch 2.13.0, ray 2.60.0",
        "digest of model def456",
        "How to undo The base model was not changed",
        'pmet.Edit.load("delta").revert(model)',
        "model: gpt2",
        "The capital of Land 0 is City 0 Old 0 City 0",
    ):
        assert wanted in text, wanted


def test_the_page_needs_nothing_but_itself(store):
    page = Page(report(store))
    assert not {"script", "img", "link", "iframe", "object", "embed", "image"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if not name.startswith("xmlns"):
            assert "//" not in (value or ""), (name, value)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert ("http-equiv", "Content-Security-Policy") in page.attributes
    assert ("content", policy) in page.attributes
    assert "@import" not in report(store)


@pytest.mark.parametrize("status", ["complete", "held", "failed"])
def test_nothing_in_the_data_becomes_markup(store, status):
    clean = Page(report(store))
    run = store.read_json("run.json")
    layers = [dict(layer, parameter=f"{EVIL}.{i}.x") for i, layer in enumerate(run["layers"])]
    change(
        store,
        "run.json",
        status=status,
        error=EVIL,
        machine=EVIL,
        layers=layers,
        versions={EVIL: EVIL},
        digests={EVIL: EVIL},
        events=[{"kind": EVIL, "text": EVIL}],
        stages=[{"name": EVIL, "seconds": 1.0, "detail": {EVIL: EVIL}}] * 2,
    )
    texts = ("prompt", "subject", "target_new", "before_answer", "after_answer")
    evil = {name: [EVIL + "{}" * (name == "prompt")] * 30 for name in texts}
    # Of what is not shown, neither the name nor the text may get in.
    evil |= {name: [EVIL] * 30 for name in ("case_id", "relation", EVIL, "../../x")}
    store.write_table("results.parquet", results_of(30, **evil))
    store.write_table(
        "rejected.parquet",
        pa.table({n: [EVIL] * 3 for n in ("prompt", "subject", "target_new", "reason")}),
    )
    store.write_bytes("job.yaml", EVIL.encode())
    page = Page(report(store))
    assert set(page.tags) == set(clean.tags)
    assert {name for name, _ in page.attributes} == {name for name, _ in clean.attributes}
    assert EVIL.split("\u202e")[0] in "".join(page.words)
    assert str(79190 * 7907) not in page.text


def test_a_run_folders_name_is_text(tmp_path, store):
    evil = tmp_path / "<img src=x onerror=alert(1)>"
    (tmp_path / "run").rename(evil)
    page = Page(report(Store(evil)))
    assert "img" not in page.tags
    assert "<img src=x onerror=alert(1)>" in page.text


def test_charts_take_their_colours_from_the_page(store):
    html = report(store)
    charts = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(charts) == 4
    for chart in charts:
        assert 'role="img" aria-label="' in chart
        assert "<text" in chart
        assert "currentColor" in chart
        assert "<image" not in chart
        colours = set(re.findall(r"#[0-9a-f]{6}", chart))
        assert colours == set(), colours
    for label in ("prompts (%)", "evaluations of the loss", "last loss (nats)", "requests"):
        assert label in html
    assert "‖Δ‖ / ‖W‖ (%)" in html
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_ids_are_unique_and_references_lead_to_them(store):
    html = report(store)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:url\(#|href="#)([^")]+)', html)
    assert set(references) <= set(ids)


def test_the_same_run_has_the_same_page(store):
    assert report(store) == report(store)


@pytest.mark.parametrize(
    ("status", "gates", "error", "said"),
    [
        ("complete", GATES[:1], None, "Promoted Every gate was passed."),
        ("complete", [], None, "Complete The job asked for no gates."),
        (
            "held",
            GATES,
            None,
            "Held Held back by: specificity, perplexity_increase. Do not put this model to use.",
        ),
        ("nothing", [], None, "Nothing to edit Every request was known already"),
        ("failed", [], "rank 2 died: out of memory", "Failed rank 2 died: out of memory"),
        ("failed", [], None, "Failed No reason was recorded."),
        ("running", [], None, "Not finished This is what there is so far."),
    ],
)
def test_the_verdict_comes_first(store, status, gates, error, said):
    if status == "nothing":
        status = "complete"
        change(store, "metrics.json", counts={"requested": 3, "edited": 0, "known": 3})
    change(store, "run.json", status=status, error=error)
    change(store, "metrics.json", gates=gates)
    text = Page(report(store)).text
    assert said in text[: len(said) + 400]


def test_what_was_known_is_told_apart_and_its_losses_are_named(store):
    counts = {"requested": 30, "rejected": 0, "edited": 27, "known": 3}
    change(store, "metrics.json", counts=counts, known={"still_answered": 2 / 3})
    status, kept = ["edited"] * 30, [1.0] * 30
    status[4] = status[9] = status[29] = "known"
    kept[9] = kept[12] = 0.0
    store.write_table("results.parquet", results_of(30, status=status, after_efficacy_strict=kept))
    text = Page(report(store)).text
    assert "known already 3" in text
    assert "The edited model still gives 66.7 % of them." in text
    lost = text.split("Known before, lost by the edit")[1].split("Weakest requests")[0]
    assert re.findall(r"The capital of Land (\d+) is", lost) == ["9"]
    assert "The capital of Land 9 is" not in text.split("Weakest requests")[1]


def test_a_job_that_skips_nothing_speaks_of_nothing_known(store):
    assert "known already" not in Page(report(store)).text


def test_gates_show_what_was_demanded_and_reached(store):
    change(store, "run.json", status="held")
    change(store, "metrics.json", gates=GATES)
    text = Page(report(store)).text
    assert "specificity at least 70.0 % 61.0 % not passed" in text
    assert "perplexity_increase at most 2.0 % over the base – not passed" in text
    assert "--gate" in report(store)


def test_what_was_not_measured_is_a_dash_and_not_a_nought(store):
    nothing = dict.fromkeys([*figures(0), "perplexity"])
    change(store, "metrics.json", before=nothing, after=nothing)
    html = report(store)
    assert "efficacy – – –" in Page(html).text
    assert "perplexity – – –" in Page(html).text
    assert "Scores before and after" not in html


def test_a_figure_measured_only_after_is_drawn_alone(store):
    change(store, "metrics.json", before=dict.fromkeys(figures(0)))
    text = Page(report(store)).text
    assert "efficacy – 90.0 % –" in text
    assert ">90.0%<" in report(store)
    assert ">0.0%<" not in report(store)


def test_only_gates_that_were_asked_for_are_drawn(store):
    assert ">gate<" in report(store)
    change(store, "metrics.json", gates=[])
    assert ">gate<" not in report(store)


def test_the_weakest_requests_come_first(store):
    efficacy = [1.0] * 30
    efficacy[7], efficacy[21] = 0.0, 0.5
    nothing_else = {"after_efficacy_strict": [None] * 30, "after_specificity": [None] * 30}
    store.write_table("results.parquet", results_of(30, after_efficacy=efficacy, **nothing_else))
    weakest = Page(report(store)).text.split("Weakest requests")[1]
    rows = re.findall(r"The capital of Land (\d+) is City", weakest)
    assert rows[:2] == ["7", "21"]
    assert "7 The capital of Land 7 is City 7 City 7 0 % – – 12 0.07" in weakest


def test_requests_that_were_not_measured_are_not_shown_as_weak(store):
    unmeasured = {name: [None] * 30 for name in results_of(1).column_names if "after" in name}
    store.write_table("results.parquet", results_of(30, **unmeasured))
    text = Page(report(store)).text
    assert "Weakest requests" not in text
    assert "Before and after" not in text


@pytest.mark.parametrize("count", [1, 24, 25, 26, 49, 51, 1000])
def test_a_few_examples_are_spread_over_the_input(store, count):
    store.write_table("results.parquet", results_of(count))
    examples = Page(report(store)).text.split("Before and after A few")[1].split("Rejected rows")[0]
    rows = [int(row) for row in re.findall(r"The capital of Land (\d+) is", examples)]
    assert min(count, 13) <= len(rows) <= 25
    assert rows[0] == 0
    assert rows[-1] >= 0.9 * (count - 1)


def test_failed_requests_are_listed(store):
    status = ["edited"] * 30
    status[4] = "failed"
    store.write_table("results.parquet", results_of(30, status=status))
    assert (
        "Failed requests row prompt wanted 4 The capital of Land 4 is" in Page(report(store)).text
    )


def test_ten_thousand_requests_make_a_small_page(store):
    store.write_table(
        "results.parquet", results_of(10_000, prompt=["{} " + "long " * 2000] * 10_000)
    )
    store.write_table("rejected.parquet", rejected_of(10_000))
    html = report(store)
    assert len(html) < 1_000_000
    assert "9,800 more are not shown." in html
    assert "(10,003 characters)" in html


def test_a_subject_is_marked_in_its_prompt(store):
    assert "The capital of <mark>Land 0</mark> is" in report(store)


@pytest.mark.parametrize("missing", ["metrics.json", "results.parquet", "rejected.parquet"])
def test_an_unfinished_run_is_told_so_far(store, missing):
    store.delete(missing)
    change(store, "run.json", status="running")
    assert "Not finished" in Page(report(store)).text


def test_an_early_failure_has_a_report(tmp_path):
    store = Store(tmp_path)
    store.write_json("run.json", {"status": "failed", "error": "no GPU"})
    text = Page(report(store)).text
    assert "Failed no GPU" in text
    assert "requested –" in text
    assert "time –" in text


def test_text_in_extra_columns_does_not_matter(store):
    damaged = pa.array([b"\xff"] * 30).view(pa.string())
    store.write_table("results.parquet", results_of(30).append_column("note", damaged))
    assert "Promoted" in report(store)


def test_a_lone_surrogate_is_escaped(store):
    change(store, "run.json", status="failed")
    raw = store.read_bytes("run.json").replace(b'"node-7"', b'"node\\ud800"')
    store.write_bytes("run.json", raw)
    assert "node\\ud800" in report(store)


def test_one_value_and_equal_values_are_drawn(store):
    store.write_table("results.parquet", results_of(1, steps=[25], loss=[0.5]))
    assert "Requests by evaluations of the loss" in report(store)
    store.write_table("results.parquet", results_of(3, loss=[float("nan"), None, float("inf")]))
    assert "Requests by last loss" not in report(store)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunFolderError) as caught:
        write_report(Store(tmp_path))
    assert (
        str(caught.value) == f"{tmp_path} is not a run folder: it has no run.json; check the path"
    )


def test_a_damaged_table_is_named(store):
    store.write_bytes("results.parquet", b"PAR1")
    with pytest.raises(StorageError, match=r"cannot read .*results\.parquet"):
        write_report(store)


def test_a_report_goes_where_the_run_is():
    remote = Store("memory://report-test")
    remote.write_json("run.json", {"status": "running"})
    write_report(remote)
    assert remote.exists("report.html")
