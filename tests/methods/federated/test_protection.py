"""What a client with sparse uploads reveals about its items passes through its labels, clip and noise, in every
phase."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.methods.federated.toys import SEED, protected, settings, world

from perfedrec.core.keys import Key
from perfedrec.core.types import Rows
from perfedrec.methods.federated.gpfedrec import GPFedRecSettings
from perfedrec.privacy import protection
from perfedrec.privacy.labels import Labels
from perfedrec.privacy.settings import PrivacySettings

SPECTRAL: dict[str, Any] = {"pretraining__kind": "spectral", "pretraining__at": "clients"}
PAPER: dict[str, Any] = {"privacy__clip": 0.5, "privacy__noise_scale": 0.1}


@pytest.mark.parametrize("neighbours", [True, False])
def test_uploads_depend_on_the_items_only_through_the_labels(neighbours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two histories with the same labels send the same updates, from the first pass of pre-training on."""
    one, two = (world(**SPECTRAL, model__neighbours=neighbours, clusters__start=0) for _ in range(2))
    two.population.items = two.population.items.clone()
    for user in range(30):  # as many items, but others
        own = slice(int(two.population.offsets[user]), int(two.population.offsets[user + 1]))
        two.population.items[own] = 23 - two.population.items[own].flip(0)
    told = world().population

    def same_labels(rows: Rows, n_items: int, privacy: Any, n_negatives: int | None, *_: Any) -> Labels:
        said, _ = told.rows(rows.users)
        negatives, owners = (said.items + 1) % n_items, said.segments
        negatives = negatives.masked_fill(
            torch.isin(said.segments * 24 + negatives, said.segments * 24 + said.items), 0
        )
        none = negatives[:0]
        drawn = (none, none) if n_negatives == 0 else (negatives, owners)
        return Labels(replace(said, attributes=rows.attributes), torch.full_like(said.items, -1), *drawn)

    monkeypatch.setattr(protection, "label", same_labels)
    phases = set()
    for _ in range(9):
        sent = []
        for here in (one, two):
            here.state = replace(here.state, degrees=one.state.degrees)  # these are public
            phase = here.algorithm.phase(here.state)
            sent.append(protected(here.algorithm, phase, *here.block(here.population.everyone()), Key(SEED))[0])
        phases.add(phase)
        for name in ("items", "deltas", "reports", "edges", "weights"):
            left, right = (getattr(each, name) for each in sent)
            assert (left is None) == (right is None), name
            assert left is None or torch.equal(left, right), (phase, name)
        for here in (one, two):
            here.play(1)
    assert phases == {"spectral", "train"} | ({"join"} if neighbours else set())


@pytest.mark.parametrize("passes", [0, 1])
def test_passes_of_pre_training_are_clipped_and_noised_like_any_upload(passes: int) -> None:
    plain, clipped, noisy = (world(**SPECTRAL, **each) for each in ({}, {"privacy__clip": 0.01}, PAPER))
    sent = []
    for here in (plain, noisy, clipped):
        here.play(passes)
        here.state = replace(here.state, items=plain.state.items)
        sent.append(protected(here.algorithm, "spectral", *here.block(here.population.everyone()), Key(SEED))[0])
    assert torch.equal(sent[2].deltas, sent[0].deltas.clamp(-0.01, 0.01))
    # The largest number of each user is brought to the clip, and noise of the declared scale is on every one.
    largest = torch.zeros(30).scatter_reduce_(0, sent[0].segments, sent[0].deltas.abs().amax(1), "amax")
    noise = sent[1].deltas - sent[0].deltas * (0.5 / largest)[sent[0].segments, None]
    assert noise.unique().numel() > 0.9 * noise.numel()
    assert float(noise.abs().mean()) == pytest.approx(0.1, rel=4 / noise.numel() ** 0.5)


def test_passes_of_pre_training_show_decoys_and_leave_masked_items_out() -> None:
    plain, hidden = (
        world(**SPECTRAL, **more) for more in ({}, {"privacy__pseudo_items": 1.0, "privacy__masking": 0.5})
    )
    rows = []
    for here in (plain, hidden):
        broadcast, own, client_state = here.block(here.population.everyone())
        sent, _ = here.algorithm.client("spectral", broadcast, own, client_state, Key(SEED))
        rows.append(set((sent.segments * 24 + sent.items).tolist()))
    assert rows[0] - rows[1]  # masked
    assert rows[1] - rows[0]  # decoys


@pytest.mark.parametrize("aggregation", ["dense", "secure"])
@pytest.mark.parametrize(
    "option",
    [
        {"clip": 0.5, "noise_scale": 0.1},
        {"pseudo_items": 0.1},
        {"masking": 0.1},
        {"randomised_response": 1.0},
    ],
)
def test_options_for_sparse_uploads_are_refused_for_sums(aggregation: Any, option: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="protect sparse uploads"):
        PrivacySettings(aggregation=aggregation, **option)
    PrivacySettings(**option)


def test_randomised_response_is_refused_with_options_that_reveal_items() -> None:
    with pytest.raises(ValidationError, match="weighting = uniform"):
        settings(privacy__randomised_response=1.0, server__weighting="interactions")
    with pytest.raises(ValidationError, match="real items"):
        GPFedRecSettings(privacy=PrivacySettings(randomised_response=1.0))
