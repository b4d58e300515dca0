"""Frozen dataclasses from plain nested dicts and back: how configs travel through files."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from detclipv2_jax.common.errors import UserError


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested dicts, tuples and scalars, which JSON can hold."""
    return _plain(dataclasses.asdict(config))


def check_path(cls: type, path: str, where: str) -> None:
    """`UserError` unless a path like 'train.epochs' leads to a field of the dataclass `cls`."""
    for name in path.split("."):
        hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
        _check_name(name, hints, where)
        cls, where = hints[name], f"{where}.{name}"


def from_dict(cls: type, values: Any, where: str) -> Any:
    """An instance of the frozen dataclass `cls` from a mapping; `where` names it in errors."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where} must be a section with fields, not {values!r}.")
    hints = typing.get_type_hints(cls)
    for key in values:
        _check_name(key, hints, where)
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where}.{missing[0]} is missing from the config.")
    return cls(**{k: _convert(hints[k], v, f"{where}.{k}") for k, v in values.items()})


def _check_name(name: Any, hints: Mapping[str, Any], where: str) -> None:
    if name not in hints:
        near = difflib.get_close_matches(str(name), hints, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(hints) or 'no fields'}."
        raise UserError(f"{where}.{name} is no field of the config: {hint}")


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} must be a list, not {value!r}.")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(arguments):
            raise UserError(f"{where} must have {len(arguments)} entries, not {value!r}.")
        return tuple(
            _convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(arguments, value))
        )
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(
                f"{where} must be one of {', '.join(map(repr, arguments))}, not {value!r}."
            )
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where} must be of type {hint.__name__}, not {value!r}.")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(v) for v in value)
    return value
