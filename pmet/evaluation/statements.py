"""What a text says: where its first sentence or clause ends, and whether it states a target.

The conventions are those of evaluations by free generation (Yang et al. 2025, "The Mirage of Model
Editing", arXiv 2502.11177): an answer ends by itself, and matches after normalisation. That is
SQuAD's (Rajpurkar et al. 2016, arXiv 1606.05250), for any script: Unicode's compatibility forms, no
case, no punctuation, no English articles.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from pmet.separator import separator

_CLOSING = r"[\"'”’»)\]]*"
_FULL_WIDTH = "。！？"
_SENTENCE = re.compile(rf"[{_FULL_WIDTH}]{_CLOSING}|[.…!?]+{_CLOSING}(?=\s|$)|\n")
# Letters after a mark belong to the same word: 3.5, 1,000, 10:30, U.S.
_CLAUSE = re.compile(rf"[{_FULL_WIDTH}，、；：;!?…\n]|[.,:]+(?=[\s\"'”’»)\]]|$)|\s[–—(-]")
_LAST_WORD = re.compile(r"\S*$")
_SHORT = 3
_ARTICLES = frozenset(("a", "an", "the"))


def sentence_end(text: str) -> int | None:
    """The index after a text's first sentence; None if that is not finished.

    A line break ends a sentence, and so does a full stop, unless it may belong to an abbreviation
    or a number (``St.``, ``U.S.``, ``3.``), when the sentence is taken to go on.
    """
    return _end(text, _SENTENCE, inclusive=True)


def clause_end(text: str) -> int | None:
    """The index of the punctuation after a text's first clause; None if that is not finished."""
    return _end(text, _CLAUSE, inclusive=False)


def _end(text: str, marks: re.Pattern[str], *, inclusive: bool) -> int | None:
    start = len(text) - len(text.lstrip())
    for found in marks.finditer(text, start):
        if found[0].startswith(".") and _goes_on(text, found):
            continue
        if text[start : found.start()].strip():
            return found.end() if inclusive and found[0] != "\n" else found.start()
    return None


def _goes_on(text: str, stop: re.Match[str]) -> bool:
    """Whether a full stop may belong to the word before it."""
    word = _LAST_WORD.search(text[: stop.start()])
    before = word[0].lstrip("\"'“‘«([") if word else ""
    if before[-1:].isdigit():
        # More of the number may follow.
        return stop.end() == len(text)
    return len(before) == 1 or "." in before or (len(before) <= _SHORT and before[0:1].isupper())


def first_stated(answer: str, targets: Sequence[str]) -> str | None:
    """The target that an answer states first, or None.

    Of two that begin at the same place, such as York and York Minster, the longer one counts.
    """
    found = [
        (place, -len(target), target)
        for target in targets
        if (place := _place(answer, target)) is not None
    ]
    return min(found)[-1] if found else None


def _place(answer: str, target: str) -> int | None:
    """Where a target's words begin in an answer: an index that increases with the position."""
    said, wanted = _words(answer), _words(target)
    if not separator(target, target):
        # No spaces between words.
        place = "".join(said).find("".join(wanted))
        return None if place < 0 or not wanted else place
    for place in range(len(said) - len(wanted) + 1):
        if wanted and said[place : place + len(wanted)] == wanted:
            # In letters, to compare it with places in texts without spaces.
            return sum(map(len, said[:place]))
    return None


def _words(text: str) -> list[str]:
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in folded).split()
    return [word for word in words if word not in _ARTICLES] or words
