"""The neighbourhood model: lists by diffusion, the model of low rank, and their part in the mix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.methods.federated.toys import World, world

from perfedrec.core.keys import Key, normal
from perfedrec.core.records import flatten
from perfedrec.core.types import NEWCOMER, items_of
from perfedrec.methods.federated import neighbourhood, personal
from perfedrec.methods.federated.spectral import nystroem
from perfedrec.nn.propagation import Bipartite, diffusion_star

SUMS = {"privacy__aggregation": "secure", "privacy__rank": 0, "privacy__norm": "l2", "privacy__clip": 10.0}
PRETRAINED = {"pretraining__kind": "spectral", "personal__pretrained": 0.2}
DIFFUSING = {**PRETRAINED, "personal__neighbourhood": 0.5}


def dense(here: World) -> np.ndarray:
    """[n, m] the interactions of a population."""
    matrix = np.zeros((here.population.n_users, here.population.n_items))
    for user in range(here.population.n_users):
        start, stop = here.population.offsets[user : user + 2].tolist()
        matrix[user, here.population.items[start:stop].numpy()] = 1
    return matrix


def graph_of(matrix: np.ndarray) -> Bipartite:
    users, items = (torch.from_numpy(each) for each in matrix.nonzero())
    return Bipartite.of(users, items, *matrix.shape)


def walked(matrix: np.ndarray, alpha: float, beta: float, gamma: float | None = None) -> np.ndarray:
    """The scores by loops over users, items and their users, whose degrees have the exponent ``gamma`` (``alpha``)."""
    counts, degrees = matrix.sum(1), matrix.sum(0)
    scores = np.zeros_like(matrix)
    for user, own in enumerate(matrix):
        for first in own.nonzero()[0]:
            for other in matrix[:, first].nonzero()[0]:
                for item in matrix[other].nonzero()[0]:
                    step = degrees[first] ** -alpha * counts[other] ** -(alpha if gamma is None else gamma)
                    scores[user, item] += step / degrees[item] ** beta
    return scores


def served(here: World, rounds: int = 2) -> World:
    """The world after some rounds of training, with the state that it serves."""
    here.play(rounds + len(here.algorithm.phases))
    return replace(here, state=here.algorithm.serving(here.state))


@pytest.mark.parametrize(
    ("alpha", "beta", "gamma"), [(0.5, 0.3, None), (1.0, 0.0, None), (0.5, 0.3, 0.0), (0.25, 0.5, 1.0)]
)
def test_diffusion_follows_three_steps(alpha: float, beta: float, gamma: float | None) -> None:
    matrix = dense(world())
    near, nearness = neighbourhood.diffused(graph_of(matrix), alpha, beta, length=5, gamma=gamma, at_once=70)
    expected = np.where(matrix > 0, 0, walked(matrix, alpha, beta, gamma))
    assert near.shape == (30, 5)
    for user in range(30):
        kept = near[user][near[user] >= 0].numpy()
        least = np.sort(expected[user])[::-1][:5]
        np.testing.assert_allclose(np.sort(nearness[user].numpy())[::-1], least, rtol=1e-5)
        np.testing.assert_allclose(nearness[user][: kept.size], expected[user, kept], rtol=1e-5)
        assert not matrix[user, kept].any()


@pytest.mark.parametrize(("n_items", "gamma"), [(15, 0.5), (16, 1.0)])
def test_users_count_by_their_whole_degree_where_lists_are_long(n_items: int, gamma: float) -> None:
    """Users with 15 items on average, and with 16; a user without items does not count."""
    matrix = np.zeros((4, 24), dtype=int)
    for user, (first, length) in enumerate(((0, n_items - 3), (4, n_items), (5, n_items + 3))):
        matrix[user, first : first + length] = 1
    found, given = (neighbourhood.diffused(graph_of(matrix), 0.5, 0.3, 9, gamma=each) for each in (None, gamma))
    other = neighbourhood.diffused(graph_of(matrix), 0.5, 0.3, 9, gamma=1.5 - gamma)
    torch.testing.assert_close(found, given)
    assert not torch.allclose(found[1], other[1])


def test_a_user_whose_items_nobody_else_has_gets_an_empty_list() -> None:
    matrix = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 0]])
    near, nearness = neighbourhood.diffused(graph_of(matrix), 0.5, 0.3, length=3)
    assert near.tolist()[0] == [-1, -1, -1]
    assert near.tolist()[2] == [3, -1, -1]
    assert float(nearness[0].abs().sum()) == 0


def test_nystroem_of_several_passes_is_exact_where_they_span_the_matrix() -> None:
    generator = np.random.default_rng(1)
    half = generator.normal(size=(20, 6))
    gram = torch.from_numpy(half @ half.T)
    probes = normal(Key(1).spread(torch.arange(20)), 8).double()
    probes = torch.cat([probes[:, :4], gram @ probes[:, :4]], dim=1)  # the second block follows from the first
    factor = nystroem(probes, gram @ probes).double()
    torch.testing.assert_close(factor @ factor.T, gram, rtol=1e-4, atol=1e-4)


def gram(matrix: np.ndarray, least: int, exponents: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """[m, m] by loops: the sum of 1 / (d_u sqrt(d_i d_j)) over the users of each pair that enough users have, with
    ``exponents`` a and b of 1 / (d_u^2a (d_i d_j)^b)."""
    of_users, of_items = exponents
    counts, degrees, n_items = matrix.sum(1), matrix.sum(0), matrix.shape[1]
    result = np.zeros((n_items, n_items))
    for first in range(n_items):
        for second in range(n_items):
            holders = (matrix[:, first] * matrix[:, second]).nonzero()[0]
            if holders.size >= least:
                weights = counts[holders].astype(float) ** (-2 * of_users)
                result[first, second] = weights.sum() / (degrees[first] * degrees[second]) ** of_items
    return result


@pytest.mark.parametrize(("least", "exponents"), [(1, (0.5, 0.5)), (2, (0.35, 0.2)), (3, (0.5, 0.5)), (3, (0, 1))])
def test_pairs_of_few_users_are_left_out(least: int, exponents: tuple[float, float]) -> None:
    matrix = dense(world())
    found = neighbourhood.shared(graph_of(matrix), least, exponents, block_size=7).toarray()
    np.testing.assert_allclose(found, gram(matrix, least, exponents), rtol=1e-5)
    assert (found == 0).mean() > (gram(matrix, 0) == 0).mean() or least == 1


def test_the_low_rank_model_of_a_small_graph_is_exact() -> None:
    """With as many columns as items it is the matrix of pairs that three users have, without its negative part."""
    matrix = dense(world())
    factor = neighbourhood.low_rank(graph_of(matrix), Key(4))
    values, vectors = np.linalg.eigh(gram(matrix, 3))
    expected = (vectors * values.clip(min=0)) @ vectors.T
    assert factor.shape[1] == (values > 1e-6).sum()
    np.testing.assert_allclose((factor @ factor.T).numpy(), expected, rtol=1e-3, atol=1e-5)


def test_the_low_rank_model_does_not_depend_on_who_alone_has_a_pair() -> None:
    """Two populations that differ in who has items 4 and 5, with the same degrees: nobody else has their pairs."""
    common = np.zeros((14, 7))
    common[:4, :3] = common[4:8, 3:6] = 1
    common[8:13, [0, 1]] = 1
    common[13, [2, 6]] = 1
    first, second = common.copy(), common.copy()
    first[12, 4] = first[13, 5] = second[12, 5] = second[13, 4] = 1
    assert not np.allclose(gram(first, 1), gram(second, 1))
    factors = [neighbourhood.low_rank(graph_of(matrix), Key(4)) for matrix in (first, second)]
    torch.testing.assert_close(factors[0] @ factors[0].T, factors[1] @ factors[1].T)


@pytest.mark.parametrize("n_users", [1, 2])
def test_the_low_rank_model_of_two_users_says_nothing(n_users: int) -> None:
    factor = neighbourhood.low_rank(graph_of(np.ones((n_users, 4))), Key(4))
    assert factor.tolist() == [[0.0]] * 4


def test_diffusion_by_a_factor_follows_three_steps() -> None:
    matrix, here = dense(world()), world()
    rows, _ = here.population.rows(here.population.everyone())
    values, vectors = np.linalg.eigh(gram(matrix, 0))
    factor = torch.from_numpy(vectors * values.clip(min=0) ** 0.5)
    star = diffusion_star(rows, torch.from_numpy(matrix.sum(0)), alpha=0.5, beta=0.3)
    found = star.users(torch.zeros(30, 1), factor[rows.items], rows.segments) @ star.items(factor).T
    np.testing.assert_allclose(found.numpy(), walked(matrix, 0.5, 0.3, gamma=1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"clusters__n_clusters": 0}, {**SUMS, "model__neighbours": False}])
def test_parts_sum_to_the_scores(changes: dict[str, Any]) -> None:
    here = served(world(**DIFFUSING, **changes))
    block = here.block([5, 0, 22, 13])
    parts = here.algorithm.explain(*block)
    assert list(parts) == ["local", "cluster", "global", "pretrained", "neighbourhood"]
    scores = here.algorithm.scores(*block)
    torch.testing.assert_close(torch.stack(list(parts.values())).sum(0), scores, rtol=1e-5, atol=1e-6)
    assert float(parts["neighbourhood"].std()) > 0


def test_a_list_enters_with_its_share_and_the_spread_of_the_global_model() -> None:
    here = served(world(**DIFFUSING, personal__local=0.3, personal__cluster=0.0, personal__global=1.0))
    user, matrix = 5, dense(here)
    parts = here.algorithm.explain(*here.block([user]))
    expected = np.where(matrix > 0, 0, walked(matrix, 0.5, 0.5))[user]
    whole = parts["global"][0] / (1.0 / 2.0)  # the weights are 0.3, 0, 1, 0.2 and 0.5
    scale = 0.5 / 2.0 * float(whole.std(correction=0)) / expected.std()
    np.testing.assert_allclose(parts["neighbourhood"][0].numpy(), expected * scale, rtol=1e-3, atol=1e-6)


def test_new_users_are_scored_by_the_model_of_low_rank() -> None:
    here = served(world(**DIFFUSING))
    _, rows, client_state = here.block([5, 22])
    broadcast = here.algorithm.broadcast(here.state, torch.tensor([NEWCOMER, 22]))
    assert broadcast.near is not None
    assert broadcast.near[0].tolist() == [-1] * broadcast.near.shape[1]
    new, known = here.algorithm.explain(broadcast, rows, client_state)["neighbourhood"]
    alone = here.algorithm.explain(replace(broadcast, near=None, nearness=None), rows, client_state)["neighbourhood"]
    torch.testing.assert_close(new, alone[0])
    assert not torch.allclose(known, alone[1])
    assert float(new.std()) > 0


def test_the_covariance_of_the_model_of_low_rank_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until another factor or exponent comes: scores are those of a model that never computed one before."""
    here, widths, whole = served(world(**DIFFUSING)), [], personal.covariance

    def counted(items: Any, n_items: int) -> torch.Tensor:
        widths.append(items(slice(None)).shape[1])
        return whole(items, n_items)

    monkeypatch.setattr(personal, "covariance", counted)
    factor = here.state.low_rank.factor
    for users in ([5, 0], [7], [5, 0]):
        last = here.algorithm.scores(*here.block(users))
    assert widths.count(factor.shape[1]) == 1
    copied = replace(here, state=replace(here.state, low_rank=replace(here.state.low_rank, factor=factor.clone())))
    assert torch.equal(copied.algorithm.scores(*copied.block([5, 0])), last)
    other = replace(here, state=replace(here.state, beta=0.1))
    other.algorithm.scores(*other.block([5, 0]))
    assert widths.count(factor.shape[1]) == 3


def test_training_sends_no_neighbourhood_model() -> None:
    here = world(**DIFFUSING)
    here.play(1 + len(here.algorithm.phases))
    broadcast = here.algorithm.broadcast(here.state, torch.tensor([3]))
    assert here.state.low_rank.factor is not None
    assert broadcast.low_rank is None
    assert broadcast.near is None
    of_served = here.algorithm.broadcast(here.algorithm.serving(here.state), torch.tensor([3, 4]))
    plain = replace(of_served, low_rank=None, near=None, nearness=None)
    more = 4 * of_served.low_rank.numel() + 2 * 4 * of_served.near.shape[1]
    assert of_served.download_bytes() - plain.download_bytes() == more
    assert of_served.download_bytes(together=True) - plain.download_bytes(together=True) == more + 8 * 24


def test_before_training_the_models_that_are_ready_recommend() -> None:
    here = served(world(**DIFFUSING), rounds=0)
    parts = here.algorithm.explain(*here.block([5, 0]))
    silent = {name for name, part in parts.items() if not bool(part.any())}
    assert silent == {"local", "cluster", "global"}


def test_lists_are_named_by_tokens_until_they_are_served() -> None:
    tokens = torch.tensor([2, 0, 1])
    assert items_of(torch.tensor([[0, 2], [1, -1]]), tokens).tolist() == [[1, 0], [2, -1]]


def test_a_served_state_that_is_served_again_is_the_same() -> None:
    here = served(world(**DIFFUSING))
    again = here.algorithm.serving(here.state)
    first, second = flatten(here.state)[0], flatten(again)[0]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert here.state.service.near is not None


def test_sums_and_service_find_the_same_model_where_all_rows_are_opened() -> None:
    """The passes of spectral pre-training, as sums of all clients, approximate the same matrix as the service does."""
    here = served(world(**DIFFUSING, **SUMS, model__neighbours=False), rounds=0)
    matrix, factor = dense(here), here.state.low_rank.factor
    assert factor is not None
    normal_ = matrix / np.sqrt(matrix.sum(1)[:, None] * matrix.sum(0).clip(min=1))
    wanted = normal_.T @ normal_
    error = np.abs((factor @ factor.T).numpy() - wanted).max()
    assert error < 0.15  # 3 passes of 6 columns, of 24
    assert np.abs(wanted).max() > 0.3


def test_without_passes_and_without_a_service_there_is_none() -> None:
    with pytest.raises(ValidationError, match=r"expected pretraining\.kind = spectral"):
        world(personal__neighbourhood=0.5, **SUMS)


def test_options_of_the_neighbourhood_model_without_effect_are_said() -> None:
    options = {"neighbourhood__alpha": 0.3, "neighbourhood__gamma": 0.2}
    assert world(**DIFFUSING, **options).algorithm.remarks(30) == []
    secret, changed = (served(world(**DIFFUSING, **SUMS, **given)) for given in ({}, {"neighbourhood__gamma": 0.2}))
    assert torch.equal(secret.scores(), changed.scores())
    (said,) = changed.algorithm.remarks(30)
    assert said.startswith("neighbourhood.gamma: without effect, because no service makes lists")
    said, other = world(**PRETRAINED, **options).algorithm.remarks(30)
    assert said == "neighbourhood.alpha: without effect, because personal.neighbourhood is 0"
    assert other.startswith("neighbourhood.gamma: without effect")


def test_a_block_without_users_has_no_scores() -> None:
    here = world(**PRETRAINED)
    here.play(1 + len(here.algorithm.phases))
    assert here.algorithm.scores(*here.block([0])).shape == (1, here.population.n_items)
    assert here.algorithm.scores(*here.block(torch.arange(0))).shape == (0, here.population.n_items)


def test_of_a_user_with_many_edges_a_random_choice_is_used() -> None:
    """Users within the limit keep all, in the order in which they came; views are counted apart."""
    many = [[0, 1, item] for item in range(9)] + [[1, 1, item] for item in range(3)]
    edges = torch.tensor([[0, 0, 5], [0, 0, 2], *many, [0, 2, 7]])
    found = neighbourhood.limited(edges, 4, 20, Key(1))
    counts = {
        (view, user): int(((found[:, 0] == view) & (found[:, 1] == user)).sum()) for view, user in ((0, 1), (1, 1))
    }
    assert counts == {(0, 1): 4, (1, 1): 3}
    assert found[found[:, 1] != 1].tolist() == [[0, 0, 5], [0, 0, 2], [0, 2, 7]]
    assert not torch.equal(found, neighbourhood.limited(edges, 4, 20, Key(2)))
    shuffled = edges[torch.randperm(edges.shape[0])]
    again = neighbourhood.limited(shuffled, 4, 20, Key(1))
    assert sorted(again.tolist()) == sorted(found.tolist())
    assert torch.equal(neighbourhood.limited(edges, 9, 20, Key(1)), edges)


def test_pairs_of_fewer_holders_than_asked_for_are_not_in_the_models() -> None:
    """Four users have items 0 and 1, six have 2 and 3: with five holders the first pair is not there."""
    users = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, *(each for user in range(4, 10) for each in (user, user))])
    items = torch.tensor([0, 1] * 4 + [2, 3] * 6)
    graph = Bipartite.of(users, items, 10, 4)
    three, five = (neighbourhood.low_rank(graph, Key(3), least) for least in (3, 5))
    assert float((three @ three.T)[0, 1]) > 0.1
    assert abs(float((five @ five.T)[0, 1])) < 1e-6
    assert float((five @ five.T)[2, 3]) > 0.1
    assert float(neighbourhood.leading(graph, 1, 4, Key(3), least=5)[:2].abs().max()) < 1e-3
    assert float(neighbourhood.leading(graph, 1, 4, Key(3))[:2].abs().max()) > 0.1  # both are singular values of 1


def test_users_with_like_lists_count_as_one() -> None:
    """Users 0 to 2 have one list; user 3 has two of its three items and another one: 2 of 4 in common; user 4 has other
    items and user 5 has none."""
    matrix = np.array([[1, 1, 1, 0, 0, 0]] * 3 + [[1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]])
    graph = graph_of(matrix)
    assert neighbourhood.counted(graph, None) is None
    for alike, expected in ((0.51, [1 / 3] * 3 + [1, 1, 1]), (0.5, [1 / 4] * 4 + [1, 1])):
        for block_size in (2, 512):
            found = neighbourhood.counted(graph, alike, block_size)
            assert found is not None
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    counts = neighbourhood.counted(graph, 0.51)
    pairs = neighbourhood.shared(graph, 2, counts=counts).toarray()
    np.testing.assert_allclose(pairs[0, 1], (3 * (1 / 3) / 3 + 1 / 3) / 4, rtol=1e-6)  # both have degree 4
    assert pairs[0, 2] == 0  # three users have both, who count as one
    near, nearness = neighbourhood.diffused(graph, 0.5, 0.5, 3, counts)
    assert near[3].tolist() == [2, -1, -1]
    np.testing.assert_allclose(float(nearness[3, 0]), 2 * 3 * (1 / 3) / 3**0.5 / 12**0.5, rtol=1e-6)


def test_lists_are_compared_once_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, counted = [], neighbourhood.counted

    def told(graph: Any, alike: float | None) -> Any:
        asked.append(alike)
        return counted(graph, alike)

    monkeypatch.setattr(neighbourhood, "counted", told)
    both = {**DIFFUSING, "pretraining__kind": "spectral", "pretraining__at": "service", "defence__alike": 0.5}
    here = served(world(**both))
    assert here.state.low_rank.factor is not None
    assert here.state.pretrained.table is not None or here.state.pretrained.user_init_scale is not None
    assert asked == [0.5]


def test_what_is_looked_up_user_by_user_is_what_is_looked_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    here = served(world(**DIFFUSING))
    block = here.block([5, 0, 22, 13, 7])
    together = here.algorithm.explain(*block)
    monkeypatch.setattr(personal, "AT_ONCE", 2)
    for name, part in here.algorithm.explain(*block).items():
        assert torch.equal(part, together[name])


def test_vectors_of_the_global_model_need_no_other_model() -> None:
    here = served(world(**DIFFUSING))
    mixture = here.algorithm.mixture(*here.block([5, 0, 22, 13]))
    computed = mixture.parts["global"].users
    assert computed.shape[0] == 4
    assert [name for name, part in mixture.parts.items() if "users" in vars(part)] == ["global"]
