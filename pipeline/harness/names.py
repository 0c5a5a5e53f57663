"""Which folders of lm-evaluation-harness have the files of a task, without parsing all of them.

The library's own index parses 14,000 YAML files, which takes half a minute. Here their text is
searched for names, and only the folders that mention a name are indexed.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_WORD = rb"[\"']?([^\s\"'#,\[\]{}]+)[\"']?"
_DEFINED = re.compile(rb"^[\"']?(?:task|group|tag)[\"']?:[ \t]*" + _WORD, re.MULTILINE)
_IN_BRACKETS = re.compile(rb"^[\"']?(?:task|tag)[\"']?:\s*\[([^\]]*)\]", re.MULTILINE)
_LISTED = re.compile(
    rb"^[ \t]*-[ \t]*(?:[\"']?(?:task|group)[\"']?:[ \t]*)?" + _WORD + rb"[ \t]*$", re.MULTILINE
)
_NEAR = 3
_LONGEST_REASON = 300


@dataclass(frozen=True)
class TaskNames:
    """Names in a tree of task files.

    Attributes:
        defined: names of tasks, groups and tags.
        mentioned: for each name, the folders directly in the root that mention it.
    """

    defined: frozenset[str]
    mentioned: dict[str, frozenset[Path]]

    @classmethod
    def read(cls, root: Path) -> TaskNames:
        """Search the YAML files of a tree."""
        defined: set[str] = set()
        mentioned: dict[str, set[Path]] = defaultdict(set)
        for file in root.glob("*/**/*.yaml"):
            folder = root / file.relative_to(root).parts[0]
            text = file.read_bytes()
            own = {found.decode(errors="replace") for found in _DEFINED.findall(text)}
            defined |= own
            listed = re.findall(_WORD, b",".join(_IN_BRACKETS.findall(text)))
            own |= {found.decode(errors="replace") for found in (*_LISTED.findall(text), *listed)}
            for name in own:
                mentioned[name].add(folder)
        return cls(frozenset(defined), {n: frozenset(f) for n, f in mentioned.items()})

    def folders(self, names: Iterable[str]) -> set[Path]:
        """The folders that mention any of these names."""
        return {folder for name in names for folder in self.mentioned.get(name, ())}

    def near(self, name: str) -> list[str]:
        """Names that are similar to an unknown one, the nearest first."""
        return difflib.get_close_matches(name, sorted(self.defined), _NEAR, cutoff=0.7)


def reason_of(error: Exception) -> str:
    """An error of the library, of a task or of its data on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONGEST_REASON]


def is_path(name: str) -> bool:
    """Whether the name of a task is a path: it has a slash, or ends like a YAML file."""
    return "/" in name or os.sep in name or name.endswith((".yaml", ".yml")) or name in (".", "..")
