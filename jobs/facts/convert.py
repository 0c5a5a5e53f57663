"""Converts a fact dump to edit requests.

The dump is read twice: once to decide the outcome of each row, once to write. If old objects are
known, it is read once more in between, for neighbors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.facts.dump.files import FACT, Dump
from jobs.facts.dump.problems import FINE, PROBLEMS, UNCHANGED
from jobs.facts.dump.rows import trimmed
from jobs.facts.dump.survey import ALWAYS, SettledFacts, Side, survey
from jobs.facts.neighbors import Neighbors
from jobs.facts.output import Conversion, open_outputs, output_urls
from jobs.facts.staged import kind_of, without_problems
from jobs.facts.templates import Templates
from jobs.facts.wording import Wording
from pipeline.data import REQUEST_COLUMNS, SEPARATOR, normal_column, with_columns
from pipeline.errors import FactDumpError

QUESTIONS = "question_prompts"
_CODES = pa.array([problem.code for problem in PROBLEMS])
_KINDS = {problem.code: problem.kind for problem in PROBLEMS}


def convert_dump(
    dump: Dump,
    templates: Templates,
    output: str,
    *,
    previous: Dump | None = None,
    as_of: datetime | None = None,
    only_changed: bool = False,
    may_be_none: bool = False,
    source_format: str = "fact dump",
) -> Conversion:
    """Write the valid facts of a dump as edit requests, and its other rows with their reasons.

    Args:
        dump: the dump.
        templates: the templates of its relations.
        output: the Parquet file to write, a path or a URL.
        previous: an earlier dump. If a fact has changed, its object there becomes the request's
            ``target_true``, unless the dump's own column ``target_true`` overrides it.
        as_of: facts whose ``valid_until`` is at or before this time have expired; now if None.
        only_changed: skip the facts that ``previous`` holds with the same object. They are neither
            converted nor rejected, but still serve as neighbors.
        may_be_none: accept that no row is converted.
        source_format: what the dump was made from.

    Raises:
        FactDumpError: a file is damaged, or no row can be converted.
        StorageError: the output cannot be written.
    """
    files = [file.url for side in (dump, previous) if side is not None for file in side.files]
    urls = output_urls(output, files)
    if not dump.rows:
        raise FactDumpError(f"{', '.join(files)}: there are no rows; give a dump with facts")
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
        # Neighbors come from facts that are not edited: without only_changed, from those that are
        # not known to have changed.
        staying = found.codes == (UNCHANGED if only_changed else FINE)
        staying[truths.rows] = False
        neighbors.collect(_facts_where(dump, staying))
    wording = Wording(templates)
    kinds: Counter[str] = Counter()
    with open_outputs(output, may_be_none=may_be_none) as outputs:
        for first, whole in ((batch.first, batch.table) for batch in dump.aligned_batches()):
            table, own_codes, own_reasons = without_problems(whole)
            codes = found.codes[first : first + len(table)]
            good = np.flatnonzero(codes == FINE)
            bad = np.flatnonzero((codes != FINE) & (codes != UNCHANGED))
            facts = table.take(pa.array(good))
            requests = _requests(facts, truths.of(first + good), wording, neighbors)
            why = pc.coalesce(own_codes.take(pa.array(bad)), _CODES.take(pa.array(codes[bad])))
            reasons = pc.coalesce(own_reasons.take(pa.array(bad)), found.reasons(first + bad))
            outputs.write(requests, table.take(pa.array(bad)), why, reasons, first + bad)
            kinds.update(why.to_pylist())
    rejected = {_KINDS.get(code, kind_of(code)): count for code, count in kinds.items()}
    unchanged = int((found.codes == UNCHANGED).sum())
    return Conversion(source_format, dump.rows, outputs.converted, unchanged, rejected, *urls)


class _Truths:
    """Collects the old objects of facts, by row, and the facts that the earlier dump also has."""

    def __init__(self) -> None:
        self.rows = self.unchanged = np.zeros(0, np.int64)
        self._parts: list[pa.Table] = []
        self._objects = pa.array([], pa.string())

    def add(
        self, facts: SettledFacts, old: SettledFacts | None
    ) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
        """Add a partition's valid facts; return their relations and old objects."""
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
        """Sort all parts by row."""
        if self._parts:
            table = pa.concat_tables(self._parts).sort_by("row")
            self.rows = table.column("row").to_numpy()
            self._objects = table.column("truth").combine_chunks()

    def of(self, rows: np.ndarray) -> pa.Array:
        """Return the old object of each row, null if there is none."""
        if not len(self.rows):
            return pa.nulls(len(rows), pa.string())
        at = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        return self._objects.take(pa.array(at, mask=self.rows[at] != rows))


def _same(one: pa.ChunkedArray, other: pa.ChunkedArray) -> pa.Array:
    """(rows,) bool: whether both are present and have the same normal form."""
    equal = pc.equal(one, other).combine_chunks()
    differ = pc.fill_null(pc.invert(equal), False)
    forms = (normal_column(text.filter(differ).combine_chunks()) for text in (one, other))
    return pc.fill_null(pc.replace_with_mask(equal, differ, pc.equal(*forms)), False)


def _facts_where(dump: Dump, mask: np.ndarray) -> Iterator[pa.Table]:
    """Yield the facts of some rows, a batch at a time."""
    for batch in dump.batches(FACT):
        chosen = mask[batch.first : batch.first + len(batch.table)]
        facts = batch.table.filter(pa.array(chosen))
        if len(facts):
            yield pa.table({name: trimmed(facts.column(name)) for name in FACT})


def _requests(
    facts: pa.Table, truths: pa.Array, wording: Wording, neighbors: Neighbors
) -> pa.Table:
    """Build edit requests; the dump's columns are kept under names that requests do not use."""
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
    if wording.asks:
        columns[QUESTIONS] = wording.questions(numbers, subjects)
    if wording.separates:
        columns[SEPARATOR] = _separators(facts, wording.separators(numbers))
    replaced = ("subject", "target_true", *([SEPARATOR] if wording.separates else []))
    own = [name for name in replaced if name in facts.column_names]
    table = with_columns(facts.drop_columns(own), columns)
    first = [name for name in REQUEST_COLUMNS if name in table.column_names]
    return table.select(first + [name for name in table.column_names if name not in first])


def _separators(facts: pa.Table, by_relation: pa.Array) -> pa.Array | pa.ChunkedArray:
    """Return the separator of each row: the dump's own if it has one, else its relation's."""
    own = facts.column(SEPARATOR) if SEPARATOR in facts.column_names else None
    if own is None or not pa.types.is_string(own.type):
        return by_relation
    return pc.coalesce(own, by_relation)
