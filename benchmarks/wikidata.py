"""Wikidata dumps: time and peak memory of a conversion, on fictional entities of the real shape.

python -m benchmarks.wikidata --entities 100000

The command runs as a user would type it, in its own process. An entity has labels, descriptions and
aliases in many languages, statements with qualifiers and references, and site links, as in
``latest-all.json``; the size of a line is printed.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.facts import fastest
from benchmarks.harness import show

LANGUAGES = (
    *("en", "de", "fr", "es", "it", "nl", "ru", "zh", "ja", "ar", "pt", "sv", "pl", "uk", "fa"),
    *("ca", "cs", "fi", "he", "hu", "id", "ko", "nb", "ro", "tr", "vi", "arz", "ast", "bg", "bn"),
)
MAPPED = {"P19": "{} was born in", "P27": "{} is a citizen of", "P569": "{} was born on"}
ITEM_PROPERTIES = ("P19", "P27", "P31", "P106", "P69", "P735", "P734", "P21", "P463")
TEXT_PROPERTIES = ("P214", "P227", "P244", "P345", "P646", "P1412", "P18", "P373")
ENDINGS = ("", ".gz", ".bz2")


def main() -> None:
    """Write a sample of a dump, and time its conversion."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entities", type=int, default=100_000, help="entities in the sample")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the fastest counts")
    parser.add_argument(
        "--compression", nargs="*", default=[".gz"], choices=ENDINGS, help="file endings"
    )
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "mapping.yaml").write_text(mapping())
        for ending in options.compression:
            path = folder / f"sample.json{ending}"
            size = write_sample(path, options.entities)
            words = ("convert", path.name, "out/requests.parquet", "--templates", "mapping.yaml")
            rows.append(fastest(path.name, words, folder, options.rounds))
            path.unlink()
    show(
        f"Wikidata sample of {options.entities:,} entities, {size / options.entities:,.0f} bytes "
        "each",
        rows,
        options,
        "Seconds and peak memory of the whole process, including its imports.",
    )


def write_sample(path: Path, count: int) -> int:
    """Write a dump of fictional entities; return its size before compression."""
    size = 0
    with opened(path) as stream:
        stream.write(b"[\n")
        for number, entity in enumerate(entities(count), 1):
            line = msgspec.json.encode(entity)
            size += len(line)
            stream.write(line + (b",\n" if number < count else b"\n"))
        stream.write(b"]\n")
    return size


def opened(path: Path) -> Any:
    """Open a file to write to, compressed as its ending says."""
    if path.suffix == ".gz":
        return gzip.open(path, "wb", compresslevel=5)
    return bz2.open(path, "wb") if path.suffix == ".bz2" else path.open("wb")


def entities(count: int) -> Iterator[dict[str, Any]]:
    """Yield entities Q1, Q2, …, whose statements refer to each other in both directions."""
    chance = random.Random(0)
    for number in range(1, count + 1):
        key = f"Q{number}"
        yield {
            "type": "item",
            "id": key,
            "labels": terms(f"Thing {number}", chance),
            "descriptions": terms(f"a thing with the number {number}", chance),
            "aliases": {
                language: [{"language": language, "value": f"{number} {i}"} for i in range(2)]
                for language in chance.sample(LANGUAGES, 6)
            },
            "claims": claims(key, count, chance),
            "sitelinks": {
                f"{language}wiki": {
                    "site": f"{language}wiki",
                    "title": f"Thing {number}",
                    "badges": [],
                }
                for language in chance.sample(LANGUAGES, 8)
            },
            "lastrevid": 2_000_000_000 + number,
        }


def terms(text: str, chance: random.Random) -> dict[str, Any]:
    """Return a text in English and some other languages."""
    languages = ("en", *chance.sample(LANGUAGES[1:], 17))
    return {code: {"language": code, "value": f"{text} ({code})"} for code in languages}


def claims(key: str, count: int, chance: random.Random) -> dict[str, list[Any]]:
    """Return the statements of an entity, by property."""
    found: dict[str, list[Any]] = {}
    for name in chance.sample(ITEM_PROPERTIES, 6):
        # A few entities are the objects of many facts, as on Wikidata.
        other = int(count * chance.random() ** 3) + 1
        value = {"entity-type": "item", "numeric-id": other, "id": f"Q{other}"}
        found[name] = [statement(key, name, "wikibase-entityid", value, chance)]
    for name in chance.sample(TEXT_PROPERTIES, 4):
        text = f"{chance.randrange(10**9)}"
        found[name] = [statement(key, name, "string", text, chance)]
    year = chance.randrange(1800, 2000)
    born = {
        "time": f"+{year}-03-11T00:00:00Z",
        **{"timezone": 0, "before": 0, "after": 0, "precision": 11},
        "calendarmodel": "http://www.wikidata.org/entity/Q1985727",
    }
    found["P569"] = [statement(key, "P569", "time", born, chance)]
    return found


def statement(key: str, name: str, kind: str, value: Any, chance: random.Random) -> dict[str, Any]:
    """Return a statement with a reference, and sometimes a qualifier."""
    made = {
        "mainsnak": snak(name, kind, value, chance),
        "type": "statement",
        "id": f"{key}${chance.randbytes(16).hex().upper()}",
        "rank": "normal",
        "references": [
            {
                "hash": chance.randbytes(20).hex(),
                "snaks": {"P248": [snak("P248", "string", "A register of things", chance)]},
                "snaks-order": ["P248"],
            }
        ],
    }
    if chance.random() < 0.2:
        text = snak("P1810", "string", "named as", chance)
        made |= {"qualifiers": {"P1810": [text]}, "qualifiers-order": ["P1810"]}
    return made


def snak(name: str, kind: str, value: Any, chance: random.Random) -> dict[str, Any]:
    """Return a property with its value."""
    return {
        "snaktype": "value",
        "property": name,
        "hash": chance.randbytes(20).hex(),
        "datavalue": {"value": value, "type": kind},
        "datatype": "external-id" if kind == "string" else kind,
    }


def mapping() -> str:
    """Return a templates file for three properties."""
    lines = (f'{name}: {{prompt: "{prompt}"}}\n' for name, prompt in MAPPED.items())
    return "".join(lines)


if __name__ == "__main__":
    main()
