"""Several processes connect, train as one, and end together."""

import contextlib
import json
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest
import tiny_run

from detclipv2_jax.common import distributed
from detclipv2_jax.common.errors import UserError

DEVICES = 4  # of each process
_PATIENCE = 900  # seconds: sixteen programs compile on the same cores


@pytest.mark.parametrize(
    "environment",
    [
        {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
        {"TPU_WORKER_HOSTNAMES": "t1k-0,t1k-1"},
        {"TPU_PROCESS_ADDRESSES": "t1k-0:8476,t1k-1:8476"},
        {"MEGASCALE_COORDINATOR_ADDRESS": "job-0"},
    ],
)
def test_a_cluster_is_recognized(environment):
    assert distributed.cluster_has_other_processes(environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"},  # a shell of salloc, not a step
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
    ],
)
def test_a_single_process_connects_to_nothing(environment):
    assert not distributed.cluster_has_other_processes(environment)


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({}, True),  # the metadata server knows
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_SKIP_MDS_QUERY": "1"}, False),
    ],
)
def test_on_a_tpu_vm_jax_asks_the_metadata_server_if_the_environment_names_no_hosts(
    environment, joins
):
    assert distributed.cluster_has_other_processes(environment, on_tpu_vm=True) == joins


def test_a_jax_without_tpu_vm_detection_is_no_crash(monkeypatch):
    assert not distributed._on_tpu_vm()
    monkeypatch.setitem(sys.modules, "jax._src.cloud_tpu_init", None)
    assert not distributed._on_tpu_vm()


def test_kubernetes_without_its_client_is_a_user_error(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="jax.k8s.*, or give --coordinator_address"):
        distributed.start(None, None, None)


@pytest.mark.parametrize(
    "given", [("localhost:1", None, None), (None, 2, 0), ("localhost:1", 2, None)]
)
def test_some_of_the_flags_are_an_error(given):
    with pytest.raises(UserError, match="belong together"):
        distributed.start(*given)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("symbols") / "data"
    tiny_run.prepare(directory)
    return directory


@contextlib.contextmanager
def two_processes(data, workdir, **overrides):
    """Start a run of two processes with four devices each; two devices share a parameter copy."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count="
    command = tiny_run.command(data, workdir, **{"mesh.fsdp": 2}, **overrides)
    command += [f"--coordinator_address={address}", "--num_processes=2"]
    workdir.mkdir(exist_ok=True)
    started = []
    for i in range(2):
        with open(workdir / f"stdout{i}", "w") as out, open(workdir / f"stderr{i}", "w") as err:
            started.append(
                subprocess.Popen(
                    [*command, f"--process_id={i}"],
                    env=tiny_run.environment() | {"XLA_FLAGS": f"{flags}{DEVICES}"},
                    cwd=tiny_run.ROOT, stdout=out, stderr=err,
                )
            )  # fmt: skip
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["kind"], line["loss"]) for line in lines if "loss" in line]


def check_losses(workdir, expected):
    found = losses(workdir)
    assert [kind for kind, _ in found] == [kind for kind, _ in expected]
    for (_, a), (_, b) in zip(found, expected):
        assert a == pytest.approx(b, rel=2e-6)


def wait_for_steps(workdir, count, *started):
    log, deadline = workdir / "metrics.jsonl", time.monotonic() + _PATIENCE
    while not (log.exists() and log.read_text().count("\n") >= count):
        assert time.monotonic() < deadline and all(p.poll() is None for p in started)
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_processes_train_as_one_and_a_checkpoint_moves_between_them(data, tmp_path):
    """All three kinds; on two processes of four devices, then on one device."""
    assert tiny_run.run(data, tmp_path / "one").returncode == 0
    expected = losses(tmp_path / "one")
    assert len(expected) >= 20 and len({kind for kind, _ in expected}) == 3
    # One device resumes what two processes began.
    with two_processes(data, tmp_path / "two") as started:
        wait_for_steps(tmp_path / "two", 9, *started)
        for process in started:
            process.send_signal(signal.SIGTERM)
        for process in started:
            assert process.wait(60) == 128 + signal.SIGTERM
    assert tiny_run.run(data, tmp_path / "two").returncode == 0
    with two_processes(data, tmp_path / "all") as started:
        assert [process.wait(_PATIENCE) for process in started] == [0, 0]
        assert "fixed AP" in (tmp_path / "all/stdout0").read_text()
        # Only the first process prints; Gloo does in both.
        assert "compiled" not in (tmp_path / "all/stdout1").read_text()
        assert list((tmp_path / "all/detections/phrases").glob("*.png"))
    for workdir in ("two", "all"):
        check_losses(tmp_path / workdir, expected)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_eight_devices_train_as_one_and_a_checkpoint_moves_between_them(data, tmp_path):
    """All three kinds; on eight devices, then on one, and the other way round."""

    def start(workdir, devices, *, stop_after=None):
        flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count="
        layout = {} if devices == 1 else {"mesh.fsdp": 2}
        with open(tmp_path / "printed", "w") as out:
            process = subprocess.Popen(
                tiny_run.command(data, workdir, **layout),
                env=tiny_run.environment() | {"XLA_FLAGS": f"{flags}{devices}"},
                cwd=tiny_run.ROOT, stdout=out, stderr=out,
            )  # fmt: skip
            if stop_after is not None:
                wait_for_steps(workdir, stop_after, process)
                process.send_signal(signal.SIGTERM)
            status = process.wait(_PATIENCE)
        expected = 0 if stop_after is None else 128 + signal.SIGTERM
        assert status == expected, (tmp_path / "printed").read_text()[-3000:]

    start(tmp_path / "one", 1)
    expected = losses(tmp_path / "one")
    assert len(expected) >= 20 and len({kind for kind, _ in expected}) == 3
    start(tmp_path / "eight", 8)
    start(tmp_path / "eight_then_one", 8, stop_after=9)
    start(tmp_path / "eight_then_one", 1)
    start(tmp_path / "one_then_eight", 1, stop_after=9)
    start(tmp_path / "one_then_eight", 8)
    for workdir in ("eight", "eight_then_one", "one_then_eight"):
        check_losses(tmp_path / workdir, expected)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_process_that_dies_stops_the_other_within_a_minute(data, tmp_path):
    with two_processes(data, tmp_path, **{"train.epochs": 100.0}) as started:
        wait_for_steps(tmp_path, 6, *started)
        started[1].kill()
        began = time.monotonic()
        assert started[0].wait(60) != 0
        assert time.monotonic() - began < 60


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("which", [0, 1])
def test_a_process_that_cannot_save_reports_it_and_stops_the_other_within_a_minute(
    data, tmp_path, which
):
    with two_processes(data, tmp_path, **{"train.epochs": 100.0}) as started:
        wait_for_steps(tmp_path, 6, *started)
        resource.prlimit(started[which].pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
        assert started[which].wait(120) == 2  # at the next checkpoint, four steps later
        began = time.monotonic()
        assert started[1 - which].wait(60) != 0
        print(f"process {1 - which} ended {time.monotonic() - began:.1f} s after it")
        message = (tmp_path / f"stderr{which}").read_text().splitlines()[-1]
        assert "could not be written" in message and "last good checkpoint is that" in message
