"""Shared by all commands: exit status and message of a `UserError`, and renamed options."""

import argparse
import contextlib
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

from detclipv2_jax.common.cache import keep_compiled_programs
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.interruption import stops
from detclipv2_jax.common.printable import print_any_text, printable
from detclipv2_jax.common.quiet import quiet_libraries


def start() -> None:
    """Set up what a command that uses the model prints and caches; call it first."""
    print_any_text()
    quiet_libraries()
    keep_compiled_programs()


def exit_status(
    run: Callable[..., Any], *args: Any, what_next: str = "", handles_signals: bool = True
) -> int:
    """Call `run(*args)`, and return the exit status that it returns or that its end asks for.

    2 after a `UserError`, which is printed. 128 + the number of the signal after Ctrl-C, SIGTERM or
    SIGHUP, with one sentence. 128 + SIGPIPE, silently, if what reads the output ends (`| head`).

    Args:
      run: the command. It may raise `Stopped` again with a message of its own.
      args: of `run`.
      what_next: what to do after a stop, for example "Run the same command to resume."
      handles_signals: False: the program has handlers of its own.
    """
    print_any_text()
    try:
        with stops(what_next) if handles_signals else contextlib.nullcontext():
            status = run(*args)
            sys.stdout.flush()
            return status if isinstance(status, int) else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # for the flush at the end of the process
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as stopped:
        said = (str(stopped) or "stopped by Ctrl-C").removesuffix(".")
        print(f"\n{said}. {what_next}".rstrip(), file=sys.stderr)
        return 128 + getattr(stopped, "signal", signal.SIGINT)


def local_text(text: str) -> str:
    """Return the path of an option as it is, but ~ is the home directory.

    Shells leave `--from=~/a` and `"~/a"`. What only looks like a path, such as "-", stays.

    Raises:
      argparse.ArgumentTypeError: it is a path of Windows, on another system.
    """
    path = os.path.expanduser(text)
    is_windows = re.match(r"[A-Za-z]:[\\/]|\\\\[^\\]", text)
    if os.name != "nt" and is_windows and not os.path.lexists(path):
        raise argparse.ArgumentTypeError(
            f"{printable(text)}: is a Windows path, and this system has none. Give the path where "
            "the folder is mounted, such as /mnt/c/photos in WSL."
        )
    return path


def local_path(text: str) -> pathlib.Path:
    """Return `local_text` as a path."""
    return pathlib.Path(local_text(text))


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
