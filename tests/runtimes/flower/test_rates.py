"""What one key may do in a minute, and what the SuperLink does with more."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from tests.runtimes.flower.test_superlink import HEARTBEAT, PUBLIC, Line, in_a_loop

from perfedrec.core.address import Address
from perfedrec.runtimes.flower import Certificates, SuperLink, superlink
from perfedrec.runtimes.flower.connection import AwayError, Endpoint, call
from perfedrec.runtimes.flower.rates import REFUSED, Meter, Rates, Refused


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def meter(folder: Path, joins: int = 2, requests: int = 6, megabytes: int = 60) -> tuple[Meter, Clock]:
    clock = Clock()
    return Meter(Rates(joins, requests, megabytes), folder / REFUSED, clock), clock


def test_a_minutes_worth_may_be_used_at_once_and_comes_back_at_an_even_pace(tmp_path: Path) -> None:
    given, clock = meter(tmp_path)
    assert [given.take(1, 0, joins=False) for _ in range(7)] == [None] * 6 + ["more than 6 requests a minute"]
    assert given.take(2, 0, joins=False) is None  # another key
    clock.now = 9.9
    assert given.take(1, 0, joins=False) is not None
    clock.now = 10.0
    assert given.take(1, 0, joins=False) is None
    assert given.take(1, 0, joins=False) is not None
    clock.now = 1000.0
    assert [given.take(1, 0, joins=False) is None for _ in range(7)] == [True] * 6 + [False]  # no more is saved up


def test_joins_and_bytes_have_limits_of_their_own(tmp_path: Path) -> None:
    given, clock = meter(tmp_path)
    assert [given.take(1, 0, joins=True) for _ in range(3)] == [None, None, "more than 2 joins a minute"]
    assert given.take(1, 60_000_000, joins=False) is None  # the refused request has used nothing
    assert given.take(1, 1, joins=False) == "more than 60 megabytes a minute"
    clock.now = 1.0
    assert given.take(1, 1_000_000, joins=False) is None
    small, _ = meter(tmp_path, megabytes=1)
    assert (
        small.take(1, 5_000_000, joins=False) is None
    )  # a request that is larger than the limit is not refused for ever
    assert small.take(1, 1, joins=False) is not None


def test_refusals_are_written_down_once_a_minute_and_read_once(tmp_path: Path) -> None:
    (tmp_path / REFUSED).write_text('{"node": 7, "why": "of an earlier process"}\n')
    reader = Refused(tmp_path)
    assert reader.news() == []
    given, clock = meter(tmp_path, joins=1)
    for _ in range(50):
        given.take(3, 0, joins=True)
    assert reader.news() == [(3, "more than 1 joins a minute")]
    assert reader.news() == []
    clock.now = 60.0
    given.take(3, 0, joins=True)
    given.take(3, 0, joins=True)
    with open(tmp_path / REFUSED, "a", encoding="utf-8") as file:
        file.write('{"node": 4, "wh')  # it is being written
    assert reader.news() == [(3, "more than 1 joins a minute")]
    assert len((tmp_path / REFUSED).read_text().splitlines()) == 4
    assert Refused(tmp_path / "nowhere").news() == []


def test_the_superlink_refuses_what_a_key_does_too_often_and_counts_signed_requests_only(tmp_path: Path) -> None:
    line, stranger = Line(tmp_path), ec.generate_private_key(ec.SECP384R1())
    line.app.meter, _ = meter(tmp_path, joins=1, requests=3)

    async def play() -> None:
        own = PullMessagesRequest(node=Node(node_id=line.node))
        for _ in range(9):  # somebody else in the name of the node: it may still do all that it may
            assert (await line.call("/v1/fleet/pull-messages", own, key=stranger)).status_code == 418
        join = ActivateNodeRequest(public_key=PUBLIC, heartbeat_interval=HEARTBEAT)
        assert (await line.call("/v1/fleet/activate-node", join)).status_code == 418  # Flower's app answers it
        refused = await line.call("/v1/fleet/activate-node", join)
        assert (refused.status_code, refused.text) == (429, "more than 1 joins a minute")
        assert refused.headers["retry-after"] == "5"
        assert [(await line.call("/v1/fleet/pull-messages", own)).status_code for _ in range(3)] == [200, 200, 429]
        unknown = ActivateNodeRequest(
            public_key=public_key_to_bytes(stranger.public_key()), heartbeat_interval=HEARTBEAT
        )
        for _ in range(9):  # keys that are not registered are left to Flower, and fill nothing here
            assert (await line.call("/v1/fleet/activate-node", unknown, key=stranger)).status_code == 418

    in_a_loop(play())
    assert {json.loads(each)["node"] for each in (tmp_path / REFUSED).read_text().splitlines()} == {line.node}
    assert len(line.app.meter._left) == 3


def test_a_request_that_is_too_large_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, events = Line(tmp_path), list[Any]()
    monkeypatch.setattr("perfedrec.runtimes.flower.superlink.MOST_BYTES", 10)
    left = [b"x" * 8] * 5

    async def play() -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": left.pop(), "more_body": bool(left)}

        async def send(event: Any) -> None:
            events.append(event)

        scope = {"type": "http", "method": "POST", "path": "/v1/fleet/push-object", "headers": []}
        await line.app(scope, receive, send)

    in_a_loop(play())
    assert events[0]["status"] == 413
    assert len(left) == 3


def test_a_node_that_is_refused_for_a_while_tries_again() -> None:
    endpoint, request = Endpoint(Address("fed.example.org", 1), Path("ca.crt")), httpx.Request("POST", "https://x")

    def refuse(_: Any) -> Any:
        raise httpx.HTTPStatusError(
            "", request=request, response=httpx.Response(429, text="more than 30 joins a minute", request=request)
        )

    with pytest.raises(
        AwayError,
        match=r"^fed\.example\.org:1: the coordinator's limit for this key is reached: more than 30 joins a m",
    ):
        call(refuse, None, endpoint)


def test_rates_reach_the_process_of_the_superlink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its environment has them, and what it reads there refuses the second join."""
    monkeypatch.setattr(SuperLink, "_start", lambda link: subprocess.Popen(["true"]))
    files = Certificates(*(tmp_path / name for name in ("ca.crt", "server.pem", "server.key")))
    link = SuperLink(tmp_path / "link", "127.0.0.1", 1, files, Rates(1, 2, 3))
    link.stop()
    monkeypatch.setenv("PERFEDREC_RATES", link._environment["PERFEDREC_RATES"])
    made = superlink.meter_beside(tmp_path / "link" / "superlink.json")
    assert made is not None
    assert [made.take(7, 0, joins=True) is None for _ in range(2)] == [True, False]
    assert link.refused.news() == [(7, "more than 1 joins a minute")]
    monkeypatch.delenv("PERFEDREC_RATES")
    assert superlink.meter_beside(tmp_path / "link" / "superlink.json") is None
