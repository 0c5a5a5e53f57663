"""Hyper-parameter files: the published format, unchanged; anything wrong is named."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmet.errors import HyperParameterError
from pmet.hparams import PMETHyperParams
from tests.conftest import FAMILIES, GOLDEN

# The published GPT-J file has another module in the singular key; the plural one is used.
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

# MEMIT's files: the singular key, and blocks where PMET names the projections.
MEMIT = {key: value for key, value in PUBLISHED.items() if key != "nll_loss_factor"} | {
    "rewrite_module_tmp": "transformer.h.{}.mlp.fc_out",
    "mlp_module_tmp": "transformer.h.{}.mlp",
    "attn_module_tmp": "transformer.h.{}.attn",
}
del MEMIT["rewrite_module_tmps"]
EASYEDIT = """\
alg_name: "{method}"
model_name: "./hugging_cache/gpt-j-6B"
stats_dir: "./data/stats"
device: 0
layers: [3, 4, 5, 6, 7, 8]
clamp_norm_factor: 0.75
layer_selection: "all"
fact_token: "subject_last"
v_num_grad_steps: 25
v_lr: 5e-1
v_loss_layer: 27
v_weight_decay: 1e-3
kl_factor: 0.0625
mom2_adjustment: true
mom2_update_weight: 15000
rewrite_module_tmp: "transformer.h.{{}}.mlp.fc_out"
layer_module_tmp: "transformer.h.{{}}"
mlp_module_tmp: "transformer.h.{{}}.mlp"
attn_module_tmp: "transformer.h.{{}}.attn"
ln_f_module: "transformer.ln_f"
lm_head_module: "lm_head"
mom2_dataset: "wikipedia"
mom2_n_samples: 100000
mom2_dtype: "float32"
{more}
"""
OF_EASYEDIT = ("alg_name", "model_name", "stats_dir", "device")


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


@pytest.mark.parametrize(
    ("more", "ignored"),
    [
        ({}, ()),
        ({"model_name": "gpt2-xl", "nullspace_threshold": 2e-2, "L2": 10}, ...),
        ({"calculate_objective_value": False, "update_norm_lambda": 0, "emmet_lambda": 0.1}, ...),
        ({"model_name": "x", "alpha": 15, "upper_bound": 100, "neuron_threshold": 0.8}, ...),
    ],
    ids=["MEMIT", "AlphaEdit", "EMMET", "NSE"],
)
def test_files_of_other_methods_are_read_and_what_is_ignored_is_listed(
    tmp_path: Path, more: dict[str, Any], ignored: Any
) -> None:
    path = written(tmp_path / "h.json", MEMIT | more)
    with warnings.catch_warnings(record=True) as caught:
        hparams = PMETHyperParams.from_file(path)
    assert hparams.down_projection_template == "transformer.h.{}.mlp.fc_out"
    assert hparams.ignored == (tuple(more) if ignored is ... else ignored)
    assert hparams.defaulted == {"nll_loss_factor": 1.0}
    # Ignored keys are not part of the digest.
    assert hparams.model_dump() == PMETHyperParams.from_dict(MEMIT).model_dump()
    said = [str(warning.message) for warning in caught]
    expected = "these hyper-parameters of other methods and tools have no effect here"
    assert said == ([f"{path}: {expected}: {', '.join(more)}"] if more else [])


def test_a_file_of_rome_is_read(tmp_path: Path) -> None:
    rome = MEMIT | {"layers": [5], "clamp_norm_factor": 4, "context_template_length_params": [[5]]}
    for key in ("layer_selection", "mom2_update_weight"):
        del rome[key]
    hparams = PMETHyperParams.from_dict(rome)
    assert (hparams.target_layer, hparams.clamp_norm_factor) == (5, 4)
    assert hparams.ignored == ("context_template_length_params",)
    assert hparams.defaulted == {"nll_loss_factor": 1.0, "mom2_update_weight": 15000.0}


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("MEMIT", {"model_parallel": "false"}),
        ("AlphaEdit", {"P_loc": "./p.pt", "nullspace_threshold": "2e-2", "L2": "10"}),
        ("EMMET", {"update_norm_lambda": "0", "emmet_lambda": "0.1", "model_parallel": "false"}),
    ],
)
def test_yaml_files_of_easyedit_are_read(method: str, more: dict[str, str]) -> None:
    lines = "\n".join(f"{key}: {value}" for key, value in more.items())
    text = EASYEDIT.format(method=method, more=lines)
    hparams = PMETHyperParams.from_text(text, source="h.yaml")
    # PyYAML reads 5e-1 and 1e-3 as text.
    assert (hparams.v_lr, hparams.v_weight_decay) == (0.5, 0.001)
    assert hparams.ignored == (*OF_EASYEDIT, *more)


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


NUMBER = "is not allowed; give a number above 0, from 1e-30 to 1e\\+30"
LAYERS = r"is not allowed; give a list of layer numbers from 0, as \[3, 4, 5\]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v_lrr": 1}, r"unknown key v_lrr; did you mean v_lr\?"),
        ({"lr": 1}, r"unknown key lr; did you mean v_lr\?"),
        ({"layer": [1]}, r"unknown key layer; did you mean layers\?"),
        ({"zzz": 1}, "unknown key zzz; known are layers, v_num_grad_steps, "),
        ({"z\ud800\n": 1}, r"unknown key z\\ud800\\n; known are"),
        ({"layers": []}, rf"layers: \[\] {LAYERS}"),
        ({"layers": [True]}, rf"layers: \[true\] {LAYERS}"),
        ({"layers": ["17"]}, rf'layers: \["17"\] {LAYERS}'),
        ({"layers": [[17]]}, rf"layers: \[\[17\]\] {LAYERS}"),
        ({"layers": [-1, 2]}, rf"layers: \[-1, 2\] {LAYERS}"),
        ({"layers": [1e300]}, rf"layers: \[1e\+300\] {LAYERS}"),
        ({"layers": 17}, f"layers: 17 {LAYERS}"),
        ({"layers": "17"}, f'layers: "17" {LAYERS}'),
        ({"layers": None}, f"layers: null {LAYERS}"),
        ({"layers": [4, 3]}, r"layers: \[4, 3\]: list the layers in ascending order, each once"),
        ({"layers": [3, 3]}, r"layers: \[3, 3\]: list the layers in ascending order, each once"),
        ({"v_lr": -1}, f"v_lr: -1 {NUMBER}"),
        ({"v_lr": 0}, f"v_lr: 0 {NUMBER}"),
        ({"v_lr": True}, f"v_lr: true {NUMBER}"),
        ({"v_lr": "0.2"}, f'v_lr: "0.2" {NUMBER}'),
        ({"v_lr": float("inf")}, f"v_lr: Infinity {NUMBER}"),
        ({"v_lr": 1e300}, rf"v_lr: 1e\+300 {NUMBER}"),
        ({"clamp_norm_factor": 0}, f"clamp_norm_factor: 0 {NUMBER}"),
        ({"clamp_norm_factor": None}, f"clamp_norm_factor: null {NUMBER}"),
        ({"nll_loss_factor": 1e-300}, f"nll_loss_factor: 1e-300 {NUMBER}"),
        ({"spread": "even"}, 'spread: "even" is not allowed; give sqrt, linear or none'),
        (
            {"mom2_update_share": 0},
            r"mom2_update_share: 0 is not allowed; give a number above 0, from 1e-30 to 1e\+30, or",
        ),
        (
            {"mom2_update_share": 0.5, "mom2_update_weight": 10},
            "mom2_update_weight and mom2_update_share both say what λ is: give one of them",
        ),
        ({"solves": 0}, "solves: 0 is not allowed; give a whole number from 1 to 20"),
        ({"solves": 21}, "solves: 21 is not allowed; give a whole number from 1 to 20"),
        ({"spread": None}, "spread: null is not allowed; give sqrt, linear or none"),
        ({"mom2_update_weight": [15000]}, rf"mom2_update_weight: \[15000\] {NUMBER}"),
        ({"kl_factor": -0.1}, "kl_factor: -0.1 is not allowed; give a number from 0 to"),
        ({"v_weight_decay": float("nan")}, "v_weight_decay: NaN is not allowed"),
        ({"v_num_grad_steps": 0}, "v_num_grad_steps: 0 is not allowed; give a whole number from 1"),
        ({"v_num_grad_steps": 2.5}, "v_num_grad_steps: 2.5 is not allowed; give a whole number"),
        ({"v_num_grad_steps": True}, "v_num_grad_steps: true is not allowed"),
        ({"v_loss_layer": True}, "v_loss_layer: true is not allowed; give a layer number"),
        ({"fact_token": "last"}, 'fact_token: "last" is not allowed; give subject_last, the only'),
        ({"layer_selection": "random"}, 'layer_selection: "random" is not allowed; give all'),
        ({"mom2_adjustment": False}, "mom2_adjustment: false asks for an update without second"),
        ({"mom2_adjustment": 1}, "mom2_adjustment: 1 is not allowed; give true"),
        ({"mom2_dataset": 1}, "mom2_dataset: 1 is not allowed; give text"),
        ({"rewrite_module_tmps": ["a.{}.x", "a.{}.y"]}, "changes only FFN weights"),
        ({"rewrite_module_tmps": "a.{}.x"}, 'rewrite_module_tmps: "a.{}.x" is not allowed; give a'),
        ({"rewrite_module_tmp": ["a.{}.x"]}, "rewrite_module_tmp: .* give a module's name with"),
        ({"attn_module_tmp": "no place"}, 'attn_module_tmp: "no place" is not allowed; give a mod'),
        ({"ln_f_module": False}, "ln_f_module: false is not allowed; give a module's name"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = written(tmp_path / "h.json", PUBLISHED | change)
    with pytest.raises(HyperParameterError, match=message) as error:
        PMETHyperParams.from_file(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([1e300, 5e-324, 10**400, "17", "1e-3", "", "all", [], {}, [[1]]]),
    st.lists(st.integers() | st.floats() | st.booleans(), max_size=3),
)
NUMBERS = (
    "v_num_grad_steps",
    "v_lr",
    "v_weight_decay",
    "kl_factor",
    "nll_loss_factor",
    "clamp_norm_factor",
    "mom2_update_weight",
)


@given(st.sampled_from(list(PMETHyperParams.model_fields)), ODD)
def test_any_value_is_usable_or_refused_in_a_line_with_its_key(key: str, value: Any) -> None:
    try:
        hparams = PMETHyperParams.from_dict({"layers": [1], key: value}, source="h.json")
    except HyperParameterError as error:
        said = str(error)
        assert said.startswith(f"h.json: {key}")
        assert "\n" not in said
    else:
        assert all(0 <= getattr(hparams, name) <= 1e30 for name in NUMBERS)
        assert all(type(layer) is int and layer >= 0 for layer in hparams.layers)
        assert hparams.mom2_adjustment is True


def test_whole_numbers_may_be_written_as_floats_or_come_from_numpy() -> None:
    hparams = PMETHyperParams(layers=np.arange(3), v_num_grad_steps=20.0, v_lr=np.float32(0.5))
    assert (hparams.layers, hparams.v_num_grad_steps, hparams.v_lr) == ((0, 1, 2), 20, 0.5)
    assert type(hparams.layers[0]) is int


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"layers": [0], "layers": [0, 1]}', "h: key 'layers' is given twice; keep one of them"),
        ('{"layers": [0], "x": {"a": 1, "a": 2}}', "h: key 'a' is given twice"),
        ("layers: [0]\nlayers: [0, 1]\n", "line 2: key 'layers' is already given on line 1"),
        ("layers: [0]\n1: 2\n", "line 2: key '1' is not text"),
        ("", "h: expected a mapping of names to values"),
        ("[1]", "h: expected a mapping of names to values"),
    ],
)
def test_a_text_whose_keys_are_not_clear_is_refused(text: str, message: str) -> None:
    with pytest.raises(HyperParameterError, match=message):
        PMETHyperParams.from_text(text, source="h")


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
    with pytest.raises(HyperParameterError, match=r"one of the presets .*gpt-j-6b"):
        PMETHyperParams.from_file(tmp_path / "none.json")
    (tmp_path / "b.json").write_text('{"layers": [1,')
    with pytest.raises(HyperParameterError, match=r"b\.json is not JSON .*fix its syntax"):
        PMETHyperParams.from_file(tmp_path / "b.json")
    with pytest.raises(HyperParameterError, match="there is no preset 'gpt-5'"):
        PMETHyperParams.preset("gpt-5")
