"""A fact dump converted into edit requests.

The dump is read twice: once to find what becomes of each row, once to write. Where old objects are
known, it is read once more in between, for neighbors.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.facts.dump import FACT, Dump
from jobs.facts.neighbors import Neighbors
from jobs.facts.output import Conversion, open_outputs, output_urls
from jobs.facts.problems import FINE, PROBLEMS, UNCHANGED
from jobs.facts.rows import trimmed
from jobs.facts.survey import ALWAYS, SettledFacts, Side, survey
from jobs.facts.templates import Templates
from jobs.facts.wording import Wording
from pipeline.data import REQUEST_COLUMNS, normal_column, with_columns
from pipeline.errors import FactDumpError


def convert_dump(
    dump: Dump,
    templates: Templates,
    output: str,
    *,
    previous: Dump | None = None,
    as_of: datetime | None = None,
    only_changed: bool = False,
    may_be_none: bool = False,
) -> Conversion:
    """Write the facts that a dump holds as edit requests, and its other rows with their reasons.

    Args:
        dump: the dump.
        templates: how its relations are put into words.
        output: the Parquet file to write, a path or a URL.
        previous: an earlier dump: its object of a fact that has changed is the request's
            ``target_true``, unless the dump's own column ``target_true`` says another.
        as_of: facts whose ``valid_until`` is not later than this no longer hold; now, if not
            given.
        only_changed: leave out the facts that ``previous`` holds with the same object; they are
            neither converted nor rejected, and others' neighbors all the same.
        may_be_none: whether it is well that no row is converted.

    Raises:
        FactDumpError: a file is damaged, or no row can be converted.
        StorageError: the output cannot be written.
    """
    files = [file.url for side in (dump, previous) if side is not None for file in side.files]
    urls = output_urls(output, files)
    if not dump.rows:
        raise FactDumpError(f"{', '.join(files)}: no rows there; give a dump that holds facts")
    truths, neighbors = _Truths(), Neighbors()

    def take(facts: SettledFacts, old: SettledFacts | None = None) -> None:
        relations, found = truths.add(facts, old)
        neighbors.want(relations, found)

    side = Side(dump, as_of or datetime.now(UTC), templates.keys())
    beside = [] if previous is None else [Side(previous, ALWAYS)]
    found = survey(side, *beside, take=take)
    truths.close()
    if only_changed:
        found.codes[truths.unchanged] = UNCHANGED
    if len(truths.rows):
        # Of what is not to be edited. Where that is not said, what is not known to have changed.
        staying = found.codes == (UNCHANGED if only_changed else FINE)
        staying[truths.rows] = False
        neighbors.collect(_facts_where(dump, staying))
    wording = Wording(templates)
    with open_outputs(output, may_be_none=may_be_none) as outputs:
        for first, table in ((batch.first, batch.table) for batch in dump.aligned_batches()):
            codes = found.codes[first : first + len(table)]
            good = np.flatnonzero(codes == FINE)
            bad = np.flatnonzero((codes != FINE) & (codes != UNCHANGED))
            facts = table.take(pa.array(good))
            requests = _requests(facts, truths.of(first + good), wording, neighbors)
            rejected = table.take(pa.array(bad))
            outputs.write(requests, rejected, found.reasons(first + bad), first + bad)
    kinds, counts = np.unique(found.codes[found.codes != FINE], return_counts=True)
    reasons = {PROBLEMS[k].kind: int(n) for k, n in zip(kinds, counts, strict=True)}
    unchanged = reasons.pop(PROBLEMS[UNCHANGED].kind, 0)
    return Conversion("fact dump", dump.rows, outputs.converted, unchanged, reasons, *urls)


class _Truths:
    """The old objects of facts that have one, by row; and which facts the earlier dump has too."""

    def __init__(self) -> None:
        self.rows = self.unchanged = np.zeros(0, np.int64)
        self._parts: list[pa.Table] = []
        self._objects = pa.array([], pa.string())

    def add(
        self, facts: SettledFacts, old: SettledFacts | None
    ) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
        """Note the facts of a partition that hold; returns their relations and old objects."""
        holding = facts.holding
        held = facts.facts.take(pa.array(holding))
        truth = held.column("target_true")
        if old is not None:
            places = old.places(facts.numbers.facts[holding])
            before = old.facts.column("object").take(pa.array(places, mask=places < 0))
            truth = pc.coalesce(truth, before)
            same = _same(before, held.column("object"))
            rows = held.column("row").filter(same).to_numpy()
            self.unchanged = np.concatenate([self.unchanged, rows])
        differs = pc.and_(pc.is_valid(truth), pc.invert(_same(truth, held.column("object"))))
        part = pa.table(
            {"row": held.column("row"), "relation": held.column("relation"), "truth": truth}
        ).filter(differs)
        self._parts.append(part.select(["row", "truth"]))
        return part.column("relation"), part.column("truth")

    def close(self) -> None:
        """Put all parts in the order of rows."""
        if self._parts:
            table = pa.concat_tables(self._parts).sort_by("row")
            self.rows = table.column("row").to_numpy()
            self._objects = table.column("truth").combine_chunks()

    def of(self, rows: np.ndarray) -> pa.Array:
        """The old object of each row, null where there is none."""
        if not len(self.rows):
            return pa.nulls(len(rows), pa.string())
        at = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        return self._objects.take(pa.array(at, mask=self.rows[at] != rows))


def _same(one: pa.ChunkedArray, other: pa.ChunkedArray) -> pa.Array:
    """(rows,) bool: whether both are there and have one normal form."""
    equal = pc.equal(one, other).combine_chunks()
    differ = pc.fill_null(pc.invert(equal), False)
    forms = (normal_column(text.filter(differ).combine_chunks()) for text in (one, other))
    return pc.fill_null(pc.replace_with_mask(equal, differ, pc.equal(*forms)), False)


def _facts_where(dump: Dump, mask: np.ndarray) -> Iterator[pa.Table]:
    """The facts of some rows, a batch at a time."""
    for batch in dump.batches(FACT):
        chosen = mask[batch.first : batch.first + len(batch.table)]
        facts = batch.table.filter(pa.array(chosen))
        if len(facts):
            yield pa.table({name: trimmed(facts.column(name)) for name in FACT})


def _requests(
    facts: pa.Table, truths: pa.Array, wording: Wording, neighbors: Neighbors
) -> pa.Table:
    """Edit requests; the dump's columns travel along, under names that requests do not use."""
    subjects, relations, objects = (trimmed(facts.column(name)) for name in FACT)
    numbers = wording.numbers(relations)
    beside, counts = neighbors.of(relations, truths, subjects)
    columns = {
        "prompt": wording.prompts(numbers),
        "subject": subjects,
        "target_new": wording.targets(numbers, objects),
        "target_true": wording.targets(numbers, truths),
        "paraphrase_prompts": wording.paraphrases(numbers, subjects),
        "neighborhood_prompts": wording.neighborhoods(numbers, beside, counts),
    }
    own = [name for name in ("subject", "target_true") if name in facts.column_names]
    table = with_columns(facts.drop_columns(own), columns)
    first = [name for name in REQUEST_COLUMNS if name in table.column_names]
    return table.select(first + [name for name in table.column_names if name not in first])
