"""Who is let in, and who is not: asked through the guard itself, with an app behind it that counts what reaches it."""

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from perfedrec.core.errors import ConfigError
from perfedrec.web.guard import HEADERS, Access, Guard, token_file

TOKEN = "a-token-of-the-tests-alone"
HOST = "127.0.0.1:8000"


class Echo:
    """Answers with the body that it received, and counts requests."""

    asked = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": body})


class Answer:
    def __init__(self, sent: list[Message]) -> None:
        self.status: int = sent[0]["status"]
        self.headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        self.body = b"".join(each.get("body", b"") for each in sent[1:])

    @property
    def detail(self) -> str:
        found = json.loads(self.body)
        assert set(found) == {"detail"}
        assert "\n" not in found["detail"]
        return str(found["detail"])


def ask(
    guard: Guard,
    target: str = "/",
    method: str = "GET",
    body: Iterable[bytes] = (),
    headers: Iterable[tuple[str, str]] = (),
    **more: Any,
) -> Answer:
    """Ask with the headers Host and Authorization, unless others are given (None: without)."""
    fixed = {"host": HOST, "authorization": f"Bearer {TOKEN}"} | {k.replace("_", "-"): v for k, v in more.items()}
    given = [*((name, value) for name, value in fixed.items() if value is not None), *headers]
    path, _, query = target.partition("?")
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in given],
        "server": ("127.0.0.1", 8000),
    }
    parts, sent = list(body), list[Message]()

    async def receive() -> Message:
        part = parts.pop(0) if parts else b""
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    return Answer(sent)


@pytest.fixture
def guard() -> Guard:
    return Guard(Echo(), Access(TOKEN), body_limit=100, open_paths=["/health"])


def refused(guard: Guard, status: int, **request: Any) -> Answer:
    answer = ask(guard, **request)
    assert answer.status == status
    assert guard.app.asked == 0  # type: ignore[attr-defined]
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    return answer


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "LOCALHOST", "[::1]:9000", "[::1]", "127.0.0.1"])
def test_every_name_of_loopback_is_served(guard: Guard, host: str) -> None:
    answer = ask(guard, host=host, origin=f"http://{host}")
    assert answer.status == 200
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS


@pytest.mark.parametrize(
    "host",
    [
        "example.org",
        "example.org:8000",
        "127.0.0.1.example.org:8000",
        "localhost.example.org",
        "192.168.0.7:8000",
        "0.0.0.0:8000",
        "127.0.0.1:8000@example.org",
        "example.org@127.0.0.1:80x",
        "",
        ":8000",
    ],
)
def test_a_host_that_is_not_of_loopback_is_refused(guard: Guard, host: str) -> None:
    """A website whose name was made to point to this machine has the user's browser send that name."""
    assert "expected the Host" in refused(guard, 421, host=host).detail


def test_a_request_has_one_host(guard: Guard) -> None:
    assert "0 headers Host" in refused(guard, 400, host=None).detail
    assert "2 headers Host" in refused(guard, 400, headers=[("host", "example.org")]).detail


@pytest.mark.parametrize(
    "origin", ["http://example.org", "null", "https://127.0.0.1:8000", "http://127.0.0.1:3000", "http://localhost:8000"]
)
def test_another_origin_is_refused_even_with_the_token(guard: Guard, origin: str) -> None:
    assert "another origin" in refused(guard, 403, origin=origin).detail
    assert "another origin" in refused(guard, 403, method="POST", origin=origin).detail


def test_what_another_page_embeds_is_refused_and_what_somebody_follows_is_not(guard: Guard) -> None:
    for site in ("cross-site", "same-site"):
        refused(guard, 403, sec_fetch_site=site, sec_fetch_mode="no-cors", sec_fetch_dest="image")
        refused(guard, 403, sec_fetch_site=site, sec_fetch_mode="navigate", sec_fetch_dest="iframe")
    followed = {"sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
    assert ask(guard, sec_fetch_site="cross-site", **followed).status == 200
    assert ask(guard, sec_fetch_site="same-origin", sec_fetch_mode="cors", sec_fetch_dest="empty").status == 200


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer ", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer é"]
)
def test_without_the_token_nobody_gets_in(guard: Guard, given: str | None) -> None:
    answer = refused(guard, 401, authorization=given)
    assert "Authorization: Bearer TOKEN" in answer.detail
    assert answer.headers["www-authenticate"] == "Bearer"
    assert TOKEN not in answer.body.decode()


def test_open_paths_need_no_token_but_a_host(guard: Guard) -> None:
    assert ask(guard, "/health", authorization=None).status == 200
    assert ask(guard, "/health/x", authorization=None).status == 401
    assert ask(guard, "/health", authorization=None, host="example.org").status == 421


def test_a_browser_that_asks_for_a_page_gets_one(guard: Guard) -> None:
    answer = refused(guard, 401, authorization=None, accept="text/html,*/*")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "<p>the token is missing" in answer.body.decode()


def test_a_browser_without_a_key_is_told_how_to_get_one() -> None:
    advice = "press Enter in the terminal"
    for guard in (Guard(Echo(), Access(TOKEN), enter="/enter"), Guard(Echo(), Access(TOKEN), advice=advice)):
        assert guard.access is not None
        guard.access.one_time()
        by_program = ask(guard, authorization=None)
        assert (by_program.status, "Authorization: Bearer TOKEN" in by_program.detail) == (401, True)
        html: dict[str, Any] = {"authorization": None, "accept": "text/html"}
        assert ask(guard, method="POST", **html).status == 401
        plain, used = ask(guard, "/lists?k=5", **html), ask(guard, "/?token=used", **html)
        if guard.enter:
            assert [(each.status, each.headers["location"]) for each in (plain, used)] == [(303, "/enter")] * 2
            assert "set-cookie" not in plain.headers
        else:
            assert (plain.status, used.status) == (401, 401)
            assert f"<p>this browser has no key for this page: {advice}</p>" in plain.body.decode()
            assert f"<p>this address was used already, or is of an earlier start: {advice}</p>" in used.body.decode()


def test_no_address_was_used_where_none_was_given_out(guard: Guard) -> None:
    assert "the token is missing or wrong" in ask(guard, "/?token=wrong", authorization=None).detail


def test_a_one_time_token_opens_one_session(guard: Guard) -> None:
    assert guard.access is not None
    once = guard.access.one_time()
    bare: dict[str, Any] = {"authorization": None}
    assert ask(guard, f"/?token={once}", "HEAD", **bare).status == 401  # what previews an address uses nothing up
    entered = ask(guard, f"/lists?k=5&token={once}&q=a%20b", **bare)
    assert (entered.status, entered.headers["location"]) == (303, "/lists?k=5&q=a+b")
    cookie, *rest = entered.headers["set-cookie"].split("; ")
    assert rest == ["Path=/", "HttpOnly", "SameSite=Strict"]
    assert once not in cookie
    assert cookie.startswith("perfedrec-8000=")
    assert ask(guard, cookie=cookie, **bare).status == 200
    assert ask(guard, cookie=f"a=b; {cookie}; c=d", **bare).status == 200
    assert ask(guard, f"/?token={once}", cookie=cookie, **bare).status == 303
    again = ask(guard, f"/?token={once}", **bare)
    assert (again.status, "used already" in again.detail) == (401, True)
    for wrong in (f"{cookie}x", cookie.replace("8000", "8001"), f"perfedrec-8000={once}", "perfedrec-8000=", "=;;"):
        assert ask(guard, cookie=wrong, **bare).status == 401


def test_the_token_of_programs_opens_no_session(guard: Guard) -> None:
    assert ask(guard, f"/?token={TOKEN}", authorization=None).status == 401


def test_the_answer_to_a_one_time_token_leads_to_this_server(guard: Guard) -> None:
    assert guard.access is not None
    for path in ("//example.org/", "///example.org"):
        entered = ask(guard, f"{path}?token={guard.access.one_time()}", authorization=None)
        assert entered.headers["location"].rstrip("/") == "/example.org"


def test_a_one_time_token_that_is_followed_from_another_site_gets_a_page_that_leads_on(guard: Guard) -> None:
    """A browser keeps a strict cookie back in a redirect that another site has begun."""
    assert guard.access is not None
    elsewhere = [("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")]
    once = guard.access.one_time()
    entered = ask(guard, f"/a?q=%22%3E&token={once}", authorization=None, headers=elsewhere)
    assert entered.status == 200
    assert 'http-equiv=refresh content="0; url=/a?q=%22%3E"' in entered.body.decode()
    cookie = entered.headers["set-cookie"].split(";")[0]
    assert ask(guard, authorization=None, cookie=cookie).status == 200


def test_a_body_within_the_limit_arrives_as_a_whole(guard: Guard) -> None:
    parts = [b"a" * 40, b"", b"b" * 60]
    for header in (("content-length", "100"), ("transfer-encoding", "chunked")):
        answer = ask(guard, method="POST", body=parts, headers=[header])
        assert (answer.status, answer.body) == (200, b"a" * 40 + b"b" * 60)
    assert ask(guard, method="POST").body == b""


def test_a_body_over_the_limit_is_refused_with_and_without_its_length(guard: Guard) -> None:
    long = [b"a" * 60, b"b" * 41]
    announced = refused(guard, 413, method="POST", headers=[("content-length", "101")])  # before any of it is read
    assert "at most 100 bytes" in announced.detail
    refused(guard, 413, method="POST", body=long, headers=[("transfer-encoding", "chunked")])
    refused(guard, 413, method="POST", body=long, headers=[("content-length", "5")])
    refused(guard, 400, method="POST", body=long, headers=[("content-length", "-1")])


def test_websockets_are_refused(guard: Guard) -> None:
    sent = list[Message]()

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError

    asyncio.run(guard({"type": "websocket"}, receive, send))
    assert [each["type"] for each in sent] == ["websocket.close"]


def test_a_token_file_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "token"
    made = token_file(path)
    assert (len(made), path.stat().st_mode & 0o777) == (43, 0o600)
    assert token_file(path) == made
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="mode 640"):
        token_file(path)
    path.chmod(0o600)
    for content in ("", "short\n", "x" * 15 + " " + "y" * 15, "two\nlines of some length"):
        path.write_text(content)
        with pytest.raises(ConfigError, match="holds no token"):
            token_file(path)
