"""What a file of one's own can add to the engine: clients' own networks, another aggregator, other local steps."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from tests.methods.federated.toys import population
from torch import Tensor

from perfedrec import Federated, FederatedSettings, Key, configure, load
from perfedrec.core.aggregate import FIXED_POINT, Aggregate, Sum
from perfedrec.core.errors import ConfigError
from perfedrec.core.sampling import paired
from perfedrec.core.types import Rows, Spec, Update
from perfedrec.evaluation import Held
from perfedrec.methods.centralised.popularity import Popularity
from perfedrec.methods.federated.fedmf import FedMF
from perfedrec.methods.federated.local import LocalResult, LocalTask
from perfedrec.methods.federated.settings import FedMFSettings, LocalSettings
from perfedrec.nn.flat import Flat, apply_per_client
from perfedrec.nn.optim import adam
from perfedrec.nn.segments import segment_sum
from perfedrec.runs.engine import Central
from perfedrec.runtimes.flower.client_app import sum_of_users
from perfedrec.runtimes.flower.codec import Task
from perfedrec.runtimes.round import play_round
from perfedrec.runtimes.simulator import Simulator

DATA = "synthetic:users=300,items=200,clusters=4,interactions_per_user=12,seed=2"
HIDDEN = 8


class Networks(Federated):  # type: ignore[type-arg]
    """``s_ui = w_u . relu(W_u q_i + b_u)``: each client keeps a network to itself, and item vectors are shared."""

    @property
    def network(self) -> Flat:
        return Flat(((HIDDEN, self.settings.model.embedding_dim), (HIDDEN,), (HIDDEN,)))

    def n_private(self) -> int:
        return self.network.size

    def init_private(self, keys: Tensor) -> Tensor:
        """The same first network for everybody, and a little of each client's own."""
        scales = ((2 / self.settings.model.embedding_dim) ** 0.5, 0.0, HIDDEN**-0.5)
        return self.network.init(Key(0), scales) + 0.01 * self.network.init_each(keys, scales)

    def logits(self, private: Tensor, rows: Tensor, segments: Tensor, dense: Tensor | None) -> Tensor:
        def network(clients: Tensor, padded: Sequence[Tensor]) -> Tensor:
            return self.all_scores(private[clients], padded[0], None)

        return apply_per_client(network, [rows], segments, private.shape[0])

    def all_scores(self, private: Tensor, items: Tensor, dense: Tensor | None) -> Tensor:
        first, bias, second = self.network.unpack(private)
        hidden = torch.relu(items @ first.transpose(1, 2) + bias[:, None])
        return (hidden @ second[..., None]).squeeze(-1)


def test_clients_can_keep_a_network_to_themselves() -> None:
    """On planted tastes its lists are better than those by popularity, and nothing of the networks is sent."""
    dataset = load(DATA)
    options = FederatedSettings(client=LocalSettings(user_learning_rate=0.005))
    here = Simulator(Networks(options), dataset, seed=0, device="cpu")
    for _ in range(60):
        here.play()
    held = Held.of(dataset.valid.offsets, dataset.valid.items, torch.device("cpu"))
    found = here.recommender().evaluate(held, (20,))["recall@20"]
    floor = Central(Popularity(), dataset, device="cpu").recommender().evaluate(held, (20,))["recall@20"]
    assert found > 1.1 * floor
    sent, after = _trained(here)
    assert sent.dense is None
    assert not torch.equal(after.private[0], after.private[1])


def _trained(here: Simulator[Any, Any, Any]) -> tuple[Update, Any]:
    users = torch.arange(5)
    rows, positions = here.population.rows(users)
    client_state = here.population.load_client_states(users, positions)
    return here.algorithm.client("train", here.algorithm.broadcast(here.state, users), rows, client_state, Key(1))


@dataclass(frozen=True)
class TrimmedMean:
    """Leaves the lowest and the highest of a row's clients out, in each coordinate (Yin et al., ICML 2018)."""

    separate: ClassVar[bool] = True

    def combine(self, phase: str, parts: Iterable[Aggregate], empty: Aggregate) -> Aggregate:
        given = list(parts)
        total = Sum().combine(phase, given, empty)
        rows = [self._row([part.sums[part.keys == key] for part in given]) for key in total.keys.tolist()]
        return replace(total, sums=torch.stack(rows)) if rows else total

    @staticmethod
    def _row(found: list[Tensor]) -> Tensor:
        values = torch.cat(found).sort(0).values
        kept = values[1:-1] if values.shape[0] > 2 else values[:0]
        return (kept.sum(0) * (values.shape[0] / max(kept.shape[0], 1))).round()


class Trimmed(FedMF):  # type: ignore[type-arg]
    aggregator = TrimmedMean()


class Summed(FedMF):  # type: ignore[type-arg]
    """With a client that sends a huge change."""

    poison = 1.0

    def client(self, phase: str, broadcast: Any, rows: Rows, client_state: Any, key: Key) -> tuple[Update, Any]:
        update, after = super().client(phase, broadcast, rows, client_state, key)
        assert update.deltas is not None
        assert update.segments is not None
        bad = (rows.users[update.segments] == 3)[:, None]
        return replace(update, deltas=torch.where(bad, self.poison, update.deltas)), after


class Defended(Summed, Trimmed):
    """The same client, and a trimmed mean."""


def options(**privacy: Any) -> FedMFSettings:
    return FedMFSettings.model_validate(
        {"model": {"embedding_dim": 4}, "selection": {"n_clients_per_round": 30}, "privacy": privacy,
         "server": {"optimizer": "fedavg", "learning_rate": 1.0, "averaging": 0.0}}
    )  # fmt: skip


def moved(kind: type[FedMF[Any, Any, Any]], poison: float) -> Tensor:
    """[m] how far one round moves each item."""
    method, people = type("Own", (kind,), {"poison": poison})(options()), population()
    state = method.init(Spec(30, 24, torch.ones(24)), Key(1))
    before = state.items.clone()
    people.init_clients(method, 1)
    after, _ = play_round(method, state, people, 1)
    return (after.items - before).norm(dim=1)


def test_a_trimmed_mean_bounds_what_one_client_does() -> None:
    """A client that sends 1000 in place of 1 moves a sum by as much, and a trimmed mean not at all."""
    assert float(moved(Summed, 1000.0).max()) > 100 * float(moved(Summed, 1.0).max())
    assert float(moved(Defended, 1000.0).max()) == pytest.approx(float(moved(Defended, 1e3 + 1).max()))
    assert float(moved(Defended, 1000.0).max()) < float(moved(Summed, 1.0).max())
    assert moved(Defended, 1e9).isfinite().all()  # no sum can hold it, and the client is left out


def test_a_rule_that_compares_clients_is_refused_where_sums_are_secure() -> None:
    said = "TrimmedMean compares updates of single clients, and secure aggregation shows only their sum"
    with pytest.raises(ConfigError, match=said):
        Trimmed(options(aggregation="secure", rank=0))

    class Late(FedMF):  # type: ignore[type-arg]
        def __init__(self, settings: FedMFSettings) -> None:
            super().__init__(settings)
            self.aggregator = TrimmedMean()

    method, people = Late(options(aggregation="secure")), population()
    people.init_clients(method, 1)
    with pytest.raises(ConfigError, match=said):
        play_round(method, method.init(Spec(30, 24, torch.ones(24)), Key(1)), people, 1)


def test_a_node_of_several_users_is_refused_where_single_clients_are_compared() -> None:
    method, people = Trimmed(options()), population()
    people.init_clients(method, 1)
    state, users = method.init(Spec(30, 24, torch.ones(24)), Key(1)), torch.tensor([4, 9])

    def total(chosen: Tensor) -> Aggregate:
        task = Task("train", 0, 1, 30, chosen, torch.zeros(1, dtype=torch.int64), method.broadcast(state, chosen))
        return sum_of_users(method, people, task, 1)

    with pytest.raises(ConfigError, match="expected nodes with one user each"):
        total(users)
    assert total(users[:1]).clients == 1


def by_hand(task: LocalTask) -> LocalResult:
    """BPR of FedMF with gradients written down, in place of autograd."""
    assert (task.loss, task.penalised) == ("bpr", False)
    labels, private, clients = task.labels, task.start.private, task.client_state
    first, second, steps = clients.first, clients.second, clients.steps
    positives, negatives = task.start.positives.clone(), task.start.negatives.clone()
    rows, n = labels.rows, labels.rows.n_users
    pairs, others = torch.arange(rows.items.numel()), rows.segments
    if labels.owners.numel() < rows.items.numel():
        pairs, others = paired(rows, labels.owners)
    loss = torch.zeros(n)
    for _ in range(task.client.local_steps):
        user, up = private[others], positives[pairs]
        margin = (user * (up - negatives)).sum(1)
        loss = segment_sum(torch.nn.functional.softplus(-margin), others, n)
        slope = -torch.sigmoid(-margin)[:, None]
        step, first, second, steps = adam(
            segment_sum(slope * (up - negatives), others, n), first, second, steps,
            task.client.user_learning_rate, (0.9, 0.999), 1e-8,
        )  # fmt: skip
        positives = positives.index_add(0, pairs, -task.client.learning_rate * slope * user)
        negatives = negatives + task.client.learning_rate * slope * user
        private = private + step
    delta = torch.cat([positives - task.start.positives, negatives - task.start.negatives])
    return LocalResult(private, first, second, steps, delta, None, loss)


class ByHand(FedMF):  # type: ignore[type-arg]
    local_steps = by_hand  # a plain function


def test_other_local_steps_take_the_place_of_autograd() -> None:
    settings = configure("fedmf", algorithm="fedmf", overrides=["selection.n_clients_per_round=64"]).settings
    tables = []
    for kind in (FedMF, ByHand):
        here = Simulator(kind(settings), load(DATA), seed=1, device="cpu")
        start = here.state.items.clone()
        for _ in range(5):
            here.play()
        assert float((here.state.items - start).abs().max()) > 0.01
        tables.append(here.state.items)
    torch.testing.assert_close(*tables, rtol=0, atol=1e-5)
    softmax = configure("fedmf", algorithm="fedmf", overrides=["client.loss=softmax"]).settings
    with pytest.raises(AssertionError):
        Simulator(ByHand(softmax), load(DATA), device="cpu").play()


class Reads(FedMF):  # type: ignore[type-arg]
    """With clients that go on from their own rows, and look at them."""

    def begins(self, client_state: Any, positions: Tensor, received: Tensor) -> Tensor:
        own = (positions >= 0).nonzero().squeeze(1)
        return torch.zeros_like(received).index_copy(0, own, client_state.rows[positions[own]])

    def hand_over(self, update: Update, *others: Any) -> tuple[Update, Any]:
        assert others[-2].rows.shape[1] == self.settings.model.embedding_dim
        return super().hand_over(update, *others)


def test_own_rows_are_there_for_whom_reads_them() -> None:
    """Training of the package's methods leaves them unread."""
    plain = FedMF(options())
    assert plain.unread("train") == {"rows"}
    assert plain.unread("degrees") == set()
    plain.local_steps = by_hand
    for method in (plain, Reads(options()), ByHand(options())):
        assert method.unread("train") == set()
        people = population()
        people.init_clients(method, 1)
        play_round(method, method.init(Spec(30, 24, torch.ones(24)), Key(1)), people, 1)
        assert people.client_state.rows.any()


def test_private_vectors_that_are_wider_than_rows_are_not_for_the_kernel() -> None:
    class Wide(FedMF):  # type: ignore[type-arg]
        def n_private(self) -> int:
            return super().n_private() + 1

    with pytest.raises(RuntimeError, match="size of tensor"):
        Simulator(Wide(options()), load(DATA), device="cpu").play()


def test_a_hook_with_the_wrong_shape_is_one_line() -> None:
    class Wide(FedMF):  # type: ignore[type-arg]
        def all_scores(self, private: Tensor, items: Tensor, dense: Tensor | None) -> Tensor:
            return super().all_scores(private, items, dense).T

    here = Simulator(Wide(options()), load(DATA), device="cpu")
    with pytest.raises(ConfigError, match=r"Wide.all_scores returned shape \[200, 3\]; expected \[3, 200\]"):
        here.recommender().raw_scores(torch.arange(3))

    class Short(FedMF):  # type: ignore[type-arg]
        def keeps(self, begun: Tensor, delta: Tensor) -> Tensor:
            return delta[:2]

    with pytest.raises(ConfigError, match=r"keeps returned float32 \[2, 4\]; expected float32 \[\d+, 4\]"):
        Simulator(Short(options()), load(DATA), device="cpu").play()

    class Tall(Networks):
        def logits(self, private: Tensor, rows: Tensor, segments: Tensor, dense: Tensor | None) -> Tensor:
            return super().logits(private, rows, segments, dense)[:, None]

    with pytest.raises(ConfigError, match=r"Tall.logits returned shape"):
        Simulator(Tall(), load(DATA), device="cpu").play()


def test_parts_are_documented_in_fixed_point() -> None:
    """A rule sees changes times weights times 2^36."""
    seen = []

    class Watching(Sum):
        def combine(self, phase: str, parts: Iterable[Aggregate], empty: Aggregate) -> Aggregate:
            seen.extend(parts)
            return super().combine(phase, seen, empty)

    method, people = type("Own", (FedMF,), {"aggregator": Watching()})(options()), population()
    people.init_clients(method, 1)
    play_round(method, method.init(Spec(30, 24, torch.ones(24)), Key(1)), people, 1)
    (part,) = seen
    assert float(part.weights) == 30 * FIXED_POINT
    assert torch.equal(part.sums, part.sums.round())
    assert float(part.sums.abs().max()) > 2**20
