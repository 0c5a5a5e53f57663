"""Hyper-parameters, in the published file format.

The JSON files of PMET (and of MEMIT, whose keys are a subset) are read unchanged; YAML is read
with the same keys. Keys that say nothing about the method here are accepted and ignored, any
other unknown key is refused.
"""

from __future__ import annotations

import json
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pmet.errors import HyperParameterError

# What other tools keep in the same files: where their model, their statistics and their device are.
IGNORED_KEYS = frozenset(
    {
        "alg_name",
        "batch_size",
        "device",
        "fp16",
        "layer_selection",
        "max_length",
        "model_name",
        "model_parallel",
        "stats_dir",
    }
)

ModuleTemplate = Annotated[str, Field(pattern=r"^[^{}]*\{\}[^{}]*$")]
Layer = Annotated[int, Field(ge=0)]


class PMETHyperParams(BaseModel):
    """What the method can be told; names as in the published files.

    Module names may be left out for a model of a known family (see ``pmet.architecture``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    layers: Annotated[tuple[Layer, ...], Field(min_length=1)]
    """The edited layers, ascending; the last one is the target layer z."""

    v_num_grad_steps: int = Field(default=30, ge=1)
    """Most evaluations of the loss per target; the last one takes no step."""
    v_lr: float = Field(default=0.2, gt=0)
    """Adam's step size for the two free vectors."""
    v_weight_decay: float = Field(default=0.5, ge=0)
    """w: weight of ‖δ‖/‖v‖², for both vectors."""
    kl_factor: float = Field(default=1.0, ge=0)
    """κ: weight of the KL term."""
    nll_loss_factor: float = Field(default=1.0, gt=0)
    """φ: weight of the targets' negative log-likelihood."""
    clamp_norm_factor: float = Field(default=0.75, gt=0)
    """Radius of the ball that holds each δ, in units of ‖v‖."""
    v_loss_layer: int | None = Field(default=None, ge=0)
    """The layer that the loss is read from: the model's last one, or left out."""
    fact_token: Literal["subject_last"] = "subject_last"  # noqa: S105
    """Which token the fact is looked up at."""

    mom2_update_weight: float = Field(default=15000.0, gt=0)
    """λ: weight of the second moment in the update."""
    mom2_adjustment: bool = True
    mom2_dataset: str = "wikipedia"
    mom2_n_samples: int = Field(default=100000, ge=1)
    mom2_dtype: str = "float32"

    rewrite_module_tmps: tuple[ModuleTemplate, ...] | None = None
    """The module whose weight is edited: the FFN down-projection, as ``a.{}.b``."""
    rewrite_module_tmp: ModuleTemplate | None = None
    """The same, read only where ``rewrite_module_tmps`` is missing (older files)."""
    layer_module_tmp: ModuleTemplate | None = None
    mlp_module_tmp: ModuleTemplate | None = None
    attn_module_tmp: ModuleTemplate | None = None
    """The attention output projection, where δ_a is added."""
    ln_f_module: str | None = None
    lm_head_module: str | None = None

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if any(a >= b for a, b in pairwise(layers)):
            raise ValueError("list the layers in ascending order, each once")
        return layers

    @model_validator(mode="after")
    def _one_rewritten_module(self) -> PMETHyperParams:
        if self.rewrite_module_tmps is not None and len(self.rewrite_module_tmps) != 1:
            raise ValueError(
                "rewrite_module_tmps names "
                f"{len(self.rewrite_module_tmps)} modules: PMET changes FFN weights only, "
                "name just the FFN down-projection"
            )
        return self

    @property
    def target_layer(self) -> int:
        """Layer z, whose FFN output is given a target."""
        return self.layers[-1]

    @property
    def down_projection_template(self) -> str | None:
        """Where the edited weights are, if the file says."""
        if self.rewrite_module_tmps:
            return self.rewrite_module_tmps[0]
        return self.rewrite_module_tmp

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], *, source: str = "hyper-parameters"
    ) -> PMETHyperParams:
        """Check ``values`` and make them hyper-parameters.

        Raises:
            HyperParameterError: one line for all that is wrong, naming ``source``.
        """
        if not isinstance(values, dict):
            raise HyperParameterError(f"{source}: expected a mapping of names to values")
        try:
            return cls(**{str(k): v for k, v in values.items() if k not in IGNORED_KEYS})
        except ValidationError as error:
            raise HyperParameterError(f"{source}: {_in_one_line(error)}") from None

    @classmethod
    def from_text(cls, text: str, *, source: str) -> PMETHyperParams:
        """Read JSON or YAML; ``source`` is the file's name, for messages.

        Raises:
            HyperParameterError: the text cannot be parsed, or its content is wrong.
        """
        try:
            # JSON first: YAML 1.1 reads 1e-3 as a string.
            values = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise HyperParameterError(
                f"{source} is neither JSON nor YAML ({reason}); fix its syntax"
            ) from None
        return cls.from_dict(values, source=source)

    @classmethod
    def from_file(cls, path: str | Path) -> PMETHyperParams:
        """Read a published JSON file, or YAML with the same keys.

        Raises:
            HyperParameterError: the file is missing, unreadable or wrong.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise HyperParameterError(
                f"hyper-parameters {path} cannot be read ({error}); "
                f"give a file or one of the presets {', '.join(cls.presets())}"
            ) from None
        return cls.from_text(text, source=str(path))

    @classmethod
    def presets(cls) -> list[str]:
        """Names that ``preset`` knows."""
        folder = resources.files("pmet") / "presets"
        return sorted(
            f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")
        )

    @classmethod
    def preset(cls, name: str) -> PMETHyperParams:
        """The published values for a model, for example ``gpt-j-6b``.

        Raises:
            HyperParameterError: there is no such preset.
        """
        if name not in cls.presets():
            raise HyperParameterError(
                f"there is no preset {name!r}; there are {', '.join(cls.presets())}, "
                "or give a hyper-parameter file"
            )
        text = (resources.files("pmet") / "presets" / f"{name}.json").read_text(encoding="utf-8")
        return cls.from_text(text, source=f"preset {name}")


def _in_one_line(error: ValidationError) -> str:
    parts = []
    for item in error.errors():
        where = ".".join(str(p) for p in item["loc"]) or "the file"
        if item["type"] == "extra_forbidden":
            known = ", ".join(PMETHyperParams.model_fields)
            parts.append(f"unknown key {where} (known: {known})")
        elif item["type"] == "missing":
            parts.append(f"{where} is missing")
        else:
            parts.append(f"{where}: {item['msg'].removeprefix('Value error, ')}")
    return "; ".join(parts)
