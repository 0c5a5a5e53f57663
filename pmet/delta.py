"""An edit: what an update changes, kept so that it can be applied, undone, saved and loaded.

On disk an edit is safetensors: for every edited parameter its change (``delta.<name>``, float64)
and its values before (``original.<name>``, in its own dtype). With both, applying and undoing are
exact to the bit in any process, and an edit is never applied to weights it was not made for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from pmet.errors import EditFileError

FORMAT = "pmet-edit-1"


def changed(original: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """W + Δ, added in float64 and rounded once to the weight's dtype."""
    return (original.double() + delta.to(original.device, torch.float64)).to(original.dtype)


@dataclass(frozen=True)
class Edit:
    """The weight changes of one update.

    Attributes:
        deltas: change by parameter name, float64, shaped as the parameter.
        originals: the parameter's values before.
    """

    deltas: dict[str, torch.Tensor]
    originals: dict[str, torch.Tensor]

    def apply(self, model: nn.Module) -> None:
        """Write W + Δ into ``model``.

        Raises:
            EditFileError: a weight is missing or not the one that the edit was made for; nothing
                has been written then.
        """
        self._write(model, {n: (w, self._edited(n)) for n, w in self.originals.items()})

    def revert(self, model: nn.Module) -> None:
        """Write back the values from before, to the bit.

        Raises:
            EditFileError: a weight is missing or not what ``apply`` wrote; nothing has been
                written then.
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
        """Read one safetensors file, or all of a folder (a run's ``delta/``).

        Raises:
            EditFileError: nothing there, a damaged file, or not a saved edit.
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
                raise EditFileError(
                    f"{file} cannot be read as a saved edit ({error}); is it whole?"
                ) from None
        if not deltas or deltas.keys() != originals.keys():
            raise EditFileError(
                f"{path} holds no complete edit; name a file or a run's delta folder"
            )
        return cls(deltas, originals)

    def _edited(self, name: str) -> torch.Tensor:
        return changed(self.originals[name], self.deltas[name])

    def _write(
        self, model: nn.Module, changes: dict[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        parameters = dict(model.named_parameters())
        for name, (expected, _) in changes.items():
            weight = parameters.get(name)
            if weight is None or weight.shape != expected.shape:
                raise EditFileError(f"the model has no parameter {name} of the edit's shape")
            # A 16-bit checkpoint opened in float32 holds the same values, and is the same model.
            if not torch.equal(weight.detach().cpu(), expected.to(weight.dtype).cpu()):
                raise EditFileError(
                    f"{name} does not hold the values that this edit expects; it belongs to "
                    "another model, or another edit lies on top of it"
                )
        with torch.no_grad():
            for name, (_, wanted) in changes.items():
                parameters[name].copy_(wanted)
