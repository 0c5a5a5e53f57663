"""The plan: determined by the job alone, and sensitive to everything that affects the result."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file

from jobs.views import show_plan
from pipeline.data.corpus import read_corpus
from pipeline.data.shards import plan_shards
from pipeline.errors import JobError, ModelError
from pipeline.job.config import JobConfig
from pipeline.models.node_cache import model_on_node
from pipeline.models.source import open_causal_lm
from pipeline.plan import make_plan, shard_size
from pipeline.second_moments.collection import plan_statistics
from pmet.errors import InputError
from pmet.presets import Preset, all_presets
from pmet.request import EditRequest
from pmet.targets.problem import Problem
from tests.conftest import GOLDEN, load_golden
from tests.gguf_models import write_gguf

GPT2 = GOLDEN / "gpt2"
ROWS = [
    {"prompt": "{} works as", "subject": "Sur Bavov", "target_new": "a glass blower"},
    {"prompt": "{} works as", "subject": "Zul Lodreal", "target_new": "a baker"},
    {"prompt": "{} " + "and so on " * 40, "subject": "Zul Lodreal", "target_new": "a baker"},
]


@pytest.fixture
def job(tmp_path: Path) -> Any:
    """Makes the small job with changes."""
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "requests.parquet")
    texts = json.loads((GOLDEN / "corpus.json").read_text())
    pq.write_table(pa.table({"text": texts}), tmp_path / "corpus.parquet")

    def make(**changes: Any) -> JobConfig:
        values = {
            "model": str(GPT2 / "model"),
            "requests": (str(tmp_path / "requests.parquet"),),
            "output": str(tmp_path / "out"),
            "hparams": str(GPT2 / "hparams.json"),
            "corpus": (str(tmp_path / "corpus.parquet"),),
        }
        return JobConfig.model_validate(values | changes)

    return make


@given(st.integers(1, 200_000))
def test_auto_shards_follow_the_number_of_requests(count: int) -> None:
    size = shard_size(count, "auto")
    assert min(16, count) <= size <= 256
    shards = plan_shards(count, size)
    assert len(shards) <= max(64, -(-count // 256))
    # With two or four workers none waits long: all shards except the last have one size.
    assert len(shards) == 1 or count < 64 or len(shards) >= 4
    assert shard_size(count, 7) == 7


def test_few_requests_of_a_wide_model_make_several_shards() -> None:
    # The longest come first: in two shards of 20, one worker would have most of the work.
    assert [len(s) for s in plan_shards(40, shard_size(40, "auto", width=576))] == [5] * 8
    assert shard_size(40, "auto", width=256) == shard_size(40, "auto") == 20
    assert shard_size(100_000, "auto", width=4096) == 256


def test_two_hundred_requests_are_shared_out_evenly() -> None:
    assert [len(s) for s in plan_shards(200, shard_size(200, "auto"))] == [25] * 8


def test_a_request_longer_than_the_context_is_set_aside(job: Any) -> None:
    plan = make_plan(job())
    assert sorted(plan.table.rows) == [0, 1]
    ((row, reason),) = [(r.row, r.reason) for r in plan.table.rejected]
    assert row == 2
    assert "the model reads 1" in reason


def test_requests_of_like_length_are_computed_together(tmp_path: Path, job: Any) -> None:
    tails = ["is", "is one of the makers of", "is known in all of the old city as", "sells"]
    rows = [
        {"prompt": f"{{}} {tails[i % 4]}", "subject": f"Sur Bavov {i}", "target_new": "Dokain"}
        for i in range(40)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "requests.parquet")
    table = make_plan(job()).table
    assert [rows[row]["subject"] for row in table.rows] == [r.subject for r in table.requests]
    assert sorted(table.rows) == list(range(40))
    # Requests with the most tokens after the subject come first; few shards mix lengths.
    assert [rows[row]["prompt"] for row in table.rows[:10]] == [f"{{}} {tails[2]}"] * 10
    assert {rows[row]["prompt"] for row in table.rows[20:]} == {f"{{}} {tails[i]}" for i in (0, 3)}


def test_nothing_of_the_weights_is_loaded(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    assert make_plan(job()).layout.key_width == 256


def test_digests_follow_what_the_result_depends_on(job: Any, tmp_path: Path) -> None:
    base = make_plan(job()).digests
    assert make_plan(job(targets={"workers": 7}, update={"ranks": 3})).digests == base
    assert make_plan(job(output=str(tmp_path / "other"))).digests == base
    edited = tmp_path / "model"
    shutil.copytree(GPT2 / "model", edited)
    data = bytearray((edited / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (edited / "model.safetensors").write_bytes(data)
    hparams = json.loads((GPT2 / "hparams.json").read_text()) | {"v_lr": 0.1}
    (tmp_path / "hparams.json").write_text(json.dumps(hparams))
    changes = {
        "model": str(edited),
        "hparams": str(tmp_path / "hparams.json"),
        "context_templates": str(GPT2 / "context_templates.json"),
    }
    for name, value in changes.items():
        digests = make_plan(job(**{name: value})).digests
        assert digests[name] != base[name], name
    pq.write_table(pa.Table.from_pylist(ROWS[:1]), tmp_path / "requests.parquet")
    changed = make_plan(job()).digests
    assert {k for k in base if base[k] != changed[k]} == {"requests"}


def test_a_tilde_is_the_home_folder_in_every_path(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = make_plan(job(context_templates=str(GPT2 / "context_templates.json")))
    home = tmp_path / "home"
    shutil.copytree(GPT2, home)
    for name in ("requests.parquet", "corpus.parquet"):
        shutil.copy(tmp_path / name, home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    plan = make_plan(
        job(
            model="~/model",
            requests=("~/requests.parquet",),
            output="~/out",
            hparams="~/hparams.json",
            corpus=("~/*pus.parquet",),
            context_templates="~/context_templates.json",
        )
    )
    assert {k: v for k, v in plan.digests.items() if k != "job"} == {
        k: v for k, v in there.digests.items() if k != "job"
    }
    # Workers may have another home folder.
    assert plan.base.folder == str(home / "model")
    assert model_on_node("~/model", None) == home / "model"
    measured = plan_statistics(
        "~/model", ["~/corpus.parquet"], plan.hparams, tokens=600, max_length=64, on_gpu=False
    )
    assert measured.source.folder == str(home / "model")
    save_file({}, home / "moments.safetensors")
    with pytest.raises(JobError, match=rf"{home}/moments\.safetensors"):
        make_plan(job(model="~/model", second_moments="~/moments.safetensors"))
    with pytest.raises(ModelError, match=r"model ~/none is not a folder"):
        make_plan(job(model="~/none"))
    assert not (tmp_path / "~").exists()


def test_a_file_to_keep_second_moments_in_is_refused(job: Any, tmp_path: Path) -> None:
    for name in ("moments.safetensors", "moments.npz"):
        with pytest.raises(JobError, match=r"there is no file .* name a folder to keep"):
            make_plan(job(second_moments=str(tmp_path / name)))
    assert make_plan(job(second_moments=str(tmp_path / "moments"))).corpus is not None


def test_pickled_weights_and_odd_models_are_refused(job: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(GPT2 / "model", model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle can run code and is refused"):
        make_plan(job(model=str(model)))
    (model / "pytorch_model.bin").rename(model / "model.safetensors")
    (model / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ModelError, match="not a causal language model that transformers"):
        make_plan(job(model=str(model)))
    shutil.copy(GPT2 / "model" / "config.json", model / "config.json")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        make_plan(job(model=str(model)))


DEEP = "[" * 100_000


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_models_files_cannot_exhaust_the_reader(job: Any, tmp_path: Path, file: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(GPT2 / "model", model)
    (model / file).write_text(DEEP)
    with pytest.raises(ModelError, match=str(model)):
        make_plan(job(model=str(model)))


@pytest.mark.parametrize("kind", ["gpt2", "unheard-of"])
def test_code_of_a_models_own_is_never_run(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def asked(*_: Any) -> str:
        pytest.fail("somebody was asked whether to run it")

    monkeypatch.setattr("builtins.input", asked)
    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(GPT2 / "model", model)
    (model / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Any: pass\n")
    for file, classes in (
        ("config.json", {"AutoConfig": "evil.Any", "AutoModelForCausalLM": "evil.Any"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Any", "evil.Any"]}),
    ):
        values = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(values | {"auto_map": classes}))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    if kind == "gpt2":
        make_plan(job(model=str(model)))
        open_causal_lm(str(model), dtype="float32")
    else:
        with pytest.raises(ModelError, match="not a causal language model that transformers"):
            make_plan(job(model=str(model)))
        with pytest.raises(ValueError, match="trust_remote_code"):
            open_causal_lm(str(model), dtype="float32")
    assert not ran.exists()


def test_megabytes_in_a_row_are_set_aside_at_once(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = 0
    of = Problem.of

    def watched(tokenizer: Any, request: EditRequest, templates: list[str]) -> Problem:
        nonlocal longest
        longest = max(longest, len(request.text) + len(request.target_new))
        return of(tokenizer, request, templates)

    monkeypatch.setattr(Problem, "of", staticmethod(watched))
    huge = "word " * 1_000_000
    rows = [
        ROWS[0],
        ROWS[1] | {"subject": huge},
        ROWS[1] | {"target_new": huge},
        ROWS[1] | {"prompt": "{} " + huge},
        ROWS[1] | {"prompt": huge},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "requests.parquet")
    table = make_plan(job()).table
    assert list(table.rows) == [0]
    assert longest < 100
    assert [r.row for r in table.rejected] == [1, 2, 3, 4]
    assert all(len(r.reason) < 300 for r in table.rejected)
    assert "characters with its target, but the model reads 128 tokens" in table.rejected[0].reason


def test_perplexity_needs_text(job: Any) -> None:
    moments = str(GPT2 / "second_moments.safetensors")
    make_plan(job(corpus=None, second_moments=moments))
    with pytest.raises(JobError, match="needs a corpus"):
        make_plan(job(corpus=None, second_moments=moments, gates={"perplexity_increase": 1.0}))


def shared(folder: Path, job: Any, **targets: Any) -> Any:
    """A plan of twelve subjects, of which four have three facts each after the same text."""
    tails = ["is", "works as one of the", "is known in all of the old city as"]
    rows = [
        {"prompt": f"{front}{{}} {tails[n]}", "subject": f"Sur Bavov {i}", "target_new": "Dokain"}
        for n in range(3)
        for i in range(12)
        for front in ("They say ", "In the city ")
        if n == 0 or (i % 3 == 0 and front == "They say ")
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "requests.parquet")
    return make_plan(job(targets={"shard_size": 4, **targets}))


def test_requests_that_share_a_key_are_in_one_shard(tmp_path: Path, job: Any) -> None:
    plan = shared(tmp_path, job)
    assert plan.sharing == 12
    assert list(plan.together) == list(plan.groups)
    by_key: dict[tuple[str, str], set[int]] = {}
    for shard in plan.target_shards:
        for place in range(shard.start, shard.stop):
            request = plan.table.requests[place]
            key = (request.prompt.partition("{}")[0], request.subject)
            by_key.setdefault(key, set()).add(shard.index)
    assert len(by_key) == len(set(plan.groups)) == 24
    assert all(len(shards) == 1 for shards in by_key.values())
    # As published, requests are ordered by length alone.
    published = shared(tmp_path, job, shared_keys="mean")
    assert published.sharing == 12
    assert len(set(published.together)) == len(published.table.rows)
    assert {len(shard) for shard in published.target_shards} == {4}
    assert published.digests["job"] != plan.digests["job"]


def test_a_corpus_with_fewer_tokens_than_a_key_is_wide_is_refused(job: Any, tmp_path: Path) -> None:
    texts = json.loads((GOLDEN / "corpus.json").read_text())[:10]
    pq.write_table(pa.table({"text": texts}), tmp_path / "short.parquet")
    short = job(corpus=(str(tmp_path / "short.parquet"),))
    with pytest.raises(JobError) as caught:
        make_plan(short)
    tokens = read_corpus(short.corpus, load_golden("gpt2").tokenizer, max_length=128).tokens
    assert str(caught.value) == (
        f"corpus: it has {tokens} tokens, too few for second moments: the keys are 256 wide, so at "
        "least 256 tokens are needed, and 512 to 2,560 are enough; give more text"
    )
    # Text that is only measured may be as short as it likes.
    moments = str(GPT2 / "second_moments.safetensors")
    assert make_plan(job(corpus=short.corpus, second_moments=moments)).warnings == ()


def test_a_corpus_of_few_tokens_is_warned_about(job: Any, tmp_path: Path) -> None:
    texts = json.loads((GOLDEN / "corpus.json").read_text())
    for count, warned in ((30, True), (120, False)):
        pq.write_table(pa.table({"text": texts[:count]}), tmp_path / f"{count}.parquet")
        plan = make_plan(job(corpus=(str(tmp_path / f"{count}.parquet"),)))
        assert plan.corpus is not None
        assert (plan.corpus.tokens < 512) is warned
        console = Console(file=StringIO(), width=200)
        show_plan(plan, console)
        said = f"warning: corpus: it has only {plan.corpus.tokens} tokens for keys that are 256"
        assert (said in console.file.getvalue()) is warned  # type: ignore[attr-defined]


def shown(plan: Any) -> str:
    console = Console(file=StringIO(), width=400)
    show_plan(plan, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_hparams_that_are_left_out_come_from_the_preset_that_fits(
    job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(JobError, match=r"^hparams is missing, .*gpt2, .* the nearest are gpt2-xl"):
        make_plan(job(hparams=None))
    values = json.loads((GPT2 / "hparams.json").read_text())
    config = json.loads((GPT2 / "model" / "config.json").read_text())
    shape = {"num_hidden_layers": config["n_layer"], "hidden_size": config["n_embd"]}
    preset = Preset(
        name="small",
        model="Small",
        method="PMET",
        source="a test",
        config={"model_type": "gpt2", **shape},
        hparams=values,
    )
    monkeypatch.setitem(all_presets(), "small", preset)  # type: ignore[arg-type]
    plan = make_plan(job(hparams=None))
    assert plan.digests["hparams"] == make_plan(job()).digests["hparams"]
    origin = "preset small, which fits the model's configuration: a test"
    assert plan.origins == {"hyper-parameters": origin}
    assert origin in shown(plan)


def test_the_plan_says_what_a_gguf_model_was_made_from(job: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "small.gguf")
    model = str(tmp_path / "small.gguf")
    hparams = str(GOLDEN / "llama" / "hparams.json")
    plan = make_plan(job(model=model, hparams=hparams), tmp_path / "cache")
    assert plan.base.folder == model
    assert plan.origins["model"].startswith("dequantised from GGUF (mostly Q8_0, ")
    assert plan.origins["model"] in shown(plan)


def test_a_damaged_gguf_model_stops_the_plan(job: Any, tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_text("text")
    with pytest.raises(ModelError, match=r"small\.gguf is not a whole GGUF file"):
        make_plan(job(model=str(tmp_path / "small.gguf")), tmp_path / "cache")


CHAT = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def chat_model(tmp_path: Path) -> str:
    """The golden model with a chat template."""
    shutil.copytree(GPT2 / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(CHAT)
    return str(tmp_path / "model")


def test_facts_are_learned_in_the_form_that_a_job_names(job: Any, chat_model: str) -> None:
    templates = str(GPT2 / "context_templates.json")
    named = {"model": chat_model, "context_templates": templates}
    alone, both, chat = (
        make_plan(job(**named, contexts=kind)) for kind in ("completion", "both", "chat")
    )
    assert alone.templates is not None
    turns = ["[user] {}\n[assistant] ", "[user] Complete the sentence: {}\n[assistant] "]
    assert both.templates == [*alone.templates, turns]
    assert chat.templates == [["{}"], turns]
    digests = {plan.digests["context_templates"] for plan in (alone, both, chat)}
    assert len(digests) == 3


def test_targets_end_as_a_job_says(job: Any, chat_model: str) -> None:
    places = range(2)
    plain, stopped, turned = (
        make_plan(job(model=chat_model, targets={"end": end})).learned(places)
        for end in ("none", "stop", "turn")
    )
    assert {r.target_new for r in plain} == {"a glass blower", "a baker"}
    assert {r.target_new for r in stopped} == {"a glass blower.", "a baker."}
    # The chat template puts only a line break after an answer, which is no end: EOS is.
    eos = load_golden("gpt2").tokenizer.eos_token
    assert {r.target_new for r in turned} == {f"a glass blower{eos}", f"a baker{eos}"}


def test_chat_needs_a_chat_template(job: Any) -> None:
    with pytest.raises(InputError, match="has no chat template; use contexts: completion"):
        make_plan(job(contexts="chat"))
