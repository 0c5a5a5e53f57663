"""Reads the pages of Wikidata's incremental dumps: MediaWiki's XML export, entities as JSON text.

Of the revisions of a page, the one with the highest number is its newest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from xml.parsers import expat

from jobs.facts.lines import blocks, open_stream
from pipeline.errors import FactDumpError

_MODELS = ("wikibase-item", "wikibase-property")
_FIELDS = {
    ("page", "title"),
    ("revision", "id"),
    ("revision", "model"),
    ("revision", "text"),
}


class Page(NamedTuple):
    """An entity's page, with its title and the text of its newest revision."""

    title: str
    text: str


def read_pages(url: str) -> Iterator[Page]:
    """Yield the pages of items and properties.

    Raises:
        FactDumpError: the file is not such an export, or is damaged or incomplete.
        StorageError: it cannot be read.
    """
    pages = _Pages(url)
    try:
        with open_stream(url) as stream:
            for block in blocks(url, stream):
                pages.parser.Parse(block, False)
                yield from pages.taken()
            pages.parser.Parse(b"", True)
            yield from pages.taken()
    except expat.ExpatError as error:
        raise FactDumpError(
            f"{url} is damaged, incomplete or not an export of MediaWiki ({error}); download it "
            "again"
        ) from None


class _Pages:
    """Collects pages while a file is parsed."""

    def __init__(self, url: str) -> None:
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._text
        self.parser.StartDoctypeDeclHandler = self._refuse_doctype
        self._url = url
        self._path: list[str] = []
        self._parts: list[str] | None = None
        self._title = ""
        self._revision: dict[str, str] = {}
        self._newest: dict[str, str] = {}
        self._found: list[Page] = []

    def taken(self) -> list[Page]:
        """Return the pages that are complete, and forget them."""
        found, self._found = self._found, []
        return found

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if not self._path and name != "mediawiki":
            raise FactDumpError(
                f"{self._url} is not an export of MediaWiki; it begins with <{name}>"
            )
        if tuple([*self._path, name][-2:]) in _FIELDS and "deleted" not in attributes:
            self._parts = []
        self._path.append(name)

    def _text(self, text: str) -> None:
        if self._parts is not None:
            self._parts.append(text)

    def _end(self, name: str) -> None:
        self._path.pop()
        if self._parts is not None:
            value, self._parts = "".join(self._parts), None
            if name == "title":
                self._title = value
            else:
                self._revision[name] = value
        elif name == "revision":
            self._end_revision()
        elif name == "page":
            self._end_page()

    def _end_revision(self) -> None:
        found, self._revision = self._revision, {}
        if found.get("model") in _MODELS and "text" in found:
            self._newest = max(self._newest, found, key=_number)

    def _end_page(self) -> None:
        if self._newest:
            self._found.append(Page(self._title, self._newest["text"]))
        self._title, self._newest = "", {}

    def _refuse_doctype(self, *_: object) -> None:
        raise FactDumpError(f"{self._url} has a document type; exports of MediaWiki have none")


def _number(revision: dict[str, str]) -> int:
    number = revision.get("id", "")
    return int(number) if number.isascii() and number.isdigit() else -1
