"""Errors of the config, said in one line: what is wrong, where, and the nearest name."""

import difflib
import re

from jsonargparse import ArgumentParser

KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
"""Types of the config, in words."""


def explain(message: str, parser: ArgumentParser) -> str:
    """One line of a parser error, with the nearest known key for an unknown one, and types in words."""
    message = " ".join(message.split())
    return _explain_value(message) or _explain_key(message, parser) or message


def _explain_value(message: str) -> str:
    """What is said of a value of the wrong kind; "" for other messages."""
    if wrong := re.search(r'Parser key "([\w.+-]+)": Expected an? (.+?)\. Got value: ?(.*)', message):
        key, kind, value = wrong.groups()
        choices = re.findall(r"'([^']*)'", kind)
        wanted = f"one of {', '.join(choices)}" if "Literal" in kind else KINDS.get(choices[0] if choices else "", kind)
        return f"{key} is {value or 'empty'}: give {wanted}"
    if wrong := re.search(
        r'key "([\w.+-]+)": Does not validate against any .* Subtypes: (.*?) Errors: .* value: ?(.*)', message
    ):
        # The kinds of a union stand in it as `class 'int'`.
        wanted = " or ".join(KINDS.get(kind, kind) for kind in re.findall(r"'(\w+)'", wrong[2]) if kind != "NoneType")
        return f"{wrong[1]} is {wrong[3] or 'empty'}: give {wanted}"
    if wrong := re.search(r'Parser key "([\w.+-]+)": Unable to load config (.*) - Parser key', message):
        return f"{wrong[1]} is {wrong[2]}: it is a section, so set the keys in it, as in --help"
    if wrong := re.search(r"argument --([\w.+-]+): expected one argument", message):
        return f"{wrong[1]} has no value: give one, and write --{wrong[1]}=VALUE where it begins with a dash"
    return ""


def _explain_key(message: str, parser: ArgumentParser) -> str:
    """What is said of an unknown key; "" for other messages."""
    unknown = (
        re.search(r"unrecognized arguments: --([\w.+-]+)", message)
        or re.search(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'", message)
        or re.search(r"Option '([\w.]+)' is not accepted", message)
    )
    if unknown is None:
        return ""
    parts = unknown.groupdict()
    return _nearest(f"{parts['group']}.{parts['key']}" if parts else unknown[1], parser)


def _nearest(key: str, parser: ArgumentParser) -> str:
    """What is said of an unknown key: the nearest one there is, section by section."""
    keys = [action.dest for action in parser._actions if action.dest not in ("help", "print_config")]
    sections = {known.split(".")[0] for known in keys}
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    first = key.split(".")[0]
    if first not in sections and (section := difflib.get_close_matches(first, sections, n=1, cutoff=0.5)):
        whole = section[0] + key.removeprefix(first)
        near = [whole] if whole in keys else section
    return f"key {key!r} is not known" + (f": did you mean {near[0]!r}?" if near else ": see --help for all keys")
