"""``pmet statistics`` on the command line."""

from __future__ import annotations

import inspect
import json
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from jobs.cli import statistics as command
from pipeline.job.config import EditSettings
from pipeline.second_moments.files import PROVENANCE, TENSORS
from pmet.update.second_moments import MAX_TOKENS
from tests.conftest import GOLDEN
from tests.jobs.conftest import Invoke

GPT2 = GOLDEN / "gpt2"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = json.loads((GOLDEN / "corpus.json").read_text())[:60]
    pq.write_table(pa.table({"text": texts}), tmp_path / "corpus.parquet")
    return tmp_path / "corpus.parquet"


@pytest.fixture
def statistics(pmet: Invoke) -> Invoke:
    """Run ``pmet statistics``; return exit status, output and error output."""
    return partial(pmet, "statistics")


def test_it_computes_once_and_says_what(statistics: Invoke, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "moments"
    command = (GPT2 / "model", corpus, "--output", output, "--layers", "0,2")
    options = ("--tokens", 500, "--max-length", 10, "--workers", 1)
    status, out, _ = statistics(*command, *options)
    assert status == 0
    assert not ray.is_initialized()
    assert {p.name for p in output.iterdir()} == {TENSORS, PROVENANCE}
    said = json.loads((output / PROVENANCE).read_text())
    assert (said["tokens"], said["max_length"], said["layers"]) == (500, 10, [0, 2])
    for text in ("500 tokens of", str(output), "transformer.h.2.mlp.c_proj", "%"):
        assert text in out
    # The second time nothing is computed, and the output is the same.
    before = (output / TENSORS).stat().st_mtime_ns
    assert statistics(*command, *options)[:2] == (0, out)
    assert (output / TENSORS).stat().st_mtime_ns == before
    status, _, err = statistics(*command, "--tokens", 501, "--max-length", 10)
    assert (status, "holds other second moments (budget changed); name another" in err) == (2, True)
    # This process computes the same, to the bit.
    here = (*command[:3], tmp_path / "here", *command[4:], *options[:-1], 0)
    assert statistics(*here)[0] == 0
    assert (tmp_path / "here" / TENSORS).read_bytes() == (output / TENSORS).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--layers": None}, "either --hparams (a preset or a file) or --layers"),
        ({"--hparams": "gpt-j-6b"}, "either --hparams (a preset or a file) or --layers"),
        ({"--layers": "1;2"}, "--layers: '1;2' is not a list of layers; write it like 3,4,5"),
        ({"--layers": "2,1"}, "ascending"),
        ({"--layers": "9" * 5000}, "is not a list of layers"),
        ({"--layers": "99"}, "99"),
        ({"--layers": None, "--hparams": "gpt-5"}, "name a file or a preset ("),
        ({"--workers": "many"}, "--workers: 'many' is neither auto nor a whole number"),
        ({"--gpus-per-worker": "1.5"}, "--gpus-per-worker: 1.5 is neither a fraction up to 1"),
        ({"--workers": "-1"}, "--workers: '-1' is neither auto nor a whole number"),
        ({"--workers": "0", "--gpus-per-worker": "1"}, "--workers 0 computes in this process, on"),
        ({"--workers": "0", "--address": "host:6379"}, "leave out --gpus-per-worker and --address"),
        ({"model": "/no/such"}, "model /no/such is not a folder"),
        ({"corpus": "/no/such.parquet"}, "/no/such.parquet matches no file"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_2(
    statistics: Invoke,
    corpus: Path,
    tmp_path: Path,
    changes: dict[str, str | None],
    message: str,
) -> None:
    given = {"model": GPT2 / "model", "corpus": corpus, "--layers": "0"} | changes
    options = [x for k, v in given.items() if k.startswith("--") and v for x in (k, v)]
    status, out, err = statistics(
        given["model"], given["corpus"], "--output", tmp_path / "out", *options
    )
    assert status == 2
    assert message in err
    assert "Traceback" not in out + err
    assert len([line for line in err.splitlines() if line.startswith("pmet:")]) == 1
    assert not ray.is_initialized()
    assert not (tmp_path / "out").exists()


def test_the_command_has_the_defaults_of_a_job() -> None:
    default = {name: p.default for name, p in inspect.signature(command).parameters.items()}
    tokens = EditSettings.model_fields["corpus_tokens"].default
    assert (default["tokens"], default["max_length"]) == (tokens, MAX_TOKENS) == ("auto", 1024)


def test_the_output_must_be_named(statistics: Invoke, corpus: Path) -> None:
    status, _, err = statistics(GPT2 / "model", corpus, "--layers", "0")
    assert (status, "--output" in err) == (2, True)


def test_gpus_that_are_not_there_are_refused(
    statistics: Invoke, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    given = (GPT2 / "model", corpus, "--output", tmp_path / "out", "--layers", "0")
    for workers in ("auto", "2"):
        status, _, err = statistics(*given, "--workers", workers, "--gpus-per-worker", "0.5")
        assert status == 2
        assert "--gpus-per-worker: 0.5, but this machine has no GPU" in err
        assert "set --gpus-per-worker to 0, to compute on CPUs" in err
