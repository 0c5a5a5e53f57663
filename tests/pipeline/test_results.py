"""Results rows, the model's figures."""

from __future__ import annotations

import pyarrow as pa

from pipeline.results import answered, model_metrics, results_table
from pipeline.schema import RequestTable
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
    metrics = model_metrics([figures(1.0, 1.0, 1), figures(0.0, 0.0, 3)], 7.0)
    assert metrics["efficacy"] == 0.5
    assert metrics["specificity"] == 0.25
    assert metrics["generalization"] is None
    assert metrics["score"] is None
    assert metrics["perplexity"] == 7.0


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
    # What was measured in full says more than the answer alone.
    assert [r["after_efficacy"] for r in results] == [None, None, 0.0]
