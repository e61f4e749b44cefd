"""The message where an extra is missing names the command that installs it here."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from perfedrec.core import extras
from perfedrec.core.extras import MissingExtraError, extra_of, install, needed_by


class Distribution:
    def __init__(self, origin: dict[str, Any] | None) -> None:
        self.origin = origin

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.origin is None else json.dumps(self.origin)


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (None, ["perfedrec[tune]"]),
        ({"url": "file:///a%20b/src", "dir_info": {"editable": True}}, ["--editable", "/a b/src[tune]"]),
        ({"url": "file:///a/src", "dir_info": {}}, ["/a/src[tune]"]),
        ({"url": "file:///a/perfedrec-1.whl", "archive_info": {}}, ["perfedrec[tune] @ file:///a/perfedrec-1.whl"]),
        (
            {"url": "https://example.org/p", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            ["perfedrec[tune] @ git+https://example.org/p@abc"],
        ),
    ],
)
def test_an_extra_is_installed_from_where_perfedrec_came(
    origin: dict[str, Any] | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras.metadata, "distribution", lambda name: Distribution(origin))
    monkeypatch.setattr(sys, "executable", "/some/venv/bin/python")
    assert shlex.split(install("tune")) == ["/some/venv/bin/python", "-m", "pip", "install", *expected]


def test_paths_in_the_working_directory_are_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = {"url": tmp_path.as_uri(), "dir_info": {"editable": True}}
    monkeypatch.setattr(extras.metadata, "distribution", lambda name: Distribution(origin))
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    assert install("flower") == ".venv/bin/python -m pip install --editable '.[flower]'"
    (tmp_path / "constraints.txt").touch()
    pinned = "--constraint ./constraints.txt --editable '.[flower]'"
    assert install("flower") == f".venv/bin/python -m pip install {pinned}"


def test_only_a_package_of_an_extra_is_a_missing_extra() -> None:
    expected = "this needs the extra report, which is not installed; install it with: "
    with pytest.raises(MissingExtraError, match=expected), needed_by("this"):
        raise ModuleNotFoundError("No module named 'plotly'", name="plotly.graph_objects")
    assert extra_of(ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere")) is None
    with pytest.raises(ModuleNotFoundError), needed_by("this"):
        raise ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere")
