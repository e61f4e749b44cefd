"""Profiles, the privacy block of a run, and the audit that attacks the run's own uploads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from perfedrec import ConfigError, configure, load, train
from perfedrec.audit.audit import audit, read_audit
from perfedrec.audit.canary import bounds
from perfedrec.core.errors import CheckpointError
from perfedrec.core.keys import Key
from perfedrec.federation.agreement import with_real_noise
from perfedrec.privacy import protection
from perfedrec.privacy.protection import Protection
from perfedrec.privacy.report import audited, lines, warnings
from perfedrec.privacy.settings import NoiseSettings, PrivacySettings
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.preset_files import presets
from perfedrec.runs.result import Result

SMALL = (
    "data.path=synthetic:users=300,items=250",
    "selection.n_clients_per_round=60",
    "clusters.start=2",
    "clusters.every=2",
    "run.evaluate_every=10",
    "run.threads=1",
)


def run(folder: Path, privacy: str | None, *more: str, preset: str = "recommended") -> tuple[Result, dict[str, Any]]:
    config = configure(preset, overrides=[*SMALL, *more], privacy=privacy)
    result = train(config.build(), load(config.data.path), config.run, output=folder, config=config)
    return result, RunFolder(folder).summary().privacy


def figure(found: Any, attack: str, metric: str, which: int | None = None) -> float:
    values = [
        each.value
        for each in found.findings
        if each.attack.startswith(attack) and each.metric == metric and which in (None, each.round)
    ]
    assert values, [each.attack for each in found.findings]
    return values[0]


def test_profiles_exist_and_an_unknown_one_is_refused() -> None:
    assert presets("profiles") == ["none", "paper", "private", "secure"]
    with pytest.raises(ConfigError, match="did you mean secure"):
        configure("recommended", privacy="secur")


def test_a_profile_replaces_all_privacy_options() -> None:
    for preset in ("paper", "recommended"):
        privacy = configure(preset, privacy="secure").privacy
        assert (privacy.aggregation, privacy.noise_scale, privacy.pseudo_items) == ("secure", 0.0, 0.0)
    assert configure("recommended", privacy="paper").privacy == configure("paper").privacy


def test_profile_paper_claims_only_a_coordinate(tmp_path: Path) -> None:
    _, block = run(tmp_path / "run", "paper", "run.rounds=4")
    assert block["claim"] == "per coordinate: epsilon 10; the whole upload: NONE"
    assert block["epsilon_coordinator"] is None
    assert "touched" in block["epsilon_coordinator_reason"]
    assert block["row_sets"] == "exposed to the coordinator"
    assert block["noise_source"].startswith("simulation")


def test_without_protection_the_claim_is_none(tmp_path: Path) -> None:
    _, block = run(tmp_path / "run", None, "run.rounds=2")
    assert block["claim"] == "NONE"
    shown = dict(lines(block))
    assert shown["epsilon, coordinator"].startswith("none (")
    assert all(shown.values())  # no value is empty
    assert shown["noise source"] == shown["secure aggregation"] == shown["narrower statements"] == "none"


def test_profile_secure_claims_that_no_upload_is_visible(tmp_path: Path) -> None:
    result, block = run(tmp_path / "run", "secure", "run.rounds=8")
    assert block["claim"] == "no individual upload is visible (simulated in this run); no DP guarantee"
    assert block["user_vectors"] == "stay on the clients"
    released = ["degrees", "spectral", "join", "sizes", "clusters", "training"]
    assert [each["release"] for each in block["releases"]] == released
    assert result.recommender.state.clusters.centroids is not None
    assert block["sums"] == (
        "changes in a basis of at most 64 columns; degrees and cluster sizes as counts; weights of networks in full; "
        "passes by item, for items of 5 users or more; over 32 clients or more"
    )
    _, rows = run(tmp_path / "rows", "secure", "run.rounds=1", "privacy.rank=0")
    assert rows["claim"] == (
        "no individual upload is visible (simulated in this run), but sums by item show the items of many users; "
        "no DP guarantee"
    )


def test_profile_private_spends_its_epsilon_on_everything_that_is_released(tmp_path: Path) -> None:
    _, block = run(tmp_path / "run", "private", "privacy.epsilon=4")
    assert 3.99 < block["epsilon_coordinator"] <= 4
    assert block["claim"].startswith("user-level DP against the coordinator: epsilon 4 at delta 1e-05")
    assert [(each["release"], each["times"]) for each in block["releases"]] == [("degrees", 1), ("spectral", 6)]
    assert block["warnings"][0].startswith("300 users are few for epsilon 4: test ndcg@20 ")
    assert "popularity" in block["warnings"][0]
    assert "warning" in dict(lines(block))


def test_a_delta_above_one_over_n_is_flagged() -> None:
    private = PrivacySettings(aggregation="secure", norm="l2", clip=1.0, noise=NoiseSettings(spectral=1.0))
    good, floor = {"ndcg@20": 0.2}, {"ndcg@20": 0.1}
    assert warnings(private, 100_000, 10, good, floor) == []
    (said,) = warnings(private, 100_001, 10, good, floor)
    assert "delta 1e-05 is above 1 / 100001 users" in said
    assert len(warnings(private, 5, 1000, good, floor)) == 1


def test_private_training_is_in_the_ledger_with_its_limit(tmp_path: Path) -> None:
    options = ("run.rounds=6", "selection.max_participations=3", "privacy.epsilon=20", "privacy.delta=1e-4")
    _, block = run(tmp_path / "run", "private", *options)
    assert 19.9 < block["epsilon_coordinator"] <= 20
    assert block["epsilon_recipients"] != block["epsilon_coordinator"]
    assert block["weak"]
    assert "(weak: above 10)" in block["claim"]
    training = block["releases"][-1]
    assert (training["release"], training["times"], training["participations"]) == ("training", 6, 3)
    assert training["sampling"] == "poisson"
    assert training["rate"] == pytest.approx(0.2)


def test_private_noise_can_come_from_opendp(tmp_path: Path) -> None:
    options = ("privacy.noise_source=opendp", "model.embedding_dim=2", "pretraining.passes=1")
    one, block = run(tmp_path / "one", "private", *options)
    two, _ = run(tmp_path / "two", "private", *options)
    assert block["noise_source"] == "OpenDP"
    assert "so was the noise" not in block["claim"]
    found = audit(tmp_path / "one", trials=1000)  # with fresh noise, which is noted
    assert any("cannot be drawn again" in note for note in found.notes)
    assert not torch.equal(one.recommender.state.items, two.recommender.state.items)  # no seed determines it


@pytest.mark.parametrize("profile", ["paper", "private"])
def test_nodes_draw_their_noise_with_opendp(profile: str) -> None:
    algorithm = with_real_noise(configure("recommended", privacy=profile)).build()
    assert algorithm.settings.privacy.noise_source == "opendp"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("run.rounds=10", "selection.max_participations=off"), "needs selection.max_participations"),
        (("run.dropout_rate=0.3",), "every noisy sum would be aborted"),
        (("pretraining.kind=contrastive",), "hides the edges"),
        (("privacy.aggregation=sparse",), "a sparse upload shows"),
    ],
)
def test_private_runs_that_cannot_keep_their_claim_are_refused(options: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configure("recommended", privacy="private", overrides=options)


def test_the_audit_breaks_unprotected_uploads(tmp_path: Path) -> None:
    run(tmp_path / "run", None, "run.rounds=20")
    found = audit(tmp_path / "run", rounds=(1, 10))
    known, unknown = "items from one sparse upload, with the", "items from one sparse upload, without the"
    assert figure(found, "items from one sparse upload of pre-training", "precision at |I_u|", 0) == 1  # its rows alone
    assert figure(found, known, "AUC", 1) > 0.995
    assert figure(found, known, "precision at |I_u|", 1) > 0.99
    assert 0.5 < figure(found, unknown, "AUC", 1) < 1
    assert figure(found, "intersection of 1", "precision at |I_u|") < 0.6
    assert figure(found, "intersection of 2", "precision at |I_u|") > 0.9
    assert figure(found, "intersection of 5", "precision at |I_u|") > 0.99
    assert figure(found, "fit of the user vector", "AUC", 1) > 0.9
    assert figure(found, "linkage of user vectors", "top-1") > 0.5
    assert figure(found, "membership", "AUC") > 0.55
    assert found.bounds == []
    assert not found.failed
    assert read_audit(tmp_path / "run") == json.loads(json.dumps(found.plain()))
    assert "AUC" in audited(found.plain())


def test_attacks_on_the_papers_pre_training_find_only_what_its_rows_show(tmp_path: Path) -> None:
    _, block = run(tmp_path / "run", "paper", "run.rounds=2")
    assert block["user_vectors"] == "leave the clients, with noise"
    found = audit(tmp_path / "run")
    attack = "items from one sparse upload of pre-training, without the"
    # One in ten rows is a decoy, and one in ten items is masked.
    assert figure(found, attack, "precision at |I_u|", 0) < 0.93
    assert figure(found, attack, "AUC", 0) < 0.9


REPORTING = ("gpfedrec", "fedca", "cofedrec")


@pytest.mark.parametrize("name", ["fedncf", "pfedrec", "fedmf", "fedcia", "colr", "pfedclr", "ptf_fedrec", *REPORTING])
def test_every_federated_method_can_be_audited(tmp_path: Path, name: str) -> None:
    overrides = [*SMALL[:2], "run.rounds=4", "run.threads=1"]
    config = configure(None, overrides=overrides, algorithm=name)
    train(config.build(), load(config.data.path), config.run, output=tmp_path / "run", config=config)
    block = RunFolder(tmp_path / "run").summary().privacy
    found = audit(tmp_path / "run")
    least = 0.35 if name == "ptf_fedrec" else 0.5  # whose clients send the scores of about half of their items
    assert figure(found, "items from one sparse upload, without the", "precision at |I_u|") > least
    reported = any(each.attack.startswith("linkage") for each in found.findings)
    assert reported == (name in REPORTING) == (block["user_vectors"] == "leave the clients, as they are")
    assert reported or block["user_vectors"] == "stay on the clients"


@pytest.mark.parametrize("name", ["fedmf", "fedcia", "pfedrec"])
def test_methods_without_pre_training_can_be_audited_where_sums_are_secure(tmp_path: Path, name: str) -> None:
    """The passes that find their basis have other columns than their vectors."""
    config = configure(None, overrides=[*SMALL[:2], "run.rounds=3", "run.threads=1"], algorithm=name, privacy="secure")
    train(config.build(), load(config.data.path), config.run, output=tmp_path / "run", config=config)
    found = audit(tmp_path / "run")
    known = [each for each in found.findings if each.attack.endswith("with the user's vector")]
    assert bool(known) == (name != "pfedrec")
    assert {each.round for each in known} <= {1, 2, 3}
    assert "users exposed" in {each.metric for each in found.findings}


def test_sticky_decoys_resist_intersection_and_fresh_ones_do_not(tmp_path: Path) -> None:
    reached = {}
    for sticky in ("false", "true"):
        options = ("run.rounds=20", "clusters.n_clusters=0", "privacy.pseudo_items=1.0", f"privacy.sticky={sticky}")
        run(tmp_path / sticky, None, *options)
        reached[sticky] = figure(audit(tmp_path / sticky), "intersection of 5", "precision at |I_u|")
    assert reached["false"] > 0.95
    assert reached["true"] == pytest.approx(0.5, abs=0.03)


def test_noise_on_every_row_hides_a_single_upload(tmp_path: Path) -> None:
    options = ("privacy.aggregation=dense", "privacy.norm=l2", "privacy.clip=1.0", "privacy.noise.training=2.0")
    _, block = run(tmp_path / "run", None, "run.rounds=3", "clusters.n_clusters=0", *options)
    assert block["epsilon_coordinator"] is None  # degrees and pre-training were released without noise
    assert block["row_sets"] == "exposed to the coordinator"  # by these releases
    found = audit(tmp_path / "run", rounds=(3,))
    assert figure(found, "items from one dense upload, with the", "AUC") == pytest.approx(0.5, abs=0.1)
    assert figure(found, "items from one dense upload, with the", "precision at |I_u|") < 0.2


def test_a_sum_still_reveals_something_about_a_single_upload(tmp_path: Path) -> None:
    run(tmp_path / "run", "secure", "run.rounds=5", "privacy.rank=0")
    found = audit(tmp_path / "run", rounds=(1,))
    assert any(each.attack.startswith("items from the sum of") and each.value > 0.8 for each in found.findings)
    run(tmp_path / "basis", "secure", "run.rounds=5")
    less = audit(tmp_path / "basis", rounds=(1,))
    aucs = [
        [each.value for each in one.findings if each.attack.startswith("items from the sum of") and each.round]
        for one in (found, less)
    ]
    assert aucs[1][0] < aucs[0][0]
    assert [note.split(":")[0] for note in found.notes] == [
        "fit and linkage of user vectors",
        "intersection of row sets",
    ]


def test_sums_by_item_show_lists_and_name_users_and_sums_in_a_basis_do_not(tmp_path: Path) -> None:
    """With few clients a round most rows have one contributor. In neighbour sums these are multiples of its vector."""
    few = ("selection.n_clients_per_round=12", "run.rounds=40", "clusters.n_clusters=0", "privacy.min_clients=2")
    run(tmp_path / "rows", "secure", *few, "privacy.rank=0")
    found = audit(tmp_path / "rows", rounds=(1, 40))
    name = "collinear rows of neighbour sums"
    assert figure(found, name, "users exposed") > 5
    assert figure(found, name, "item precision") > 0.99
    assert figure(found, name, "users named") > 10
    control = [each.guessing for each in found.findings if each.attack == name]
    assert control == [0.0] * 4
    assert figure(found, "rows of few contributors of neighbour sums", "users exposed", 40) > 5

    run(tmp_path / "basis", "secure", *few)
    repaired = audit(tmp_path / "basis", rounds=(1, 40))
    for each in repaired.findings:
        if each.metric in ("users exposed", "users named", "item precision"):
            assert each.value == each.guessing == 0, each
    assert any(each.startswith("collinear rows of all passes together") for each in repaired.without_result())
    assert figure(repaired, "differences between 40 rounds of training", "precision at |I_u|") < 0.3


@pytest.mark.parametrize("epsilon", [1, 8])
def test_the_audit_is_near_the_claim_and_detects_half_the_noise(
    tmp_path: Path, epsilon: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "run", "private", f"privacy.epsilon={epsilon}")
    (honest,) = audit(tmp_path / "run", trials=40_000).bounds
    assert not honest.failed
    assert honest.lower_gaussian is not None
    assert 0.8 * epsilon < honest.lower_gaussian <= epsilon
    declared = Protection.share_scale
    monkeypatch.setattr(Protection, "share_scale", lambda *given: (declared(*given)[0], declared(*given)[1] / 2))
    with pytest.raises(CheckpointError, match="round 0 of pre-training cannot be repeated"):
        audit(tmp_path / "run", trials=40_000)  # the replay has other noise than the run
    _, block = run(tmp_path / "broken", "private", f"privacy.epsilon={epsilon}")
    assert block["epsilon_coordinator"] == pytest.approx(epsilon, abs=0.01)  # what it still claims
    broken = audit(tmp_path / "broken", trials=40_000)
    assert broken.failed
    assert broken.bounds[0].failed
    assert read_audit(tmp_path / "broken")["failed"]  # type: ignore[index]


def test_half_of_the_papers_noise_is_detected_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, block = run(tmp_path / "run", "paper", "run.rounds=2", "privacy.noise_scale=0.5")
    assert block["narrower"] == ["per coordinate: epsilon 2"]
    (honest,) = audit(tmp_path / "run").bounds
    assert honest.claim == pytest.approx(2.0)
    assert 1.8 < honest.lower <= 2.0
    drawn, noised = protection.laplace, protection._clipped_and_noised
    monkeypatch.setattr(protection, "laplace", lambda *given: drawn(*given) / 2)
    monkeypatch.setattr(protection, "_clipped_and_noised", lambda *given: noised(*given[:3], given[3] / 2))
    settings = configure("recommended", privacy="paper", overrides=["privacy.noise_scale=0.5"]).privacy
    (broken,) = bounds(Protection(settings), [], 100_000, Key(0))
    assert broken.failed
    with pytest.raises(CheckpointError, match="cannot be repeated"):  # these are not the uploads of the run
        audit(tmp_path / "run")


def test_local_noise_hides_uploads_and_is_accounted_for(tmp_path: Path) -> None:
    noise = [f"privacy.noise.{name}=40.0" for name in ("degrees", "spectral", "join", "training")]
    options = ("privacy.aggregation=dense", "privacy.norm=l2", "privacy.clip=1.0", "run.rounds=2", *noise)
    _, block = run(tmp_path / "run", None, *options)
    assert block["row_sets"] == "hidden"
    assert block["user_vectors"] == "inside dense uploads, everywhere under noise"
    multipliers = {each["noise_multiplier"] for each in block["releases"]}
    assert multipliers == {20.0}  # one upload replaced by another: twice the clip
    found = audit(tmp_path / "run", trials=40_000)
    assert 0 < found.bounds[0].lower_gaussian <= found.bounds[0].claim == block["epsilon_coordinator"]


def test_dense_uploads_without_noise_show_their_rows(tmp_path: Path) -> None:
    options = ("privacy.aggregation=dense", "run.rounds=12", "clusters.n_clusters=0")
    _, block = run(tmp_path / "run", None, *options)
    assert block["row_sets"] == "exposed to the coordinator"
    found = audit(tmp_path / "run")
    assert figure(found, "intersection of 2", "precision at |I_u|") > 0.9


def test_a_resumed_run_does_not_split_its_budget_again(tmp_path: Path) -> None:
    config = configure("recommended", overrides=SMALL, privacy="private")
    dataset = load(config.data.path)
    train(config.build(), dataset, config.run, output=tmp_path / "run", config=config)
    longer = configure("recommended", overrides=[*SMALL, "run.rounds=2"], privacy="private")
    assert longer.build().settings.privacy.noise.spectral > config.build().settings.privacy.noise.spectral
    more = configure("recommended", overrides=[*SMALL, "run.rounds=200"], privacy="private")
    # The cap counts, not the rounds.
    assert more.build().settings.privacy.noise == longer.build().settings.privacy.noise
    checkpoint = tmp_path / "run" / "model"
    with pytest.raises(CheckpointError, match="another configuration"):
        train(longer.build(), dataset, longer.run, output=tmp_path / "run", config=longer, resume=checkpoint)


def test_captured_rounds_must_have_been_played(tmp_path: Path) -> None:
    run(tmp_path / "run", "secure", "run.rounds=2")
    with pytest.raises(ConfigError, match="no round 7 to capture; expected 1 to 2"):
        audit(tmp_path / "run", rounds=(7,))
    with pytest.raises(ConfigError, match="too few"):
        audit(tmp_path / "run", trials=10)


def test_every_profile_changes_with_its_options(tmp_path: Path) -> None:
    base = configure("recommended", overrides=[*SMALL, "run.rounds=3"], privacy="secure")
    dataset = load(base.data.path)
    state = train(base.build(), dataset, base.run).recommender.state
    for option in ("selection.max_participations=0", "privacy.clip=0.01", "selection.sampling=fixed"):
        config = configure("recommended", overrides=[*SMALL, "run.rounds=3", option], privacy="secure")
        assert not torch.equal(train(config.build(), dataset, config.run).recommender.state.items, state.items), option
