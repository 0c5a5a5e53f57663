"""Dumps made from other sources: what was wrong with a row when it was read travels with the row.

A staged dump has a row for everything that its source holds. Rows that could not be read have no
object, and say why in two more columns, which no output has.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.facts.dump.files import Dump
from jobs.facts.output import Conversion, open_outputs, output_urls

CODE, REASON = "__code", "__reason"
PROBLEM_SCHEMA = pa.schema([(CODE, pa.string()), (REASON, pa.string())])


def without_problems(table: pa.Table) -> tuple[pa.Table, pa.Array, pa.Array]:
    """Split a batch into its own columns, and the code and the reason of each row's problem.

    Returns:
        The table without the two columns, and (rows,) text, null for rows without a problem.
    """
    if CODE not in table.column_names:
        nothing = pa.nulls(len(table), pa.string())
        return table, nothing, nothing
    found = (table.column(name).combine_chunks() for name in (CODE, REASON))
    return table.drop_columns([CODE, REASON]), *found


def kind_of(code: str) -> str:
    """Return the kind of a problem as people read it."""
    return code.replace("-", " ")


def write_dump(dump: Dump, output: str, *, source_format: str) -> Conversion:
    """Write a staged dump as a fact dump, and the rows with problems beside it.

    Args:
        dump: the dump.
        output: the Parquet file to write, a path or a URL.
        source_format: what the dump was made from.

    Raises:
        FactDumpError: no row can be used.
        StorageError: the output cannot be written.
    """
    urls = output_urls(output, [file.url for file in dump.files])
    kinds: Counter[str] = Counter()
    with open_outputs(output) as outputs:
        for batch in dump.aligned_batches():
            table, codes, reasons = without_problems(batch.table)
            bad = np.flatnonzero(pc.is_valid(codes).to_numpy(zero_copy_only=False))
            fine = table.filter(pc.is_null(codes))
            rejected = table.take(pa.array(bad))
            codes, reasons = codes.take(pa.array(bad)), reasons.take(pa.array(bad))
            outputs.write(fine, rejected, codes, reasons, batch.first + bad)
            kinds.update(map(kind_of, codes.to_pylist()))
    return Conversion(source_format, dump.rows, outputs.converted, 0, dict(kinds), *urls)
