"""Command lines with a run's config: absl flags, `--config=FILE` and `--config.FIELD=VALUE`."""

import argparse
import ast
import dataclasses
import functools
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from detclipv2_jax.common import config_help
from detclipv2_jax.common.cli import exit_status, local_text
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.training import recipes


def run_with_config(
    main: Callable[[list[str]], None],
    *,
    handles_signals: bool = True,
    needs_config: bool = True,
) -> None:
    """Run an absl program that has a `--config` flag, and end with its exit status.

    A `UserError` becomes one line on stderr and exit status 2. With `needs_config` False the
    program has another way than `--config`, and tells itself where it misses one.
    """
    from absl import app

    if {"-h", "-help", "--help"} & set(sys.argv[1:]):
        sys.exit(exit_status(_print_help, sys.modules[main.__module__], sys.argv))
    parse = functools.partial(parse_flags, needs_config=needs_config)
    run = lambda: app.run(main, flags_parser=parse)
    sys.exit(exit_status(run, handles_signals=handles_signals))


def _print_help(module: ModuleType, argv: list[str]) -> None:
    """Print the help of a program: its docstring, options, and recipes or, of one, its fields.

    absl would show the flags of `__main__` alone, and ml_collections knows no fields before it has
    read a config.
    """
    from absl import flags

    lines = [(module.__doc__ or "").strip(), "", "options:"]
    for flag in flags.FLAGS.get_key_flags_for_module(module.__name__):
        if flag.name not in ("?", "help", "helpfull", "helpshort", "helpxml"):
            default = "" if flag.default in (None, "") else f" (default: {flag.default})"
            lines += _entry(f"--{flag.name}  {flag.help}{default}")
    argument = _taken(argv)[0]
    lines += _about_recipes() if argument is None else _about_recipe(recipes.resolve(argument))
    print("\n".join(lines))


def _about_recipes() -> list[str]:
    """Return help on all shipped recipes and the names of all fields."""
    lines = ["", f"recipes in {recipes.directory()}:"]
    for path in sorted(recipes.directory().glob("*.py")):
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines += _entry(f"{path.name}  {about.splitlines()[0]}")
    lines += ["", "config fields, set with --config.FIELD=VALUE:"]
    for section, names in _fields().items():
        lines += _entry(f"{section}  {', '.join(names)}")
    return [*lines, "", "--config=RECIPE --help lists its sizes, and each field with its meaning."]


def _about_recipe(argument: str) -> list[str]:
    """Return help on one recipe: its sizes, and the value and meaning of each field."""
    from detclipv2_jax.training.config import RunConfig

    file = argument.partition(":")[0]
    values, sizes = recipes.read(argument).to_dict(), recipes.sizes(file)
    lines = ["", f"sizes of {file}, given as FILE:SIZE:", f"  {', '.join(sizes) or 'one'}"]
    lines += ["", f"config fields and their values in {argument}, set with --config.FIELD=VALUE:"]
    for field in config_help.fields(RunConfig):
        value = values
        for name in field.path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        lines += _entry(f"{field.path} = {value!r}  ({field.type}) {field.meaning}")
    return lines


def _entry(text: str) -> list[str]:
    return textwrap.wrap(f"  {text}", 79, subsequent_indent=" " * 8, break_long_words=False)


def _fields() -> dict[str, list[str]]:
    """Return the names of the fields in each section of a run's config."""
    from detclipv2_jax.training.config import RunConfig

    found: dict[str, list[str]] = {}
    for field in config_help.fields(RunConfig):
        section, _, name = field.path.rpartition(".")
        found.setdefault(section or "(no section)", []).append(name)
    return found


def parse_flags(argv: list[str], *, needs_config: bool = True) -> list[str]:
    """Parse flags with absl, for absl.app.run; return the program's name.

    Raises:
        UserError: a flag, field or value is unknown or of another type, or the config cannot be
            read.
    """
    from absl import flags

    argument, rest = _taken(argv)
    if argument is not None:
        argument = recipes.resolve(argument)
        recipes.read(argument)  # ml_collections would hide why it fails
        _check_fields(rest)
        argv = [argv[0], f"--config={argument}", *rest]
    elif needs_config and flags.FLAGS["config"].default is None:
        raise UserError(
            "--config is missing. Give a recipe, such as --config=coco_format.py; `--help` lists "
            "them."
        )
    before, sys.argv = sys.argv, argv  # where ml_collections looks for --config.FIELD
    try:
        left = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(_reason(str(error).splitlines()[0])) from None
    finally:
        sys.argv = before
    if len(left) > 1:
        raise UserError(f"unexpected argument {left[1]!r}. Every option starts with --.")
    return left


def _taken(argv: list[str]) -> tuple[str | None, list[str]]:
    """Return the value of `--config`, None without one, and the other arguments.

    Values that begin with ~/ are paths; shells leave them in `--workdir=~/run`.

    ml_collections knows the fields of a config only after it has read `--config`, so people's order
    of arguments must not matter.

    Raises:
        UserError: `--config` is given twice or without a value, or a value is a Windows path.
    """
    found, rest, arguments = [], [], iter(argv[1:])
    for argument in arguments:
        flag, has_value, value = argument.partition("=")
        try:
            value = local_text(value)
            argument = flag + has_value + value if has_value else local_text(argument)
        except argparse.ArgumentTypeError as error:
            raise UserError(str(error)) from None
        if flag not in ("--config", "-config"):
            rest.append(argument)
            continue
        value = value if has_value else next(arguments, "")
        if not value or value.startswith("-"):
            raise UserError(
                "--config has no value. Give a recipe, such as --config=coco_format.py."
            )
        found.append(value)
    if len(found) > 1:
        raise UserError(
            f"--config is given {len(found)} times: {', '.join(found)}. Give it once; fields are "
            "set with --config.FIELD=VALUE."
        )
    return (found or [None])[0], rest


def _check_fields(arguments: list[str]) -> None:
    """Raise `UserError` for the first `--config.FIELD=…` that is not a field of a run."""
    from detclipv2_jax.common import config_dict
    from detclipv2_jax.training.config import RunConfig

    for argument in arguments:
        name = argument.partition("=")[0].lstrip("-")
        if not name.startswith("config."):
            continue
        config_dict.check_path(RunConfig, name.removeprefix("config."), "--config")
        section, _, field = name.removeprefix("config.").rpartition(".")
        if dataclasses.is_dataclass(kind := _type_of(name)):
            first = config_help.fields(typing.cast(type, kind))[0].path
            raise UserError(
                f"--{name} is a section. Set one of its fields, such as --{name}.{first}=…"
            )


def _reason(message: str) -> str:
    """Return absl's message about a flag as one of ours."""
    found = re.match(r"flag --(config\.[\w.]+)=(.*?): ", message)
    if found:
        wanted = config_help.type_name(_type_of(found[1]))
        return f"--{found[1]}={found[2]}: must be of type {wanted}. Give such a value."
    return message if message.endswith((".", "?")) else f"{message}. `--help` lists all flags."


def _type_of(name: str) -> Any:
    """Return the annotated type of a field such as 'config.train.epochs'."""
    from detclipv2_jax.training.config import RunConfig

    cls: Any = RunConfig
    for part in name.split(".")[1:]:
        cls = typing.get_type_hints(cls)[part]
    return cls
