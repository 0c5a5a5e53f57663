"""Reads the current dump as sorted edit requests.

They are sorted by relation and subject, so that the same facts give the same requests whatever the
order of the dump and whatever versions came before.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import date, datetime

import pyarrow as pa
import pyarrow.compute as pc

from jobs.facts.convert import QUESTIONS, convert_dump
from jobs.facts.dump.files import open_dump
from jobs.facts.dump.problems import CONTRADICTION, PROBLEMS
from jobs.facts.output import Conversion
from jobs.facts.templates import load_templates
from jobs.refresh.config import RefreshConfig
from jobs.refresh.ledger import DumpFact, Key
from pipeline.data import SEPARATOR
from pipeline.storage import read_parquet

SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("subject", pa.string()),
        ("target_new", pa.string()),
        ("target_true", pa.string()),
        ("paraphrase_prompts", pa.list_(pa.string())),
        ("neighborhood_prompts", pa.list_(pa.string())),
        ("relation", pa.string()),
        ("object", pa.string()),
        ("source", pa.string()),
    ]
)
"""Columns of the requests, besides ``separator`` if the dump or its templates give any, and
``question_prompts`` if the templates do. Other columns of the dump are dropped: one that changes
every night, such as ``updated_at``, would make all requests look new."""


@dataclass(frozen=True)
class Tonight:
    """The content of the current dump.

    Attributes:
        requests: one row per fact to edit (``SCHEMA``), sorted.
        undecided: facts on which the dump contradicts itself.
        set_aside: rejected rows, with ``row`` and ``reason``.
        conversion: outcome of the dump's rows.
    """

    requests: pa.Table
    undecided: set[Key]
    set_aside: pa.Table
    conversion: Conversion

    def facts(self) -> Iterator[DumpFact]:
        """Yield the facts of the requests."""
        names = ("relation", "subject", "object", "prompt", "source")
        columns = (self.requests.column(name).to_pylist() for name in names)
        return map(DumpFact._make, zip(*columns, strict=True))


def read_dump(config: RefreshConfig, night: date, as_of: datetime) -> Tonight:
    """Read and check the dump of a date.

    Args:
        config: the settings of the refresh.
        night: date of the dump.
        as_of: facts whose ``valid_until`` is at or before this time have expired.

    Raises:
        FactDumpError: a dump or the templates cannot be used.
        RequestTableError: no dump was found.
        StorageError: a dump cannot be read.
    """
    templates = load_templates(config.templates)
    dump = open_dump(config.facts_of(night), config.columns)
    baseline = None
    if config.baseline is not None:
        baseline = open_dump(config.baseline, config.columns)
    with tempfile.TemporaryDirectory() as folder:
        conversion = convert_dump(
            dump,
            templates,
            f"{folder}/requests.parquet",
            previous=baseline,
            as_of=as_of,
            only_changed=baseline is not None,
            may_be_none=True,
        )
        requests = read_parquet(conversion.output)
        set_aside = read_parquet(conversion.rejected_output)
    columns = {field.name: _column(requests, field) for field in SCHEMA}
    separators = _column(requests, pa.field(SEPARATOR, pa.string()))
    asks = any(relation.question for relation in templates.values())
    asked = requests.column(QUESTIONS) if asks else None
    requests = pa.table(columns, schema=SCHEMA)
    if separators.null_count < len(separators):
        requests = requests.append_column(SEPARATOR, separators)
    if asked is not None:
        requests = requests.append_column(QUESTIONS, asked)
    return Tonight(sorted_requests(requests), _undecided(set_aside), set_aside, conversion)


def sorted_requests(requests: pa.Table) -> pa.Table:
    """Sort requests by relation and subject."""
    return requests.sort_by([("relation", "ascending"), ("subject", "ascending")])


def of_facts(requests: pa.Table, facts: Collection[Key]) -> pa.Table:
    """Return the requests of some facts."""
    mask = [key in facts for key in keys(requests)]
    return requests.filter(pa.array(mask, pa.bool_()))


def keys(requests: pa.Table) -> list[Key]:
    """Return the fact of each request."""
    columns = (requests.column(name).to_pylist() for name in ("relation", "subject"))
    return list(zip(*columns, strict=True))


def _column(table: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    """Return a column with its type in ``SCHEMA``; null if the dump has no such text column."""
    if field.name not in table.column_names:
        return pa.chunked_array([pa.nulls(len(table), field.type)])
    try:
        column = table.column(field.name).cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.chunked_array([pa.nulls(len(table), field.type)])
    # A trailing line break belongs to the prompt; templates are already trimmed. A separator is
    # mostly white space.
    trims = pa.types.is_string(field.type) and field.name not in ("prompt", SEPARATOR)
    return pc.utf8_trim_whitespace(column) if trims else column


def _undecided(set_aside: pa.Table) -> set[Key]:
    rows = set_aside.filter(pc.equal(set_aside.column("code"), PROBLEMS[CONTRADICTION].code))
    return {(relation.strip(), subject.strip()) for relation, subject in keys(rows)}
