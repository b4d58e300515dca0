"""The command line of a training run: absl flags with the run's config among them."""

import sys
from collections.abc import Callable

from detclipv2_jax.common.cli import exit_status
from detclipv2_jax.common.errors import UserError


def run_with_config(main: Callable[[list[str]], None]) -> None:
    """Runs an absl program whose `--config` is a run's config, and ends with its exit status."""
    from absl import app

    sys.exit(exit_status(lambda: app.run(main, flags_parser=_parse_flags)))


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, its errors and ml_collections' told plainly; `--config` may stand anywhere."""
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
    """Names the first `--config.FIELD=…` that is no field of a run."""
    from detclipv2_jax.common import config_dict
    from detclipv2_jax.training import config

    for argument in argv:
        name = argument.lstrip("-").split("=")[0]
        if name.startswith("config."):
            config_dict.check_path(config.RunConfig, name.removeprefix("config."), "--config")
