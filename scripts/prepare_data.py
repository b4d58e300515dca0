#!/usr/bin/env python
"""Turn annotated images into prepared sources; the same as `detclip prepare`."""

import sys

from detclipv2_jax.prepare import main

if __name__ == "__main__":
    sys.exit(main())
