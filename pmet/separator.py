"""What stands between a prompt and its target: a space, or nothing, as the script is written.

Chinese, Japanese, Thai, Lao, Khmer, Myanmar and Tibetan put no space between words; all other
scripts do, Korean too. Where one side of the seam is of the first kind and the other of the second,
as between Chinese and Latin letters or digits, both ways are in use: the prompt's own last such
seam decides, and without one there is no space after the first kind, and a space before it.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

SPACE = " "
_SPACELESS = (
    *("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "KANGXI", "FULLWIDTH"),
    *("HALFWIDTH KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
)
"""How Unicode's names of their characters begin; full-width letters stand among CJK ones."""

# Kinds of characters: of a script without spaces, of another script or a digit, white space, and
# the rest, which takes after its surroundings.
_WITHOUT, _WITH, _WHITE, _NEUTRAL = "w", "s", " ", "."
_SEAM = re.compile(r"(?=(w s|s w|ws|sw))")
_STRAIGHT = "\"'"
# Quotation marks that close in one language and open in another, with what they then close.
_PAIRS = {"“": "„", "‘": "‚", "«": "»", "‹": "›"}
_OPENING = ("Ps", "Pi")


def separator(prompt: str, target: str = "") -> str:
    """The text between a prompt and its target, as their script is written.

    Nothing follows white space, an opening quotation mark or bracket, ``¿`` and ``¡``. Otherwise
    the script decides; punctuation and symbols count as the text beside them, except that nothing
    follows the full-width marks of Chinese and Japanese, such as ``：`` and ``。``.
    """
    if prompt[-1:].isspace() or _opens(prompt):
        return ""
    if prompt.isascii() and target.isascii():
        return SPACE
    kinds = _kinds(prompt)
    before, after = _last(kinds), _last(_kinds(target)[::-1])
    if _WITHOUT not in (before, after):
        return SPACE
    if before in (after, _NEUTRAL) or after == _NEUTRAL:
        return "" if before == _WITHOUT else SPACE
    seams: list[str] = _SEAM.findall(kinds)
    if seams:
        return SPACE if _WHITE in seams[-1] else ""
    return "" if before == _WITHOUT else SPACE


def _opens(prompt: str) -> bool:
    """Whether a prompt ends in a mark that opens what follows."""
    before, mark = prompt[:-1], prompt[-1:]
    if not mark:
        return False
    if mark in "¿¡":
        return True
    category = unicodedata.category(mark)
    if category == "Pi" and mark in _PAIRS:
        return before.count(_PAIRS[mark]) <= before.count(mark)
    if category == "Pf" or mark in _STRAIGHT:
        return not before or before[-1].isspace() or _opens(before)
    return category in _OPENING


def _kinds(text: str) -> str:
    return "".join(map(_kind, text))


def _last(kinds: str) -> str:
    """The kind of the last character that has one of its own."""
    return next((kind for kind in reversed(kinds) if kind in (_WITHOUT, _WITH)), _NEUTRAL)


@lru_cache(maxsize=1 << 16)
def _kind(character: str) -> str:
    if character.isspace():
        return _WHITE
    category = unicodedata.category(character)
    if category[0] in "PSC":
        # Closing brackets and full-width symbols are used by Korean, too.
        wide = category == "Po" and unicodedata.east_asian_width(character) in "WFH"
        return _WITHOUT if wide else _NEUTRAL
    name = unicodedata.name(character, "")
    if name.startswith(_SPACELESS):
        return _WITHOUT
    return _NEUTRAL if category[0] == "M" else _WITH
