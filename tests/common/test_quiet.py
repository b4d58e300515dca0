"""What libraries log is kept off the terminal."""

import subprocess
import sys


def test_tensorflow_says_nothing():
    code = (
        "from detclipv2_jax.common.quiet import quiet_libraries; quiet_libraries(); "
        "import tensorflow"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout + run.stderr == ""
