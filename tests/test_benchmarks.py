"""The commands behind published figures run as the documents say."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import forgetting, peers, personalisation

from perfedrec import configure, load
from perfedrec.core.keys import Key
from perfedrec.methods.centralised.method import Training

ROOT = Path(__file__).parents[1]


def test_accuracy_under_privacy_is_measured_beside_floor_and_ceiling() -> None:
    data = "synthetic:users=80,items=60,clusters=3,interactions_per_user=8"
    command = [sys.executable, "benchmarks/private.py", "--data", data, "--dim", "4", "--seeds", "0", "--copies", "3"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found = {line["figure"]: line for line in map(json.loads, run.stdout.splitlines())}
    assert list(found) == ["popularity", "without noise", "epsilon 8", "epsilon 8, ratios"]
    assert found["popularity"]["users"] == found["epsilon 8"]["users"] == 240
    ratio = found["epsilon 8"]["value"] / found["without noise"]["value"]
    assert abs(found["epsilon 8, ratios"]["of_noiseless"] - ratio) < 0.001


def test_repairs_of_secure_sums_are_compared() -> None:
    data = "synthetic:users=600,items=600,clusters=3,interactions_per_user=8"
    only = ["by item", "rows of 5 contributors", "random basis", "rank 32"]
    command = [sys.executable, "benchmarks/secure.py", "--data", data, "--rounds", "3", "--only", *only]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found = {line["candidate"]: line for line in map(json.loads, run.stdout.splitlines())}
    assert list(found) == only
    exposed = {name: line["attacks"]["users exposed"]["value"] for name, line in found.items()}
    assert exposed.pop("by item") > 5
    assert set(exposed.values()) == {0}
    sent = {name: line["bytes_up_a_round"] for name, line in found.items()}
    assert sent["by item"] == sent["rows of 5 contributors"] > 10 * sent["random basis"] > 10 * sent["rank 32"]
    assert all(line["valid_ndcg@20"] > 0 for line in found.values())


def test_personalisation_is_measured_on_planted_data() -> None:
    command = [sys.executable, "benchmarks/personalisation.py", "--only", "facets", "--seeds", "0", "--rounds", "12"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    run = subprocess.run([*command, "--small"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    *lines, seconds = map(json.loads, run.stdout.splitlines())
    found = {line["variant"]: line for line in lines}
    assert list(found) == [
        "nothing personal",
        "own rows",
        "clusters from round 41",
        "clusters",
        "clusters, learning rate 1",
        "clusters and own rows (preset)",
        "the same, learned weights",
    ]
    plain = found.pop("nothing personal")
    figures = ("valid recall@20", "recall@20", "ndcg@20")
    same = {name for name, line in found.items() if all(line[each] == plain[each] for each in figures)}
    assert same == {"clusters from round 41"}  # they have not begun after twelve rounds
    assert found["clusters"]["ndcg@20"] != found["clusters and own rows (preset)"]["ndcg@20"]
    assert found["clusters from round 41"]["difference"] == 0
    assert seconds["data"] == "facets"


def test_several_domains_are_measured_as_one_federation_and_each_alone(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"small": 40, "large": 80}
    sets = {name: load(f"synthetic:users={n},items=50,clusters=3,interactions_per_user=8") for name, n in sizes.items()}
    joined = personalisation.joined(sets, shared=False)
    assert (joined.n_users, joined.n_items) == (120, sum(each.n_items for each in sets.values()))
    personalisation.whole("both", sets, joined, argparse.Namespace(seeds=[0], rounds=2, clients=24))
    line = json.loads(capsys.readouterr().out)
    for name in sets:
        found = line[name]
        assert found["together"] != found["alone"]
        assert found["difference"] == pytest.approx(found["alone"][1] - found["together"][1], abs=2e-4)


def test_this_build_is_held_against_an_earlier_one() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no history of the repository here")
    data = "synthetic:users=200,items=400"
    command = [
        sys.executable,
        "benchmarks/speed.py",
        "--data",
        data,
        "--threads",
        "1",
        "--rounds",
        "3",
        "--warm-up",
        "1",
    ]
    only = ["--only", "recommended", "--against"]
    run = subprocess.run([*command, *only, "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    (found,) = map(json.loads, run.stdout.splitlines())
    assert (found["work"], found["threads"], found["rounds"]) == ("recommended", 1, 3)
    names = (
        "processor_ms",
        "processor_ratio",
        "processor_ratio_of_means",
        "wall_ms",
        "wall_ratio",
        "wall_ratio_of_means",
    )
    assert all(found[name] > 0 for name in (*names, "peak_mb", "peak_ratio"))
    unknown = subprocess.run([*command, *only, "nobody"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert unknown.returncode == 2
    assert "--against nobody" in unknown.stderr


TINY = "synthetic:users=60,items=80,clusters=2,interactions_per_user=6"


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> Path:
    """Peers whose programs are these texts, run by this interpreter. Returns the folder of their environments."""
    for name, program in programs.items():
        (folder / "venvs" / name / "bin").mkdir(parents=True)
        (folder / "venvs" / name / "bin" / "python").symlink_to(sys.executable)
        (folder / "venvs" / name / "installed.txt").touch()
        (folder / f"{name}.py").write_text(program)
    monkeypatch.setattr(peers, "PROGRAMS", folder)
    monkeypatch.setattr(peers, "PEERS", {name: peers.Peer((), f"{name}.py") for name in programs})
    return folder / "venvs"


def lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["peers.py", *map(str, arguments)])
    peers.main()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_peers_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = {
        "implicit": """
import numpy, sys
print("first words")
if sys.argv[2:6] == ["--dim", "4", "--epochs", "3"]:
    with numpy.load(sys.argv[1]) as given:
        users, items = given["shape"]
    output = sys.argv[sys.argv.index("--output") + 1]
    numpy.savez(output, users=numpy.ones((3, users, 5), "f4"), items=numpy.ones((3, items, 5), "f4"))
    print('{"seconds": [1, 2, 3]}')
print('{"seconds": 6}' if sys.argv[2:] == ["--dim", "4", "--epochs", "5"] else "no figure")
""",
        "lightgcn": """
import json, numpy, sys
with numpy.load(sys.argv[2]) as given:
    users, items = given["shape"]
numpy.savez(sys.argv[sys.argv.index("--output") + 1], users=numpy.ones((users, 4)), items=numpy.ones((items, 4)))
print(json.dumps({"seconds_a_batch": 5, "batches_an_epoch": 2, "code": open(sys.argv[1] + "/code/world.py").read()}))
""",
        "selfrec": """
import numpy, sys
with numpy.load(sys.argv[2]) as given:
    held = given["valid_users"].size == given["valid_items"].size > 0 < given["test_items"].size
asked, rest = sys.argv[3:10], sys.argv[10:]
if held and asked == ["--model", "BUIR", "--learning-rate", "0.02", "--epochs", "3", "--every"]:
    if rest == ["0"]:
        print('{"seconds": [9, 8, 8]}')
    elif rest == ["2", "--seed", "0"]:
        print('{"valid": [0.1, 0.3], "test": [0.4, 0.1]}')
    elif rest == ["2", "--seed", "5"]:
        print('{"valid": [0.2, 0.1], "test": [0.2, 0.3]}')
""",
        "flower": "print('{\"seconds_a_round\": 7}')",
        "sequences": """
import json, sys
users = len(open(sys.argv[3]).read().splitlines())
print(json.dumps({"seconds_an_epoch": {"SASRec": 1, "BERT4Rec": 2, "CL4SRec": 3}[sys.argv[2]] * users}))
""",
    }
    venvs, code = fake(tmp_path, monkeypatch, **programs), tmp_path / "checkout" / "code"
    code.mkdir(parents=True)
    (code / "world.py").write_text("public code")
    (code / "SELFRec.py").touch()
    options = ("--data", TINY, "--venvs", venvs, "--lightgcn", code.parent, "--turns", 1, "--dim", 4, "--epochs", 3)
    options += ("--selfrec", code, "--models", "BUIR", "--seeds", 0, 5, "--every", 2, "--learning-rate", 0.02)
    monkeypatch.setattr(peers, "BPR_OPTIONS", {kind: [(0.05, 0.01)] for kind in ("theirs", "sgd", "adam")})
    every = lines(monkeypatch, capsys, *options, "--cohort", 16, "--rounds", 1, "--only", *programs)
    sgd, *bpr = [line for line in every if line["peer"] == "implicit"]
    found = [sgd, *(line for line in every if line["peer"] != "implicit")]
    assert [line["peer"] for line in found] == ["implicit", "lightgcn", "lightgcn", *["selfrec"] * 4, "flower"] + [
        "sequences"
    ] * 3
    timed = [line for line in found if "ratio" in line]
    n_users = load(TINY).n_users
    assert [line["theirs"] for line in timed] == [6, 10, 8, 7, n_users, 2 * n_users, 3 * n_users]
    for line in timed:
        assert line["ratio"] == pytest.approx(line["theirs"] / line["ours"], rel=0.001)
    assert found[0]["samples_a_second_theirs"] == round(load(TINY).train.items.size / 6)
    assert [line["figure"].split(", ")[1] for line in (sgd, *bpr)] == ["ours with sgd", "ours with adam"] + [
        "theirs",
        "sgd",
        "adam",
    ] * 2
    best, until = bpr[1:4], bpr[4:]
    assert best[0]["seconds"] == best[0]["epochs"] == until[0]["epochs"] == 1  # their vectors are always the same
    assert all(0 < each["recall@20"] < 1 for each in best)
    assert all(1 <= first["epochs"] <= each["epochs"] for first, each in zip(until, best, strict=True))
    assert [each["samples"] for each in until] == [each["epochs"] * load(TINY).train.items.size for each in until]
    assert found[2]["theirs"] != found[2]["ours"]  # all products of theirs are equal
    assert found[4]["theirs"] == {"by the test": 0.4, "by validation": 0.1}
    assert found[5]["theirs"] == {"by the test": 0.3, "by validation": 0.2}
    for line in found[4:6]:
        assert 0 < line["ours"]["by validation"] <= line["ours"]["by the test"] < 1
    assert found[4]["ours"] != found[5]["ours"]
    mean = (found[4]["ours"]["by validation"] + found[5]["ours"]["by validation"]) / 2
    assert found[6]["theirs"] == 0.15
    assert found[6]["ours"] == pytest.approx(mean, abs=2e-4)
    # two values a and b have the standard error |a - b| / 2
    assert 0.05 <= found[6]["standard error of the difference"] <= 0.05 + abs(mean - found[4]["ours"]["by validation"])
    assert found[6]["in standard errors"] == pytest.approx(
        (found[6]["ours"] - 0.15) / found[6]["standard error of the difference"], abs=0.1
    )
    assert found[7]["clients"] == 16


FRIENDS = f"{TINY},relations=3"


def test_social_models_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = """
import json, numpy, sys
with numpy.load(sys.argv[2]) as given:
    relations = given["sources"].size
    assert given["targets"].size == relations > 0 < given["test_items"].size
model, epochs, every = (sys.argv[sys.argv.index(name) + 1] for name in ("--model", "--epochs", "--every"))
if every == "0":
    print(json.dumps({"seconds": {"SEPT": [9, 9, 9, 2, 4], "MHCN": [9, 5, 7]}[model][: int(epochs)]}))
else:
    print(json.dumps({"valid": [0.1, 0.3], "test": [0.4, 1 / relations]}))
"""
    venvs = fake(tmp_path, monkeypatch, social=program)
    (tmp_path / "SELFRec.py").touch()
    options = ("--venvs", venvs, "--selfrec", tmp_path, "--only", "social", "--turns", 1, "--epochs", 2)
    found = lines(monkeypatch, capsys, "--data", FRIENDS, *options)
    assert [line["figure"].split()[-1] for line in found] == ["SEPT", "SEPT", "MHCN", "MHCN"]
    assert [line["theirs"] for line in found[::2]] == [3, 6]  # of SEPT those with the contrast, the first one left out
    relations = load(FRIENDS).relations
    assert relations is not None
    for line in found[1::2]:
        assert line["theirs"] == {"by the test": 0.4, "by validation": round(1 / relations.sources.size, 4)}
        assert 0 < line["ours"]["by validation"] <= line["ours"]["by the test"] < 1
    pairs = "".join(f"{user} {item} 1\n" for user in range(12) for item in range(user, user + 6))
    (tmp_path / "pairs.txt").write_text(pairs + "40 3 1\n")
    (tmp_path / "trust.txt").write_text("4 5\n5 6\n6 4\n4 40\n")
    files = ("--data", tmp_path / "pairs.txt", "--relations", tmp_path / "trust.txt", "--k-core", 3, "--turns", 0)
    (line,) = lines(monkeypatch, capsys, *options, *files, "--models", "MHCN")
    assert line["theirs"]["by validation"] == 0.3333  # user 40 has one item alone


def test_first_vectors_are_as_large_as_those_of_xavier() -> None:
    dataset = load("synthetic:users=300,items=900")
    data, method = Training.of(dataset, torch.device("cpu")), configure("lightgcn").build()
    state = peers.first_vectors(method, data, Key(0))
    for table in (state.users, state.items):
        rule = torch.nn.init.xavier_uniform_(torch.empty(table.shape), generator=torch.Generator().manual_seed(0))
        assert float(table.std()) == pytest.approx(float(rule.std()), rel=0.02)


def test_social_models_have_the_options_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load(FRIENDS)
    data, size = Training.of(dataset, torch.device("cpu")), dataset.train.items.size
    nodes = dataset.n_users + dataset.n_items
    assert size < peers.BATCH  # one batch has all users
    sept, mhcn = (peers.social_options(model, data) for model in ("SEPT", "MHCN"))
    assert sept["weight"] * size == pytest.approx(0.005 * dataset.n_users)
    assert sept["l2"] * 3 * size == pytest.approx(1e-4 * nodes)
    assert mhcn["weight"] * size == pytest.approx(0.01 * dataset.n_users)
    monkeypatch.setattr(peers, "BATCH", 1)  # one user a batch
    assert peers.social_options("SEPT", data)["weight"] == pytest.approx(0.005)
    (tmp_path / "SELFRec.py").touch()
    asked = []
    monkeypatch.setattr(peers, "against", lambda *given: asked.append(given[-2:]) or [])
    monkeypatch.setattr(peers, "BATCH", 2048)
    for epochs in (30, 20):
        given = argparse.Namespace(selfrec=tmp_path, models=["SEPT"], learning_rate=0.01, epochs=epochs)
        assert list(peers.social(given, dataset, tmp_path)) == []
    # the contrast begins in the first epoch, counted from 0, that is above a third of all
    assert [[method.settings.warmup for method in both] for both in asked] == [[0, 11], [0, 7]]


def test_social_models_run_with_what_is_left_of_the_first_tensorflow(tmp_path: Path) -> None:
    files = {
        "tensorflow/__init__.py": "",
        "tensorflow/compat/__init__.py": "",
        "tensorflow/compat/v1.py": """
calls, glorot_uniform_initializer = [], lambda: "Glorot"
def disable_v2_behavior(): calls.append("off")
def set_random_seed(seed): calls.append(seed)
""",
        "code/util/conf.py": """
class ModelConf:
    def __init__(self, file): self.config = {"file": file.split("/")[-1]}
""",
        "code/model/graph/SEPT.py": """
import numpy as np
import tensorflow as tf
from types import SimpleNamespace
class SEPT:
    def __init__(self, conf, training, test, **tables):
        assert tf.calls == ["off", 3] and conf.config["file"] == "SEPT.yaml" and conf.config["learning.rate"] == 0.5
        assert tables["social.data"] == [["1", "0", 1]] and training == [["0", "2", 1.0], ["1", "0", 1.0]]
        self.epochs, self.data = conf.config["max.epoch"], SimpleNamespace(user={"0": 0, "1": 1})
        self.data.id2item = {number: str(24 - number) for number in range(25)}
    def build(self): assert tf.contrib.layers.xavier_initializer() == "Glorot"
    def save(self): print("saved")
    def train(self):
        for epoch in range(self.epochs): self.fast_evaluation(epoch)
    def predict(self, user): return np.arange(25.0)[::-1]
""",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    held = {"valid_users": [0], "valid_items": [23], "test_users": [0], "test_items": [21]}
    pairs = {"users": [0, 1], "items": [2, 0], "sources": [1], "targets": [0]}
    np.savez(tmp_path / "data.npz", shape=(2, 25), **{name: np.array(each) for name, each in (pairs | held).items()})
    program = [sys.executable, ROOT / "benchmarks/peer_programs/selfrec_social.py", tmp_path / "code"]
    options = ["--model", "SEPT", "--epochs", "4", "--every", "2", "--seed", "3", "--learning-rate", "0.5"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    run = subprocess.run(
        [*program, tmp_path / "data.npz", *options], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(run.stdout)
    assert len(found["seconds"]) == 4
    assert found["valid"] == pytest.approx([1 / np.log2(3)] * 2)  # behind item 24
    assert found["test"] == pytest.approx([0.5] * 2)  # behind 24 and 22: the validation item is not recommended


def test_peers_that_cannot_be_had_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = {
        "implicit": "raise SystemExit('no such processor')",
        "lightgcn": "",
        "selfrec": "",
        "social": "",
        "flower": "print('no figure')",
        "sequences": "",
    }
    venvs = fake(tmp_path, monkeypatch, **programs)
    options = ("--data", TINY, "--venvs", venvs, "--lightgcn", tmp_path / "nothing", "--turns", 1, "--dim", 4)
    found = lines(monkeypatch, capsys, *options, "--selfrec", tmp_path / "nothing")
    assert [line["peer"] for line in found] == list(programs)
    assert found[0]["left_out"] == "does not run: no such processor"
    assert found[1]["left_out"].startswith(f"has no code/world.py in {tmp_path / 'nothing'}")
    assert found[2]["left_out"].startswith(f"has no SELFRec.py in {tmp_path / 'nothing'}")
    assert found[3]["left_out"] == "the data have no relations between users; expected --relations FILE"
    assert found[4]["left_out"] == "printed no figure"
    assert found[5]["left_out"] == found[2]["left_out"]
    assert "order of a user's interactions is not known" in left_out(monkeypatch, capsys, venvs, tmp_path)


def left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], venvs: Path, folder: Path) -> str:
    """Why sequential models are not compared on data without an order."""
    (folder / "SELFRec.py").touch()
    (folder / "pairs.csv").write_text("user,item\n" + "".join(f"{u},{i}\n" for u in range(4) for i in range(u, u + 5)))
    options = ("--data", folder / "pairs.csv", "--only", "sequences", "--selfrec", folder, "--venvs", venvs)
    (found,) = lines(monkeypatch, capsys, *options)
    return str(found["left_out"])


def test_peers_that_do_not_end_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venvs = fake(tmp_path, monkeypatch, slow="import time; time.sleep(60)")
    monkeypatch.setattr(peers, "LONGEST", 0.1)
    with pytest.raises(peers.MissingError, match="not done after"):
        peers.measured("slow", venvs)


def test_peers_with_other_versions_are_installed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venvs = fake(tmp_path, monkeypatch, peer="")
    monkeypatch.setattr(peers, "PEERS", {"peer": peers.Peer(("one==2", "two==3"), "peer.py")})
    commands: list[list[str]] = []

    def make(*words: object) -> None:
        commands.append([*map(str, words)])
        (venvs / "peer").mkdir(exist_ok=True)
        if "pip" in commands[-1]:
            raise peers.MissingError("no network")

    monkeypatch.setattr(peers, "command", make)
    with pytest.raises(peers.MissingError, match="cannot be installed: no network"):
        peers.installed("peer", venvs)
    assert [each[1:3] for each in commands] == [["-m", "venv"], ["-m", "pip"]]
    assert commands[1][-2:] == ["one==2", "two==3"]
    monkeypatch.setattr(peers, "command", lambda *words: (venvs / "peer").mkdir(exist_ok=True))
    assert peers.installed("peer", venvs) == venvs / "peer" / "bin" / "python"
    monkeypatch.setattr(peers, "command", make)
    assert peers.installed("peer", venvs) == venvs / "peer" / "bin" / "python"  # it is there, and not made again
    assert len(commands) == 2


def test_an_evaluation_is_measured_against_the_machine() -> None:
    data = "synthetic:users=80,items=60,clusters=3,interactions_per_user=8"
    command = [sys.executable, "benchmarks/evaluation.py", "--data", data, "--dim", "8", "--times", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    seconds, limit = map(json.loads, run.stdout.splitlines())
    assert (seconds["figure"], seconds["build"], limit["figure"]) == ("evaluation_s", "here", "limit")
    assert 0 < seconds["users"] <= 240
    assert limit["value"] > 1
    assert limit["gflops"] > 0


def test_forgetting_is_measured_against_two_trainings_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--only", "synthetic", "--preset", "fedmf", "--rounds", "5", "--users", "5"]
    words += ["--methods", "resum:0.4", "replay:0.4", "--alone", "1", "--exact-alone", "--output", str(tmp_path)]
    forgetting.main(words)
    *lines, seconds = map(json.loads, capsys.readouterr().out.splitlines())
    whole = {line["model"]: line for line in lines if "alone" not in line}
    assert list(whole) == ["before", "exact", "exact, next seed", "resum", "replay"]
    assert (whole["exact"]["overlap@20"], whole["exact"]["scores"], whole["exact"]["above never"]) == (1, 0, 0)
    assert 0 < whole["exact, next seed"]["overlap@20"] < 1
    shares = {name: line["clients asked"] for name, line in whole.items()}
    assert shares["before"] == 1 > shares["exact"] > 0.9
    assert 0 < shares["resum"] < 0.5
    assert len({line["overlap@20"] for line in whole.values()}) == 5
    single = [line for line in lines if "alone" in line]
    assert [line["model"] for line in single] == ["exact, next seed", "before", "resum", "replay"]
    assert all(0 < line["first: overlap@20"] < 1 for line in single)
    assert seconds["data"] == "synthetic"
