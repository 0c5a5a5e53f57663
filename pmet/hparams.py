"""Hyper-parameters, in the published file format.

The JSON files of PMET are read unchanged, and those of MEMIT, ROME, EMMET and AlphaEdit, which
share its keys; so is YAML with these keys. Keys of those methods and their tools that have no
meaning here are ignored and listed (``PMETHyperParams.ignored``). Any other unknown key is refused,
and so is any value that asks for something PMET does not do.
"""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    Strict,
    ValidationError,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pmet.errors import HyperParameterError
from pmet.presets import all_presets
from pmet.strict_json import RepeatedKeyError, parse_json
from pmet.yaml12 import YAMLTextError, parse_yaml

# Keys of published files that have no meaning here, by the method or tool that uses them.
_FOREIGN = {
    "EasyEdit": (
        "alg_name",
        "batch_size",
        "device",
        "fp16",
        "max_length",
        "model_name",
        "model_parallel",
        "stats_dir",
    ),
    "ROME": ("bias_update", "context_template_length_params", "dynamic", "dynamic_multiplier"),
    "R-ROME": ("enable_prompt_keys", "enable_random_prefix_keys", "original_implementation"),
    "EMMET": ("calculate_objective_value", "emmet_lambda", "update_norm_lambda"),
    "AlphaEdit": ("L2", "P_loc", "nullspace_threshold"),
    "SPHERE": ("cumulative_ratio", "suppression_strength"),
    "NSE": ("alpha", "max_iterations", "neuron_threshold", "upper_bound"),
    "EAMET": (
        "clamp_ks_factor",
        "cs_factor",
        "delta_init",
        "ks_bs",
        "mse_factor",
        "norm_factor",
        "tau",
        "weight_decay_method",
    ),
}
FOREIGN_KEYS = frozenset(key for keys in _FOREIGN.values() for key in keys)
# Read, but not a field: MEMIT selects among the layers, PMET edits each one.
_SELECTION = "layer_selection"
# The fields that are numbers of the method.
_NUMBERS = (
    "v_num_grad_steps",
    "v_lr",
    "v_weight_decay",
    "kl_factor",
    "nll_loss_factor",
    "clamp_norm_factor",
    "mom2_update_weight",
)
# Targets are optimised in float32, which holds 1e-38 to 3e38.
_SMALLEST, _LARGEST = 1e-30, 1e30
_MOST_SOLVES = 20
_SHOWN = 60


def _allowed(what: str) -> WrapValidator:
    """Replace any error of the type by a message with the value: ``what`` is allowed here."""

    def check(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError:
            context = {"value": _shown(value), "what": what}
            raise PydanticCustomError(
                "not_allowed", "{value} is not allowed; give {what}", context
            ) from None

    return WrapValidator(check)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _whole(value: Any) -> Any:
    """Convert a whole number such as 20.0, a float in JSON and YAML, or one of NumPy's, to int."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.__index__() if hasattr(value, "__index__") and type(value) is not bool else value


def _adjusted(value: bool) -> bool:
    if not value:
        raise ValueError(
            "false asks for an update without second moments, which PMET cannot do; set it to "
            "true, or remove the key"
        )
    return value


_Integer = Annotated[int, Strict(), BeforeValidator(_whole)]
_Layer = Annotated[_Integer, Field(ge=0, le=2**20)]
_Template = Annotated[str, Field(pattern=r"^[^{}]*\{\}[^{}]*$")]
_TEMPLATE = 'a module\'s name with one {} for the layer, as "model.layers.{}.mlp.down_proj"'

Layers = Annotated[
    tuple[_Layer, ...],
    Field(min_length=1),
    _allowed("a list of layer numbers from 0, as [3, 4, 5]"),
]
LayerOrNull = Annotated[_Layer | None, _allowed("a layer number, or null")]
Count = Annotated[_Integer, Field(ge=1, le=10**9), _allowed("a whole number from 1 to 1000000000")]
Positive = Annotated[
    float,
    Strict(),
    Field(ge=_SMALLEST, le=_LARGEST),
    _allowed(f"a number above 0, from {_SMALLEST:g} to {_LARGEST:g}"),
]
ShareOrNull = Annotated[
    Annotated[float, Strict(), Field(ge=_SMALLEST, le=_LARGEST)] | None,
    _allowed(f"a number above 0, from {_SMALLEST:g} to {_LARGEST:g}, or null"),
]
FromZero = Annotated[
    float, Strict(), Field(ge=0, le=_LARGEST), _allowed(f"a number from 0 to {_LARGEST:g}")
]
Text = Annotated[str, _allowed("text")]
FactToken = Annotated[
    Literal["subject_last"],
    _allowed("subject_last, the only token at which PMET looks up a fact"),
]
Adjustment = Annotated[
    Annotated[bool, Strict(), _allowed("true")],
    AfterValidator(_adjusted),
]
Spread = Literal["sqrt", "linear", "none"]
Solves = Annotated[
    _Integer, Field(ge=1, le=_MOST_SOLVES), _allowed(f"a whole number from 1 to {_MOST_SOLVES}")
]
SpreadName = Annotated[Spread, _allowed("sqrt, linear or none")]
ModuleTemplate = Annotated[_Template | None, _allowed(_TEMPLATE)]
ModuleName = Annotated[str | None, _allowed("a module's name, or null")]
ModuleTemplates = Annotated[tuple[_Template, ...] | None, _allowed(f"a list with {_TEMPLATE}")]


class PMETHyperParams(BaseModel):
    """The parameters of the method; names as in the published files.

    Module names may be omitted for a model of a known family (see ``pmet.model.architecture``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    _ignored: tuple[str, ...] = PrivateAttr(default=())

    layers: Layers
    """The edited layers, ascending; the last one is the target layer z."""

    v_num_grad_steps: Count = 30
    """Maximum number of evaluations of the loss per target; the last one takes no step."""
    v_lr: Positive = 0.2
    """Adam's step size for the two free vectors."""
    v_weight_decay: FromZero = 0.5
    """w: weight of ‖δ‖/‖v‖², for both vectors."""
    kl_factor: FromZero = 1.0
    """κ: weight of the KL term."""
    nll_loss_factor: Positive = 1.0
    """φ: weight of the targets' negative log-likelihood."""
    clamp_norm_factor: Positive = 0.75
    """Radius of the ball that holds each δ, in units of ‖v‖."""
    v_loss_layer: LayerOrNull = None
    """The layer that the loss is read from: the model's last one, or omitted."""
    fact_token: FactToken = "subject_last"  # noqa: S105
    """The token at which the fact is looked up."""

    mom2_update_weight: Positive = 15000.0
    """λ: weight of the second moment in the update."""
    mom2_update_share: ShareOrNull = None
    """λ as a share of the scale of the keys (`pmet.update.weight`), instead of a number."""
    spread: SpreadName = "sqrt"
    """How the residual is shared out over the layers: with n of them left, a layer takes 1/√n of
    what remains (``sqrt``, as published), 1/n (``linear``, as in MEMIT) or all (``none``)."""
    solves: Solves = 1
    """How often the layers are solved for, lowest first, one time after the other. The published
    method does it once; each further time takes up what the times before have left."""
    mom2_adjustment: Adjustment = True
    """Whether the update weighs second moments; PMET always does."""
    mom2_dataset: Text = "wikipedia"
    mom2_n_samples: Count = 100000
    mom2_dtype: Text = "float32"

    rewrite_module_tmps: ModuleTemplates = None
    """The module whose weight is edited: the FFN down-projection, as ``a.{}.b``."""
    rewrite_module_tmp: ModuleTemplate = None
    """The same, read only if ``rewrite_module_tmps`` is missing (older files)."""
    layer_module_tmp: ModuleTemplate = None
    mlp_module_tmp: ModuleTemplate = None
    attn_module_tmp: ModuleTemplate = None
    """The attention output projection, where δ_a is added; or the attention block around it."""
    ln_f_module: ModuleName = None
    lm_head_module: ModuleName = None

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if any(a >= b for a, b in pairwise(layers)):
            raise ValueError(f"{list(layers)}: list the layers in ascending order, each once")
        return layers

    @model_validator(mode="after")
    def _one_rewritten_module(self) -> PMETHyperParams:
        if self.rewrite_module_tmps is not None and len(self.rewrite_module_tmps) != 1:
            raise ValueError(
                "rewrite_module_tmps names "
                f"{len(self.rewrite_module_tmps)} modules: PMET changes only FFN weights, "
                "name just the FFN down-projection"
            )
        return self

    @model_validator(mode="after")
    def _one_weight(self) -> PMETHyperParams:
        given = {"mom2_update_weight", "mom2_update_share"} <= self.model_fields_set
        if given and self.mom2_update_share is not None:
            raise ValueError(
                "mom2_update_weight and mom2_update_share both say what λ is: give one of them"
            )
        return self

    @property
    def ignored(self) -> tuple[str, ...]:
        """Keys in the file that belong to other methods and tools, and have no effect here."""
        return self._ignored

    @property
    def defaulted(self) -> dict[str, float]:
        """The numbers of the method that the file omits, with the values used for them."""
        given = set(self.model_fields_set)
        if self.mom2_update_share is not None:
            given.add("mom2_update_weight")
        return {key: getattr(self, key) for key in _NUMBERS if key not in given}

    @property
    def target_layer(self) -> int:
        """Layer z, whose FFN output gets a target."""
        return self.layers[-1]

    @property
    def down_projection_template(self) -> str | None:
        """The template of the edited modules, if the file names it."""
        if self.rewrite_module_tmps:
            return self.rewrite_module_tmps[0]
        return self.rewrite_module_tmp

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], *, source: str = "hyper-parameters"
    ) -> PMETHyperParams:
        """Validate ``values`` and build hyper-parameters from them.

        Raises:
            HyperParameterError: one line with all errors, naming ``source``.
        """
        if not isinstance(values, dict):
            raise HyperParameterError(f"{source}: expected a mapping of names to values")
        ours = {k: v for k, v in values.items() if k in cls.model_fields}
        problems = [*_unknown(values), *_of_selection(values)]
        try:
            hparams = cls(**ours)
        except ValidationError as error:
            problems += map(_problem, error.errors())
        if problems:
            raise HyperParameterError(f"{source}: {'; '.join(problems)}")
        hparams._ignored = tuple(key for key in values if key in FOREIGN_KEYS)
        return hparams

    @classmethod
    def from_text(cls, text: str, *, source: str) -> PMETHyperParams:
        """Read JSON or YAML; ``source`` is the file's name, for messages.

        Raises:
            HyperParameterError: the text cannot be parsed, or its content is wrong.
        """
        try:
            values = parse_json(text) if text.lstrip().startswith("{") else parse_yaml(text)
        except RepeatedKeyError as error:
            raise HyperParameterError(f"{source}: {error}") from None
        except YAMLTextError as error:
            raise HyperParameterError(f"{source} cannot be read as YAML: {error}") from None
        except (ValueError, RecursionError) as error:
            raise HyperParameterError(f"{source} is not JSON ({error}); fix its syntax") from None
        return cls.from_dict(values, source=source)

    @classmethod
    def from_file(cls, path: str | Path) -> PMETHyperParams:
        """Read a published JSON file, or YAML with the same keys.

        Warns:
            UserWarning: the file has ignored keys; the message lists them.

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
        hparams = cls.from_text(text, source=str(path))
        if sentence := ignored_sentence(hparams):
            warnings.warn(f"{path}: {sentence}", stacklevel=2)
        return hparams

    @classmethod
    def presets(cls) -> list[str]:
        """The names of the presets."""
        return sorted(all_presets())

    @classmethod
    def preset(cls, name: str) -> PMETHyperParams:
        """The published values for a model, for example ``gpt-j-6b``.

        Raises:
            HyperParameterError: there is no such preset.
        """
        if name not in all_presets():
            raise HyperParameterError(
                f"there is no preset {name!r}; there are {', '.join(cls.presets())}, "
                "or give a hyper-parameter file"
            )
        return cls.from_dict(dict(all_presets()[name].hparams), source=f"preset {name}")


def ignored_sentence(hparams: PMETHyperParams) -> str | None:
    """A sentence for the user about the ignored keys; None if there are none."""
    if not hparams.ignored:
        return None
    keys = ", ".join(hparams.ignored)
    return f"these hyper-parameters of other methods and tools have no effect here: {keys}"


def _of_selection(values: Mapping[str, Any]) -> list[str]:
    """The error in the choice of layers, if any."""
    selection = values.get(_SELECTION, "all")
    if selection == "all":
        return []
    return [f"{_SELECTION}: {_shown(selection)} is not allowed; give all: each layer is edited"]


def _problem(item: Any) -> str:
    where = ".".join(map(str, item["loc"]))
    if item["type"] == "missing":
        return f"{where} is missing"
    said = item["msg"].removeprefix("Value error, ")
    return f"{where}: {said}" if where else said


def _unknown(values: Mapping[Any, Any]) -> Iterator[str]:
    known = list(PMETHyperParams.model_fields)
    for key in map(str, values):
        if key not in {*known, *FOREIGN_KEYS, _SELECTION}:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            yield f"unknown key {_shown(key)[1:-1]}; {hint}"
