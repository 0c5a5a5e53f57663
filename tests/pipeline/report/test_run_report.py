import json
import re
from html.parser import HTMLParser

import pyarrow as pa
import pytest

from benchmarks.browser import Browser, find_browser
from pipeline.data.rejections import RejectionCode
from pipeline.errors import RunFolderError, StorageError
from pipeline.report import run_report as report_module
from pipeline.report.run_report import write_report
from pipeline.storage.store import Store

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 79190 * 7907 }}${x}$\u202e"
VOID = {"meta", "br", "img", "link", "input", "hr"}


DRAWN = {}
CHARTS = ("score", "group", "neighborhood", "layer")


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch):
    """Cache charts of the same figures: drawing takes nine tenths of the time."""

    def kept(draw):
        def drawn(*args, **settings):
            key = repr((draw.__name__, args, settings))
            if key not in DRAWN:
                DRAWN[key] = draw(*args, **settings)
            return DRAWN[key]

        return drawn

    for name in (*(f"{kind}_chart" for kind in CHARTS), "histogram"):
        monkeypatch.setattr(report_module, name, kept(getattr(report_module, name)))


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
            "code": ["invalid"] * count,
            "reason": [f"subject is empty, number {i}" for i in range(count)],
        }
    )


GATES = [
    {"name": "efficacy", "threshold": 0.95, "value": 0.99, "passed": True},
    {"name": "specificity", "threshold": 0.7, "value": 0.61, "passed": False},
    {"name": "perplexity_increase", "threshold": 0.02, "value": None, "passed": False},
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


def test_the_page_shows_the_whole_run(store):
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
    # Rows that are not shown must not appear at all.
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


def test_what_a_run_warned_of_stands_below_the_verdict(store):
    assert 'id="warnings"' not in report(store)
    warnings = [f"layer {n}: the edit outweighs <the model>" for n in range(9)]
    events = [{"kind": "warning", "text": text} for text in (*warnings, warnings[0])]
    change(store, "run.json", events=events)
    html = report(store)
    assert html.index('id="warnings"') < html.index('class="tiles"')
    for text in (warnings[0], warnings[7], "1 more are listed under the events"):
        assert text in Page(html).text
    assert "the edit outweighs <the model>" not in html


def test_the_header_says_where_model_and_hyper_parameters_are_from(store):
    change(store, "run.json", origins={"model": "dequantised from <Q4_1>"})
    text = Page(report(store)).text
    assert text.index("model: dequantised from <Q4_1>") < text.index("requested")


def test_known_requests_are_listed_apart_and_lost_ones_named(store):
    counts = {"requested": 30, "rejected": 0, "edited": 27, "known": 3}
    change(store, "metrics.json", counts=counts, known={"still_answered": 2 / 3})
    status, kept = ["edited"] * 30, [1.0] * 30
    status[4] = status[9] = status[29] = "known"
    kept[9] = kept[12] = 0.0
    store.write_table("results.parquet", results_of(30, status=status, after_efficacy_strict=kept))
    text = Page(report(store)).text
    assert "already known 3" in text
    assert "The edited model still gives 66.7 % of them." in text
    lost = text.split("Known before, lost by the edit")[1].split("Before and after")[0]
    assert re.findall(r"The capital of Land (\d+) is", lost) == ["9"]
    assert "The capital of Land 9 is" not in text.split("Weakest requests")[1]


def test_a_job_that_skips_nothing_mentions_no_known_requests(store):
    assert "already known" not in Page(report(store)).text


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
    examples = (
        Page(report(store)).text.split("Before and after A few")[1].split("Weakest requests")[0]
    )
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


HOSTILE = {
    "markup": "</td></svg></style></pre><script>alert(1)</script><a href=javascript:alert(1)>",
    "attribute": "\"' onload=alert(1) style='x:expression(alert(1))",
    "template": "{{ 79190 * 7907 }}{% raw %}{# #}${x}$x^{2}$",
    "css": "/* */ } body { display: none } @import url(//evil)",
    "unseen": "\x00\x1b[31m\x7f\x85\u202eesrever\u202c\u2066\ufeff",
    "huge": "long " * 20_000,
    "entity": "&lt;b&gt; &#x3c;script&#x3e; &amp;",
    "surrogate": "half \ud83d",
}
UNSEEN = ("unseen", "surrogate")


def hostile_run(store, text):
    """A run with this text in every field that can contain text."""
    run = store.read_json("run.json")
    storable = text.encode(errors="backslashreplace").decode()
    groups = [
        {"name": text + str(i), "requests": 3, "before": {}, "after": {"efficacy": 0.5 + i / 100}}
        for i in range(30)
    ]
    written = {
        "run.json": run
        | {
            "status": "held",
            "machine": text,
            "versions": {text: text},
            "digests": {text: text},
            "layers": [dict(run["layers"][0], parameter=text)],
            "events": [{"kind": text, "text": text}],
            "stages": [{"name": text, "seconds": 1.0, "detail": {text: text}}],
        },
        "metrics.json": store.read_json("metrics.json")
        | {
            "groups": {"column": text, "rows": groups},
            "gates": [dict(GATES[1], name=text, note=text)],
            "last": {"run": text, "after": {"efficacy": 0.5}},
        },
    }
    for name, value in written.items():
        store.write_bytes(name, json.dumps(value).encode())
    names = ("prompt", "subject", "target_new", "before_answer", "after_answer", "after_text")
    store.write_table("results.parquet", results_of(30, **{n: [storable] * 30 for n in names}))
    refused = {n: [storable] * 3 for n in ("prompt", "subject", "target_new", "reason")}
    store.write_table("rejected.parquet", pa.table(refused))
    store.write_bytes("job.yaml", storable.encode())


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_is_shown_and_does_nothing(store, kind):
    plain = Page(report_of(store, "plain"))
    html = report_of(store, HOSTILE[kind])
    page = Page(html)
    assert set(page.tags) == set(plain.tags)
    assert {name for name, _ in page.attributes} == {name for name, _ in plain.attributes}
    assert str(79190 * 7907) not in html
    unseen = set(re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]", html))
    assert unseen == set()
    shown = HOSTILE[kind][:60].encode("unicode_escape" if kind in UNSEEN else "utf-8").decode()
    assert shown in "".join(page.words)
    assert len(html) < 500_000
    assert max(map(len, page.words)) < 21_000


def report_of(store, text):
    hostile_run(store, text)
    write_report(store)
    return store.read_bytes("report.html").decode()


def test_nothing_hostile_happens_in_a_browser(store, tmp_path):
    path = find_browser()
    if path is None:
        pytest.skip("there is no Chromium or Chrome on this machine")
    page = store.local_path("report.html")
    with Browser(path) as browser:
        for kind, text in HOSTILE.items():
            report_of(store, text)
            browser.open(page)
            assert browser.evaluate("document.title").startswith("Held: edit run"), kind
            assert (
                browser.evaluate("document.querySelectorAll('script, iframe, a[onload]').length")
                == 0
            )
            assert browser.evaluate("getComputedStyle(document.body).display") == "block"
            widths = browser.evaluate("[document.body.scrollWidth, innerWidth]")
            assert widths[0] <= widths[1], kind
        assert browser.dialogs == []
        asked = [url for url in browser.requests if url != page.resolve().as_uri()]
        assert asked == []


def test_figures_have_their_intervals_and_meanings(store):
    ends = {"efficacy": [0.871, 0.923], "perplexity": [20.125, 21.875]}
    change(store, "metrics.json", intervals={"before": {}, "after": ends})
    html = report(store)
    text = Page(html).text
    assert "efficacy 10.0 % 90.0 % 87.1 to 92.3 +80.0 points" in text
    assert "perplexity 20 21 20.12 to 21.88 +5.00 %" in text
    assert "95 % confidence intervals" in text
    assert "score Harmonic mean of efficacy, generalization and specificity." in text


def test_new_figures_are_shown_in_their_units(store):
    after = store.read_json("metrics.json")["after"]
    more = {"fluency": 6.125, "agreement": 0.97, "portability_accuracy": 0.5, "unheard_of": 3.5}
    change(store, "metrics.json", after=after | more)
    text = Page(report(store)).text
    assert "fluency – 6.12 bits –" in text
    assert "agreement – 97.0 % –" in text
    assert "portability (accuracy) – 50.0 % –" in text
    assert "unheard of – 3.5 –" in text
    assert "consistency" not in text


def test_the_last_run_stands_beside(store):
    change(store, "metrics.json", last={"run": "s3://b/runs/1", "after": {"efficacy": 0.95}})
    text = Page(report(store)).text
    assert "efficacy 10.0 % 90.0 % +80.0 points 95.0 % −5.0 points" in text
    assert "Last run: s3://b/runs/1" in text


def group(name, efficacy, **more):
    plain = {"requests": 7, "before": {"efficacy": 0.1}, "after": {"efficacy": efficacy}}
    return {"name": name, "intervals": {}} | plain | more


def test_relations_have_a_chart_and_a_table(store):
    rows = [
        group("P17", 0.75, intervals={"after": {"efficacy": [0.5, 0.9]}}),
        group("P19", 0.5, after={"efficacy": None, "specificity": 0.25}),
    ]
    change(store, "metrics.json", groups={"column": "relation_id", "rows": rows})
    html = report(store)
    text = Page(html).text.split("By relation_id")[1].split("Damage")[0]
    assert "P17 7 10.0 % 75.0 % 50.0 to 90.0 – –" in text
    assert "P19 7 10.0 % – – 25.0 %" in text
    chart = re.search(r'<svg role="img" aria-label="Figures by group".*?</svg>', html, re.DOTALL)
    assert ">P17<" in chart.group()
    assert ">generalization<" not in chart.group()


def test_a_dollar_in_a_name_is_no_formula(store):
    rows = [group("$x^{2}$", 0.75)]
    change(store, "metrics.json", groups={"column": "relation", "rows": rows})
    chart = re.search(r'aria-label="Figures by group".*?</svg>', report(store), re.DOTALL).group()
    assert ">$x^{2}$<" in chart


def test_of_many_relations_the_weakest_are_drawn(store):
    rows = [group(f"relation {i:03}", 0.9 - 0.8 * (i == 390)) for i in range(400)]
    change(store, "metrics.json", groups={"column": "relation", "rows": rows})
    html = report(store)
    chart = re.search(r'aria-label="Figures by group".*?</svg>', html, re.DOTALL).group()
    assert ">relation 390<" in chart
    assert len(re.findall(">relation \\d+<", chart)) == 24
    assert "The chart shows the 24 of 400 groups with the lowest figures." in Page(html).text
    assert "200 more are not shown." in Page(html).text


def test_damage_in_the_neighborhood_is_counted_drawn_and_named(store):
    before, after = [1.0] * 30, [1.0] * 30
    after[3], after[8], before[9] = 0.9, 0.2, 0.5
    before[10] = None
    store.write_table(
        "results.parquet", results_of(30, before_specificity=before, after_specificity=after)
    )
    html = report(store)
    text = Page(html).text.split("Damage in the neighborhood")[1].split("Targets Number")[0]
    assert (
        "Of 29 requests with measured neighbors, 2 have fewer neighbors right than before, and 1 "
        "have more." in text
    )
    assert re.findall(r"Land (\d+) is → City", text) == ["8", "3"]
    assert "100 % 20 %" in text
    assert 'aria-label="Specificity of each request before and after"' in html
    assert "the largest dot: 26 requests" in html


def test_a_run_without_neighbors_mentions_no_damage(store):
    store.write_table("results.parquet", results_of(30, after_specificity=[None] * 30))
    assert "neighborhood" not in Page(report(store)).text.split("Gates")[0]
    assert 'id="neighborhood"' not in report(store)


def test_generated_text_stands_side_by_side(store):
    texts = {"before_text": ["He was born in Rome."] * 30, "after_text": ["In Oslo."] * 30}
    store.write_table("results.parquet", results_of(30, **texts))
    assert "Land 0 is → City 0 He was born in Rome. In Oslo." in Page(report(store)).text


def test_requests_without_a_target_are_distinguished_from_rejected_rows(store):
    reasons = ["subject is empty", "no target: the loss is not finite", "repeats row 4"]
    codes = [RejectionCode.INVALID, RejectionCode.NO_TARGET, RejectionCode.DUPLICATE]
    table = rejected_of(3).drop_columns(["code", "reason"])
    table = table.append_column("code", pa.array(codes, pa.string()))
    table = table.append_column("reason", pa.array(reasons))
    store.write_table("rejected.parquet", table)
    text = Page(report(store)).text
    late, early = text.split("Requests without a target")[1].split("Rejected rows")
    assert "the loss is not finite" in late
    assert "repeats row 4" in early
    assert "the loss" not in early.split("Stages")[0]


def test_quarantined_facts_are_listed(store):
    fact = {"relation": "mayor", "subject": "Nice", "object": "Ann", "reason": "not learned",
            "since": "2026-11-20"}  # fmt: skip
    write_report(store, quarantined=[fact])
    text = Page(store.read_bytes("report.html").decode()).text
    assert "Quarantined facts" in text
    assert "mayor Nice Ann not learned 2026-11-20" in text
    assert "Quarantined" not in Page(report(store)).text


def test_stages_have_rates_of_what_this_attempt_did(store):
    stages = [
        {"name": "targets", "seconds": 20.0, "detail": {"found": 30}},
        {"name": "second moments", "seconds": 10.0, "detail": {"tokens": 5000, "reused": 0}},
        {"name": "measure before", "seconds": 5.0, "detail": {"stored": 20}},
        {"name": "measure after", "seconds": 5.0, "detail": {}},
        {"name": "update", "seconds": 2.0, "detail": {"reused": 1}},
    ]
    layers = [dict(layer, requests=30) for layer in store.read_json("run.json")["layers"]]
    change(store, "run.json", stages=stages, layers=layers)
    text = Page(report(store)).text
    assert "targets 20.0 s 1.5 targets/s" in text
    assert "second moments 10.0 s 500 tokens/s" in text
    assert "measure before 5.0 s 2 requests/s" in text
    assert "measure after 5.0 s 6 requests/s" in text
    assert "update 2.0 s reused 1" in text
    stages[-1]["detail"] = {"reused": 0}
    change(store, "run.json", stages=stages)
    assert "update 2.0 s 15 requests/s reused 0" in Page(report(store)).text


def test_retries_and_deaths_are_counted(store):
    kinds = ["death", "retry", "death"]
    events = [{"kind": kind, "text": f"number {i}"} for i, kind in enumerate(kinds)]
    change(store, "run.json", events=events, attempt=3)
    text = Page(report(store)).text
    assert "Retries and deaths death: 2, retry: 1 kind" in text
    assert "attempt 3" in text
    change(store, "run.json", events=[])
    assert "Retries and deaths None in this attempt." in Page(report(store)).text


def test_earlier_attempts_are_listed(store):
    assert "Earlier attempts" not in Page(report(store)).text
    killed = {
        "attempt": 1,
        "status": "killed",
        "started_at": "2026-01-01T00:00:00+00:00",
        "finished_at": None,
        "written_at": "2026-01-01T00:02:05+00:00",
        "stages": [{"name": "targets", "seconds": 90.0, "detail": {}}],
        "events": {"death": 2, "retry": 1},
        "error": None,
    }
    failed = killed | {"attempt": 2, "status": "failed", "error": "<b>no room</b>", "stages": []}
    failed |= {"written_at": None, "events": {}}
    change(store, "run.json", attempt=3, earlier=[killed, failed])
    text = Page(report(store)).text
    assert "time of attempt 3" in text
    assert "1 killed 2 min 05 s targets 1 min 30 s death: 2, retry: 1" in text
    assert "2 failed: <b>no room</b> –" in text


def test_a_gate_has_the_name_that_it_has_in_the_job(store):
    gates = [
        {key: "specificity_drop", "kind": "drop", "threshold": 0.05, "value": 0.08, "passed": False}
        for key in ("name", "metric")  # the latter in runs of earlier releases
    ]
    for gate in gates:
        change(store, "run.json", status="held")
        change(store, "metrics.json", gates=[gate])
        page = Page(report(store))
        assert "specificity_drop at most 5.0 points below the base" in page.text
        assert page.text.count("specificity_drop") == 2, "in the verdict, and in the table"


def test_gates_against_the_base_and_the_last_run_say_so(store):
    gates = [
        {"name": "specificity_drop", "kind": "drop", "threshold": 0.05, "value": 0.08,
         "passed": False},
        {"name": "efficacy_drop_since_last", "kind": "drop_since_last", "threshold": 0.01,
         "value": -0.02, "passed": True},
        {"name": "fluency", "kind": "least", "threshold": 5.5, "value": 5.8, "passed": True},
    ]  # fmt: skip
    change(store, "metrics.json", gates=gates)
    text = Page(report(store)).text
    assert "specificity_drop at most 5.0 points below the base 8.0 points below not passed" in text
    assert "at most 1.0 points below the last run 2.0 points above passed" in text
    assert "fluency at least 5.50 bits 5.80 bits passed" in text


def test_the_contents_lead_to_what_there_is(store):
    html = report(store)
    there = re.findall(r'<h2 id="([a-z]+)"', html)
    led_to = re.findall(r'href="#([a-z]+)"', html)
    assert led_to == there


def test_a_subject_is_marked_in_its_prompt(store):
    assert "The capital of <mark>Land 0</mark> is" in report(store)


@pytest.mark.parametrize("missing", ["metrics.json", "results.parquet", "rejected.parquet"])
def test_an_unfinished_run_has_a_report_of_what_exists(store, missing):
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


def test_layers_and_targets_that_are_warned_of_are_marked(store):
    norms = {"weight_norm": 2.0, "form": "keys", "dtype": "bfloat16"}
    wild = {"parameter": "h.0.w", "delta_norm": 30.0, "rounding": 0.7, **norms}
    tame = {"parameter": "h.1.w", "delta_norm": 0.2, "rounding": 0.01, **norms}
    ruined = {"parameter": "h.2.w", "delta_norm": float("inf"), "rounding": float("nan"), **norms}
    change(store, "run.json", layers=[wild, tame, ruined])
    losses = {"first_loss": [2.0, 2.0, None], "loss": [9.5, 0.1, 50.0]}
    store.write_table("results.parquet", results_of(3, **losses))
    html = report(store)
    marked = re.findall(r'<td class="n bad">([^<]*)</td>', html)
    assert marked == ["1500.000 %", "70.00 %", "∞", "undefined"]
    text = Page(html).text
    assert "Targets that diverged" in text
    assert "Land 0" in text.split("Targets that diverged")[1].split("Change of the weights")[0]
    assert "Land 2" not in text.split("Targets that diverged")[1].split("Change of the weights")[0]


def test_a_run_without_such_signs_marks_nothing(store):
    html = report(store)
    assert "n bad" not in html
    assert "Targets that diverged" not in html


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
