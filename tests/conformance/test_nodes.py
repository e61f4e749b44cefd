"""Every federated method on a node: for users who were in training, and for users who were not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from tests.conformance.test_methods import config, data

from perfedrec.federation.agreement import build, method_of
from perfedrec.federation.owner import Node
from perfedrec.methods.registry import METHODS, centralised
from perfedrec.runtimes.node import LocalRecommender, Store, serving_broadcast
from perfedrec.runtimes.simulator import Simulator

FEDERATED = [name for name in METHODS if not centralised(METHODS[name])]


@pytest.mark.parametrize("name", FEDERATED)
def test_a_node_serves_its_users_and_new_users(name: str, tmp_path: Path) -> None:
    chosen, dataset = config(name, 4), data()
    simulator = Simulator(chosen.build(), dataset, seed=0, device="cpu")
    for _ in range(simulator.n_phases + 4):
        simulator.play()
    users, text = torch.tensor([2, 30, 200]), method_of(chosen)
    names = dataset.train.user_ids[users.numpy()].tolist()
    with Store.create(tmp_path / "a.node", dataset.train.item_ids) as store:
        own = dataset.train.frame().filter(pl.col("user").is_in(names))
        store.import_interactions(own, identities=dict(zip(map(str, names), users.tolist(), strict=True)))
        store.join_run(simulator.algorithm, "run")
        _, positions = simulator.population.rows(users)
        store.save_client_states(users, positions, simulator.population.load_client_states(users, positions))
        store.receive(serving_broadcast(simulator.algorithm, simulator.state, users), users, "run", 4, text)
        expected = simulator.recommender().scores(users)
        scores, parts = LocalRecommender(store, build(text)).scores(users)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
        total = torch.stack(list(parts.values())).sum(0)
        torch.testing.assert_close(total[scores > -torch.inf], scores[scores > -torch.inf], rtol=1e-4, atol=1e-5)

        items = [str(each) for each in dataset.train.item_ids[:4]]
        store.add_interactions("new", items[0])
        store.add_interactions("other", items[1], items[2])
    with Node.open(tmp_path / "a.node") as node:
        before, other = ([row["score"] for row in node.recommend(user, 10)] for user in ("new", "other"))
        assert np.isfinite(before).all()
        personal = name != "ptf_fedrec"  # whose hidden model knows nothing of new users: they all get the same scores
        assert (before != other) == personal
        node.add("new", items[3])
        after = node.recommend("new", dataset.n_items)
        assert len(after) == dataset.n_items - 2
        assert ([row["score"] for row in after[:10]] != before) == personal
        assert not {str(row["item"]) for row in after} & {items[0], items[3]}
        if name != "ptf_fedrec":  # whose shared model has no vectors
            alike = node.similar(items[0], 5)
            assert [row["rank"] for row in alike] == [1, 2, 3, 4, 5]
            assert items[0] not in {str(row["item"]) for row in alike}
