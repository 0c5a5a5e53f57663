"""One edit request: the fact that a model shall hold from now on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pmet.errors import RequestError

SharedKeys = Literal["joint", "mean"]
"""What becomes of requests with one subject and the same text in front of it, which have one key:
one target for all of them, or, as published, a target each, of which least squares writes the mean.
"""

TEXT_LISTS = (
    "paraphrase_prompts",
    "neighborhood_prompts",
    "portability_prompts",
    "portability_targets",
    "portability_targets_true",
    "generation_prompts",
    "reference_texts",
)
"""Optional fields that are lists of texts."""
_CONTINUED = (
    "prompt",
    "paraphrase_prompts",
    "neighborhood_prompts",
    "portability_prompts",
    "generation_prompts",
)
"""Fields whose texts a model goes on from, so that a line break at their end counts."""


@dataclass(frozen=True)
class EditRequest:
    """A prompt about a subject and the continuation that the model shall give.

    White space around the prompt, the subject and the targets is not part of a fact and is
    stripped, except where a prompt begins or ends in line breaks, as a written-out chat template
    does: it is kept byte for byte. ``separator`` is what stands between a prompt and its target.

    Attributes:
        prompt: text with exactly one ``{}``, the place of the subject.
        subject: what the fact is about.
        target_new: the continuation wanted.
        case_id: any identifier; carried along, never interpreted.
        target_true: what the unedited model is expected to say; only measured.
        paraphrase_prompts: other complete prompts that ask for the same fact; only measured.
        neighborhood_prompts: complete prompts whose answer stays ``target_true``; only measured.
        portability_prompts: complete prompts about what follows from the new fact; only measured.
        portability_targets: the answer to each of them, as many.
        portability_targets_true: what the unedited model is expected to say to each of them, as
            many; none where that is not known.
        generation_prompts: beginnings of text about the subject, for the model to go on from; only
            measured.
        reference_texts: texts about subjects of which the new fact is true, which the model's own
            shall be like; only measured.

    Raises:
        RequestError: naming the field that is wrong.
    """

    prompt: str
    subject: str
    target_new: str
    case_id: int | str | None = field(default=None, kw_only=True)
    target_true: str | None = field(default=None, kw_only=True)
    paraphrase_prompts: Sequence[str] = field(default=(), kw_only=True)
    neighborhood_prompts: Sequence[str] = field(default=(), kw_only=True)
    portability_prompts: Sequence[str] = field(default=(), kw_only=True)
    portability_targets: Sequence[str] = field(default=(), kw_only=True)
    portability_targets_true: Sequence[str] = field(default=(), kw_only=True)
    generation_prompts: Sequence[str] = field(default=(), kw_only=True)
    reference_texts: Sequence[str] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target_new"):
            object.__setattr__(self, name, _stripped(name, getattr(self, name)))
        if self.target_true is not None:
            object.__setattr__(self, "target_true", _stripped("target_true", self.target_true))
        for name in TEXT_LISTS:
            object.__setattr__(self, name, _prompts(name, getattr(self, name)))
        _check_paired(self)
        if self.prompt.count("{}") != 1:
            raise RequestError(
                f"prompt {_shown(self.prompt)} holds {self.prompt.count('{}')} places for the "
                "subject; write exactly one {} where the subject goes"
            )

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    @property
    def subject_span(self) -> tuple[int, int]:
        """First character of the subject in ``text``, and the one after its last."""
        start = self.prompt.index("{}")
        return start, start + len(self.subject)


def separator(text: str) -> str:
    """What stands between a prompt and what follows it: one space, unless white space ends it."""
    return "" if text[-1:].isspace() else " "


def _stripped(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name} is {type(value).__name__}, not a string; give text")
    stripped = value.strip()
    if not stripped:
        raise RequestError(f"{name} is empty; give text that is more than white space")
    if stripped != value and name.partition("[")[0] in _CONTINUED:
        stripped = trimmed_prompt(value)
    try:
        stripped.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} holds a lone surrogate at character {error.start}; write valid Unicode"
        ) from None
    return stripped


def trimmed_prompt(value: str) -> str:
    """A prompt without the white space on either side of it, unless that holds a line break."""
    stripped = value.strip()
    before, _, after = value.partition(stripped) if stripped else ("", "", "")
    return "".join((_if_breaking(before), stripped, _if_breaking(after)))


def _if_breaking(space: str) -> str:
    return space if "\n" in space or "\r" in space else ""


def _check_paired(request: EditRequest) -> None:
    """Refuse answers that do not go with their prompts."""
    count = len(request.portability_prompts)
    for name, may_be_none in (("portability_targets", False), ("portability_targets_true", True)):
        given = len(getattr(request, name))
        if given != count and not (may_be_none and not given):
            raise RequestError(
                f"{name} has {given} texts for {count} portability_prompts; give one for each"
            )


def _prompts(name: str, values: object) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise RequestError(f"{name} is {type(values).__name__}; give a list of strings")
    return tuple(_stripped(f"{name}[{i}]", value) for i, value in enumerate(values))


def _shown(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")
