"""Make the picture at the top of the README, from a tour: python docs/picture.py TOUR (see CONTRIBUTING.md)."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from perfedrec import Node
from perfedrec.federation import tour
from perfedrec.web.guard import Access, Guard
from perfedrec.web.node_pages import NodePages
from perfedrec.web.running import listening, serving

PICTURE = Path(__file__).parent / "_static" / "tour.png"
SIZE = {"width": 1280, "height": 1000}


def main(folder: Path) -> None:
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    access = Access()
    with (
        Node.open(tour.home(folder)) as node,
        listening(0) as listener,
        serving(Guard(NodePages(node).app(), access), listener),
        sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light", locale="en-GB")
        page.goto(f"{listener.address}/?token={access.one_time()}")
        page.goto(f"{listener.address}/for-you?user={tour.PEOPLE[0]}")
        page.wait_for_load_state("networkidle")
        page.screenshot(path=PICTURE)
        browser.close()
    print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")


main(Path(sys.argv[1]))
