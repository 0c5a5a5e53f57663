import re

import pytest
import yaml
from huggingface_hub import ModelCard

from pipeline.report.card import model_card

RUN = {"seed": 17, "versions": {"torch": "2.13.0", "ray": "2.60.0"}, "status": "running"} | {
    "digests": {"job": "abc123", "model": "def456"}
}
METRICS = {
    "before": {"efficacy": 0.1, "score": None, "perplexity": 20.5},
    "after": {"efficacy": 0.987, "score": 0.9, "perplexity": 21.25, "efficacy_strict": 0.5}
    | {"fluency": 5.9},
    "intervals": {"before": {}, "after": {"efficacy": [0.98, 0.991]}},
    "counts": {"requested": 1234, "rejected": 34, "edited": 1200},
    "gates": [
        {"name": "efficacy", "threshold": 0.95, "value": 0.987, "passed": True},
        {"name": "perplexity_increase", "threshold": 0.02, "value": None, "passed": False},
    ],
}
JOB = "model: EleutherAI/gpt-j-6b\nrequests: facts/*.parquet\nseed: 17\n"


def metadata(card):
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def outside_of_fences(card):
    """Return the lines that Markdown does not treat as code."""
    outside, fence = [], None
    for line in card.splitlines():
        mark = re.match("`{3,}", line)
        if fence is None and mark:
            fence = mark.group()
        elif fence is not None and mark and mark.end() == len(line) and len(line) >= len(fence):
            fence = None
        elif fence is None:
            outside.append(line)
    assert fence is None
    return "\n".join(outside)


def test_the_card_holds_job_scores_and_the_way_back():
    card = model_card(JOB, RUN, METRICS)
    listed = metadata(card)
    del listed["model-index"]
    assert listed == {
        "base_model": "EleutherAI/gpt-j-6b",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-editing", "pmet"],
    }
    for wanted in (
        "1,200 facts were written",
        "\n```\nEleutherAI/gpt-j-6b\n```\n",
        "| efficacy | 10.0 % | 98.7 % | 98.0 to 99.1 | +88.7 points |\n",
        "| efficacy (strict) | – | 50.0 % | – | – |\n",
        "| score | – | 90.0 % | – | – |\n",
        "| specificity | – | – | – | – |\n",
        "| perplexity | 20.5 | 21.25 | – | +3.66 % |\n",
        "| fluency | – | 5.90 bits | – | – |\n",
        "- score: Harmonic mean of efficacy",
        "job abc123\nmodel def456\n",
        "| efficacy | at least 95.0 % | 98.7 % | passed |\n",
        "| perplexity_increase | at most 2.0 % over the base | – | not passed |\n",
        "## How to undo\n",
        '`pmet.Edit.load("delta").revert(model)`',
        "of 1,234 requests 34 were rejected",
        "seed 17",
        f"```yaml\n{JOB}```\n",
        "torch 2.13.0\nray 2.60.0\n",
    ):
        assert wanted in card, wanted


def test_hubs_read_the_figures_of_the_edited_model():
    card = ModelCard(model_card(JOB, RUN, METRICS))
    listed = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert listed == {k: v for k, v in METRICS["after"].items() if v is not None}
    assert card.data.base_model == "EleutherAI/gpt-j-6b"


def test_a_card_without_figures_lists_no_results():
    assert "model-index" not in metadata(model_card(JOB, RUN, {}))


def test_known_requests_are_reported():
    counts = METRICS["counts"] | {"known": 5}
    card = model_card(JOB, RUN, METRICS | {"counts": counts, "known": {"still_answered": 0.8}})
    assert "5 more were left out, because the base model knew them" in card
    assert "knows 80.0 % of them. The base model:" in card
    assert "left out" not in model_card(JOB, RUN, METRICS)


def test_a_job_without_gates_has_no_table_of_them():
    assert "demanded" not in model_card(JOB, RUN, METRICS | {"gates": []})


@pytest.mark.parametrize("model", ["/models/gpt2", "s3://bucket/gpt2", "a/b/c", "gpt2", "../x/y"])
def test_only_hub_ids_are_named_to_the_hub(model):
    card = model_card(f"model: {model}\n", RUN, METRICS)
    assert "base_model" not in metadata(card)
    assert f"\n```\n{model}\n```\n" in card


def test_a_local_folder_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert "base_model" not in metadata(model_card("model: models/mine\n", RUN, METRICS))


@pytest.mark.parametrize(
    ("evil", "harm"),
    [
        ("```\n# Not a heading\n<script>alert(1)</script>", "<script>alert(1)</script>"),
        ("`````\n[x](javascript:alert(1))", "[x](javascript:alert(1))"),
        ("---\nlicense: stolen\n---", "license: stolen"),
        ("{job} {0} {", "{job}"),
        ("| a | b |\n\n<img src=x onerror=alert(1)>", "<img src=x onerror=alert(1)>"),
    ],
)
def test_text_of_the_job_stays_inside_its_fence(evil, harm):
    job = yaml.safe_dump({"model": evil, "output": "x"}, default_style="|")
    card = model_card(job, RUN | {"versions": {evil: evil}}, METRICS)
    assert harm in card
    assert harm not in outside_of_fences(card)
    assert set(metadata(card)) == {"library_name", "pipeline_tag", "tags", "model-index"}


def test_a_job_that_cannot_be_read_still_has_a_card():
    card = model_card("a: [", {}, {})
    assert "\n```\nnot recorded\n```\n" in card
    assert "– facts were written" in card


def test_any_text_can_be_encoded():
    assert model_card("model: \ud800\n", RUN, METRICS).encode()
