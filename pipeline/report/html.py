"""Self-contained HTML pages.

Everything that comes from data is escaped, invisible characters that change how text is read are
written out, long texts and long tables are cut (with a note), and a page blocks scripts and the
network for itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from pipeline.evaluation import (
    duration,
    figure_of,
    is_number,
    show,
    show_change,
    show_interval,
    show_special,
)

__all__ = [
    "TABLE_ROWS",
    "TEXT_LENGTH",
    "Cut",
    "is_number",
    "page",
    "show_setting",
    "visible",
]

TABLE_ROWS = 200
TEXT_LENGTH = 300
# Applies to any value on a page, whatever its template does.
LONGEST_TEXT = 20_000
# Control characters except tab and newline, bidirectional controls, lone surrogates.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def page(name: str, package: str = "pipeline.report") -> jinja2.Template:
    """Load a template from a package's folder ``templates``; it may extend ``page.html.j2``."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(p) for p in (package, "pipeline.report")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalized,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "number": _number,
        "duration": duration,
        "short": _short,
        "figure": show,
        "change": show_change,
        "interval": show_interval,
        "label": lambda name: figure_of(name).label,
        "detail": _detail,
        "setting": show_setting,
    }
    return environment.get_template(name)


class Cut:
    """The first rows of a table that may be long.

    Attributes:
        rows: the rows shown.
        more: the number of rows not shown.
    """

    def __init__(self, rows: Sequence[Any], limit: int = TABLE_ROWS) -> None:
        self.rows = rows[:limit]
        self.more = max(0, len(rows) - limit)


def visible(text: str) -> str:
    """Text with invisible characters written out: ``\\x00``, ``\\u202e``, a lone ``\\ud800``."""
    return _UNSEEN.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def _finalized(value: Any) -> Any:
    """Finalise every value that a template prints; its own markup stays unchanged."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return visible(_short(value, LONGEST_TEXT))


def _percent(value: Any, digits: int = 1) -> str:
    return f"{value * 100:.{digits}f} %" if is_number(value) else show_special(value)


def _number(value: Any) -> str:
    if not is_number(value):
        return show_special(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _detail(value: Any) -> str:
    """A mapping on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_detail(item)}" for name, item in value.items())
    if isinstance(value, float):
        return _number(value)
    return "" if value is None else str(value)


def show_setting(value: Any) -> str:
    """A job's value as its file has it; a dash if there is none."""
    match value:
        case None:
            return "–"
        case str():
            return value
        case _:
            return json.dumps(value, ensure_ascii=False, default=str)


def _short(value: Any, limit: int = TEXT_LENGTH) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"
