"""The section ``[run]`` of a configuration: how long a run takes, how it is evaluated, and where it computes."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from perfedrec.core.errors import ConfigError
from perfedrec.core.nearest import nearest
from perfedrec.core.settings import Settings
from perfedrec.evaluation.ranking import CUTOFFS, METRICS, cutoffs, cutoffs_of


def _metric(name: str) -> str:
    kind, _, k = name.partition("@")
    length = k if re.fullmatch("[1-9][0-9]{0,8}", k) else ""
    if kind not in METRICS or not length:
        near = nearest(name, [f"{each}@{length or 20}" for each in METRICS]) if kind not in METRICS else ""
        raise ValueError(f"expected one of {', '.join(METRICS)} with the length of the list, such as recall@20{near}")
    return name


Metric = Annotated[str, AfterValidator(_metric)]
"""The name of a metric by which a run can be selected or compared."""


class RunSettings(Settings):
    """How long a run takes and where it computes."""

    rounds: int = Field(500, ge=0, description="rounds of training, after the rounds of pre-training")
    patience: int = Field(
        0, ge=0, description="rounds of training without a better validation figure that end a run early (0: never)"
    )
    seed: int = Field(0, ge=0, description="seed of everything random in training")
    evaluate_every: int = Field(10, ge=1, description="rounds between two evaluations on validation data")
    evaluate_users: int = Field(
        20_000,
        ge=0,
        description="users who validate, about: a fixed sample where there are more (0: all)",
    )
    test_users: int = Field(
        200_000,
        ge=0,
        description="users on whom a simulation tests the finished model, about: a fixed sample where there are more "
        "(0: all)",
    )
    ks: tuple[int, ...] = Field(CUTOFFS, description="lengths of lists at which metrics are computed, as in 5,10,20")
    select_by: Metric = Field(
        "recall@20", description="validation metric that selects the best round; its length is added to run.ks"
    )
    checkpoint_every: int = Field(50, ge=1, description="rounds between two checkpoints")
    sampled_negatives: int = Field(
        0,
        ge=0,
        description="also test each held-out item among this number of random negatives, as some papers do (0: no)",
    )
    keep_uploads: bool = Field(
        False,
        description="keep every upload in the run folder, for perfedrec forget --method resum; of a federation, what "
        "each node sent, for perfedrec federation forget --replay",
    )
    dropout_rate: float = Field(0.0, ge=0, le=1, description="share of a cohort that drops out of a round")
    users_per_node: int = Field(
        1, ge=1, description="users on each node, where bytes are counted as nodes send them; changes nothing else"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where tensors live")
    block_size: int = Field(1024, ge=1, description="clients computed at once; bounds memory, changes no result")
    threads: int = Field(
        0,
        ge=0,
        description="threads of the numerical library (0: its default, but 1 for rounds of little work and for a "
        "coordinator); changes no result",
    )
    workers: int = Field(
        0, ge=0, description="processes of a Ray cluster that do the clients' work (0: this one); changes no result"
    )
    cluster: str = Field(
        "", description="HOST:PORT of the head of a Ray cluster for the workers (empty: a Ray of its own, here)"
    )

    @field_validator("cluster")
    @classmethod
    def _address(cls, cluster: str) -> str:
        if cluster and not re.fullmatch(r"[^\s/@]+:[0-9]{1,5}", cluster):
            raise ValueError("expected HOST:PORT, as in 10.0.0.1:6379")
        return cluster

    @field_validator("ks", mode="before")
    @classmethod
    def _several(cls, ks: Any) -> Any:
        """A number, or numbers between commas, as a list; ascending and each once."""
        given = ks.split(",") if isinstance(ks, str) else ks
        try:
            return cutoffs(
                [
                    int(each) if isinstance(each, str) else each
                    for each in ([given] if isinstance(given, int) else given)
                ]
            )
        except (ConfigError, ValueError, TypeError):
            raise ValueError("expected whole numbers from 1, such as 5,10,20") from None

    @property
    def cutoffs(self) -> tuple[int, ...]:
        """The lengths of lists at which metrics are computed: ``ks``, and the one that selects the best round."""
        return cutoffs((*self.ks, *cutoffs_of([self.select_by])))
