"""Rows of the results, and the model's figures."""

from __future__ import annotations

import math

import pyarrow as pa
import pytest

from pipeline.data.tables import RequestTable
from pipeline.stages.measurement import Measurement
from pipeline.stages.results import answered, model_metrics, results_table
from pmet.evaluation.metrics import TextScore
from pmet.request import EditRequest


def figures(efficacy: float, specificity: float, prompts: int) -> dict[str, object]:
    return {
        "efficacy": efficacy,
        "efficacy_prompts": 1,
        "specificity": specificity,
        "specificity_prompts": prompts,
        "generalization": None,
        "generalization_prompts": 0,
        "answer": "so",
    }


def test_a_models_figure_is_the_mean_over_prompts_not_over_requests() -> None:
    rows = {3: figures(1.0, 1.0, 1), 5: figures(0.0, 0.0, 3), 7: figures(1.0, 1.0, 9)}
    texts = [TextScore(4.0, [1, 2]), TextScore(8.0, [3, 4])]
    after = [TextScore(4.0, [1, 2]), TextScore(8.0, [3, 9])]
    # Row 7 has no target; row 6 was not drawn.
    both = model_metrics(Measurement(rows, texts), Measurement(rows, after), [3, 5, 6])
    metrics = both["before"]
    assert metrics["efficacy"] == 0.5
    assert metrics["specificity"] == 0.25
    assert metrics["generalization"] is None
    assert metrics["score"] is None
    assert metrics["perplexity"] == pytest.approx(math.exp(3.0))
    assert both["after"]["agreement"] == 0.75
    low, high = both["intervals"]["after"]["agreement"]
    assert low < 0.75 < high
    assert set(both["intervals"]["before"]) == {"efficacy", "specificity", "perplexity"}


def test_without_a_corpus_there_is_neither_perplexity_nor_agreement() -> None:
    rows = {3: figures(1.0, 1.0, 1)}
    both = model_metrics(Measurement(rows, []), Measurement(rows, []), [3])
    assert both["before"]["perplexity"] is None
    assert both["after"]["agreement"] is None


def test_written_text_has_columns_where_it_was_asked_for() -> None:
    table = pa.table({"prompt": ["{} a"]})
    shard = pa.table({"row": [0], "steps": [5], "loss": [0.5]})
    written = {0: {**figures(1.0, 1.0, 1), "text": "s a t", "fluency": 1.5, "consistency": None}}
    given = (RequestTable([], [0], table, []), {0: "edited"}, [shard])
    (row,) = results_table(*given, written, written).to_pylist()
    assert (row["before_text"], row["after_fluency"], row["after_consistency"]) == (
        "s a t",
        1.5,
        None,
    )
    names = results_table(*given, {0: figures(1.0, 1.0, 1)}, {}).column_names
    assert not {"before_text", "before_fluency", "after_text"} & set(names)
    assert {"before_efficacy_accuracy", "after_portability"} <= set(names)


def test_rows_keep_their_input_columns_and_find_their_target() -> None:
    table = pa.table({"prompt": ["{} a", "{} b", "{} c"], "note": ["x", "y", "z"]})
    requests = [EditRequest(p, "s", "t") for p in ("{} a", "{} c")]
    shard = pa.table({"row": [2, 0], "steps": [5, 7], "loss": [0.5, 0.25]})
    results = results_table(
        RequestTable(requests, [0, 2], table, []),
        {2: "edited", 0: "edited"},
        [shard],
        {},
        {2: figures(1.0, 1.0, 1)},
    ).to_pylist()
    assert [r["note"] for r in results] == ["x", "z"]
    assert [r["row"] for r in results] == [0, 2]
    assert [r["steps"] for r in results] == [7, 5]
    assert [r["after_efficacy"] for r in results] == [None, 1.0]
    assert [r["after_answer"] for r in results] == [None, "so"]
    assert all(r["status"] == "edited" and r["before_efficacy"] is None for r in results)


def test_known_rows_have_figures_but_no_target() -> None:
    table = pa.table({"prompt": ["{} a", "{} b", "{} c"]})
    known = [0, 2]
    results = results_table(
        RequestTable([], [0, 1, 2], table, []),
        {1: "edited"} | dict.fromkeys(known, "known"),
        [pa.table({"row": [1], "steps": [5], "loss": [0.5]})],
        answered(known, known) | {2: figures(1.0, 1.0, 1)},
        answered(known, [2]) | {2: figures(0.0, 1.0, 1)},
    ).to_pylist()
    assert [r["status"] for r in results] == ["known", "edited", "known"]
    assert [(r["steps"], r["loss"]) for r in results] == [(None, None), (5, 0.5), (None, None)]
    assert [r["before_efficacy_strict"] for r in results] == [1.0, None, None]
    assert [r["after_efficacy_strict"] for r in results] == [0.0, None, None]
    # A full measurement takes precedence over the answer alone.
    assert [r["after_efficacy"] for r in results] == [None, None, 0.0]


def test_rows_say_which_texts_they_do_without() -> None:
    table = pa.table({"prompt": ["{} a", "{} b"]})
    shard = pa.table({"row": [0, 1], "steps": [5, 5], "loss": [0.5, 0.5]})
    given = RequestTable([], [0, 1], table, [], {1: ["paraphrase_prompts[1]", "target_true"]})
    results = results_table(given, {0: "edited", 1: "edited"}, [shard], {}, {})
    assert results.column("left_out").to_pylist() == [None, "paraphrase_prompts[1], target_true"]
    whole = RequestTable([], [0, 1], table, [])
    assert "left_out" not in results_table(whole, {0: "edited"}, [shard], {}, {}).column_names
