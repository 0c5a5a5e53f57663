"""Questions for facts, to put to a chat model: a template for each relation.

A request may bring its own ``question_prompts``. Otherwise its relation, in the column that figures
are grouped by unless the job names one, selects a template; the bundled ones are for Wikidata's
properties in CounterFact. Without either, `pmet.evaluation.chat_questions` has a plain default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import pyarrow as pa

from pipeline.data import Row
from pipeline.errors import JobError
from pipeline.evaluation.by_column import group_column
from pipeline.job import parse_yaml, read_yaml
from pmet.request import EditRequest

SIZE_LIMIT = 2**20
_KEY = "evaluate.questions"


@dataclass(frozen=True)
class ChatQuestions:
    """Question templates by relation.

    Attributes:
        templates: texts with one ``{}`` for the subject.
    """

    templates: Mapping[str, str]

    @classmethod
    def read(cls, source: str | None) -> ChatQuestions:
        """The bundled templates, and those of a YAML file, which take precedence.

        Raises:
            JobError: the file cannot be read, or holds anything but templates by relation.
        """
        bundled = resources.files("pipeline.evaluation").joinpath("questions.yaml")
        known = parse_yaml(bundled.read_text("utf-8"))
        return cls(known if source is None else known | _templates(source))

    def to_ask(self, request: EditRequest, row: Row, table: pa.Table) -> EditRequest:
        """A request with the question of its relation, unless it brings its own.

        Args:
            request: a request.
            row: its row in the input.
            table: the input.
        """
        column = group_column(None, table.column_names)
        if request.question_prompts or column is None:
            return request
        template = self.templates.get(str(table.column(column)[row].as_py()))
        if template is None:
            return request
        return replace(request, question_prompts=(template.replace("{}", request.subject),))


def _templates(source: str) -> dict[str, str]:
    values: Any = read_yaml(
        source,
        "file of question templates",
        limit=SIZE_LIMIT,
        too_large="a file of question templates has at most 1 MiB",
        refusal=JobError,
    )
    if not isinstance(values, dict):
        raise JobError(f"{_KEY}: {source} is not a mapping; give a question for each relation")
    for relation, template in values.items():
        if not isinstance(template, str) or template.count("{}") != 1:
            raise JobError(
                f"{_KEY}: {source}: the question of {relation} is {template!r}; give text with one "
                "{} where the subject goes"
            )
    return {str(relation): template for relation, template in values.items()}
