"""Forgetting users of a run: exact retraining, the certificate, the log and its limits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from perfedrec.cli import app
from perfedrec.core.aggregate import reduce
from perfedrec.core.errors import CheckpointError, ConfigError, DataError
from perfedrec.data import load
from perfedrec.forgetting import measures, statements
from perfedrec.forgetting.forget import WAYS, Forgotten, Request, forget
from perfedrec.forgetting.resum import resum
from perfedrec.runs.certificate import Certificate
from perfedrec.runs.config import resolve
from perfedrec.runs.forget_log import Limits, Log
from perfedrec.runs.result import Result, open_run
from perfedrec.runs.training import train
from perfedrec.runs.uploads import Uploads, without
from perfedrec.runtimes.simulator import PersonalRecommender

DATA = "synthetic:users=60,items=150,interactions_per_user=8"
SMALL: dict[str, Any] = {
    "data__path": DATA,
    "run__rounds": 6,
    "run__evaluate_every": 3,
    "run__device": "cpu",
    "selection__n_clients_per_round": 20,
    "model__embedding_dim": 8,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of FedMF."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(resolve(algorithm="fedmf", **SMALL), output=folder)
    return folder


def test_exact_retraining_does_not_depend_on_the_data_of_the_forgotten_user(trained: Path, tmp_path: Path) -> None:
    dataset = open_run(trained)[0].dataset
    user = dataset.train.user_ids[7]
    found = forget(trained, Request([user]), tmp_path / "new")
    again, config = open_run(tmp_path / "new")
    assert config.data.forgotten == (str(user),)
    assert again.dataset.train.degrees[7] == 0
    # Nothing of the user's state was trained, and all other users took part as often as before.
    states = again.recommender.records()["memory"]["participations"]
    before = open_run(trained)[0].recommender.records()["memory"]["participations"]
    assert states[7] == 0
    if again.best_round == open_run(trained)[0].best_round:
        assert torch.equal(states[:7], before[:7])
    assert found.cost.clients < found.cost_of_run.clients
    assert found.measured["membership AUC"]["users"] == 1
    assert Certificate.read(tmp_path / "new") == found


def test_a_forgotten_user_gets_no_lists(trained: Path, tmp_path: Path) -> None:
    forget(trained, Request(["3"]), tmp_path / "new")
    result = Result.load(tmp_path / "new")
    assert "3" not in result.recommend(None, 5)["user"].cast(str).to_list()
    with pytest.raises(DataError, match="was forgotten"):
        result.recommend("3", 5)


def test_forgetting_twice_forgets_both_and_refuses_the_same_user(trained: Path, tmp_path: Path) -> None:
    forget(trained, Request(["3"]), tmp_path / "first")
    with pytest.raises(DataError, match="was forgotten before"):
        forget(tmp_path / "first", Request(["3"]), tmp_path / "second")
    forget(tmp_path / "first", Request(["4"]), tmp_path / "second")
    _, config = open_run(tmp_path / "second")
    assert set(config.data.forgotten or ()) == {"3", "4"}
    direct = train(resolve(algorithm="fedmf", data__forgotten=("4", "3"), **SMALL))
    mine = Result.load(tmp_path / "second").recommender.records()["state"]
    assert torch.equal(mine.items, direct.recommender.records()["state"].items)


def test_data_without_users_keep_numbers_and_lose_their_rows() -> None:
    dataset = load(DATA)
    left = dataset.without_users(["2", 5])
    assert left.forgotten == (2, 5)
    assert left.n_users == dataset.n_users
    for part in ("train", "valid", "test"):
        rows, before = getattr(left, part), getattr(dataset, part)
        assert rows.degrees[[2, 5]].tolist() == [0, 0]
        kept = [user for user in range(dataset.n_users) if user not in (2, 5)]
        assert rows.degrees[kept].tolist() == before.degrees[kept].tolist()
    last = dataset.n_users - 1
    own = slice(dataset.train.offsets[last], None)
    assert left.train.items[left.train.offsets[last] :].tolist() == dataset.train.items[own].tolist()
    assert left.fingerprint != dataset.fingerprint
    with pytest.raises(DataError, match="expected some to be left"):
        dataset.without_users(dataset.train.user_ids.tolist())


def test_data_that_were_given_in_python_are_given_again_whole(tmp_path: Path) -> None:
    dataset = replace(load(DATA), origin=None)
    train(resolve(algorithm="fedmf", **SMALL), dataset, output=tmp_path / "run")
    forget(tmp_path / "run", Request(["3"]), tmp_path / "new", data=dataset)
    result, config = open_run(tmp_path / "new", dataset)
    assert config.data.forgotten == ("3",)
    assert result.dataset.forgotten == (3,)


def test_limits_refuse_many_users_and_many_requests_and_note_it(trained: Path, tmp_path: Path) -> None:
    log = Log(tmp_path)
    with pytest.raises(ConfigError, match="4 of 60 users would be forgotten; expected at most 3"):
        log.allow(Limits(share=0.05), ["a", "b"], 2, 60, "node")
    log.allow(Limits(share=0.05, per_day=1), ["a"], 0, 60, "node")
    with pytest.raises(ConfigError, match="expected at most 1"):
        log.allow(Limits(share=0.05, per_day=1), ["b"], 0, 60, "node")
    assert [line["event"] for line in log.lines()] == ["refused", "accepted", "refused"]


def test_a_refused_request_writes_no_run(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected at most 1"):
        forget(trained, Request(["1", "2"]), tmp_path / "new", limits=Limits(share=0.01))
    assert not (tmp_path / "new").exists()
    assert Log(trained).lines()[-1]["event"] == "refused"


def test_a_damaged_certificate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no certificate"):
        Certificate.read(tmp_path)
    (tmp_path / "certificate.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="expected format 1"):
        Certificate.read(tmp_path)
    for content, why in (
        ([], "it has no fields with names"),
        (5, "it has no fields with names"),
        ("text", "it has no fields with names"),
        (None, "it has no fields with names"),
        ({"users": []}, 'it has no "format"'),
        ({"format": 1}, 'it has no "cost"'),
        ({"format": 1, "users": 5}, "its field users has another form"),
        ({"format": 1, "cost": {"rounds": 1}, "cost_of_run": {}}, "it has another form"),
    ):
        (tmp_path / "certificate.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError) as caught:
            Certificate.read(tmp_path)
        assert f"no certificate can be read ({why}); expected what perfedrec forget" in str(caught.value)


def test_summing_of_all_kept_uploads_is_the_run_itself(tmp_path: Path) -> None:
    """With nobody to forget the server makes the same tables, bit for bit: every upload is there as it was sent."""
    folder = tmp_path / "run"
    result = train(resolve(**{**SMALL, "run__keep_uploads": True}), output=folder)
    config = resolve(**SMALL)
    algorithm = config.build()
    played = len(algorithm.phases) + result.best_round
    recommender = result.recommender
    assert isinstance(recommender, PersonalRecommender)
    found = resum(algorithm, result.dataset, config.run, folder, recommender, played, 0)
    before, after = recommender.state, found.recommender.state
    for name in ("items", "offsets", "neighbours", "degrees"):
        mine, theirs = getattr(before, name), getattr(after, name)
        assert (mine is None and theirs is None) or torch.equal(mine, theirs), name
    users = torch.arange(result.dataset.n_users)
    assert torch.equal(recommender.raw_scores(users), found.recommender.raw_scores(users))


def test_summing_without_a_user_sums_what_the_others_sent(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = resolve(algorithm="fedmf", **{**SMALL, "run__keep_uploads": True, "run__rounds": 1})
    train(config, output=folder)
    (block,) = [update for _, _, update in Uploads(folder).round(0)]
    rest = without(block, block.users[:1])
    whole, less, one = (reduce(each, 150, 1) for each in (block, rest, block.of_user(0)))
    again = less + one
    assert torch.equal(whole.keys, again.keys)
    assert torch.equal(whole.sums, again.sums)
    assert less.clients == whole.clients - 1
    result = forget(folder, Request([str(int(block.users[0]))], "resum", share=1.0), tmp_path / "new")
    assert result.cost.rounds == 1
    assert Result.load(tmp_path / "new").best_round == 2
    with pytest.raises(CheckpointError, match="no uploads were kept"):
        forget(tmp_path / "new", Request(["9"], "resum"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_certificate_of_one_user_is_json_and_has_an_alert_where_the_model_still_tells(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(trained, Request(["5"]), tmp_path / "exact")
    aucs = iter((0.7, 1.0, 0.6))  # before, after, and of the model that was trained again
    monkeypatch.setattr(measures, "membership", lambda *_: measures.Membership((next(aucs),)))
    found = forget(trained, Request(["5"], "replay", reference=tmp_path / "exact"), tmp_path / "new")
    text = (tmp_path / "new" / "certificate.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["measured"]["membership AUC of who never took part"]["±"] is None
    assert not any("±" in line or "nan" in line for _, line in found.lines())
    assert [each.split(":")[0] for each in found.alerts if "membership" in each] == [
        "the membership AUC is 1.0000 after forgetting, above the 0.7000 of the model before",
        "the membership AUC is 1.0000 after forgetting, above the 0.6000 of who never took part",
    ]
    assert Log(trained).lines()[-1]["alerts"] == found.alerts
    assert found.exact == []  # FedMF has no phases before training
    assert any("few items" in each for each in found.unmeasured)


def test_an_interruption_says_what_is_there_and_is_noted(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*given: object) -> Forgotten:
        raise KeyboardInterrupt

    monkeypatch.setitem(WAYS, "exact", stopped)
    words = ["forget", str(trained), "--user", "5", "--quiet", "--output", str(tmp_path / "new")]
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 130
    assert f"nothing was written to {tmp_path / 'new'}: give the command again" in answer.stderr
    assert Log(trained).lines()[-1]["event"] == "interrupted"
    noted = Log(trained).lines()
    monkeypatch.setattr("perfedrec.forgetting.forget.open_run", stopped)
    early = CliRunner().invoke(app, words)
    assert (early.exit_code, early.stderr) == (130, answer.stderr)
    assert Log(trained).lines() == noted
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.toml").touch()
    assert "holds a run without a certificate: remove it" in statements.interrupted(trained, tmp_path / "new")


def test_summing_again_is_refused_with_secure_aggregation(tmp_path: Path) -> None:
    config = resolve(algorithm="fedmf", **{**SMALL, "run__rounds": 1, "privacy__aggregation": "secure"})
    train(config, output=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"nobody has single uploads; expected --method exact$"):
        forget(tmp_path / "run", Request(["5"], "resum"), tmp_path / "new")
    assert not Log(tmp_path / "run").lines()


def test_the_command_prints_the_certificate_and_refuses_mistakes(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "node.txt").write_text("11\n\n12\n")
    words = ["forget", str(trained), "--users", str(tmp_path / "node.txt"), "--quiet", "--output"]
    done = CliRunner().invoke(app, [*words, str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    for text in ("certificate", "11, 12", "trained again from seed 0", "not covered", "membership AUC"):
        assert text in done.stdout
    as_json = CliRunner().invoke(app, [*words, str(tmp_path / "b"), "--json"])
    assert json.loads(as_json.stdout)["users"] == ["11", "12"]
    for more, said in (
        (["--share", "2"], "--share is 2; expected a share from 0 to 1"),
        (["--max-share", "0"], "--max-share is 0"),
        (["--users", str(tmp_path / "missing")], "expected a file with an id a line"),
        ([], "nobody is to be forgotten"),
    ):
        refused = CliRunner().invoke(app, ["forget", str(trained), "--output", str(tmp_path / "c"), *more])
        assert refused.exit_code == 2
        assert said in refused.stderr
    assert not (tmp_path / "c").exists()


def test_a_certificate_of_a_simulation_is_signed_and_verified(trained: Path, tmp_path: Path) -> None:
    def cli(*words: object) -> tuple[int, str]:
        done = CliRunner().invoke(app, [str(each) for each in words])
        return done.exit_code, done.output

    words = ("forget", trained, "--user", "9", "--output", tmp_path / "new", "--quiet", "--sign", tmp_path / "operator")
    assert cli(*words) == (
        2,
        f"error: {tmp_path}/operator: cannot be read (there is no such file or folder); expected a private key, "
        "as perfedrec federation key wrote it: the file without .pub\n",
    )
    assert not (tmp_path / "new").exists()
    cli("federation", "key", tmp_path / "operator", "--operator")
    assert cli(*words)[0] == 0
    path = tmp_path / "new" / "certificate.json"
    verify = ("node", "verify", path, "--operator", tmp_path / "operator.pub")
    assert cli(*verify)[0] == 0
    path.write_text(path.read_text().replace('"9"', '"8"'))
    assert "was altered after it was signed" in cli(*verify)[1]
