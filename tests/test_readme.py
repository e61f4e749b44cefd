"""README, CONTRIBUTING and docs: the example runs, links lead somewhere, and the names in them exist."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ARCHITECTURE = ROOT / "docs" / "architecture.md"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)


@cache
def anchors(page: Path) -> frozenset[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), flags=re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", text_of(ROOT / "README.md"), flags=re.DOTALL)
    assert len(example.splitlines()) <= 15
    lines = [f"u{user},i{(user * 3 + step * 7) % 40},5,{step}" for user in range(30) for step in range(8)]
    (tmp_path / "ratings.csv").write_text("\n".join(["user,item,rating,timestamp", *lines]) + "\n")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})  # noqa: S102 - the example itself is tested
    printed = capsys.readouterr().out
    assert "recall@20" in printed
    assert "u0" in printed


def test_the_examples_of_the_page_on_python_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", text_of(ROOT / "docs" / "python.md"), flags=re.DOTALL):
        exec(compile(example, "python.md", "exec"), names)  # noqa: S102 - the examples themselves are tested
    assert names["same"].n_users == names["data"].n_users == 300
    assert len(names["losses"]) == len(names["short"].history) < 50
    assert len(names["own"].history) == len(names["federated"].history)
    lists = [each.recommend(7, k=5)["item"].to_list() for each in (names["result"], names["again"], names["opened"])]
    assert lists[0] == lists[1] == lists[2]
    assert names["config"].algorithm == "lightgcn"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_that_pages_name_exist(page: Path) -> None:
    text = text_of(page)
    for path in re.findall(r"(?<![\w/.])(?:tests|benchmarks|deploy)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    for dotted in re.findall(r"(?<![\w/.-])perfedrec\.(?!py\b)(\w+(?:\.\w+)*)(?![\w/])", text):
        assert exists(dotted.split(".")), f"perfedrec.{dotted}"


def exists(parts: list[str]) -> bool:
    """Whether a dotted name below ``perfedrec`` is a package, a module, or a name that is defined or exported there."""
    place = ROOT / "src" / "perfedrec"
    for number, part in enumerate(parts):
        if (place / part).is_dir():
            place = place / part
        else:
            module = (place / part).with_suffix(".py")
            rest = parts[number:]
            if module.is_file():
                place, rest = module, parts[number + 1 :]
            file = place / "__init__.py" if place.is_dir() else place
            return all(re.search(rf"\b{name}\b", text_of(file)) for name in rest)
    return True


@cache
def defined() -> frozenset[str]:
    """Names of classes, functions, fields and constants in the package."""
    names: set[str] = set()
    for file in (ROOT / "src" / "perfedrec").rglob("*.py"):
        for node in ast.walk(ast.parse(text_of(file))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
            elif isinstance(node, ast.Assign):
                names.update(each.id for each in node.targets if isinstance(each, ast.Name))
    return frozenset(names)


def glossary() -> list[tuple[str, str, str]]:
    """Code name, word and meaning of each entry."""
    section = text_of(ARCHITECTURE).split("\n## Glossary\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|$", section, flags=re.MULTILINE)


def test_the_names_in_the_glossary_exist_once_each() -> None:
    names, words = [name for name, _, _ in glossary()], [word for _, word, _ in glossary()]
    assert len(names) == len(set(names))
    assert len(words) == len(set(words))
    assert [name for name in names if name not in defined()] == []


def test_the_nouns_of_the_protocol_are_in_the_glossary() -> None:
    names = {name for name, _, _ in glossary()}
    for module in ("types", "aggregate", "algorithm"):
        tree = ast.parse(text_of(ROOT / "src" / "perfedrec" / "core" / f"{module}.py"))
        public = {node.name for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")}
        assert public - names == set(), module


def test_the_rooms_are_those_of_the_package() -> None:
    section = text_of(ARCHITECTURE).split("\n## The rooms\n")[1].split("\nInside ")[0]
    rooms = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    package = ROOT / "src" / "perfedrec"
    assert sorted(rooms) == sorted(each.parent.name for each in package.glob("*/__init__.py"))
