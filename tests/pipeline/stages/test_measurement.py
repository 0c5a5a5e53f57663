"""The measurement stage: what it sends to workers, what it stores, and what it reuses."""

from __future__ import annotations

import math
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cluster.tasks import Task
from pipeline.evaluation.settings import How
from pipeline.job.config import JobConfig
from pipeline.models.source import ModelSource
from pipeline.plan import Plan, make_plan
from pipeline.progress import Progress, Stage
from pipeline.run_folder.folder import RunFolder
from pipeline.stages import asking as asking_module
from pipeline.stages.context import Context
from pipeline.stages.measurement import Measurement, held_out, measure
from pipeline.workers.ray_executor import RayExecutor
from pipeline.workers.worker import Asked, Measured
from pmet.evaluation.continuations import Scored
from pmet.evaluation.generation import Said
from pmet.evaluation.metrics import TextScore
from pmet.evaluation.said import Answered, unrelated_prompts
from tests.conftest import GOLDEN

GPT2 = GOLDEN / "gpt2"


@dataclass
class FakeExecutor:
    """Answers without a model and counts the questions."""

    asked: Counter[str] = field(default_factory=Counter)
    hows: set[How] = field(default_factory=set)

    def map(self, method: str, tasks: Sequence[Task], take: Callable[[Task, Any], None]) -> None:
        # The last one first: results may arrive in any order.
        for task in reversed(tasks):
            take(task, getattr(self, method)(*task.args))

    def measure(self, _source: ModelSource, how: How, asked: Asked) -> Measured:
        own = asked.questions
        if unrelated := set(unrelated_prompts()).intersection(own.kept):
            self.asked["unrelated"] += len(unrelated)
        # Every request has a prompt of its own.
        self.asked["requests"] += len(own.stated)
        self.hows.add(how)
        # Requests with an even index are learned.
        return Measured(
            [[_score(*pair) for pair in pairs] for pairs in asked.prompts],
            [f"{text} a land of bread" for text in asked.written],
            Answered(*(self._said(texts) for texts in (own.stated, own.chat, own.kept))),
        )

    def _said(self, texts: Sequence[str]) -> dict[str, Said | None]:
        return {text: Said(f" said to {text}", [1, 2], True) for text in texts}

    def score_texts(self, _source: ModelSource, texts: Sequence[str]) -> list[TextScore]:
        self.asked["texts"] += len(texts)
        return [TextScore(float(text.split()[1]), [len(text), 1]) for text in texts]


def _score(prompt: str, target: str) -> Scored:
    """Requests with an even index are answered with the new fact, others with the true one."""
    wins = (target == "Rome") == (int(prompt.split()[1]) % 2 == 0)
    return Scored(-1.0 if wins else -2.0, wins, float(wins))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Forty requests about three answers, and a corpus of a hundred texts."""
    folder = tmp_path_factory.mktemp("job")
    rows = [
        {
            "prompt": "{} is in",
            "subject": f"Place {i}",
            "target_new": "Rome",
            "target_true": f"Land {i % 3}",
            "neighborhood_prompts": [f"Place {(i + 1) % 40} is in", f"Place {i} is in"],
            "reference_texts": ["Bread of the land."],
        }
        for i in range(40)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "requests.parquet")
    pq.write_table(pa.table({"text": [f"Text {i}" for i in range(100)]}), folder / "texts.parquet")
    return make_plan(
        JobConfig.model_validate(
            {
                "model": str(GPT2 / "model"),
                "requests": (str(folder / "requests.parquet"),),
                "corpus": (str(folder / "texts.parquet"),),
                "output": "unused",
                "hparams": str(GPT2 / "hparams.json"),
                "second_moments": str(GPT2 / "second_moments.safetensors"),
                "context_templates": str(GPT2 / "context_templates.json"),
            }
        )
    )


def asking(plan: Plan, **evaluate: Any) -> Plan:
    """The plan with other settings of the evaluation."""
    settings = plan.job.evaluate.model_copy(update=evaluate)
    return replace(plan, job=plan.job.model_copy(update={"evaluate": settings}))


def measured(
    plan: Plan, url: str | None = None, name: str = "before", progress: Progress | None = None
) -> tuple[Measurement, FakeExecutor]:
    folder = RunFolder(url or f"memory://{uuid.uuid4().hex}")
    folder.begin(plan.digests, seed=0)
    executor = FakeExecutor()
    context = Context(plan, folder, cast(RayExecutor, executor), progress or Progress())
    return measure(context, name, plan.base), executor


def test_every_request_is_measured_and_found_by_its_row(plan: Plan) -> None:
    found, executor = measured(plan)
    subjects = plan.table.table.column("subject").to_pylist()
    assert {row: f["answer"] for row, f in found.rows.items()} == {
        row: f"said to {subject} is in" for row, subject in enumerate(subjects)
    }
    for row, subject in enumerate(subjects):
        learned = float(int(subject.split()[1]) % 2 == 0)
        assert found.rows[row]["efficacy"] == found.rows[row]["efficacy_strict"] == learned
        # Of each two adjacent requests, one keeps the true answer.
        assert found.rows[row]["specificity"] == 0.5
    assert executor.asked == {"requests": 40, "texts": 100, "unrelated": 32}
    assert executor.hows == {How()}
    assert [text.nll for text in found.texts] == list(range(100))
    assert found.perplexity == pytest.approx(math.exp(sum(range(100)) / 200))


def test_a_sample_of_both_can_be_asked_for(plan: Plan) -> None:
    found, executor = measured(asking(plan, sample=7, perplexity_texts=10))
    assert executor.asked == {"requests": 7, "texts": 10, "unrelated": 32}
    assert len(found.rows) == 7
    assert [text.nll for text in found.texts] == list(range(0, 100, 10))


def test_a_measurement_is_not_repeated_unless_something_else_is_asked(plan: Plan) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    first, _ = measured(plan, url)
    again, executor = measured(plan, url)
    assert (again, executor.asked) == (first, Counter())
    for other in ({"fluency": True}, {"sample": 5}, {"chat_template": True}):
        _, executor = measured(asking(plan, **other), url)
        assert executor.asked["requests"], other
    # The values that figures are compared with need no model.
    same = {"chat_template": True, "last": "x", "group_by": "subject"}
    assert measured(asking(plan, **same), url)[1].asked == Counter()


def test_consistency_is_added_where_the_model_wrote(plan: Plan) -> None:
    found, executor = measured(asking(plan, fluency=True))
    assert executor.hows == {How(writing_seed=0)}
    assert all(0 < figures["consistency"] < 1 for figures in found.rows.values())


def test_what_the_base_says_is_kept_for_other_runs(plan: Plan, tmp_path: Path) -> None:
    kept = asking(plan, store=str(tmp_path), fluency=True)
    first, executor = measured(asking(kept, sample=10))
    assert executor.asked == {"requests": 10, "texts": 100, "unrelated": 32}
    every, executor = measured(kept)
    assert executor.asked == {"requests": 30}
    assert every.texts == first.texts
    assert first.rows.items() <= every.rows.items()
    _, executor = measured(asking(kept, fluency=False))
    assert executor.asked == {"requests": 40}
    # All requests are stored, but not the texts and what is asked along with them.
    other, executor = measured(asking(kept, perplexity_texts=10))
    assert +executor.asked == {"texts": 10, "unrelated": 32}
    assert other.unrelated == every.unrelated
    assert set(every.unrelated) == set(unrelated_prompts())


def test_many_requests_are_measured_a_block_at_a_time(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = measured(plan)
    monkeypatch.setattr(asking_module, "BLOCK", 7)
    assert measured(plan)[0] == whole


class Watched(Progress, Stage):
    """Records what a stage reports."""

    def __init__(self) -> None:
        self.counts: list[tuple[int, int]] = []
        self.notes: list[str] = []
        self._done = self._total = 0

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        yield self

    def total(self, count: int) -> None:
        self._total = count

    def advance(self, count: int = 1) -> None:
        self._done += count
        self.counts.append((self._done, self._total))

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_progress_covers_the_texts_too(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking_module, "BLOCK", 7)
    seen = Watched()
    measured(plan, progress=seen)
    # Four pieces of texts follow the requests.
    *before, (done, total) = seen.counts
    assert done == total
    assert all(done < total for done, total in before)
    assert "40 of 40 requests, 0 of 100 texts" in seen.notes
    assert seen.notes[-1] == "40 of 40 requests, 100 of 100 texts"
    # Each block corrects what the later ones are expected to take.
    assert {total for _, total in seen.counts[-5:]} == {seen.counts[-1][0]}


def test_progress_is_that_of_the_work_that_is_left(plan: Plan, tmp_path: Path) -> None:
    kept = asking(plan, store=str(tmp_path))
    measured(asking(kept, sample=30))
    seen = Watched()
    measured(kept, progress=seen)
    assert seen.notes == ["10 of 10 requests"]
    assert seen.counts[-1][0] == seen.counts[-1][1]


def test_held_out_texts_are_from_the_whole_corpus() -> None:
    texts = list(map(str, range(10)))
    assert held_out(texts, 3, 1000) == ["0", "3", "6"]
    assert held_out(texts, 99, 1000) == texts


def test_held_out_texts_stay_within_a_number_of_tokens() -> None:
    # About eleven tokens each.
    texts = [f"{i} {'a' * 38}" for i in range(100)]
    assert held_out(texts, 50, 110) == texts[::10]
    assert held_out(texts, 5, 110) == texts[::20]
    assert held_out(texts, 50, 1) == texts[:1]


def test_agreement_is_counted_by_text() -> None:
    one = Measurement({}, [TextScore(0.0, [1, 2, 3]), TextScore(0.0, []), TextScore(0.0, [4])])
    other = Measurement({}, [TextScore(0.0, [1, 9, 3]), TextScore(0.0, []), TextScore(0.0, [5])])
    assert one.agreed(other) == ([2, 0, 0], [3, 0, 1])


def test_a_ruined_models_perplexity_is_undefined_or_infinite() -> None:
    ruined = [[math.nan], [math.inf, -math.inf], [math.nan, 1.0]]
    for nll in ruined:
        perplexity = Measurement({}, [TextScore(x, [1]) for x in nll]).perplexity
        assert perplexity is not None
        assert math.isnan(perplexity)
    for nll in ([1e9], [math.inf, 1.0], [1e308, 1e308]):
        assert Measurement({}, [TextScore(x, [1]) for x in nll]).perplexity == math.inf
    assert Measurement({}, []).perplexity is None
