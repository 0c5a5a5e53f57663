"""PMET: precise, batched knowledge editing of transformer language models.

The method alone, in one process: requests and hyper-parameters in, weight changes out (Li et al.
2023, *PMET: Precise Model Editing in a Transformer*, arXiv 2308.08742). The pipeline package runs
the same parts on a cluster.

    requests = [EditRequest("The capital of {} is", "France", "Lyon")]
    hparams = PMETHyperParams.preset("gpt-j-6b")
    edit = compute_edit(model, tokenizer, requests, hparams, second_moments=moments)
    edit.apply(model)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pmet.errors import (
    ArchitectureError,
    ContextTemplateError,
    EditFileError,
    HyperParameterError,
    InputError,
    NotFiniteError,
    NotPositiveDefiniteError,
    NumericalError,
    OutOfMemoryError,
    PMETError,
    RequestError,
)

if TYPE_CHECKING:
    from pmet.delta import Edit
    from pmet.edit import compute_edit
    from pmet.evaluation import evaluate
    from pmet.hparams import PMETHyperParams
    from pmet.request import EditRequest
    from pmet.targets import Targets, compute_targets

__all__ = [
    "ArchitectureError",
    "ContextTemplateError",
    "Edit",
    "EditFileError",
    "EditRequest",
    "HyperParameterError",
    "InputError",
    "NotFiniteError",
    "NotPositiveDefiniteError",
    "NumericalError",
    "OutOfMemoryError",
    "PMETError",
    "PMETHyperParams",
    "RequestError",
    "Targets",
    "compute_edit",
    "compute_targets",
    "evaluate",
]

# Modules that need torch are imported on first use: a command that only reads files or reports an
# error does not wait for it.
_MODULES = {
    "Edit": "pmet.delta",
    "compute_edit": "pmet.edit",
    "PMETHyperParams": "pmet.hparams",
    "evaluate": "pmet.evaluation.metrics",
    "EditRequest": "pmet.request",
    "Targets": "pmet.targets.optimization",
    "compute_targets": "pmet.targets.optimization",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'pmet' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
