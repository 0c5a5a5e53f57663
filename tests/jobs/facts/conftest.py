"""Small dumps, written where a test wants them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.facts.dump.files import Dump, open_dump

NAMES = ("subject", "relation", "object")
NOW = datetime(2026, 11, 23, 6, tzinfo=UTC)

Write = Callable[..., str]


def fact(subject: Any = "Lyon", relation: Any = "country", object: Any = "France", **more: Any):
    return {"subject": subject, "relation": relation, "object": object, **more}


def table(rows: list[dict[str, Any]]) -> pa.Table:
    """Return rows as a table whose fact columns are text, even if all values are null."""
    found = pa.Table.from_pylist(rows or [fact()])
    for name in NAMES:
        if name in found.column_names and pa.types.is_null(found.schema.field(name).type):
            index = found.schema.get_field_index(name)
            found = found.set_column(index, name, found.column(name).cast(pa.string()))
    return found if rows else found.slice(0, 0)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows, or a table, to a Parquet file; return its path."""

    def write_file(content: list[dict[str, Any]] | pa.Table, name: str = "dump.parquet") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(content if isinstance(content, pa.Table) else table(content), path)
        return str(path)

    return write_file


@pytest.fixture
def dump(write: Write) -> Callable[..., Dump]:
    """Write rows and open them as a dump."""
    return lambda content, name="dump.parquet": open_dump(write(content, name))
