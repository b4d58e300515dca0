#!/usr/bin/env python
"""Turn archives into prepared records, which training reads; the same as `detclip prepare`."""

import sys

from detclipv2_jax.prepare import main

if __name__ == "__main__":
    sys.exit(main())
