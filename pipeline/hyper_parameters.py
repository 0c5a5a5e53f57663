"""The hyper-parameters of a job: a file, a preset, or what was found for the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.errors import JobError, NoPresetError, StorageError
from pipeline.job import AUTO_HPARAMS
from pipeline.storage import Store, read_file
from pmet.hparams import PMETHyperParams
from pmet.presets import (
    Preset,
    all_presets,
    depth_of,
    fitting_preset,
    nearest_presets,
    shape_text,
)

TUNED, TUNING = "hparams.yaml", "tune.json"
"""Files that a search for hyper-parameters leaves: what it has found, and what that rests on."""


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


def chosen_hparams(
    name: str | None,
    config: Any,
    *,
    second_moments: str | None = None,
    digest: Callable[[], str] = str,
) -> tuple[PMETHyperParams, str]:
    """Load the hyper-parameters of a job, and say where they are from.

    Args:
        name: a preset, or the path or URL of a file; None takes the preset that fits the model,
            ``auto`` that preset or what a search has found for the model.
        config: the model's configuration.
        second_moments: where the job's second moments are; a search leaves its files beside them.
        digest: gives the model's digest, which the search must have been made for.

    Raises:
        HyperParameterError: the hyper-parameters are invalid.
        NoPresetError: no preset fits the model, and there is no name, or with ``auto`` no result
            of a search.
        JobError: no such preset or file exists, or the search was made for another model.
    """
    if name == AUTO_HPARAMS:
        if fitting_preset(config):
            return chosen_hparams(None, config)
        return _tuned(second_moments, digest, depth_of(config))
    if name is not None:
        preset = all_presets().get(name)
        origin = f"file {name}" if preset is None else f"preset {name}: {preset.origin}"
        return load_hparams(name), origin
    if (preset := fitting_preset(config)) is None:
        nearest = ", ".join(map(_described, nearest_presets(config)))
        raise NoPresetError(
            f"hparams is missing, and no preset fits this model ({shape_text(config)}); the "
            f"nearest are {nearest}: name one of them, or write a file with at least layers, as "
            "layers: [4, 5, 6, 7, 8] (docs/jobs.md#hyper-parameters); pmet tune finds them",
            depth_of(config),
        )
    origin = f"preset {preset.name}, which fits the model's configuration: {preset.origin}"
    return PMETHyperParams.preset(preset.name), origin


def _tuned(
    second_moments: str | None, digest: Callable[[], str], depth: int
) -> tuple[PMETHyperParams, str]:
    """What a search has found, in the folder that also holds the second moments."""
    folder = (second_moments or "").rstrip("/").rpartition("/")[0] or "."
    store = Store(folder)
    if second_moments is None or not (store.exists(TUNED) and store.exists(TUNING)):
        beside = f"; there is none in {folder}" if second_moments else ""
        raise NoPresetError(
            f"hparams: auto found no preset that fits this model, and no {TUNED} beside the job's "
            f"second_moments{beside}; find one with pmet tune, and name its second_moments folder "
            "in the job (docs/tune.md)",
            depth,
        )
    record = store.read_json(TUNING)
    about = record.get("about") if isinstance(record, dict) else None
    if not isinstance(about, dict) or about.get("model") != digest():
        raise JobError(
            f"hparams: {store.join(TUNED)} was found for another model; run pmet tune for this "
            "one, or name the file if you want it all the same"
        )
    where = store.join(TUNED)
    return load_hparams(where), f"file {where}, found by pmet tune"


def _described(preset: Preset) -> str:
    config = preset.config
    shape = f"{config['num_hidden_layers']} layers, {config['hidden_size']} wide"
    return f"{preset.name} ({shape})"
