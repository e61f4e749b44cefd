"""The result of a run: the recommender of its best round, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import torch

from perfedrec.core.errors import ConfigError
from perfedrec.data import Dataset
from perfedrec.data.interactions import Interactions, id_series
from perfedrec.evaluation import Held, Recommender, Totals
from perfedrec.evaluation.lists import check_length, explained
from perfedrec.methods.centralised.popularity import Popularity
from perfedrec.runs.config import Config, DataSettings, RunSettings, open_data
from perfedrec.runs.engine import Central, engine_of
from perfedrec.runs.folder import Entry, RunFolder
from perfedrec.runs.shared_model import SharedModel, open_federation

CUTOFFS = (10, 20)
"""Lengths of lists at which metrics are computed."""


@dataclass
class Result:
    """The recommender of the best validation round, and the history that led to it.

    ``best_round`` counts rounds of training: 0 and below are rounds of pre-training. ``valid`` has the validation
    metrics of that round, ``output`` is the run's folder, if there is one. ``basis`` says in a sentence what lists are
    made from where that is not the whole model: a federation's run has no users' own parts.
    """

    recommender: Recommender
    dataset: Dataset
    best_round: int
    valid: dict[str, float]
    history: list[Entry] = field(default_factory=list)
    output: Path | None = None
    basis: str = ""

    def evaluate(self, part: str = "test", ks: tuple[int, ...] = CUTOFFS) -> dict[str, float]:
        """Full-ranking metrics on the ``part`` "test" or "valid", as means over users.

        For "test", validation items are left out of the lists. Raises :class:`ConfigError` for another part.
        """
        wanted, hide = self._held(part)
        return self.recommender.evaluate(wanted, ks, hide)

    def rank(self, part: str = "test", ks: tuple[int, ...] = CUTOFFS) -> Totals:
        """The metrics of :meth:`evaluate` user by user."""
        wanted, hide = self._held(part)
        return self.recommender.rank(wanted, ks, hide)

    def evaluate_sampled(self, part: str = "test", n_negatives: int = 99, seed: int = 0) -> dict[str, float]:
        """Metrics of each held-out item among ``n_negatives`` sampled items, for comparison with papers that do so."""
        wanted, hide = self._held(part)
        return self.recommender.rank_sampled(wanted, CUTOFFS, hide, n_negatives, seed).means()

    def _held(self, part: str) -> tuple[Held, Held | None]:
        """The items to find, and those to leave out of the lists besides the training items."""
        if part not in ("valid", "test"):
            raise ConfigError(f"there is no part {part!r} to evaluate on; expected valid or test")
        valid = held_out(self.dataset.valid, self.recommender.device)
        return (held_out(self.dataset.test, self.recommender.device), valid) if part == "test" else (valid, None)

    def recommend(self, user_ids: Sequence[int | str] | None = None, k: int = 20) -> pl.DataFrame:
        """The ``k`` best unseen items of each user: columns user, item, rank, score.

        ``user_ids`` are those of the data set; ``None`` stands for all users. Raises
        :class:`perfedrec.core.errors.DataError` for an unknown user.
        """
        check_length(k)
        train = self.dataset.train
        users = torch.arange(train.n_users, device=self.recommender.device)
        if user_ids is not None:
            users = torch.tensor([train.user_index(each) for each in user_ids], dtype=torch.int64, device=users.device)
        items, scores = self.recommender.recommend(users, k)
        shown = scores > -torch.inf  # a user who has seen nearly everything gets a shorter list
        rows, places = shown.nonzero(as_tuple=True)
        user_index, item_index = users[rows].cpu().numpy(), items[rows, places].cpu().numpy()
        return pl.DataFrame(
            {
                "user": id_series(train.user_ids)[user_index],
                "item": id_series(train.item_ids)[item_index],
                "rank": (places + 1).cpu().numpy(),
                "score": scores[rows, places].cpu().numpy(),
            }
        )

    def explain(self, user_id: int | str, k: int = 20) -> pl.DataFrame:
        """:meth:`recommend` for one user, with the parts of each score.

        The columns ``local``, ``cluster``, ``global`` and, where it is mixed in, ``pretrained`` sum to the score.
        ``moved`` is the number of places by which the personal model ranks an item higher than the global model alone.
        """
        train = self.dataset.train
        users = torch.tensor([train.user_index(user_id)], device=self.recommender.device)
        own = id_series(train.user_ids)[users.tolist()]
        parts = {name: values[0] for name, values in self.recommender.explain(users).items()}
        frame = explained(self.recommender.scores(users)[0], parts, own[0], train.item_ids, k)
        return frame.select(pl.repeat(own[0], frame.height, dtype=own.dtype).alias("user"), pl.all())


def open_run(folder: Path, data: str | None = None, device: str | None = None) -> tuple[Result, Config]:
    """The result that a finished run stored, and its configuration.

    ``data`` names the data set where it has moved since, ``device`` the one to compute on (default: as in the
    configuration). The users of a federation are on its nodes: its shared model recommends to the users of any ``data``
    as to new users (:class:`perfedrec.runtimes.new_users.NewUserRecommender`).

    Raises :class:`perfedrec.core.errors.CheckpointError` where the folder has no model, or the data differ, and
    :class:`perfedrec.core.errors.DataError` where the data cannot be opened.
    """
    stored = RunFolder(folder)
    config = stored.config()
    if data is not None:
        moved = {"path": data, "train": None, "valid": None, "test": None}
        config = config.model_copy(update={"data": config.data.model_copy(update=moved)})
    run = config.run.model_copy(update={"device": device or config.run.device})
    if stored.is_federation:
        return _of_federation(open_federation(stored), config.data, run, folder), config
    dataset = open_data(config.data, config.attributes)
    loaded = stored.model({"data": dataset.fingerprint})
    recommender = engine_of(config.build(), dataset, run).recommender().restored(loaded.records)
    return Result(recommender, dataset, loaded.extra["best_round"], loaded.extra["valid"], output=folder), config


def _of_federation(model: SharedModel, data: DataSettings, run: RunSettings, folder: Path) -> Result:
    """The result of a federation for the users of the ``data``."""
    place = Path(data.path)
    dataset = model.over(open_data(data), place if place.is_dir() else place.parent)
    recommender = model.recommender(dataset, run.device)
    return Result(recommender, dataset, model.best_round, {}, output=folder, basis=model.basis(dataset))


def popularity(dataset: Dataset) -> dict[str, float]:
    """Test metrics of ranking by popularity, by the same evaluation: the floor that every result has to beat."""
    floor = Central(Popularity(), dataset, device="cpu")
    test, valid = (held_out(part, floor.device) for part in (dataset.test, dataset.valid))
    return floor.recommender().evaluate(test, CUTOFFS, valid)


def held_out(part: Interactions, device: torch.device) -> Held:
    """A part of the data as the evaluation takes it."""
    return Held.of(part.offsets, part.items, device)
