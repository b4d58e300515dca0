"""Print what a recipe costs: steps, model FLOPs, and hours on several devices.

    python scripts/benchmarks/cost.py --config=configs/pretrain.py:swin_t

It needs neither the data nor a device. The number of records of each kind is the paper's, or
--records=detection=660000,grounding=0. Hours are model FLOPs divided by a device's published peak
and by --mfu, the share of the peak that training reaches. That share is an assumption unless you
measured it: the trainer prints it at every step. V100-hours of the paper give the share that its
authors reached.
"""

import math
from collections.abc import Mapping

import numpy as np
from absl import flags
from ml_collections import config_flags

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data import rungs
from detclipv2_jax.data.index import Kind
from detclipv2_jax.training import config as config_lib
from detclipv2_jax.training.config import RunConfig
from detclipv2_jax.training.flags import run_with_config
from detclipv2_jax.training.utilization import model_flops, published_peak

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe of the run.")
_RECORDS = flags.DEFINE_list(
    "records",
    ["detection=660000", "grounding=770000", "image_text=13000000"],
    "Records of each kind, KIND=NUMBER; kinds that are not named have none.",
)
_MFU = flags.DEFINE_float("mfu", 0.3, "Model FLOPs utilization to assume, 0 to 1.", 0.001, 1.0)

# By names that `published_peak` knows. V100: 125 TFLOP/s, NVIDIA V100 datasheet (SXM2, tensor
# cores, float16).
_DEVICES = ("A100", "H100", "H200", "B200", "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e")
_V100_PEAK = 125e12


def main(argv: list[str]) -> None:
    """Print both tables."""
    config = config_lib.parse(_CONFIG.value.to_dict())
    records = parse_records(_RECORDS.value)
    table = costs(config, records)
    print(cost_table(table, config.train.epochs))
    total = config.train.epochs * sum(steps * flops for steps, flops in table.values())
    print(f"\n{total / 1e18:.1f} EFLOP in all. Hours of one device at an MFU of {_MFU.value:g}:\n")
    print(device_table(total, _MFU.value))


def parse_records(values: list[str]) -> dict[str, int]:
    """Return kind → number of records."""
    try:
        return {kind: int(number) for kind, number in (value.split("=") for value in values)}
    except ValueError:
        raise UserError(
            f"--records={','.join(values)}: expected KIND=NUMBER, separated by commas. Write for "
            "example --records=detection=660000,grounding=770000."
        ) from None


def costs(config: RunConfig, records: Mapping[str, int]) -> dict[Kind, tuple[int, float]]:
    """Return kind → (steps per epoch, mean model FLOPs of a step).

    A step's FLOPs are the mean over the kind's shapes and, by their chances over the run, its
    rungs.
    """
    table = {}
    for kind, data in config.data.kinds().items():
        if not records.get(kind):
            continue
        moments = np.linspace(0, config.train.epochs, 1000, endpoint=False)
        weights = rungs.chances(data, moments).mean(axis=0)
        each = [
            np.mean([model_flops(config, kind, rungs.canvas(shape, r)) for shape in data.shapes])
            for r in data.rungs
        ]
        steps = data.repeat * math.ceil(records[kind] / data.batch_size)
        table[kind] = (steps, float(np.dot(weights, each)))
    return table


def cost_table(table: Mapping[Kind, tuple[int, float]], epochs: float) -> str:
    """Return a row per kind and their sum."""
    lines = ["| kind | steps per epoch | TFLOP per step | EFLOP per epoch | share |"]
    lines.append("|---|---|---|---|---|")
    total = sum(steps * flops for steps, flops in table.values())
    for kind, (steps, flops) in table.items():
        lines.append(
            f"| {kind} | {steps:,} | {flops / 1e12:,.0f} | {steps * flops / 1e18:.2f} | "
            f"{steps * flops / total:.0%} |"
        )
    steps = sum(steps for steps, _ in table.values())
    lines.append(f"| all | {steps:,} | | {total / 1e18:.2f} | |")
    lines.append(f"| {epochs:g} epochs | {steps * epochs:,.0f} | | {epochs * total / 1e18:.1f} | |")
    return "\n".join(lines)


def device_table(flops: float, mfu: float) -> str:
    """Return the hours of each device for some model FLOPs."""
    peaks = {"V100": _V100_PEAK}
    peaks |= {name: published_peak(name).flops_per_second for name in _DEVICES}
    lines = ["| device | peak, TFLOP/s | device-hours | hours on 8 |", "|---|---|---|---|"]
    for name, peak in peaks.items():
        hours = flops / (peak * mfu) / 3600
        lines.append(f"| {name} | {peak / 1e12:,.0f} | {hours:,.0f} | {hours / 8:,.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run_with_config(main)
