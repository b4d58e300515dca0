"""Command lines with a run's config: absl flags, `--config=FILE` and `--config.FIELD=VALUE`."""

import sys
from collections.abc import Callable

from detclipv2_jax.common.cli import exit_status
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.training import recipes


def run_with_config(main: Callable[[list[str]], None]) -> None:
    """Run an absl program that has a `--config` flag, and end with its exit status.

    A `UserError` becomes one line on stderr and exit status 2.
    """
    from absl import app

    sys.exit(exit_status(lambda: app.run(main, flags_parser=_parse_flags)))


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
