"""Presets: valid values with a source, found by a model's configuration, listed in the docs."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from pmet.hparams import PMETHyperParams
from pmet.presets import Preset, all_presets, fitting_preset, nearest_presets, shape_text
from tests.conftest import ROOT

LLAMA = {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096}

# The configurations as published on the hub.
CONFIGS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "gpt2-xl": (transformers.GPT2Config, {"n_layer": 48, "n_embd": 1600}),
    "gpt-j-6b": (transformers.GPTJConfig, {}),
    "gpt-neox-20b": (transformers.GPTNeoXConfig, {}),
    "llama-2-7b": (transformers.LlamaConfig, {}),
    "llama-2-13b": (
        transformers.LlamaConfig,
        {"num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 13824},
    ),
    "llama-3-8b": (
        transformers.LlamaConfig,
        {"vocab_size": 128256, "intermediate_size": 14336},
    ),
    "llama-3.2-3b": (
        transformers.LlamaConfig,
        {"num_hidden_layers": 28, "hidden_size": 3072, "vocab_size": 128256},
    ),
    "mistral-7b": (transformers.MistralConfig, {"vocab_size": 32768}),
    "qwen2.5-3b": (transformers.Qwen2Config, {"num_hidden_layers": 36, "hidden_size": 2048}),
    "qwen2.5-7b": (transformers.Qwen2Config, {"num_hidden_layers": 28, "hidden_size": 3584}),
    "gemma-7b": (transformers.GemmaConfig, {}),
    "gemma-2-9b": (transformers.Gemma2Config, {"num_hidden_layers": 42, "hidden_size": 3584}),
    "phi-1.5": (transformers.PhiConfig, {}),
    "falcon-7b": (transformers.FalconConfig, {}),
    "deepseek-7b": (transformers.LlamaConfig, {"num_hidden_layers": 30, "vocab_size": 102400}),
    "smollm2-135m": (
        transformers.LlamaConfig,
        {"num_hidden_layers": 30, "hidden_size": 576, "vocab_size": 49152},
    ),
}


@pytest.mark.parametrize("name", all_presets())
def test_each_preset_is_complete_and_names_its_source(name: str) -> None:
    preset, hparams = all_presets()[name], PMETHyperParams.preset(name)
    assert preset.source.startswith("https://") or preset.source == "measured by this project"
    assert preset.method in ("PMET", "MEMIT")
    assert not hparams.ignored
    assert set(hparams.defaulted) <= {"nll_loss_factor"}
    depth = preset.config.get("num_hidden_layers")
    assert depth is None or hparams.target_layer < depth


@pytest.mark.parametrize("name", CONFIGS)
def test_a_preset_is_found_by_the_configuration_of_its_model(name: str) -> None:
    kind, values = CONFIGS[name]
    found = fitting_preset(kind(**values))
    assert found is not None
    assert found.name == name


def test_every_preset_with_a_configuration_is_found_by_one() -> None:
    assert set(CONFIGS) == {name for name, preset in all_presets().items() if preset.config}


def test_no_two_presets_fit_one_model() -> None:
    for kind, values in CONFIGS.values():
        assert sum(preset.fits(kind(**values)) for preset in all_presets().values()) == 1


def test_added_tokens_do_not_hide_a_model_and_another_vocabulary_does() -> None:
    added = transformers.LlamaConfig(vocab_size=32016)
    assert fitting_preset(added) is all_presets()["llama-2-7b"]
    assert fitting_preset(transformers.LlamaConfig(vocab_size=64000)) is None


def test_the_language_model_of_a_multimodal_model_counts() -> None:
    text = transformers.LlamaConfig()
    wrapped = transformers.LlavaConfig(text_config=text)
    assert fitting_preset(wrapped) is all_presets()["llama-2-7b"]


def test_the_nearest_presets_are_of_the_same_family_and_of_like_size() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=16, hidden_size=2048, vocab_size=128256)
    nearest = nearest_presets(config)
    assert nearest[0].name == "llama-3.2-3b"
    assert {preset.config["model_type"] for preset in nearest} == {"llama"}
    assert shape_text(config) == "llama, 16 layers, 2048 wide, 128256 tokens"


def test_the_docs_list_the_presets_as_they_are() -> None:
    text = (ROOT / "docs" / "jobs.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `") and "github" in line]
    rows += [line for line in text.splitlines() if "measured by this project" in line]
    assert rows == [_row(preset) for preset in all_presets().values()]


def _row(preset: Preset) -> str:
    hparams = PMETHyperParams.preset(preset.name)
    layers = f"{hparams.layers[0]}–{hparams.layers[-1]}"
    first, _, path = preset.source.partition(", ")
    repository = first.removeprefix("https://github.com/")
    source = f"[{repository}]({first})" if first.startswith("https") else first
    cells = [
        f"`{preset.name}`",
        preset.model + ("" if preset.config else " (by name only)"),
        layers,
        f"{hparams.v_lr:g}",
        f"{hparams.v_num_grad_steps}",
        f"{hparams.clamp_norm_factor:g}",
        f"{hparams.kl_factor:g}",
        f"{hparams.mom2_update_weight:g}",
        f"{source}{f' `{path}`' if path else ''}"
        + ("" if preset.method == "PMET" else f", tuned for {preset.method}"),
    ]
    return f"| {' | '.join(cells)} |"
