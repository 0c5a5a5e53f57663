"""The low-rank factors of a run's deltas, which are computed and kept one weight at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.edits import SavedEdit
from pipeline.errors import RunFolderError
from pipeline.events import FACTOR
from pipeline.progress import Progress
from pmet.delta import saved_delta, saved_original
from pmet.low_rank import LowRank, low_rank

DTYPE = torch.float32
EXACT = 1e-6
"""‖B·A − Δ‖/‖Δ‖ up to which factors count as exact: several times the rounding of ``DTYPE``."""
_LEFT, _RIGHT = "B", "A"


@dataclass(frozen=True)
class Target:
    """The module that an edited weight belongs to.

    Attributes:
        module: its name in the loaded model.
        transposed: the weight is (in, out), not (out, in).
    """

    module: str
    transposed: bool


@dataclass(frozen=True)
class FactoredWeight:
    """The factors of one weight's Δ, as they are stored.

    Attributes:
        parameter: name of the weight in the loaded model.
        target: its module.
        shape: (V, K), outputs by inputs.
        rank: the rank of the factors.
        full_rank: that of Δ.
        energy: the share of Δ's squared singular values that they keep.
        error: ‖B·A − Δ‖/‖Δ‖.
        largest_error: max|B·A − Δ|/max|Δ|.
        edit_file: the saved edit.
        file: the factors.
    """

    parameter: str
    target: Target
    shape: tuple[int, int]
    rank: int
    full_rank: int
    energy: float
    error: float
    largest_error: float
    edit_file: Path
    file: Path

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """B, (V, R), and A, (R, K)."""
        held = load_file(self.file)
        return held[_LEFT], held[_RIGHT]

    def edited(self) -> torch.Tensor:
        """W + B·A, float64, in the weight's own orientation."""
        left_VR, right_RK = self.factors()
        product_VK = left_VR.double() @ right_RK.double()
        original = saved_original(self.edit_file, self.parameter)
        return original.double() + (product_VK.T if self.target.transposed else product_VK)

    def as_json(self) -> dict[str, Any]:
        """What ``export.json`` says of it."""
        kept = ("parameter", "rank", "full_rank", "energy", "error", "largest_error")
        return {name: getattr(self, name) for name in kept}


def targets_of(model: nn.Module, edit: SavedEdit) -> dict[str, Target]:
    """The module of each edited weight, by the weight's name.

    Args:
        model: a skeleton of the edited model.
        edit: the edit.

    Raises:
        RunFolderError: a LoRA adapter cannot change one of the weights.
    """
    return {name: _target(model, name, edit) for name in edit.weights}


def _target(model: nn.Module, parameter: str, edit: SavedEdit) -> Target:
    from transformers.pytorch_utils import Conv1D

    if len(edit.weights[parameter].shape) != 2:
        raise RunFolderError(
            f"{parameter} in {edit.source} stacks the weights of experts, for which the releases "
            "of peft do not agree on one layout of an adapter; export with --format delta, or use "
            "the run's model"
        )
    module, _, own_name = parameter.rpartition(".")
    held = dict(model.named_modules()).get(module)
    if own_name != "weight" or not isinstance(held, nn.Linear | Conv1D):
        raise RunFolderError(
            f"{parameter} in {edit.source} is not the weight of a linear layer, and a LoRA adapter "
            "changes no other; export with --format delta, or use the run's model"
        )
    return Target(module, isinstance(held, Conv1D))


def factor(
    edit: SavedEdit,
    targets: Mapping[str, Target],
    folder: Path,
    *,
    rank: int | None,
    energy: float | None,
    progress: Progress,
) -> list[FactoredWeight]:
    """Factor every Δ of an edit; one is in memory at a time.

    Args:
        edit: the edit.
        targets: the module of each weight.
        folder: where the factors are kept.
        rank: as for `low_rank`.
        energy: as for `low_rank`.
        progress: counts the weights.
    """
    found = []
    with progress.stage(FACTOR, len(targets)) as bar:
        for number, (parameter, target) in enumerate(targets.items()):
            delta = saved_delta(edit.weights[parameter].file, parameter)
            delta_VK = delta.T if target.transposed else delta
            factors = low_rank(delta_VK, rank=rank, energy=energy).to(DTYPE)
            file = folder / f"{number}.safetensors"
            _save(factors, file)
            found.append(
                FactoredWeight(
                    parameter,
                    target,
                    (delta_VK.shape[0], delta_VK.shape[1]),
                    factors.rank,
                    factors.full_rank,
                    factors.energy,
                    *factors.distance(delta_VK),
                    edit.weights[parameter].file,
                    file,
                )
            )
            bar.advance()
    return found


def _save(factors: LowRank, file: Path) -> None:
    tensors = {_LEFT: factors.left_VR.contiguous(), _RIGHT: factors.right_RK.contiguous()}
    save_file(tensors, str(file))
