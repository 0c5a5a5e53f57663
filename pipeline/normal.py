"""The form in which texts are compared: neither Unicode's spellings nor runs of white space count.

``Zürich`` may be written with one character for the ü or with two, and a stray double space is
hardly seen: rows that differ in nothing else state the same fact. Only comparisons use this form;
what is edited, shown and stored is the text as it was given. Compatibility forms stay apart (NFC,
not NFKC): 10² is not 102.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

# What str.split takes for white space, but for the space itself: a class of RE2.
_ODD_SPACE = (
    r"\t-\r\x1c-\x1f\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
)
_RUN = f"[ {_ODD_SPACE}]+"
_NOT_SINGLE = f"[{_ODD_SPACE}]|  |^ | $"


def normal(text: str) -> str:
    """A text in Unicode's composed form (NFC), runs of white space as one space, none around it."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def normal_column(column: pa.Array) -> pa.Array:
    """The same for every text of a column; null stays null.

    Args:
        column: (rows,) valid text. One that is in this form already comes back as it is.
    """
    composed = _where(column, pc.invert(pc.string_is_ascii(column)), _composed)
    return _where(composed, pc.match_substring_regex(composed, _NOT_SINGLE), _spaced)


def _composed(texts: pa.Array) -> pa.Array:
    return pc.utf8_normalize(texts, form="NFC")


def _spaced(texts: pa.Array) -> pa.Array:
    return pc.utf8_trim(pc.replace_substring_regex(texts, _RUN, " "), " ")


def _where(column: pa.Array, mask: pa.Array, change: Callable[[pa.Array], pa.Array]) -> pa.Array:
    """A column with some of its texts changed; texts that repeat are changed once."""
    mask = pc.fill_null(mask, False)
    if not pc.any(mask).as_py():
        return column
    chosen = column.filter(mask).dictionary_encode()
    return pc.replace_with_mask(column, mask, change(chosen.dictionary).take(chosen.indices))
