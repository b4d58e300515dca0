"""Conversion of config dataclasses to nested dicts, as stored in files, and back.

A dataclass lists its renamed fields in a class attribute `RENAMED = {old: new}` without a type
annotation, and the renamed values of fields in `RENAMED_VALUES = {field: {old: new}}`. `from_dict`
refuses an old name and names the new one; `with_current_names` renames both in the stored config of
an older run.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from detclipv2_jax.common.errors import UserError


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass as nested dicts, tuples and scalars, which JSON can store."""
    return _plain(dataclasses.asdict(config))


def from_dict(cls: type, values: Any, where: str) -> Any:
    """Return an instance of the dataclass `cls` with the fields of a nested mapping.

    Args:
      cls: a dataclass whose fields are annotated with scalars, tuples, `Literal`s, other
        dataclasses, or one of these `| None`.
      values: field name -> value; lists are accepted for tuples, ints for floats.
      where: path of this section, such as "config.train", for error messages.

    Raises:
      UserError: a field is unknown, renamed, missing or has a wrong type; the message names it.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where} must be a section with fields, not {values!r}. Set its fields.")
    for name, value in values.items():
        _check_name(cls, name, where)
        if (new := _new_value(cls, name, value)) is not value:
            raise UserError(f"{where}.{name} {value!r} is now {new!r}. Use the new name.")
    for field in dataclasses.fields(cls):
        is_required = field.default is field.default_factory is dataclasses.MISSING
        if is_required and field.name not in values:
            raise UserError(f"{where}.{field.name} is missing from the config. Add it.")
    hints = typing.get_type_hints(cls)
    return cls(**{k: _convert(hints[k], v, f"{where}.{k}") for k, v in values.items()})


def with_current_names(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dict of a stored config with fields and values under their current names.

    Fields that `cls` does not have are kept unchanged.
    """
    hints, renamed = _hints(cls), getattr(cls, "RENAMED", {})
    result = {}
    for name, value in values.items():
        name = renamed.get(name, name)
        if dataclasses.is_dataclass(hints.get(name)) and isinstance(value, Mapping):
            result[name] = with_current_names(hints[name], value)
        else:
            result[name] = _new_value(cls, name, value)
    return result


def known_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a mapping whose keys are fields of the dataclass `cls`."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if name in names}


def check_path(cls: type, path: str, where: str) -> None:
    """Raise `UserError` unless a path such as 'train.epochs' names a field of `cls`."""
    for name in path.split("."):
        _check_name(cls, name, where)
        cls, where = _hints(cls)[name], f"{where}.{name}"


def _new_value(cls: Any, name: Any, value: Any) -> Any:
    """Return the current name of a field's value: itself, unless `cls` lists it as renamed."""
    renamed = getattr(cls, "RENAMED_VALUES", {}).get(name, {})
    return renamed.get(value, value) if isinstance(value, str) else value


def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}


def _check_name(cls: Any, name: Any, where: str) -> None:
    known = _hints(cls)
    if name in known:
        return
    if new := getattr(cls, "RENAMED", {}).get(name):
        raise UserError(f"{where}.{name} is now {where}.{new}. Use the new name.")
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"It has {', '.join(known) or 'no fields'}."
    raise UserError(f"{where}.{name} is not a field of the config. {hint}")


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Return `value` converted to the annotated type `hint`; `UserError` if it does not fit."""
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    origin = typing.get_origin(hint)
    if origin is tuple:
        return _convert_tuple(typing.get_args(hint), value, where)
    if origin is typing.Literal:
        return _convert_choice(typing.get_args(hint), value, where)
    if origin in (typing.Union, types.UnionType):  # only `X | None` occurs
        inner = next(a for a in typing.get_args(hint) if a is not type(None))
        return None if value is None else _convert(inner, value, where)
    return _convert_scalar(hint, value, where)


def _convert_tuple(hints: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """Return a list as `tuple[X, ...]` or `tuple[X, Y, Z]`; `hints` are the tuple's arguments."""
    if not isinstance(value, list | tuple):
        raise UserError(f"{where} must be a list, not {value!r}.")
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = (hints[0],) * len(value)
    if len(value) != len(hints):
        raise UserError(f"{where} must have {len(hints)} entries, not {value!r}.")
    return tuple(_convert(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(hints, value)))


def _convert_choice(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value not in choices:
        raise UserError(f"{where} must be one of {', '.join(map(repr, choices))}, not {value!r}.")
    return value


def _convert_scalar(hint: type, value: Any, where: str) -> Any:
    """Return `value`, an int as a float where `hint` is float. A bool is not a number."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if hint is float and is_number:
        return float(value)
    if not isinstance(value, hint) or (hint is int and not is_number):
        raise UserError(f"{where} must be of type {hint.__name__}, not {value!r}.")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(v) for v in value)
    return value
