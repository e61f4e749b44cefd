"""Pre-training with the losses of centralised graph methods, and the items' contrast that goes on in training."""

from typing import Any, get_args

import pytest
import torch
from tests.methods.federated.toys import SEED, World, settings, world

from perfedrec.core.errors import ConfigError
from perfedrec.core.types import Rows
from perfedrec.methods.centralised.method import Training
from perfedrec.methods.federated.contrastive import crowding
from perfedrec.methods.federated.graph_losses import LOSSES, graph_loss
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.methods.federated.settings import PretrainingSettings
from perfedrec.nn.losses import uniformity
from perfedrec.nn.propagation import Bipartite
from perfedrec.runtimes.round import round_key


def pretrained(kind: str, **changes: Any) -> World:
    """After the phase in which the service receives edges and trains on them."""
    given = {"pretraining__kind": kind, "pretraining__epochs": 2, "clusters__n_clusters": 0, **changes}
    here = world(**given)
    here.play(1)
    return here


def test_kinds_of_the_settings_are_those_that_exist() -> None:
    kinds = get_args(PretrainingSettings.model_fields["kind"].annotation)
    assert set(kinds) == {"none", "contrastive", "spectral", *LOSSES}


@pytest.mark.parametrize("kind", LOSSES)
def test_the_table_is_that_of_the_centralised_method_on_the_edges(kind: str) -> None:
    """Nothing is protected here, and no view leaves users out: the edges are all interactions, with tokens for
    items."""
    here = pretrained(kind, pretraining__node_dropout=0.0)
    rows, tokens = here.population.rows(here.population.everyone())[0], here.state.tokens
    named = tokens[rows.items]
    graph = Bipartite.of(rows.segments, named, 30, 24)
    ordered = named[(rows.segments * 24 + named).argsort()]
    data = Training(Rows(rows.users, rows.offsets, ordered, rows.segments), 24, views=(graph, graph))
    options = here.algorithm.settings
    method = graph_loss(options.pretraining, options.model.embedding_dim)
    assert type(method) is LOSSES[kind]
    key = round_key(SEED, 0).fold("server").fold("contrast")
    state = method.init(data, key.fold("init"))
    for epoch in range(2):
        state, _ = method.epoch(state, data, key.fold("epoch", epoch))
    scale = options.model.init_scale / state.items.std()
    torch.testing.assert_close(here.state.items, state.items[tokens] * scale, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(here.state.service.start, state.users * scale, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("xsimgcl", {"epochs": 3}),
        ("xsimgcl", {"options": {"weight": 0.9}}),
        ("ncl", {"options": {"learning_rate": 0.02}}),
        ("sgl", {"edge_perturbation": False}),  # a view without protection of its own
        ("sgl", {"node_dropout": 0.5}),
        ("simgcl", {"node_dropout": 0.5}),
    ],
    ids=str,
)
def test_each_option_changes_the_table(kind: str, change: dict[str, Any]) -> None:
    protected = {"privacy__pseudo_items": 0.3, "privacy__masking": 0.2}
    changed = {f"pretraining__{name}": value for name, value in change.items()}
    tables = [pretrained(kind, **protected, **more).state.items for more in ({}, changed)]
    assert float((tables[0] - tables[1]).abs().max()) > 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kind": "xsimgcl", "options": {"wait": 0.1}},
            r"pretraining\.options\.wait is no option of xsimgcl; .*; did you mean weight\?",
        ),
        ({"kind": "simgcl", "options": {"temperature": 0}}, r"options\.temperature: expected more than 0 \(given: 0\)"),
        (
            {"kind": "spectral", "options": {"weight": 0.1}},
            r"has weight, and pretraining\.kind = spectral has no options",
        ),
        ({"kind": "sgl", "options": {"embedding_dim": 8}}, r"embedding_dim is that of the model"),
    ],
    ids=["unknown", "out of range", "another kind", "the model's"],
)
def test_wrong_options_are_refused(changes: dict[str, Any], message: str) -> None:
    given = settings(**{f"pretraining__{name}": value for name, value in changes.items()})
    with pytest.raises(ConfigError, match=message):
        PerFedRecPP(given)


def test_crowding_is_what_its_equation_says() -> None:
    """Three directions at right angles, and one that is there twice."""
    vectors = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0, 5], [0, 3, 0]])
    near, far = torch.tensor(2.0).exp(), torch.tensor(0.0).exp()  # cosines 1 and 0 at temperature 1/2
    alone, twice = ((far * 3) / 3).log(), ((near + far * 2) / 3).log()
    torch.testing.assert_close(crowding(vectors, 0.5), 2 * alone + 2 * twice)


def test_items_are_driven_apart_in_training() -> None:
    def items(continued: float) -> torch.Tensor:
        here = world(pretraining__kind="contrastive", clusters__n_clusters=0, pretraining__continued=continued)
        here.play(20)
        return torch.nn.functional.normalize(here.state.items, dim=1)

    assert float(uniformity(items(2.0))) < float(uniformity(items(0.0))) - 0.5


def test_items_are_not_driven_apart_where_rounds_sum_columns() -> None:
    with pytest.raises(ValueError, match=r"pretraining\.continued .* expected 0"):
        settings(pretraining__kind="spectral", pretraining__continued=1.0, privacy__aggregation="secure")
