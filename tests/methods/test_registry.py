"""How a method is found: by its name, in a user's file, as an entry point; and the examples of docs/methods.md."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from perfedrec import ConfigError, configure, open_run
from perfedrec.cli import app
from perfedrec.methods.registry import METHODS, centralised, method

DOCUMENT = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
DATA = "synthetic:users=300,items=400,clusters=8,interactions_per_user=15,seed=2"
NAMED = {"EASE": "ease.py", "FedBiased": "biased.py"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of the document, as they are written there."""
    for example in re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL):
        (name,) = [file for kind, file in NAMED.items() if f"class {kind}(" in example]
        (tmp_path / name).write_text(example, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


def recall(folder: str) -> tuple[float, float]:
    summary = json.loads((Path(folder) / "result.json").read_text())
    return summary["test"]["recall@20"], summary["popularity"]["recall@20"]


def test_the_centralised_example(here: Path) -> None:
    own = "ease.py:EASE"
    run("train", "--algorithm", own, "--data", DATA, "--output", "ease", "--quiet")  # fitted at once: no rounds
    found, floor = recall("ease")
    assert found > 1.8 * floor
    assert "method.l2" in run("config", "keys", "--algorithm", own)
    assert "user" in run("recommend", "--run", "ease", "--user", "0", "--k", "3")
    assert open_run(here / "ease")[1].algorithm == own


def test_the_federated_example(here: Path) -> None:
    own = ("--algorithm", "biased.py:FedBiased", "--data", DATA, "--quiet", "--set", "selection.n_clients_per_round=64")
    rounds = ("--rounds", "120", "--set", "run.evaluate_every=40")
    run("train", *own, *rounds, "--set", "bias.weight=0.5", "--output", "biased")
    found, floor = recall("biased")
    assert found > 1.5 * floor
    run("train", *own, "--rounds", "2", "--privacy", "paper", "--output", "private")
    kept = open_run(here / "private")[1]
    assert (kept.privacy.noise_scale, kept.bias.weight) == (0.1, 1.0)  # type: ignore[attr-defined]


def test_an_installed_package_offers_a_method(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed wheel is a package with metadata beside it."""
    package, installed = here / "site" / "shallow", here / "site" / "shallow-1.0.dist-info"
    package.mkdir(parents=True)
    installed.mkdir()
    (package / "__init__.py").touch()
    (here / "ease.py").rename(package / "ease.py")
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: shallow\nVersion: 1.0\n")
    (group,) = re.findall(r"```toml\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    assert 'entry-points."perfedrec.methods"' in group
    (installed / "entry_points.txt").write_text(
        "[perfedrec.methods]\nshallow_ease = shallow.ease:EASE\nbroken = shallow.nothing:EASE\nwrong = json:dumps\n"
    )
    monkeypatch.syspath_prepend(here / "site")
    run("train", "--algorithm", "shallow_ease", "--data", DATA, "--rounds", "0", "--output", "run", "--quiet")
    found, floor = recall("run")
    assert found > 1.8 * floor
    assert open_run(here / "run")[1].algorithm == "shallow_ease"
    with pytest.raises(ConfigError, match=r"broken cannot be loaded: ModuleNotFoundError: .*shallow\.nothing"):
        method("broken")
    with pytest.raises(ConfigError, match="wrong is not a method"):
        method("wrong")


@pytest.mark.parametrize(("text", "said"), [
    ("def (:", "SyntaxError"),
    ("import nothing_of_the_kind", "ModuleNotFoundError"),
    ("raise ValueError('too early')", "ValueError: too early"),
    ("x = 1", "own.py has no class 'Own'; expected a method's"),
    ("class Mine: pass\nOwn2 = Mine", "own.py has no class 'Own'; expected a method's, as in file.py:Class; did you"),
    ("class Own: pass", "is not a method; expected a subclass of perfedrec.Method"),
])  # fmt: skip
def test_a_file_without_a_method_is_reported_in_one_line(text: str, said: str, here: Path) -> None:
    (here / "own.py").write_text(text)
    done = CliRunner().invoke(app, ["train", "--algorithm", "own.py:Own", "--data", DATA])
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("before", "after", "said"), [
    ("def scores(", "def score(", "ease.py:EASE lacks scores; expected a definition of each"),
    ("def init(", "def fit(", "ease.py:EASE lacks init; expected"),
    ("Options = EASESettings", "trained = True", "ease.py:EASE lacks epoch; expected"),
    ("l2: float = ", "l2: float = 1 / 0 + ", "ease.py, line {line}, in EASESettings: ZeroDivisionError: division"),
    ("inverse = ", "inverse = 1 / 0 + ", "ease.py, line {line}, in init: ZeroDivisionError: division by zero"),
    ("return own @", "return own @ own @", "ease.py, line {line}, in scores: RuntimeError: "),
])  # fmt: skip
def test_a_mistake_in_a_users_file_is_reported_in_one_line_and_leaves_no_folder(
    before: str, after: str, said: str, here: Path
) -> None:
    file = here / "ease.py"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after, 1))
    line = text[: text.index(before)].count("\n") + 1
    command = ["train", "--algorithm", "ease.py:EASE", "--data", DATA, "--rounds", "0", "--output", "run", "--quiet"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2, done.output
    assert said.format(line=line) in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (here / "run").exists()


def test_a_federated_method_without_a_score_is_refused(here: Path) -> None:
    file = here / "biased.py"
    file.write_text(file.read_text().replace("def all_scores", "def scored").replace("def logits", "def logit"))
    with pytest.raises(ConfigError, match="FedBiased lacks all_scores and logits; expected"):
        method("biased.py:FedBiased")


def test_unknown_names_and_files() -> None:
    with pytest.raises(ConfigError, match="did you mean lightgcn"):
        method("lightgnc")
    with pytest.raises(ConfigError, match=r"did you mean simgcl\?"):
        method("SimGCL")
    with pytest.raises(ConfigError, match=r"^missing\.py: no such file; expected the file of a method"):
        method("missing.py:Own")


def test_a_file_is_run_once_and_again_when_it_has_changed(here: Path) -> None:
    first = method("ease.py:EASE")
    assert method("ease.py:EASE") is first
    (here / "ease.py").write_text((here / "ease.py").read_text().replace("100.0", "7.0"))
    changed = method("ease.py:EASE")
    assert (first().settings.l2, changed().settings.l2) == (100.0, 7.0)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_in_the_document_under_its_kind(name: str) -> None:
    first, second = DOCUMENT.split("\n## Centralised")[1].split("\n## A method")[0].split("\n## Federated")
    assert f"\n| `{name}` |" in (first if centralised(METHODS[name]) else second)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_preset_that_builds_it(name: str) -> None:
    from perfedrec.runs.preset_files import default_preset

    preset = default_preset(name)
    assert preset is not None
    assert type(configure(preset, algorithm=name).build()) is METHODS[name]
