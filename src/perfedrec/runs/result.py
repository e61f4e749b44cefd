"""The result of a run: the recommender of its best round, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import SupportsInt

import polars as pl
import torch

from perfedrec.core.errors import CheckpointError, ConfigError, DataError, check_length
from perfedrec.core.nearest import nearest
from perfedrec.data import DataLike, Dataset
from perfedrec.data.interactions import Interactions, id_series
from perfedrec.evaluation import Held, RandomOrder, Recommender, Totals
from perfedrec.evaluation.lists import explained
from perfedrec.evaluation.ranking import CUTOFFS, Cutoffs, cutoffs
from perfedrec.evaluation.sample import ERROR, of_sample, sample_of, share_of
from perfedrec.methods.centralised.method import order_of
from perfedrec.methods.centralised.popularity import Popularity
from perfedrec.runs.config import Config
from perfedrec.runs.data_settings import MEMORY
from perfedrec.runs.engine import Central, engine_of
from perfedrec.runs.folder import Entry, RunFolder
from perfedrec.runs.request import data_of
from perfedrec.runs.shared_model import open_federation
from perfedrec.runs.summary import Summary
from perfedrec.runs.tables import by_user, curves, vectors


@dataclass(repr=False)
class Result:
    """The recommender of the best validation round, and the history that led to it.

    ``best_round`` counts rounds of training: 0 and below are rounds of pre-training. ``valid`` has the validation
    metrics of that round, ``output`` is the run's folder, if there is one. ``basis`` says in a sentence what lists are
    made from where that is not the whole model: a federation's run has no users' own parts. ``config`` is the
    configuration. Metrics are at the cut-offs ``ks``, one or several; by default these are the run's.
    """

    recommender: Recommender
    dataset: Dataset
    best_round: int
    valid: dict[str, float]
    history: list[Entry] = field(default_factory=list)
    output: Path | None = None
    basis: str = ""
    config: Config | None = None

    def __repr__(self) -> str:
        name = "" if self.config is None else f" of {self.config.algorithm}"
        best = "".join(f", {key} {self.valid[key]:.4f}" for key in ("recall@20", "ndcg@20") if key in self.valid)
        where = "" if self.output is None else f", in {self.output}"
        return f"<Result{name} on {self.dataset.name}: best round {self.best_round}{best and best + ' (valid)'}{where}>"

    def evaluate(self, part: str = "test", ks: Cutoffs | None = None) -> dict[str, float]:
        """Full-ranking metrics on the ``part`` "test" or "valid" at the cut-offs ``ks``, one or several, as means over
        users.

        ``ks`` is one length of lists or several (default: those of the run). For "test", validation items are left out
        of the lists; users who are held out from training as a whole are served as new users, see
        :meth:`recommend_for`. Raises :class:`ConfigError` for another part, and for lengths below 1.
        """
        return self.means_of(self.rank(part, ks), part)

    @property
    def test_share(self) -> float:
        """The share of the users on whom the model is tested: less than 1 where there are more than
        ``run.test_users``."""
        wanted = 0 if self.config is None else self.config.run.test_users
        return share_of(self.dataset.tested_users.n_users, wanted)

    def means_of(self, ranked: Totals, part: str = "test") -> dict[str, float]:
        """The means of what was ``ranked``, with a standard error where it was a sample of the users."""
        found = ranked.means()
        if part == "test" and self.test_share < 1 and ranked.users and self.config is not None:
            metric = self.config.run.select_by
            if metric in found:
                found[ERROR] = ranked.standard_error(metric, self.test_share)
        return found

    def rank(self, part: str = "test", ks: Cutoffs | None = None) -> Totals:
        """The metrics of :meth:`evaluate` as sums, with the values of each user."""
        recommender, wanted, hide = ranking(self.recommender, self.dataset, part, self.test_share)
        return recommender.rank(wanted, self.cutoffs(ks), hide)

    def per_user(self, part: str = "test", ks: Cutoffs | None = None) -> pl.DataFrame:
        """The metrics of :meth:`evaluate` user by user: columns user, interactions (in the training data; of new users,
        the known ones) and one for each metric. Users without held-out items are left out."""
        return by_user(self.rank(part, ks), self.dataset.tested_users if part == "test" else self.dataset.train)

    def summary(self) -> Summary:
        """What the run says about itself: test metrics, bytes, and under ``privacy`` who saw what and what may be
        claimed. Raises :class:`ConfigError` for a run without a folder."""
        if self.output is None:
            raise ConfigError("a run has a summary where it is written to a folder; expected train(..., output=FOLDER)")
        return RunFolder(self.output).summary()

    def curves(self) -> pl.DataFrame:
        """The history of the run, with one row per round: see :func:`perfedrec.runs.tables.curves`."""
        return curves(self.history)

    @property
    def user_vectors(self) -> pl.DataFrame:
        """The vectors of all users, whose products with :attr:`item_vectors` are the scores (of the global model, where
        several models are mixed): columns user and vector. ``frame["vector"].to_numpy()`` is an array [n, d].

        Raises :class:`ConfigError` for a method that has no such vectors.
        """
        return vectors(self.recommender, self.dataset.train, "user")

    @property
    def item_vectors(self) -> pl.DataFrame:
        """The vectors of all items: columns item and vector. Otherwise like :attr:`user_vectors`."""
        return vectors(self.recommender, self.dataset.train, "item")

    def evaluate_sampled(
        self, part: str = "test", n_negatives: int = 99, seed: int = 0, ks: Cutoffs | None = None
    ) -> dict[str, float]:
        """Metrics of each held-out item among ``n_negatives`` sampled items, for comparison with papers that do so."""
        return self.rank_sampled(part, n_negatives, seed, ks).means()

    def rank_sampled(
        self, part: str = "test", n_negatives: int = 99, seed: int = 0, ks: Cutoffs | None = None
    ) -> Totals:
        """The metrics of :meth:`evaluate_sampled` case by case, and how many negatives there were."""
        recommender, wanted, hide = ranking(self.recommender, self.dataset, part, self.test_share)
        return recommender.rank_sampled(wanted, self.cutoffs(ks), hide, n_negatives, seed)

    def cutoffs(self, ks: Cutoffs | None = None) -> tuple[int, ...]:
        """The cut-offs ``ks`` as a tuple; by default those of the run."""
        if ks is not None:
            return cutoffs(ks)
        return CUTOFFS if self.config is None else self.config.run.cutoffs

    def recommend(self, user_ids: int | str | Iterable[int | str] | None = None, k: int = 20) -> pl.DataFrame:
        """The ``k`` best unseen items of each user: columns user, item, rank, score.

        ``user_ids`` is one id of the data set or several; ``None`` stands for all users. Raises
        :class:`perfedrec.core.errors.DataError` for an unknown user.
        """
        check_length(k)
        if isinstance(user_ids, SupportsInt | str):
            user_ids = [user_ids]
        train = self.dataset.train
        users = torch.arange(train.n_users, device=self.recommender.device)
        if self.dataset.forgotten:
            users = users[~torch.isin(users, users.new_tensor(self.dataset.forgotten))]
        if user_ids is not None:
            users = torch.tensor([self._user(each) for each in user_ids], dtype=torch.int64, device=users.device)
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

    def _user(self, user_id: int | str) -> int:
        """The number of a user of training. Raises :class:`DataError` for others."""
        new = self.dataset.new_users
        if new is not None and str(user_id) in map(str, new.user_ids.tolist()):
            raise DataError(
                f"user {user_id!r} is held out from training; expected a user of training (in Python, "
                "recommend_for(items) is for others)"
            )
        number = self.dataset.train.user_index(user_id)
        if number in self.dataset.forgotten:
            raise DataError(f"user {user_id!r} was forgotten (data.forgotten); expected another user")
        return number

    def recommend_for(self, item_ids: Iterable[int | str], k: int = 20) -> pl.DataFrame:
        """The ``k`` best items for somebody who was not in training and has the items ``item_ids``: columns item, rank,
        score.

        The order of the items counts for a sequential method: oldest first, and each once. A federated method
        fine-tunes for this user as a node does; nothing of it is kept. Attributes of the user are not known. Raises
        :class:`perfedrec.core.errors.DataError` for an unknown item and without any item, and :class:`ConfigError` for
        a method that knows the users of its training alone (UserKNN does not).
        """
        check_length(k)
        train, given = self.dataset.train, [item_ids] if isinstance(item_ids, str) else item_ids
        numbers = list(dict.fromkeys(train.item_index(each) for each in given))
        own = torch.tensor(numbers if self.recommender.sequential else sorted(numbers), dtype=torch.int64)
        if not own.numel():
            raise DataError("there is no item to recommend by; expected at least one item that the user has")
        own = own.to(self.recommender.device)
        scores = self.recommender.scores_of_new_user(own)
        scores[own] = -torch.inf
        frame = explained(scores, {"global": scores.clone()}, "", train.item_ids, k)
        return frame.select("item", "rank", "score")

    def save(self, folder: str | Path) -> Path:
        """Write the run to a new or empty ``folder``, as training with ``output`` does, and return the folder.

        A run that has a folder is copied, without its checkpoints. Otherwise the test split is ranked now, and
        ``diagnostics.json`` has the best round alone. Raises :class:`ConfigError` for a folder that is not empty.
        """
        from perfedrec.runs.writer import save  # the writer of runs imports this module

        save(self, Path(folder))
        return Path(folder)

    @staticmethod
    def load(folder: str | Path, data: DataLike | None = None, device: str | None = None) -> Result:
        """The result that a run stored in a folder: :func:`open_run` without the configuration."""
        return open_run(folder, data, device)[0]

    def explain(self, user_id: int | str, k: int = 20) -> pl.DataFrame:
        """:meth:`recommend` for one user, with the parts of each score.

        The columns ``local``, ``cluster``, ``global`` and, where it is mixed in, ``pretrained`` sum to the score.
        ``moved`` is the number of places by which the personal model ranks an item higher than the global model alone.
        """
        train = self.dataset.train
        users = torch.tensor([self._user(user_id)], device=self.recommender.device)
        own = id_series(train.user_ids)[users.tolist()]
        parts = {name: values[0] for name, values in self.recommender.explain(users).items()}
        frame = explained(self.recommender.scores(users)[0], parts, own[0], train.item_ids, k)
        return frame.select(pl.repeat(own[0], frame.height, dtype=own.dtype).alias("user"), pl.all())


def open_run(folder: str | Path, data: DataLike | None = None, device: str | None = None) -> tuple[Result, Config]:
    """The result that a finished run stored, and its configuration.

    ``data`` are needed where they have moved since, or were given in Python; ``device`` is the one to compute on
    (default: as in the configuration). The users of a federation are on its nodes: its shared model recommends to the
    users of any ``data`` as to new users (:class:`perfedrec.runtimes.new_users.NewUserRecommender`).

    Raises :class:`perfedrec.core.errors.CheckpointError` where the folder has no model, or the data differ, and
    :class:`perfedrec.core.errors.DataError` where the data cannot be opened, or are in no file and not given.
    """
    stored = RunFolder(Path(folder))
    config = stored.config()
    try:
        dataset, config = data_of(data, config)
    except DataError as error:
        if data is not None or stored.is_federation or config.data.path == MEMORY:  # the message says what to give
            raise
        problem = f"the data of the run {folder} cannot be opened: {error}"
        raise DataError(f"{problem}; if they lie elsewhere now, name them by --data") from None
    run = config.run.model_copy(update={"device": device or config.run.device})
    if stored.is_federation:
        model = open_federation(stored)
        place = Path(config.data.path)
        dataset = model.over(dataset, place if place.is_dir() else place.parent)
        recommender: Recommender = model.recommender(dataset, run.device)
        basis = model.basis(dataset)
        return Result(recommender, dataset, model.best_round, {}, stored.history(), stored.path, basis, config), config
    loaded = stored.model({})
    if loaded.belongs.get("data") != dataset.fingerprint:
        raise CheckpointError(
            f"{folder}: foreign checkpoint: it was made with another data set than {dataset.name}; expected --data "
            "with the data of the run (in Python: open_run(folder, data=...))"
        )
    recommender = engine_of(config.build(), dataset, run).recommender().restored(loaded.records)
    best = (loaded.extra["best_round"], loaded.extra["valid"])
    return Result(recommender, dataset, *best, stored.history(), stored.path, config=config), config


def popularity(dataset: Dataset, ks: tuple[int, ...] = CUTOFFS, share: float = 1.0) -> dict[str, float]:
    """Test metrics of ranking by popularity, by the same evaluation of the same ``share`` of the users: the floor that
    every result has to beat."""
    floor, test, hide = ranking(Central(Popularity(), dataset, device="cpu").recommender(), dataset, "test", share)
    return floor.evaluate(test, ks, hide)


def ranking(
    recommender: Recommender, dataset: Dataset, part: str, share: float = 1.0
) -> tuple[Recommender, Held, Held | None]:
    """What ranks a ``part`` "valid" or "test" of the data, the items to find, and those to leave out of the lists
    besides the training items. A ``share`` of the users below 1 is tested, a fixed sample.

    It is the ``recommender``, or the same model for new users where the tested users are not in training. Raises
    :class:`ConfigError` for another part.
    """
    if part not in (parts := ("valid", "test")):
        raise ConfigError(f"there is no part {part!r} to evaluate on; expected valid or test{nearest(part, parts)}")
    place, new = recommender.device, dataset.new_users
    valid = held_out(dataset.valid, place)
    if part == "valid":
        return recommender, valid, None
    test = held_out(dataset.test, place)
    if share < 1:
        test = of_sample(test, sample_of(dataset.tested_users.user_ids, share).to(place))
    if new is None:
        return recommender, test, valid
    order = RandomOrder(new.user_ids, new.item_ids)
    rows = order_of(dataset.name, new) if recommender.sequential else slice(None)
    offsets, items = (torch.tensor(each, device=place) for each in (new.offsets, new.items[rows]))
    return recommender.for_new_users(offsets, items, order), test, None


def held_out(part: Interactions, device: torch.device) -> Held:
    """A part of the data as the evaluation takes it."""
    return Held.of(part.offsets, part.items, device)
