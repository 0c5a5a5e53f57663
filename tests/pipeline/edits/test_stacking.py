"""Edits on one tensor: whatever dtype and whatever values, the last one comes off to the byte."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.edits.arithmetic import Part, sha256
from pipeline.edits.stacking import How, Outcome, Step, with_edit, without_edit
from pmet import EditFileError, NotFiniteError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPE = (4, 6)


def part(original: torch.Tensor, delta: torch.Tensor) -> Part:
    def cast(dtype: torch.dtype) -> torch.Tensor | None:
        found = original.to(dtype)
        return found if torch.equal(found.to(original.dtype), original) else None

    return Part(lambda: delta, cast)


def step(number: int) -> Step:
    return Step(f"id{number}", f"digest{number}", f"edit{number}", None, None)


def put(outcome: Outcome, number: int, own: Part, *, force: bool = False) -> Outcome:
    assert outcome.value is not None
    return with_edit("w", outcome.value, own, outcome.steps, step(number), force=force)


def take(
    outcome: Outcome, number: int, parts: Sequence[Part | None], *, force: bool = False
) -> Outcome:
    """Take an edit off; ``None`` among the parts is an edit that cannot be read again."""
    own = parts[number]
    assert outcome.value is not None
    assert own is not None

    def again(other: Step) -> Part | None:
        return parts[int(other.id.removeprefix("id"))]

    return without_edit("w", outcome.value, own, outcome.steps, step(number), again, force=force)


def start(value: torch.Tensor) -> Outcome:
    return Outcome(value, sha256(value), (), How.EXACT)


numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1e-40, -3e-5, 1.0, 65504.0 / 4]),
    st.floats(-100, 100, allow_nan=False, width=32),
)
tensors = st.lists(numbers, min_size=24, max_size=24).map(lambda v: torch.tensor(v).view(SHAPE))
# Changes both far smaller and far larger than the weights.
changes = st.lists(
    st.one_of(st.just(0.0), st.floats(-1e-6, 1e-6), st.floats(-50, 50)), min_size=24, max_size=24
).map(lambda v: torch.tensor(v, dtype=torch.float64).view(SHAPE))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(values=tensors, others=tensors, deltas=st.lists(changes, min_size=3, max_size=3))
def test_the_last_edit_comes_off_to_the_byte(
    dtype: torch.dtype, values: torch.Tensor, others: torch.Tensor, deltas: list[torch.Tensor]
) -> None:
    """Also if it is put on others, or was made for other values and is forced."""
    base = values.to(dtype)
    parts = [part(base, deltas[0]), part(base, deltas[1]), part(others.to(dtype), deltas[2])]
    states = [start(base)]
    for number, own in enumerate(parts):
        states.append(put(states[-1], number, own, force=number == 2))
    for number in reversed(range(3)):
        below = take(states[number + 1], number, [None] * number + parts[number:])
        assert below.how is How.EXACT
        assert below.value is not None
        assert below.digest == states[number].digest == sha256(below.value)
        assert below.steps == states[number].steps


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(values=tensors, deltas=st.lists(changes, min_size=3, max_size=3))
def test_edits_come_off_in_any_order(
    dtype: torch.dtype, values: torch.Tensor, deltas: list[torch.Tensor]
) -> None:
    """To the byte while the others can be read; else to rounding, and the last one to the byte."""
    base = values.to(dtype)
    parts = [part(base, delta) for delta in deltas]
    stacked = start(base)
    for number, own in enumerate(parts):
        stacked = put(stacked, number, own)
    for order in permutations(range(3)):
        exact = rough = stacked
        for place, number in enumerate(order):
            rest = [n for n in range(3) if n not in order[: place + 1]]
            wanted = start(base)
            for other in rest:
                wanted = put(wanted, other, parts[other])
            exact = take(exact, number, parts)
            assert exact.how is How.EXACT
            assert exact.digest == wanted.digest
            alone: list[Part | None] = [None, None, None]
            alone[number] = parts[number]
            rough = take(rough, number, alone)
            assert rough.how in (How.EXACT, How.ROUNDED)
        assert exact.digest == rough.digest == sha256(base)
        assert exact.steps == rough.steps == ()


def test_what_rounding_may_change_is_bounded() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(200, 300, generator=generator).bfloat16()
    deltas = [0.1 * torch.randn(200, 300, generator=generator).double() for _ in range(3)]
    deltas[0][:100] = 0
    parts = [part(base, delta) for delta in deltas]
    stacked = start(base)
    for number, own in enumerate(parts):
        stacked = put(stacked, number, own)
    wanted = put(put(start(base), 1, parts[1]), 2, parts[2])
    found = take(stacked, 0, [parts[0], None, None])
    assert (found.how, found.elements) == (How.ROUNDED, 100 * 300)
    assert found.value is not None
    assert wanted.value is not None
    apart = (found.value.double() - wanted.value.double()).abs()
    assert 0 < apart.max() <= found.by < 0.2
    assert apart[:100].max() == 0


def test_an_edit_that_no_record_names_is_found_below_others() -> None:
    """A model that a run published has no record of that run's edit."""
    base = torch.linspace(-1, 1, 24).view(SHAPE).bfloat16()
    first, second = (
        part(base, torch.full(SHAPE, size, dtype=torch.float64)) for size in (0.3, -0.7)
    )
    published = put(start(base), 0, first)
    assert published.value is not None
    plain = start(published.value)
    with pytest.raises(EditFileError, match="is not the edit's base: 24 of 24 elements of w"):
        put(plain, 1, second)
    third = part(published.value, torch.full(SHAPE, 0.1, dtype=torch.float64))
    found = take(put(plain, 1, third), 0, [first, third])
    wanted = put(start(base), 1, third, force=True)
    assert (found.how, found.digest) == (How.EXACT, wanted.digest)
    assert [s.id for s in found.steps] == ["id1"]


def test_what_a_tensor_does_not_hold_is_refused_or_forced() -> None:
    base = torch.linspace(-1, 1, 24).view(SHAPE)
    own = part(base, torch.full(SHAPE, 0.3, dtype=torch.float64))
    with pytest.raises(EditFileError, match="holds the values that the edit was made for"):
        take(start(base), 0, [own])
    other = start(base + 1)
    with pytest.raises(EditFileError, match="w is not W \\+ Δ, and no record"):
        take(other, 0, [own])
    forced = take(other, 0, [own], force=True)
    assert (forced.how, forced.elements) == (How.FORCED, 24)
    assert forced.value is not None
    assert torch.equal(forced.value, (base + 1).double().sub(0.3).float())
    edited = put(start(base), 0, own)
    with pytest.raises(EditFileError, match="has been applied to it already"):
        put(start(edited.value), 0, own)  # type: ignore[arg-type]


def test_a_tensor_that_changed_since_is_refused() -> None:
    base = torch.linspace(-1, 1, 24).view(SHAPE)
    own = part(base, torch.full(SHAPE, 0.3, dtype=torch.float64))
    edited = put(start(base), 0, own)
    steps = (Step("id0", "digest0", "edit0", None, None, known=False),)
    assert edited.value is not None
    trained = Outcome(edited.value + 1, "", steps, How.EXACT)
    with pytest.raises(EditFileError, match="has changed w since the edit was applied"):
        take(trained, 0, [own])
    forced = take(trained, 0, [own], force=True)
    assert (forced.how, forced.steps) == (How.FORCED, ())


def test_a_damaged_difference_is_noticed() -> None:
    base = torch.linspace(-1, 1, 24).view(SHAPE).bfloat16()
    own = part(base + 1, torch.full(SHAPE, 37.3, dtype=torch.float64))
    edited = put(start(base), 0, own, force=True)
    (there,) = edited.steps
    assert there.kept
    assert take(edited, 0, [own]).how is How.EXACT
    for damaged in (b"", b"no zstd", None):
        steps = (Step(there.id, there.digest, there.source, there.before, damaged),)
        found = take(Outcome(edited.value, edited.digest, steps, How.EXACT), 0, [own])
        assert found.how is How.ROUNDED


def test_a_16_bit_model_saved_as_float32_is_the_same_base() -> None:
    """Ranks on a CPU save the values of a 16-bit checkpoint in float32."""
    base = torch.linspace(-1, 1, 24).view(SHAPE).bfloat16()
    delta = torch.full(SHAPE, 0.3, dtype=torch.float64)
    found = put(start(base), 0, part(base.float(), delta))
    assert found.how is How.EXACT
    assert found.value is not None
    assert torch.equal(found.value, (base.double() + 0.3).bfloat16())
    exact = torch.linspace(-1, 1, 24).view(SHAPE)
    with pytest.raises(EditFileError, match="as bfloat16, which cannot hold the values"):
        put(start(exact.bfloat16()), 0, part(exact, delta))


def test_a_result_that_the_dtype_cannot_hold_is_refused() -> None:
    base = torch.full(SHAPE, 60000.0).half()
    with pytest.raises(NotFiniteError, match="w does not fit its dtype"):
        put(start(base), 0, part(base, torch.full(SHAPE, 60000.0, dtype=torch.float64)))
