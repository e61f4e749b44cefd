"""What other machines install: the wheel, the sources, pinned versions, the commands of the docs, the image."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import perfedrec

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEPLOYMENT = ROOT / "docs" / "deployment.md"
IMAGE = ROOT / "deploy" / "Containerfile"
BUILD = "import sys; from hatchling import build; build.build_wheel(sys.argv[1]); build.build_sdist(sys.argv[1])"


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``make dist`` makes."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=ROOT, check=True, capture_output=True)
    shutil.copy(ROOT / "constraints.txt", folder)
    return folder


def test_the_wheel_has_the_package_whole_and_nothing_else(dist: Path) -> None:
    (path,) = dist.glob("*.whl")
    assert path.name == f"perfedrec-{perfedrec.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path) as wheel:
        found = set(wheel.namelist())
    source = ROOT / "src"
    package = {str(each.relative_to(source)) for each in (source / "perfedrec").rglob("*") if each.is_file()}
    about = f"perfedrec-{perfedrec.__version__}.dist-info"
    files = {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert found == {name for name in package if "__pycache__" not in name} | files
    kinds = {Path(name).suffix for name in package} - {".pyc"}
    assert kinds >= {".py", ".typed", ".toml", ".j2", ".css", ".js"}  # profiles, presets, spaces and templates


def test_the_source_archive_has_what_a_packager_needs_and_no_leftovers(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "Makefile", "pyproject.toml", "constraints.txt"} <= found
    assert {"src/perfedrec/py.typed", "tests/conftest.py", "docs/deployment.md", "deploy/Containerfile"} <= found
    assert not [name for name in found if re.search(r"__pycache__|\.pyc$|(^|/)\.(venv|hypothesis|\w+_cache)", name)]


# --- pinned versions ---


def pinned() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"==[^*]+", str(each.specifier)) for each in found)
    return {canonicalize_name(each.name): each for each in found}


PINS = pinned()


def needed(requirements: list[str], python: str, seen: set[tuple[str, str]]) -> Iterator[Requirement]:
    """All that requirements bring on Linux with a Python, as far as the packages are installed here."""
    for line in requirements:
        each = Requirement(line)
        environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
        if each.marker is not None and not each.marker.evaluate({**environment, "extra": ""}):
            continue
        name = canonicalize_name(each.name)
        if name != "perfedrec":
            yield each
        for extra in ("", *sorted(each.extras)):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            if name == "perfedrec":
                more = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
            else:
                try:
                    installed, lines = metadata.version(name), metadata.requires(name) or []
                except metadata.PackageNotFoundError:
                    continue
                if (pin := PINS.get(name)) is not None and not pin.specifier.contains(installed, prereleases=True):
                    continue  # another version may need other things
                more = [line for line in lines if of_extra(line, extra)]
                more = [re.sub(r"""extra\s*==\s*['"][^'"]*['"]""", "python_version >= '3'", line) for line in more]
            yield from needed(more, python, seen)


def of_extra(line: str, extra: str) -> bool:
    marker = str(Requirement(line).marker or "")
    names = re.findall(r"""extra\s*==\s*['"]([^'"]*)['"]""", marker)
    return canonicalize_name(extra) in map(canonicalize_name, names) if extra else not names


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_every_package_that_is_installed_has_a_pinned_version_that_fits(python: str) -> None:
    """Otherwise a second machine could get other versions. Libraries for GPUs are named exactly by torch itself."""
    wanted = list(needed(["perfedrec[dev]"], python, set()))
    assert len(wanted) > 100
    for each in wanted:
        name = canonicalize_name(each.name)
        if re.match("nvidia-|cuda-|triton$", name):
            continue
        assert name in PINS, f"{each} has no version in constraints.txt; run make lock"
        (version,) = PINS[name].specifier
        assert each.specifier.contains(version.version, prereleases=True), f"constraints.txt: {PINS[name]}, not {each}"


# --- the commands of the docs ---


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine where pip installs nothing but the files that it is given, and finds the rest where
    these tests found it. (.ci/run installs everything anew.)"""
    home = tmp_path_factory.mktemp("home")
    known = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    return known | {"HOME": str(home), "PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def lend(environment: Path) -> None:
    """Let the packages that these tests use be found in another virtual environment."""
    (site,) = environment.glob("lib/python3*/site-packages")
    folders = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "lent.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in folders))


def blocks(page: Path, heading: str) -> list[str]:
    """The blocks of commands below a heading of a page."""
    (section,) = re.findall(
        rf"^## {heading}\n(.*?)(?=^## )", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return re.findall(r"```\n(.*?)```", section, re.DOTALL)


def play(commands: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["sh", "-ec", commands], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_nodes_machine_is_set_up_by_the_commands_of_the_docs(
    dist: Path, bare: dict[str, str], tmp_path: Path
) -> None:
    """Install, then make a key and a file of a node, on a machine that has the files of ``dist`` and the catalogue."""
    for path in (*dist.glob("*.whl"), dist / "constraints.txt"):
        shutil.copy(path, tmp_path)
    made, install, check, _ = blocks(DEPLOYMENT, "Install")
    assert made.startswith("make dist")
    assert "/opt/perfedrec" in install
    commands = install.replace("/opt/perfedrec", str(tmp_path / "perfedrec"))
    play(commands, tmp_path, bare)
    lend(tmp_path / "perfedrec")
    there = bare | {"PATH": f"{tmp_path / 'perfedrec' / 'bin'}{os.pathsep}{bare['PATH']}"}
    assert play(check, tmp_path, there).strip().endswith(perfedrec.__version__)
    where = play("python -c 'import perfedrec; print(perfedrec.__file__)'", tmp_path, there)
    assert Path(where.strip()).is_relative_to(tmp_path)

    (tmp_path / "items.txt").write_text("tea\nmilk\nbread\n")
    (tmp_path / "interactions.csv").write_text("user,item\nann,tea\nann,bread\n")
    (node,) = [each for each in blocks(DEPLOYMENT, "Step by step") if "node init" in each]
    commands, run = node.split("perfedrec node run", 1)
    play(commands, tmp_path, there)
    assert (tmp_path / "node7.pub").exists()
    said = play("perfedrec node status --store node7.db --json", tmp_path, there)
    assert '"interactions": 2' in said
    help_of_run = play("perfedrec node run --help", tmp_path, there | {"COLUMNS": "200"})
    assert all(option in help_of_run for option in re.findall(r"--[\w-]+", run))


def steps() -> list[tuple[str, str]]:
    """The instructions of the image, with their arguments."""
    text = re.sub(r"\\\n", " ", "".join(line for line in IMAGE.read_text().splitlines(True) if line[0] != "#"))
    found = [line.split(maxsplit=1) for line in text.splitlines() if line]
    return [(word, rest) for word, rest in found]


@pytest.mark.slow
def test_the_image_installs_what_make_dist_makes(dist: Path, bare: dict[str, str], tmp_path: Path) -> None:
    """The steps of the image, one after the other, in a bare environment instead of a container."""
    known = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "VOLUME", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in steps()} <= known
    venv.create(tmp_path / "python", with_pip=True)
    there = bare | {"PATH": f"{tmp_path / 'python' / 'bin'}{os.pathsep}{bare['PATH']}"}
    for word, rest in steps():
        if word == "COPY":
            *sources, target = rest.split()
            assert target == "./"
            for path in [path for source in sources for path in dist.glob(source)]:
                shutil.copy(path, tmp_path)
        if word == "RUN" and not rest.startswith("useradd"):
            play(rest, tmp_path, there)
        if word == "ENV":
            there |= dict(pair.split("=") for pair in rest.split())
    lend(tmp_path / "python")
    (program,) = [re.findall(r'"(.*?)"', rest) for word, rest in steps() if word == "ENTRYPOINT"]
    assert "node" in play(" ".join([*program, "--help"]), tmp_path, there)
    variables = re.findall(r"^export (.*)$", DEPLOYMENT.read_text(encoding="utf-8"), re.MULTILINE)[0].split()
    assert all(there[name] == value for name, value in (each.split("=") for each in variables))
    python = dict(each.split("=") for word, each in steps() if word == "ARG" and not each.endswith("="))["PYTHON"]
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]
    assert sysconfig.get_python_version() >= "3.11"
