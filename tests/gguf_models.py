"""Small GGUF files of the llama family, made from the golden model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import GOLDEN

LLAMA = GOLDEN / "llama" / "model"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf() -> Any:
    """The package that writes GGUF; the test is skipped without it."""
    return pytest.importorskip("gguf")


def write_gguf(
    path: Path,
    *,
    kind: str = "Q8_0",
    architecture: str = "llama",
    tokenizer: bool = True,
    change: Callable[[Any], None] = lambda writer: None,
    without: str = "no such tensor",
    extra: dict[str, np.ndarray] | None = None,
) -> dict[str, torch.Tensor]:
    """Write the golden model as GGUF; return its weights as a reader should find them.

    Args:
        path: the file.
        kind: type of the matrices whose rows fill its blocks; all else is float32.
        architecture: as the file names it.
        tokenizer: whether to write the tokenizer and a chat template.
        change: receives the writer before the file is written.
        without: name in the file of a tensor to leave out.
        extra: more tensors.
    """
    config = json.loads((LLAMA / "config.json").read_text())
    writer = gguf().GGUFWriter(str(path), architecture)
    writer.add_name("small")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    if tokenizer:
        _add_tokenizer(writer)
    found = {}
    for name, weight in load_file(LLAMA / "model.safetensors").items():
        if (own := _name(name)) == without:
            continue
        stored, type_, found[name] = _stored(weight.numpy(), name, kind, config)
        writer.add_tensor(own, stored, raw_dtype=type_)
    for own, values in (extra or {}).items():
        writer.add_tensor(own, values)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def _name(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[part.removesuffix('.weight')]}.weight"


def _stored(
    weight: np.ndarray, name: str, kind: str, config: dict[str, Any]
) -> tuple[np.ndarray, Any, torch.Tensor]:
    """The bytes of a weight in the file, their type, and the weight that they stand for."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    turned = next((config[key] for part, key in heads.items() if part in name), None)
    ordered = weight if turned is None else _paired(weight, turned)
    type_ = gguf().GGMLQuantizationType[kind]
    length, _ = gguf().GGML_QUANT_SIZES[type_]
    if weight.ndim < 2 or weight.shape[-1] % length:
        type_ = gguf().GGMLQuantizationType.F32
    stored = gguf().quantize(ordered, type_)
    values = gguf().dequantize(stored, type_).reshape(weight.shape)
    whole = values if turned is None else _apart(values, turned)
    return stored, type_, torch.from_numpy(np.ascontiguousarray(whole))


def _paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of llama.cpp, where the two halves of a rotation are neighbours."""
    apart = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(apart.swapaxes(1, 2).reshape(weight.shape))


def _apart(weight: np.ndarray, heads: int) -> np.ndarray:
    paired = weight.reshape(heads, -1, 2, weight.shape[1])
    return paired.swapaxes(1, 2).reshape(weight.shape)


def _add_tokenizer(writer: Any) -> None:
    model = json.loads((LLAMA / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    control = gguf().TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([control, *[gguf().TokenType.NORMAL] * (len(tokens) - 1)])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
