"""``pmet inspect`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.inspect import inspection, views
from tests.conftest import GOLDEN
from tests.jobs.conftest import Invoke
from tests.jobs.inspect.test_inspection import QUICK, known_facts, write

MODEL = GOLDEN / "llama" / "model"


def test_it_prints_a_table_and_what_to_do(
    pmet: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = write(tmp_path, known_facts())
    (tmp_path / "quick.yaml").write_text(QUICK)
    output = tmp_path / "out"
    options = ("--output", output, "--hparams", tmp_path / "quick.yaml", "--workers", 0)
    monkeypatch.setattr(inspection, "MOST_COMPARED", 2)
    # Drawing takes most of the time.
    monkeypatch.setattr(views, "line_chart", lambda *_, **__: "")
    status, out, err = pmet("inspect", MODEL, facts, *options, "--facts", 6, "--samples", 1)
    assert status == 0, err
    for text in ("hidden state", "FFN from here, 2 wide", "Edit layers", "pmet tune", str(output)):
        assert text in out
    record = json.loads((output / "inspect.json").read_text())
    assert len(record["rows"]) == 6
    assert record["optimisation"]["facts"] == 2
    assert [row["row"] for row in record["rows"]] == sorted(row["row"] for row in record["rows"])
    assert record["noise"] == {"deviations": 3.0, "samples": 1}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--workers", "some"), "--workers: 'some' is neither auto nor a whole number"),
        (("--workers", 0, "--gpus-per-worker", 1), "leave out --gpus-per-worker"),
        (("--workers", 0, "--hparams", "none.yaml"), "hparams: none.yaml cannot be read"),
        (("--facts", 0), "--facts"),
    ],
)
def test_what_cannot_be_used_is_refused(
    pmet: Invoke, tmp_path: Path, options: tuple[object, ...], text: str
) -> None:
    facts = write(tmp_path, known_facts()[:1])
    status, _, err = pmet("inspect", MODEL, facts, "--output", tmp_path / "out", *options)
    assert status == 2
    assert text in err.replace("\n", " ")
