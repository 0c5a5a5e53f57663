"""Damaged files of every kind cause an error that says so, no other exception and no hang.

``PMET_FUZZ`` sets the number of inputs of each kind.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.tables import read_requests
from pipeline.job.config import load_job
from pmet.errors import PMETError

COUNT = int(os.environ.get("PMET_FUZZ", "500"))

JOB = """\
model: models/gpt2   # a folder
requests: [facts/*.parquet, "more facts.parquet"]
output: runs/2026-11-23
hparams: gpt-j-6b
second_moments: stats/gpt-j-6b
corpus: "corpora/wiki/*.parquet"
context_templates: null
seed: 0
targets: {workers: 8, gpus_per_worker: 0.5, batch_size: auto}
update:
  ranks: 4
  offload: none
evaluate: {sample: 2000}
gates: {efficacy: 0.95, perplexity_increase: 2e-2}
"""
PIECES = ("&a", "*a", "<<: ", "!!python/object/apply:os.system [ls]", "? ", "- ", ": ", "'", '"')
PIECES += ("{", "}", "[", "]", "|\n", ">\n", "\t", "\x00", "\ud7ff", "😀", "%YAML 1.1\n", "---\n")
PIECES += ("1e999", "0x10", "on", "~", "2026-11-23", "._", "#", "@", "`", "\n", " " * 40, "9" * 400)


def table() -> pa.Table:
    """Requests with all columns; some texts are long enough to fill pages of their own."""
    return pa.table(
        {
            "prompt": ["{} is in", "{} works as", None, "no place"] * 8,
            "subject": pa.array(["Paris", "Mirk", "x" * 500, ""] * 8).dictionary_encode(),
            "target_new": ["Rome", "a baker", "ink", "\u00e9"] * 8,
            "case_id": [1.0, None, float("nan"), 2.5] * 8,
            "neighborhood_prompts": [["a", "b"], [], None, [None]] * 8,
            "note": [{"deep": [1, 2]}, None, {"deep": []}, {"deep": None}] * 8,
        }
    )


def parquet_files() -> list[bytes]:
    """The table in several forms."""
    forms = (
        {"compression": "snappy"},
        {"compression": "zstd", "data_page_size": 64},
        {"compression": "none", "use_dictionary": False},
        {"row_group_size": 5, "data_page_version": "2.0"},
    )
    files = []
    for form in forms:
        sink = io.BytesIO()
        pq.write_table(table(), sink, **form)
        files.append(sink.getvalue())
    return files


def damaged(draw: random.Random, data: bytes) -> bytes:
    """Change some bytes, remove or duplicate a part, or truncate the data."""
    broken = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        start = draw.randrange(len(broken))
        stop = min(len(broken), start + draw.choice((1, 1, 2, 4, 16, 200)))
        match draw.randrange(5):
            case 0:
                broken[start:stop] = draw.randbytes(stop - start)
            case 1:
                broken[start] ^= 1 << draw.randrange(8)
            case 2:
                del broken[start:stop]
            case 3:
                broken[start:start] = broken[start:stop]
            case 4:
                # The footer holds the positions of everything else.
                place = max(0, len(broken) - draw.randrange(1, 600))
                broken[place : place + 1] = draw.randbytes(1)
        if not broken:
            return b""
    return bytes(broken if draw.random() < 0.9 else broken[: draw.randrange(len(broken))])


def texts(draw: random.Random) -> Iterator[bytes]:
    """Job files with lines moved and YAML syntax inserted."""
    while True:
        lines = JOB.splitlines(keepends=True)
        for _ in range(draw.randrange(3)):
            lines.insert(draw.randrange(len(lines)), lines.pop(draw.randrange(len(lines))))
        text = "".join(lines)
        for _ in range(draw.randrange(1, 6)):
            place = draw.randrange(len(text) + 1)
            text = text[:place] + draw.choice(PIECES) + text[place + draw.choice((0, 0, 1, 5)) :]
        data = text.encode()
        yield data if draw.random() < 0.8 else damaged(draw, data)


@pytest.mark.slow
def test_damaged_parquet(tmp_path: Path) -> None:
    draw, files, path = random.Random(0), parquet_files(), tmp_path / "requests.parquet"
    refused: list[str] = []
    for _ in range(COUNT):
        path.write_bytes(damaged(draw, draw.choice(files)))
        try:
            found = read_requests(str(path))
        except PMETError as error:
            refused.append(str(error))
        else:
            # If the file can be read, each row is a request or has a reason.
            rows = [*found.rows, *(rejection.row for rejection in found.rejected)]
            assert sorted(rows) == list(range(len(found.table)))
            assert len(list(found.requests)) == len(found.rows)
            assert len(found.rejected_table()) == len(found.rejected)
    assert 0.1 * COUNT < len(refused) < COUNT
    assert all("requests.parquet" in text for text in refused)


@pytest.mark.slow
def test_damaged_job_files(tmp_path: Path) -> None:
    draw, path = random.Random(0), tmp_path / "job.yaml"
    refused: list[str] = []
    for data in islice(texts(draw), COUNT):
        path.write_bytes(data)
        try:
            load_job(path)
        except PMETError as error:
            refused.append(str(error))
    assert 0.1 * COUNT < len(refused) < COUNT
    assert all("job.yaml" in text for text in refused)
