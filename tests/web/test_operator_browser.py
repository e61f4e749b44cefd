"""The operator's page in a real browser: everybody can read it, and it follows a run.

That an operator sees which nodes of a real federation were killed is tested where that happens, in
``tests/runtimes/flower/test_faults.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect
from tests.federation.test_status import coordinated
from tests.federation.written import FINISHED, line, rejection, stood_out, write_run

from perfedrec.web.guard import Access
from perfedrec.web.operator import operator_page
from perfedrec.web.running import listening, serving

expect.set_options(timeout=900_000)  # ends what hangs
LATE = [rejection("n2", n, "late", "it did not answer in 60 s") for n in range(6, 10)]


@dataclass
class Operator:
    """The page about a run in a folder, and a tab that has been let in. ``asked`` are the addresses of its requests."""

    folder: Path
    page: Page
    asked: list[str]
    errors: list[str]


@pytest.fixture(scope="module")
def operator(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    home, access = tmp_path_factory.mktemp("operator"), Access()
    known = {"epsilon": 4.2, "epsilon_planned": 8.0}
    large = stood_out("n1", 8, text="the norm of its sum per client is 25, 100 times the median 0.25 of 7 nodes")
    apart = {"n0": {"state": "held", "why": "it claims 130 users and had 12 before (serve --max-growth 10)"}}
    rounds, more = [line(n) for n in range(10)], {"figures": known, "unusual": [large], "apart": apart}
    folder = write_run(home / "run", history=rounds, rejections=LATE, away=["n2"], **more)  # type: ignore[arg-type]
    write_run(home / "before", "finished", [line(n) for n in range(22)], result=FINISHED)
    context = browser.new_context()
    context.set_default_timeout(0)
    with coordinated(folder), listening() as listener, serving(operator_page(folder, access), listener):
        made = Operator(folder, context.new_page(), [], [])
        made.page.on("request", lambda request: made.asked.append(request.url))
        made.page.on("console", lambda message: made.errors.append(message.text))
        made.page.on("pageerror", lambda error: made.errors.append(str(error)))
        made.page.goto(f"{listener.address}/?token={access.one_time()}")
        yield made
    expect(made.page.locator("#lost")).to_contain_text("This page has lost the process that serves it")
    context.close()


def test_everybody_can_read_it(operator: Operator) -> None:
    """On a wide screen and on a phone, light and dark; nothing is wider than the screen, and axe finds nothing."""
    page = operator.page
    for width in (1400, 390):
        page.set_viewport_size({"width": width, "height": 900})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            found = Axe().run(page)
            assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#rounds svg").count() == 4
    page.set_viewport_size({"width": 1400, "height": 900})
    expect(page.get_by_role("meter")).to_have_attribute("value", "4.2")


def test_the_page_follows_the_run_and_asks_nobody_else(operator: Operator) -> None:
    page, folder = operator.page, operator.folder
    expect(page.locator("#head")).to_contain_text("Round 8/20")
    table = page.get_by_role("region", name="Table of nodes")
    table.focus()
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line(10, clients=12, valid={"recall@20": 0.4321})) + "\n")
    expect(page.locator("#head")).to_contain_text("Round 9/20")
    expect(page.locator("#rounds tbody tr").first).to_contain_text("round 9")
    expect(page.locator("#figures")).to_contain_text("0.4321")
    with open(folder / "rejections.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(rejection("n1", 10, "shape")) + "\n")
    expect(page.locator("#alerts")).to_contain_text("BrokenOrHostileNode")
    expect(table).to_be_focused()  # whoever reads with the keyboard stays where they are
    page.get_by_role("link", name="before").click()
    expect(page.locator("h1")).to_contain_text("has finished")
    page.go_back()
    expect(page.locator("#head")).to_contain_text("Round 9/20")
    home = re.escape(page.url)
    assert [each for each in operator.asked if not re.match(home, each)] == []
    assert operator.errors == []
