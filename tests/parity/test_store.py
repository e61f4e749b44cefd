"""Rounds with users in files give the same tables and client states, bit for bit, as rounds with users in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tests.parity import federation
from tests.parity.federation import LAYOUT, N_ITEMS, PROTECTED, UNEQUAL, Twins, population, settings
from tests.parity.grid import MemoryGrid
from tests.parity.test_rounds import SPECTRAL, SUMS

from perfedrec.data import Encoding
from perfedrec.runtimes.flower.client_app import client_app
from perfedrec.runtimes.node import Store

SECRET = bytes(range(32))


def stored(path: Path, users: torch.Tensor, attributes: bool = False) -> Store:
    """A store with the ``users`` [h] of the small population; the external id of user 7 is "u7"."""
    whole = population(attributes)
    rows, _ = whole.rows(users)
    owners = users[rows.segments].tolist()
    frame = pl.DataFrame({"user": [f"u{each}" for each in owners], "item": rows.items.numpy()})
    given, encoding = None, None
    if rows.attributes is not None:
        given = {f"u{each}": row.tolist() for each, row in zip(users.tolist(), rows.attributes, strict=True)}
        encoding = Encoding(("a", "b", "c"), ((0.0, 1.0),) * 3)
    store = Store.create(path, np.arange(N_ITEMS), SECRET, encoding)
    identities = {f"u{each}": each for each in owners}
    store.import_interactions(frame.sample(fraction=1.0, shuffle=True, seed=1), identities=identities, attributes=given)
    return store


def twins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attributes: bool = False, **parts: Any) -> Twins:
    """The simulator beside nodes whose users are in files."""
    stores = {}
    for number, users in enumerate(Twins(settings(), UNEQUAL).hosts.values()):
        stores[100 + number] = stored(tmp_path / f"{number}.node", users, attributes)
    algorithm = Twins(settings(**parts), UNEQUAL, attributes=attributes).algorithm
    (seed,) = {each.join_run(algorithm, "a run") for each in stores.values()}
    monkeypatch.setattr(federation, "SEED", seed)
    found = Twins(settings(**parts), UNEQUAL, attributes=attributes)
    found.nodes = stores  # type: ignore[assignment]
    found.grid = MemoryGrid({node: client_app(found.algorithm, each, LAYOUT, seed) for node, each in stores.items()})
    for node, users in found.hosts.items():
        assert torch.equal(stores[node].everyone(), users)
        assert torch.equal(stores[node].offsets, stores[node].rows(users)[0].offsets)
    return found


@pytest.mark.parametrize(
    "parts",
    [
        {"privacy": PROTECTED | {"sticky": True}, "personal": {"learned": True}},
        SPECTRAL | {"privacy": PROTECTED},
        {"pretraining": SUMS, "privacy": {"aggregation": "secure", "norm": "l2", "clip": 0.5}},
    ],
    ids=["protected, learned mix", "spectral", "sums"],
)
def test_nodes_with_files_compute_what_the_simulator_computes(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = twins(tmp_path, monkeypatch, **parts)
    for _ in range(8):
        both.simulate()
        both.play()
        assert both.difference() == 0.0
    for node in both.nodes.values():  # and after the files are opened again
        node.close()
    both.nodes = {node: Store.open(tmp_path / f"{node - 100}.node") for node in both.nodes}  # type: ignore[misc]
    for node in both.nodes.values():
        node.join_run(both.algorithm, "a run")
    assert both.difference() == 0.0
    assert float(both.flower.items.abs().max()) > 0
    assert any(
        float(node.load_client_states(node.everyone(), None).participations.max()) > 1 for node in both.nodes.values()
    )


def test_item_attributes_are_used_and_user_attributes_are_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = twins(tmp_path, monkeypatch, attributes=True, model={"attributes": True})
    for _ in range(4):
        both.simulate()
        item = both.flower.items[3].numpy().tobytes()
        both.play()
        assert both.difference() < 1e-5
    assert both.flower.dense is not None
    sent = b"".join(each for message in both.grid.sent for each in message.objects.values())
    assert item in sent
    for row in both.population.attributes.numpy():  # no user's attributes leave the node
        assert row.tobytes() not in sent
