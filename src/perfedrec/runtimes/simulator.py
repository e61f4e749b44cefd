"""The simulator: all users of a data set in one process, and the recommender that a state gives."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from perfedrec.core.errors import ConfigError
from perfedrec.core.keys import Key
from perfedrec.core.records import copied
from perfedrec.core.types import Algorithm, Spec
from perfedrec.data import Dataset, Interactions
from perfedrec.evaluation import Held, Totals, mask_seen, rank_block
from perfedrec.runtimes.population import Population
from perfedrec.runtimes.round import RoundReport, play_round

RANKED_AT_ONCE = 512  # users; a score for each item takes memory


def pick_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """``auto`` takes CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device is cuda, but torch finds no CUDA device; expected auto or cpu on this machine")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def populate(dataset: Dataset, device: torch.device) -> Population:
    """The training users of a data set. Held-out interactions never enter it."""
    train, attributes = dataset.train, dataset.user_attributes
    own = None if attributes is None else torch.tensor(attributes.values, device=device)
    offsets = torch.tensor(train.offsets, device=device)
    return Population(offsets, torch.tensor(train.items, device=device), train.n_items, own)


class Recommender:
    """A served state with the memories of all users: evaluates and recommends with each user's personal model."""

    def __init__(self, algorithm: Algorithm[Any, Any, Any], state: Any, population: Population) -> None:
        self.algorithm, self.state, self.population = algorithm, state, population

    def scores(self, users: Tensor, *, hide: Held | None = None) -> Tensor:
        """[B, m] personal scores; training items, and the items of ``hide``, are minus infinity."""
        rows, positions = self.population.rows(users)
        memory = self.population.recall(users, positions)
        scores = self.algorithm.scores(self.algorithm.view(self.state, users), rows, memory)
        mask_seen(scores, rows.segments, rows.items)
        if hide is not None:
            segments, items = hide.rows(users)
            mask_seen(scores, segments, items)
        return scores

    def explain(self, users: Tensor) -> dict[str, Tensor]:
        """The parts [B, m] that each model has in the scores, for algorithms that mix several."""
        rows, positions = self.population.rows(users)
        memory = self.population.recall(users, positions)
        parts: dict[str, Tensor] = self.algorithm.explain(self.algorithm.view(self.state, users), rows, memory)
        return parts

    def recommend(self, users: Tensor, k: int, block_size: int = RANKED_AT_ONCE) -> tuple[Tensor, Tensor]:
        """Items [B, k] not seen in training, best first, and their scores [B, k]."""
        ranked = [rank_block(self.scores(block), k) for block in users.split(block_size)]
        return torch.cat([items for _, items in ranked]), torch.cat([values for values, _ in ranked])

    def evaluate(
        self, held: Held, ks: tuple[int, ...] = (10, 20), hide: Held | None = None, block_size: int = RANKED_AT_ONCE
    ) -> dict[str, float]:
        """Full-ranking metrics over all items unseen in training (and not in ``hide``)."""
        totals, everyone = Totals(ks, self.population.n_items), self.population.everyone()
        by_group = self.algorithm.groups(self.state, everyone).argsort(stable=True)  # tables are made once for a group
        for users in everyone[by_group].split(block_size):
            _, lists = rank_block(self.scores(users, hide=hide), max(ks))
            totals.add(held.hits(users, lists, self.population.n_items), held.counts(users), lists)
        return totals.means()


class Simulator:
    """An algorithm at work on a data set: plays rounds and gives the recommender of the moment."""

    def __init__(
        self,
        algorithm: Algorithm[Any, Any, Any],
        dataset: Dataset,
        *,
        seed: int = 0,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        block_size: int = 1024,
        dropout_rate: float = 0.0,
    ) -> None:
        self.algorithm, self.seed, self.block_size, self.dropout_rate = algorithm, seed, block_size, dropout_rate
        self.device = pick_device(device)
        self.population = populate(dataset, self.device)
        self.held = {"valid": held(dataset.valid, self.device), "test": held(dataset.test, self.device)}
        items, users = dataset.item_attributes, dataset.user_attributes
        spec = Spec(
            n_users=dataset.n_users,
            n_items=dataset.n_items,
            item_degrees=torch.tensor(dataset.train.item_degrees, device=self.device),
            n_user_attributes=0 if users is None else users.values.shape[1],
            item_attributes=None if items is None else torch.tensor(items.values, device=self.device),
        )
        self.state = algorithm.init(spec, Key(seed).fold("init"))
        self.population.found(algorithm, seed)

    def play(self) -> RoundReport:
        """Play the next round."""
        self.state, report = play_round(
            self.algorithm, self.state, self.population, self.seed, self.dropout_rate, self.block_size
        )
        return report

    def recommender(self) -> Recommender:
        """The recommender of the moment; it shares storage with the simulator and changes with it."""
        return Recommender(self.algorithm, self.algorithm.serving(self.state), self.population)

    def frozen(self) -> Recommender:
        """A copy of the recommender of the moment that later rounds leave alone."""
        live = self.recommender()
        population = Population(live.population.offsets, live.population.items, live.population.n_items)
        population.attributes, population.memory = live.population.attributes, copied(live.population.memory)
        return Recommender(live.algorithm, copied(live.state), population)


def held(interactions: Interactions, device: torch.device) -> Held:
    """Held-out interactions for evaluation."""
    return Held(torch.tensor(interactions.offsets, device=device), torch.tensor(interactions.items, device=device))
