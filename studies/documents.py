"""YAML that users write, checked before the parser reads it: what the parser would take in silence, or choke on."""

from pathlib import Path
from typing import Any

import yaml

from harness.errors import UserError

MOST_VALUES = 10_000
"""Values of a document, those behind an alias counted wherever it stands."""
DEEPEST = 50
"""Levels of lists and mappings inside one another."""


def check_file(path: Path) -> None:
    """`UserError` with the line for a file that is no YAML, no mapping, gives a key twice, or is far too large."""
    try:
        text = path.read_text(encoding="utf-8")
        documents = list(yaml.compose_all(text, yaml.SafeLoader))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read ({error.strerror}): name a file you may read") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"--config {path} cannot be read as YAML{_reason(error)}") from None
    if len(documents) != 1 or not isinstance(documents[0], yaml.MappingNode):
        raise UserError(f"--config {path} is no mapping of keys to values: write one, such as seed: 1")
    try:
        _count(documents[0], "")
        yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--config {path} cannot be used{_reason(error)}") from None


def check_word(word: str, option: str) -> None:
    """`UserError` for the value of an option that is a document far too large."""
    try:
        node: Any = yaml.compose(word, yaml.SafeLoader)
    except RecursionError:
        raise UserError(f"{option} is nested too deep: give a plain value") from None
    except (yaml.YAMLError, ValueError):
        return  # plain text, which need not be YAML
    try:
        _count(node, option)
    except yaml.YAMLError as error:
        raise UserError(f"{option} cannot be used{_reason(error)}") from None


def _count(node: Any, key: str, depth: int = 0) -> int:
    """Values below the node at `key`, aliases written out; YAML errors for too many, and for keys given twice."""
    if depth > DEEPEST:
        raise yaml.MarkedYAMLError(problem=f"{key} has more than {DEEPEST} levels", problem_mark=node.start_mark)
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if isinstance(node, yaml.SequenceNode):
        inside = [(key, part) for part in node.value]
    else:
        names = [f"{key}.{name.value}".removeprefix(".") for name, _ in node.value]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise yaml.MarkedYAMLError(problem=f"{twice[0]} is given twice", problem_mark=node.start_mark)
        inside = list(zip(names, (part for _, part in node.value), strict=True))
    total = 1
    for name, part in inside:
        total += _count(part, name, depth + 1)
        if total > MOST_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"{name} holds more than {MOST_VALUES} values", problem_mark=node.start_mark
            )
    return total


def _reason(error: Exception) -> str:
    """Line and problem of a YAML error."""
    if isinstance(error, RecursionError):
        return ": it is nested too deep"
    if not isinstance(error, yaml.MarkedYAMLError):
        return f": {error}"
    mark = error.problem_mark
    return f"{f', line {mark.line + 1}' if mark else ''}: {error.problem}"
