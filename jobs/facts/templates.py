"""Templates: the prompts and targets of each relation.

A templates file is YAML with one key per relation::

    capital:
      prompt: The capital of {} is
      paraphrases:
        - "{}'s capital city is"
      neighborhood:
        - The capital of {} is
      target: "{}"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

from pipeline.errors import FactDumpError
from pipeline.job import read_yaml
from pmet.request import trimmed_prompt

SIZE_LIMIT = 4 * 2**20
PLACE = "{}"


def _with_one_place(text: str) -> str:
    if text.count(PLACE) != 1:
        raise ValueError(f"holds {text.count(PLACE)} places; write exactly one {PLACE}")
    return text


def _trimmed(text: str) -> str:
    """Strip a one-line template; keep the line breaks around a multi-line one, such as a chat.

    A one-line template loses them because YAML ends a one-line block with a line break.
    """
    stripped = text.strip()
    return trimmed_prompt(text) if "\n" in stripped else stripped


_Template = Annotated[str, AfterValidator(_with_one_place), AfterValidator(_trimmed)]
_Several = Annotated[
    tuple[_Template, ...],
    Field(strict=False),
    BeforeValidator(lambda given: (given,) if isinstance(given, str) else given),
]
_Target = Annotated[str, AfterValidator(_with_one_place), AfterValidator(str.strip)]


class RelationTemplates(BaseModel):
    """The templates of one relation; each has exactly one ``{}``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: _Template = Field(description="Text that precedes the object; {} is the subject.")
    paraphrases: Annotated[tuple[_Template, ...], Field(strict=False)] = Field(
        default=(), description="Other phrasings of the fact; {} is the subject."
    )
    question: _Several = Field(
        default=(), description="A question for the fact, or several; {} is the subject."
    )
    neighborhood: Annotated[tuple[_Template, ...], Field(strict=False)] | None = Field(
        default=None,
        description="Phrasings of facts that must not change; {} is another subject with the "
        "fact's old object. Default: the prompt; an empty list: no neighborhood prompts.",
    )
    target: _Target = Field(default=PLACE, description="The answer; {} is the object.")
    separator: str | None = Field(
        default=None,
        description="Text between a prompt and its answer; null: a space, or nothing, as the "
        "script is written.",
    )

    @property
    def neighbors(self) -> tuple[str, ...]:
        """The templates for neighborhood prompts."""
        return (self.prompt,) if self.neighborhood is None else self.neighborhood


Templates = Mapping[str, RelationTemplates]

_Relations = TypeAdapter(dict[str, RelationTemplates])


def load_templates(source: str) -> Templates:
    """Read a templates file, a path or a URL.

    Raises:
        FactDumpError: one line for each problem, naming the file, the relation and the key.
    """
    values = read_yaml(
        source,
        "templates",
        limit=SIZE_LIMIT,
        too_large=f"a templates file has at most {SIZE_LIMIT >> 20} MiB",
        refusal=FactDumpError,
    )
    return parse_templates(values, source)


def parse_templates(values: Any, source: str) -> Templates:
    """Validate the parsed content of a templates file.

    Raises:
        FactDumpError: as ``load_templates``.
    """
    if not isinstance(values, dict) or not values:
        raise FactDumpError(
            f"{source}: there are no relations; write each as a key, with its prompt"
        )
    try:
        found = _Relations.validate_python(values)
    except ValidationError as error:
        lines = (_problem(item["loc"], item["type"], item["msg"]) for item in error.errors())
        raise FactDumpError("\n".join(f"{source}: {line}" for line in lines)) from None
    stripped = {name.strip(): templates for name, templates in found.items()}
    if "" in stripped or len(stripped) < len(found):
        raise FactDumpError(f"{source}: a relation is empty, or two differ only in white space")
    return stripped


def _problem(place: Sequence[int | str], kind: str, message: str) -> str:
    where = ".".join(map(str, place))
    known = ", ".join(RelationTemplates.model_fields)
    match kind:
        case "extra_forbidden":
            return f"unknown key {where}; a relation has {known}"
        case "missing":
            return f"{where} is missing; write the prompt with {PLACE} for the subject"
        case "value_error":
            return f"{where} {message.removeprefix('Value error, ')}"
        case "string_type":
            return f"{where} is not text; write it in quotes"
        case "tuple_type":
            return f"{where} is not a list; write each template on a line of its own, after -"
        case _:
            return f"{where} is not a mapping; a relation has {known}"
