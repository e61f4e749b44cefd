"""Arrays in files: they hold what arrays in memory hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from perfedrec.core import mapped
from perfedrec.core.errors import ConfigError


@pytest.mark.parametrize("limit", [0, 1 << 27])
def test_an_array_holds_what_is_written(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "IN_MEMORY", limit)
    array = mapped.empty(1000, np.int64)
    array[:] = np.arange(1000)
    assert array.sum() == 499_500
    assert mapped.empty(0, np.int8).shape == (0,)


def test_a_sparse_file_is_zeros() -> None:
    memory = mapped.sparse(1 << 40, "numbers")  # a terabyte, of which one page is written
    array = np.frombuffer(memory, np.int8)
    array[-5:] = 7
    assert array[1 << 39] == 0
    assert array[-6:].tolist() == [0, 7, 7, 7, 7, 7]


def test_a_folder_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped.tempfile, "tempdir", "/nowhere")
    with pytest.raises(ConfigError, match=r"^/nowhere: no room for large arrays \(there is no such file or folder\)"):
        mapped.sparse(1, "numbers")


def test_a_tensor_shares_its_array() -> None:
    array = np.arange(4)
    view = array.view()
    view.flags.writeable = False
    found = mapped.as_tensor(view, torch.device("cpu"))
    array[2] = 9
    assert found.tolist() == [0, 1, 9, 3]


@pytest.mark.parametrize("limit", [0, 1 << 27])
def test_what_is_set_aside_is_a_copy(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "SET_ASIDE", limit)
    for given in (
        torch.arange(3000).view(1000, 3),
        torch.arange(3000).view(3, 1000).T,
        torch.zeros(0, 4),
        torch.tensor([True, False]),
    ):
        found, before = mapped.set_aside(given, "numbers"), given.clone()
        given.fill_(1)
        assert torch.equal(found, before)
        assert found.dtype == before.dtype


def test_what_is_set_aside_keeps_no_file_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mapped, "SET_ASIDE", 0)
    monkeypatch.setattr(mapped.tempfile, "tempdir", str(tmp_path))

    def opened() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = opened()
    kept = [mapped.set_aside(torch.full((2000,), number), "numbers") for number in range(20)]
    assert opened() == before
    assert list(tmp_path.iterdir()) == []
    assert [int(each.sum()) for each in kept] == [2000 * number for number in range(20)]


def test_nothing_is_set_aside_on_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "SET_ASIDE", 0)
    full = Path("/dev/full").open("wb")  # noqa: SIM115  # set_aside closes it
    monkeypatch.setattr(mapped.tempfile, "NamedTemporaryFile", lambda prefix: full)
    with pytest.raises(ConfigError, match=r"no room for numbers of 0 MB \(the disk is full\)"):
        mapped.set_aside(torch.ones(3), "numbers")


def test_too_little_room_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = type("Disk", (), {"free": 1})
    monkeypatch.setattr(mapped.shutil, "disk_usage", lambda folder: disk)
    mapped.check_room(1, "numbers")
    with pytest.raises(ConfigError, match="numbers need 0 MB, and 0 MB are free there"):
        mapped.check_room(2, "numbers")


def test_where_there_is_no_folder_for_temporary_files_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "SET_ASIDE", 0)
    monkeypatch.setattr(mapped.tempfile, "tempdir", None)
    monkeypatch.setattr(mapped.tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    calls = (
        lambda: mapped.set_aside(torch.ones(3), "numbers"),
        lambda: mapped.sparse(1, "numbers"),
        lambda: mapped.check_room(1, "numbers"),
    )
    for call in calls:
        with pytest.raises(ConfigError, match=r"^No usable temporary directory found in \['/nowhere'\]; expected a"):
            call()
