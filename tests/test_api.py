"""The public names, and that asking for help does not load what training needs."""

import subprocess
import sys

import pytest

import perfedrec


@pytest.mark.parametrize("name", perfedrec.__all__)
def test_public_names_are_there(name: str) -> None:
    value = getattr(perfedrec, name)
    homes = {"configure": "load", "metrics": "perfedrec.evaluation.metrics"}
    assert value.__name__ == homes.get(name, name)
    assert name in dir(perfedrec)


def test_what_is_not_public_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        perfedrec.trian  # noqa: B018
    with pytest.raises(ImportError, match="trian"):
        exec("from perfedrec import trian")  # noqa: S102


@pytest.mark.parametrize("arguments", ["--help", "train --help", "--version"])
def test_help_does_not_wait_for_heavy_libraries(arguments: str) -> None:
    code = (
        "import sys\n"
        "from perfedrec.cli import app\n"
        f"try: app({arguments.split()!r})\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'polars', 'sklearn', 'scipy', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
