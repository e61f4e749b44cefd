"""SASRec, BERT4Rec and CL4SRec, user by user and place by place; and what only the order of items can tell."""

from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from perfedrec import Dataset, configure, load, train
from perfedrec.core.errors import DataError
from perfedrec.core.keys import Key
from perfedrec.core.types import block_rows
from perfedrec.methods.centralised.bert4rec import BERT4Rec, BERT4RecSettings
from perfedrec.methods.centralised.cl4srec import CL4SRec, CL4SRecSettings
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.centralised.sasrec import SASRec, SASRecSettings, negatives
from perfedrec.methods.centralised.sequences import Histories, Network, SequenceMethod
from perfedrec.nn.attention import Dropout

SEQUENCES = ([2, 0, 3], [1, 5, 2, 0, 4], [4], [3, 1])
N_ITEMS = 6
SMALL: dict[str, Any] = {"embedding_dim": 4, "n_heads": 2, "max_length": 4, "dropout": 0.0}
METHODS: dict[str, tuple[type[SequenceMethod], type[Any]]] = {
    "sasrec": (SASRec, SASRecSettings),
    "bert4rec": (BERT4Rec, BERT4RecSettings),
    "cl4srec": (CL4SRec, CL4SRecSettings),
}
USERS = torch.tensor([1, 0, 3, 2])


def training(sequences: tuple[list[int], ...] = SEQUENCES) -> Training:
    """The sequences as a method receives them: rows ascend, and the order is beside them."""
    offsets = torch.tensor([0, *map(len, sequences)]).cumsum(0)
    rows, _ = block_rows(
        offsets, torch.tensor([i for own in sequences for i in sorted(own)]), torch.arange(len(sequences))
    )
    order = torch.cat(
        [first + torch.tensor(own).argsort().argsort() for first, own in zip(offsets, sequences, strict=False)]
    )
    return Training(rows, N_ITEMS, order)


def random_weights(method: SequenceMethod) -> list[Tensor]:
    flat = method.network(N_ITEMS)[0]
    return flat.unpack(torch.randn(flat.size, generator=torch.Generator().manual_seed(1)) * 0.4)


def encoded(method: SequenceMethod, weights: list[Tensor], items: list[int]) -> Tensor:
    """[L, d] what the encoder makes of one sequence: nothing is beside it, and nothing behind it."""
    n = len(items)
    d = method.settings.embedding_dim
    x = weights[0][items] * d**0.5 + weights[1][-n:]
    return method.encoder(weights[2:], x[None], torch.ones(1, n, dtype=torch.bool), Dropout())[0]


def test_histories() -> None:
    data = training()
    assert data.sequence.tolist() == [i for own in SEQUENCES for i in own]
    found = Histories.of(data, USERS, 3)
    assert found.items.tolist() == [[2, 0, 4], [2, 0, 3], [3, 1, 0], [4, 0, 0]]
    assert found.counts.tolist() == [3, 3, 2, 1]
    assert found.there.tolist() == [[True] * 3, [True] * 3, [True, True, False], [True, False, False]]
    assert Histories.of(data, USERS[2:], 3).items.tolist() == [[3, 1], [4, 0]]


@pytest.mark.parametrize("kind", ["binary", "softmax"])
def test_loss_of_sasrec(kind: Any) -> None:
    """The mean over all places that have a next item; five items are read of at most four."""
    data, key = training(), Key(5)
    method = SASRec(SASRecSettings(**SMALL, loss=kind))
    weights = random_weights(method)
    drawn = iter(negatives(data, USERS, torch.tensor([4, 2, 1, 0]), key)[0].tolist())
    terms = []
    for user in USERS.tolist():
        own = SEQUENCES[user]
        found = encoded(method, weights, own[:-1]) if len(own) > 1 else []
        for vector, wanted in zip(found, own[1:], strict=True):
            scores = (weights[0][:-1] @ vector).tolist()
            if kind == "softmax":
                terms.append(-log(exp(scores[wanted]) / sum(map(exp, scores))))
            else:
                terms.append(log(1 + exp(-scores[wanted])) + log(1 + exp(scores[next(drawn)])))
    assert float(method.loss(weights, USERS, data, key)) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_negatives_are_outside_of_the_users_items() -> None:
    sequences = ([0, 1, 2, 3, 5], [2], [0, 1, 2, 3, 4, 5])
    users, counts = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 2])
    items, some = negatives(training(sequences), users, counts, Key(0))
    assert items[:3].tolist() == [4, 4, 4]
    assert len(set(items[3:7].tolist()) - {2}) == 4
    assert some.tolist() == [True] * 7 + [False] * 2
    other, _ = negatives(training(sequences), users[1:2], counts[1:2], Key(0))
    assert other.tolist() == items[3:7].tolist()


def test_the_last_items_decide_what_sasrec_and_cl4srec_recommend() -> None:
    data = training()
    for kind, options in (METHODS["sasrec"], METHODS["cl4srec"]):
        method = kind(options(**SMALL))
        weights = random_weights(method)
        flat = torch.cat([each.flatten() for each in weights])
        expected = torch.stack(
            [encoded(method, weights, SEQUENCES[u][-4:])[-1] @ weights[0][:-1].T for u in USERS.tolist()]
        )
        torch.testing.assert_close(method.scores(Network(flat), data, USERS), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(method.scoring(Network(flat), data, USERS).dense(), expected, atol=1e-5, rtol=1e-5)


def logits(weights: list[Tensor], inner: Tensor) -> list[float]:
    matrix, bias, of_items = weights[-3:]
    scores: list[float] = (weights[0][:-1] @ functional.gelu(matrix @ inner + bias) + of_items).tolist()
    return scores


def test_loss_of_bert4rec() -> None:
    data, key = training(), Key(5)
    method = BERT4Rec(BERT4RecSettings(**SMALL, mask=0.5))
    weights, terms = random_weights(method), []
    own = Histories.of(data, USERS, 4)
    hidden = method.hidden(own, USERS, key)
    for items, where, count in zip(own.items.tolist(), hidden, own.counts.tolist(), strict=True):
        read = [N_ITEMS if where[t] else items[t] for t in range(count)]
        for t in where.nonzero().flatten().tolist():
            scores = logits(weights, encoded(method, weights, read)[t])
            terms.append(-log(exp(scores[items[t]]) / sum(map(exp, scores))))
    assert float(method.loss(weights, USERS, data, key)) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_what_bert4rec_hides() -> None:
    """Shares within four standard errors; an item that is hidden in any case is the last one."""
    n = 4000
    own, users = Histories(torch.zeros(n, 5, dtype=torch.int64), torch.full((n,), 4)), torch.arange(n)
    some = BERT4Rec(BERT4RecSettings(**SMALL, mask=0.4, last=0.0)).hidden(own, users, Key(1))
    assert not some[:, 4].any()
    assert some.any(1).all()
    for place, chance in enumerate((0.4, 0.4, 0.4, 0.4 + 0.6**4)):
        assert float(some[:, place].double().mean()) == pytest.approx(chance, abs=4 * (0.25 / n) ** 0.5)
    alone = BERT4Rec(BERT4RecSettings(**SMALL, mask=1.0, last=0.3)).hidden(own, users, Key(1))
    assert {tuple(each) for each in alone.tolist()} == {(False, False, False, True, False), (True,) * 4 + (False,)}
    assert float((alone.sum(1) == 1).double().mean()) == pytest.approx(0.3, abs=4 * (0.25 / n) ** 0.5)


def test_bert4rec_recommends_what_is_hidden_behind_the_last_item() -> None:
    method = BERT4Rec(BERT4RecSettings(**SMALL))
    weights = random_weights(method)
    read = [[*SEQUENCES[u][-3:], N_ITEMS] for u in USERS.tolist()]
    expected = torch.tensor([logits(weights, encoded(method, weights, items)[-1]) for items in read])
    flat = torch.cat([each.flatten() for each in weights])
    torch.testing.assert_close(method.scores(Network(flat), training(), USERS), expected, atol=1e-5, rtol=1e-5)


def test_views_of_cl4srec() -> None:
    """Each view is a part in a row, has some items hidden, or some in a row in another order; all three occur."""
    n, count = 300, 5
    items = torch.arange(10, 17).repeat(n, 1)
    own = Histories(items.masked_fill(torch.arange(7) >= count, 0), torch.full((n,), count))
    method = CL4SRec(CL4SRecSettings(**SMALL, crop=0.6, mask=0.4, reorder=0.8))
    view, seen, before = method.view(own, torch.arange(n), 99, Key(2)), set(), list(range(10, 15))
    for made, size in zip(view.items.tolist(), view.counts.tolist(), strict=True):
        made = made[:size]
        if size == 3:
            assert made == list(range(made[0], made[0] + 3))
            seen.add(("crop", made[0]))
        elif 99 in made:
            assert [i for i in made if i != 99] == [i for i, m in zip(before, made, strict=True) if m != 99]
            assert made.count(99) == 2
            seen.add(("mask", made.index(99)))
        else:
            assert sorted(made) == before
            assert made[0] == 10 or made[4] == 14  # four of five in a row are shuffled
            seen.add(("reorder", made[0] == 10))
    assert {("crop", 10), ("crop", 11), ("crop", 12), ("mask", 0), ("mask", 3)} <= seen
    assert {("reorder", True), ("reorder", False)} <= seen
    part = method.view(Histories(own.items[5:6, :5], own.counts[5:6]), torch.tensor([5]), 99, Key(2))
    assert part.items[0, : int(part.counts[0])].tolist() == view.items[5, : int(view.counts[5])].tolist()


def test_loss_of_cl4srec() -> None:
    data, key, options = training(), Key(5), {**SMALL, "weight": 0.3, "temperature": 0.5}
    method = CL4SRec(CL4SRecSettings(**options))
    weights, views = random_weights(method), []
    for number in range(2):
        view = method.view(Histories.of(data, USERS, 4), USERS, N_ITEMS, key.fold("view", number))
        rows = [items[:count] for items, count in zip(view.items.tolist(), view.counts.tolist(), strict=True)]
        vectors = torch.stack([encoded(method, weights, row)[-1] for row in rows]).numpy()
        views.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    shares = np.exp(views[0] @ views[1].T / 0.5)
    contrast = -np.log(np.diag(shares) / shares.sum(1)).mean()
    plain = SASRec(SASRecSettings(**SMALL)).loss(weights, USERS, data, key)
    assert float(method.loss(weights, USERS, data, key)) == pytest.approx(float(plain) + 0.3 * contrast, rel=1e-5)


def test_users_without_a_next_item_are_no_error() -> None:
    data = training(([4], [3]))
    state = SASRec(SASRecSettings(**SMALL)).init(data, Key(0))
    after, loss = SASRec(SASRecSettings(**SMALL)).epoch(state, data, Key(1))
    assert loss == 0
    assert torch.equal(after.weights, state.weights)


OPTIONS = {
    "sasrec": {"embedding_dim": 8, "max_length": 3, "n_blocks": 1, "n_heads": 1, "dropout": 0.5, "loss": "softmax"},
    "bert4rec": {"width": 1, "mask": 0.9, "last": 1.0, "dropout": 0.5, "n_heads": 1},
    "cl4srec": {"weight": 0.9, "temperature": 0.2, "crop": 0.2, "mask": 0.9, "reorder": 0.1},
}


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, own in OPTIONS.items() for option in own])
def test_every_option_changes_training(name: str, option: str) -> None:
    kind, options = METHODS[name]
    longer = tuple(own + [i for i in range(6) if i not in own] for own in SEQUENCES)
    data, losses = training(longer), []
    for chosen in (SMALL, {**SMALL, option: OPTIONS[name][option]}):
        method = kind(options(**chosen))
        state, _ = method.epoch(method.init(data, Key(0)), data, Key(3))
        losses.append(method.epoch(state, data, Key(4))[1])
    assert losses[0] != losses[1]


def test_heads_must_divide_the_vectors() -> None:
    with pytest.raises(ValueError, match="n_heads is 3; expected a divisor of embedding_dim, which is 64"):
        SASRecSettings(n_heads=3)


def ring(folder: Path, n_items: int = 12, length: int = 7) -> Dataset:
    """Each user walks along a ring of items, always in the same direction. Which items go together does not tell it."""
    text = "".join(f"{u}:{' '.join(str((7 * u + i) % n_items) for i in range(length))}\n" for u in range(60))
    (folder / "ring.txt").write_text(text)
    return load(folder / "ring.txt")


RING = ["method.embedding_dim=16", "method.max_length=8", "method.dropout=0", "method.learning_rate=0.01"]


@pytest.mark.parametrize("name", METHODS)
def test_the_direction_of_a_walk_is_learned_from_the_order_alone(name: str, tmp_path: Path) -> None:
    """The next item is known for sure. A method without order cannot tell it from the one before the first."""
    more = ["method.loss=softmax"] if name != "bert4rec" else ["method.mask=0.4"]
    chosen = configure(name, overrides=[*RING, *more, "method.batch_size=20", "run.rounds=40", "run.evaluate_every=40"])
    data = ring(tmp_path)
    result = train(chosen.build(), data, chosen.run, config=chosen)
    assert result.evaluate("valid", ks=1)["hr@1"] > 0.9
    knn = configure("item_knn")
    assert train(knn.build(), data, knn.run, config=knn).evaluate("valid", ks=1)["hr@1"] < 0.6
    forwards, backwards = (result.recommend_for(items, 8)["item"].to_list() for items in ([3, 4, 5, 6], [6, 5, 4, 3]))
    assert forwards[0] == 7
    assert forwards != backwards


def test_new_users_are_served_by_their_items_in_order(tmp_path: Path) -> None:
    ring(tmp_path)
    data = load(tmp_path / "ring.txt", split_how="users", test_users=0.2)
    chosen = configure("sasrec", overrides=[*RING, "method.loss=softmax", "method.batch_size=20", "run.rounds=40"])
    result = train(chosen.build(), data, chosen.run, config=chosen)
    assert result.evaluate("test", ks=1)["hr@1"] > 0.9


def test_data_without_an_order_are_refused() -> None:
    table = {"user": [1, 1, 1, 2, 2, 2], "item": [5, 6, 7, 5, 6, 7]}
    chosen = configure("sasrec")
    with pytest.raises(DataError, match=r"memory: the order of a user's interactions is not known.*data.order=file"):
        train(chosen.build(), load(table, split_how="folds", folds=2), chosen.run)


@pytest.mark.parametrize("name", METHODS)
def test_sequences_of_one_item_are_nothing_to_learn_from(name: str) -> None:
    """With three items a user, one is tested and one validated on."""
    table = {"user": [1, 1, 1, 2, 2, 2], "item": [5, 6, 7, 6, 5, 7], "timestamp": [1, 2, 3, 1, 2, 3]}
    data = load(table)
    assert data.train.n_interactions == 2
    chosen = configure(name)
    with pytest.raises(DataError, match=r"learns which item follows another, and no user has two items for training"):
        train(chosen.build(), data, chosen.run)
