"""Command lines with a run's config: absl flags, `--config=FILE` and `--config.FIELD=VALUE`."""

import sys
from collections.abc import Callable

from detclipv2_jax.common.cli import exit_status
from detclipv2_jax.common.errors import UserError


def run_with_config(main: Callable[[list[str]], None]) -> None:
    """Run an absl program that has a `--config` flag, and end with its exit status.

    A `UserError` becomes one line on stderr and exit status 2.
    """
    from absl import app

    sys.exit(exit_status(lambda: app.run(main, flags_parser=_parse_flags)))


def _parse_flags(argv: list[str]) -> list[str]:
    """Parse flags with absl, for absl.app.run; return the program's name.

    `--config` may come after `--config.FIELD`, which ml_collections does not allow.

    Raises:
        UserError: a flag, field or value is unknown or of another type.
    """
    from absl import flags

    first_field = next(
        (i for i, a in enumerate(argv) if a.lstrip("-").startswith("config.")), len(argv)
    )
    config_at = next(
        (i for i, a in enumerate(argv) if a.lstrip("-").split("=")[0] == "config"), None
    )
    if config_at is not None and config_at > first_field:
        argv = [argv[0], argv[config_at], *argv[1:config_at], *argv[config_at + 1 :]]
    try:
        rest = flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:
        _check_fields(argv)
        raise UserError(f"{str(error).splitlines()[0]} (in {' '.join(argv[1:])})") from None
    except (flags.Error, OSError, TypeError, ValueError) as error:
        raise UserError(str(error).splitlines()[0]) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: every option starts with --.")
    return rest


def _check_fields(argv: list[str]) -> None:
    """Raise `UserError` for the first `--config.FIELD=…` that is not a field of a run."""
    from detclipv2_jax.common import config_dict
    from detclipv2_jax.training import config

    for argument in argv:
        name = argument.lstrip("-").split("=")[0]
        if name.startswith("config."):
            config_dict.check_path(config.RunConfig, name.removeprefix("config."), "--config")
