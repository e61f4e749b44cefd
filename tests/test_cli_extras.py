"""Every command on a machine that has perfedrec without any extra: it works, or one line names the extra it needs."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
from tests.core_alone import closure

import perfedrec
from perfedrec.cli import app
from perfedrec.core.extras import MODULES

FEW = ["--set", "model.embedding_dim=8", "--set", "selection.n_clients_per_round=16", "--rounds", "2", "--quiet"]
WORKS: list[str] = [
    "train --data {data} --output {here}/run --set privacy.noise_source=simulation {few}",
    "demo --help",
    "evaluate --run {here}/run",
    "recommend --run {here}/run --user 3",
    "recommend --run {here}/run --all-users --output {here}/lists.csv",
    "audit {here}/run",
    "privacy plan --epsilon 8 --users 5000",
    "privacy report {here}/run",
    "bench {here}/bench.toml --output {here}/bench",
    "data info {data}",
    "data prepare {data} --output {here}/prepared",
    "data fetch --help",
    "node init --store {here}/home.node --catalogue {here}/items.txt",
    "node import {here}/mine.csv --store {here}/home.node",
    "node add ann 1 --store {here}/home.node",
    "node status --store {here}/home.node",
    "node items --store {here}/home.node --user ann",
    "node remove ann 1 --store {here}/home.node",
    "node dismiss ann 1 --store {here}/home.node",
    "node catalogue {here}/titles.csv --store {here}/home.node",
    "node export-user --store {here}/home.node --user ann --output {here}/ann.json",
    "node privacy --store {here}/home.node",
    "node rules --store {here}/home.node",
    "node export --run {here}/run --output {here}/model",
    "node init --store {here}/guest.node --model {here}/model",
    "node receive --store {here}/guest.node --model {here}/model",
    "node import {here}/mine.csv --store {here}/guest.node --skip-unknown",
    "node recommend --store {here}/guest.node --user bob",
    "node lists --store {here}/guest.node --output {here}/all.parquet",
    "node vectors --store {here}/guest.node --output {here}/vectors",
    "node forget --store {here}/home.node --user ann",
    "federation watch --help",
    "federation nodes --help",
    "attack --help",
    "forget {here}/run --user 3 --output {here}/without",
    "config list",
    "config keys",
    "config show paper",
]
NEEDS = {
    "tune --data {data} --algorithm item_knn --output {here}/study": "tune",
    "report {here}/run": "report",
    "report {here}/run --figures {here}/a": "figures",
    "train --data {data} --output {here}/a --track tensorboard {few}": "tensorboard",
    "train --data {data} --output {here}/a --track mlflow {few}": "mlflow",
    "train --data {data} --output {here}/a --privacy private --rounds 0 --set privacy.noise_source=opendp": "opendp",
    "federation up --output {here}/a": "flower",
    "federation certificates {here}/a": "flower",
    "federation key {here}/a": "flower",
    "federation bundles {here}/a --node n0": "flower",
    "federation page {here}": "web",
    "federation forget {here}/run --request {here}/ann.request --keys {here}/keys": "flower",
    "forget {here}/run --user 3 --output {here}/a --sign {here}/operator": "flower",
    "node verify {here}/without/certificate.json --operator {here}/operator.pub": "flower",
    "models list --registry {here}/a": "flower",
    "models add {here}/run --registry {here}/a": "flower",
    "models promote 1 --registry {here}/a": "flower",
    "models roll-back --registry {here}/a": "flower",
    "serve --output {here}/a --certificates c --nodes n --catalogue {here}/items.txt": "flower",
    "tour --output {here}/a": "flower",
    "node app --store {here}/home.node": "web",
    "node run --store {here}/home.node --coordinator h:1 --ca c --key k": "flower",
    "node serve --store {here}/home.node": "web",
    "service run --coordinator h:1 --ca c --key k --state {here}/a": "flower",
}


MAIN: Any = typer.main.get_command(app)
GROUPS = {name for name, command in MAIN.commands.items() if isinstance(command, click.Group)}


def leaves(group: click.Command, path: tuple[str, ...] = ()) -> Iterator[str]:
    """All commands of the command line."""
    if not isinstance(group, click.Group):
        yield " ".join(path)
        return
    for name, command in group.commands.items():
        yield from leaves(command, (*path, name))


@pytest.mark.slow
@pytest.mark.timeout(400)  # torch is imported three times, which takes long on a busy machine
def test_every_command_works_or_names_the_extra_that_it_needs(tmp_path: Path) -> None:
    (tmp_path / "items.txt").write_text("1\n2\n")
    (tmp_path / "titles.csv").write_text("item,title\n1,One\n2,Two\n")
    (tmp_path / "mine.csv").write_text("user,item\nbob,1\nbob,2\nann,2\n")
    (tmp_path / "bench.toml").write_text('seeds = [0]\n[data.a]\npath = "synthetic:users=120"\n[methods.popularity]\n')
    values = {"data": "synthetic:users=120,items=200", "here": str(tmp_path), "few": " ".join(FEW)}
    commands = [each.format(**values).split() for each in (*WORKS, *NEEDS)]
    assert {" ".join(each[: 1 + (each[0] in GROUPS)]) for each in commands} == set(leaves(MAIN))
    script = Path(__file__).with_name("core_alone.py")
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(commands), capture_output=True, text=True, check=True
    )
    results = json.loads(done.stdout)
    for command, result, extra in zip(commands, results, (*[None] * len(WORKS), *NEEDS.values()), strict=True):
        assert result["bug"] is None, (command, result)
        assert result["code"] == (2 if extra else 0), (command, result)
        if extra:
            assert result["stderr"].count("\n") == 1, (command, result)
            assert f" needs the extra {extra}, which is not installed; install it with: " in result["stderr"]
            assert result["stderr"].rstrip().rstrip("'").endswith(f"[{extra}]"), (command, result)
    assert not (tmp_path / "a").exists()


def test_each_module_that_is_imported_comes_with_the_core_or_with_an_extra() -> None:
    """So that a missing one is never a traceback."""
    homes, core = metadata.packages_distributions(), closure("perfedrec")
    for file in Path(perfedrec.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {each.partition(".")[0] for each in names} - {"perfedrec", *sys.stdlib_module_names}:
                with_core = any(each.lower().replace("_", "-") in core for each in homes.get(name, ()))
                assert with_core or name in MODULES or name == "IPython", f"{file}: {name}"  # which a notebook has
