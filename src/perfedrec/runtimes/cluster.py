"""Rounds on several machines: workers of a Ray cluster do the clients' work, and hold the users and their states.

The users are cut into shards, one for each worker. In a round a worker computes the sum over the users of its shard,
stores their new states, and sums are added up a tree of workers. They are exact, so that the result is the one of a
single process, bit for bit.

This process has a copy of all client states, as they were after an earlier request, and a log of what the workers were
asked since. A new state follows from the old one and from what was asked. So a worker that dies is replaced by one that
gets the copy of its users' states and does again what is in the log, bit for bit. The copy is brought up to date where
all states are read (for a checkpoint, or a new best round), and where the log has become long.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from perfedrec.core.aggregate import Aggregate, Sum
from perfedrec.core.algorithm import Algorithm, B, C, S
from perfedrec.core.errors import ConfigError, PerfedrecError
from perfedrec.core.extras import needed_by
from perfedrec.core.records import Segment, copied, flatten
from perfedrec.core.version import __version__
from perfedrec.runtimes.hosted import Hosted
from perfedrec.runtimes.log import Log, Request
from perfedrec.runtimes.population import Population
from perfedrec.runtimes.remote import Remote, shards
from perfedrec.runtimes.round import RoundTask, Tally, together
from perfedrec.runtimes.worker import Arrays, Done, Work, Worker, arrays, owned, tensors, unpacked

LOG = logging.getLogger(__name__)

ATTEMPTS = 3
"""How many times a round is tried before the run ends because workers die."""

START_SECONDS = 600.0
"""How long the workers may take to start. A busy machine needs minutes to load the libraries several times."""

_PATIENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it warns of it
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": f"{START_SECONDS:.0f}",
    "RAY_agent_register_timeout_ms": f"{1e3 * START_SECONDS:.0f}",
    "RAY_gcs_rpc_server_connect_timeout_s": f"{START_SECONDS:.0f}",
    "RAY_gcs_rpc_server_reconnect_timeout_s": f"{START_SECONDS:.0f}",
    "RAY_gcs_server_request_timeout_seconds": f"{START_SECONDS:.0f}",
    "RAY_py_gcs_connect_timeout_s": f"{START_SECONDS:.0f}",
    "RAY_worker_register_timeout_seconds": f"{START_SECONDS:.0f}",
    "RAY_memory_monitor_refresh_ms": "0",  # else it ends workers where others fill the memory
    "RAY_worker_niceness": "0",  # workers do the work of the run, and rank as it does; else 15
}
"""Settings of a Ray that starts on a busy machine, as environment variables; those that are set already stay."""

NODE_SECONDS = 120.0
"""How long a Ray that this process starts may take to start its node."""

REACH_SECONDS = 10.0
"""How long the head of a cluster may take to accept a connection."""

PIECE = 2048
"""Of how many users of a shard the client states travel at once."""

T = TypeVar("T")


@dataclass(frozen=True)
class Machines:
    """Where the clients' work is done: by ``n_workers`` processes with some ``threads`` each, ``block_size`` clients at
    once, in the Ray cluster whose head listens on ``address`` (HOST:PORT); "" for a Ray of its own on this machine."""

    n_workers: int
    address: str = ""
    threads: int = 1
    block_size: int = 1024


class OnWorkers(Generic[S, B, C]):
    """Clients whose work is done by the workers of a cluster. It takes over the ``population`` before its first round.

    Raises :class:`ConfigError` where Ray is not installed, the cluster cannot be reached or is too small, and where
    there are fewer users than workers; :class:`PerfedrecError` where workers die again and again.
    """

    def __init__(
        self,
        algorithm: Algorithm[S, B, C],
        population: Population[C],
        seed: int,
        machines: Machines,
        nodes: Tensor | None = None,
    ) -> None:
        ray = loaded()
        self.ray, self.algorithm, self.seed, self.machines, self.nodes = ray, algorithm, seed, machines, nodes
        self.shards = shards(population, machines.n_workers, nodes)
        self._firsts = torch.tensor([int(each[0]) for each in self.shards])
        self.copy, self._fresh = population, True  # nothing was written to it
        self.population: Population[C] = Remote(population, self)
        self._log = Log(population.n_users)
        self._workers: list[Any] = [None] * machines.n_workers
        self._dead = set(range(machines.n_workers))
        own = sys.modules.get(type(algorithm).__module__)
        if own is not None and own.__name__.startswith("perfedrec_method_"):  # a file that other machines do not have
            ray.cloudpickle.register_pickle_by_value(own)
        self.started = connect(ray, machines)
        try:
            self._common = ray.put(algorithm), seed, machines.block_size, machines.threads
            self._nodes = None if nodes is None else ray.put(nodes.numpy())
            self._safely("the start", self._fill)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers, and Ray if it was started for them."""
        for each in self._workers:
            with suppress(Exception):  # it may be dead
                self.ray.kill(each)
        self._workers = []
        self._log.clear()  # Ray's store holds what is in it
        if self.started:
            self.ray.shutdown()

    # --- a round ---

    def parts(self, task: RoundTask[B], users: Tensor, tally: Tally) -> Iterator[Aggregate]:
        """See :class:`perfedrec.runtimes.round.Clients`."""
        if not users.numel():
            return
        if self._log.full:
            self.up_to_date()
        request = self._request(task, users)
        self._log.add(request)
        done, found = self._safely(f"round {task.number + 1}", partial(self._answers, request))
        for each in done:
            tally.add(each.up, each.up_max, each.down)
            tally.losses += [torch.from_numpy(losses) for losses in each.losses]
        parts = [unpacked(Aggregate, part) for parts in found for part in parts]
        if not self.algorithm.aggregator.separate:
            yield owned(Sum().combine(task.phase, parts, parts[0]), parts)
            return
        order = {user: place for place, user in enumerate(torch.cat(together(users, self.nodes)).tolist())}
        owners = [user for each in done for user in each.owners]
        for place in sorted(range(len(owners)), key=lambda place: order[owners[place]]):
            yield copied(parts[place])

    def _request(self, task: RoundTask[B], users: Tensor) -> Request:
        """What all workers are asked."""
        common, own = self._parted(task.broadcast(users))
        works, of, size = {}, self._shard_of(users), sum(each.nbytes for each in common[0].values())
        for shard in of.unique().tolist():
            places = (of == shard).nonzero().squeeze(1)
            mine = arrays({name: tensor[places] for name, tensor in own.items()})
            works[shard] = Work(
                self._log.number + 1,
                task.number,
                task.phase,
                task.key.value,
                task.asked,
                task.n_groups,
                task.n_rows,
                users[places].numpy(),
                mine,
            )
            size += works[shard].users.nbytes + sum(each.nbytes for each in mine.values())
        return Request(self._log.number + 1, works, self.ray.put(common), size)

    def _answers(self, request: Request) -> tuple[list[Done], list[list[Arrays]]]:
        """What the workers answer."""
        done, parts = [], []
        for shard, work in request.works.items():
            worker = self._workers[shard]
            counted, part = worker.play.options(num_returns=2).remote(work, request.common)
            done.append(counted)
            parts.append((worker, part))
        while len(parts) > 2 and not self.algorithm.aggregator.separate:  # the last two are added here
            pairs = [parts[place : place + 2] for place in range(0, len(parts), 2)]
            parts = [
                pair[0] if len(pair) == 1 else (pair[0][0], pair[0][0].add.remote(pair[0][1], pair[1][1]))
                for pair in pairs
            ]
        found = self.ray.get([*done, *(part for _, part in parts)])
        return found[: len(done)], found[len(done) :]

    def _parted(self, broadcast: B) -> tuple[Arrays, dict[str, Tensor]]:
        """A broadcast in two parts: what all users share, and the fields with one row per user."""
        per_user = {each.name for each in fields(cast(Any, broadcast)) if each.metadata.get("per") == "user"}
        found, scalars = flatten(broadcast)
        shared = arrays({name: tensor for name, tensor in found.items() if name not in per_user})
        return (shared, scalars), {name: tensor for name, tensor in found.items() if name in per_user}

    def _shard_of(self, users: Tensor) -> Tensor:
        """[B] the shard of each of ``users`` [B]."""
        return torch.searchsorted(self._firsts, users, right=True) - 1

    # --- client states ---

    def load(self, users: Tensor) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """See :class:`perfedrec.runtimes.remote.Holder`."""

        def asked() -> list[tuple[Tensor, dict[str, Tensor]]]:
            of = self._shard_of(users)
            places = {shard: (of == shard).nonzero().squeeze(1) for shard in of.unique().tolist()}
            calls = [self._workers[shard].load.remote(users[mine].numpy()) for shard, mine in places.items()]
            answers = self.ray.get(calls)
            return [(mine, tensors(each)) for mine, each in zip(places.values(), answers, strict=True)]

        return self._safely("reading client states", asked)

    def up_to_date(self) -> Population[C]:
        """See :class:`perfedrec.runtimes.remote.Holder`. The state of each user that has changed is sent once."""
        changed = [self._log.users(shard) for shard in range(len(self.shards))]
        for first in range(0, max(each.numel() for each in changed), PIECE):
            users = {shard: each[first : first + PIECE] for shard, each in enumerate(changed) if first < each.numel()}
            answers = self._safely("reading client states", partial(self._written, users))
            for asked, answer in zip(users.values(), answers, strict=True):
                self._fresh = False
                self.copy.write(tensors(answer))
                self._log.note_copied(asked)
        self._log.clear()
        return self.copy

    def _written(self, users: dict[int, Tensor]) -> list[dict[str, Any]]:
        """What was written of the client states of some ``users`` of shards."""
        calls = [self._workers[shard].written.remote(mine.numpy()) for shard, mine in users.items()]
        return list(self.ray.get(calls))

    def restore(self, stored: Mapping[str, Tensor] | tuple[Segment, ...]) -> None:
        """See :class:`perfedrec.runtimes.remote.Holder`."""
        self.copy.restore(stored)
        self._log.clear()
        self._fresh = False

        def sent() -> None:
            for place, worker in enumerate(self._workers):
                self.ray.get([worker.reset.remote(), *self._copied(place)])

        self._safely("restoring client states", sent)

    def let_go(self) -> None:
        """See :class:`perfedrec.runtimes.remote.Holder`."""
        self.copy.let_go()
        self._log.clear()

    def _copied(self, shard: int) -> list[Any]:
        """Calls that give a worker with the first states of its shard the copied ones."""
        users = () if self._fresh else self.shards[shard].split(PIECE)
        return [self._workers[shard].write.remote(arrays(self.copy.written(mine))) for mine in users]

    # --- workers ---

    def _safely(self, what: str, work: Callable[[], T]) -> T:
        """Do some ``work`` with the workers, and again where one of them has died."""
        ray, attempt = self.ray, 0
        while True:
            try:
                if attempt:
                    self._replace()
                return work()
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, PerfedrecError):
                    raise error.cause from None
                if not isinstance(error.cause, ray.exceptions.RayError):  # else it needed the result of a dead worker
                    raise
                reason = _line(error.cause)
            except ray.exceptions.RayError as error:
                reason = _line(error)
            attempt += 1
            if attempt == ATTEMPTS:
                raise PerfedrecError(
                    f"{what}: a worker has died {ATTEMPTS} times ({reason}); expected workers that stay alive (is "
                    "there enough memory on their machines?)"
                )
            LOG.warning("%s: a worker has died (%s); another takes its place and does its work again", what, reason)

    def _replace(self) -> None:
        """Put new workers in place of those that died."""
        for place, worker in enumerate(self._workers):
            try:
                self.ray.get(worker.version.remote())  # after all that it was asked before
            except self.ray.exceptions.RayError:
                self._dead.add(place)
        self._fill()

    def _fill(self) -> None:
        """Start a worker for each place whose worker is dead, and bring it to where the dead one was."""
        ray, new, hosted = self.ray, sorted(self._dead), []
        for place in new:
            if self._workers[place] is not None:
                with suppress(Exception):
                    ray.kill(self._workers[place])
            options = {"num_cpus": self.machines.threads, "scheduling_strategy": "SPREAD"}
            self._workers[place] = ray.remote(Worker).options(**options).remote(*self._common, self._nodes)
        for place in new:
            here: Hosted[C] = Hosted.part(self.copy, self.shards[place])
            parts = {name: getattr(here, name) for name in ("users", "offsets", "items", "attributes")}
            data = arrays({name: each for name, each in parts.items() if each is not None})
            hosted.append(self._workers[place].host.remote(here.n_items, data))
        try:
            versions = ray.get([self._workers[place].version.remote() for place in new], timeout=START_SECONDS)
        except ray.exceptions.GetTimeoutError:
            raise PerfedrecError(
                f"workers did not start within {START_SECONDS:g} s; expected {len(self.shards)} free processors in the "
                f"Ray cluster (run.workers)"
            ) from None
        if found := set(versions) - {__version__}:
            raise ConfigError(f"workers have perfedrec {', '.join(sorted(found))}; expected {__version__}")
        ray.get(hosted)
        calls = []
        for place in new:
            calls += self._copied(place)
            calls += [self._workers[place].replay.remote(*asked) for asked in self._log.of(place)]
        ray.get(calls)
        self._dead.clear()


def loaded() -> Any:
    """Ray, with settings for a busy machine. Raises :class:`MissingExtraError` where it is not installed."""
    for name, value in _PATIENT.items():  # it reads them when it is imported
        os.environ.setdefault(name, value)
    with needed_by("run.workers"):
        import ray
    return ray


def connect(ray: Any, machines: Machines) -> bool:
    """Connect this process to a Ray cluster, and return whether it was not connected before. Raises
    :class:`ConfigError`."""
    wanted, address = machines.n_workers * machines.threads, machines.address
    quiet = {"log_to_driver": False, "logging_level": "error"}
    new = not ray.is_initialized()
    if new and address:
        _check_reachable(address)
        try:
            ray.init(address=address, **quiet)
        except Exception as error:  # of several kinds
            raise ConfigError(f"run.cluster {address}: {_line(error)}; expected the head of a Ray cluster") from None
    elif new:
        _start(ray, wanted, quiet)
    there = int(ray.cluster_resources().get("CPU", 0))
    if there < wanted:
        if new:
            ray.shutdown()
        raise ConfigError(
            f"run.workers with run.threads need {wanted} processors, and the Ray cluster {address} has {there}; "
            "expected fewer workers"
        )
    return new


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"run.cluster {address}: cannot be reached ({error.strerror or error}); expected HOST:PORT of the head of "
            "a Ray cluster, as `ray start --head` prints it"
        ) from None


def _start(ray: Any, processors: int, quiet: Mapping[str, Any]) -> None:
    """Start Ray on this machine."""
    try:
        with patience(ray):
            ray.init(address="local", num_cpus=processors, include_dashboard=False, **quiet)
    except Exception as error:  # of several kinds
        raise ConfigError(
            f"run.workers: Ray does not start on this machine ({_line(error)}); expected less load, or run.cluster "
            "with the address of a cluster"
        ) from None


@contextmanager
def patience(ray: Any) -> Iterator[None]:
    """Give a Ray node that starts in the block :data:`NODE_SECONDS`. A busy machine needs more than the 30 seconds
    after which it gives up, and which no setting changes. It asks for the new node until then. Here the first question
    waits for the answer."""
    services = ray._private.services
    ask = services.get_node

    def wait(*given: Any) -> Any:
        end = time.monotonic() + NODE_SECONDS
        while True:
            try:
                return ask(*given)
            except (RuntimeError, ray.exceptions.RaySystemError):
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    services.get_node = wait
    try:
        yield
    finally:
        services.get_node = ask


def _line(error: BaseException) -> str:
    """The first line of an error's message that says something."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in str(error).splitlines()]
    return next(filter(None, lines), type(error).__name__).rstrip(".")
