"""How the commands read their options and say what went wrong: one sentence, exit status 2."""

import sys
from collections.abc import Callable
from typing import Any

from detclipv2_jax.common.errors import UserError


def status(run: Callable[..., Any], *args: Any) -> int:
    """The exit status of `run(*args)`: 0, or 2 where the user can mend what went wrong."""
    try:
        run(*args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
