#!/usr/bin/env python
"""Make the concept dictionary of prepared sources; the same as `detclip prepare concepts`.

python scripts/prepare_concepts.py --from=data --to=data/concepts
"""

import sys
from collections.abc import Sequence

from detclipv2_jax import prepare


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `detclip prepare concepts` with these arguments and return the exit status."""
    return prepare.main(["concepts", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
