"""Attributes of users and items over nodes: from files to the tables of the simulator."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.parity.grid import MemoryGrid

from perfedrec.core.errors import DataError
from perfedrec.core.records import flatten
from perfedrec.data import Catalogue, Dataset, load, read, read_catalogue
from perfedrec.federation import local
from perfedrec.federation.agreement import build, method_of
from perfedrec.federation.offline import import_file
from perfedrec.runs import config
from perfedrec.runs.engine import engine
from perfedrec.runtimes.flower import Coordinator, Federation, NodeApp, Setup
from perfedrec.runtimes.flower.node_loop import answer
from perfedrec.runtimes.node import Store, StoreError

SMALL = ["model.embedding_dim=8", "model.attributes=true", "model.neighbours=false", "clusters.n_clusters=0"]
SECRET = bytes(range(32))


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Ages and plans of users, one of whom has none; prices and kinds of items."""
    load("synthetic:users=23,items=40,interactions_per_user=7,clusters=2").train.frame().write_csv(tmp_path / "d.csv")
    users = "".join(f"{each},{18 + 3 * each},{'abc'[each % 3]}\n" for each in range(1, 23))
    (tmp_path / "user_attributes.csv").write_text(f"user,age,plan\n{users}")
    items = "".join(f"{each},{1.1 * each - 7},{'xy'[each % 2]}\n" for each in range(40))
    (tmp_path / "item_attributes.csv").write_text(f"item,price,kind\n{items}")
    return load(tmp_path / "d.csv")


@pytest.mark.parametrize("privacy", [None, "secure"])
def test_a_federation_with_attributes_computes_what_the_simulator_computes(
    dataset: Dataset, tmp_path: Path, privacy: str | None
) -> None:
    few = () if privacy is None else ("privacy.min_clients=2",)
    given = config.load("perfedrec", None, [*SMALL, "selection.n_clients_per_round=12", *few], privacy=privacy)
    algorithm, folder, known = given.build(), tmp_path / "federation", Catalogue.of(dataset, attributes=True)
    local.deal_out(folder, dataset, known, local.parted(dataset.train, 4), SECRET)
    known.write(folder / "items.txt")
    catalogue = read_catalogue(folder / "items.txt")
    assert catalogue.fingerprint == known.fingerprint != Catalogue.of(dataset).fingerprint
    assert catalogue.item_attributes is not None

    stores = {100 + place: Store.open(folder / f"n{place}" / "store.db") for place in range(4)}
    seed = next(iter(stores.values())).join_run(algorithm, "a run")
    apps = {node: NodeApp(each, build, "1").app() for node, each in stores.items()}
    grid = MemoryGrid({node: partial(answer, each) for node, each in apps.items()})  # type: ignore[misc]
    federation = Federation(
        algorithm,
        dataset.n_items,
        seed,
        Setup("a run", method_of(given), catalogue.fingerprint, "1"),
        deadline=0.0,
        item_attributes=torch.tensor(catalogue.item_attributes.values),
        n_user_attributes=catalogue.n_user_attributes,
    )
    coordinator = Coordinator(grid, federation)
    coordinator.assemble(4, dataset.n_users, 0.0, lambda line: None)
    state, simulated = coordinator.begin(), engine(algorithm, dataset, seed=seed, device="cpu")
    begun = state.dense.clone()
    for _ in range(simulated.n_phases + 3):
        state, report = coordinator.play(state)
        assert (coordinator.rejected, report.clients) == ([], simulated.play().clients)
    expected, found = flatten(simulated.records()["state"])[0], flatten(state)[0]
    for name, table in found.items():
        assert table.numel() == 0 or float((table.double() - expected[name].double()).abs().max()) < 1e-5, name
    assert float((state.dense - begun).abs().max()) > 1e-4

    for row in dataset.user_attributes.values[2:-1]:  # type: ignore[union-attr]  # ages between the first and the last
        assert not any(row.tobytes() in each for sent in grid.sent for each in sent.objects.values())


def test_a_node_of_other_attributes_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    catalogue = Catalogue.of(dataset, attributes=True)
    with Store.create(tmp_path / "a.node", catalogue.item_ids) as store:
        with pytest.raises(StoreError, match=r"items and 0 user attributes, .*federation one of \d+ and 4, "):
            store.check_catalogue(catalogue)
        store.check_catalogue(Catalogue.of(dataset))


def imported(folder: Path, catalogue: Catalogue, attributes: str | None) -> Any:
    """What a node stores of its users b, a and c after an import of two of them, with a file of ``attributes``."""
    folder.mkdir()
    first, second, third = catalogue.item_ids.tolist()[:3]
    (folder / "mine.csv").write_text(f"user,item\nb,{third}\na,{first}\na,{second}\n")
    if attributes is not None:
        (folder / "user_attributes.csv").write_text(attributes)
    with Store.create(folder / "a.node", catalogue.item_ids, encoding=catalogue.encoding) as store:
        store.add_interactions("c", str(third))
        counts = import_file(store, folder / "mine.csv", read(folder / "mine.csv"))
        store.register({"b": 1, "a": 2, "c": 3})
        return counts, store.rows(store.everyone())[0].attributes.numpy()


def test_a_node_encodes_attributes_as_the_federation_does(dataset: Dataset, tmp_path: Path) -> None:
    catalogue = Catalogue.of(dataset, attributes=True)
    assert catalogue.encoding is not None
    assert catalogue.encoding.names == ("age", "plan=a", "plan=b", "plan=c")
    assert catalogue.encoding.ranges[0] == (21.0, 84.0)
    counts, found = imported(tmp_path / "x", catalogue, "user,plan,age,shoe\nz,a,50,1\na,c,42,1\nb,,99,1\n")
    assert counts == (2, 3, 0, 2)
    assert np.allclose(found, [[1, 0, 0, 0], [21 / 63, 0, 0, 1], [0, 0, 0, 0]])  # 99 is above the range
    counts, found = imported(tmp_path / "y", catalogue, None)
    assert (counts[3], found.any()) == (0, False)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ("user,age\na,30\n", "no column for the attribute 'plan=a'"),
        ("user,age,plan\na,30,gold\n", "column 'plan' holds 'gold'; expected one of the categories .*a, b, c"),
        ("user,age,plan\na,old,a\n", "column 'age' holds values that are not finite numbers"),
    ],
)
def test_attributes_that_an_encoding_does_not_know_are_refused_with_the_interactions(
    dataset: Dataset, tmp_path: Path, attributes: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        imported(tmp_path / "x", Catalogue.of(dataset, attributes=True), attributes)
    with Store.open(tmp_path / "x" / "a.node") as store:
        assert store.status()["interactions"] == 1
