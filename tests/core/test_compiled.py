import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from perfedrec.core import compiled
from perfedrec.core.compiled import Kernel, spread, usable

pytest.importorskip("numba")


def _doubled(values: np.ndarray, out: np.ndarray) -> None:
    for place in range(values.size):
        out[place] = 2 * values[place]


def doubled() -> Kernel:
    return Kernel(_doubled, "void(int64[::1], int64[::1])")


def check(kernel: Kernel) -> None:
    out = np.zeros(3, np.int64)
    kernel(np.array([1, 2, 5]), out)
    assert out.tolist() == [2, 4, 10]


def _doubled_rows(table: np.ndarray, out: np.ndarray) -> None:
    for row in range(table.shape[0]):
        own, to = table[row], out[row]
        for column in range(own.size):
            to[column] = 2 * own[column]


@pytest.mark.parametrize("makes_arrays", [False, True])
def test_references_to_rows_are_counted_only_where_arrays_are_made(folder: Path, makes_arrays: bool) -> None:
    made = Kernel(_doubled_rows, "void(int64[:, ::1], int64[:, ::1])", makes_arrays=makes_arrays)
    out = np.zeros((2, 3), np.int64)
    made(np.arange(6).reshape(2, 3), out)
    assert out.tolist() == [[0, 2, 4], [6, 8, 10]]
    (code,) = made._made.inspect_asm().values()  # type: ignore[union-attr]
    assert ("NRT_decref" in code) == makes_arrays


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    compiled._folder.cache_clear()
    yield tmp_path
    compiled._folder.cache_clear()


def test_machine_code_is_kept_and_found_again(folder: Path) -> None:
    first, second = doubled(), doubled()
    check(first)
    assert len(list(folder.rglob("*.nbc"))) == 1
    check(second)
    assert sum(first._made.stats.cache_hits.values()) == 0  # type: ignore[union-attr]
    assert sum(second._made.stats.cache_hits.values()) == 1  # type: ignore[union-attr]


def test_a_damaged_cache_is_not_used(folder: Path) -> None:
    check(doubled())
    for each in (*folder.rglob("*.nbi"), *folder.rglob("*.nbc")):
        each.write_bytes(b"half a file")
    check(doubled())


def test_kernels_work_where_no_folder_can_be_written_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder / "file" / "cache"))
    compiled._folder.cache_clear()
    assert compiled._folder() is None
    check(doubled())


CHILD = """
import numpy as np
from perfedrec.core import kernels

starts, limits, segments, numbers = np.array([7, 2]), np.array([0, 2, 3]), np.zeros(3, np.int64), np.zeros(3, np.int64)
kernels.ranges(starts, limits, segments, numbers)
assert (segments.tolist(), numbers.tolist()) == ([0, 0, 1], [7, 8, 2])
print(sum(kernels.ranges._made.stats.cache_hits.values()))
"""


def test_of_processes_that_start_at_once_one_compiles(tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", CHILD], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    hits = [each.communicate()[0].strip() for each in started]
    assert [each.returncode for each in started] == [0, 0, 0]
    assert sorted(hits) == ["0", "1", "1"]


def test_kernels_are_for_sequences_of_numbers_on_the_processor() -> None:
    table = torch.zeros(4, 3)
    assert usable(table, None)
    assert not usable(table, table.T)
    assert not usable(table, torch.zeros(4, 3, requires_grad=True))
    assert not usable(torch.zeros(4, 3, device="meta"))


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_work_is_spread_over_the_threads_of_torch(n_threads: int) -> None:
    before, seen = torch.get_num_threads(), set()

    def work(start: int, stop: int) -> list[int]:
        seen.add(threading.get_ident())
        return list(range(start, stop))

    torch.set_num_threads(n_threads)
    try:
        parts = spread(work, 10, 10 * compiled.ROWS_PER_THREAD)
        assert [each for part in parts for each in part] == list(range(10))
        assert len(parts) == (1 if n_threads == 1 else min(10, n_threads * compiled.PARTS_PER_THREAD))
        assert spread(work, 10, 10) == [list(range(10))]  # too little for two
        assert spread(work, 0, 0) == [[]]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", [ValueError, IndexError])
def test_an_error_in_a_thread_is_raised(kind: type[Exception], first: bool) -> None:
    def work(start: int, stop: int) -> None:
        if first == (start == 0):
            raise kind("this part")

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(kind, match="this part"):
            spread(work, 2, 10 * compiled.ROWS_PER_THREAD)
    finally:
        torch.set_num_threads(before)
