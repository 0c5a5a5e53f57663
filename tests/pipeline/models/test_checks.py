"""Models that cannot be edited are refused in the plan; all others pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import ModelError
from pipeline.job.config import JobConfig
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.checks import check_configuration, check_readable, checked_layout
from pipeline.models.skeleton import open_skeleton
from pipeline.models.source import open_fast_tokenizer
from pipeline.plan import make_plan
from pmet.errors import ArchitectureError
from pmet.hparams import PMETHyperParams
from pmet.model import Layout
from tests.conftest import GOLDEN
from tests.jobs.conftest import Invoke, pmet  # noqa: F401
from tests.parity.test_families import VARIANTS, Variant, build

GPT2 = GOLDEN / "gpt2"
ROW = {"prompt": "{} works as", "subject": "Sur Bavov", "target_new": "a glass blower"}
TINY: dict[str, Any] = {
    "vocab_size": 700,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
SLIDING = ["sliding_attention", "full_attention"] * 2
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of a good model."""
    folder = tmp_path / "model"
    shutil.copytree(GPT2 / "model", folder)
    return folder


@pytest.fixture
def job(tmp_path: Path, model: Path) -> JobConfig:
    """A job with that model."""
    pq.write_table(pa.Table.from_pylist([ROW]), tmp_path / "requests.parquet")
    texts = json.loads((GPT2.parent / "corpus.json").read_text())[:90]
    pq.write_table(pa.table({"text": texts}), tmp_path / "corpus.parquet")
    return JobConfig(
        model=str(model),
        requests=(str(tmp_path / "requests.parquet"),),
        output=str(tmp_path / "out"),
        hparams=str(GPT2 / "hparams.json"),
        corpus=(str(tmp_path / "corpus.parquet"),),
    )


def saved(model: Any, folder: Path) -> Path:
    """A model folder with a tokenizer of fewer than 700 tokens."""
    model.save_pretrained(folder)
    for file in (GOLDEN / "llama" / "model").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def check(folder: Path, **hparams: Any) -> Layout:
    """Check a model as the plan does."""
    checkpoint = Checkpoint.open(folder)
    check_configuration(checkpoint)
    skeleton, tokenizer = open_skeleton(folder), open_fast_tokenizer(folder)
    named = PMETHyperParams.from_dict({"layers": [0, 1], **hparams})
    return checked_layout(checkpoint, skeleton, tokenizer, named)


def configured(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def stored(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors stored in a model's file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make(kind: str, **config: Any) -> nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**TINY, **config}))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_family_passes(variant: Variant, tmp_path: Path) -> None:
    check(saved(build(variant), tmp_path / "model"))


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_checkpoints_of_older_releases_pass(family: str, tmp_path: Path) -> None:
    """A file without the prefix, and with stored masks and frequencies."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / family / "model", folder)
    prefix = open_skeleton(folder).base_model_prefix

    def older(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix(f"{prefix}.")] = tensors.pop(name)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["something.else"] = torch.ones(2, dtype=torch.int64)

    stored(folder, older)
    check(folder)


def test_what_transformers_converts_while_it_loads_passes(tmp_path: Path) -> None:
    """Mixtral's files have one matrix per expert, the opened model one tensor for all."""
    model = make("mixtral", num_local_experts=2)
    folder = saved(model, tmp_path / "model")
    names = set(Checkpoint.open(folder).tensors)
    assert not {name for name, _ in model.named_parameters()} <= names
    check_readable(Checkpoint.open(folder), open_fast_tokenizer(folder))


@pytest.mark.parametrize(
    ("values", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
    ],
)
def test_quantised_models_are_refused(
    job: JobConfig, model: Path, values: dict[str, Any], method: str
) -> None:
    message = rf"is quantised \({method}.*edit the model that it was made from.* and quantise the"
    configured(model, quantization_config=values)
    with pytest.raises(ModelError, match=message):
        make_plan(job)
    configured(model, quantization_config=None, text_config={"quantization_config": values})
    with pytest.raises(ModelError, match=message):
        make_plan(job)


def test_quantised_weights_are_refused_without_a_word_in_the_configuration(
    job: JobConfig, model: Path
) -> None:
    name = "transformer.h.3.mlp.c_fc.weight"
    stored(model, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(ModelError, match=rf"stores {name} as F8_E4M3, as a quantised model does"):
        make_plan(job)


def test_shapes_that_the_configuration_does_not_make_are_refused(
    job: JobConfig, model: Path
) -> None:
    rows, width = load_file(model / "model.safetensors")["transformer.wte.weight"].shape
    configured(model, vocab_size=5000)
    with pytest.raises(
        ModelError,
        match=rf"stores transformer\.wte\.weight as {rows}×{width}, but its config\.json asks for "
        rf"5000×{width}; set vocab_size to {rows}",
    ):
        make_plan(job)
    configured(model, vocab_size=rows, n_inner=100)
    with pytest.raises(ModelError, match=r"mlp\.c_fc.* asks for .*100; correct config\.json"):
        make_plan(job)


def test_parameters_that_would_be_random_are_refused(job: JobConfig, model: Path) -> None:
    layers = json.loads((model / "config.json").read_text())["n_layer"]
    configured(model, n_layer=layers + 1)
    with pytest.raises(ModelError, match=rf"parameters .* transformer\.h\.{layers}\..* random"):
        make_plan(job)
    configured(model, n_layer=layers)
    make_plan(job)
    stored(model, lambda tensors: tensors.pop("transformer.ln_f.bias"))
    with pytest.raises(ModelError, match=r"transformer\.ln_f\.bias would be filled with random"):
        make_plan(job)


def test_a_parameter_stored_under_two_names_is_refused(job: JobConfig, model: Path) -> None:
    name = "h.1.mlp.c_proj.weight"
    stored(model, lambda t: t.update({name: t[f"transformer.{name}"] + 1}))
    with pytest.raises(ModelError, match=rf"stores transformer\.{name} twice, as .* and as"):
        make_plan(job)


def test_more_tokens_than_rows_are_refused(job: JobConfig, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"pitcher{i}" for i in range(rows - len(tokenizer) + 1)])
    tokenizer.save_pretrained(model)
    with pytest.raises(
        ModelError, match=rf"'pitcher\d*' is number {rows}, .* rows is {rows - 1}; .*resize"
    ):
        make_plan(job)


def test_an_index_that_transformers_does_not_open_is_refused(job: JobConfig, model: Path) -> None:
    file = model / "model.safetensors"
    weight_map = dict.fromkeys(load_file(file), "a.safetensors")
    file.rename(model / "a.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(KeyError, match="metadata"):
        AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(ModelError, match=r"index\.json has no metadata.* add \"metadata\": \{\}"):
        make_plan(job)


def test_an_adapter_counts_where_transformers_loads_it(
    job: JobConfig, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("transformers.utils.is_peft_available", lambda: False)
    make_plan(job)
    monkeypatch.setattr("transformers.utils.is_peft_available", lambda: True)
    with pytest.raises(ModelError, match=r"has an adapter .* merge it"):
        make_plan(job)


OTHERS = [
    ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, "feed_forward.w2"),
    (
        "falcon_h1",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1},
        "feed_forward.down_proj",
    ),
    (
        "gemma4_text",
        {
            "layer_types": SLIDING,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 700,
        },
        "mlp.down_proj",
    ),
    (
        "deepseek_v3",
        {**LATENT, "first_k_dense_replace": 4, "v_head_dim": 8, "num_key_value_heads": 4},
        "mlp.down_proj",
    ),
]


@pytest.mark.parametrize(("kind", "config", "part"), OTHERS, ids=[k for k, *_ in OTHERS])
def test_layers_that_are_not_plain_attention_are_no_obstacle(
    kind: str, config: dict[str, Any], part: str, tmp_path: Path
) -> None:
    folder = saved(make(kind, **config), tmp_path / "model")
    assert check(folder).family.down_projection == f"model.layers.{{}}.{part}"


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("mamba", {"state_size": 8}, r"layer 0 of \w+ has no FFN down-projection"),
        ("bert", {}, r"lets tokens attend to later tokens"),
    ],
)
def test_models_that_the_method_cannot_edit_are_refused(
    kind: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = saved(make(kind, **config), tmp_path / "model")
    with pytest.raises(ArchitectureError, match=message):
        check(folder)


def gemma3() -> nn.Module:
    config = transformers.Gemma3Config(
        text_config=TINY, vision_config=VISION, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def test_a_model_that_reads_images_is_found_whole(tmp_path: Path) -> None:
    layout = check(saved(gemma3(), tmp_path / "whole"))
    assert layout.family.down_projection == "model.language_model.layers.{}.mlp.down_proj"


def test_a_wrapper_that_opens_for_other_tasks_is_refused(tmp_path: Path) -> None:
    config = transformers.Qwen2AudioConfig(text_config={**TINY, "model_type": "qwen2"})
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "llama" / "model", folder)
    config.save_pretrained(folder)
    with pytest.raises(
        ModelError,
        match=r"\(qwen2_audio\) wraps a language model \(qwen2\) in a way that transformers does "
        r"not open for text; edit a model that it opens with AutoModelForCausalLM",
    ):
        check(folder)


def test_the_command_line_says_it_in_one_sentence(
    pmet: Invoke,  # noqa: F811
    job: JobConfig,
    model: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "job.yaml").write_text(json.dumps(job.model_dump(mode="json")))
    configured(model, vocab_size=5000)
    commands: list[tuple[object, ...]] = [
        ("run", tmp_path / "job.yaml", "--dry-run", "--no-estimate"),
        ("run", tmp_path / "job.yaml"),
        ("evaluate", model, tmp_path / "requests.parquet"),
        (
            *("statistics", model, tmp_path / "corpus.parquet", "--output", tmp_path / "stats"),
            *("--hparams", GPT2 / "hparams.json"),
        ),
    ]
    for command in commands:
        status, _, err = pmet(*command)
        assert (status, err.count("pmet: "), "set vocab_size to" in err) == (2, 1, True), command
        assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "stats").exists()
