"""Model FLOP/s and model FLOPs utilization (MFU) of training steps.

MFU is the model's arithmetic per second (models/flops.py: forward and backward, recomputation not
counted) as a share of what all devices of the run could compute.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from detclipv2_jax.data.index import Kind
from detclipv2_jax.models import flops
from detclipv2_jax.training.config import RunConfig
from detclipv2_jax.training.objective import regions_per_image

# Peak TFLOP/s of dense bfloat16 products, by the exact `device_kind` of a TPU. One device is a
# chip. Sources: cloud.google.com/tpu/docs/v4, …/v5e, …/v5p, …/v6e.
_TPU_PEAKS = {
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5": 459,  # v5p
    "TPU v5p": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
}
# The same by a part of a GPU's `device_kind`; the first match counts. NVIDIA's tables give these
# values with sparsity, which is twice the dense value.
_GPU_PEAKS = {
    "A100": 312,  # NVIDIA A100 datasheet (dense)
    "H100 PCIe": 756,  # H100 datasheet: 1,513 with sparsity
    "H100 NVL": 835.5,  # H100 NVL datasheet: 1,671 with sparsity
    "H200 NVL": 835.5,  # H200 datasheet: 1,671 with sparsity
    "H100": 989.5,  # H100 datasheet, SXM: 1,979 with sparsity
    "H200": 989.5,  # H200 datasheet, SXM: 1,979 with sparsity; GH200's Hopper GPU is the same
    "GB200": 2500,  # GB200 NVL72 page: 360 PFLOP/s with sparsity, 72 GPUs
    "B200": 2250,  # HGX B200 page: 36 PFLOP/s with sparsity, 8 GPUs
}
_SECONDS_TO_MEASURE = 0.3


@dataclasses.dataclass(frozen=True)
class Peak:
    """The most arithmetic that one device can do."""

    flops_per_second: float
    source: str  # "published" or how it was measured


def published_peak(device_kind: str) -> Peak | None:
    """Return the published dense bfloat16 peak of a device; None if it is not in the tables."""
    tflops = _TPU_PEAKS.get(device_kind)
    if tflops is None:
        tflops = next((peak for name, peak in _GPU_PEAKS.items() if name in device_kind), None)
    return None if tflops is None else Peak(tflops * 1e12, "published, dense bfloat16")


def measured_peak(dtype: str) -> Peak:
    """Measure the rate of a large matrix product in under a second.

    All devices of this process compute one at the same time, because virtual CPU devices share
    their cores. The fastest of several repetitions counts.

    Args:
        dtype: the compute dtype of the run.
    """
    devices = jax.local_devices()
    side = 512 if devices[0].platform == "cpu" else 4096
    split = NamedSharding(Mesh(np.array(devices), ("device",)), PartitionSpec("device"))
    matrices = jax.device_put(np.ones((len(devices), side, side), jnp.dtype(dtype)), split)
    product = jax.jit(jnp.matmul, out_shardings=split).lower(matrices, matrices).compile()
    fastest, deadline = float("inf"), time.perf_counter() + _SECONDS_TO_MEASURE
    while (began := time.perf_counter()) < deadline:
        jax.block_until_ready(product(matrices, matrices))
        fastest = min(fastest, time.perf_counter() - began)
    return Peak(2.0 * side**3 / fastest, f"measured, {dtype} products of {side} × {side} matrices")


class Utilization:
    """The speed of each step of a run, as metrics."""

    def __init__(self, config: RunConfig, mesh: Mesh):
        """Look up or measure the devices' peak and print it."""
        self._config = config
        kind = mesh.devices.flat[0].device_kind
        self.peak = published_peak(kind) or measured_peak(config.model.dtype)
        self._all_devices = self.peak.flops_per_second * mesh.size
        tflops = self.peak.flops_per_second / 1e12
        print(f"peak of a device ({kind}): {tflops:.3g} TFLOP/s ({self.peak.source})")

    def metrics(self, kind: Kind, canvas: tuple[int, int], seconds: float) -> dict[str, float]:
        """Return the metrics of one step.

        Args:
            kind: of the step's data.
            canvas: (height, width), pixels.
            seconds: that the devices spent on the step.

        Returns:
            `step_seconds`; `model_tflops_per_second`, of all devices together; `mfu`, 0 to 1.
        """
        per_second = model_flops(self._config, kind, canvas) / max(seconds, 1e-9)
        return {
            "step_seconds": round(seconds, 6),
            "model_tflops_per_second": float(f"{per_second / 1e12:.4g}"),
            "mfu": float(f"{per_second / self._all_devices:.4g}"),
        }


def model_flops(config: RunConfig, kind: Kind, canvas: tuple[int, int]) -> float:
    """Return the model FLOPs of one step of a run, forward and backward, over the global batch."""
    data = config.data.kinds()[kind]
    parts = flops.step(
        config.model, kind, canvas, data.batch_size, data.table_size,
        proposals=regions_per_image(kind, config.loss), group=config.loss.proposals.group,
    )  # fmt: skip
    return sum(parts.values())
