"""Measurements of the base model, kept for later runs.

A run measures the base model on the prompts of its requests before it edits them. From night to
night most of these prompts are the same, and so is the base. A measurement is stored under the
digest of the model, the dtype, all prompts of the request and the evaluation settings; the scores
of held-out texts under that of the corpus. Both are kept in segments (`pipeline.storage.segments`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.evaluation import How
from pipeline.plan import Plan
from pipeline.storage import Segments, Store, digest_of, json_text
from pmet.evaluation import unrelated_prompts
from pmet.request import EditRequest

FORMAT = 4
_KEY, _VALUE = "key", "value"
# Consistency is recomputed: it depends on the reference texts of all requests.
_NOT_ASKED = ("case_id", "reference_texts")


@dataclass(frozen=True)
class MeasurementStore:
    """The measurements of one base model.

    Attributes:
        store: the store's folder.
        segments: those of the model.
    """

    store: Store
    segments: Segments

    @classmethod
    def of(cls, plan: Plan) -> MeasurementStore | None:
        """The store that a job names, or None."""
        url = plan.job.evaluate.store
        if url is None:
            return None
        context = {
            "format": FORMAT,
            "model": plan.digests["model"],
            # Always float32 on a CPU; the stored dtype on a GPU.
            "on_gpu": plan.base.on_gpu,
        }
        store = Store(url)
        return cls(store, Segments(store, "evaluate.store", context))

    def read(self, keys: Collection[str]) -> dict[str, Any]:
        """Return the stored values of some keys; keys without one are left out.

        Raises:
            StorageError: the store cannot be read, or a segment of it is damaged.
        """
        names = self.segments.names()
        if not (names and keys):
            return {}
        wanted = pa.array(sorted(keys), pa.string())
        with self.segments.reading(names):
            dataset = self.store.dataset(names)
            table = dataset.to_table([_KEY, _VALUE], filter=pc.field(_KEY).isin(wanted))
        columns = (table.column(name).to_pylist() for name in (_KEY, _VALUE))
        return {key: json_text.loads(value) for key, value in zip(*columns, strict=True)}

    def write(self, values: Mapping[str, Any]) -> None:
        """Store values, which must be representable as JSON, under their keys.

        Raises:
            StorageError: the store cannot be written.
        """
        if values:
            texts = [json_text.dumps(value) for value in values.values()]
            columns = {_KEY: pa.array(values, pa.string()), _VALUE: pa.array(texts, pa.string())}
            self.segments.write(pa.table(columns))


def request_key(request: EditRequest, how: How, *, answered: bool) -> str:
    """Digest of everything that is measured on a request, and of the evaluation settings.

    Args:
        request: the request.
        how: the settings.
        answered: whether the model answers it in its own words.
    """
    asked = {k: v for k, v in asdict(request).items() if k not in _NOT_ASKED}
    return digest_of([asked, asdict(how), answered])


def model_key(plan: Plan) -> str:
    """Digest of what is measured on a model besides requests: held-out texts, unrelated prompts."""
    evaluate = plan.job.evaluate
    texts = [plan.digests["corpus"], evaluate.perplexity_texts, evaluate.perplexity_tokens]
    how = How.of(evaluate, plan.job.seed)
    prompts = unrelated_prompts() if evaluate.answers else ()
    return digest_of(["model", texts, how.chat_template, prompts])
