import ctypes
import os
import sys
from types import SimpleNamespace

import pytest

from perfedrec.core.malloc import keep_freed_memory

NAMES = {-1: "trim", -3: "mmap"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What glibc is asked for, and has accepted."""
    real = getattr(ctypes.CDLL(None), "mallopt", None)
    if sys.platform != "linux" or real is None:
        pytest.skip("only glibc gives memory back")
    for name in os.environ:
        if name.startswith(("MALLOC_", "GLIBC_TUNABLES")):
            monkeypatch.delenv(name)
    accepted: dict[str, int] = {}

    def mallopt(option: int, value: int) -> int:
        if real(option, value) == 1:
            accepted[NAMES[option]] = value
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    return accepted


def test_freed_tables_stay_with_the_process(asked: dict[str, int]) -> None:
    keep_freed_memory()
    assert asked == {"trim": 64 << 20, "mmap": 32 << 20}


@pytest.mark.parametrize("variable", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_the_environment_decides(variable: str, asked: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "131072")
    keep_freed_memory()
    assert not asked


def test_a_c_library_without_the_function_is_left_alone(asked: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    keep_freed_memory()
    assert not asked
