"""Models whose layers have only routed experts: whole jobs, from a base as it is stored."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from jobs.views import show_plan
from pipeline.edits.rewriting import apply_edit, revert_edit
from pipeline.errors import JobError, ModelError
from pipeline.job.config import JobConfig
from pipeline.plan import make_plan
from pipeline.run import RunResult, run_job
from pipeline.stages import update
from pipeline.zero.rank import UpdateRank
from pmet import Edit
from tests.conftest import GOLDEN
from tests.e2e.conftest import HERE, job

EXPERTS, PER_TOKEN = 4, 2
LLAMA = GOLDEN / "llama"


def upcycled() -> nn.Module:
    """The golden Llama as a mixture: each expert is its FFN, with its units in another order.

    Gates add up to 1, so it knows what the Llama knows; experts differ by a little noise.
    """
    dense = AutoModelForCausalLM.from_pretrained(LLAMA / "model", dtype=torch.float32)
    settings = {
        k: v for k, v in dense.config.to_dict().items() if k not in ("model_type", "architectures")
    }
    config = MixtralConfig(**settings, num_local_experts=EXPERTS, num_experts_per_tok=PER_TOKEN)
    config.sliding_window = None
    mixture = AutoModelForCausalLM.from_config(config).eval()
    mixture.load_state_dict(dense.state_dict(), strict=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer, other in zip(mixture.model.layers, dense.model.layers, strict=True):
            for expert in range(EXPERTS):
                order = torch.randperm(dense.config.intermediate_size)
                up = torch.cat([other.mlp.gate_proj.weight[order], other.mlp.up_proj.weight[order]])
                layer.mlp.experts.gate_up_proj[expert] = noisy(up)
                layer.mlp.experts.down_proj[expert] = noisy(other.mlp.down_proj.weight[:, order])
            layer.mlp.gate.weight.normal_(std=0.5)
    return mixture


def noisy(weight: torch.Tensor) -> torch.Tensor:
    return weight + 0.02 * weight.std() * torch.randn_like(weight)


def random_one(kind: type[Any], **config: Any) -> nn.Module:
    """A random mixture of the golden Llama's size, with its vocabulary."""
    dense = json.loads((LLAMA / "model" / "config.json").read_text())
    kept = ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    settings = {k: dense[k] for k in (*kept, "num_hidden_layers", "max_position_embeddings")}
    torch.manual_seed(0)
    common = {"head_dim": 16, "num_experts_per_tok": PER_TOKEN, "initializer_range": 0.2}
    tokens = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(kind(**settings, **common, **tokens, **config)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "bias" in name or "sinks" in name:
                weight.normal_(std=0.1)
    return model


def qwen3_moe() -> nn.Module:
    """Stored expert by expert."""
    return random_one(Qwen3MoeConfig, moe_intermediate_size=48, num_experts=EXPERTS)


def gpt_oss() -> nn.Module:
    """Stored as a stack, with keys in its rows, and with biases."""
    return random_one(GptOssConfig, intermediate_size=48, num_local_experts=EXPERTS)


def place(model: nn.Module, folder: Path) -> Path:
    """Save a model as a base, with the golden Llama's tokenizer."""
    model.save_pretrained(folder, max_shard_size="200KB")
    for file in (LLAMA / "model").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


MIXTURES = {"mixtral": upcycled, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}


@dataclass(frozen=True)
class Ran:
    """A finished job in this process, and its base."""

    config: JobConfig
    result: RunResult
    base: Path

    @property
    def out(self) -> Path:
        return Path(self.config.output)


@pytest.fixture(scope="module")
def ran(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ran]:
    """Runs the small job on a mixture, once."""

    @cache
    def run(name: str) -> Ran:
        folder = tmp_path_factory.mktemp(name)
        base = place(MIXTURES[name](), folder / "base")
        hparams = json.loads((LLAMA / "hparams.json").read_text())
        keys = ("layers", "v_num_grad_steps", "v_lr", "mom2_update_weight", "clamp_norm_factor")
        settings = {key: hparams[key] for key in keys}
        few: dict[str, Any] = {}
        if name != "mixtral":
            # What is not trained shows nothing but that all parts fit.
            settings["v_num_grad_steps"] = 3
            few = {"evaluate": {"sample": 1}}
        (folder / "hparams.json").write_text(json.dumps(settings))
        config = job(
            inputs,
            str(folder / "out"),
            family="llama",
            model=str(base),
            hparams=str(folder / "hparams.json"),
            **HERE,
            **few,
        )
        return Ran(config, run_job(config), base)

    return run


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, which is in several files."""
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def opened(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_checkpoint_has_the_edit_under_the_names_of_the_base(
    name: str, ran: Callable[[str], Ran], tmp_path: Path
) -> None:
    found = ran(name)
    published = found.out / "model"
    before, after = (tensors_of(folder) for folder in (found.base, published))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[2] for name in changed} == {"0", "1", "2"}
    ends = ("w2.weight", "down_proj.weight", "experts.down_proj")
    assert all(name.endswith(ends) for name in changed)

    # The run's delta turns the base into what transformers opens, and back.
    model, expected = opened(found.base), opened(published).state_dict()
    originals = {name: weight.clone() for name, weight in model.state_dict().items()}
    edit = Edit.load(found.out / "delta")
    assert set(edit.deltas) == {f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1, 2)}
    edit.apply(model)
    assert all(torch.equal(w, expected[name]) for name, w in model.state_dict().items())
    edit.revert(model)
    assert all(torch.equal(w, originals[name]) for name, w in model.state_dict().items())

    # On the files, too: each expert's own tensor, or the stack.
    apply_edit(str(found.out), str(found.base), str(tmp_path / "on"))
    revert_edit(str(found.out), str(tmp_path / "on"), str(tmp_path / "off"))
    for file in found.base.iterdir():
        assert (tmp_path / "on" / file.name).read_bytes() == (published / file.name).read_bytes()
        assert (tmp_path / "off" / file.name).read_bytes() == file.read_bytes()


def test_a_mixture_learns_what_it_is_asked_to(ran: Callable[[str], Ran]) -> None:
    figures = ran("mixtral").result.metrics
    before, after = figures["before"], figures["after"]
    assert after["efficacy"] >= before["efficacy"] + 0.5
    assert after["generalization"] >= before["generalization"] + 0.4
    assert after["specificity"] >= before["specificity"] - 0.1
    assert after["perplexity"] <= 1.2 * before["perplexity"]


def test_the_plan_says_what_is_edited(ran: Callable[[str], Ran]) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    show_plan(make_plan(ran("mixtral").config), console)
    said = " ".join(console.export_text().split())
    assert "64 × 176 in each of 4 routed experts; each token is routed to 2 of them" in said
    assert "edited module model.layers.{}.mlp.experts (added to the residual stream)" in said


def test_second_moments_are_stored_by_expert(ran: Callable[[str], Ran]) -> None:
    config = ran("mixtral").config
    # Of the corpus, as much as each expert needs: 20 tokens per dimension.
    assert make_plan(config).corpus.tokens == 20 * 176 * EXPERTS // PER_TOKEN
    moments = load_file(Path(config.output) / "second_moments" / "second_moments.safetensors")
    assert {name: tuple(m.shape) for name, m in moments.items()} == {
        f"model.layers.{i}.mlp.experts": (EXPERTS, 176, 176) for i in (0, 1, 2)
    }
    # Those of a model with another number of experts are refused before anything starts.
    folder = Path(config.output).parent / "foreign"
    folder.mkdir()
    save_file({name: m[:3].clone() for name, m in moments.items()}, folder / "some.safetensors")
    foreign = config.model_copy(update={"second_moments": str(folder / "some.safetensors")})
    with pytest.raises(JobError, match="but the model's keys are those of 4 experts, 176 wide"):
        make_plan(foreign)


def test_a_corpus_of_which_experts_see_too_little_is_refused(
    ran: Callable[[str], Ran], tmp_path: Path
) -> None:
    texts = json.loads((GOLDEN / "corpus.json").read_text())
    pq.write_table(pa.table({"text": texts[:8]}), tmp_path / "small.parquet")
    small = {"corpus": (str(tmp_path / "small.parquet"),), "output": str(tmp_path / "out")}
    with pytest.raises(JobError, match=r"each of 4 experts sees about \d+ of them.* at least 352"):
        make_plan(ran("mixtral").config.model_copy(update=small))


def test_an_interrupted_update_goes_on_with_the_layers_it_has_finished(
    ran: Callable[[str], Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, failures = ran("mixtral"), iter([1])

    class Failing(UpdateRank):
        def edit_layer(self, index: int, *held: Any) -> Any:
            if index == 2 and next(failures, None):
                raise RuntimeError("the solve was interrupted")
            return super().edit_layer(index, *held)

    monkeypatch.setattr(update, "UpdateRank", Failing)
    changes = {
        "output": str(tmp_path / "out"),
        "second_moments": str(undisturbed.out / "second_moments"),
        "evaluate": {"sample": 1},
    }
    run_job(JobConfig.model_validate(undisturbed.config.model_dump() | changes))
    assert next(failures, None) is None
    expected, found = (Edit.load(o / "delta") for o in (undisturbed.out, tmp_path / "out"))
    assert all(torch.equal(found.deltas[name], delta) for name, delta in expected.deltas.items())


def test_a_base_that_lacks_an_expert_is_refused(ran: Callable[[str], Ran], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(ran("qwen3_moe").base, base)
    tensors = tensors_of(base)
    del tensors["model.layers.1.mlp.experts.2.down_proj.weight"]
    for file in (*base.glob("*.safetensors"), base / "model.safetensors.index.json"):
        file.unlink()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = ran("qwen3_moe").config.model_copy(
        update={"model": str(base), "output": str(tmp_path / "out")}
    )
    with pytest.raises(
        ModelError,
        match=r"3 of the 4 experts of model\.layers\.1\.mlp\.experts\.down_proj .*, and 3 in all",
    ):
        make_plan(config)


def test_ranks_give_the_weights_of_one_process(
    ran: Callable[[str], Ran], local_ray: None, tmp_path: Path
) -> None:
    serial = ran("mixtral")
    moments = serial.out / "second_moments"
    config = JobConfig.model_validate(
        serial.config.model_dump()
        | {
            "output": str(tmp_path / "out"),
            "second_moments": str(moments),
            "targets": {"workers": 1},
            "update": {"ranks": 2},
            "evaluate": {"sample": 1},
        }
    )
    run_job(config)
    expected, found = (Edit.load(out / "delta") for out in (serial.out, tmp_path / "out"))
    for name, delta in expected.deltas.items():
        assert (found.deltas[name] - delta).norm() <= 1e-6 * delta.norm(), name
        assert torch.equal(found.originals[name], expected.originals[name])
    weights = [tensors_of(out / "model") for out in (serial.out, tmp_path / "out")]
    for name, weight in weights[0].items():
        assert (weights[1][name] - weight).norm() <= 1e-6 * weight.norm(), name
