"""Edits on one stored tensor: one more put on top, or one taken off from anywhere in the stack.

A tensor is a stack of *steps*, each the application of an edit. Every step knows the SHA-256 of the
bytes below it, so whatever comes back is compared with what was there, and a result is called exact
only if it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch

from pipeline.edits.arithmetic import Part, minus, put_on, sha256, taken_off, unit_of_largest
from pmet.errors import EditFileError


class How(StrEnum):
    """How far a result can be trusted."""

    EXACT = "exact"
    """Applied to the values that it was made for, or taken off to the byte."""
    STACKED = "stacked"
    """Applied on top of other edits of the same base."""
    ROUNDED = "rounded"
    """Taken off; elements may differ from the former ones by rounding."""
    FORCED = "forced"
    """Applied to or taken off other values than those that it was made for."""


@dataclass(frozen=True)
class Step:
    """An edit in the stack of a tensor.

    Attributes:
        id: identifies the application of the edit.
        digest: the edit's digest.
        source: where the edit was read from.
        before: SHA-256 of the tensor below; None if unknown.
        kept: what subtracting Δ would not restore, or None.
        known: whether the tensor still is what this stack of edits left.
    """

    id: str
    digest: str
    source: str
    before: str | None
    kept: bytes | None
    known: bool = True

    def digested(self) -> Step:
        """The step with the SHA-256 of what it keeps instead of that itself."""
        kept = None if self.kept is None else hashlib.sha256(self.kept).digest()
        return replace(self, kept=kept)


@dataclass(frozen=True)
class Outcome:
    """What becomes of a tensor.

    Attributes:
        value: the tensor; None if only its digest is needed.
        digest: SHA-256 of its bytes.
        steps: the stack of edits that it then is.
        how: what holds for it.
        elements: the number of elements that rounding may have changed.
        by: about how much such an element may differ.
    """

    value: torch.Tensor | None
    digest: str
    steps: tuple[Step, ...]
    how: How
    elements: int = 0
    by: float = 0.0

    def digested(self) -> Outcome:
        """The outcome without its tensor, and with a digest of what each step keeps."""
        return replace(self, value=None, steps=tuple(step.digested() for step in self.steps))


def with_edit(
    name: str,
    value: torch.Tensor,
    part: Part,
    steps: Sequence[Step],
    step: Step,
    *,
    force: bool,
) -> Outcome:
    """Put an edit on top of a tensor.

    Args:
        name: the tensor's name, for messages.
        value: the tensor.
        part: the edit's part in it.
        steps: the edits that it carries.
        step: the new step; what it replaces is filled in.
        force: add Δ whatever the tensor holds.

    Raises:
        EditFileError: the edit was made for other values.
        NotFiniteError: the result exceeds the dtype.
    """
    found, made_for = sha256(value), part.made_for(value.dtype)
    if made_for == found:
        how = How.EXACT
    elif made_for is not None and made_for in {step.before for step in steps}:
        how = How.STACKED
    elif force:
        how = How.FORCED
    else:
        raise EditFileError(_other_base(name, value, part))
    new, kept = put_on(name, value, part)
    new_step = replace(step, before=found, kept=kept)
    return Outcome(new, sha256(new), (*steps, new_step), how)


def without_edit(
    name: str,
    value: torch.Tensor,
    part: Part,
    steps: Sequence[Step],
    step: Step,
    part_of: Callable[[Step], Part | None],
    *,
    force: bool,
) -> Outcome:
    """Take an edit off a tensor, wherever in its stack it is.

    If the edits above can be read again, they are taken off first and put back afterwards: the
    result is what stacking without the edit would have given. Otherwise Δ is subtracted.

    Args:
        name: the tensor's name, for messages.
        value: the tensor.
        part: the edit's part in it.
        steps: the edits that it is known to carry.
        step: the edit; if its application is recorded, with that application's ``id``.
        part_of: reads another edit's part in the tensor again; None if that is not possible.
        force: subtract Δ whatever the tensor holds.

    Raises:
        EditFileError: the tensor does not hold the edit.
        NotFiniteError: putting an edit back exceeded the dtype.
    """
    found = _located(name, value, part, steps, step)
    if found is None:
        if not force:
            raise EditFileError(_not_held(name, value, part, steps, step))
        back = minus(value, part.delta())
        rest = [s for s in steps if s.id != step.id]
        return _outcome(back, [_unknown(s) for s in rest], How.FORCED, value, part, 1)
    below, own, above = found
    if (exact := _replayed(name, value, part, own, above, part_of)) is not None:
        return Outcome(exact[0], sha256(exact[0]), (*below, *exact[1]), How.EXACT)
    back = minus(value, part.delta())
    rest = [_unknown(s) for s in above]
    if rest:
        rest[0] = replace(rest[0], before=own.before)
    return _outcome(back, [*below, *rest], How.ROUNDED, value, part, len(above) + 1)


def _located(
    name: str, value: torch.Tensor, part: Part, steps: Sequence[Step], step: Step
) -> tuple[list[Step], Step, list[Step]] | None:
    """The steps below an edit, its own, and those above it; None if the tensor does not hold it."""
    for index, recorded in enumerate(steps):
        if recorded.id == step.id and recorded.known:
            return [*steps[:index]], recorded, [*steps[index + 1 :]]
    # A model that a run published has no record of that run's edit.
    states = [*(recorded.before for recorded in steps), sha256(value)]
    leaves = part.leaves(name, value.dtype)
    if leaves is None or leaves not in states:
        return None
    index = states.index(leaves)
    own = replace(step, before=part.made_for(value.dtype))
    rest = [other for other in steps[index:] if other.id != step.id]
    return [other for other in steps[:index] if other.id != step.id], own, rest


def _replayed(
    name: str,
    value: torch.Tensor,
    part: Part,
    own: Step,
    above: Sequence[Step],
    part_of: Callable[[Step], Part | None],
) -> tuple[torch.Tensor, list[Step]] | None:
    """The tensor without an edit, to the byte, and the steps above; None if that is impossible."""
    again = [(step, part_of(step)) for step in above]
    parts = [(step, other) for step, other in again if other is not None]
    if len(parts) < len(again):
        return None
    base = _below(value, part, own, parts)
    if base is None:
        return None
    steps = []
    for step, other in parts:
        new, kept = put_on(name, base, other)
        steps.append(replace(step, before=sha256(base), kept=kept))
        base = new
    return base, steps


def _below(
    value: torch.Tensor, part: Part, own: Step, above: Sequence[tuple[Step, Part]]
) -> torch.Tensor | None:
    """The tensor as it was before an edit, to the byte; None if it cannot be restored."""
    made_for = part.original(value.dtype)
    if made_for is not None and own.before == sha256(made_for):
        return made_for
    for step, other in (*reversed(above), (own, part)):
        value, exact = taken_off(value, other, step.before, step.kept)
        if not exact:
            return None
    return value


def _unknown(step: Step) -> Step:
    """A step of which is no longer known what was below it."""
    return replace(step, before=None, kept=None)


def _outcome(
    value: torch.Tensor,
    steps: Sequence[Step],
    how: How,
    held: torch.Tensor,
    part: Part,
    roundings: int,
) -> Outcome:
    delta = part.delta()
    elements = int(delta.count_nonzero())
    by = roundings * unit_of_largest(value, (held.double().abs() + delta.abs()).to(held.dtype))
    return Outcome(value, sha256(value), tuple(steps), how, elements, by)


def _other_base(name: str, value: torch.Tensor, part: Part) -> str:
    dtype = str(value.dtype).removeprefix("torch.")
    made_for = part.original(value.dtype)
    if made_for is None:
        what = f"stores {name} as {dtype}, which cannot hold the values that the edit was made for"
    elif part.leaves(name, value.dtype) == sha256(value):
        return (
            f"holds W + Δ in {name}: the edit has been applied to it already; take it off with "
            "pmet revert, or give --force to add Δ once more"
        )
    else:
        differing = int((made_for != value).sum())
        what = (
            f"is not the edit's base: {differing:,} of {value.numel():,} elements of {name} are "
            "not those that the edit was made for"
        )
    return (
        f"{what}; apply the edit to its own base, or give --force to add Δ to what is there, in "
        "float64 and rounded once, which nothing has measured"
    )


def _not_held(name: str, value: torch.Tensor, part: Part, steps: Sequence[Step], step: Step) -> str:
    if any(recorded.id == step.id for recorded in steps):
        what = f"has changed {name} since the edit was applied: its bytes are not those recorded"
    elif part.made_for(value.dtype) == sha256(value):
        return (
            f"does not carry the edit: {name} holds the values that the edit was made for, before "
            "any change; there is nothing to take off"
        )
    else:
        what = f"does not carry the edit: {name} is not W + Δ, and no record says that it was added"
    return (
        f"{what}; give the model that it was applied to, or --force to subtract Δ from what is "
        "there, in float64 and rounded once"
    )
