"""An edit: the changes of an update, which can be applied, undone, saved and loaded.

On disk an edit is a safetensors file: for every edited parameter its change (``delta.<name>``,
float64) and its original values (``original.<name>``, in its own dtype). With both, applying and
undoing are exact to the bit in any process, and an edit is never applied to other weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from pmet.errors import EditFileError, NotFiniteError
from pmet.safetensors_header import written_header

FORMAT = "pmet-edit-1"


def changed(original: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Return W + Δ, added in float64 and rounded once to the weight's dtype.

    Values that the dtype cannot hold become infinite; see `checked`.
    """
    return _sum(original, delta).to(original.dtype)


def checked(name: str, original: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Return the result of `changed`, but refuse it unless every element is finite.

    Args:
        name: the parameter's name, for the message.
        original: W.
        delta: Δ, of the same shape.

    Raises:
        NotFiniteError: W + Δ holds NaN, or exceeds the dtype.
    """
    edited = changed(original, delta)
    if not torch.isfinite(edited).all():
        _refuse(name, original, delta, original.dtype)
    return edited


def check_fits(
    name: str, largest: float, share: float, dtype: torch.dtype, *, layer: int | None = None
) -> None:
    """Refuse an edited weight that its dtype cannot hold.

    Args:
        name: name of the parameter.
        largest: the largest |W + Δ|, before rounding; infinite if any element is NaN.
        share: ‖Δ‖/‖W‖.
        dtype: the dtype in which the edited weight is stored.
        layer: number of the edited layer, if the caller knows it.

    Raises:
        NotFiniteError: the message names all of these, and the remedy.
    """
    # Rounding is monotonic: if the largest value fits, all do.
    if torch.tensor(largest, dtype=torch.float64).to(dtype).isfinite():
        return
    named = str(dtype).removeprefix("torch.")
    place = name if layer is None else f"layer {layer} ({name})"
    wider = " or store the model in bfloat16 or float32" if dtype == torch.float16 else ""
    raise NotFiniteError(
        f"the edited weight of {place} does not fit its dtype, {named}: the largest |W + Δ| is "
        f"{largest:.3g}, but {named} holds at most {torch.finfo(dtype).max:.6g}; ‖Δ‖/‖W‖ is "
        f"{share:.3g}. Lower clamp_norm_factor or v_lr in the hyper-parameters"
        f"{',' if wider else ''}{wider}"
    )


def _refuse(name: str, original: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype) -> NoReturn:
    largest = _sum(original, delta).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).max().item()
    before = original.double().norm().item()
    share = delta.double().norm().item() / before if before else math.inf
    check_fits(name, largest, share, dtype)
    raise AssertionError("a value that is not finite does not fit")


def _sum(original: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return original.double() + delta.to(original.device, torch.float64)


@dataclass(frozen=True)
class Edit:
    """The weight changes of one update.

    Attributes:
        deltas: change by parameter name, float64, in the parameter's shape.
        originals: the original values of each parameter.
    """

    deltas: dict[str, torch.Tensor]
    originals: dict[str, torch.Tensor]

    def apply(self, model: nn.Module) -> None:
        """Write W + Δ into ``model``.

        Raises:
            EditFileError: a weight is missing or is not the one that the edit was made for;
                nothing has been written.
            NotFiniteError: an edited weight exceeds the dtype of the edit or of the model; nothing
                has been written.
        """
        edited = {n: checked(n, w, self.deltas[n]) for n, w in self.originals.items()}
        self._check_fit(model, edited)
        self._write(model, {n: (w, edited[n]) for n, w in self.originals.items()})

    def revert(self, model: nn.Module) -> None:
        """Restore the original values, to the bit.

        Raises:
            EditFileError: a weight is missing or is not what ``apply`` wrote; nothing has been
                written.
        """
        self._write(model, {n: (self._edited(n), w) for n, w in self.originals.items()})

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {f"delta.{name}": delta for name, delta in self.deltas.items()}
        tensors |= {f"original.{name}": weight for name, weight in self.originals.items()}
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        save_file(tensors, str(path), metadata={"format": FORMAT})

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read one safetensors file, or all files of a folder (a run's ``delta/``).

        Raises:
            EditFileError: there is no file, or it is damaged or not a saved edit.
        """
        path = Path(path)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        deltas: dict[str, torch.Tensor] = {}
        originals: dict[str, torch.Tensor] = {}
        for file in files:
            try:
                with safe_open(str(file), framework="pt") as stored:
                    if (stored.metadata() or {}).get("format") != FORMAT:
                        raise EditFileError(f"{file} is not a saved edit ({FORMAT})")
                    for key in stored.keys():  # noqa: SIM118 - no mapping, it only has keys()
                        kind, _, name = key.partition(".")
                        {"delta": deltas, "original": originals}[kind][name] = stored.get_tensor(
                            key
                        )
            except (OSError, SafetensorError, KeyError) as error:
                raise _unreadable(file, error) from None
        if not deltas or deltas.keys() != originals.keys():
            raise EditFileError(
                f"{path} holds no complete edit; name a file or a run's delta folder"
            )
        return cls(deltas, originals)

    def _edited(self, name: str) -> torch.Tensor:
        return changed(self.originals[name], self.deltas[name])

    def _check_fit(self, model: nn.Module, edited: Mapping[str, torch.Tensor]) -> None:
        """Refuse a model in a narrower dtype than the edit's if the edited weight overflows it."""
        parameters = dict(model.named_parameters())
        for name, tensor in edited.items():
            weight = parameters.get(name)
            if weight is not None and not tensor.to(weight.dtype).isfinite().all():
                _refuse(name, self.originals[name], self.deltas[name], weight.dtype)

    def _write(
        self, model: nn.Module, changes: dict[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        parameters = dict(model.named_parameters())
        for name, (expected, _) in changes.items():
            weight = parameters.get(name)
            if weight is None or weight.shape != expected.shape:
                raise EditFileError(f"the model has no parameter {name} of the edit's shape")
            # A 16-bit checkpoint opened in float32 holds the same values: it is the same model.
            if not torch.equal(weight.detach().cpu(), expected.to(weight.dtype).cpu()):
                raise EditFileError(
                    f"{name} does not hold the values that this edit expects; it belongs to "
                    "another model, or another edit has been applied on top"
                )
        with torch.no_grad():
            for name, (_, wanted) in changes.items():
                parameters[name].copy_(wanted)


class EditWriter:
    """Writes the saved edit of one weight in pieces, never holding all of Δ or of the weight.

        with EditWriter(path, name, weight.shape, weight.dtype) as writer:
            writer.add_original(values)  # flat, from the first element on, piece by piece
            writer.put_delta(block, top, left)

    The file equals that of `Edit.save`, byte for byte, once all pieces are written.

    Args:
        path: path of the file.
        name: name of the parameter.
        shape: shape of the parameter, a matrix, or matrices that are stacked; their rows count on.
        dtype: dtype of the parameter.
    """

    def __init__(self, path: str | Path, name: str, shape: torch.Size, dtype: torch.dtype) -> None:
        self._width = shape[-1]
        delta_bytes = shape.numel() * torch.float64.itemsize
        end = delta_bytes + shape.numel() * dtype.itemsize
        tensors = {f"delta.{name}": (torch.float64, shape), f"original.{name}": (dtype, shape)}
        self._file = Path(path).open("wb")  # noqa: SIM115 - closed with this object
        self._file.write(written_header(tensors, {"format": FORMAT}))
        self._delta_start = self._file.tell()
        self._original_end = self._delta_start + delta_bytes
        self._file.truncate(self._delta_start + end)

    def add_original(self, values: torch.Tensor) -> None:
        """Write the next elements of the original weight."""
        self._file.seek(self._original_end)
        self._original_end += self._file.write(_bytes(values))

    def put_delta(self, block: torch.Tensor, top: int = 0, left: int = 0) -> None:
        """Write a block of Δ that starts at row ``top`` and column ``left``."""
        whole_rows = block.shape[1] == self._width
        for number, part in enumerate([block] if whole_rows else block):
            self._file.seek(self._delta_start + 8 * ((top + number) * self._width + left))
            self._file.write(_bytes(part.double()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def saved_delta(path: str | Path, name: str, expert: int | None = None) -> torch.Tensor:
    """Read Δ of a parameter from a saved edit, or one expert's part of it.

    Raises:
        EditFileError: the file is damaged, or does not hold the parameter's edit.
    """
    return _saved(path, f"delta.{name}", expert)


def saved_original(path: str | Path, name: str, expert: int | None = None) -> torch.Tensor:
    """Read the original values of a parameter from a saved edit, or those of one expert.

    Raises:
        EditFileError: the file is damaged, or does not hold the parameter's edit.
    """
    return _saved(path, f"original.{name}", expert)


def _saved(path: str | Path, key: str, expert: int | None) -> torch.Tensor:
    try:
        with safe_open(str(path), framework="pt") as stored:
            found: torch.Tensor = (
                stored.get_tensor(key) if expert is None else stored.get_slice(key)[expert]
            )
            return found
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def delta_rows(path: str | Path, name: str, rows: range, at_once: int) -> Iterator[torch.Tensor]:
    """Yield the rows of a saved Δ, in order, at most ``at_once`` of them in memory.

    Those of stacked matrices count on from one to the next.

    Raises:
        EditFileError: the file is damaged, or does not hold the parameter's edit.
    """
    with _delta_slice(path, name) as delta:
        each, width = delta.get_shape()[-2:]
        start = rows.start
        while start < rows.stop:
            stop = min(start + at_once, rows.stop, (start // each + 1) * each)
            yield _block(delta, (stop - start, width), start, 0)
            start = stop


def delta_block(
    path: str | Path, name: str, shape: tuple[int, int], top: int = 0, left: int = 0
) -> torch.Tensor:
    """Read a block of a saved Δ; the rows of stacked matrices count on from one to the next.

    Args:
        path: the file.
        name: name of the parameter.
        shape: rows and columns of the block, which lies within one matrix.
        top: its first row.
        left: its first column.

    Raises:
        EditFileError: the file is damaged, or does not hold the parameter's edit.
    """
    with _delta_slice(path, name) as delta:
        return _block(delta, shape, top, left)


@contextmanager
def _delta_slice(path: str | Path, name: str) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as stored:
            yield stored.get_slice(f"delta.{name}")
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def _block(delta: Any, shape: tuple[int, int], top: int, left: int) -> torch.Tensor:
    """A block of a stored Δ, a matrix or stacked ones."""
    dimensions = delta.get_shape()
    matrix, first = divmod(top, dimensions[-2])
    rows, columns = slice(first, first + shape[0]), slice(left, left + shape[1])
    block: torch.Tensor = (
        delta[matrix, rows, columns] if len(dimensions) == 3 else delta[rows, columns]
    )
    return block


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data


def _unreadable(path: str | Path, error: Exception) -> EditFileError:
    return EditFileError(f"{path} cannot be read as a saved edit ({error}); is the file complete?")
