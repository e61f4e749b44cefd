"""What a run knows, as data frames: its history, metrics by user, and vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import polars as pl
import torch

from perfedrec.core.algorithm import TRAIN
from perfedrec.core.errors import ConfigError
from perfedrec.data import Interactions
from perfedrec.data.interactions import id_series
from perfedrec.evaluation import Recommender, Totals
from perfedrec.runs.folder import Entry

USERS_AT_ONCE = 4096


def curves(history: Sequence[Entry]) -> pl.DataFrame:
    """A row per round: ``round``, which counts rounds of training (0 and below: before training), the columns of
    ``metrics.jsonl`` (see ``docs/runs.md``), and a column for each validation metric, null where it was not computed.
    """
    n_phases = sum(entry.report.phase != TRAIN.name for entry in history)
    names = sorted({name for entry in history for name in entry.valid or ()})
    rows = [
        {
            **asdict(entry.report),
            "round": entry.report.round + 1 - n_phases,
            "seconds": entry.seconds,
            **{name: (entry.valid or {}).get(name) for name in names},
        }
        for entry in history
    ]
    kinds: dict[str, Any] = {"phase": pl.String, "aborted": pl.String}
    kinds |= dict.fromkeys(("loss", "seconds", *names), pl.Float64)
    return pl.DataFrame(rows, infer_schema_length=None, schema_overrides=kinds)


def by_user(ranked: Totals, known: Interactions) -> pl.DataFrame:
    """The metrics of each ranked user: columns user, interactions (in the training data, or ``known`` of new users) and
    one for each metric."""
    if not ranked.users:
        return pl.DataFrame({"user": id_series(known.user_ids)[:0], "interactions": pl.Series([], dtype=pl.Int64)})
    users, values = ranked.by_user()
    index = users.cpu().numpy()
    columns = {"user": id_series(known.user_ids)[index], "interactions": known.degrees[index]}
    return pl.DataFrame(columns | {name: value.cpu().numpy() for name, value in values.items()})


def vectors(recommender: Recommender, train: Interactions, side: Literal["user", "item"]) -> pl.DataFrame:
    """The vectors of all users or of all items, with their ids: columns ``side`` and vector."""
    blocks = torch.arange(train.n_users, device=recommender.device).split(USERS_AT_ONCE)
    found = [recommender.embedding(block) for block in (blocks if side == "user" else blocks[:1])]
    known = [each for each in found if each is not None]
    if not known:
        raise ConfigError(
            "this method has no vectors of users and items whose products are its scores; expected a method with "
            "vectors, for example mf, lightgcn or perfedrec_pp"
        )
    table = torch.cat([each.users for each in known]) if side == "user" else known[0].items
    ids = train.user_ids if side == "user" else train.item_ids
    return pl.DataFrame({side: id_series(ids), "vector": table.detach().cpu().numpy()})
