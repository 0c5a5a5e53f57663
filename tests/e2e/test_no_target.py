"""A request whose target cannot be found is set aside, and the others are edited."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from pipeline.run import run_job
from pmet import EditRequest
from pmet.lookup import tokenize_prompt
from tests.conftest import GOLDEN
from tests.e2e.conftest import BAD_ROWS, GOOD_ROWS, facts, job

VICTIM = 5


def token_of_one_request_only() -> int:
    """A token of the victim's subject that no other request has."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "llama" / "model")
    used = [
        set(tokenize_prompt(tokenizer, EditRequest(f["prompt"], f["subject"], f["target_new"])).ids)
        for f in facts()
    ]
    others = set().union(*(ids for i, ids in enumerate(used) if i != VICTIM))
    return min(used[VICTIM] - others)


def test_not_a_number_costs_one_row_only(inputs: Path, local_ray: None, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(GOLDEN / "llama" / "model", base)
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][token_of_one_request_only()] = torch.nan
    save_file(weights, str(base / "model.safetensors"), metadata={"format": "pt"})
    result = run_job(
        job(
            inputs,
            str(tmp_path / "out"),
            "llama",
            model=str(base),
            corpus=None,
            second_moments=str(GOLDEN / "llama" / "second_moments.safetensors"),
        )
    )
    assert result.status == "complete"
    assert result.metrics["counts"]["edited"] == GOOD_ROWS - 1
    assert result.metrics["counts"]["rejected"] == len(BAD_ROWS) + 1
    rejected = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    (victim,) = [r for r in rejected if r["case_id"] == VICTIM]
    assert victim["reason"].startswith("no target: the loss is nan at evaluation 1")
    results = pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    assert VICTIM not in [r["case_id"] for r in results]
    edited = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert edited["model.layers.0.mlp.down_proj.weight"].isfinite().all()
