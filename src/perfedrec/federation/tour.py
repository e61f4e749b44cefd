"""A small federation to look at: four homes on this machine, with invented people and things.

The folder of a tour has what people would have themselves: ``data/ratings.csv``, and ``data/items.csv`` with titles and
covers; and what :mod:`perfedrec.federation.local` makes of it.
"""

from __future__ import annotations

import csv
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from perfedrec.core.errors import ConfigError
from perfedrec.data import read_catalogue, synthetic
from perfedrec.data.details import read_details
from perfedrec.federation import invented, local
from perfedrec.federation.agreement import evaluation_of, with_real_noise
from perfedrec.federation.coordinator import Deployment, Terms, serve
from perfedrec.federation.owner import Node
from perfedrec.runs.config import Config, open_data, resolve
from perfedrec.runs.files import CONFIG, RESULT
from perfedrec.runs.progress import Reporter
from perfedrec.runs.summary import Summary

PEOPLE = ("Ada", "Bruno", "Chiara", "Dominik")
"""The people of the home that is shown."""

HOMES = (len(PEOPLE), 84, 84, 84)
"""People in each home: a family, and three apartment houses. A secure sum needs 32 people at least."""

ITEMS, ROUNDS = 240, 12

OPTIONS = ("clusters.start=3", "clusters.every=3", "clusters.stop=12", "model.embedding_dim=32")
RATINGS, DETAILS, COVERS = "ratings.csv", "items.csv", "covers"

Tell = Callable[[str], None]


def home(folder: Path) -> Path:
    """The node's file of the home that is shown."""
    return folder / "nodes" / "n0" / "store.db"


def is_trained(folder: Path) -> bool:
    """Whether the federation in a folder has been trained to the end."""
    return (folder / "run" / RESULT).exists() and home(folder).exists()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let no other process of this machine prepare or train the tour in a folder meanwhile. Raises
    :class:`perfedrec.ConfigError` where one does."""
    place = folder.absolute()
    lock = place.with_name(f".{place.name}.lock")  # the folder itself is complete or absent
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(descriptor), lock.stat())  # the one before removes its file at its end
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise ConfigError(
                f"another process is making or playing the tour in {folder}; expected another --output, or the end of "
                "that one"
            )
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def prepare(folder: Path) -> None:
    """Make the folder of a tour, which is either complete or absent. Raises :class:`perfedrec.ConfigError` where
    something else is there."""
    local.check_free(folder)
    work = folder.with_name(f".{folder.name}.{os.getpid()}")
    made = work / "tour"
    try:
        _write_data(work / "data")
        given = configuration(work)
        held_out = evaluation_of(given).rule is not None
        local.lay_out(made, open_data(given.data), HOMES, held_out=held_out)
        details = read_details(work / "data" / DETAILS)
        for number in range(len(HOMES)):
            with Node.open(made / "nodes" / f"n{number}" / "store.db") as node:
                node.describe(details)
                node.set_rules(require="secure")
        (work / "data").replace(made / "data")
        made.replace(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def configuration(folder: Path) -> Config:
    """The configuration of the run: profile secure, as a federation of real nodes has it."""
    path = str(folder / "data" / RATINGS)
    return with_real_noise(resolve(None, None, OPTIONS, privacy="secure", run__rounds=ROUNDS, data__path=path))


def _write_data(folder: Path) -> None:
    """Interactions of people, and titles, genres, years and covers of things. They are the same each time."""
    people = [
        *PEOPLE,
        *(f"house {house}, flat {flat}" for house in range(1, len(HOMES)) for flat in range(HOMES[house])),
    ]
    drawn, truth = synthetic(len(people), ITEMS, len(invented.GENRES), 14, seed=7, strength=0.85)
    genres = truth.item_clusters.tolist()
    (folder / COVERS).mkdir(parents=True)
    with open(folder / RATINGS, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["user", "item"])
        for number, user in enumerate(people):
            own = drawn.items[drawn.offsets[number] : drawn.offsets[number + 1]]
            rows.writerows([user, f"i{item}"] for item in own)
    with open(folder / DETAILS, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["item", "title", "genre", "year", "picture"])
        for item, (title, genre) in enumerate(zip(invented.titles(genres), genres, strict=True)):
            picture = f"{COVERS}/i{item}.png"
            (folder / picture).write_bytes(invented.cover(item, genre))
            rows.writerow([f"i{item}", title, invented.GENRES[genre], invented.year(item), picture])


def train(folder: Path, reporter: Reporter, tell: Tell) -> Summary:
    """Train the federation of a tour, with a process for each home, over TLS. An interrupted run is continued."""
    run, port = folder / "run", local.free_port()
    resume = (run / CONFIG).exists()
    catalogue, places = read_catalogue(folder / local.CATALOGUE), (folder / "certificates", folder / "keys")
    terms = Terms(port=port, min_nodes=len(HOMES))
    deployment = Deployment(configuration(folder), catalogue, run, *places, terms, resume)
    return serve(deployment, reporter, tell, beside=local.nodes(folder, port, tell=tell))
