"""Inspections: what they write, what they leave out, what they refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.inspect import inspection, views
from jobs.inspect.inspection import Inspected, Settings, inspect_model
from jobs.inspect.summary import summary_of_states, summary_of_traces
from jobs.inspect.views import points, recommendation, write_page
from pmet import InputError, PMETHyperParams
from pmet.inspection import Optimised, State, Trace
from tests.conftest import GOLDEN

MODEL = GOLDEN / "gpt2" / "model"
QUICK = "layers: [0, 1]\nv_num_grad_steps: 2\nclamp_norm_factor: 4\n"


def known_facts() -> list[dict[str, Any]]:
    """Requests of the golden model, with the objects that its corpus gives."""
    texts = json.loads((GOLDEN / "corpus.json").read_text())
    rows = []
    for request in json.loads((GOLDEN / "gpt2" / "requests.json").read_text()):
        prompt, subject = request["prompt"], request["subject"]
        said = prompt.replace("{}", subject)
        (true,) = (text.removeprefix(said).strip(" .") for text in texts if text.startswith(said))
        new = request["target_new"]["str"].strip()
        rows.append({"prompt": prompt, "subject": subject, "target_new": new, "target_true": true})
    return rows


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "facts.parquet")
    return str(folder / "facts.parquet")


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Inspected, str]:
    """An inspection, and its facts: five good ones, the others each wrong in its own way."""
    folder = tmp_path_factory.mktemp("inspected")
    (folder / "<i>quick.yaml").write_text(QUICK)
    good = known_facts()[:5]
    bad = [
        {**good[0], "subject": "Nobody", "target_true": None},
        {**good[0], "subject": "Sur", "prompt": "nothing"},
        {**good[0], "subject": "Sur " * 400},
        {**good[1], "subject": "Drum", "target_true": "qqqqqq"},
    ]
    facts = write(folder, [*good, *bad])
    settings = Settings(
        output=str(folder / "out"), hparams=str(folder / "<i>quick.yaml"), samples=2, workers="0"
    )
    return inspect_model(str(MODEL), [facts], settings), facts


def test_it_names_layers_and_keeps_its_figures(inspected: tuple[Inspected, str]) -> None:
    found, _ = inspected
    assert sorted(found.store.list()) == ["inspect.html", "inspect.json"]
    record = found.store.read_json("inspect.json")
    assert (record["depth"], record["width"]) == (5, 2)
    window = record["window"]
    effects = {
        tuple(state["layers"]): state["mean"]
        for state in record["tracing"]["states"]
        if state["part"] == "ffn" and len(state["layers"]) == 2
    }
    assert window["mean"] == max(effects.values()) == effects[tuple(window["layers"])]
    assert len(window["others"]) == 3
    low, high = record["tracing"]["clean"]["interval"]
    assert 0 <= low < record["tracing"]["clean"]["mean"] < high
    # The optimisation is that of the hyper-parameters, whatever is recommended.
    optimised = record["optimisation"]
    assert optimised["layers"] == [0, 1]
    assert [row["layer"] for row in optimised["moved"]] == [1, 2, 3, 4]
    reached = {way: optimised["probability"][way]["mean"] for way in optimised["probability"]}
    assert reached["both"] > reached["before"]
    assert set(reached) == {"before", "both", "ffn of both", "ffn", "attention"}


def test_facts_that_cannot_be_used_are_counted_with_a_reason(
    inspected: tuple[Inspected, str],
) -> None:
    record = inspected[0].record
    reasons = {one["row"]: one["reason"] for one in record["set_aside"]}
    assert set(reasons) == {5, 6, 7}
    assert "no target_true" in reasons[5]
    assert "exactly one {}" in reasons[6]
    assert "but the model reads" in reasons[7]
    unknown = [row for row in record["rows"] if not row["known"]]
    assert 8 in {row["row"] for row in unknown}
    assert all(row["restored"] == [] and row["corrupted"] is None for row in unknown)
    known = len(record["rows"]) - len(unknown)
    counts = {"inspected": known, "not_known": len(unknown), "set_aside": 3}
    assert record["facts"] == counts


def test_the_page_stands_alone_and_escapes(inspected: tuple[Inspected, str]) -> None:
    page = inspected[0].store.read_bytes("inspect.html").decode()
    assert "&lt;i&gt;quick.yaml" in page
    assert "<i>quick" not in page
    assert page.count("<svg") == 4
    assert "src=" not in page
    # Charts refer to their own marks only.
    assert not re.search('href="[^#]', page)
    assert "<script" not in page
    assert recommendation(inspected[0].record) in page.replace("&#39;", "'")


def test_how_facts_are_split_changes_nothing(
    inspected: tuple[Inspected, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, facts = inspected
    monkeypatch.setattr(inspection, "TRACED", 3)
    monkeypatch.setattr(inspection, "COMPARED", 3)
    monkeypatch.setattr(views, "line_chart", lambda *_, **__: "")
    hparams = str(Path(facts).with_name("<i>quick.yaml"))
    settings = Settings(output=str(tmp_path / "out"), hparams=hparams, samples=2, workers="0")
    again = inspect_model(str(MODEL), [facts], settings).record
    for own, other in zip(again["rows"], found.record["rows"], strict=True):
        assert own["restored"] == pytest.approx(other["restored"], abs=1e-6)
    both = (r["optimisation"]["probability"]["both"]["mean"] for r in (again, found.record))
    assert next(both) == pytest.approx(next(both), abs=1e-5)
    assert again["window"]["layers"] == found.record["window"]["layers"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"target_true": "qqqqqq"}, "the model knows none of 2 facts: its greedy answer is never"),
        ({"target_true": None}, "none of 2 facts can be inspected: there is no target_true"),
    ],
)
def test_facts_that_show_nothing_are_refused(
    tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    facts = write(tmp_path, [{**row, **change} for row in known_facts()[:2]])
    settings = Settings(output=str(tmp_path / "out"), workers="0")
    with pytest.raises(InputError, match=text):
        inspect_model(str(MODEL), [facts], settings)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    facts = write(tmp_path / "facts", known_facts()[:1])
    settings = Settings(output=str(tmp_path / "out"), workers="0")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "inspect.json").write_text('{"window": 1}')
    with pytest.raises(InputError, match="holds files, but no inspection; name a folder"):
        inspect_model(str(MODEL), [facts], settings)
    assert (tmp_path / "out" / "inspect.json").read_text() == '{"window": 1}'
    with pytest.raises(InputError, match="--output"):
        inspect_model(str(MODEL), [facts], Settings(output=str(MODEL), workers="0"))


STATES = [State("ffn", (i, i + 1)) for i in range(3)]
STATES += [State(part, (i,)) for part in ("hidden", "ffn", "attention") for i in range(4)]


def traced(*effects: tuple[float, float, float]) -> dict[str, Any]:
    """The summary of facts with these effects of the three windows."""
    rest = (0.25,) * 12
    traces = [
        Trace(True, 0.9, 0.25, (*(0.25 + effect for effect in own), *rest)) for own in effects
    ]
    return summary_of_traces(STATES, [*traces, Trace(False, 0.1)], 2)


def test_the_recommendation_says_how_sure_it_is() -> None:
    sure = traced((0.1, 0.4, 0.2), (0.1, 0.5, 0.2), (0.2, 0.4, 0.1))
    assert recommendation(sure).startswith("Edit layers 1 to 2: restoring their FFN outputs brings")
    assert "43.3 points" in recommendation(sure)
    assert recommendation(sure).endswith(", more than any other window")
    close = traced((0.1, 0.4, 0.5), (0.1, 0.5, 0.2), (0.2, 0.4, 0.1))
    assert recommendation(close).endswith("; not shown to be better than layers 2 to 3")
    others = [{"layers": [i, i + 1], "certain": False} for i in range(4)]
    many = {"window": {**close["window"], "others": others}}
    assert recommendation(many).endswith("; not shown to be better than 4 of the other windows")
    chance = traced((0.0, 0.4, 0.0), (0.0, -0.3, 0.0), (0.0, 0.1, 0.0))
    assert "which may be chance; give more facts" in recommendation(chance)
    assert "which may be chance" in recommendation(traced((0.0, 0.4, 0.0)))


def test_nothing_optimised_leaves_the_traces(inspected: tuple[Inspected, str]) -> None:
    hparams = PMETHyperParams(layers=(0, 1))
    failed = summary_of_states(hparams, [Optimised(0.1, failure="the loss is nan")], 4)
    assert (failed["facts"], failed["failed"]) == (0, 1)
    page = write_page({**inspected[0].record, "optimisation": failed})
    assert page.count("<svg") == 2
    assert "1 more without a result" in page


@pytest.mark.parametrize(("effect", "text"), [(-0.0004, "0.0"), (0.123, "+12.3"), (-0.1, "-10.0")])
def test_points_have_a_sign_unless_they_are_none(effect: float, text: str) -> None:
    assert points(effect) == text
