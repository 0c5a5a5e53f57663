"""What the base says is kept, found again, and never given for another question."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.errors import StorageError
from pipeline.measurement_store import MeasurementStore, request_key
from pipeline.segments import Segments
from pipeline.store import Store
from pmet import EditRequest

REQUEST = EditRequest("{} lies in", "Nice", "Italy", case_id=1, target_true="France")
FIGURES = {"efficacy": 0.1 + 0.2, "generalization": None, "answer": "é\n"}


def opened(url: str, model: str = "1") -> MeasurementStore:
    store = Store(url)
    return MeasurementStore(store, Segments(store, "evaluate.store", {"model": model}))


def test_what_is_kept_is_found_by_whoever_asks_the_same(any_url: str) -> None:
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
    ],
)
def test_the_key_covers_all_that_is_measured(change) -> None:
    assert request_key(replace(REQUEST, **change)) != request_key(REQUEST)


def test_the_key_covers_nothing_else() -> None:
    assert request_key(replace(REQUEST, case_id=2)) == request_key(REQUEST)


def test_a_damaged_segment_is_named(tmp_path) -> None:
    opened(str(tmp_path)).write({"a": 1.5})
    (segment,) = tmp_path.rglob("*.parquet")
    data = bytearray(segment.read_bytes())
    data[10] ^= 255
    segment.write_bytes(data)
    with pytest.raises(StorageError, match=f"evaluate.store: .*{segment.stem}.*delete the file"):
        opened(str(tmp_path)).read(["a"])
