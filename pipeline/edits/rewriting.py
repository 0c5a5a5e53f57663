"""Writing a checkpoint with an edit put on it, or taken off.

Both read every weight to change twice: once to check that it holds what it should, before anything
is written, and once to write it. One tensor is in memory at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import torch

from pipeline.edits.arithmetic import Part, sha256
from pipeline.edits.carried import Carried, CarriedEdit, after, kept_name, read_carried
from pipeline.edits.output import check_claim, claim, refuse_used, release
from pipeline.edits.saved import SavedEdit, opened_edit
from pipeline.edits.stacking import How, Outcome, Step, with_edit, without_edit
from pipeline.errors import ModelError, StorageError
from pipeline.events import CHECK_MODEL, CHECK_WEIGHTS, EventKind, StageName
from pipeline.models import (
    Checkpoint,
    check_configuration,
    default_cache,
    digest_of_files,
    open_model_folder,
    open_skeleton,
    publish,
    stored_weights,
)
from pipeline.places import model_places
from pipeline.progress import Progress
from pipeline.report import is_model_card
from pipeline.run_folder import CARD
from pipeline.storage import Store, file_digest, locate, now_text, refuse_overlap
from pmet.errors import EditFileError, PMETError

_ON_THIS_MACHINE = ("file:", "local:", "memory:")
_Outcomes = Callable[[str, torch.Tensor], Outcome]


@dataclass(frozen=True)
class Rewritten:
    """A checkpoint that has been written with an edit more or less.

    Attributes:
        store: the folder.
        tensors: the outcome for each rewritten tensor, by its name in the files.
        files: the number of files with such tensors.
        carried: the edits that it carries, by where they were read from, first applied first.
        is_base: whether all of it is the base of the run whose edit was taken off; None if that is
            unknown.
        other_rest: whether the model, apart from the weights to change, is not the run's base.
        without_card: whether a run's model card was left out.
    """

    store: Store
    tensors: Mapping[str, Outcome]
    files: int
    carried: tuple[str, ...]
    is_base: bool | None = None
    other_rest: bool = False
    without_card: bool = False

    def count(self, how: str) -> int:
        """The number of tensors with an outcome of a kind (`How`)."""
        return sum(outcome.how == how for outcome in self.tensors.values())

    def rounding(self, how: str) -> tuple[int, float]:
        """How many elements of such tensors rounding may have changed, and by how much at most."""
        found = [outcome for outcome in self.tensors.values() if outcome.how == how]
        return sum(o.elements for o in found), max((o.by for o in found), default=0.0)


def apply_edit(
    source: str,
    model: str,
    output: str,
    *,
    force: bool = False,
    progress: Progress | None = None,
    cache_dir: Path | None = None,
) -> Rewritten:
    """Write a checkpoint with W + Δ.

    Args:
        source: path or URL of a run, of an edit file, or of a folder of edit files.
        model: the checkpoint, as `open_model_folder` takes it.
        output: path or URL of a folder that is empty or does not exist.
        force: add Δ whatever the weights hold.
        progress: shows what is checked and written; None shows nothing.
        cache_dir: where remote models are copied to.

    Raises:
        InputError: an argument cannot be used, or the model is not the edit's base; nothing has
            been written.
        NotFiniteError: W + Δ exceeds the dtype; nothing has been written.
        StorageError: a file cannot be read or written.
    """
    with _opened(source, model, output, progress, cache_dir) as work:
        edit, carried = work.edit, work.carried
        if carried.last(edit.digest) is not None and not force:
            raise EditFileError(
                f"model {model} carries the edit {edit.source} already, as its record says; take "
                "it off with pmet revert, or give --force to add Δ once more"
            )
        step = Step(uuid4().hex[:16], edit.digest, edit.source, None, None)

        def outcome(name: str, value: torch.Tensor) -> Outcome:
            steps = carried.steps(name, sha256(value))
            return with_edit(name, value, work.parts[name], steps, step, force=force)

        planned = work.planned(outcome)
        with work.progress.stage(CHECK_MODEL):
            digest = work.checkpoint.digest()
        other = edit.base not in (None, digest) and not carried.built_on(edit.base or "", digest)
        if other and not force:
            raise ModelError(_other_rest(model, edit, digest))
        forced = other or any(o.how is How.FORCED for o in planned.values())
        new = CarriedEdit(step.id, edit.digest, edit.source, now_text(), digest, forced, {})
        written = work.write(outcome, planned, (*carried.edits, new))
        return replace(written, other_rest=other)


def revert_edit(
    source: str,
    model: str,
    output: str,
    *,
    force: bool = False,
    progress: Progress | None = None,
    cache_dir: Path | None = None,
) -> Rewritten:
    """Write a checkpoint without an edit that it carries.

    Args:
        source: as for `apply_edit`.
        model: the edited checkpoint, as `open_model_folder` takes it.
        output: as for `apply_edit`.
        force: subtract Δ whatever the weights hold.
        progress: as for `apply_edit`.
        cache_dir: as for `apply_edit`.

    Raises:
        InputError: an argument cannot be used, or the model does not carry the edit; nothing has
            been written.
        StorageError: a file cannot be read or written.
    """
    with _opened(source, model, output, progress, cache_dir) as work:
        edit, carried = work.edit, work.carried
        recorded = carried.last(edit.digest)
        step = Step(recorded.id if recorded else "", edit.digest, edit.source, None, None)

        def outcome(name: str, value: torch.Tensor) -> Outcome:
            steps = carried.steps(name, sha256(value))

            def part_of(other: Step) -> Part | None:
                return work.parts_again(other).get(name)

            return without_edit(name, value, work.parts[name], steps, step, part_of, force=force)

        planned = work.planned(outcome)
        return work.write(
            outcome, planned, tuple(e for e in carried.edits if e.id != step.id), base=edit.base
        )


@dataclass(frozen=True)
class _Work:
    """An edit and the checkpoint that it is put on or taken off.

    Attributes:
        edit: the edit.
        checkpoint: the checkpoint.
        model: its name, as the user gave it.
        parts: the edit's part in each stored tensor.
        carried: the edits that the checkpoint carries.
        store: the output.
        progress: shows what is done.
        again: the parts of other edits that were read, by digest; empty if they could not be.
        stack: keeps them open.
    """

    edit: SavedEdit
    checkpoint: Checkpoint
    model: str
    parts: Mapping[str, Part]
    carried: Carried
    store: Store
    progress: Progress
    again: dict[str, Mapping[str, Part]]
    stack: ExitStack

    def planned(self, outcome: _Outcomes) -> dict[str, Outcome]:
        """The outcome for each tensor, without its values."""
        found = {}
        with self.progress.stage(CHECK_WEIGHTS, len(self.parts)) as bar:
            for name in self.parts:
                value = self.checkpoint.read(self.checkpoint.tensors[name])
                try:
                    found[name] = outcome(name, value).digested()
                except EditFileError as error:
                    raise EditFileError(f"model {self.model} {error}") from None
                bar.advance()
        return found

    def parts_again(self, step: Step) -> Mapping[str, Part]:
        """The parts of an edit that the model carries, read again; empty if it is gone."""
        if step.digest not in self.again:
            self.again[step.digest] = self._parts_of(step)
        return self.again[step.digest]

    def _parts_of(self, step: Step) -> Mapping[str, Part]:
        try:
            # The record may be a stranger's: it must not decide which servers are contacted.
            if _server(step.source) not in {None, _server(self.edit.source), _server(self.model)}:
                raise EditFileError("it is on another server than edit and model")
            edit = self.stack.enter_context(opened_edit(step.source))
            found = _parts(self.checkpoint, self.model, edit)
        except PMETError as error:
            why = str(error)
        else:
            if edit.digest == step.digest:
                return found
            why = "it holds another edit by now"
        self.progress.event(
            EventKind.WARNING, f"the edit {step.source}, applied later, cannot be read again: {why}"
        )
        return {}

    def write(
        self,
        outcome: _Outcomes,
        planned: Mapping[str, Outcome],
        edits: tuple[CarriedEdit, ...],
        *,
        base: str | None = None,
    ) -> Rewritten:
        """Write the checkpoint and the record of what it carries.

        Args:
            outcome: computes a tensor's outcome.
            planned: the outcomes as checked.
            edits: the edits that the model then carries.
            base: digest to compare the model with if it carries none.
        """
        carried, store = after(self.carried, edits, planned), self.store
        without = [CARD] if _has_run_card(self.checkpoint.folder) else []
        sizes = {
            name: self.checkpoint.megabytes(name)
            for name in self.checkpoint.files()
            if name not in without
        }
        digests: dict[str, str] = {}
        ids = {edit.id for edit in edits}
        with self.progress.stage(StageName.PUBLISH, sum(sizes.values())) as bar:
            token = claim(store, sizes)
            replace(self.carried, edits=edits).copy_kept(lambda n: n not in planned, store)

            def edited(name: str, value: torch.Tensor) -> torch.Tensor:
                result = self._again(outcome, planned, name, value)
                assert result.value is not None, "it has just been computed"
                for step in result.steps:
                    if step.id in ids and step.kept is not None:
                        store.write_bytes(kept_name(step.id, name), step.kept)
                return result.value

            def on_file(name: str) -> None:
                check_claim(store, token)
                digests[name] = store.sha256(name)
                if len(digests) == len(sizes) - 1 and edits:
                    # All that is missing is config.json, which makes it a model.
                    config = {"config.json": file_digest(self.checkpoint.folder / "config.json")}
                    replace(carried, model=digest_of_files(digests | config)).write(store)
                bar.advance(sizes[name])

            publish(self.checkpoint, planned, edited, store, "", on_file=on_file, without=without)
            release(store)
        return Rewritten(
            store,
            planned,
            len({self.checkpoint.tensors[name].file for name in planned}),
            tuple(edit.source for edit in edits),
            is_base=None if base is None or edits else digest_of_files(digests) == base,
            without_card=bool(without),
        )

    def _again(
        self, outcome: _Outcomes, planned: Mapping[str, Outcome], name: str, value: torch.Tensor
    ) -> Outcome:
        """The outcome for a tensor, which must be the one that was planned."""
        with suppress(EditFileError):
            result = outcome(name, value)
            if result.digested() == planned[name]:
                return result
        raise StorageError(
            f"{name} of model {self.model} changed while it was read; run the same command again"
        )


@contextmanager
def _opened(
    source: str, model: str, output: str, progress: Progress | None, cache_dir: Path | None
) -> Iterator[_Work]:
    """Open what a command names, and refuse what cannot be used."""
    read = [("edit", locate(source)), ("model", model_places(model))]
    refuse_overlap(("--output", output), read)
    store, progress = Store(output), progress or Progress()
    refuse_used(store)
    with ExitStack() as stack:
        edit = stack.enter_context(opened_edit(source))
        if edit.warning:
            progress.event(EventKind.WARNING, edit.warning)
        checkpoint = Checkpoint.open(open_model_folder(model, cache_dir or default_cache()))
        check_configuration(checkpoint)
        parts = _parts(checkpoint, model, edit)
        carried = read_carried(checkpoint.folder)
        yield _Work(edit, checkpoint, model, parts, carried, store, progress, {}, stack)


def _parts(checkpoint: Checkpoint, model: str, edit: SavedEdit) -> dict[str, Part]:
    """An edit's part in each of a checkpoint's stored tensors, in the order of the files.

    Raises:
        ModelError: the checkpoint has no such weight, or in another shape.
    """
    skeleton = open_skeleton(checkpoint.folder)
    shapes = {n: tuple(p.shape) for n, p in skeleton.named_parameters(remove_duplicate=False)}
    for name, weight in edit.weights.items():
        if name not in shapes:
            raise ModelError(
                f"model {model} has no weight {name}, which the edit {edit.source} changes: the "
                "edit is of a model of another architecture; give a copy of its base"
            )
        if shapes[name] != weight.shape:
            raise ModelError(
                f"model {model} has {name} as {_times(shapes[name])}, but the edit {edit.source} "
                f"changes {_times(weight.shape)}: it is of a model of another size; give a copy of "
                "its base"
            )
    found: dict[str, Part] = {}
    for name, stored in zip(
        edit.weights, stored_weights(checkpoint, skeleton, list(edit.weights)), strict=True
    ):
        if stored.shape != edit.weights[name].shape:
            raise ModelError(
                f"model {model} stores {name} as {_times(stored.shape)}, but its config.json asks "
                f"for {_times(edit.weights[name].shape)}; copy or download the model again"
            )
        if not stored.parts:
            found[stored.name] = edit.weights[name].part()
        for expert, part in enumerate(stored.parts):
            found[part.name] = edit.weights[name].part(expert)
    return found


def _server(place: str) -> str | None:
    """The protocol and host of a URL; None for a place on this machine."""
    found = re.match(r"[^/]*:/?/?[^/]*", place)
    return found[0] if found and not place.startswith(_ON_THIS_MACHINE) else None


def _other_rest(model: str, edit: SavedEdit, digest: str) -> str:
    return (
        f"model {model} is not the base of the run {edit.source}: the weights to change are the "
        f"base's, but other files or weights are not (digest {digest[:12]}, the run names "
        f"{(edit.base or '')[:12]}); give the base, or --force to apply the edit to this model, "
        "which nothing has measured"
    )


def _has_run_card(folder: Path) -> bool:
    """Whether a model has the card of a run, which describes no other model."""
    card = folder / CARD
    return card.is_file() and is_model_card(card.read_text(encoding="utf-8", errors="replace"))


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
