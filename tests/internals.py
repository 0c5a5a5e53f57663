"""Whether the private names that a module uses of a library are still there."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any


def assert_has(found: bool, name: str, why: Mapping[str, str], library: str, module: str) -> None:
    """Fail with the name that is missing, what it was used for, and where."""
    assert found, (
        f"{library} {version(library)} has no {name} any more: used {why[name]}; see {module}"
    )


def exists(name: str) -> bool:
    """Whether a dotted name leads from a package to something: module, class or attribute."""
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], 2):
        if hasattr(found, part):
            found = getattr(found, part)
            continue
        try:
            found = importlib.import_module(".".join(parts[:number]))
        except ImportError:
            return False
    return True
