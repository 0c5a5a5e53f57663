"""Fictional entities in the shape of Wikidata's."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.facts.sources import ConvertOptions, convert_source

NOW = datetime(2026, 11, 28, 6, tzinfo=UTC)
MAPPING = """\
P19:
  prompt: "{} was born in"
  paraphrases: ["The birthplace of {} is"]
  question: "Where was {} born?"
P6: {prompt: "The mayor of {} is"}
P569: {prompt: "{} was born on"}
P2048: {prompt: "The height of {} is"}
P1448: {prompt: "{} is officially called"}
"""

Convert = Callable[..., tuple[Any, list[dict[str, Any]], list[dict[str, Any]]]]


def ref(name: str) -> dict[str, Any]:
    kind = "item" if name[0] == "Q" else "property"
    value = {"entity-type": kind, "numeric-id": int(name[1:]), "id": name}
    return {"type": "wikibase-entityid", "value": value}


def text(value: str) -> dict[str, Any]:
    return {"type": "string", "value": value}


def time(value: str, precision: int = 11) -> dict[str, Any]:
    return {
        "type": "time",
        "value": {
            **{"time": value, "precision": precision, "timezone": 0, "before": 0, "after": 0},
            "calendarmodel": "http://www.wikidata.org/entity/Q1985727",
        },
    }


def year(number: int) -> dict[str, Any]:
    return time(f"+{number}-00-00T00:00:00Z", 9)


def amount(value: str, unit: str = "1") -> dict[str, Any]:
    return {"type": "quantity", "value": {"amount": value, "unit": unit}}


def snak(value: dict[str, Any] | str) -> dict[str, Any]:
    """A value, or ``novalue`` or ``somevalue``."""
    if isinstance(value, str):
        return {"snaktype": value}
    return {"snaktype": "value", "datavalue": value}


def statement(
    value: dict[str, Any] | str, rank: str = "normal", **qualifiers: dict[str, Any] | str
) -> dict[str, Any]:
    found = {"mainsnak": snak(value), "type": "statement", "rank": rank, "references": []}
    if qualifiers:
        found["qualifiers"] = {name: [snak(v)] for name, v in qualifiers.items()}
    return found


def entity(name: str, label: str | None = None, /, **claims: Any) -> dict[str, Any]:
    """An entity with an English label; claims are single values, or lists of statements."""
    labels = {} if label is None else {"en": {"language": "en", "value": label}}
    return {
        "type": "item" if name[0] == "Q" else "property",
        "id": name,
        # Wikibase writes an empty map as a list.
        "labels": labels or [],
        "descriptions": {"en": {"language": "en", "value": "of the same name"}},
        "claims": {
            key: value if isinstance(value, list) else [statement(value)]
            for key, value in claims.items()
        },
        "sitelinks": {},
    }


def line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def dump_of(entities: list[Any]) -> bytes:
    """A dump; entities that are bytes are written as they are."""
    lines = [e if isinstance(e, bytes) else line(e) for e in entities]
    return b"[\n" + b",\n".join(lines) + b"\n]\n"


def export_of(*pages: tuple[str, Any]) -> bytes:
    """An export with a page per title; a page is an entity, or several revisions of it."""
    from xml.sax.saxutils import escape

    parts = []
    for title, revisions in pages:
        texts = revisions if isinstance(revisions, list) else [revisions]
        model = "wikibase-property" if title.startswith("Property:") else "wikibase-item"
        inside = "".join(
            f"<revision><id>{100 + n}</id><timestamp>2026-11-27T0{n}:00:00Z</timestamp>"
            f"<contributor><id>7</id></contributor><model>{model}</model>"
            f'<text xml:space="preserve">{escape(json.dumps(t))}</text></revision>'
            for n, t in enumerate(texts)
        )
        parts.append(f"<page><title>{title}</title><ns>0</ns><id>1</id>{inside}</page>")
    body = "".join(parts)
    return (
        '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11">'
        f"<siteinfo><dbname>wikidatawiki</dbname></siteinfo>{body}</mediawiki>"
    ).encode()


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """Convert entities, or the bytes of a file; return the result, the requests, the rejected."""

    def converted(content: Any, name: str = "dump.json", **options: Any):
        data = content if isinstance(content, bytes) else dump_of(content)
        packed = {".gz": gzip.compress, ".bz2": bz2.compress}.get(Path(name).suffix, bytes)(data)
        (tmp_path / name).write_bytes(packed)
        (tmp_path / "mapping.yaml").write_text(MAPPING)
        output = options.pop("output", str(tmp_path / "out" / "facts.parquet"))
        if not options.get("as_dump"):
            options = {"as_of": NOW} | options
        options = {"templates": str(tmp_path / "mapping.yaml")} | options
        found = convert_source(str(tmp_path / name), output, ConvertOptions(**options))
        return found, *(pq.read_table(p).to_pylist() for p in (output, found.rejected_output))

    return converted
