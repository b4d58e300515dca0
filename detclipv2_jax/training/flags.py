"""Command lines with a run's config: absl flags, `--config=FILE` and `--config.FIELD=VALUE`."""

import ast
import dataclasses
import sys
import textwrap
import typing
from collections.abc import Callable
from types import ModuleType

from detclipv2_jax.common.cli import exit_status
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.training import recipes


def run_with_config(main: Callable[[list[str]], None]) -> None:
    """Run an absl program that has a `--config` flag, and end with its exit status.

    A `UserError` becomes one line on stderr and exit status 2.
    """
    from absl import app

    if {"-h", "-help", "--help"} & set(sys.argv[1:]):
        print(_help(sys.modules[main.__module__]))
        sys.exit(0)
    sys.exit(exit_status(lambda: app.run(main, flags_parser=_parse_flags)))


def _help(module: ModuleType) -> str:
    """Return the help of a program: its docstring, options, recipes and config fields.

    absl would show the flags of `__main__` alone, and ml_collections knows no fields before it has
    read a config.
    """
    from absl import flags

    lines = [(module.__doc__ or "").strip(), "", "options:"]
    for flag in flags.FLAGS.get_key_flags_for_module(module.__name__):
        if flag.name not in ("?", "help", "helpfull", "helpshort", "helpxml"):
            default = "" if flag.default in (None, "") else f" (default: {flag.default})"
            lines += textwrap.wrap(
                f"  --{flag.name}  {flag.help}{default}", 79, subsequent_indent=" " * 8
            )
    lines += ["", f"recipes in {recipes.directory()}:"]
    for path in sorted(recipes.directory().glob("*.py")):
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines += textwrap.wrap(
            f"  {path.name}  {about.splitlines()[0]}", 79, subsequent_indent=" " * 8
        )
    lines += ["", "config fields, set with --config.FIELD=VALUE:"]
    for section, names in _fields().items():
        lines += textwrap.wrap(f"  {section}  {', '.join(names)}", 79, subsequent_indent=" " * 8)
    return "\n".join(lines)


def _fields() -> dict[str, list[str]]:
    """Return the names of the fields in each section of a run's config."""
    from detclipv2_jax.training.config import RunConfig

    found: dict[str, list[str]] = {}

    def visit(cls: type, section: str) -> None:
        for name, hint in typing.get_type_hints(cls).items():
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                visit(hint, f"{section}{name}.")
            else:
                found.setdefault(section.removesuffix(".") or "(no section)", []).append(name)

    visit(RunConfig, "")
    return found


def _parse_flags(argv: list[str]) -> list[str]:
    """Parse flags with absl, for absl.app.run; return the program's name.

    Raises:
        UserError: a flag, field or value is unknown or of another type.
    """
    from absl import flags

    argv = _with_config_first(argv)
    try:
        rest = flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:
        _check_fields(argv)
        raise UserError(f"{str(error).splitlines()[0]} (in {' '.join(argv[1:])})") from None
    except (flags.Error, OSError, TypeError, ValueError) as error:
        raise UserError(str(error).splitlines()[0]) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}. Every option starts with --.")
    return rest


def _with_config_first(argv: list[str]) -> list[str]:
    """Return the arguments with `--config` before its fields, and its file found as a recipe.

    ml_collections knows the fields of a config only after it has read `--config`.
    """
    program, *arguments = argv
    for i, argument in enumerate(arguments):
        flag, has_value, value = argument.partition("=")
        if flag in ("--config", "-config"):
            rest = arguments[:i] + arguments[i + 1 :]
            if not has_value:
                if i == len(rest):
                    break  # absl reports the missing value
                value = rest.pop(i)
            return [program, f"--config={recipes.resolve(value)}", *rest]
    return argv


def _check_fields(argv: list[str]) -> None:
    """Raise `UserError` for the first `--config.FIELD=…` that is not a field of a run."""
    from detclipv2_jax.common import config_dict
    from detclipv2_jax.training import config

    for argument in argv:
        name = argument.lstrip("-").split("=")[0]
        if name.startswith("config."):
            config_dict.check_path(config.RunConfig, name.removeprefix("config."), "--config")
