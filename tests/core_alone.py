"""Runs commands as on a machine that has perfedrec without any extra. The tests start it as a process of its own.

Reads a JSON list of command lines from the standard input, and writes a list of their exit codes and outputs.
"""

import json
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from packaging.requirements import Requirement
from typer.testing import CliRunner


def requirements(name: str, extras: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The distributions that a distribution needs here, each with the extras that it is needed with."""
    for text in metadata.requires(name) or ():
        needed = Requirement(text)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
            yield _plain(needed.name), tuple(sorted(needed.extras))


def closure(name: str) -> set[str]:
    """The names of all distributions that come with a distribution when it is installed without extras."""
    found, waiting = set[tuple[str, tuple[str, ...]]](), [(_plain(name), ())]
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            waiting += [needed for needed in requirements(*each) if _installed(needed[0])]
    return {name for name, _ in found}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


class Absent(MetaPathFinder):
    """Finds no module that only comes with distributions outside of a set."""

    def __init__(self, present: set[str]) -> None:
        homes = metadata.packages_distributions()
        self.names = {name for name, all_ in homes.items() if not present & {_plain(each) for each in all_}}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


if __name__ == "__main__":
    sys.meta_path.insert(0, Absent(closure("perfedrec")))
    from perfedrec.cli import app

    results = []
    for command in json.load(sys.stdin):
        done = CliRunner().invoke(app, command)
        trace = None if done.exception is None else "".join(traceback.format_exception(done.exception))
        bug = trace if not isinstance(done.exception, SystemExit | None) else None
        results.append({"code": done.exit_code, "stdout": done.stdout, "stderr": done.stderr, "bug": bug})
    json.dump(results, sys.__stdout__)
