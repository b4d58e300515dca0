"""Time of the kernel gradient of a 3×3 convolution, by XLA's convolution and by matrix products.

    python scripts/benchmarks/benchmark_conv.py [--rounds=5]

The sizes are those of the head's packed levels with 256 channels, for an image of 800×1344, one and
four images of 320×320, and for the nano model. Prints milliseconds of wall-clock time and of all
cores, with the forward pass for comparison.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from detclipv2_jax.ops import conv

# (images, height, width, channels, outputs)
SHAPES = (
    (1, 100, 253, 256, 256),
    (1, 100, 253, 256, 4),
    (1, 40, 61, 256, 256),
    (4, 40, 61, 256, 256),
    (32, 16, 25, 64, 64),
)


def contestants(images: int, height: int, width: int, channels: int, out: int) -> dict:
    """Return name -> a function without arguments that waits for its result."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
    x, gradient = draw(images, height, width, channels), draw(images, height, width, out)
    kernel = draw(3, 3, channels, out)
    forward = jax.jit(conv.conv3x3)
    by_convolution = jax.jit(conv.kernel_gradient_by_convolution)
    by_products = jax.jit(conv.kernel_gradient_by_products)
    return {
        "forward": lambda: forward(x, kernel).block_until_ready(),
        "gradient by convolution": lambda: by_convolution(x, gradient).block_until_ready(),
        "gradient by products": lambda: by_products(x, gradient).block_until_ready(),
    }


def measure(runs: dict, rounds: int) -> dict[str, tuple[float, float]]:
    """Return name -> median seconds of wall-clock time and of all cores."""
    taken = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            clock, cores = time.perf_counter(), time.process_time()
            run()
            taken[name].append((time.perf_counter() - clock, time.process_time() - cores))
    return {name: tuple(map(statistics.median, zip(*times))) for name, times in taken.items()}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    rounds = parser.parse_args().rounds
    for shape in SHAPES:
        images, height, width, channels, out = shape
        flops = 2 * images * height * width * 9 * channels * out
        for name, (clock, cores) in measure(contestants(*shape), rounds).items():
            where = f"{images}×{height}×{width} {channels}→{out}"
            rate = f"{flops / clock / 1e9:6.0f} GFLOP/s"
            print(f"{where:24}{name:26}{clock * 1e3:8.1f} ms {cores * 1e3:8.1f} core ms {rate}")


if __name__ == "__main__":
    from detclipv2_jax.common.cli import exit_status

    raise SystemExit(exit_status(main))
