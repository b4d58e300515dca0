"""Start-up of a run's processes, and the points where they wait for each other."""

import importlib.util
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from detclipv2_jax.common.atomic import write_json
from detclipv2_jax.common.errors import UserError

_KUBERNETES = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"}  # set in an indexed job
_WEEK = 7 * 24 * 3600 * 1000  # milliseconds that a barrier waits for the slowest process
_barriers = itertools.count()  # each needs its own name; all processes pass them in the same order
_HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead


def start(address: str | None, count: int | None, index: int | None) -> bool:
    """Connect to the other processes of the run; return whether there are any.

    The arguments are given together or not at all. Without them, JAX finds the processes of a
    cluster it knows (Cloud TPU, GKE, SLURM, Open MPI), and a single process connects to nothing.

    Args:
        address: host:port of process 0.
        count: number of processes.
        index: number of this process, from 0.

    Raises:
        UserError: only some arguments are given, or the other processes cannot be reached.
    """
    given = [value is not None for value in (address, count, index)]
    if any(given) and not all(given):
        raise UserError(
            "--coordinator_address, --num_processes and --process_id belong together. Give all "
            "three, or none on a cluster that JAX detects."
        )
    if not any(given):
        if not cluster_has_other_processes(os.environ, _on_tpu_vm()):
            return False
        _check_kubernetes(os.environ)
    options = {"heartbeat_timeout_seconds": _HEARTBEAT}
    if address is not None and address.rpartition(":")[0] in ("localhost", "127.0.0.1", "[::1]"):
        options["coordinator_bind_address"] = address  # else it listens on all interfaces
    try:
        jax.distributed.initialize(address, count, index, **options)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"The processes of the run could not connect ({str(error).splitlines()[0]}). "
            "Check --coordinator_address, --num_processes and --process_id."
        ) from None
    return True


def barrier() -> None:
    """Wait until every process has called this function equally often.

    It uses no device, and waits up to a week: compilation times differ by minutes.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        wait = multihost.get_barrier_sync_fn()
        wait(key=f"detclipv2_jax {next(_barriers)}", timeout_ms=_WEEK)


def run_on_first_process(make: Callable[[], Any], path: str | os.PathLike) -> Any:
    """Call `make()` in process 0 and return its result in every process.

    All processes must call this function. The value travels as JSON in a temporary file.

    Args:
        make: called in process 0 only.
        path: the temporary file, in a directory that all processes share.

    Raises:
        UserError: in every process, if `make` raises it; or the directory is not shared.
    """
    if jax.process_count() == 1:
        return make()
    path = pathlib.Path(path)
    if jax.process_index() == 0:
        try:
            answer = {"value": make()}
        except UserError as error:
            answer = {"error": str(error)}
        write_json(path, answer)
    barrier()
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: written by process 0, but process {jax.process_index()} cannot find it. "
            "Use a directory that all processes share."
        ) from None
    barrier()
    if jax.process_index() == 0:
        path.unlink()
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def cluster_has_other_processes(environment: Mapping[str, str], on_tpu_vm: bool = False) -> bool:
    """Return whether the cluster's environment variables describe several processes.

    The variables are those that JAX's own detection reads: a SLURM step of several tasks, Open MPI,
    an indexed Kubernetes job, a slice of several TPU hosts, or JAX's own. On a TPU VM (`on_tpu_vm`)
    whose environment names no hosts, JAX asks the metadata server, which also handles one host.
    """

    def above_one(name: str) -> bool:
        value = environment.get(name, "1")
        return value.isdigit() and int(value) > 1

    hosts = _tpu_hosts(environment)
    asks_metadata_server = on_tpu_vm and hosts is None and "TPU_SKIP_MDS_QUERY" not in environment
    return (
        "JAX_COORDINATOR_ADDRESS" in environment
        or ("SLURM_PROCID" in environment and above_one("SLURM_NTASKS"))
        or above_one("OMPI_COMM_WORLD_SIZE")
        or environment.keys() >= _KUBERNETES
        or "," in (hosts or "")
        or asks_metadata_server
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    )


def _tpu_hosts(environment: Mapping[str, str]) -> str | None:
    """Return the comma-separated hosts of a TPU slice; None if the environment names none."""
    return environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))


def _on_tpu_vm() -> bool:
    # JAX has no public name for this. If the private one goes, only the environment is consulted.
    try:
        from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
    except ImportError:
        return False
    return running_in_cloud_tpu_vm


def _check_kubernetes(environment: Mapping[str, str]) -> None:
    """Raise `UserError` if JAX would need the Kubernetes client, and it is not installed."""
    needs_client = environment.keys() >= _KUBERNETES and _tpu_hosts(environment) is None
    if needs_client and importlib.util.find_spec("kubernetes") is None:
        raise UserError(
            "The package kubernetes, which finds the other processes of a Kubernetes job, is not "
            'installed. Run `pip install "jax[k8s]"`, or give --coordinator_address, '
            "--num_processes and --process_id."
        )
