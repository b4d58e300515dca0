"""What each field of a config dataclass means, from the comments and docstrings of its source."""

import ast
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
import typing
from typing import Any, NamedTuple


class Field(NamedTuple):
    """A field of a config, as help shows it."""

    path: str  # such as "train.epochs"
    type: str  # such as "float"
    meaning: str  # "" if the source has no comment


def fields(cls: type, prefix: str = "") -> list[Field]:
    """Return the fields of a dataclass and of its sections, in the order of the source."""
    found, meanings = [], comments(cls)
    for name, hint in typing.get_type_hints(cls).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found += fields(hint, f"{prefix}{name}.")
        else:
            found.append(Field(prefix + name, type_name(hint), meanings.get(name, "")))
    return found


def type_name(hint: Any) -> str:
    """Return a type as people write it: 'float', 'tuple[int, int]', "'own' | 'table'"."""
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(hint)))
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    return str(hint).replace("typing.", "")


def comments(cls: type) -> dict[str, str]:
    """Return field → meaning for a dataclass and its parents.

    The meaning stands in the comment on the field's line, or else in the comment lines above it, or
    in the docstring, after the field's name and a colon.
    """
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        if dataclasses.is_dataclass(one):
            found |= _described(one) | _comments_of(one)
    return found


def _comments_of(cls: type) -> dict[str, str]:
    """Return what the comments in the body of one class say about its fields."""
    source = textwrap.dedent(inspect.getsource(cls))
    notes, is_alone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            notes[token.start[0]] = token.string.lstrip("# ")
            is_alone[token.start[0]] = not token.line[: token.start[1]].strip()
    found = {}
    (body,) = ast.parse(source).body
    for node in body.body if isinstance(body, ast.ClassDef) else ():
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        lines = [n for n in (node.lineno, node.end_lineno) if n in notes and not is_alone[n]][:1]
        if not lines:
            first = node.lineno
            while is_alone.get(first - 1):
                first -= 1
            lines = list(range(first, node.lineno))
        if lines:
            found[node.target.id] = " ".join(notes[line] for line in lines)
    return found


def _described(cls: type) -> dict[str, str]:
    """Return what the docstring of one class says about its fields: lines "name: meaning"."""
    found: dict[str, str] = {}
    name, depth = "", 0
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        indent = len(line) - len(line.lstrip())
        entry = re.match(r"\s*(\w+): (.*)", line)
        if entry and entry[1] in cls.__annotations__ and (not name or indent <= depth):
            name, depth, found[entry[1]] = entry[1], indent, entry[2]
        elif name and line.strip() and indent > depth:
            found[name] += " " + line.strip()
        else:
            name = ""
    return found
