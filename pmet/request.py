"""An edit request: a fact that the model shall hold from now on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pmet.errors import RequestError
from pmet.separator import separator

SharedKeys = Literal["joint", "mean"]
"""How to treat requests with the same subject and the same text before it, which share one key:
one joint target, or, as published, a target each, of which least squares writes the mean.
"""

TEXT_LISTS = (
    "paraphrase_prompts",
    "neighborhood_prompts",
    "portability_prompts",
    "portability_targets",
    "portability_targets_true",
    "generation_prompts",
    "reference_texts",
    "question_prompts",
)
"""Optional fields that are lists of texts."""
_CONTINUED = (
    "prompt",
    "paraphrase_prompts",
    "neighborhood_prompts",
    "portability_prompts",
    "generation_prompts",
    "question_prompts",
)
"""Fields whose texts a model continues, so that a line break at their end matters."""


@dataclass(frozen=True)
class EditRequest:
    """A prompt about a subject, and the continuation that the model shall give.

    White space around the prompt, the subject and the targets is not part of a fact and is
    stripped, except that a prompt which begins or ends in line breaks, such as a written-out chat
    template, is kept byte for byte.

    Attributes:
        prompt: text with exactly one ``{}``, the place of the subject.
        subject: what the fact is about.
        target_new: the continuation wanted.
        case_id: any identifier; passed through, never interpreted.
        target_true: the answer expected from the unedited model; only measured.
        paraphrase_prompts: other complete prompts that ask for the same fact; only measured.
        neighborhood_prompts: complete prompts whose answer stays ``target_true``; only measured.
        portability_prompts: complete prompts about what follows from the new fact; only measured.
        portability_targets: the answer to each of them, in the same number.
        portability_targets_true: the answer to each of them expected from the unedited model, in
            the same number; empty if unknown.
        generation_prompts: beginnings of text about the subject, for the model to continue; only
            measured.
        reference_texts: texts about subjects for which the new fact is true, which the model's own
            texts should resemble; only measured.
        question_prompts: questions for the fact, to put to a chat model; only measured.
        separator: what stands between each of these prompts and its target, kept as given; None: a
            space, or nothing, as the script is written (`pmet.separator`).

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
    question_prompts: Sequence[str] = field(default=(), kw_only=True)
    separator: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target_new"):
            object.__setattr__(self, name, _stripped(name, getattr(self, name)))
        if self.target_true is not None:
            object.__setattr__(self, "target_true", _stripped("target_true", self.target_true))
        for name in TEXT_LISTS:
            object.__setattr__(self, name, _prompts(name, getattr(self, name)))
        _check_paired(self)
        _check_separator(self.separator)
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
        """Index of the subject's first character in ``text``, and of the one after its last."""
        start = self.prompt.index("{}")
        return start, start + len(self.subject)

    def between(self, prompt: str, target: str) -> str:
        """What stands between one of the request's prompts and a target."""
        return separator(prompt, target) if self.separator is None else self.separator


def _stripped(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name} is {type(value).__name__}, not a string; give text")
    stripped = value.strip()
    if not stripped:
        raise RequestError(f"{name} is empty; give text that is more than white space")
    if stripped != value and name.partition("[")[0] in _CONTINUED:
        stripped = trimmed_prompt(value)
    _check_unicode(name, stripped)
    return stripped


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} holds a lone surrogate at character {error.start}; write valid Unicode"
        ) from None


def trimmed_prompt(value: str) -> str:
    """A prompt stripped of white space on either side, unless that contains a line break."""
    stripped = value.strip()
    before, _, after = value.partition(stripped) if stripped else ("", "", "")
    return "".join((_if_breaking(before), stripped, _if_breaking(after)))


def _if_breaking(space: str) -> str:
    return space if "\n" in space or "\r" in space else ""


def _check_paired(request: EditRequest) -> None:
    """Refuse answers that do not match their prompts in number."""
    count = len(request.portability_prompts)
    for name, may_be_none in (("portability_targets", False), ("portability_targets_true", True)):
        given = len(getattr(request, name))
        if given != count and not (may_be_none and not given):
            raise RequestError(
                f"{name} has {given} texts for {count} portability_prompts; give one for each"
            )


def _check_separator(given: object) -> None:
    if given is None:
        return
    if not isinstance(given, str):
        raise RequestError(
            f"separator is {type(given).__name__}, not a string; give text, which may be empty"
        )
    _check_unicode("separator", given)


def _prompts(name: str, values: object) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise RequestError(f"{name} is {type(values).__name__}; give a list of strings")
    return tuple(_stripped(f"{name}[{i}]", value) for i, value in enumerate(values))


def _shown(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")
