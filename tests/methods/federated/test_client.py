"""Many clients at once against one client at a time on dense tables, and what must not change the result."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.federated.naive import Client, train
from tests.methods.federated.toys import SEED, World, assert_same, cluster_table, of_client, of_user, world

from perfedrec.core.keys import Key
from perfedrec.privacy.labels import label

COHORT = [4, 17, 2, 29, 11, 8, 23]


def trained(**changes: Any) -> World:
    """A world that has clusters with models of their own, new neighbour sums, and item rows of all users' own."""
    result = world(**changes)
    result.play(4 + len(result.algorithm.phases))
    assert result.algorithm.settings.clusters.n_clusters == 0 or float(result.state.offsets.abs().max()) > 1e-4
    return result


def compare(here: World) -> None:
    key = Key(SEED)
    settings = here.algorithm.settings
    broadcast, rows, before = here.block(COHORT)
    n_negatives = None if settings.client.loss == "bpr" else settings.client.n_negatives
    labels = label(rows, here.population.n_items, settings.privacy, n_negatives, key.fold("labels"), before.secret)
    sent, after = here.train(COHORT)
    for place, user in enumerate(COHORT):
        own = rows.items[rows.segments == place].tolist()
        negatives = labels.negatives[labels.owners == place].tolist()
        base = cluster_table(broadcast, int(broadcast.groups[place]))
        me = Client(
            base.double(),
            broadcast.degrees,
            None if broadcast.neighbours is None else broadcast.neighbours.double(),
            before.private[place],
            own,
            negatives,
            broadcast.dense,
            None if rows.attributes is None else rows.attributes[place].double(),
            None if broadcast.item_attributes is None else broadcast.item_attributes.double(),
        )
        assert int(before.steps[place]) == 0
        table, vector, dense, loss = train(settings, me)
        change = table - base.double()
        touched = sorted({*own, *negatives})
        others = [item for item in range(here.population.n_items) if item not in touched]
        assert not bool(change[others].any())
        mine = of_user(sent, place)
        assert mine["items"].tolist() == touched, user
        close = {"rtol": 1e-4, "atol": 2e-6}
        torch.testing.assert_close(mine["deltas"].double(), change[touched], **close)
        assert float(change[touched].abs().max()) > 1e-3
        torch.testing.assert_close(after.private[place].double(), vector, rtol=1e-4, atol=1e-5)
        assert float((after.private - before.private)[place].abs().max()) > 1e-3
        torch.testing.assert_close(after.rows[rows.segments == place].double(), change[own], **close)
        assert float(after.loss[place]) == pytest.approx(loss / len(own), rel=1e-4, abs=1e-6)
        assert int(after.steps[place]) == settings.client.local_steps
        if dense is not None:
            torch.testing.assert_close(mine["dense"].double(), dense - broadcast.dense.double(), rtol=1e-3, atol=2e-6)
            assert float(mine["dense"].abs().max()) > 1e-4


def untouched(here: World) -> World:
    """The same world with users whose vectors have not trained, so that torch's Adam can reproduce their first
    steps."""
    client_state = here.population.client_state
    here.population.client_state = replace(
        client_state,
        first=torch.zeros_like(client_state.first),
        second=torch.zeros_like(client_state.second),
        steps=torch.zeros_like(client_state.steps),
    )
    return here


@pytest.mark.parametrize("encoder", ["lightgcn", "alone", "spectral"])
@pytest.mark.parametrize("loss", ["bpr", "softmax"])
@pytest.mark.parametrize("similarity", ["inner", "cosine"])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_one_step_equals_that_of_one_client_on_dense_tables(
    encoder: str, loss: str, similarity: str, leave_one_out: bool
) -> None:
    compare(
        untouched(
            trained(
                model__encoder="spectral" if encoder == "spectral" else "lightgcn",
                model__neighbours=encoder == "lightgcn",
                client__loss=loss,
                client__similarity=similarity,
                client__leave_one_out=leave_one_out,
            )
        )
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"client__local_steps": 3},
        {"client__local_steps": 3, "client__loss": "softmax", "client__l2": 0.3, "client__leave_one_out": True},
        {"client__l2": 0.5, "client__learning_rate": 0.2},
        {"clusters__n_clusters": 0},
        {"model__n_layers": 1},
        {"model__n_layers": 3, "client__temperature": 0.7, "client__loss": "softmax"},
        {"attributes": True},
        {
            "attributes": True,
            "client__local_steps": 3,
            "client__loss": "softmax",
            "client__similarity": "cosine",
            "client__learning_rate": 0.1,
        },
        {"attributes": True, "model__encoder": "spectral", "client__leave_one_out": True},
    ],
    ids=lambda changes: ",".join(f"{name}={value}" for name, value in changes.items()),
)
def test_more_steps_and_other_parts(changes: dict[str, Any]) -> None:
    compare(untouched(trained(**changes)))


def test_moments_of_the_private_vector_are_kept_from_round_to_round() -> None:
    """Three rounds of one step equal three steps of one Adam, with the same labels and an unchanged table."""
    here = world(model__neighbours=False, clusters__n_clusters=0, client__learning_rate=1e-12)
    broadcast, rows, client_state = here.block(COHORT)
    thrice = world(model__neighbours=False, clusters__n_clusters=0, client__learning_rate=1e-12, client__local_steps=3)
    _, expected = thrice.train(COHORT)
    for _ in range(3):
        _, client_state = here.algorithm.client("train", broadcast, rows, client_state, Key(SEED))
    torch.testing.assert_close(client_state.private, expected.private, rtol=1e-5, atol=1e-6)
    assert client_state.steps.tolist() == expected.steps.tolist() == [3] * len(COHORT)
    assert float((client_state.private - here.block(COHORT)[2].private).abs().max()) > 0.05


EVERYTHING = {
    "privacy__clip": 0.05,
    "privacy__noise_scale": 0.01,
    "privacy__pseudo_items": 0.4,
    "privacy__masking": 0.3,
    "personal__learned": True,
    "server__weighting": "interactions",
}


@pytest.mark.parametrize(
    "changes",
    [
        {"client__loss": "bpr", "client__local_steps": 2},
        {"client__loss": "softmax", "client__similarity": "cosine", "client__l2": 0.1},
        {"model__encoder": "spectral", "client__leave_one_out": True},
    ],
    ids=["bpr", "softmax", "spectral"],
)
@pytest.mark.parametrize("blocks", [[[user] for user in COHORT], [[29, 4], [8, 2, 23], [17, 11]], [COHORT[::-1]]])
def test_results_do_not_depend_on_the_block_or_its_order(changes: dict[str, Any], blocks: list[list[int]]) -> None:
    here = trained(**EVERYTHING, **changes)
    whole, client_state = here.train(COHORT)
    rows = here.block(COHORT)[1]
    for users in blocks:
        sent, remembered = here.train(users)
        own_rows = here.block(users)[1]
        for place, user in enumerate(users):
            reference = COHORT.index(user)
            for found, expected in (
                (of_user(sent, place), of_user(whole, reference)),
                (of_client(remembered, own_rows, place), of_client(client_state, rows, reference)),
            ):
                assert found.keys() == expected.keys()
                for name, value in found.items():
                    assert torch.equal(value, expected[name]), f"{name} of user {user}"


def test_attribute_networks_depend_on_the_block_only_by_rounding() -> None:
    """Their matrix products are batched by client, so that the last bits may depend on the block's shape."""
    here = trained(attributes=True, client__local_steps=2, client__learning_rate=0.1, **EVERYTHING)
    whole, _ = here.train(COHORT)
    for place, user in enumerate(COHORT):
        alone, expected = of_user(here.train([user])[0], 0), of_user(whole, place)
        for name, value in alone.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=2e-6)


def test_one_user_does_not_affect_another() -> None:
    here = trained(**EVERYTHING)
    broadcast, rows, client_state = here.block([4, 17, 2])
    whole, kept = here.algorithm.client("train", broadcast, rows, client_state, Key(SEED))
    changed = rows.items.clone()
    mine = rows.segments == 1
    changed[mine] = torch.tensor(sorted({*range(24)} - {*rows.items[mine].tolist()})[: int(mine.sum())])
    other = replace(client_state, private=client_state.private.clone(), rows=client_state.rows.clone())
    other.private[1] += 1
    other.rows[mine] += 1
    sent, remembered = here.algorithm.client("train", broadcast, replace(rows, items=changed), other, Key(SEED))
    for place in (0, 2):
        for found, expected in (
            (of_user(sent, place), of_user(whole, place)),
            (of_client(remembered, rows, place), of_client(kept, rows, place)),
        ):
            for name, value in found.items():
                assert torch.equal(value, expected[name]), name
    assert of_user(sent, 1)["items"].tolist() != of_user(whole, 1)["items"].tolist()


@pytest.mark.parametrize("loss", ["bpr", "softmax"])
def test_no_row_of_a_masked_item_is_sent(loss: str) -> None:
    here = trained(privacy__masking=0.5, client__loss=loss)
    everyone = here.population.everyone()
    broadcast, rows, client_state = here.block(everyone)
    labels = label(rows, 24, here.algorithm.settings.privacy, 0, Key(SEED).fold("labels"), client_state.secret)
    masked = torch.ones(rows.items.numel(), dtype=torch.bool)
    masked[labels.positions] = False
    assert 0.2 < float(masked.float().mean()) < 0.6
    sent, after = here.algorithm.client("train", broadcast, rows, client_state, Key(SEED))
    pairs = set(zip(sent.segments.tolist(), sent.items.tolist(), strict=True))
    assert not pairs & set(zip(rows.segments[masked].tolist(), rows.items[masked].tolist(), strict=True))
    assert set(zip(rows.segments[~masked].tolist(), rows.items[~masked].tolist(), strict=True)) <= pairs
    assert torch.equal(after.rows[masked], client_state.rows[masked])  # their own rows do not change


def test_no_edge_of_a_masked_item_is_sent() -> None:
    here = world(privacy__masking=0.5, privacy__pseudo_items=0.4)
    broadcast, rows, client_state = here.block(here.population.everyone())
    key = Key(SEED)
    labels = label(rows, 24, here.algorithm.settings.privacy, 0, key.fold("edges", 0), client_state.secret)
    update, _ = here.algorithm.client("join", broadcast, rows, client_state, key)
    sent = update.edges[:, 1:].tolist()
    expected = torch.stack([labels.rows.segments, broadcast.tokens[labels.rows.items]], dim=1).tolist()
    assert sorted(sent) == sorted(expected)
    masked = torch.ones(rows.items.numel(), dtype=torch.bool)
    masked[labels.positions[labels.positions >= 0]] = False
    hidden = torch.stack([rows.segments[masked], broadcast.tokens[rows.items[masked]]], dim=1).tolist()
    assert hidden
    assert not {tuple(pair) for pair in hidden} & {tuple(pair) for pair in sent}


def test_everything_that_is_sent_is_clipped_and_noised() -> None:
    exact, clipped, noisy = (
        trained(attributes=True, client__dense_learning_rate=1.0, **privacy)
        for privacy in ({}, {"privacy__clip": 0.01}, {"privacy__clip": 0.01, "privacy__noise_scale": 0.001})
    )
    for other in (clipped, noisy):  # the same state, so that only the protection differs
        other.state, other.population.client_state = exact.state, exact.population.client_state
    sent = [here.train(COHORT) for here in (exact, clipped, noisy)]
    assert_same(sent[0][1], sent[1][1])  # the client state has no noise
    assert_same(sent[0][1], sent[2][1])
    for name in ("deltas", "dense", "reports"):
        raw, bounded, masked = (getattr(update, name) for update, _ in sent)
        assert float(raw.abs().max()) > 0.01, name
        assert torch.equal(bounded, raw.clamp(-0.01, 0.01)), name
        noise = (masked - bounded).double()
        assert float(noise.abs().mean()) == pytest.approx(0.001, rel=0.3), name  # mean magnitude is the scale
        assert noise.unique().numel() > 0.9 * noise.numel(), name


@pytest.mark.parametrize("loss", ["bpr", "softmax"])
def test_users_with_nearly_all_items_or_none(loss: str) -> None:
    here = world(clusters__n_clusters=0, model__neighbours=False, client__loss=loss)
    lists = [list(range(24)), [], list(range(1, 24)), [3, 5]]
    here.population.offsets = torch.tensor([0, 24, 24, 47, 49])
    here.population.items = torch.tensor([item for each in lists for item in each])
    here.population.init_clients(here.algorithm, SEED)
    sent, client_state = here.train([0, 1, 2, 3])
    assert bool(sent.deltas.isfinite().all())
    assert bool(client_state.private.isfinite().all())
    assert of_user(sent, 1)["items"].numel() == 0 or loss == "softmax"
    assert float(of_user(sent, 0)["deltas"].abs().max()) == 0.0  # there are no items to rank its own against
    alone, _ = here.train([2])
    assert torch.equal(of_user(alone, 0)["deltas"], of_user(sent, 2)["deltas"])
    assert float(of_user(sent, 2)["deltas"].abs().max()) > 1e-3


def test_weights_by_hand() -> None:
    counts = world().population.offsets.diff()[COHORT].tolist()
    assert world().train(COHORT)[0].weights.tolist() == [1.0] * len(COHORT)
    assert world(server__weighting="interactions").train(COHORT)[0].weights.tolist() == counts
