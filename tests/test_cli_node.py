"""perfedrec node as people use it, from a finished run to recommendations on their own machine."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import save_file
from typer.testing import CliRunner

from perfedrec.cli import app
from perfedrec.data import load

runner = CliRunner()
DATA = "synthetic:users=150,items=120,clusters=3,interactions_per_user=10"
FEW = ["--rounds", "12", "--set", "model.embedding_dim=8", "--set", "selection.n_clients_per_round=60", "--quiet"]


def cli(*arguments: object, code: int = 0) -> Any:
    result = runner.invoke(app, [str(each) for each in arguments])
    assert result.exit_code == code, result.output
    if code:
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "a"
    cli("train", "--data", DATA, "--output", folder, "--set", "clusters.start=2", *FEW)
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> Path:
    file = run.parent / "served.model"
    cli("node", "export", "--run", run, "--output", file)
    return file


def test_from_a_run_to_recommendations_on_a_node(run: Path, model: Path, tmp_path: Path) -> None:
    home = tmp_path / "home.node"
    train = load(DATA).train
    assert f"{train.n_items} items" in cli("node", "init", "--store", home, "--model", model).stdout
    own = train.frame().filter(pl.col("user") == 7).with_columns(user=pl.lit("ann"))
    own.write_csv(tmp_path / "mine.csv")
    said = cli("node", "import", tmp_path / "mine.csv", "--store", home).stdout
    assert said.startswith(f'{own.height} new interactions, 1 new user\nread as csv: user = column 1 "user", item = ')
    assert cli("node", "import", tmp_path / "mine.csv", "--store", home).stdout.startswith("0 new interactions, 0 new")

    def recommended() -> list[dict[str, Any]]:
        answer = json.loads(cli("node", "recommend", "--store", home, "--user", "ann", "--k", 6, "--json").stdout)
        assert answer["user"] == "ann"
        items: list[dict[str, Any]] = answer["items"]
        return items

    first = recommended()
    simulated = json.loads(cli("recommend", "--run", run, "--user", 7, "--k", 6, "--json").stdout)["items"]
    assert [each["rank"] for each in first] == [1, 2, 3, 4, 5, 6]
    assert list(first[0]) == [*simulated[0], "title", "picture", "attributes"]  # the same columns and more
    assert len({each["item"] for each in first} & {each["item"] for each in simulated}) >= 4  # with the same history
    best = first[0]["item"]
    assert cli("node", "add", "ann", best, "--store", home).stdout == "1 new interaction of ann\n"
    after = recommended()
    assert best not in {each["item"] for each in after}
    assert after[0]["score"] != first[1]["score"]
    assert str(after[0]["item"]) in cli("node", "recommend", "--store", home, "--user", "ann").stdout
    status = json.loads(cli("node", "status", "--store", home, "--json").stdout)
    assert (status["users"], status["interactions"], status["items"]) == (1, own.height + 1, train.n_items)
    assert status["model"]["run"].startswith("a-")
    assert status["model"]["age_seconds"] >= 0
    docs = (Path(__file__).parents[1] / "docs" / "node.md").read_text(encoding="utf-8")
    explained = {name for line in docs.splitlines() if line.startswith("| ") for name in line.split("|")[1].split(",")}
    assert {name.replace("_", " ") for name in status} - {"store"} <= {name.strip() for name in explained}
    assert "interactions" in cli("node", "status", "--store", home).stdout
    unknown = cli("node", "recommend", "--store", home, "--user", "bob", code=2).stderr
    assert unknown.strip().endswith("has no such user; expected its only user")
    cli("node", "forget", "--store", home, "--user", "ann")
    assert "unknown user 'ann'" in cli("node", "recommend", "--store", home, "--user", "ann", code=2).stderr


def test_a_model_holds_tables_and_nothing_about_a_user(run: Path, model: Path) -> None:
    content, users = model.read_bytes(), load(DATA).n_users
    assert all(users not in each.shape for each in load_file(model).values())
    vectors = load_file(run / "model" / "memory.safetensors")["private"]
    assert not any(vector.tobytes() in content for vector in vectors)
    with safe_open(model, "np") as file:
        assert "path" not in file.metadata()["configuration"]  # nor the path of the data


def test_catalogue_from_a_file_and_a_model_later(model: Path, tmp_path: Path) -> None:
    train, home = load(DATA).train, tmp_path / "home.node"
    (tmp_path / "items.txt").write_text("\n".join(map(str, train.item_ids)) + "\n")
    cli("node", "init", "--store", home, "--catalogue", tmp_path / "items.txt")
    cli("node", "add", "u", *train.item_ids[:3], "--store", home)
    assert "has received no model yet" in cli("node", "recommend", "--store", home, "--user", "u", code=2).stderr
    cli("node", "receive", "--store", home, "--model", model)
    assert len(json.loads(cli("node", "recommend", "--store", home, "--user", "u", "--json").stdout)["items"]) == 20
    (tmp_path / "other.txt").write_text("\n".join(map(str, np.flip(train.item_ids))) + "\n")
    cli("node", "init", "--store", tmp_path / "b.node", "--catalogue", tmp_path / "other.txt")
    refused = cli("node", "receive", "--store", tmp_path / "b.node", "--model", model, code=2)
    assert "expected the same items in the same order" in refused.stderr


def test_numbers_of_users_can_be_given(model: Path, tmp_path: Path) -> None:
    home, file = tmp_path / "home.node", tmp_path / "many.csv"
    cli("node", "init", "--store", home, "--model", model)
    file.write_text("user,item\nzoe,1\nann,2\nzoe,3\n")
    cli("node", "import", file, "--store", home, "--first-identity", 10)
    assert json.loads(cli("node", "status", "--store", home, "--json").stdout)["registered"] == 2
    file.write_text("user,item\nbob,1\n")
    taken = cli("node", "import", file, "--store", home, "--first-identity", 11, code=2)
    assert "identity 11 of user 'bob' is another user's" in taken.stderr


def test_what_an_owner_sees_and_decides(model: Path, tmp_path: Path) -> None:
    home, items = tmp_path / "home.node", load(DATA).train.item_ids.tolist()
    cli("node", "init", "--store", home, "--model", model)
    cli("node", "add", "ann", *items[:4], "--store", home)
    (tmp_path / "shop.csv").write_text(f"item;title;kind\n{items[0]};Tea, green;drink\n900;Gin;drink\n")
    said = cli("node", "catalogue", tmp_path / "shop.csv", "--store", home).stdout
    assert said.endswith(
        "2 titles, 0 pictures, and kind: 1 item described, 1 left out that the catalogue does not have\n"
    )
    assert "Tea, green" in cli("node", "items", "--store", home, "--user", "ann").stdout
    assert (
        cli("node", "remove", "ann", *items[1:3], items[9], "--store", home).stdout == "2 interactions of ann deleted\n"
    )
    assert cli("node", "dismiss", "ann", items[5], "--store", home).stdout == "1 item not recommended any more to ann\n"
    assert cli("node", "dismiss", "ann", items[5], items[6], "--undo", "--store", home).stdout.startswith(
        "1 item recomm"
    )
    cli("node", "dismiss", "ann", items[7], "--store", home)
    found = json.loads(cli("node", "items", "--store", home, "--user", "ann", "--json").stdout)
    assert [[row["item"] for row in found[name]] for name in ("items", "dismissed")] == [
        [items[0], items[3]],
        [items[7]],
    ]

    assert "nothing has left this node" in cli("node", "privacy", "--store", home).stdout
    assert json.loads(cli("node", "privacy", "--store", home, "--json").stdout)["journal"] == []
    for name in ("ann.json", "ann.csv"):
        cli("node", "export-user", "--store", home, "--user", "ann", "--output", tmp_path / name)
    everything = json.loads((tmp_path / "ann.json").read_text())
    assert (everything["items"], everything["identity"]) == (found["items"], None)
    assert (tmp_path / "ann.csv").read_text() == f'user,item,title\nann,{items[0]},"Tea, green"\nann,{items[3]},\n'
    assert cli("node", "import", tmp_path / "ann.csv", "--store", home).stdout.startswith("0 new interactions")

    assert "profile secure (the usual" in cli("node", "rules", "--store", home).stdout
    assert (
        "profile private (these rules say so)" in cli("node", "rules", "--store", home, "--require", "private").stdout
    )
    assert "is paused" in cli("node", "rules", "--store", home, "--pause").stdout
    assert "takes part\n" in cli("node", "rules", "--store", home, "--resume", "--require", "usual").stdout
    assert "has left" in cli("node", "rules", "--store", home, "--leave").stdout
    came_back = json.loads(cli("node", "rules", "--store", home, "--come-back", "--json").stdout)
    assert came_back == {"require": ["secure"], "chosen": None, "paused": False, "left": False}
    gone = cli("node", "forget", "--store", home, "--user", "ann").stdout
    assert gone.splitlines() == [
        f"nothing about ann is left in {home}",
        "As far as the journal goes back, nothing of this user is in any sum.",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("init", "--store", "{new}"), "either --catalogue FILE or --model FILE"),
        (("init", "--store", "{home}", "--model", "{model}"), "exists already"),
        (("init", "--store", "{folder}/no/where", "--model", "{model}"), "cannot be made"),
        (("init", "--store", "{folder}", "--model", "{model}"), "is a folder"),
        (("init", "--store", "{new}", "--model", "{file}"), "damaged model file"),
        (("init", "--store", "{new}", "--catalogue", "nowhere.txt"), "no such file"),
        (("status", "--store", "{new}"), "perfedrec node init"),
        (("status", "--store", "{file}"), "not a node's file"),
        (("import", "{file}", "--store", "{home}"), "1 of 2 interactions have items that are not in the catalogue"),
        (("import", "nowhere.csv", "--store", "{home}"), "no such file"),
        (("add", "ann", "gin", "--store", "{home}"), "unknown item 'gin'"),
        (("remove", "ann", "gin", "--store", "{home}"), "unknown item 'gin'"),
        (("dismiss", "bob", "1", "--store", "{home}"), "unknown user 'bob'"),
        (("items", "--user", "bob", "--store", "{home}"), "unknown user 'bob'"),
        (("catalogue", "nowhere.csv", "--store", "{home}"), "no such file"),
        (("privacy", "--user", "bob", "--store", "{home}"), "unknown user 'bob'"),
        (("privacy", "--limit", "0", "--store", "{home}"), "expected 1 or more"),
        (("rules", "--require", "strong", "--store", "{home}"), "expected one of none, paper, private, secure"),
        (("rules", "--leave", "--come-back", "--store", "{home}"), "--leave and --come-back were both given"),
        (("rules", "--pause", "--resume", "--store", "{home}"), "--pause and --resume were both given"),
        (("export-user", "--user", "ann", "--store", "{home}", "--output", "{new}"), "ends in .json or .csv"),
        (("export-user", "--user", "bob", "--store", "{home}", "--output", "{folder}/b.csv"), "unknown user 'bob'"),
        (("recommend", "--store", "{home}", "--user", "ann", "--k", "0"), "expected 1 or more"),
        (("recommend", "--store", "{home}", "--user", "bob"), "unknown user 'bob'"),
        (("export", "--run", "nowhere", "--output", "{new}"), "nowhere"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], said: str, model: Path, tmp_path: Path) -> None:
    names = {"home": tmp_path / "h.node", "new": tmp_path / "n.node", "file": tmp_path / "f.csv", "model": model}
    names["file"].write_text("user,item\nann,1\nann,100000\n")
    cli("node", "init", "--store", names["home"], "--model", model)
    cli("node", "add", "ann", "1", "--store", names["home"])
    before = json.loads(cli("node", "status", "--store", names["home"], "--json").stdout)
    failed = cli("node", *(each.format(**names, folder=tmp_path) for each in arguments), code=2)
    assert said in failed.stderr
    assert "/." not in failed.stderr  # no name of a temporary file
    after = json.loads(cli("node", "status", "--store", names["home"], "--json").stdout)
    assert (after["users"], after["interactions"]) == (before["users"], before["interactions"])
    assert not names["new"].exists()
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


def test_a_model_cannot_bring_code(model: Path, tmp_path: Path) -> None:
    code, spoiled = tmp_path / "mine.py", tmp_path / "spoiled.model"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with safe_open(model, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in sorted(file.keys())}
    metadata["configuration"] = metadata["configuration"].replace('"perfedrec_pp"', f'"{code}:Mine"')
    assert str(code) in metadata["configuration"]
    save_file(tensors, spoiled, metadata)
    refused = cli("node", "init", "--store", tmp_path / "a.node", "--model", spoiled, code=2)
    assert "does not come with perfedrec" in refused.stderr
    assert not (tmp_path / "ran").exists()


def test_attributes_are_imported_change_the_scores_and_are_forgotten(tmp_path: Path) -> None:
    data, home = tmp_path / "data", tmp_path / "home"
    data.mkdir()
    home.mkdir()
    load(DATA).train.frame().write_csv(data / "data.csv")
    rows = "".join(f"{each},{20 + each % 50},{'ab'[each % 2]}\n" for each in range(150))
    (data / "user_attributes.csv").write_text(f"user,age,kind\n{rows}")
    options = ("--preset", "perfedrec", "--set", "model.attributes=true", "--set", "client.dense_learning_rate=2", *FEW)
    cli("train", "--data", data / "data.csv", "--output", tmp_path / "run", *options)
    cli("node", "export", "--run", tmp_path / "run", "--output", tmp_path / "a.model")
    store = home / "a.node"
    made = cli("node", "init", "--store", store, "--model", tmp_path / "a.model").stdout
    assert "items, 3 user attributes, catalogue" in made
    train = load(data / "data.csv").train
    train.frame().filter(pl.col("user") == 7).with_columns(user=pl.lit("ann")).write_csv(home / "mine.csv")

    def scores(age: int, kind: str) -> list[float]:
        (home / "user_attributes.csv").write_text(f"user,age,kind\nann,{age},{kind}\nbob,30,a\n")
        assert ", attributes of 1 user\n" in cli("node", "import", home / "mine.csv", "--store", store).stdout
        answer = json.loads(cli("node", "recommend", "--store", store, "--user", "ann", "--k", 120, "--json").stdout)
        return [each["score"] for each in sorted(answer["items"], key=lambda each: each["item"])]

    first = scores(20, "a")
    assert scores(20, "a") == first
    assert max(abs(a - b) for a, b in zip(first, scores(69, "b"), strict=True)) > 1e-3
    assert scores(200, "b") == scores(69, "b")  # numbers are limited to the range that the federation knows
    (home / "user_attributes.csv").write_text("user,age,kind\nann,20,gold\n")
    assert "'gold'" in cli("node", "import", home / "mine.csv", "--store", store, code=2).stderr
    cli("node", "forget", "--store", store, "--user", "ann")
    assert json.loads(cli("node", "status", "--store", store, "--json").stdout)["users"] == 0


def test_a_coordinator_reports_missing_attributes_before_it_listens(tmp_path: Path) -> None:
    (tmp_path / "items.txt").write_text("tea\nmilk\n")
    given = ["--catalogue", tmp_path / "items.txt", "--certificates", tmp_path, "--nodes", tmp_path, "--output"]
    options = ["--set", "model.attributes=true", "--preset", "perfedrec", "--privacy", "secure"]
    assert "beside the catalogue" in cli("serve", *given, tmp_path / "run", *options, code=2).stderr
    assert not (tmp_path / "run").exists()
