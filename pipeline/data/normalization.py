"""The normal form in which texts are compared: Unicode spelling and white-space runs are ignored.

``Zürich`` may be written with one character for the ü or with two, and a stray double space is
easily missed: rows that differ in nothing else state the same fact. Only comparisons use this form;
the text is edited, shown and stored as given. Compatibility forms stay distinct (NFC, not NFKC):
10² is not 102.
"""

from __future__ import annotations

import unicodedata

import pyarrow as pa
import pyarrow.compute as pc

# What str.split treats as white space, except the space itself: a class of RE2.
_ODD_SPACE = (
    r"\t-\r\x1c-\x1f\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
)
_RUN = f"[ {_ODD_SPACE}]+"
# Every character that composition may change or join to the previous one: marks, decomposed Hangul
# letters, and singletons. A text with none of them is already composed.
_UNCOMPOSED = (
    r"\p{M}\x{340}-\x{387}\x{958}-\x{95f}\x{9dc}-\x{9df}\x{a33}-\x{a5e}\x{b5c}\x{b5d}"
    r"\x{f43}-\x{fb9}\x{1100}-\x{11ff}\x{1f00}-\x{1fff}\x{2126}-\x{212b}\x{2329}\x{232a}\x{2adc}"
    r"\x{f900}-\x{fb4f}\x{1d15e}-\x{1d1c0}\x{2f800}-\x{2fa1f}"
)
_ODD = f"[{_ODD_SPACE}{_UNCOMPOSED}]|  |^ | $"


def normal(text: str) -> str:
    """A text in Unicode's composed form (NFC), stripped, with each white-space run as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def normal_column(column: pa.Array) -> pa.Array:
    """Normalise every text of a column as `normal` does; null stays null.

    Args:
        column: (rows,) valid text. A column already in this form is returned unchanged.
    """
    odd = pc.fill_null(pc.match_substring_regex(column, _ODD), False)
    if not pc.any(odd).as_py():
        return column
    # Repeated texts are normalised once.
    chosen = column.filter(odd).dictionary_encode()
    composed = pc.utf8_normalize(chosen.dictionary, form="NFC")
    forms = pc.utf8_trim(pc.replace_substring_regex(composed, _RUN, " "), " ")
    return pc.replace_with_mask(column, odd, forms.take(chosen.indices))
