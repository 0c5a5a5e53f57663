"""A job's hyper-parameters: of a file, a preset by name, or the preset that fits the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from pipeline.errors import JobError, NoPresetError
from pipeline.hyper_parameters import chosen_hparams, load_hparams
from pmet.hparams import PMETHyperParams

LLAMA2 = transformers.LlamaConfig()


def test_a_preset_that_fits_is_taken_and_named_with_its_source() -> None:
    hparams, origin = chosen_hparams(None, LLAMA2)
    assert hparams == PMETHyperParams.preset("llama-2-7b")
    assert origin == (
        "preset llama-2-7b, which fits the model's configuration: "
        "https://github.com/xpq-tech/PMET/issues/5"
    )


def test_values_of_another_method_are_said_to_be() -> None:
    _, origin = chosen_hparams(None, transformers.MistralConfig())
    assert origin.endswith("hparams/MEMIT/mistral-7b.yaml (tuned for MEMIT)")


def test_what_the_job_names_wins(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("layers: [1, 2]\n")
    hparams, origin = chosen_hparams(str(tmp_path / "own.yaml"), LLAMA2)
    assert (hparams.layers, origin) == ((1, 2), f"file {tmp_path}/own.yaml")
    hparams, origin = chosen_hparams("gpt-j-6b", LLAMA2)
    assert hparams.layers == (3, 4, 5, 6, 7, 8)
    assert origin.startswith("preset gpt-j-6b: https://github.com/xpq-tech/PMET, edit/hparams/")


def test_without_a_fitting_preset_the_message_names_the_nearest_and_the_way_out() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=16, hidden_size=2048, vocab_size=128256)
    with pytest.raises(NoPresetError) as refused:
        chosen_hparams(None, config)
    assert refused.value.depth == 16
    assert str(refused.value) == (
        "hparams is missing, and no preset fits this model (llama, 16 layers, 2048 wide, 128256 "
        "tokens); the nearest are llama-3.2-3b (28 layers, 3072 wide), deepseek-7b (30 layers, "
        "4096 wide), llama-2-7b (32 layers, 4096 wide): name one of them, or write a file with at "
        "least layers, as layers: [4, 5, 6, 7, 8] (docs/jobs.md#hyper-parameters); pmet tune "
        "finds them"
    )


SMALL = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64, vocab_size=100)


def tuned_for(digest: str, folder: Path) -> str:
    (folder / "hparams.yaml").write_text("layers: [0, 1]\nmom2_update_share: 0.2\n")
    (folder / "tune.json").write_text(json.dumps({"about": {"model": digest}}))
    return str(folder / "second_moments")


def test_auto_prefers_a_preset_to_what_was_found(tmp_path: Path) -> None:
    moments = tuned_for("abc", tmp_path)
    preset = PMETHyperParams.preset("llama-2-7b")
    assert chosen_hparams("auto", LLAMA2, second_moments=moments)[0] == preset
    found, origin = chosen_hparams("auto", SMALL, second_moments=moments, digest=lambda: "abc")
    assert (found.layers, found.mom2_update_share) == ((0, 1), 0.2)
    assert origin == f"file {tmp_path}/hparams.yaml, found by pmet tune"


def test_auto_refuses_what_was_found_for_another_model(tmp_path: Path) -> None:
    moments = tuned_for("abc", tmp_path)
    with pytest.raises(JobError, match=r"hparams\.yaml was found for another model; run pmet tune"):
        chosen_hparams("auto", SMALL, second_moments=moments, digest=lambda: "other")
    (tmp_path / "tune.json").write_text("[]")
    with pytest.raises(JobError, match="was found for another model"):
        chosen_hparams("auto", SMALL, second_moments=moments, digest=lambda: "abc")


def test_auto_without_either_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="beside the job's second_moments; find one with pmet tune"):
        chosen_hparams("auto", SMALL)
    with pytest.raises(JobError, match=rf"there is none in {tmp_path}; find one with pmet tune"):
        chosen_hparams("auto", SMALL, second_moments=f"{tmp_path}/second_moments/")


def test_a_name_that_is_neither_preset_nor_file_is_refused() -> None:
    with pytest.raises(JobError, match=r"hparams: gpt-5 cannot be read .*name a file or a preset"):
        load_hparams("gpt-5")
