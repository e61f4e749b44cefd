"""The pages of a node in a real browser, as stories: one browser, one server and one node's file for all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect
from tests.parity.deployment import Deployment
from tests.parity.federation import settings

from perfedrec import Node
from perfedrec.cli.pages import leading_to
from perfedrec.web.guard import Access, Guard
from perfedrec.web.node_pages import BODY_LIMIT, NodePages
from perfedrec.web.running import listening, serving

expect.set_options(timeout=60_000)  # a limit for what hangs, and never for what is slow

VIEWS = {
    "who": "/?choose=1",
    "start": "/start?user=somebody+new",
    "list": "/for-you?user=ann&k=6",
    "similar": "/similar?user=ann&item=7",
    "have": "/have?user=ann",
    "search": "/have?user=ann&q=the",
    "left": "/left?user=ann",
    "rules": "/rules?user=ann",
    "forget": "/forget?user=ann",
    "mistake": "/similar?user=ann&item=nowhere",
}


class Site:
    """A node that is served, and a browser that has entered with the one-time address."""

    def __init__(self, node: Node, context: BrowserContext, address: str, access: Access) -> None:
        self.node, self.context, self.address, self.access = node, context, address, access
        self.requests, self.errors = list[str](), list[str]()

    def open(self, path: str = "/", **look: Any) -> Page:
        page = self.context.new_page()
        page.set_default_timeout(60_000)
        page.set_viewport_size({"width": look.get("width", 1400), "height": 900})
        page.emulate_media(color_scheme=look.get("scheme", "light"), reduced_motion="reduce")
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(self.address + path)
        return page


@pytest.fixture(scope="module")
def site(
    browser: Browser, new_home: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    access = Access()
    with Node.open(new_home(tmp_path_factory.mktemp("site"))) as node, listening(0) as listener:
        node.dismiss("ann", node.recommend("ann", 1)[0]["item"])
        with serving(Guard(NodePages(node).app(), access, body_limit=BODY_LIMIT), listener):
            context = browser.new_context(locale="en-GB")
            found = Site(node, context, listener.address, access)
            found.open(f"/?token={access.one_time()}").close()
            yield found
            context.close()


def test_a_newcomer_gets_a_list_that_fits_with_three_clicks(site: Site, genres: np.ndarray) -> None:
    page = site.open("/?choose=1")
    page.get_by_label("Somebody new").fill("Cleo")
    page.get_by_role("button", name="Begin").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Choose three things that you like")
    wanted = str(genres[site.node.popular(1)[0]["item"]])
    for number in (1, 2, 3):
        page.locator(".shelf li", has_text=wanted).first.get_by_role("button").click()
        if number < 3:
            expect(page.locator(".steps")).to_have_text(f"{number} of 3 chosen")
    expect(page.get_by_role("heading", level=1)).to_have_text("For you")
    found = page.locator(".card .genres").all_inner_texts()
    assert len(found) == 20
    share = found.count(wanted) / 20
    assert share > 0.8, found  # by chance a third
    chosen = [row["title"] for row in site.node.items_of("Cleo")]
    assert len(chosen) == 3
    reasons = page.locator(".card .why cite").all_inner_texts()
    assert set(reasons) == set(chosen)
    bar = page.locator(".share").first
    assert bar.get_attribute("role") == "img"
    assert "you alone, learned here" in str(bar.get_attribute("aria-label"))
    page.close()


def test_add_and_not_interested_change_the_list_at_once_and_can_be_undone(site: Site) -> None:
    page = site.open("/for-you?user=ann")
    titles = page.locator(".card h2")
    first, second, third = titles.all_inner_texts()[:3]
    page.evaluate("window.stays = true")  # which a new page would not have
    page.get_by_role("button", name=f"Not interested: {first}").click()
    expect(titles.first).to_have_text(second)
    expect(page.locator("#said")).to_have_text(f"You will not see {first} again. Undo")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == f"Not interested: {second}"
    page.get_by_role("button", name=f"Add: {second}", exact=True).click()
    expect(titles.first).to_have_text(third)
    assert second in [row["title"] for row in site.node.items_of("ann")]
    page.get_by_role("button", name="Undo").click()
    expect(titles.first).to_have_text(second)
    assert second not in [row["title"] for row in site.node.items_of("ann")]
    assert page.evaluate("window.stays") is True
    page.reload()
    assert titles.first.inner_text() == second  # the address repeats nothing
    page.get_by_role("link", name=f"More like this: {second}").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(f"More like {second}")
    page.close()


def test_somebody_removes_exports_forgets_and_imports(site: Site, tmp_path: Path) -> None:
    """And after forgetting no byte of the name and of the vector is in the file."""
    name = "Bo / Béla"
    page = site.open("/?choose=1")
    page.get_by_role("link", name=name).click()
    page.get_by_role("link", name="What I have").click()
    own = site.node.items_of(name)
    page.get_by_role("button", name=f"Remove: {own[0]['title']}", exact=True).click()
    expect(page.locator("section[aria-labelledby=yours] li")).to_have_count(len(own) - 1)
    files = {}
    for kind in ("CSV", "JSON"):
        with page.expect_download() as download:
            page.get_by_role("link", name=f"Download {kind}").click()
        files[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[kind])
    everything = json.loads(files["JSON"].read_text(encoding="utf-8"))
    assert (everything["user"], len(everything["items"])) == (name, len(own) - 1)

    page.get_by_role("link", name="Rules").click()
    page.get_by_role("link", name="Forget me").click()
    assert f"{len(own) - 1} things" in page.locator("main").inner_text()
    places = [site.node.path, site.node.path.with_name(site.node.path.name + "-wal")]
    assert any(name.encode() in place.read_bytes() for place in places if place.exists())
    page.get_by_role("button", name="Yes, forget").click()
    expect(page.locator(".note")).to_contain_text(f"Nothing about {name} is left")
    expect(page.locator(".people")).not_to_contain_text(name)
    assert not any(name.encode() in place.read_bytes() for place in places if place.exists())

    page.goto(site.address + "/have?user=ann")
    drop(page, "broken.csv", "user,item\nBo / Béla,1\nBo / Béla\n")
    expect(page.locator(".wrong")).to_contain_text("Nothing was imported. The file cannot be read")
    page.locator(".wrong summary").click()
    expect(page.locator(".wrong details p")).to_contain_text("broken.csv, line 3: has 1 column")
    assert name not in site.node.users()
    drop(page, "my-items.csv", files["CSV"].read_text(encoding="utf-8"))
    expect(page.locator(".note")).to_contain_text(
        f"Imported: {len(own) - 1} things for {name}. New on this device: 1 person."
    )
    assert [row["item"] for row in site.node.items_of(name)] == [row["item"] for row in own[1:]]
    page.close()


def drop(page: Page, name: str, content: str) -> None:
    """Drop a file on the field, as a person with a mouse does."""
    page.evaluate(
        """([name, content]) => {
          const files = new DataTransfer();
          files.items.add(new File([content], name));
          const field = document.querySelector('.drop');
          for (const kind of ['dragover', 'drop'])
            field.dispatchEvent(new DragEvent(kind, { dataTransfer: files, bubbles: true, cancelable: true }));
        }""",
        [name, content],
    )


def test_the_journal_grows_while_the_node_is_in_a_federation(site: Site, tmp_path: Path) -> None:
    """Four nodes with files of their own and secure sums, whose messages travel in memory; nobody loads the page
    again."""
    privacy = {"aggregation": "secure", "norm": "l2", "clip": 0.5, "min_clients": 3, "min_contributors": 2}
    federation = Deployment(settings(privacy=privacy, pretraining={"kind": "spectral", "cluster_passes": 0}), tmp_path)
    store = federation.nodes[100]
    with Node.open(store.path) as node, listening(0) as listener:
        access, user = Access(), node.users()[0]
        with serving(Guard(NodePages(node).app(), access), listener):
            page = site.context.new_page()
            page.goto(f"{listener.address}/?token={access.one_time()}")
            page.goto(f"{listener.address}/left?user={user}")
            expect(page.locator("main")).to_contain_text("Nothing has left this device.")
            federation.begin()
            report = federation.play()
            assert report.aborted is None
            expect(page.locator(".journal")).to_contain_text("Helped to count how many people have each thing")
            expect(page.locator(".journal")).to_contain_text("Mixed with the numbers of 3 other devices")
            totals = page.locator(".sums").inner_text()
            assert "none" in totals
            page.locator(".journal summary").first.click()
            federation.play()
            expect(page.locator(".sums")).not_to_have_text(totals, use_inner_text=True)
            expect(page.locator(".journal blockquote").first).to_be_attached()
            assert sum(row["sent"] for row in node.journal()) == node.privacy()["sent"] > 0
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                assert Axe().run(page).response["violations"] == []
            node.set_rules(paused=True)
            federation.coordinator.play(federation.flower)
            assert len(federation.coordinator.rejected) == 1
            expect(page.locator(".journal .refused")).to_have_text("Refused to answer")
            expect(page.locator(".journal")).to_contain_text("This device was paused")
            page.close()


def test_rules_are_kept_by_the_keyboard_alone(site: Site) -> None:
    page = site.open("/rules?user=ann")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator(".note")).to_contain_text("the least protection that is accepted")
    assert site.node.rules()["chosen"] == "private"
    page.get_by_role("button", name="Pause").press("Enter")
    expect(page.get_by_text("This device is paused.")).to_be_visible()
    assert site.node.rules()["paused"] is True
    page.get_by_role("button", name="Take part again").press("Enter")
    expect(page.get_by_text("This device takes part when a federation asks.")).to_be_visible()
    site.node.set_rules(require=None)
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_read_every_view(site: Site, scheme: str) -> None:
    """axe finds nothing, and nothing is cut off on a phone, in both languages."""
    page, axe = site.open(scheme=scheme, width=390), Axe()
    rules = {"resultTypes": ["violations"]}
    if scheme == "dark":  # the page is the same, in other colours
        rules["runOnly"] = ["cat.color"]
    for name, path in VIEWS.items():
        for language in ("de", "en") if scheme == "light" else ("en",):
            page.goto(f"{site.address}{path}&lang={language}")
            assert page.evaluate("document.documentElement.lang") == language
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
        page.set_viewport_size({"width": 1400 if scheme == "dark" else 390, "height": 900})
        for each in page.locator("details").all():
            each.evaluate("each => each.open = true")
        found = axe.run(page, options=rules).response["violations"]
        assert found == [], (name, [(each["id"], [node["html"] for node in each["nodes"]]) for each in found])
        page.set_viewport_size({"width": 390, "height": 900})
    page.close()


def test_links_and_forms_work_without_a_script(site: Site, browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{site.address}/?token={site.access.one_time()}")
    page.goto(f"{site.address}/for-you?user=ann")
    title = page.locator(".card h2").first.inner_text()
    page.get_by_role("button", name=f"Not interested: {title}").click()
    expect(page.locator(".note")).to_contain_text(f"You will not see {title} again.")
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".card h2").first).to_have_text(title)
    context.close()


def test_no_request_has_left_the_page_and_no_script_has_failed(site: Site) -> None:
    assert len(site.requests) > 50
    assert {each for each in site.requests if not each.startswith(site.address + "/")} == set()
    assert site.errors == []


def test_a_browser_that_is_led_in_by_a_file_is_let_in_and_another_one_is_not(
    site: Site, browser: Browser, tmp_path: Path
) -> None:
    with leading_to(f"{site.address}/?token={site.access.one_time()}", tmp_path / "home.node") as file:
        assert [each.stat().st_mode & 0o777 for each in tmp_path.iterdir()] == [0o600]
        context = browser.new_context()
        page = context.new_page()
        page.goto(file)
        expect(page.get_by_role("heading", level=1)).to_have_text("Who are you?")
        assert "token" not in page.url
        context.close()
    assert list(tmp_path.iterdir()) == []
    context = browser.new_context()
    page = context.new_page()
    answer = page.goto(site.address + "/for-you?user=ann")
    assert answer is not None
    assert answer.status == 401
    assert "the token is missing" in page.inner_text("body")
    context.close()
