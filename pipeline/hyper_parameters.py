"""The hyper-parameters of a job: a file, a named preset, or the preset that fits the model."""

from __future__ import annotations

from typing import Any

from pipeline.errors import JobError, StorageError
from pipeline.storage import read_file
from pmet.hparams import PMETHyperParams
from pmet.presets import Preset, all_presets, fitting_preset, nearest_presets, shape_text


def load_hparams(name: str) -> PMETHyperParams:
    """Load a preset, or the file at a path or URL.

    Raises:
        HyperParameterError: the hyper-parameters are invalid.
        JobError: no such preset or file exists.
    """
    if name in all_presets():
        return PMETHyperParams.preset(name)
    try:
        text = read_file(name).decode()
    except (StorageError, UnicodeDecodeError) as error:
        presets = ", ".join(PMETHyperParams.presets())
        raise JobError(
            f"hparams: {name} cannot be read ({error}); name a file or a preset ({presets})"
        ) from None
    return PMETHyperParams.from_text(text, source=name)


def chosen_hparams(name: str | None, config: Any) -> tuple[PMETHyperParams, str]:
    """Load the hyper-parameters of a job, and say where they are from.

    Args:
        name: a preset, or the path or URL of a file; None takes the preset that fits the model.
        config: the model's configuration.

    Raises:
        HyperParameterError: the hyper-parameters are invalid.
        JobError: no such preset or file exists, or no preset fits the model.
    """
    if name is not None:
        preset = all_presets().get(name)
        origin = f"file {name}" if preset is None else f"preset {name}: {preset.origin}"
        return load_hparams(name), origin
    if (preset := fitting_preset(config)) is None:
        nearest = ", ".join(map(_described, nearest_presets(config)))
        raise JobError(
            f"hparams is missing, and no preset fits this model ({shape_text(config)}); the "
            f"nearest are {nearest}: name one of them, or write a file with at least layers, as "
            "layers: [4, 5, 6, 7, 8] (docs/jobs.md#hyper-parameters); pmet tune improves on it"
        )
    origin = f"preset {preset.name}, which fits the model's configuration: {preset.origin}"
    return PMETHyperParams.preset(preset.name), origin


def _described(preset: Preset) -> str:
    config = preset.config
    shape = f"{config['num_hidden_layers']} layers, {config['hidden_size']} wide"
    return f"{preset.name} ({shape})"
