"""The processes of a run find each other: by themselves on a cluster, or as the flags say."""

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

_KUBERNETES = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"}  # of an indexed job
_WEEK = 7 * 24 * 3600 * 1000  # milliseconds that the slowest process is waited for
_meetings = itertools.count()  # each of its own name; all processes come to the same ones
_HEARTBEAT = 30  # seconds of silence after which a process counts as dead and the others end


def start(address: str | None, count: int | None, index: int | None) -> bool:
    """Joins the other processes, if there are any to join; tells whether there are.

    Args:
        address: host:port of the first process.
        count: processes in all.
        index: of this process. All three are given, or none of them: then a cluster that JAX knows
            (Cloud TPU, GKE, SLURM, Open MPI) tells, and a lone process starts nothing.

    Raises:
        UserError: some of the three are missing, or the others cannot be reached.
    """
    given = [value is not None for value in (address, count, index)]
    if any(given) and not all(given):
        raise UserError(
            "--coordinator_address, --num_processes and --process_id belong together: give all "
            "three, or none where the cluster tells."
        )
    if not any(given):
        if not cluster_has_other_processes(os.environ, _on_tpu_vm()):
            return False
        _check_kubernetes(os.environ)
    options = {"heartbeat_timeout_seconds": _HEARTBEAT}
    if address is not None and address.rpartition(":")[0] in ("localhost", "127.0.0.1", "[::1]"):
        options["coordinator_bind_address"] = address  # of no concern to other machines
    try:
        jax.distributed.initialize(address, count, index, **options)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of the run did not find each other ({str(error).splitlines()[0]}); "
            "check --coordinator_address, --num_processes and --process_id."
        ) from None
    return True


def meet() -> None:
    """Returns when every process has called it as often; uses no device, whatever time it takes."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        wait = multihost.get_barrier_sync_fn()
        wait(key=f"detclipv2_jax {next(_meetings)}", timeout_ms=_WEEK)


def run_on_first_process(make: Callable[[], Any], path: str | os.PathLike) -> Any:
    """What `make` gives in the first process, in all of them; it travels as JSON in a file.

    All processes call it, and see the directory of `path`; the file is gone afterwards.

    Raises:
        UserError: if `make` does so; in all of them.
    """
    if jax.process_count() == 1:
        return make()
    path = pathlib.Path(path)
    if jax.process_index() == 0:
        try:
            told = {"value": make()}
        except UserError as error:
            told = {"error": str(error)}
        write_json(path, told)
    meet()
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: process {jax.process_index()} does not see what process 0 wrote there; all "
            "processes need the same directory."
        ) from None
    meet()
    if jax.process_index() == 0:
        path.unlink()
    if "error" in told:
        raise UserError(told["error"])
    return told["value"]


def cluster_has_other_processes(environment: Mapping[str, str], on_tpu_vm: bool = False) -> bool:
    """Does the environment, or the machine, say that this process is one of several?

    The variables are those that JAX's own detection reads: a SLURM step of several tasks, Open MPI,
    an indexed job on Kubernetes, a slice of several TPU hosts, or JAX's own. On a TPU VM whose
    environment names no hosts JAX asks the metadata server, which knows a slice of one host, too.
    """
    several = lambda name: (
        environment.get(name, "1").isdigit() and int(environment.get(name, "1")) > 1
    )
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    asks_machine = on_tpu_vm and hosts is None and "TPU_SKIP_MDS_QUERY" not in environment
    return (
        "JAX_COORDINATOR_ADDRESS" in environment
        or ("SLURM_PROCID" in environment and several("SLURM_NTASKS"))
        or several("OMPI_COMM_WORLD_SIZE")
        or environment.keys() >= _KUBERNETES
        or "," in (hosts or "")
        or asks_machine
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    )


def _on_tpu_vm() -> bool:
    """JAX has no public name for it. Without its own one only the environment is asked."""
    try:
        from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
    except ImportError:
        return False
    return running_in_cloud_tpu_vm


def _check_kubernetes(environment: Mapping[str, str]) -> None:
    """JAX asks Kubernetes through its client, unless the environment already says all."""
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    asked = environment.keys() >= _KUBERNETES and hosts is None
    if asked and importlib.util.find_spec("kubernetes") is None:
        raise UserError(
            "the other processes of a Kubernetes job are found by the package kubernetes, which is "
            'not there: pip install "jax[k8s]", or give --coordinator_address, --num_processes and '
            "--process_id."
        )
