"""Presets: published hyper-parameters by model, and the preset that fits a model's configuration.

The data is in ``presets.yaml``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from pmet.yaml12 import parse_yaml

_SHAPE = ("num_hidden_layers", "hidden_size")
# Fine-tuned models add tokens to the vocabulary, and some releases pad it.
_SAME_VOCABULARY = 0.1


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Hyper-parameters for one model.

    Attributes:
        name: the preset's name.
        model: the models that it is for.
        method: the method that the source tuned them for.
        source: where they were published.
        note: what a user should know about them, or nothing.
        config: values of a configuration that identify the model; empty: no configuration does.
        hparams: the values, by their keys in a hyper-parameter file.
    """

    name: str
    model: str
    method: str
    source: str
    note: str = ""
    config: Mapping[str, Any]
    hparams: Mapping[str, Any]

    @property
    def origin(self) -> str:
        """The source, the method if it is another than PMET, and the note."""
        method = "" if self.method == "PMET" else f" (tuned for {self.method})"
        return f"{self.source}{method}" + (f"; {self.note}" if self.note else "")

    def fits(self, config: Any) -> bool:
        """Whether a transformers configuration is that of the preset's model."""
        found = _text_config(config)
        same = (
            getattr(found, key, None) == value
            for key, value in self.config.items()
            if key != "vocab_size"
        )
        return bool(self.config) and all(same) and self._same_vocabulary(found)

    def _same_vocabulary(self, config: Any) -> bool:
        size = self.config.get("vocab_size")
        found = getattr(config, "vocab_size", None) or 0
        return size is None or abs(found - size) <= _SAME_VOCABULARY * size


@cache
def all_presets() -> Mapping[str, Preset]:
    """All presets, by name."""
    text = (resources.files("pmet") / "presets.yaml").read_text(encoding="utf-8")
    return {name: Preset(name=name, **{"config": {}, **p}) for name, p in parse_yaml(text).items()}


def fitting_preset(config: Any) -> Preset | None:
    """The preset whose model has a configuration's family, depth, width and vocabulary, if any."""
    return next((preset for preset in all_presets().values() if preset.fits(config)), None)


def nearest_presets(config: Any, count: int = 3) -> list[Preset]:
    """The presets of the models that are most like a configuration's: same family, then size."""
    found = _text_config(config)

    def distance(preset: Preset) -> tuple[bool, float]:
        ratios = (preset.config[key] / (getattr(found, key, None) or 1) for key in _SHAPE)
        return (
            preset.config["model_type"] != getattr(found, "model_type", None),
            sum(abs(math.log(ratio)) for ratio in ratios),
        )

    return sorted((p for p in all_presets().values() if p.config), key=distance)[:count]


def shape_text(config: Any) -> str:
    """The values of a configuration that presets are found by, as text."""
    found = _text_config(config)
    values = (getattr(found, key, None) for key in ("model_type", *_SHAPE, "vocab_size"))
    return "{}, {} layers, {} wide, {} tokens".format(*values)


def depth_of(config: Any) -> int:
    """The number of layers of a transformers configuration's language model."""
    return int(_text_config(config).num_hidden_layers)


def _text_config(config: Any) -> Any:
    """The configuration of the language model that a multimodal model wraps, or itself."""
    find = getattr(config, "get_text_config", None)
    return config if find is None else find(decoder=True)
