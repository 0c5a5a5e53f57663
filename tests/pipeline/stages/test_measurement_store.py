"""The base's answers are stored, found again, and never returned for another question."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import StorageError
from pipeline.evaluation.settings import How
from pipeline.job.config import EvaluateConfig
from pipeline.stages.measurement_store import MeasurementStore, model_key, request_key
from pipeline.storage.segments import Segments
from pipeline.storage.store import Store
from pmet import EditRequest

REQUEST = EditRequest("{} lies in", "Nice", "Italy", case_id=1, target_true="France")
HOW = How()
FIGURES = {"efficacy": 0.1 + 0.2, "generalization": None, "answer": "é\n"}


def key(request: EditRequest, how: How = HOW, *, answered: bool = True) -> str:
    return request_key(request, how, answered=answered)


def opened(url: str, model: str = "1") -> MeasurementStore:
    store = Store(url)
    return MeasurementStore(store, Segments(store, "evaluate.store", {"model": model}))


def test_stored_targets_are_found_for_the_same_request(any_url: str) -> None:
    opened(any_url).write({"a": FIGURES, "b": 1.5})
    opened(any_url).write({"c": None})
    assert opened(any_url).read(["a", "c", "d"]) == {"a": FIGURES, "c": None}
    assert opened(any_url).read([]) == {}


def test_another_model_has_its_own(tmp_path) -> None:
    opened(str(tmp_path)).write({"a": 1.5})
    assert opened(str(tmp_path), "2").read(["a"]) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "{} is in"},
        {"subject": "Lyon"},
        {"target_new": "Spain"},
        {"target_true": None},
        {"paraphrase_prompts": ["Nice is in"]},
        {"neighborhood_prompts": ["Lyon lies in"]},
        {"portability_prompts": ["Nice belongs to"], "portability_targets": ["Rome"]},
        {"generation_prompts": ["Nice is"]},
        {"question_prompts": ["Where is Nice?"]},
    ],
)
def test_the_key_covers_all_that_is_measured(change) -> None:
    assert key(replace(REQUEST, **change)) != key(REQUEST)


def test_the_key_covers_nothing_else() -> None:
    same = replace(REQUEST, case_id=2, reference_texts=["Nice is in Italy."])
    assert key(same) == key(REQUEST)


@pytest.mark.parametrize("how", [How(chat_template=True), How(writing_seed=0), How(writing_seed=1)])
def test_the_key_covers_how_it_is_measured(how: How) -> None:
    hows = [HOW, How(chat_template=True), How(writing_seed=0), How(writing_seed=1)]
    keys = [key(REQUEST, other) for other in hows]
    assert keys.count(key(REQUEST, how)) == 1


def test_the_key_covers_whether_it_is_answered() -> None:
    assert key(REQUEST) != key(REQUEST, answered=False)


def test_a_models_own_key_covers_the_texts_and_how_it_is_asked() -> None:
    def plan(corpus: str, **evaluate: Any) -> Any:
        job = SimpleNamespace(evaluate=EvaluateConfig(**evaluate), seed=0)
        return SimpleNamespace(digests={"corpus": corpus}, job=job)

    settings: list[dict[str, Any]] = [
        *({"perplexity_texts": 2}, {"perplexity_tokens": 9}, {"answers": 0}),
        *({"chat_template": True}, {}),
    ]
    keys = {model_key(plan("a", **evaluate)) for evaluate in settings}
    assert len(keys | {model_key(plan("b"))}) == 6
    # The number of answered requests matters only for requests.
    assert model_key(plan("a", answers=7)) in keys


def test_a_damaged_segment_is_named(tmp_path) -> None:
    opened(str(tmp_path)).write({"a": 1.5})
    (segment,) = tmp_path.rglob("*.parquet")
    data = bytearray(segment.read_bytes())
    data[10] ^= 255
    segment.write_bytes(data)
    with pytest.raises(StorageError, match=f"evaluate.store: .*{segment.stem}.*delete the file"):
        opened(str(tmp_path)).read(["a"])
