"""Pages of HTML that need nothing but themselves.

Everything that comes from data is escaped, long texts and long tables are cut (and say so), and a
page forbids itself scripts and the network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

TABLE_ROWS = 200
TEXT_LENGTH = 300


def page(name: str, package: str = "pipeline") -> jinja2.Template:
    """A template of a package's folder ``templates``, which may extend ``page.html.j2``."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(p) for p in (package, "pipeline")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "number": _number,
        "duration": _duration,
        "short": _short,
        "figure": _figure,
        "change": _change,
        "detail": _detail,
    }
    return environment.get_template(name)


class Cut:
    """The first rows of a table that may be long.

    Attributes:
        rows: those shown.
        more: how many are not.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], limit: int = TABLE_ROWS) -> None:
        self.rows = rows[:limit]
        self.more = max(0, len(rows) - limit)


def is_number(value: Any) -> bool:
    """Whether a value is a number that can be shown."""
    return isinstance(value, int | float) and math.isfinite(value)


def _percent(value: Any, digits: int = 1) -> str:
    return f"{value * 100:.{digits}f} %" if is_number(value) else "–"


def _number(value: Any) -> str:
    if not is_number(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _figure(value: Any, metric: str) -> str:
    """A metric's value in its unit."""
    return _number(value) if metric == "perplexity" else _percent(value)


def _change(after: Any, before: Any, metric: str) -> str:
    """The difference of two values: relative for the perplexity, else in percentage points."""
    if not (is_number(after) and is_number(before)):
        return "–"
    if metric == "perplexity":
        return f"{(after / before - 1) * 100:+.2f} %".replace("-", "−")
    return f"{(after - before) * 100:+.1f} points".replace("-", "−")


def _detail(value: Any) -> str:
    """A mapping in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_detail(item)}" for name, item in value.items())
    return "" if value is None else str(value)


def _duration(seconds: Any) -> str:
    if not is_number(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _short(value: Any, limit: int = TEXT_LENGTH) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"
