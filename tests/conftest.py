import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """The folder of a real data set; skips where PERFEDREC_TEST_DATA does not name a folder that has it."""

    def folder(name: str) -> Path:
        path = Path(os.environ.get("PERFEDREC_TEST_DATA", "/nonexistent")) / name
        if not path.is_dir():
            pytest.skip(f"PERFEDREC_TEST_DATA does not name a folder with {name}")
        return path

    return folder
