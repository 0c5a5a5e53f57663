"""The demo world: its facts, its edit requests, and the bundled model's knowledge."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.demo import train, world
from jobs.demo.interchange import Interchange
from pmet import EditRequest, PMETHyperParams
from pmet.model import contexts

DEMO = Path(world.__file__).parent
MODEL = DEMO / "model"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


# --- Facts --------------------------------------------------------------------------------------


def test_about_a_thousand_facts():
    assert 1000 <= len(world.facts()) <= 1500


def test_no_fact_is_stated_twice():
    told = Counter((fact.relation.name, fact.subject) for fact in world.facts())
    assert [key for key, count in told.items() if count > 1] == []


def test_cells_hold_clean_text():
    for fact in world.facts():
        for text in (fact.subject, fact.object):
            assert text == " ".join(text.split())
            assert not {"{", "}"} & set(text)


def test_tables_have_no_ragged_rows():
    for table in world.WORLD.glob("*.csv"):
        with table.open(encoding="utf-8", newline="") as lines:
            header, *rows = csv.reader(lines)
        assert {len(row) for row in rows} == {len(header)}, table.name


def test_every_table_is_read():
    read = {relation.table for relation in world.relations()}
    assert read == {table.name for table in world.WORLD.glob("*.csv")}


@pytest.mark.parametrize("relation", world.relations(), ids=lambda relation: relation.name)
def test_templates_hold_one_place(relation):
    templates = [*relation.templates, relation.kind]
    assert len(relation.paraphrases) >= 3
    assert len(set(templates)) == len(templates)
    for template in templates:
        assert template.count("{}") == 1
        assert template == template.strip()


def test_the_main_phrasing_never_begins_with_its_subject():
    assert not [r.name for r in world.relations() if r.prompt.startswith("{}")]


def test_statements_are_sentences_and_differ():
    statements = world.statements()
    assert len(set(statements)) == len(statements)
    assert "The capital of France is Paris." in statements
    assert "The lion is an animal." in statements
    assert all(text[0].isupper() for text in statements)
    assert all(text.endswith(".") for text in statements)


# --- Requests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    return world.requests()


def test_requests_are_enough_and_repeat(rows):
    assert len(rows) == 200
    assert rows == world.requests(seed=0)
    assert rows != world.requests(seed=1)


def test_fewer_requests_are_the_first_ones(rows):
    assert world.requests(count=20) == rows[:20]


def test_too_many_requests_are_refused_with_the_number_there_is():
    with pytest.raises(ValueError, match=r"5000 requests were asked for but seed 0 gives 2\d\d"):
        world.requests(count=5000)


@pytest.mark.parametrize("seed", range(3))
def test_requests_make_one_true_fact_false(seed):
    truth = {(f.relation.name, f.subject): f.object for f in world.facts()}
    for row in world.requests(seed):
        assert truth[row["relation"], row["subject"]] == row["target_true"]
        assert row["target_new"] != row["target_true"]
        objects = {o for (relation, _), o in truth.items() if relation == row["relation"]}
        assert row["target_new"] in objects


def test_no_subject_is_edited_twice(rows):
    assert max(Counter(row["subject"] for row in rows).values()) == 1


@pytest.mark.parametrize("seed", range(3))
def test_neighbors_share_the_true_object_and_are_never_edited(seed):
    told = {
        (fact.relation.name, prompt): fact for fact in world.facts() for prompt in fact.prompts()
    }
    rows = world.requests(seed)
    edited = {row["subject"] for row in rows}
    for row in rows:
        assert world.MIN_NEIGHBORS <= len(row["neighborhood_prompts"]) <= world.MAX_NEIGHBORS
        for prompt in row["neighborhood_prompts"]:
            neighbor = told[row["relation"], prompt]
            assert neighbor.object == row["target_true"]
            assert neighbor.subject not in edited


def test_paraphrases_are_other_prompts_about_the_same_subject(rows):
    for row in rows:
        asked = row["prompt"].replace("{}", row["subject"])
        assert len(row["paraphrase_prompts"]) >= 3
        assert asked not in row["paraphrase_prompts"]
        assert all(row["subject"] in prompt for prompt in row["paraphrase_prompts"])


def test_requests_are_accepted_by_the_method(rows):
    for row in rows:
        EditRequest(
            row["prompt"],
            row["subject"],
            row["target_new"],
            case_id=row["case_id"],
            target_true=row["target_true"],
            paraphrase_prompts=row["paraphrase_prompts"],
            neighborhood_prompts=row["neighborhood_prompts"],
        )


def test_parquet_holds_the_same_rows(tmp_path, rows):
    world.write_requests(tmp_path / "requests.parquet")
    world.write_corpus(tmp_path / "corpus.parquet")
    assert pq.read_table(tmp_path / "requests.parquet").to_pylist() == rows
    texts = pq.read_table(tmp_path / "corpus.parquet")["text"].to_pylist()
    assert texts == world.statements()


# --- Training -----------------------------------------------------------------------------------


def test_batches_repeat_under_a_seed_and_their_rows_begin_with_a_statement(tokenizer):
    recipe = train.Recipe(row_tokens=48, batch_rows=4)
    one, two = (train.batches(world.statements(), tokenizer, recipe) for _ in range(2))
    for _ in range(2):
        ids = next(one)
        assert ids.shape == (4, 48)
        assert torch.equal(ids, next(two))
        for row in tokenizer.batch_decode(ids):
            assert row.startswith(tuple(world.statements()))


def test_learning_rate_rises_then_falls():
    phase = train.Phase(steps=100, learning_rate=1.0, weight_decay=0, quiet_weight=0, pairs=1)
    rates = [train.learning_rate(step, phase, warm_up=10) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == 1.0
    assert rates[-1] < 0.03


# --- The bundled model --------------------------------------------------------------------------


def test_the_model_is_small_and_safe():
    names = {path.name for path in MODEL.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 12e6
    assert {path.suffix for path in MODEL.iterdir()} == {".json", ".safetensors"}


def test_the_model_fits_the_recipe(model, tokenizer):
    recipe = train.Recipe()
    assert model.dtype == torch.float32
    assert model.config.n_layer == recipe.layers
    assert model.config.n_embd == recipe.width
    assert model.config.vocab_size == len(tokenizer) == recipe.vocabulary


def test_the_tokenizer_adds_nothing(tokenizer):
    assert tokenizer.is_fast
    assert tokenizer.decode(tokenizer("São Paulo is in Brazil.")["input_ids"]) == (
        "São Paulo is in Brazil."
    )
    assert tokenizer.eos_token_id not in tokenizer("The capital of France is")["input_ids"]


def test_the_model_knows_the_facts_in_the_main_phrasing(model, tokenizer):
    pairs = [(fact.prompts()[0], fact.object) for fact in world.facts()]
    assert train.greedy_accuracy(model, tokenizer, pairs) >= 0.98


def test_the_model_knows_the_facts_in_every_other_phrasing(model, tokenizer):
    # A third of them is a large enough sample.
    pairs = [(prompt, fact.object) for fact in world.facts()[::3] for prompt in fact.prompts()[1:]]
    assert train.greedy_accuracy(model, tokenizer, pairs) >= 0.98


def test_greedy_accuracy_counts_wrong_answers(model, tokenizer):
    pairs = [("The capital of France is", "Paris"), ("The capital of France is", "Rome")]
    assert train.greedy_accuracy(model, tokenizer, pairs) == 0.5


@torch.no_grad()
def test_the_model_reads_facts_at_the_subjects_last_token(model, tokenizer):
    def loss(layer):
        exchanging = Interchange(
            model, tokenizer, world.statements(), layer=layer, pairs=48, seed=1
        )
        return exchanging.loss().item()

    # After layer z the state of another subject carries that subject's fact along; after the last
    # layer it comes too late to be read.
    assert loss(train.Recipe().target_layer) < 0.2
    assert loss(model.config.n_layer - 1) > 1


def test_hyper_parameters_and_templates_are_valid():
    hparams = PMETHyperParams.from_file(DEMO / "hparams.json")
    assert hparams.target_layer == train.Recipe().target_layer
    templates = json.loads((DEMO / "context_templates.json").read_text(encoding="utf-8"))
    assert contexts.check(templates)[0] == ["{}"]


def test_context_templates_tell_facts_that_no_default_request_changes(rows):
    templates = json.loads((DEMO / "context_templates.json").read_text(encoding="utf-8"))
    told = set(world.statements())
    edited = [row["subject"] for row in rows]
    for template in templates[1]:
        text = template.removesuffix(" {}")
        assert text in told
        assert not [subject for subject in edited if f" {subject} " in text]
