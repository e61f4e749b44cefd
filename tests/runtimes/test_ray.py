"""Rounds on a real Ray cluster of three raylets on this machine."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.ports import reserved_port
from tests.runtimes.mortal import Mortal
from tests.runtimes.test_cluster import OPTIONS, assert_same, played, tensors

from perfedrec import configure, load, train
from perfedrec.core.errors import ConfigError
from perfedrec.data import Dataset
from perfedrec.runs.folder import RunFolder
from perfedrec.runtimes import cluster
from perfedrec.runtimes.cluster import Machines, patience
from perfedrec.runtimes.simulator import Simulator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


PORTS = ("metrics_agent_port", "runtime_env_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
"""Ports of a raylet's helpers. Where they are not given, it waits 15 seconds for each helper to choose one, and then
ends: too little on a busy machine."""


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """The cluster, to which this process is connected. Ray's sockets need a short path."""
    before = dict(os.environ)
    ray: Any = cluster.loaded()
    from ray.cluster_utils import Cluster

    # The address is written to Ray's default folder as well, which is there only where Ray has run before.
    Path(tempfile.gettempdir(), "ray").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as short, patience(ray):
        made = Cluster(shutdown_at_exit=True)
        try:
            for number in range(3):
                head = {"temp_dir": short, "include_dashboard": False} if number == 0 else {}
                ports = {name: reserved_port() for name in PORTS}
                made.add_node(wait=False, num_cpus=2, object_store_memory=80 << 20, **head, **ports)
            ray.init(address=made.address, log_to_driver=False, logging_level="error")
            yield made
        finally:
            ray.shutdown()
            made.shutdown()
            os.environ.clear()
            os.environ.update(before)


@pytest.fixture(scope="module")
def address(machines: Any) -> str:
    return str(machines.address)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load("synthetic:users=90,items=120,clusters=3,interactions_per_user=8")


def simulator(method: Any, data: Dataset, machines: Machines | None = None) -> Simulator[Any, Any, Any]:
    made: Simulator[Any, Any, Any] = Simulator(method, data, seed=3, device="cpu")
    if machines is not None:
        made.spread(machines)
    return made


def test_a_run_is_resumed_with_another_number_of_workers(address: str, data: Dataset, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    config = configure("recommended", overrides=[*OPTIONS, "run.rounds=4", "run.evaluate_every=2"])
    train(config, data, output=whole)
    spread = {"workers": 2, "cluster": address}
    train(config, data, output=broken, **spread | {"rounds": 2})
    train(config, data, output=broken, resume=True, **spread | {"workers": 1})
    for name in ("state", "memory"):
        file = f"model/{name}.safetensors"
        assert (whole / file).read_bytes() == (broken / file).read_bytes()
    assert RunFolder(whole).summary() == RunFolder(broken).summary()


def test_a_cluster_that_is_too_small_is_named(address: str, data: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"run\.workers with run\.threads need 90 processors, and .* has 6"):
        simulator(configure("fedmf").build(), data, Machines(45, address, threads=2))


@pytest.mark.parametrize("workers", [1, 4, 2])
def test_a_cluster_plays_the_rounds_of_one_process_also_where_workers_die(
    workers: int, machines: Any, data: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker dies in mid-round, two rounds after the states were copied. Of one worker it dies again before they are
    copied, and of two a machine is lost: nobody uses the cluster after that."""
    fuse = tmp_path / "fuse"
    method = Mortal(configure("fedmf", overrides=OPTIONS).settings, fuse)
    wanted = played(simulator(method, data), 5)
    made = simulator(method, data, Machines(workers, machines.address))
    try:
        reports = [made.play()]
        made.records()
        reports += [made.play(), made.play()]
        fuse.touch()
        reports.append(made.play())
        assert not fuse.exists()
        working = made.clients._workers  # type: ignore[attr-defined]
        before = list(working)
        if workers == 1:
            kill(working[0])
            made.records()
        if workers == 2:
            lose(machines, working)
        reports.append(made.play())
        assert_same((reports, tensors(made)), wanted)
        replaced = sum(each is not other for each, other in zip(before, working, strict=True))
        assert replaced == {1: 1, 2: 1, 4: 0}[workers]
        said = [each.getMessage() for each in caplog.records if "a worker has died" in each.getMessage()]
        assert len(said) >= 1 + replaced
        assert said[0].startswith("round 4: ")
    finally:
        made.close()


def kill(worker: Any) -> None:
    """End a worker, as a machine without memory does."""
    pid = cluster.loaded().get(worker.__ray_call__.remote(lambda self: os.getpid()))
    os.kill(pid, signal.SIGKILL)


def lose(machines: Any, workers: list[Any]) -> None:
    """End a raylet that has some of the ``workers``, and is not that of this process."""
    ray: Any = cluster.loaded()
    ask = [each.__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id()) for each in workers]
    where = set(ray.get(ask)) - {ray.get_runtime_context().get_node_id()}
    lost = next(each for each in machines.worker_nodes if each.node_id in where)
    machines.remove_node(lost)
