"""The interface of a node, asked over a socket as apps ask it, and by questions that a fuzzer makes of its document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies
from prometheus_client.parser import text_string_to_metric_families

from perfedrec import Node, load
from perfedrec.data.details import Details
from perfedrec.methods.federated.fedmf import FedMF
from perfedrec.runtimes.node import Store, serving_broadcast
from perfedrec.runtimes.simulator import Simulator
from perfedrec.web.api_records import MOST_ITEMS
from perfedrec.web.guard import Access
from perfedrec.web.node_api import node_api
from perfedrec.web.running import listening, serving

TOKEN = "a-token-of-the-tests-alone"
TOKENED = {"Authorization": f"Bearer {TOKEN}"}
NAMES = ["i0", "a/b", "a%2Fb", "é ü?#&=", "..", "i5/similar", "i6 ", "7", "007", "long" * 50]
EXAMPLES = 3
PIXEL = b"\x89PNG\r\n\x1a\n and more"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node's file with the users 0, 3 and 9 of a model after some rounds, and items with unusual ids."""
    path = tmp_path_factory.mktemp("node") / "a.node"
    dataset = load("synthetic:users=40,items=60,clusters=2,interactions_per_user=6,seed=1")
    simulator = Simulator(FedMF(FedMF.Options()), dataset, seed=1, device="cpu")
    for _ in range(simulator.n_phases + 2):
        simulator.play()
    items = np.array([*NAMES, *(f"i{number}" for number in range(len(NAMES), dataset.n_items))], dtype=object)
    users = torch.tensor([0, 3, 9])
    ids = dataset.train.user_ids[users.numpy()].tolist()
    frame = dataset.train.frame().filter(pl.col("user").is_in(ids))
    numbers = {name: items[number] for number, name in enumerate(dataset.train.item_ids.tolist())}
    frame = pl.DataFrame({"user": frame["user"].cast(pl.String), "item": [numbers[each] for each in frame["item"]]})
    with Store.create(path, items) as store:
        store.import_interactions(frame, identities={str(ids[place]): each for place, each in enumerate([0, 3, 9])})
        broadcast = serving_broadcast(simulator.algorithm, simulator.state, users)
        store.receive(broadcast, users, "simulated", 2, "", simulator.algorithm.inference)
    return path


@pytest.fixture(scope="module")
def node(template: Path) -> Iterator[Node]:
    with Node.open(template) as opened:
        yield opened


@pytest.fixture(scope="module")
def slow(template: Path) -> Iterator[Node]:
    with Node.open(template) as opened:
        yield opened


@pytest.fixture(scope="module")
def asking(node: Node, slow: Node) -> Iterator[httpx.Client]:
    """A client of a server with this node. Tests that change something have users of their own."""
    app = node_api(node, slow, Access(TOKEN))
    with listening() as at, serving(app, at), httpx.Client(base_url=at.address, headers=TOKENED) as client:
        yield client


def ids(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [each["item"] for each in answer.json()["items"]]


def quoted(name: str) -> str:
    return "".join(f"%{byte:02X}" for byte in name.encode())


def test_a_list_is_the_one_of_python(asking: httpx.Client, node: Node) -> None:
    user = node.users()[0]
    found = asking.get(f"/users/{user}/recommendations", params={"k": 7, "why": True}).json()
    assert found["user"] == user
    expected = node.recommend(user, 7, why=True)
    assert [each["item"] for each in found["items"]] == [each["item"] for each in expected]
    for row, other in zip(found["items"], expected, strict=True):
        assert (row["rank"], row["score"], row["moved"]) == (other["rank"], other["score"], other["moved"])
        assert row["parts"] == {"global": other["global"]}
        assert row["because"] == other["because"]
    best = [each["item"] for each in found["items"]]
    one, two = best[:2]
    assert ids(asking.get(f"/users/{user}/recommendations", params={"k": 5, "exclude": [one, two]})) == best[2:]
    assert ids(asking.get(f"/users/{user}/recommendations", params={"among": [two, one]})) == [one, two]
    assert len(ids(asking.get(f"/users/{user}/recommendations"))) == 20
    assert ids(asking.post(f"/users/{user}/recommendations", json={"k": 3, "among": best})) == best[:3]
    assert ids(asking.post(f"/users/{user}/recommendations", json={"k": 5, "exclude": [two]})) == [one, *best[2:6]]
    assert ids(asking.post(f"/users/{user}/recommendations", json={"among": []})) == []


def test_a_new_interaction_is_in_the_next_answer_whoever_wrote_it(asking: httpx.Client, node: Node) -> None:
    user, address = "ann", "/users/ann/recommendations"
    assert asking.post(f"/users/{user}/interactions", json={"items": ["i20", "i21"]}).json() == {"changed": 2}
    one, two, three = ids(asking.get(address))[:3]
    assert asking.post(f"/users/{user}/interactions", json={"items": [one, one]}).json() == {"changed": 1}
    after = ids(asking.get(address))
    assert one not in after
    assert one in ids(asking.get(f"/users/{user}/interactions"))
    with Node.open(node.path) as other:  # as another process does
        other.add(user, two)
        assert two not in ids(asking.get(address))
        other.dismiss(user, three)
        assert three not in ids(asking.get(address))
    assert ids(asking.get(f"/users/{user}/dismissed")) == [three]
    assert asking.delete(f"/users/{user}/interactions/{quoted(one)}").json() == {"changed": 1}
    assert asking.delete(f"/users/{user}/interactions/{quoted(one)}").json() == {"changed": 0}
    assert asking.delete(f"/users/{user}/dismissed/{quoted(three)}").json() == {"changed": 1}
    after = ids(asking.get(address, params={"k": 60}))
    assert (one in after, two in after, three in after) == (True, False, True)


def test_a_list_does_not_wait_for_another_process_that_writes(asking: httpx.Client, node: Node, slow: Node) -> None:
    user = node.users()[0]
    slow._file._database.connection.execute("PRAGMA busy_timeout = 20")
    with Node.open(node.path) as other, other._file._database.writing():
        assert len(ids(asking.get(f"/users/{user}/recommendations"))) == 20
        answer = asking.post(f"/users/{user}/interactions", json={"items": ["i30"]})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert "another process has kept it locked" in answer.json()["detail"]
    slow._file._database.connection.execute("PRAGMA busy_timeout = 5000")


@pytest.mark.parametrize("name", NAMES)
def test_any_id_can_stand_in_a_path(asking: httpx.Client, node: Node, name: str) -> None:
    user = f"new {name}"
    assert asking.get(f"/items/{quoted(name)}").json()["item"] == name
    assert name not in ids(asking.get(f"/items/{quoted(name)}/similar", params={"k": 3}))
    assert asking.post(f"/users/{quoted(user)}/interactions", json={"items": [name]}).json() == {"changed": 1}
    assert ids(asking.get(f"/users/{quoted(user)}/interactions")) == [name]
    assert asking.get(f"/users/{quoted(user)}/recommendations").json()["user"] == user
    assert asking.delete(f"/users/{quoted(user)}/interactions/{quoted(name)}").json() == {"changed": 1}


def test_a_user_can_be_exported_and_forgotten(asking: httpx.Client, node: Node) -> None:
    asking.post("/users/eve/interactions", json={"items": ["i0"]})
    assert asking.get("/users").json() == {"users": node.users()}
    found = asking.get("/users/eve").json()
    assert (found["user"], [each["item"] for each in found["items"]]) == ("eve", ["i0"])
    assert asking.delete("/users/eve").json() == {"users": ["eve"]}
    assert "eve" not in asking.get("/users").json()["users"]
    assert asking.get("/users/eve").status_code == 404
    assert ids(asking.get("/popular", params={"k": 4})) == [each["item"] for each in node.popular(4)]


def test_items_have_what_the_catalogue_knows(asking: httpx.Client, node: Node) -> None:
    given = Details("a/b", "A star", ("image/png", PIXEL), {"genres": "war, love"})
    node._file.describe([given])
    star = {"item": "a/b", "title": "A star", "picture": True, "attributes": {"genres": "war, love"}}
    assert asking.get("/items/a%2Fb").json() == star
    assert asking.get("/items", params={"search": "STAR"}).json() == {"items": [star]}
    picture = asking.get("/items/a%2Fb/picture")
    assert (picture.content, picture.headers["content-type"]) == (PIXEL, "image/png")
    answer = asking.get("/items/i0/picture")
    assert (answer.status_code, answer.json()["detail"]) == (404, "the catalogue has no picture of the item 'i0'")
    user = node.users()[0]
    listed = asking.get(f"/users/{user}/recommendations", params={"among": "a/b"}).json()["items"]
    assert [{name: each[name] for name in star} for each in listed] == [star]


USER = "/users/{user}"


@pytest.mark.parametrize(
    ("method", "address", "body", "status", "words"),
    [
        ("GET", "/users/nobody/recommendations", None, 404, "unknown user 'nobody'"),
        ("GET", f"{USER}/recommendations?exclude=nothing", None, 404, "unknown item 'nothing'"),
        ("GET", "/items/nothing", None, 404, "unknown item 'nothing'"),
        ("GET", "/items/a/b", None, 404, "Not Found"),
        ("GET", "/nowhere", None, 404, "Not Found"),
        ("GET", "/users//recommendations", None, 404, "Not Found"),
        ("PUT", "/items/i0", None, 405, "Method Not Allowed"),
        ("GET", f"{USER}/recommendations?k=0", None, 422, "query.k: expected at least 1"),
        ("GET", f"{USER}/recommendations?k=1001", None, 422, "query.k: expected at most 1000"),
        ("GET", f"{USER}/recommendations?k=many", None, 422, "query.k: expected a whole number"),
        ("GET", f"{USER}/recommendations?exlude=i0", None, 422, "query.exlude: is not known here"),
        ("GET", "/items?k=3", None, 422, "query.search: is missing"),
        ("GET", "/items/i0?k=3", None, 422, "query.k: is not known here"),
        ("POST", f"{USER}/interactions", {"items": ["nothing"]}, 404, "unknown item 'nothing'"),
        ("POST", f"{USER}/interactions", {"items": []}, 422, "body.items: expected at least 1 of them"),
        ("POST", f"{USER}/interactions", {"items": ["i0"] * (MOST_ITEMS + 1)}, 422, "at most 10000 of them"),
        ("POST", f"{USER}/interactions", {"items": [7]}, 422, "body.items.0: expected text"),
        ("POST", f"{USER}/interactions", {"items": ["i0"], "more": 1}, 422, "body.more: is not known here"),
        ("POST", f"{USER}/interactions", b"{", 422, "JSON decode error"),
        ("POST", f"{USER}/interactions", b'{"items": ["\\ud800"]}', 422, "which is no character"),
        ("POST", f"{USER}/interactions", b"[" * 100_000, 400, "body"),
        ("POST", f"{USER}/interactions", b"x" * (1 << 20) + b"x", 413, "at most 1048576 bytes"),
        ("POST", "/users/%20/interactions", {"items": ["i0"]}, 422, "the id of a user is empty"),
        ("POST", "/users/%00a/interactions", {"items": ["i0"]}, 422, "has U+0000"),
        ("POST", "/users/%ff%fe/interactions", {"items": ["i0"]}, 422, "has U+FFFD"),
    ],
)
def test_a_question_that_cannot_be_answered_gets_one_line(
    asking: httpx.Client, node: Node, method: str, address: str, body: Any, status: int, words: str
) -> None:
    before = node.items_of(node.users()[0])
    content = {"content": body, "headers": {"content-type": "application/json"}} if isinstance(body, bytes) else {}
    answer = asking.request(
        method, address.format(user=node.users()[0]), **content or {"json": body} if body is not None else {}
    )
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"detail"}
    assert words in answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]
    assert node.items_of(node.users()[0]) == before


def test_without_a_token_there_is_only_what_concerns_nobody(asking: httpx.Client, node: Node) -> None:
    for address in ("/health", "/docs", "/docs/style.css", "/openapi.json"):
        assert httpx.get(f"{asking.base_url}{address}").status_code == 200
    for address in ("/metrics", "/items/i0", f"/users/{node.users()[0]}/recommendations", "/nowhere"):
        assert httpx.get(f"{asking.base_url}{address}").status_code == 401
    refused = asking.get("/health", headers={"Host": "example.org"})
    assert (refused.status_code, refused.headers["x-content-type-options"]) == (421, "nosniff")


def test_a_node_without_a_model_says_so(tmp_path: Path) -> None:
    path = tmp_path / "b.node"
    with Store.create(path, np.array(["i0", "i1"], dtype=object)) as store:
        store.add_interactions("ann", "i0")
    with Node.open(path) as node, listening() as listener, serving(node_api(node, node, None), listener):
        answer = httpx.get(f"{listener.address}/users/ann/recommendations")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert "has received no model yet" in answer.json()["detail"]
        assert ids(httpx.get(f"{listener.address}/users/ann/interactions")) == ["i0"]  # and no token was needed


def test_figures_are_counted_by_path_and_tell_of_no_user(asking: httpx.Client, node: Node) -> None:
    user = node.users()[0]
    path = "/users/{user}/recommendations"

    def read() -> dict[tuple[str, ...], float]:
        families = text_string_to_metric_families(asking.get("/metrics").text)
        return {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}

    before = read()
    for address in (f"/users/{user}/recommendations", "/users/nobody/recommendations", "/nowhere", "/elsewhere"):
        asking.get(address)
    text, values = asking.get("/metrics").text, read()
    assert "nobody" not in text

    def more(*name: str) -> float:
        return values[name] - before.get(name, 0)

    assert more("perfedrec_api_requests_total", "GET", path, "200") == 1
    assert more("perfedrec_api_requests_total", "GET", path, "404") == 1
    assert more("perfedrec_api_requests_total", "GET", "none", "404") == 2
    assert more("perfedrec_api_request_seconds_count", "GET", path) == 2
    assert values["perfedrec_node_users",] == len(node.users())
    assert values["perfedrec_node_model_timestamp_seconds",] > 1.7e9
    assert "process_cpu_seconds_total" in text


def test_the_page_shows_all_questions_and_loads_nothing_from_elsewhere(asking: httpx.Client) -> None:
    page, document = asking.get("/docs").text, asking.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, each in methods.items():
            assert f"<b>{method.upper()}</b> {path}</code> <span>{each['summary']}</span>" in unescape(page)
    assert set(re.findall(r'(?:href|src)="([^"#]+)"', page)) == {"/docs/style.css", "/openapi.json"}
    assert "url(" not in asking.get("/docs/style.css").text
    assert "<script" not in page
    assert "style=" not in page
    for name in document["components"]["schemas"]:
        assert f'<section id="{name}">' in page


def test_no_question_gives_a_server_error_and_every_answer_is_as_described(asking: httpx.Client) -> None:
    """The questions are made from the document: right and wrong ones."""
    import schemathesis
    from schemathesis.config import SchemathesisConfig

    config = SchemathesisConfig(seed=1)
    schema = schemathesis.openapi.from_url(f"{asking.base_url}/openapi.json", config=config)
    operations = [each.ok() for each in schema.get_all_operations()]
    assert len(operations) == 18
    rules = settings(
        max_examples=EXAMPLES,
        database=None,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for operation in operations:
        kinds = [operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]

        @rules
        @given(case=strategies.one_of(kinds))
        def check(case: Any) -> None:
            case.call_and_validate(headers=TOKENED)

        check()
