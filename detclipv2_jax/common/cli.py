"""Shared by all commands: exit status and message of a `UserError`, and renamed options."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from detclipv2_jax.common.cache import keep_compiled_programs
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.printable import print_any_text
from detclipv2_jax.common.quiet import quiet_libraries


def start() -> None:
    """Set up what a command that uses the model prints and caches; call it first."""
    print_any_text()
    quiet_libraries()
    keep_compiled_programs()


def exit_status(run: Callable[..., Any], *args: Any) -> int:
    """Call `run(*args)` and return the exit status: 0, or 2 after printing a `UserError`."""
    try:
        run(*args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def refuse_renamed(parser: Any, names: dict[str, str]) -> None:
    """Make a parser refuse options by their old names and name the new ones.

    Args:
      parser: an `argparse` parser or argument group.
      names: old name -> new name, each with its dashes.
    """
    for old, new in names.items():
        parser.add_argument(old, action=_Renamed, new=new, nargs="?", help=argparse.SUPPRESS)


class _Renamed(argparse.Action):
    """An option that ends the command with the option's new name."""

    def __init__(self, *args: Any, new: str, **kwargs: Any):
        super().__init__(*args, default=argparse.SUPPRESS, **kwargs)
        self._new = new

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error(f"{self.option_strings[0]} is now {self._new}. Use the new name.")
