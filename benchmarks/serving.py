"""How fast a node answers an app, and what it takes to make the lists of many users. One JSON line per figure.

    python benchmarks/serving.py --data FOLDER [--only load bulk index] [--rounds 15] [--seconds 20]

The nodes have users of a simulation of preset recommended after ``--rounds`` rounds, with their client states.

``load`` starts ``perfedrec node serve`` with 64 users, and asks it for lists of 20 items of all of them in turn, with
h2load (package nghttp2-client): 50 requests a second on one connection, evenly spaced; and 50 and 300 on five, which
send at the same moments, so that an answer waits for those before it. One interaction a second is added meanwhile. A
latency is the time from the moment when a request is sent to the last byte of its answer. ``processor_ms`` is the
processor time of the server for one request, and ``load`` the mean number of processes that want a processor. The same
at ``/health``, which does next to nothing, shows what the machine and its other work add.

``bulk``: users a second of ``perfedrec node lists`` for all users of the data and lists of 50 items, and of one list
after another.

``index`` puts the vectors of ``perfedrec node vectors`` into graphs of nearest neighbours (those of faiss and usearch
that are installed), and compares lists of 20 items with the node's own. ``recall`` is the share of the node's items
that are in them: by the products alone; with the scores in the column ``listed``; and where the index is asked for 100
items more, among which these scores can change the order. ``exact`` looks at all vectors.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from perfedrec import Node, configure, load
from perfedrec.federation.agreement import method_of
from perfedrec.federation.bulk import write_lists, write_vectors
from perfedrec.runtimes.node import Store, serving_broadcast
from perfedrec.runtimes.simulator import Simulator

HOSTED = 64
Search = Callable[[Any, int], Any]
"""The numbers of the best items for a vector, and how many are wanted."""

RATES = ((50, 1), (50, 5), (300, 5))
"""Requests a second, and connections. Those of several connections are sent at the same moments."""


def show(figure: str, value: float, **details: object) -> None:
    """Print one figure."""
    print(json.dumps({"figure": figure, "value": round(value, 4), **details}), flush=True)


def perfedrec(*words: object) -> list[str]:
    """A command line."""
    return [sys.executable, "-m", "perfedrec", *map(str, words)]


class Trained:
    """A simulation whose users nodes can be made of."""

    def __init__(self, data: str, rounds: int) -> None:
        self.config, self.dataset = configure("recommended"), load(data)
        self.algorithm: Any = self.config.build()
        self.simulator = Simulator(self.algorithm, self.dataset, seed=0, device="cpu")
        for _ in range(self.simulator.n_phases + rounds):
            self.simulator.play()

    def node(self, path: Path, users: Tensor) -> Path:
        """A node of some users, with their client states."""
        ids = self.dataset.train.user_ids[users.numpy()]
        frame = self.dataset.train.frame().filter(pl.col("user").is_in(pl.Series(ids).implode()))
        population = self.simulator.population
        with Store.create(path, self.dataset.train.item_ids) as store:
            store.import_interactions(frame, identities=dict(zip(map(str, ids), users.tolist(), strict=True)))
            store.join_run(self.algorithm, "simulated")
            _, positions = population.rows(users)
            store.save_client_states(users, positions, population.load_client_states(users, positions))
            broadcast = serving_broadcast(self.algorithm, self.simulator.state, users)
            done = self.simulator.state.round
            store.receive(broadcast, users, "simulated", done, method_of(self.config), self.algorithm.inference)
        return path


# --- load ---


@contextmanager
def served(path: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """The address and the token of a server."""
    file = folder / "token"
    command = perfedrec("node", "serve", "--store", path, "--port", 0, "--token-file", file)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split(" answers at ")[1].partition(";")[0]
        process.stdout.readline()
        try:
            yield address, file.read_text().strip()
        finally:
            process.terminate()


def asked(address: str, token: str, body: object = None) -> str:
    """The answer to a question."""
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    content = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(address, content, headers)) as answer:
        return str(answer.read().decode())


def processor_seconds(address: str, token: str) -> float:
    """The processor time that the server has used."""
    lines = asked(f"{address}/metrics", token).splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("process_cpu_seconds_total "))


def under_load(path: Path, folder: Path, seconds: int) -> None:
    """Latencies of lists at fixed rates, and of a question that costs nothing, which shows what the machine adds."""
    with Node.open(path) as node:
        users, items = node.users(), [str(row["item"]) for row in node.popular(1000)]
    with served(path, folder) as (address, token), writing(address, token, users, items):
        lists = [f"{address}/users/{user}/recommendations?k=20" for user in users]
        for each in lists:
            asked(each, token)
        for figure, addresses in (("health", [f"{address}/health"]), ("lists", lists)):
            for rate, connections in RATES:
                before, log = processor_seconds(address, token), folder / f"{figure}-{rate}-{connections}"
                latencies, bad = loaded(log, addresses, token, rate, connections, seconds)
                used = processor_seconds(address, token) - before
                details = {f"p{share}_ms": round(float(np.percentile(latencies, share)), 2) for share in (90, 99)}
                details |= {
                    "rate": rate,
                    "connections": connections,
                    "reached": round(len(latencies) / seconds, 1),
                    "errors": bad,
                }
                details |= {"processor_ms": round(1e3 * used / len(latencies), 2), "load": os.getloadavg()[0]}
                show(f"{figure}_p50_ms", float(np.median(latencies)), **details)


@contextmanager
def writing(address: str, token: str, users: Sequence[str], items: Sequence[str]) -> Iterator[None]:
    """Add an interaction each second until the end of the block."""
    ended = threading.Event()

    def write() -> None:
        number = 0
        while not ended.wait(1):
            number += 1
            user = users[number % len(users)]
            asked(f"{address}/users/{user}/interactions", token, {"items": [items[number % len(items)]]})

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        ended.set()
        writer.join()


def loaded(
    log: Path, addresses: Sequence[str], token: str, rate: int, connections: int, seconds: int
) -> tuple[list[float], int]:
    """The latencies in milliseconds of requests at a rate, and how many had no status 200."""
    wanted = log.with_suffix(".addresses")
    wanted.write_text("\n".join(addresses) + "\n")
    command = ["h2load", "--h1", "-t", "1", "-c", str(connections), "--rps", str(rate // connections)]
    command += ["-D", str(seconds), "-i", str(wanted), "--log-file", str(log)]
    subprocess.run([*command, "-H", f"Authorization: Bearer {token}"], check=True, stdout=subprocess.DEVNULL)
    rows = [line.split() for line in log.read_text().splitlines()]
    return [int(row[2]) / 1e3 for row in rows], sum(row[1] != "200" for row in rows)


# --- many users ---


def in_bulk(path: Path, folder: Path, alone: int = 200) -> None:
    """Users a second, in bulk and one after another."""
    with Node.open(path) as node:
        users = node.users()[:alone]
        with counted("alone", len(users)):
            for user in users:
                node.recommend(user, 50)
        everyone = len(node.users())
    with counted("bulk", everyone):
        write_lists(path, folder / "lists.parquet", 50)


@contextmanager
def counted(figure: str, users: int) -> Iterator[None]:
    """Show how many users the block serves in a second."""
    start, processor = time.perf_counter(), time.process_time()
    yield
    seconds, used = time.perf_counter() - start, time.process_time() - processor
    show(f"{figure}_users_a_second", users / seconds, users=users, processor_ms=round(1e3 * used / users, 3))


def in_an_index(path: Path, folder: Path, k: int = 20) -> None:
    """What an index of the vectors finds of the node's own lists."""
    write_lists(path, folder / "lists.parquet", k)
    done = write_vectors(path, folder / "vectors")
    lists = dict(pl.read_parquet(folder / "lists.parquet").group_by("user").agg("item").iter_rows())
    items, users = (pl.read_parquet(folder / "vectors" / f"{name}.parquet") for name in ("items", "users"))
    users = users.gather_every(FIFTH)
    show("dimensions", users["vector"].dtype.shape[0], groups=done.groups, users=done.users, listed=done.listed)
    for name, make in INDEXES.items():
        hits = dict.fromkeys(WAYS, 0)
        wanted, built, asked_for = 0, 0.0, 0.0
        try:
            for (group,), mine in users.group_by("group"):
                table = items.filter(pl.col("group") == group)
                vectors, names = np.ascontiguousarray(table["vector"].to_numpy()), table["item"].to_numpy()
                start = time.process_time()
                search = make(vectors)
                built += time.process_time() - start
                for row in mine.iter_rows(named=True):
                    vector = np.array(row["vector"], dtype=np.float32)
                    start = time.process_time()
                    found = names[search(vector, k + len(row["hidden"]) + DEEPER)]
                    asked_for += time.process_time() - start
                    for way, (deeper, merged) in WAYS.items():
                        some = found[: k + len(row["hidden"]) + deeper]
                        best = ranked(row, some, vectors, names, merged)[:k]
                        hits[way] += len(set(best) & set(lists[row["user"]]))
                    wanted += len(lists[row["user"]])
        except ImportError:
            continue
        cost = {"search_ms": round(1e3 * asked_for / users.height, 3), "build_seconds": round(built, 2)}
        for way, count in hits.items():
            show(f"recall_{name}", count / wanted, way=way, **cost)


FIFTH = 5
"""Every fifth user is looked at."""
DEEPER = 100
"""Items beyond the list that an index is asked for, among which the scores in ``listed`` can change the order."""
WAYS = {"products alone": (0, False), "with listed": (0, True), "with listed, deeper": (DEEPER, True)}


def ranked(row: dict[str, Any], found: Any, vectors: Any, names: Any, merged: bool) -> list[Any]:
    """The list of a user from items that an index has ``found``; ``merged`` with the user's list."""
    places = {name: place for place, name in enumerate(names.tolist())}
    added = {each["item"]: each["score"] for each in row["listed"]} if merged else {}
    hidden = set(row["hidden"])
    some = [each for each in {*found.tolist(), *added} if each not in hidden]
    scores = vectors[[places[each] for each in some]] @ np.array(row["vector"], dtype=np.float32)
    scores += np.array([added.get(each, 0) for each in some], dtype=np.float32)
    return [some[place] for place in np.argsort(-scores, kind="stable")]


def exact(vectors: Any) -> Search:
    """All items, compared with each other."""
    return lambda vector, k: np.argsort(-(vectors @ vector), kind="stable")[:k]


def faiss_graph(vectors: Any) -> Search:
    """A graph of faiss (HNSW) for inner products."""
    import faiss

    index = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = 200, 256
    index.add(vectors)
    return lambda vector, k: index.search(vector[None], min(k, len(vectors)))[1][0]


def usearch_graph(vectors: Any) -> Search:
    """A graph of usearch (HNSW) for inner products."""
    from usearch.index import Index

    index = Index(ndim=vectors.shape[1], metric="ip", connectivity=32, expansion_add=200, expansion_search=256)
    index.add(np.arange(len(vectors)), vectors, threads=1)
    return lambda vector, k: index.search(vector, min(k, len(vectors)), threads=1).keys.astype(np.int64)


INDEXES = {"exact": exact, "faiss": faiss_graph, "usearch": usearch_graph}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--only", nargs="+", choices=("load", "bulk", "index"), default=("load", "bulk", "index"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=int, default=20)
    given = parser.parse_args()
    trained = Trained(given.data, given.rounds)
    n_users = trained.dataset.n_users
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "load" in given.only:
            some = torch.arange(min(HOSTED, n_users)) * max(n_users // HOSTED, 1)
            under_load(trained.node(folder / "home.node", some), folder, given.seconds)
        if {"bulk", "index"} & set(given.only):
            silo = trained.node(folder / "shop.node", torch.arange(n_users))
        if "bulk" in given.only:
            in_bulk(silo, folder)
        if "index" in given.only:
            in_an_index(silo, folder)


if __name__ == "__main__":
    main()
