"""YAML that users write, checked before the parser reads it: what the parser would take in silence, or fail on."""

from pathlib import Path
from typing import Any

import yaml

from harness.errors import UserError

MOST_DIGITS = 300
"""A whole number may have so many digits: the parser fails on those that are larger than any float."""
TEXT_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
"""Kinds of keys: text, and `<<`, which merges a mapping in."""


def check_file(path: Path) -> None:
    """Raise `UserError`, with the line, for a file that is no YAML or no mapping, or that `_check` refuses."""
    try:
        text = path.read_text(encoding="utf-8")
        documents = list(yaml.compose_all(text, yaml.SafeLoader))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read ({error.strerror}): name a file you may read") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path} cannot be read as YAML{_reason(error)}") from None
    if len(documents) != 1 or not isinstance(documents[0], yaml.MappingNode):
        raise UserError(f"--config {path} is no mapping of keys to values: write one, such as seed: 1")
    try:
        _check(documents[0], "")
        yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path} cannot be used{_reason(error)}") from None


def check_word(word: str, option: str) -> None:
    """Raise `UserError` for the value of an option that is a YAML document which `_check` refuses."""
    try:
        node: Any = yaml.compose(word, yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return  # plain text, which need not be YAML
    try:
        _check(node, option)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{option} cannot be used{_reason(error)}") from None


def _check(node: Any, key: str) -> None:
    """Raise a YAML error for what stands at `key` or below it: a key that is given twice or is no text, and a whole
    number of too many digits."""
    if isinstance(node, yaml.MappingNode):
        for name, part in _named(node, key):
            _check(part, name)
    elif isinstance(node, yaml.SequenceNode):
        for part in node.value:
            _check(part, key)
    elif getattr(node, "tag", "") == "tag:yaml.org,2002:int" and len(node.value) > MOST_DIGITS:
        raise yaml.MarkedYAMLError(problem=f"{key} has {len(node.value)} digits", problem_mark=node.start_mark)


def _named(node: yaml.MappingNode, key: str) -> list[tuple[str, Any]]:
    """What the mapping at `key` holds, by dotted key; YAML errors for keys given twice, and for keys that are no text.

    `1` and `on` are a number and a truth value in YAML: only the labels of cells may be such.
    """
    found: dict[str, Any] = {}
    for name, part in node.value:
        dotted = f"{key}.{name.value if isinstance(name, yaml.ScalarNode) else '?'}".removeprefix(".")
        if isinstance(name, yaml.ScalarNode) and name.tag not in TEXT_TAGS and key != "cells":
            raise yaml.MarkedYAMLError(
                problem=f"{dotted} ends in no text: put it in quotes", problem_mark=name.start_mark
            )
        if dotted in found:
            raise yaml.MarkedYAMLError(problem=f"{dotted} is given twice", problem_mark=name.start_mark)
        found[dotted] = part
    return list(found.items())


def _reason(error: Exception) -> str:
    """The line and the problem of an error that reading YAML met."""
    if isinstance(error, RecursionError):
        return ": it is nested too deeply, or refers to itself"
    if not isinstance(error, yaml.MarkedYAMLError):
        return f": {error}"
    mark = error.problem_mark
    return f"{f', line {mark.line + 1}' if mark else ''}: {error.problem}"
