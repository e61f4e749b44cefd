"""A whole federation on one machine, for trying it out: certificates, keys, bundles, a file for each node, and all
processes."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from perfedrec.core.address import Address
from perfedrec.core.counted import counted
from perfedrec.core.errors import ConfigError
from perfedrec.data import Catalogue, Dataset
from perfedrec.data.interactions import Interactions, id_series
from perfedrec.evaluation.holdout import TEST, TRAIN, VALID
from perfedrec.federation.bundles import SERVICE, deal
from perfedrec.federation.certificates import CA, make_certificates, make_key
from perfedrec.runs.files import CONFIG
from perfedrec.runtimes.node import Store

CATALOGUE, LOG = "items.txt", "log.txt"

GOODBYE = 15.0
"""Seconds that all processes together have to end before they are killed."""


def lay_out(
    folder: Path,
    dataset: Dataset,
    nodes: int | Sequence[int],
    users: int | None = None,
    secret: bytes | None = None,
    attributes: bool = False,
    held_out: bool = False,
) -> None:
    """Make the folder of a federation: ``certificates``, ``keys``, the catalogue, ``nodes/n0/store.db`` and so on with
    a bundle beside each, and the ``service`` with its keys. The folder is either complete or absent.

    The training items of the first ``users`` users of a data set (default: all) are dealt out to the nodes, each user
    to one node, as :func:`parted` says, with their ``attributes`` or without; with ``held_out`` the other parts of the
    split as well. With a ``secret`` that all nodes share their random draws are those of a simulation, for tests.
    """
    parts, catalogue = parted(dataset.train, nodes, users), Catalogue.of(dataset, attributes)
    check_free(folder)
    made = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        make_certificates(made / "certificates")
        catalogue.write(made / CATALOGUE)
        names = [f"n{number}" for number in range(len(parts))]
        for name in (SERVICE, *names):
            make_key(made / "keys" / name)
        deal(made / "nodes", names, made / SERVICE)
        deal_out(made / "nodes", dataset, catalogue, parts, secret, held_out)
        made.replace(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def check_free(folder: Path) -> None:
    """Raise :class:`ConfigError` unless the ``folder`` of a federation is new or empty."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; expected a new folder")
    if folder.exists() and any(folder.iterdir()):
        hint = " (or --resume to continue the federation in it)" if (folder / "run" / CONFIG).exists() else ""
        raise ConfigError(f"{folder} is not empty; expected a new folder{hint}")


def parted(train: Interactions, nodes: int | Sequence[int], users: int | None = None) -> list[NDArray[np.int64]]:
    """The first ``users`` users (default: all), divided into one part for each of ``nodes`` nodes; or into parts of the
    sizes ``nodes``, whatever ``users`` says."""
    if not isinstance(nodes, int):
        if not nodes or min(nodes) < 1 or sum(nodes) > train.n_users:
            raise ConfigError(f"nodes of {list(nodes)} users; expected 1 or more each, and {train.n_users} at most")
        return np.split(np.arange(sum(nodes)), np.cumsum(nodes)[:-1])
    count = train.n_users if users is None else users
    if not nodes <= count <= train.n_users:
        raise ConfigError(
            f"{counted(count, 'user')} for {counted(nodes, 'node')}; expected between {nodes} and {train.n_users}"
        )
    return np.array_split(np.arange(count), nodes)


def deal_out(
    folder: Path,
    dataset: Dataset,
    catalogue: Catalogue,
    parts: list[NDArray[np.int64]],
    secret: bytes | None = None,
    held_out: bool = False,
) -> None:
    """Make the stores ``n0/store.db`` and so on, one for each of the ``parts``, which are consecutive users.

    With ``held_out`` users get their validation and test items as well, marked as such. The users' attributes are
    stored where the ``catalogue`` has an encoding of them.
    """
    train, known = dataset.train, dataset.user_attributes if catalogue.encoding is not None else None
    names = id_series(train.user_ids).cast(pl.String).to_list()
    for number, part in enumerate(parts):
        place = folder / f"n{number}"
        place.mkdir(parents=True, exist_ok=True)
        given = {TRAIN: train, **({VALID: dataset.valid, TEST: dataset.test} if held_out else {})}
        frame = pl.concat([_rows_of(each, part, names, mark) for mark, each in given.items()])
        attributes = None if known is None else {names[each]: known.values[each].tolist() for each in part}
        with Store.create(place / "store.db", train.item_ids, secret, catalogue.encoding) as store:
            identities = {names[each]: int(each) for each in part}
            store.import_interactions(frame, identities=identities, attributes=attributes)


def _rows_of(given: Interactions, users: NDArray[np.int64], names: list[str], part: int) -> pl.DataFrame:
    """The interactions of consecutive ``users``, who have these ``names``, all of them of one ``part``."""
    rows = slice(int(given.offsets[users[0]]), int(given.offsets[users[-1] + 1]))
    owners = np.repeat(users, np.diff(given.offsets)[users])
    items = id_series(given.item_ids)[given.items[rows]]
    return pl.DataFrame({"user": [names[each] for each in owners], "item": items}).with_columns(part=pl.lit(part))


@contextmanager
def nodes(
    folder: Path,
    port: int,
    service: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    host: str = "127.0.0.1",
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run the processes of all nodes in a folder, and of the neighbourhood ``service``, until the end of the block.

    They work for the coordinator at ``host`` and ``port``. ``tell`` receives a line about each process that ends
    before the block does.
    """
    found, over = list[subprocess.Popen[bytes]](), threading.Event()

    def start(place: Path, *own: str) -> None:
        process = _child(folder, place, Address(host, port), *own)
        found.append(process)
        threading.Thread(target=watch, args=(place, process), daemon=True).start()

    def watch(place: Path, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if not over.is_set():
            tell(f"{place.name} has ended with code {code}; expected it to run to the end, see {place / LOG}")

    try:
        if service:
            start(folder / SERVICE, "service", "run", "--state", str(folder / SERVICE))
        for place in sorted((folder / "nodes").iterdir()):
            # The person who starts all nodes has chosen the profile for them too.
            start(place, "node", "run", "--store", str(place / "store.db"), "--require", "none")
        yield found
    finally:
        over.set()
        _end(found)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ask all processes to end, and kill those that take too long."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + GOODBYE
    for process in processes:
        try:
            process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _child(folder: Path, place: Path, coordinator: Address, *own: str) -> subprocess.Popen[bytes]:
    """A process of a perfedrec command with its ``own`` options, for the files in ``place`` and the key of that name.

    It ends when this process ends, however that happens.
    """
    command = [sys.executable, "-m", "perfedrec", *own, "--until-stdin-closes", "--coordinator", str(coordinator)]
    command += ["--ca", str(folder / "certificates" / CA), "--key", str(folder / "keys" / place.name)]
    with open(place / LOG, "ab") as file:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=file, stderr=file, start_new_session=True, env=environment()
        )


def environment() -> Mapping[str, str]:
    """The environment of a child process: Flower sends no telemetry, and numerical libraries use one thread."""
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
    return os.environ | quiet


def free_port() -> int:
    """A port of this machine that is free now, and that the kernel gives to no outgoing connection.

    Otherwise the attempts of nodes to reach a port where nothing listens yet could take this port themselves.
    """
    try:
        outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0])
    except OSError:
        outgoing = 32768
    for port in (10_000 + secrets.randbelow(max(outgoing - 10_000, 1)) for _ in range(100)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ConfigError(f"no port of 127.0.0.1 from 10000 to {outgoing - 1} is free; expected one for the coordinator")
