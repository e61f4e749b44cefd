"""The ranking metrics equal those of ir-measures (trec_eval), on random rankings and on a real one."""

from collections.abc import Callable
from pathlib import Path

import ir_measures
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import RR, P, R, Success, nDCG

from perfedrec import configure, load, train
from perfedrec.evaluation import Held, Totals

KS = (10, 20)
NAMES = {"recall": R, "ndcg": nDCG, "hr": Success, "mrr": RR, "precision": P}
MEASURES = {f"{name}@{k}": measure @ k for name, measure in NAMES.items() for k in KS}


def by_library(lists: list[list[int]], wanted: list[set[int]]) -> dict[str, list[float]]:
    """Each metric by user, for users with held-out items, in the order of users."""
    tested = [user for user, own in enumerate(wanted) if own]
    judged = [ir_measures.Qrel(str(user), str(item), 1) for user in tested for item in wanted[user]]
    ranked = [
        ir_measures.ScoredDoc(str(user), str(item), float(len(lists[user]) - place))
        for user in tested
        for place, item in enumerate(lists[user])
    ]
    found: dict[str, dict[str, float]] = {str(measure): {} for measure in MEASURES.values()}
    for each in ir_measures.iter_calc(list(MEASURES.values()), judged, ranked):
        found[str(each.measure)][each.query_id] = each.value
    return {name: [found[str(measure)][str(user)] for user in tested] for name, measure in MEASURES.items()}


def by_us(lists: list[list[int]], wanted: list[set[int]], n_items: int) -> Totals:
    offsets = torch.tensor([0, *np.cumsum([len(own) for own in wanted])])
    held = Held(offsets, torch.tensor([item for own in wanted for item in sorted(own)], dtype=torch.int64))
    users, given_lists, totals = torch.arange(len(wanted)), torch.tensor(lists), Totals(KS, n_items)
    totals.add(held.hits(users, given_lists, n_items), held.counts(users), given_lists, users)
    return totals


@st.composite
def rankings(draw: st.DrawFn) -> tuple[list[list[int]], list[set[int]], int]:
    """Lists of at least 20 items, and sets of held-out items: none, one, some, or more than a list has."""
    n_items, n_users = draw(st.integers(20, 60)), draw(st.integers(1, 8))
    length = draw(st.integers(20, n_items))
    lists = [draw(st.permutations(range(n_items)))[:length] for _ in range(n_users)]
    held = st.sets(st.integers(0, n_items - 1), max_size=n_items)
    return lists, [draw(held) for _ in range(n_users)], n_items


@settings(max_examples=60)
@given(rankings())
def test_random_rankings(case: tuple[list[list[int]], list[set[int]], int]) -> None:
    lists, wanted, n_items = case
    if not any(wanted):
        return
    totals = by_us(lists, wanted, n_items)
    for name, values in by_library(lists, wanted).items():
        assert totals.by_user()[1][name].tolist() == pytest.approx(values, abs=1e-9), name
        assert totals.means()[name] == pytest.approx(np.mean(values), abs=1e-9), name


@pytest.mark.real_data
def test_a_real_ranking(real_data: Callable[[str], Path]) -> None:
    """The spectral filter on all users of Yelp: user by user and in the mean."""
    dataset, config = load(str(real_data("yelp"))), configure("spectral_filter")
    test = dataset.test
    wanted = [set(test.items[a:b].tolist()) for a, b in zip(test.offsets[:-1], test.offsets[1:], strict=True)]
    result = train(config.build(), dataset, config.run, config=config)
    hide = Held.of(dataset.valid.offsets, dataset.valid.items, result.recommender.device)
    lists: list[list[int]] = []
    for block in torch.arange(dataset.n_users).split(512):
        lists += result.recommender.scores(block, hide=hide).topk(20, dim=1).indices.tolist()
    ours, means = result.rank("test"), result.evaluate("test")
    for metric, values in by_library(lists, wanted).items():
        np.testing.assert_allclose(ours.by_user()[1][metric].numpy(), values, atol=1e-9, err_msg=metric)
        assert means[metric] == pytest.approx(np.mean(values), abs=1e-9)
