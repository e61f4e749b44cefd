"""Versions of served models: added, promoted, rolled back, and given to nodes; also where something is interrupted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.federation.conftest import Federation
from typer.testing import CliRunner

from perfedrec import configure, load, train
from perfedrec.cli import app
from perfedrec.core.errors import CheckpointError, ConfigError
from perfedrec.core.types import NEWCOMER
from perfedrec.data import Catalogue
from perfedrec.federation import coordinator
from perfedrec.federation.model_file import read_model, shared_model
from perfedrec.federation.registry import Registry
from perfedrec.runs.folder import RunFolder
from perfedrec.runtimes.node import Store

runner = CliRunner()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "models")


@pytest.fixture
def runs(finished: Federation, tmp_path: Path) -> Callable[[str], Path]:
    """A function that makes finished runs of a federation, which differ in their names alone."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(finished.folder, folder, ignore=shutil.ignore_patterns("checkpoints"))
        (folder / "name").write_text(name)
        return folder

    return make


def served(registry: Registry) -> Path:
    return (registry.path / "served.model").resolve().parent


def files(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in sorted(folder.rglob("*")) if each.is_file()}


def test_versions_have_the_accuracy_and_privacy_of_their_runs(
    registry: Registry, runs: Callable[[str], Path], finished: Federation
) -> None:
    summary = RunFolder(finished.folder).summary()
    version = registry.add(runs("a"))
    assert (version.number, version.run, version.method, version.users) == (1, "a", "perfedrec_pp", 80)
    assert (version.valid, version.test) == (summary.valid[version.metric], summary.test[version.metric])
    assert (version.claim, version.epsilon, version.delta) == (summary.privacy["claim"], None, 1e-5)
    assert registry.promoted is None
    assert registry.versions() == Registry(registry.path).versions() == [version]
    assert registry.add(registry.path.parent / "a") == version  # as a run that is finished twice
    assert [each.number for each in (registry.add(runs("b")), *registry.versions())] == [2, 1, 2]
    model, setup = registry.model(1)
    assert torch.equal(model.users, torch.arange(80))
    assert (setup.run, setup.catalogue) == ("a", model.catalogue.fingerprint)
    item_table = finished.simulator.algorithm.serving(finished.simulator.state).items
    assert torch.equal(model.state.items, item_table)


def test_a_version_of_a_simulated_run_is_one_of_users_whom_no_node_knows(registry: Registry, tmp_path: Path) -> None:
    small = ["data.path=synthetic:users=40,items=30,interactions_per_user=6,clusters=2", "run.threads=1"]
    small += ["model.embedding_dim=4", "run.rounds=1", "selection.n_clients_per_round=40"]
    config = configure("fedmf", privacy="secure", overrides=small)
    train(config.build(), load(config.data.path), config.run, output=tmp_path / "run", config=config)
    version = registry.add(tmp_path / "run")
    assert (version.method, version.users, version.run) == ("fedmf", 40, version.model)
    registry.promote(1)
    model, setup = registry.model(1)
    assert model.users.tolist() == [NEWCOMER] * 40
    assert setup.run == version.run == read_model(registry.path / "served.model").run
    config = configure("item_knn", overrides=small[:1])
    train(config.build(), load(config.data.path), config.run, output=tmp_path / "knn", config=config)
    with pytest.raises(ConfigError, match="item_knn is centralised; expected the run of a federated method"):
        registry.add(tmp_path / "knn")


def test_promote_and_roll_back(registry: Registry, runs: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="no version was promoted; expected two promotions or more"):
        registry.roll_back()
    assert not registry.path.exists()
    for name in ("a", "b", "c"):
        registry.add(runs(name))
    before = {number: files(registry.folder(number)) for number in (1, 2, 3)}
    for number in (1, 3, 2, 2):  # the last one changes nothing
        assert registry.promote(number).number == number
        assert (registry.promoted, served(registry)) == (number, registry.folder(number))
    for number in (3, 1):
        assert registry.roll_back().number == number
        assert (registry.promoted, served(registry)) == (number, registry.folder(number))
    with pytest.raises(
        ConfigError, match="version 1 was promoted, and none before it; expected two promotions or more"
    ):
        registry.roll_back()
    assert registry.promoted == 1
    assert before == {number: files(registry.folder(number)) for number in (1, 2, 3)}


def test_unknown_and_damaged_versions_are_not_promoted(registry: Registry, runs: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="has no version 1; expected perfedrec models add RUN first"):
        registry.promote(1)
    assert not registry.path.exists()
    for name in ("a", "b"):
        registry.add(runs(name))
    registry.promote(1)
    with pytest.raises(ConfigError, match="has no version 7; expected one of 1, 2"):
        registry.promote(7)
    for name, message in (("served.model", "is not the file that was added"), ("model/state.safetensors", "SHA-256")):
        path = registry.folder(2) / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=message):
            registry.promote(2)
        path.write_bytes(whole)
    assert (registry.promoted, served(registry)) == (1, registry.folder(1))
    registry.promote(2)
    (registry.folder(1) / "served.model").unlink()
    with pytest.raises(CheckpointError, match="is not the file that was added"):
        registry.roll_back()
    assert registry.promoted == 2


class Killed(BaseException):
    """The process ends here."""


def dying(call: int, patch: pytest.MonkeyPatch) -> None:
    """Let the process end instead of its write number ``call`` to the disk."""
    count = iter(range(1000))

    def before(real: Callable[..., Any]) -> Callable[..., Any]:
        def die(*given: Any, **named: Any) -> Any:
            if next(count) == call:
                raise Killed
            return real(*given, **named)

        return die

    for name in ("rename", "replace", "symlink", "fsync"):
        patch.setattr(os, name, before(getattr(os, name)))


def test_what_is_interrupted_has_happened_or_has_not(
    registry: Registry, runs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A change is interrupted before each of its writes to the disk. Afterwards the registry can be used as always."""
    registry.add(runs("a"))
    registry.promote(1)
    run, seen, call, killed = runs("b"), set[tuple[int, int, int]](), 0, True
    model = shared_model(run, None)
    monkeypatch.setattr("perfedrec.federation.registry.shared_model", lambda run, data: model)  # read once
    while killed:
        again = Registry(Path(shutil.copytree(registry.path, tmp_path / f"copy {call}", symlinks=True)))
        with monkeypatch.context() as patch:
            dying(call, patch)
            try:
                again.add(run)
                again.promote(2)
                killed = False
            except Killed:
                call += 1
        state = len(again.versions()), again.promoted or 0, int(served(again).name)
        seen.add(state)
        again.check(again.version(state[2]))
        assert again.add(run).number == 2
        again.promote(2)
        assert (again.promoted, served(again)) == (2, again.folder(2))
        assert [each.name for each in (again.path / "versions").iterdir() if each.name.startswith(".")] == []
        assert again.roll_back().number == 1
    assert call > 10
    assert seen == {(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2)}


def test_a_link_that_was_not_replaced_is_replaced_by_the_next_change(
    registry: Registry, runs: Callable[[str], Path]
) -> None:
    for name in ("a", "b"):
        registry.add(runs(name))
    registry.promote(1)
    index = json.loads((registry.path / "registry.json").read_text())
    (registry.path / "registry.json").write_text(json.dumps(index | {"promoted": [1, 2]}))
    assert served(registry) == registry.folder(1)
    registry.add(registry.path.parent / "a")
    assert served(registry) == registry.folder(2)


def test_a_registry_is_for_one_catalogue(registry: Registry, runs: Callable[[str], Path]) -> None:
    version = registry.add(runs("a"))
    other = runs("b")
    Catalogue(np.arange(100, 160)).write(other / "items.txt")
    foreign = Catalogue(np.arange(100, 160)).fingerprint
    manifest = json.loads((other / "model" / "checkpoint.json").read_text())
    manifest["belongs"]["catalogue"] = foreign
    (other / "model" / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=f"b: has the catalogue {foreign}, and .*models is for {version.catalogue}"):
        registry.add(other)
    with pytest.raises(ConfigError, match=f"has models for the catalogue {version.catalogue}, and this is {foreign}"):
        Registry(registry.path, foreign)
    assert Registry(registry.path, version.catalogue).versions() == [version]


def test_a_folder_of_something_else_is_left_alone(runs: Callable[[str], Path], tmp_path: Path) -> None:
    run = runs("a")
    before = files(run)
    for place in (run, run / "name"):
        with pytest.raises(CheckpointError, match="is no registry of models; expected one, or a new folder"):
            Registry(place)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "registry.json").write_text('{"format": 9}')
    with pytest.raises(CheckpointError, match=r"registry.json: cannot be read \(format 9\)"):
        Registry(tmp_path / "models")
    assert files(run) == before


def test_a_node_takes_the_promoted_model_as_a_file(
    registry: Registry, runs: Callable[[str], Path], finished: Federation, tmp_path: Path
) -> None:
    """From the command line, which says what it has done; a registry that does not exist is made."""
    words = ["--registry", str(registry.path)]
    nothing = runner.invoke(app, ["models", "list", *words])
    assert (nothing.exit_code, nothing.stderr.count("\n")) == (2, 1)
    assert "there is no registry of models; expected perfedrec models add RUN first" in nothing.stderr
    for name in ("a", "b"):
        added = runner.invoke(app, ["models", "add", str(runs(name)), *words])
        assert added.exit_code == 0, added.output
    assert added.output.startswith("version 2: perfedrec_pp, run b, round 3, test recall@20 0.")
    assert added.output.endswith("; not promoted\n")
    for command, number in ((["promote", "1"], 1), (["promote", "2"], 2), (["roll-back"], 1)):
        done = runner.invoke(app, ["models", *command, *words])
        assert done.exit_code == 0, done.output
        told = json.loads(runner.invoke(app, ["models", "list", *words, "--json"]).stdout)
        assert [each["number"] for each in told["versions"] if each["promoted"]] == [number]
    assert done.output.startswith("version 1: perfedrec_pp, run a")
    listed = runner.invoke(app, ["models", "list", *words]).output
    assert "promoted" in listed
    Store.create(tmp_path / "home.node", finished.dataset.train.item_ids).close()
    given = ["--store", str(tmp_path / "home.node"), "--model", str(registry.path / "served.model")]
    received = runner.invoke(app, ["node", "receive", *given])
    assert received.exit_code == 0, received.output
    with Store.open(tmp_path / "home.node") as store:
        assert store.served().run == read_model(registry.folder(1) / "served.model").run
    unknown = runner.invoke(app, ["models", "promote", "9", *words])
    assert (unknown.exit_code, unknown.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("promote", "promoted", "asked"), [(False, None, "own"), (True, 1, "own"), (False, 2, "own"), (False, 1, "a")]
)
def test_nodes_get_the_promoted_version_at_the_end_of_a_run(
    promote: bool, promoted: int | None, asked: str, registry: Registry, runs: Callable[[str], Path]
) -> None:
    """Version 1 is of an earlier run, version 2 of this one."""
    for name in ("a", "b"):
        registry.add(runs(name))
    if promoted is not None:
        registry.promote(promoted)
    given = list[Any]()

    def own(state: Any) -> list[int]:
        given.append("own")
        return [5, 6]

    def other(algorithm: Any, state: Any, users: Any, setup: Any) -> list[int]:
        given.append(setup.run)
        return [5, 6]

    run: Any = SimpleNamespace(
        setup=SimpleNamespace(run="b"), best=None, selection=SimpleNamespace(best_round=registry.version(2).round)
    )
    directory = SimpleNamespace(hosts={5: None, 6: None, 7: None})
    asking: Any = SimpleNamespace(hand_out=own, hand_out_other=other, directory=directory)
    took, instead = coordinator._hand_out(run, asking, registry, promote)
    assert given == [asked]
    assert took == ([5, 6] if asked == "own" else [])
    assert instead == ("" if asked == "own" else f"version 1 of {registry.path}, which is promoted, is on 2 of 3 nodes")
