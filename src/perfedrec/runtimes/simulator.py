"""The simulator: all users of a data set in one process, and the recommender that results from a state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Generic, Literal

import torch
from torch import Tensor

from perfedrec.core.aggregate import reduce
from perfedrec.core.algorithm import Algorithm, B, C, S
from perfedrec.core.device import pick_device
from perfedrec.core.errors import ConfigError
from perfedrec.core.keys import Key
from perfedrec.core.mapped import as_tensor
from perfedrec.core.memory import give_back
from perfedrec.core.records import copied, set_aside, unflatten
from perfedrec.core.scoring import Scoring
from perfedrec.core.types import Embedding, RoundReport, Rows, Spec, Update
from perfedrec.data import Dataset
from perfedrec.evaluation import Held, RandomOrder, Recommender, Stored, Totals
from perfedrec.runtimes.cluster import Machines, OnWorkers
from perfedrec.runtimes.evaluation import Question, Wanted, best_of, evaluate_users
from perfedrec.runtimes.new_users import NewUserRecommender, unknown
from perfedrec.runtimes.population import Population
from perfedrec.runtimes.round import Clients, InProcess, RoundTask, play_with


def populate(dataset: Dataset, device: torch.device) -> Population[C]:
    """The training users of a data set. Held-out interactions never enter the population."""
    train, attributes = dataset.train, dataset.user_attributes
    own = None if attributes is None else torch.tensor(attributes.values, device=device)
    return Population(as_tensor(train.offsets, device), as_tensor(train.items, device), train.n_items, own)


def _absent(dataset: Dataset, device: torch.device) -> Tensor | None:
    """[n] whether each user was forgotten; ``None`` where nobody was."""
    if not dataset.forgotten:
        return None
    absent = torch.zeros(dataset.n_users, dtype=torch.bool, device=device)
    absent[list(dataset.forgotten)] = True
    return absent


class PersonalRecommender(Recommender, Generic[S, B, C]):
    """A served state with the client states of all users: it recommends with each user's personal model. ``order`` is
    that of :class:`Recommender`."""

    def __init__(
        self, algorithm: Algorithm[S, B, C], state: S, population: Population[C], order: RandomOrder | None = None
    ) -> None:
        super().__init__(population.offsets, population.items, population.n_items, order)
        self.algorithm, self.state, self.population = algorithm, state, population

    def raw_scores(self, users: Tensor) -> Tensor:
        broadcast, rows, client_state = self.given(users)
        return self.algorithm.scores(broadcast, rows, client_state)

    def scoring(self, users: Tensor) -> Scoring:
        return self.algorithm.scoring(*self.given(users))

    @property
    def ranked_at_once(self) -> int:
        return self.algorithm.ranked_at_once

    def explain(self, users: Tensor) -> dict[str, Tensor]:
        return self.algorithm.explain(*self.given(users))

    def embedding(self, users: Tensor) -> Embedding | None:
        return self.algorithm.embedding(*self.given(users))

    def for_new_users(
        self, offsets: Tensor, items: Tensor, order: RandomOrder | None = None
    ) -> NewUserRecommender[S, B, C]:
        others = unknown(self.population, offsets, items)
        return NewUserRecommender(self.algorithm, self.state, others, 0, order)

    def given(self, users: Tensor) -> tuple[B, Rows, C]:
        """Broadcast, rows and client states of ``users`` [B]."""
        rows, positions = self.population.rows(users)
        return self.algorithm.broadcast(self.state, users), rows, self.population.load_client_states(users, positions)

    def everyone(self) -> Tensor:
        everyone = super().everyone()
        alike = self.algorithm.ranked_alike(self.state, everyone)
        return everyone[alike.argsort(stable=True)] if bool((alike != alike[:1]).any()) else everyone

    def records(self) -> dict[str, Any]:
        return {"state": self.state, "memory": self.population.stored()}

    def with_records(self, records: Mapping[str, Any]) -> PersonalRecommender[S, B, C]:
        population = self.population.with_client_states(records["memory"])
        return PersonalRecommender(self.algorithm, records["state"], population, self.order)

    def kept(self) -> dict[str, Any]:
        return {"state": self.state, "memory": self.population.segments()}

    def frozen(self) -> PersonalRecommender[S, B, C]:
        return self.with_records(self.kept() | {"state": set_aside(self.state)})

    def restored(self, stored: Stored) -> PersonalRecommender[S, B, C]:
        state = copied(unflatten(type(self.state), *stored["state"]), self.device)
        return self.with_records({"state": state, "memory": stored["memory"][0]})


class Simulator(Generic[S, B, C]):
    """Trains an algorithm on the training part of a data set: plays rounds, and returns a recommender at any time.

    The simulator does not keep held-out interactions, so that nothing that runs in it can reach them. A round of little
    work is played on one thread, unless a number of ``threads`` is given, which is that of torch.
    """

    def __init__(
        self,
        algorithm: Algorithm[S, B, C],
        dataset: Dataset,
        *,
        seed: int = 0,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        block_size: int = 1024,
        dropout_rate: float = 0.0,
        users_per_node: int = 1,
        threads: int = 0,
    ) -> None:
        self.algorithm, self.seed, self.block_size, self.dropout_rate = algorithm, seed, block_size, dropout_rate
        self.device, self.few_threads = pick_device(device), not threads
        self.population: Population[C] = populate(dataset, self.device)
        self.order = RandomOrder(dataset.train.user_ids, dataset.train.item_ids)
        self.absent = _absent(dataset, self.device)
        items, users = dataset.item_attributes, dataset.user_attributes
        spec = Spec(
            n_users=dataset.n_users,
            n_items=dataset.n_items,
            item_degrees=torch.tensor(dataset.train.item_degrees, device=self.device),
            n_user_attributes=0 if users is None else users.values.shape[1],
            item_attributes=None if items is None else torch.tensor(items.values, device=self.device),
        )
        self.state = algorithm.init(spec, Key(seed).fold("init"))
        self.population.init_clients(algorithm, seed)
        self.nodes = None if users_per_node == 1 else self.population.everyone() // users_per_node
        self.clients: Clients[C] = InProcess(algorithm, self.population, block_size, self.nodes)

    def spread(self, machines: Machines) -> None:
        """Let workers on several ``machines`` compute the rounds from the first one on. The results are the same, bit
        for bit. :meth:`close` ends the workers.

        Raises :class:`ConfigError` and :class:`PerfedrecError` as :class:`perfedrec.runtimes.cluster.OnWorkers` does.
        """
        if self.device.type != "cpu":
            raise ConfigError("run.workers compute on processors; expected run.device = cpu")
        workers = OnWorkers(self.algorithm, self.population, self.seed, machines, self.nodes)
        self.clients, self.population = workers, workers.population

    def keep(self, keep: Callable[[RoundTask[Any], Update], None]) -> None:
        """Let a function receive what leaves the clients in each round from now on, block by block.

        Raises :class:`ConfigError` where workers do the clients' work.
        """
        if not isinstance(self.clients, InProcess):
            raise ConfigError("uploads are kept where this process does the clients' work; expected run.workers = 0")
        self.clients = replace(self.clients, keep=keep)

    def let_go(self) -> None:
        """Let go of the state and of the client states. No round can be played afterwards."""
        del self.state
        self.population.let_go()

    def close(self) -> None:
        """End the workers, where there are any."""
        self.clients.close()

    def play(self) -> RoundReport:
        """Play the next round."""
        before_training = self.state.round < self.n_phases
        self.state, report = play_with(
            self.clients, self.algorithm, self.state, self.seed, self.dropout_rate, self.few_threads, self.absent
        )
        if before_training:  # such a phase may have taken much memory
            give_back()
        return report

    def evaluate(self, held: Held, ks: tuple[int, ...], metric: str) -> Totals:
        """How well the model ranks the items that users have ``held`` out: the metrics at the cut-offs ``ks`` as means
        over these users, and the coverage.

        Where the method has several settings, users choose between them by the ``metric``, by sums over users as nodes
        do, and the figures are those of the chosen one.
        """
        recommender, question = self.recommender(), Question("valid", ks, self.state.round)
        n_items, everyone = self.population.n_items, recommender.everyone()
        nothing = Held(torch.zeros_like(held.offsets), held.items[:0])
        wanted, total = Wanted(held, nothing, self.order, ks), question.empty(self.algorithm, n_items)
        totals = [Totals(ks, n_items) for _ in range(question.n_choices(self.algorithm))]
        for users in everyone[held.counts(everyone) > 0].split(recommender.ranked_at_once):
            if not users.numel():
                return totals[0]  # nobody counts, and nothing is chosen
            update, found = evaluate_users(self.algorithm, *recommender.given(users), users, wanted, len(totals))
            total = total + reduce(update, n_items, 1)
            for each, (values, lists) in zip(totals, found, strict=True):
                each.add_values(values, lists, users)
        number = best_of(question.means(total), metric)
        self.state = self.algorithm.choose(self.state, number)
        return totals[number]

    @property
    def n_phases(self) -> int:
        """The number of rounds before training."""
        return len(self.algorithm.phases)

    def recommender(self) -> PersonalRecommender[S, B, C]:
        """The recommender of the current state. It shares storage with the simulator and changes with it."""
        return PersonalRecommender(self.algorithm, self.algorithm.serving(self.state), self.population, self.order)

    def records(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"state": self.state, "memory": self.population.segments()}

    def restore(self, stored: Stored, rounds: int) -> None:
        """Continue from the records of a checkpoint, which was taken after ``rounds`` rounds."""
        self.state = copied(unflatten(type(self.state), *stored["state"]), self.device)
        self.population.restore(stored["memory"][0])
