"""What a job measures on a model, checked before any worker starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import JobError, StorageError
from pipeline.evaluation.by_column import group_column
from pipeline.evaluation.chat_questions import ChatQuestions
from pipeline.job import GATES, OF_HARNESS, EvaluateConfig, JobConfig
from pipeline.storage import Store
from pmet.errors import InputError
from pmet.evaluation import ANSWERED, OF_CORPUS, OF_TEXT, Prompts

_COLUMNS = {"consistency": "reference_texts", "portability": "portability_prompts"}


@dataclass(frozen=True)
class How:
    """How requests are measured.

    Attributes:
        chat_template: whether each prompt is a user turn of the tokenizer's chat template.
        writing_seed: seed for generating text; None: no text is generated.
    """

    chat_template: bool = False
    writing_seed: int | None = None

    @classmethod
    def of(cls, evaluate: EvaluateConfig, seed: int) -> How:
        """The measurement settings of a job."""
        return cls(evaluate.chat_template, seed if evaluate.fluency else None)


@dataclass(frozen=True)
class Last:
    """An earlier run to compare with.

    Attributes:
        run: its folder.
        after: the figures of its edited model.
    """

    run: str
    after: dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation needs besides the job.

    Attributes:
        group_by: the column to group figures by, if any.
        last: the run to compare with, if any.
        questions: the questions to put to a chat model.
    """

    group_by: str | None
    last: Last | None
    questions: ChatQuestions


def check_evaluation(
    job: JobConfig, tokenizer: Any, columns: Sequence[str], *, corpus: bool
) -> Evaluation:
    """Refuse settings that would otherwise fail only after all the work is done.

    Args:
        job: the job.
        tokenizer: the model's.
        columns: the columns of the requests.
        corpus: whether there is one.

    Raises:
        JobError: naming the key and what is missing.
    """
    for name in job.gates.thresholds():
        figure = GATES[name].figure
        if figure in OF_HARNESS and not job.evaluate.harness.tasks:
            raise JobError(
                f"gates.{name} needs tasks of lm-evaluation-harness; name some in evaluate.harness"
            )
        if figure in OF_CORPUS and not corpus:
            raise JobError(f"gates.{name} needs a corpus to measure {figure} on; give one")
        if figure in OF_TEXT and not job.evaluate.fluency:
            raise JobError(
                f"gates.{name} needs text that the model writes; set evaluate.fluency to true"
            )
        if figure in ANSWERED and job.evaluate.answers == 0:
            raise JobError(
                f"gates.{name} needs answers in the model's own words; set evaluate.answers to a "
                "number above 0, or to auto"
            )
        if figure == "chat_said" and not Prompts(tokenizer).has_chat:
            raise JobError(
                f"gates.{name} needs a chat template, which the model's tokenizer does not have"
            )
        column = _COLUMNS.get(figure.partition("_")[0])
        if column and column not in columns:
            raise JobError(f"gates.{name} needs a column {column}, which the requests do not have")
    try:
        Prompts(tokenizer, job.evaluate.chat_template)
    except InputError as error:
        raise JobError(f"evaluate.chat_template: {error}") from None
    return Evaluation(
        group_column(job.evaluate.group_by, columns),
        read_last(job.evaluate.last),
        ChatQuestions.read(job.evaluate.questions),
    )


def read_last(url: str | None) -> Last | None:
    """The run that a job compares with; None if it names none.

    Raises:
        JobError: there is no finished run.
    """
    if url is None:
        return None
    try:
        metrics = Store(url).read_json("metrics.json")
        after = metrics["after"]
        return Last(url, {name: _number(after[name]) for name in after})
    except StorageError as error:
        reason = str(error)
    except (AttributeError, KeyError, TypeError, ValueError):
        reason = "its metrics.json was not written by a run"
    raise JobError(
        f"evaluate.last: {url} has no figures to compare with ({reason}); name the output of a "
        "finished run, or remove the key"
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
