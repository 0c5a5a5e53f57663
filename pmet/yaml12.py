"""YAML for hand-written files: the scalars of YAML 1.2, without dangerous features.

``1e-3`` is a number here, and ``2026-11-23``, ``on`` and ``12:30`` are text; YAML 1.1, which
PyYAML reads by default, sees a string, a date, a boolean and the number 750. Refused are
aliases of anchors (a few lines of which can expand to gigabytes), keys that occur twice or are
not text, and nesting deeper than any settings need.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

MAX_DEPTH = 32

_RESOLVERS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


class YAMLTextError(ValueError):
    """A text is not valid YAML, or uses features that are refused.

    Attributes:
        problems: one line for each, starting with its line number in the text.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def parse_yaml(text: str) -> Any:
    """Parse a YAML document; None if it is empty.

    Raises:
        YAMLTextError: its syntax is wrong, or it uses a refused feature (see the module).
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        problems = [] if node is None else list(_refused(node))
        value = loader.construct_document(node) if node and not problems else None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise YAMLTextError([f"{line}{error.problem}"]) from None
    except (yaml.YAMLError, ValueError) as error:
        raise YAMLTextError([" ".join(str(error).split())]) from None
    if problems:
        raise YAMLTextError(problems)
    return value


def dump_yaml(value: Any) -> str:
    """A value as YAML that ``parse_yaml`` and any reader of YAML 1.1 or 1.2 read back equally."""
    return yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False
    )


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list] = {}  # noqa: RUF012 (PyYAML's own name and form)
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            self._refuse("aliases (*name) are not read; write the value out")
        if self.depth == MAX_DEPTH:
            self._refuse(f"nested more than {MAX_DEPTH} levels deep")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def _refuse(self, problem: str) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would not read as the same text."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # Plain and single-quoted styles fold what YAML treats as line breaks.
        odd = re.search("[\\r\\x85\\u2028\\u2029]", text)
        style = '"' if odd else "|" if "\n" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


for _tag, _pattern, _first in _RESOLVERS:
    _regexp = re.compile(rf"^(?:{_pattern})$")
    _Loader.add_implicit_resolver(_tag, _regexp, _first)
    _Dumper.add_implicit_resolver(_tag, _regexp, _first)
_Dumper.add_representer(str, _Dumper.represent_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _refused(node: yaml.Node) -> Iterator[str]:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            yield f"line {line}: {node.value!r} holds a lone surrogate; write valid Unicode"
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _refused(item)
    else:
        yield from _refused_keys(node)


def _refused_keys(node: yaml.Node) -> Iterator[str]:
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag != "tag:yaml.org,2002:str":
            yield f"line {line}: key {key.value!r} is not text"
        elif key.value in lines:
            yield f"line {line}: key {key.value!r} is already given on line {lines[key.value]}"
        else:
            lines[key.value] = line
            yield from _refused(key)
        yield from _refused(value)
