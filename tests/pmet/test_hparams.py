"""Hyper-parameter files: the published format, unchanged; anything wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pmet.errors import HyperParameterError
from pmet.hparams import PMETHyperParams
from tests.conftest import FAMILIES, GOLDEN

# The published GPT-J file has another module in the singular key: the plural one counts.
PUBLISHED = {
    "layers": [3, 4, 5, 6, 7, 8],
    "clamp_norm_factor": 0.75,
    "layer_selection": "all",
    "fact_token": "subject_last",
    "v_num_grad_steps": 30,
    "v_lr": 2e-1,
    "v_loss_layer": 27,
    "v_weight_decay": 0.5,
    "kl_factor": 1,
    "rewrite_module_tmp": "transformer.h.{}.attn.out_proj",
    "rewrite_module_tmps": ["transformer.h.{}.mlp.fc_out"],
    "layer_module_tmp": "transformer.h.{}",
    "mlp_module_tmp": "transformer.h.{}.mlp.fc_out",
    "attn_module_tmp": "transformer.h.{}.attn.out_proj",
    "ln_f_module": "transformer.ln_f",
    "lm_head_module": "lm_head",
    "mom2_adjustment": True,
    "mom2_update_weight": 6000,
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100000,
    "mom2_dtype": "float32",
    "nll_loss_factor": 1,
}


def written(path: Path, values: object) -> Path:
    path.write_text(json.dumps(values))
    return path


def test_a_published_file_is_read_unchanged(tmp_path: Path) -> None:
    hparams = PMETHyperParams.from_file(written(tmp_path / "h.json", PUBLISHED))
    assert hparams.target_layer == 8
    assert hparams.down_projection_template == "transformer.h.{}.mlp.fc_out"
    assert hparams.mom2_update_weight == 6000


@pytest.mark.parametrize("family", FAMILIES)
def test_the_golden_files_are_read(family: str) -> None:
    values = json.loads((GOLDEN / family / "hparams.json").read_text())
    hparams = PMETHyperParams.from_file(GOLDEN / family / "hparams.json")
    assert list(hparams.layers) == values["layers"]
    assert hparams.clamp_norm_factor == values["clamp_norm_factor"]


def test_yaml_says_the_same_as_json(tmp_path: Path) -> None:
    (tmp_path / "h.yaml").write_text("layers: [1, 2]\nv_lr: 0.5\nmom2_update_weight: 10\n")
    as_json = written(
        tmp_path / "h.json", {"layers": [1, 2], "v_lr": 0.5, "mom2_update_weight": 10}
    )
    assert PMETHyperParams.from_file(tmp_path / "h.yaml") == PMETHyperParams.from_file(as_json)


def test_the_presets_are_the_published_values() -> None:
    gptj, neox = PMETHyperParams.preset("gpt-j-6b"), PMETHyperParams.preset("gpt-neox-20b")
    assert (gptj.layers, gptj.clamp_norm_factor, gptj.mom2_update_weight) == (
        (3, 4, 5, 6, 7, 8),
        0.75,
        6000,
    )
    assert (neox.layers, neox.v_lr, neox.kl_factor) == ((6, 7, 8, 9, 10), 0.5, 0.8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v_lrr": 1}, "unknown key v_lrr"),
        ({"layers": []}, "layers"),
        ({"layers": [4, 3]}, "ascending order"),
        ({"v_lr": -1}, "v_lr"),
        ({"v_lr": float("inf")}, "v_lr"),
        ({"v_num_grad_steps": 0}, "v_num_grad_steps"),
        ({"fact_token": "last"}, "subject_last"),
        ({"rewrite_module_tmps": ["a.{}.x", "a.{}.y"]}, "FFN weights only"),
        ({"attn_module_tmp": "no place"}, "attn_module_tmp"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = written(tmp_path / "h.json", PUBLISHED | change)
    with pytest.raises(HyperParameterError, match=message) as error:
        PMETHyperParams.from_file(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"layers": ' + "[" * 100_000,
        "[" * 100_000,
        "a: " + "{a: " * 100_000,
        '{"layers": [' + "9" * 5000 + "]}",
        "layers: !!python/object/apply:os.system [touch ran]",
        "layers: [1]\0",
    ],
    ids=["json", "yaml list", "yaml mapping", "digits", "code", "nul"],
)
def test_what_would_harm_a_reader_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("h.yaml").write_text(text)
    with pytest.raises(HyperParameterError, match=r"^h\.yaml (is not JSON|cannot be read as YAML)"):
        PMETHyperParams.from_file("h.yaml")
    assert [p.name for p in tmp_path.iterdir()] == ["h.yaml"]


def test_aliases_of_aliases_are_not_multiplied(tmp_path: Path) -> None:
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 30)]
    (tmp_path / "h.yaml").write_text("\n".join(["l0: &l0 [x]", *levels]))
    with pytest.raises(HyperParameterError, match="line 2: aliases") as error:
        PMETHyperParams.from_file(tmp_path / "h.yaml")
    assert len(str(error.value)) < 100_000


def test_a_missing_key_a_missing_file_and_a_broken_file(tmp_path: Path) -> None:
    with pytest.raises(HyperParameterError, match="layers is missing"):
        PMETHyperParams.from_file(written(tmp_path / "a.json", {"v_lr": 0.1}))
    with pytest.raises(HyperParameterError, match="one of the presets gpt-j-6b"):
        PMETHyperParams.from_file(tmp_path / "none.json")
    (tmp_path / "b.json").write_text('{"layers": [1,')
    with pytest.raises(HyperParameterError, match=r"b\.json is not JSON .*fix its syntax"):
        PMETHyperParams.from_file(tmp_path / "b.json")
    with pytest.raises(HyperParameterError, match="there is no preset 'gpt-5'"):
        PMETHyperParams.preset("gpt-5")
