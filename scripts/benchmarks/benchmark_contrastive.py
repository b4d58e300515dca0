"""Memory and time of the word-region contrastive loss and its gradient, vs. the plain formula.

    python scripts/benchmarks/benchmark_contrastive.py --output=DIR [--images=256,512,1024]

The plain formula stores the similarity of every concept with every region. Each batch has 100
regions per image and 8 concepts per text, all different, with 256 features: the largest batch that
the paper's settings allow. Memory is what the compiler allocates besides inputs and outputs. If
both are run, they alternate. Writes contrastive.json and contrastive.png.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from detclipv2_jax.common.atomic import replacing, write_json
from detclipv2_jax.ops import contrastive

REGIONS, CONCEPTS, FEATURES = 100, 8, 256
CONFIG = contrastive.ContrastiveConfig()


def plain(regions, mask, areas, concepts, ids, scale):
    """Return equations 3 to 5 of Yao et al. 2023 as written, for the texts' own concepts."""
    similarity = jnp.einsum("bpd,md->bpm", scale * regions, concepts)
    best = jnp.where(mask[..., None], similarity, -1e30).max(axis=1)  # (B, M)
    pooled = best[:, ids].mean(axis=-1)  # (image, text)
    log_p = jax.nn.log_softmax(pooled.T / CONFIG.temperature, axis=-1)
    smoothing = CONFIG.label_smoothing
    return -((1 - smoothing) * jnp.diagonal(log_p) + smoothing * log_p.mean(axis=-1)).mean()


def ours(regions, mask, areas, concepts, ids, scale):
    """Return the loss as a training step computes it."""
    return contrastive.word_region_contrastive(regions, mask, areas, concepts, ids, scale, CONFIG)


def arguments(images: int) -> tuple:
    """Return a batch of unit vectors, as a new model with cosine similarity gives."""
    rng = np.random.default_rng(0)
    unit = lambda *shape: _unit(rng.normal(size=(*shape, FEATURES)).astype(np.float32))
    ids = np.arange(images * CONCEPTS, dtype=np.int32).reshape(images, CONCEPTS)
    mask = np.ones((images, REGIONS), bool)
    regions, concepts = unit(images, REGIONS), unit(images * CONCEPTS)
    return regions, mask, np.ones((images, REGIONS), np.float32), concepts, ids, np.float32(14.0)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def measure(images: int, rounds: int, with_plain: bool) -> dict:
    """Return bytes, median seconds, their ratio and the difference of values and gradients."""
    values = arguments(images)
    compiled, row = {}, {"images": images, "concepts": images * CONCEPTS}
    for name, loss in (("ours", ours), ("plain", plain)):
        program = jax.jit(jax.value_and_grad(loss, (0, 3, 5))).lower(*values).compile()
        row[f"{name}_bytes"] = program.memory_analysis().temp_size_in_bytes
        if name == "ours" or with_plain:
            compiled[name] = program
    on_device = jax.device_put(values)
    results = {n: jax.device_get(program(*on_device)) for n, program in compiled.items()}
    seconds = {name: [] for name in compiled}
    for _ in range(rounds):
        for name, program in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*on_device))
            seconds[name].append(time.perf_counter() - began)
    row |= {f"{name}_seconds": statistics.median(times) for name, times in seconds.items()}
    if with_plain:
        ratios = [b / a for a, b in zip(seconds["ours"], seconds["plain"])]
        row["plain_over_ours_seconds"] = statistics.median(ratios)
        row["difference"] = max(
            float(np.abs(a - b).max() / np.abs(b).max())
            for a, b in zip(jax.tree.leaves(results["ours"]), jax.tree.leaves(results["plain"]))
        )
    row["plain_over_ours_bytes"] = row["plain_bytes"] / row["ours_bytes"]
    return row


def draw(rows: list[dict], path: Path) -> None:
    """Draw the memory of both formulas over the batch size."""
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    panel = figure.subplots()
    images = [row["images"] for row in rows]
    for name, label in (("plain", "plain formula"), ("ours", "this code")):
        panel.plot(images, [row[f"{name}_bytes"] / 2**30 for row in rows], "o-", label=label)
    panel.set(xscale="log", yscale="log")
    panel.set(xlabel="images per batch", ylabel="GiB besides the inputs")
    panel.set_xticks(images, [str(n) for n in images], minor=False)
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="directory for the results")
    parser.add_argument(
        "--images", default="256,512,1024,2048", help="batch sizes (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: %(default)s)")
    parser.add_argument(
        "--plain_up_to",
        type=int,
        default=1024,
        help="largest batch for the plain formula (default: %(default)s)",
    )
    args = parser.parse_args()
    rows = []
    for images in map(int, args.images.split(",")):
        rows.append(measure(images, args.rounds, images <= args.plain_up_to))
        print(json.dumps({k: float(f"{v:.4g}") for k, v in rows[-1].items()}), flush=True)
    device = jax.devices()[0].device_kind
    result = {"device": device, "jax": jax.__version__, "rows": rows}
    write_json(Path(args.output) / "contrastive.json", result)
    draw(rows, Path(args.output) / "contrastive.png")


if __name__ == "__main__":
    from detclipv2_jax.common.cli import exit_status

    raise SystemExit(exit_status(main))
