"""The pages of a node behind their guard, asked as a browser without a script asks."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import numpy as np
import pytest

from perfedrec import Node
from perfedrec.runtimes.node import Store
from perfedrec.web.guard import Access, Guard
from perfedrec.web.node_pages import FIRST, NodePages

ADDRESS = "http://127.0.0.1:8000"
VIEWS = ("/for-you", "/start", "/similar", "/have", "/left", "/rules", "/forget", "/export.csv", "/export.json")


class Browser:
    """Asks an app, and keeps cookies."""

    def __init__(self, app: Any) -> None:
        way = httpx.ASGITransport(app)
        self.http = httpx.AsyncClient(transport=way, base_url=ADDRESS, follow_redirects=True)

    def get(self, path: str, **given: Any) -> httpx.Response:
        return asyncio.run(self.http.get(path, **given))

    def post(self, path: str, **given: Any) -> httpx.Response:
        return asyncio.run(self.http.post(path, **given))


class Home:
    """A node, and a browser that has entered its pages."""

    def __init__(self, node: Node) -> None:
        self.node, self.pages, access = node, NodePages(node), Access()
        self.app = Guard(self.pages.app(), access)
        self.client = Browser(self.app)
        assert self.client.get(f"/?token={access.one_time()}").status_code == 200

    def text(self, path: str, status: int = 200, **query: Any) -> str:
        """What stands in the main part of a page."""
        answer = self.client.get(path, params=query)
        assert answer.status_code == status, answer.text
        return words(answer.text)

    def send(self, path: str, files: Any = None, **fields: str) -> Any:
        given = {"form": self.pages._form_token, **fields}
        return self.client.post(path, data=given, files=files, follow_redirects=False)


def words(page: str) -> str:
    body = page.split("<main", 1)[1].split("</main>")[0].partition(">")[2]
    body = re.sub(r"<svg.*?</svg>", " ", body, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


@pytest.fixture
def home(new_home: Callable[[Path], Path], tmp_path: Path) -> Iterator[Home]:
    with Node.open(new_home(tmp_path)) as node:
        yield Home(node)


def test_nobody_enters_without_the_token_and_no_form_counts_without_its_own(home: Home) -> None:
    other = Browser(home.app)
    for path in (*VIEWS, "/", "/picture?item=1", "/assets/page.css", "/import", "/forget-now"):
        assert other.get(path).status_code == 401
        assert other.post(path).status_code == 401
    assert home.client.get("/for-you?user=ann", headers={"host": "rebound.example.org"}).status_code == 421
    assert home.client.get("/for-you?user=ann", headers={"origin": "http://example.org"}).status_code == 403
    before = home.node.export("ann")
    for path in ("/add", "/remove", "/dismiss", "/forget-now", "/leave", "/pause", "/rule", "/import", "/begin"):
        for form in ({}, {"form": "guessed"}, {"form": "ü"}):
            fields = {"user": "ann", "item": "1", "paused": "yes", "require": "none", **form}
            answer = home.client.post(path, data=fields)
            assert answer.status_code == 403, path
            assert "another page has sent it" in words(answer.text)
        assert home.client.get(path, follow_redirects=False).status_code == 405
    assert home.node.export("ann") == before
    assert home.node.rules()["paused"] is False


def test_every_answer_forbids_other_origins(home: Home) -> None:
    for path in (*VIEWS[:7], "/?choose=1", "/nowhere", "/assets/page.js"):
        answer = home.client.get(path, params={"user": "ann", "item": "1"})
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        for found in re.findall(r"""(?:src|href|action)=["']?([^"'\s>]+)""", answer.text):
            assert found.startswith(("/", "#")), found
            assert not found.startswith("//"), found
        assert " style=" not in answer.text
        assert "onclick" not in answer.text


def test_ids_of_all_kinds_are_text_and_nothing_else(home: Home) -> None:
    for name in ("<script>alert(1)</script>", "a/../b?c#d&e=f", "Ω 'quoted\"", "  padded "):
        home.node.add(name, "1", "2", "3")
        page = home.client.get("/for-you", params={"user": name})
        assert page.status_code == 200
        assert "<script>alert" not in page.text
        links = re.findall(r'<nav class="views".*?</nav>', page.text, re.DOTALL)[0]
        for link in re.findall(r'href="([^"]+)"', links):
            assert parse_qs(urlsplit(unescape(link)).query)["user"] == [name]
        sent = home.send("/remove", user=name, item="1", back=f"/have?{urlsplit('x').path}")
        assert sent.status_code == 303
        assert len(home.node.items_of(name)) == 2
        home.send("/forget-now", user=name)
        assert name not in home.node.users()


def test_a_form_leads_back_to_a_view_of_this_server(home: Home) -> None:
    for back in ("//example.org", "https://example.org/have", "/nowhere", "javascript:alert(1)", "\\\\example.org", ""):
        answer = home.send("/dismiss", user="ann", item="5", back=back)
        assert answer.headers["location"].startswith("/for-you?user=ann&"), back
    answer = home.send("/dismiss", user="ann", item="5", back="/have?user=ann&q=a+b&page=2")
    assert answer.headers["location"] == "/have?user=ann&q=a+b&page=2&done=dismissed&of=5"


def test_the_first_page_asks_who_somebody_is_unless_there_is_one_person(home: Home) -> None:
    who = home.text("/")
    assert "Who are you?" in who
    assert "Bo / Béla" in who
    home.node.forget("ann")
    answer = home.client.get("/", follow_redirects=False)
    assert answer.headers["location"] == "/for-you?user=Bo+%2F+B%C3%A9la"
    assert "For you" in home.text("/for-you")
    for name in ("", " ", "x" * 65, "a\nb"):
        assert home.send("/begin", name=name).headers["location"] == "/?wrong=1"
    assert "A name has 1 to 64 characters" in home.text("/", wrong=1)
    assert home.send("/begin", name=" Cleo ").headers["location"] == "/for-you?user=Cleo"
    assert home.node.users() == ["Bo / Béla"]  # nothing is stored before there is something to store
    for number in range(70):
        home.node.add(f"tenant {number}", "1")
    many = home.text("/")
    assert "tenant 57 1 thing" in many
    assert "tenant 60" not in many
    assert "And 11 people more: write the name below." in many


def test_a_list_is_that_of_the_node_and_changes_with_each_step(home: Home) -> None:
    def shown() -> list[str]:
        page = home.client.get("/for-you", params={"user": "ann"}).text
        return [unescape(each) for each in re.findall(r"<h2>(.*?)</h2>", page)]

    def listed() -> list[str]:
        return [row["title"] for row in home.node.recommend("ann", 20)]

    assert shown() == listed()
    first, second = home.node.recommend("ann", 2)
    said = home.client.post(
        "/dismiss",
        data={"form": home.pages._form_token, "user": "ann", "item": first["item"], "back": "/for-you?user=ann"},
    )
    assert f"You will not see {first['title']} again. Undo" in words(said.text)
    assert shown() == listed()
    assert first["title"] not in shown()
    home.send("/add", user="ann", item=str(second["item"]))
    assert second["title"] not in shown()
    home.send("/restore", user="ann", item=str(first["item"]))
    assert first["title"] in shown()
    assert len(re.findall("<h2>", home.client.get("/for-you?user=ann&k=40").text)) == 40
    for k in ("-1", "x", "9" * 50, "²"):
        assert len(re.findall("<h2>", home.client.get("/for-you", params={"user": "ann", "k": k}).text)) == 20


def test_similar_things_are_new_ones(home: Home) -> None:
    item = home.node.recommend("ann", 1)[0]
    home.node.dismiss("ann", *(row["item"] for row in home.node.similar(item["item"], 3)))
    page = home.text("/similar", user="ann", item=item["item"])
    assert page.startswith(f"← Back to your list More like {item['title']}")
    gone = [row["title"] for row in home.node.items_of("ann") + home.node.dismissed("ann")]
    assert not any(f" {title} " in page for title in gone)


def test_what_somebody_has_is_searched_and_paged(home: Home) -> None:
    own = home.node.items_of("ann")
    page = home.text("/have", user="ann")
    assert f"“ann” has {len(own)} things." in page
    assert all(row["title"] in page for row in own)
    title = own[0]["title"]
    found = home.text("/have", user="ann", q=title.lower())
    assert title in found
    assert own[1]["title"] not in found
    other = home.node.recommend("ann", 1)[0]["title"]
    assert f"In the catalogue, not yet yours {other}" in home.text("/have", user="ann", q=other)
    home.node.add("many", *(row["item"] for row in home.node.popular(70)))
    assert "Page 1 of 2 Next page" in home.text("/have", user="many")
    assert "Previous page Page 2 of 2" in home.text("/have", user="many", page=2)
    assert "Page 2 of 2" in home.text("/have", user="many", page=10**6)


def test_a_file_is_taken_in_whole_or_not_at_all(home: Home) -> None:
    item, title = home.node.item(1)["item"], home.node.item(1)["title"]
    good = ("mine.csv", f"user,item\ncleo,{item}\ncleo,2\n".encode())
    answer = home.send("/import", files={"file": good}, user="ann", back="/have?user=ann")
    assert answer.headers["location"] == "/have?user=ann&done=imported&of=2-1-0-1&whose=cleo"
    note = words(home.client.get(answer.headers["location"]).text)
    assert "Imported: 2 things for cleo. New on this device: 1 person." in note
    assert title in home.text("/have", user="cleo")
    before = [home.node.export(user) for user in home.node.users()]
    unreadable = "The file cannot be read as a table of things. Expected is a table whose first line names the columns"
    for name, content, why in (
        ("title.csv", b"title,shelf\nx,1\n", "title, shelf; import it with perfedrec node import and its options"),
        ("person.csv", b"item,whose\n1,cleo\n", "no user column; the columns are item, whose"),
        (
            "a.csv",
            b"user,item\ncleo,3\ncleo,nowhere\n",
            "the first with 'nowhere'; expected known items, or the tick that leaves others out",
        ),
        ("../../b.csv", b"user,item\ncleo,3\ncleo\n", "b.csv, line 3: has 1 column; expected 2 as in"),
        ("c.bin", b"\x00\x01\x02", "c.bin"),
        ("empty.csv", b"", "empty.csv"),
    ):
        answer = home.send("/import", files={"file": (name, content)}, user="ann")
        assert answer.status_code == 422
        (line,) = re.findall(r'<summary>Exact reason</summary><p lang="en">(.*?)</p>', answer.text)
        sentence = "The file has things that are not in the catalogue." if name == "a.csv" else unreadable
        assert f"Nothing was imported. {sentence}" in words(answer.text)
        assert why in unescape(line), line
        assert "/tmp" not in line
        assert "“ann” has" in words(answer.text)
        assert [home.node.export(user) for user in home.node.users()] == before
    some = ("a.csv", b"user,item\ncleo,3\ncleo,nowhere\n")
    answer = home.send("/import", files={"file": some}, user="ann", skip="yes")
    assert answer.headers["location"] == "/have?user=ann&done=imported&of=1-1-1-0&whose=cleo"
    assert "does not have them: 1 thing." in words(home.client.get(answer.headers["location"]).text)
    for odd in ("", "x", "-" * 99, "1", "9" * 5000):
        home.text("/have", user="ann", done="imported", of=odd)
    assert home.send("/import", user="ann").status_code == 422
    two = [("file", good), ("file", ("b.csv", b"user,item\nann,1\n"))]
    assert "expected one file" in home.send("/import", files=two, user="ann").text


def test_a_file_that_names_nobody_has_the_things_of_the_person_who_looks(home: Home) -> None:
    for number, content in enumerate((b"item\n1\n2\n", b"item,rating\n3,4\n", b'[{"item": "4"}, {"item": "5"}]')):
        answer = home.send("/import", files={"file": (f"mine{number}", content)}, user="Zoë 7")
        assert answer.status_code == 303, answer.text
    assert {str(row["item"]) for row in home.node.items_of("Zoë 7")} == {"1", "2", "3", "4", "5"}


def test_a_note_names_three_people_and_counts_the_others(home: Home) -> None:
    lines = "".join(f"p{n},1\n" for n in range(5))
    file = ("a.csv", f"user,item\n{lines}ann,1\np9,nowhere".encode())
    answer = home.send("/import", files={"file": file}, user="ann", skip="yes", back="/have?user=ann")
    found = words(home.client.get(answer.headers["location"]).text)
    assert "for p0, p1, p2 and 3 other people. New on this device: 5 people." in found


def test_what_is_exported_can_be_imported_again(home: Home) -> None:
    name = "Bo / Béla"
    own = [row["item"] for row in home.node.items_of(name)]
    table = home.client.get("/export.csv", params={"user": name})
    assert table.headers["content-disposition"] == 'attachment; filename="my-items.csv"'
    everything = home.client.get("/export.json", params={"user": name})
    assert json.loads(everything.text) == json.loads(json.dumps(home.node.export(name)))
    home.send("/forget-now", user=name)
    assert home.send("/import", files={"file": ("my-items.csv", table.content)}, user="ann").status_code == 303
    assert [row["item"] for row in home.node.items_of(name)] == own


def test_rules_are_those_of_the_node(home: Home) -> None:
    page = home.client.get("/rules?user=ann").text
    assert 'value="secure" checked' in page
    home.send("/rule", user="ann", require="private", back="/rules?user=ann")
    assert home.node.rules()["chosen"] == "private"
    assert home.send("/rule", user="ann", require="all").status_code == 422
    home.send("/pause", user="ann", paused="yes")
    assert home.node.rules()["paused"] is True
    assert "This device is paused." in home.text("/rules", user="ann")
    home.send("/pause", user="ann", paused="no")
    assert home.node.rules()["paused"] is False
    home.send("/leave", user="ann")
    assert home.node.rules()["left"] is True
    assert "This device has left the federation." in home.text("/rules", user="ann")
    home.send("/return", user="ann")
    assert home.node.rules()["left"] is False


def test_a_newcomer_gets_a_list_after_three_things(home: Home) -> None:
    page = home.text("/for-you", user="Cleo")
    assert page.startswith("Choose three things that you like")
    chosen = [str(row["item"]) for row in home.node.popular(FIRST)]
    for number, item in enumerate(chosen, start=1):
        answer = home.send("/add", user="Cleo", item=item, back="/start?user=Cleo")
        assert answer.headers["location"] == ("/for-you" if number == FIRST else "/start") + "?user=Cleo"
    assert "For you" in home.text("/for-you", user="Cleo")
    found = home.text("/start", user="Dora", q=home.node.item(chosen[0])["title"])
    assert home.node.item(chosen[0])["title"] in found
    assert "Nothing in the catalogue fits “xyzzy”." in home.text("/start", user="Dora", q="xyzzy")


def test_mistakes_get_one_line(home: Home) -> None:
    assert "There is no such page" in home.text("/nowhere", status=404)
    assert "unknown item 'x'" in home.text("/similar", status=404, user="ann", item="x")
    assert home.send("/add", user="ann", item="x").status_code == 404
    assert home.send("/add", user=" ", item="1").status_code in (404, 422)
    assert home.client.get("/picture?item=0").status_code == 404
    picture = home.client.get("/picture?item=1")
    assert (picture.headers["content-type"], picture.content[1:4]) == ("image/png", b"PNG")
    assert home.client.get("/assets/..%2Fviews.py").status_code == 404


def test_the_language_is_chosen_by_a_link_and_kept(home: Home) -> None:
    assert 'lang="en"' in home.client.get("/left?user=ann").text
    assert "Was dieses Gerät verlassen hat" in home.client.get("/left?user=ann", headers={"accept-language": "de"}).text
    answer = home.client.get("/left?user=ann&lang=de", follow_redirects=False)
    assert answer.headers["location"] == "/left?user=ann"
    assert "Was dieses Gerät verlassen hat" in home.text("/left", user="ann")
    assert 'href="/left?user=ann&amp;lang=en"' in home.client.get("/left?user=ann").text
    home.client.get("/left?user=ann&lang=xx")
    assert "Was dieses Gerät verlassen hat" in home.text("/left", user="ann")


def test_a_node_without_a_model_says_so(tmp_path: Path) -> None:
    Store.create(tmp_path / "a.node", np.array(["x", "y", "z"], dtype=object)).close()
    with Node.open(tmp_path / "a.node") as node:
        node.add("ann", "x")
        home = Home(node)
        assert "There is no model on this device yet" in home.text("/for-you", user="ann")
        start = home.text("/for-you", user="new")
        assert start.startswith("Choose three things that you like")
        assert "Search for things that you like." in start
        assert "Found for “y” y I like this" in home.text("/start", user="new", q="y")
        assert "Nothing has left this device." in home.text("/left", user="ann")
