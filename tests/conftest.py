import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# GNU readline puts the size of a terminal into the environment of all processes that come after it, where a plugin of
# pytest imports it. Tests that need a width say so.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)

# How long an example takes decides nothing.
settings.register_profile("perfedrec", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("perfedrec")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are processors: a quarter of the time a test waits for processes that it has started."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """The folder of a real data set; skips where PERFEDREC_TEST_DATA does not name a folder that has it."""

    def folder(name: str) -> Path:
        path = Path(os.environ.get("PERFEDREC_TEST_DATA", "/nonexistent")) / name
        if not path.is_dir():
            pytest.skip(f"PERFEDREC_TEST_DATA names no folder with {name} (see CONTRIBUTING.md)")
        return path

    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium. While it is open, a loop of asyncio runs in this thread, and other tests could run none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("there is no Chromium; expected .ci/run to install it")
        pytest.skip("there is no Chromium: install it to test pages in a browser (see CONTRIBUTING.md)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # The sandbox does not work for root. It is not needed: the browser only opens pages of these tests.
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"], timeout=0)
        yield browser
        browser.close()
