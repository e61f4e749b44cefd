"""Attributes of real people and films are read, are trained on, and change the scores."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from perfedrec import configure, load, train
from perfedrec.data import Attributes, Dataset

pytestmark = pytest.mark.real_data
FOLDER = Path(os.environ.get("PERFEDREC_TEST_DATA", "nowhere")) / "ml-100k"
SMALL = (
    "model.attributes=true",
    "model.embedding_dim=8",
    "selection.n_clients_per_round=32",
    "run.rounds=12",
    "run.evaluate_every=100",
    "pretraining.kind=none",
)


@pytest.fixture(scope="module")
def films() -> Dataset:
    if not FOLDER.is_dir():
        pytest.skip("PERFEDREC_TEST_DATA names no folder with ml-100k")
    return load(FOLDER)


def of(attributes: Attributes | None, place: int) -> set[str]:
    assert attributes is not None
    return {attributes.names[column] for column in np.flatnonzero(attributes.values[place])}


def test_who_people_are_and_what_films_are(films: Dataset) -> None:
    """Lines 1 and 900 of u.user: 24|M|technician and 60|M|retired; lines 1 and 50 of u.item: Toy Story, Star Wars."""
    train_set = films.train
    users, items = films.user_attributes, films.item_attributes
    assert of(users, train_set.user_index(1)) == {"gender=M", "occupation=technician", "age=18-24"}
    assert of(users, train_set.user_index(900)) == {"gender=M", "occupation=retired", "age=56 or over"}
    assert of(items, train_set.item_index(1)) == {"Animation", "Children's", "Comedy"}
    assert of(items, train_set.item_index(50)) == {"Action", "Adventure", "Romance", "Sci-Fi", "War"}


def scores(dataset: Dataset, *more: str) -> torch.Tensor:
    config = configure("recommended", overrides=[*SMALL, "personal.pretrained=0", "personal.neighbourhood=0", *more])
    result = train(config.build(), dataset, config.run)
    return result.recommender.scores(torch.arange(50))


def test_attributes_are_learned_from_and_reach_the_scores(films: Dataset) -> None:
    assert films.user_attributes is not None
    turned = replace(films.user_attributes, values=films.user_attributes.values[::-1].copy())
    with_them, without = scores(films), scores(films, "model.attributes=false")
    frozen = scores(films, "client.dense_learning_rate=0")
    of_others = scores(replace(films, user_attributes=turned))
    nobodys = scores(replace(films, item_attributes=None))
    seen = with_them > -torch.inf
    for other in (without, frozen, of_others, nobodys):
        assert float((with_them - other)[seen].abs().max()) > 1e-3
