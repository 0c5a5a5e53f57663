"""What all tests share: the golden numbers, the CounterFact model, and a quiet machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from pmet.hparams import PMETHyperParams
from pmet.request import EditRequest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
COUNTERFACT = ROOT.parent / "shared" / "counterfact"
FAMILIES = ("gpt2", "gptj", "llama")

# One thread: sums in one order, and tests that run side by side do not fight for the cores.
torch.set_num_threads(1)
logging.disable_progress_bar()


@dataclass(frozen=True)
class Golden:
    """A model, a problem, and what the published implementation makes of it."""

    family: str
    model: nn.Module
    tokenizer: Any
    requests: list[EditRequest]
    hparams: PMETHyperParams
    context_templates: list[list[str]]
    second_moments: dict[int, Tensor]
    expected: dict[str, Tensor]

    @property
    def expected_deltas(self) -> dict[str, Tensor]:
        """By parameter name."""
        prefix = "delta."
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.expected.items()
            if name.startswith(prefix)
        }


def load(folder: Path, requests: list[EditRequest]) -> Golden:
    """Read one folder of golden numbers."""
    hparams = PMETHyperParams.from_file(folder / "hparams.json")
    module = str(hparams.down_projection_template)
    moments = load_file(folder / "second_moments.safetensors")
    return Golden(
        family=folder.name,
        model=AutoModelForCausalLM.from_pretrained(folder / "model").eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder / "model"),
        requests=requests,
        hparams=hparams,
        context_templates=json.loads((folder / "context_templates.json").read_text("utf-8")),
        second_moments={layer: moments[module.format(layer)] for layer in hparams.layers},
        expected=load_file(folder / "expected.safetensors"),
    )


@cache
def load_golden(family: str) -> Golden:
    """The golden numbers of one family; the model is shared, whoever edits it undoes it."""
    rows = json.loads((GOLDEN / family / "requests.json").read_text("utf-8"))
    requests = [
        EditRequest(row["prompt"], row["subject"], row["target_new"]["str"], case_id=row["case_id"])
        for row in rows
    ]
    return load(GOLDEN / family, requests)


@pytest.fixture(scope="session", params=FAMILIES)
def golden(request: pytest.FixtureRequest) -> Golden:
    """The golden numbers of each family in turn."""
    return load_golden(request.param)


@pytest.fixture(scope="session")
def load_numbers() -> Callable[[Path, list[EditRequest]], Golden]:
    """Reads a folder of expected numbers that is laid out as the golden ones are."""
    return load


@pytest.fixture(scope="session")
def golden_tokenizer() -> Any:
    """The byte-level tokenizer of 700 tokens that the golden models share."""
    return load_golden("gpt2").tokenizer


@pytest.fixture(scope="session")
def counterfact_folder() -> Path:
    """Where the CounterFact model and its numbers lie, beside the checkout."""
    if not (COUNTERFACT / "expected.safetensors").is_file():
        pytest.skip("the CounterFact model is not at ../shared/counterfact beside the checkout")
    return COUNTERFACT
