"""The operator's page as HTTP: who gets it, what it says of each run, and how another process asks it."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp
from tests.federation.test_status import coordinated
from tests.federation.written import FINISHED, line, rejection, stood_out, write_run
from typer.testing import CliRunner

from perfedrec.cli import app
from perfedrec.core.errors import ConfigError
from perfedrec.federation import status
from perfedrec.web import beside
from perfedrec.web.asking import ask
from perfedrec.web.charts import Series, bars, lines, nice, short
from perfedrec.web.guard import Access
from perfedrec.web.operator import operator_page
from perfedrec.web.running import listening, serving

TOKEN = "the-operators-token-of-these-tests"
HTML = {"Accept": "text/html"}
SCRIPT = "<script>window.stolen = true</script>"


class Client:
    """Asks an app as a program or a browser does, and keeps cookies; with a token, or without."""

    def __init__(self, app: ASGIApp, address: str = "http://127.0.0.1:9500", token: str | None = TOKEN) -> None:
        own = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=address, headers=own)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return asyncio.run(self._client.get(path, **more))

    def post(self, path: str, **more: Any) -> httpx.Response:
        return asyncio.run(self._client.post(path, **more))


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    """A folder with a run in progress, in which a node has sent something bad, and an earlier run."""
    rounds = [line(n, clients=40 if n < 3 else 24) for n in range(5)]
    bad, large = [rejection("n1", 4, "shape", SCRIPT)], [stood_out("n1", 3, text=f"large {SCRIPT}")]
    apart = {"n0": {"state": "held", "why": f"it claims 130 users {SCRIPT}"}}
    folder = write_run(
        tmp_path / "run", history=rounds, rejections=bad, away=["n2"], unusual=large, apart=apart, keys="/keys of <us>"
    )
    write_run(tmp_path / "run & before", "finished", [line(n) for n in range(22)], result=FINISHED)
    with coordinated(folder):
        yield tmp_path


@pytest.fixture
def client(runs: Path) -> Client:
    return Client(operator_page(runs / "run", Access(TOKEN)))


def text(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_the_page_has_the_figures_of_the_run(client: Client, runs: Path) -> None:
    page = client.get("/", headers=HTML)
    assert page.status_code == 200
    shown = text(page.text)
    for part in (
        "perfedrec_pp is running Round 3/20, 48 users on 3 nodes",
        "NodeAway n2 is not connected.",
        "BrokenOrHostileNode n1 sent what cannot be part of a sum: shape: &lt;script&gt;",
        "recall@20 0.1400 best 0.1400 in round 3",
        "NodeHeld n0 waits for your decision: it claims 130 users",
        "n0 it claims 130 users &lt;script&gt;window.stolen = true&lt;/script&gt; held 16",
        "What stood out Round Node What round 2 n1 large &lt;script&gt;",
        "perfedrec federation nodes /keys of &lt;us&gt;",
        "round 3 24 of 40 1.50 5.0 kB 50.0 kB 0.1400",
        "run &amp; before perfedrec_pp, round 20/20",
    ):
        assert part in shown, shown
    assert SCRIPT not in page.text
    assert client.get("/status").json() == json.loads(json.dumps(status.look(runs / "run")))


def test_an_earlier_run_has_a_page_of_its_own(client: Client, runs: Path) -> None:
    place = re.search(r'href="(/runs/[^"]+)"', client.get("/", headers=HTML).text)
    assert place is not None
    shown = text(client.get(place[1], headers=HTML).text)
    assert "perfedrec_pp has finished Round 20/20" in shown
    assert "without the model" in shown
    assert client.get(f"{place[1]}/status").json()["folder"] == str(runs / "run & before")
    for wrong in ("/runs/nothing", "/runs/%2e%2e", "/runs/..%2f..%2fetc", "/elsewhere", "/assets/%2e%2e/operator.py"):
        assert client.get(wrong).status_code == 404, wrong
        assert "detail" in client.get(wrong).json()


def test_the_page_is_sent_again_only_if_it_has_changed(client: Client, runs: Path) -> None:
    first = client.get("/", headers=HTML)
    again = {"If-None-Match": first.headers["etag"]}
    assert client.get("/", headers=HTML | again).status_code == 304
    with open(runs / "run" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line(5)) + "\n")
    changed = client.get("/", headers=HTML | again)
    assert changed.status_code == 200
    assert "Round 4/20" in changed.text


def test_a_folder_without_a_run_is_said_and_looked_at_again(tmp_path: Path) -> None:
    client = Client(operator_page(tmp_path / "run", Access(TOKEN)), "http://localhost:1")
    assert client.get("/status").status_code == 503
    assert "no such folder" in client.get("/status").json()["detail"]
    page = client.get("/", headers=HTML)
    assert page.status_code == 503
    assert 'http-equiv="refresh"' in page.text


def test_only_the_operator_gets_in(runs: Path) -> None:
    stranger = Client(operator_page(runs / "run", Access(TOKEN)), token=None)
    for path in ("/", "/status", "/runs/run", "/runs/run/status", "/assets/operator.js", "/nothing"):
        assert stranger.get(path).status_code == 401, path
        asked = stranger.get(path, headers=HTML)
        assert (asked.status_code, asked.headers["location"], asked.text) == (303, "/enter", "")
    assert stranger.get("/enter", headers={"Host": "fed.example.org"}).status_code == 421
    form = stranger.get("/enter")
    assert form.status_code == 200
    assert form.headers["content-security-policy"].startswith("default-src 'self'")
    for wrong in ("", TOKEN[:-1], "ü"):
        refused = stranger.post("/enter", data={"token": wrong})
        assert (refused.status_code, "set-cookie" in refused.headers) == (401, False)
        assert "That is not the token" in refused.text
    foreign = stranger.post("/enter", data={"token": TOKEN}, headers={"Origin": "http://evil.example"})
    assert (foreign.status_code, "set-cookie" in foreign.headers) == (403, False)
    entered = stranger.post("/enter", data={"token": TOKEN})
    assert (entered.status_code, entered.headers["location"]) == (303, "/")
    assert "HttpOnly; SameSite=Strict" in entered.headers["set-cookie"]
    assert TOKEN not in entered.headers["set-cookie"]
    assert stranger.get("/").status_code == 200  # with the cookie


def test_the_terminal_asks_the_page_with_the_token(runs: Path, tmp_path: Path) -> None:
    token, runner = tmp_path / "operator.token", CliRunner()
    token.write_text(TOKEN + "\n")
    with listening() as listener, serving(operator_page(runs / "run", Access(TOKEN)), listener):
        words = ["federation", "watch", "--coordinator", listener.address, "--token", str(token), "--once"]
        told = runner.invoke(app, [*words, "--json"])
        assert json.loads(told.stdout) == json.loads(json.dumps(status.look(runs / "run")))
        assert "n2 is not connected" in runner.invoke(app, words).output
        token.write_text("another token of the same kind")
        refused = runner.invoke(app, words)
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
        assert "refuses to answer: the token is missing or wrong" in refused.stderr
    gone = runner.invoke(app, words)
    assert (gone.exit_code, gone.stderr.count("\n")) == (3, 1)
    assert "does not answer" in gone.stderr
    for address, message in (("https://127.0.0.1:1", "expected an address such as"), ("http://:1", "expected an addr")):
        with pytest.raises(ConfigError, match=message):
            ask(address, token, "/status")
    with pytest.raises(
        ConfigError, match="there is no such file or folder; expected the file with the operator's token"
    ):
        ask("http://127.0.0.1:1", tmp_path / "nothing", "/status")


def test_the_page_runs_beside_the_coordinator_in_a_process_of_its_own(runs: Path) -> None:
    """The token is made at the first start, for its owner alone. The process ends with the block."""
    token = runs / "operator.token"
    with beside.reserved(0) as listener, beside.page_beside(listener, runs / "run"):
        assert listener is not None
        assert token.stat().st_mode & 0o777 == 0o600
        assert ask(listener.address, token, "/status")["run"] == "name of run"
    with pytest.raises(Exception, match="does not answer"):
        ask(listener.address, token, "/status")
    with beside.reserved(None) as nothing, beside.page_beside(nothing, runs / "run"):
        assert nothing is None


def test_ports_that_cannot_be_used_are_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, files = CliRunner(), ["--certificates", str(tmp_path / "c"), "--nodes", str(tmp_path / "k")]
    serve = ["serve", "--output", str(tmp_path / "run"), "--catalogue", str(tmp_path / "items.txt"), *files]
    with listening() as taken:
        port = taken.address.rpartition(":")[2]
        for command in (serve, ["federation", "up", "--output", str(tmp_path / "up")]):
            for more, message in (
                (["--page-port", port], f"error: --page-port {port}: cannot be listened on (Address already in use)"),
                (["--page-port", "70000"], "error: --page-port 70000: expected a port"),
                (["--page-port", "9400", "--metrics-port", "9400"], "--metrics-port and --page-port are both 9400"),
            ):
                refused = runner.invoke(app, [*command, *more])
                assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1), refused.output
                assert message in refused.stderr
    monkeypatch.setitem(sys.modules, "jinja2", None)
    refused = runner.invoke(app, [*serve, "--page-port", "0"])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "--page-port needs the extra web" in refused.stderr
    assert [each.name for each in tmp_path.iterdir()] == []


def test_charts_are_drawn_to_scale() -> None:
    """The axis ends at a nice number; the middle of it is in the middle; a gap is a gap."""
    drawn = str(lines([Series("recall@20", [0.0, None, 1.0])], ["phase 1", "round 1", "round 2"], mark=2))
    assert re.findall(r'points="([^"]*)"', drawn) == ["44.0,146.0 294.0,10.0"]
    assert 'aria-label="recall@20: 1 in round 2"' in drawn
    assert re.findall(r'class="mark" cx="([\d.]+)" cy="([\d.]+)"', drawn) == [("294.0", "10.0")]
    stacked = str(bars([Series("a", [30.0]), Series("b", [10.0], 2)], ["round <1>"], " s"))
    heights = re.findall(r'class="bar c(\d)" x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', stacked)
    assert heights == [("1", "64.4", "81.6"), ("2", "37.2", "27.2")]  # of 136 for 50
    assert "round <1>" not in stacked
    many = str(bars([Series("a", [1.0] * 61)], [f"round {n}" for n in range(61)]))
    assert many.count("<rect") == 60
    assert ">round 0<" not in many
    assert [nice(value) for value in (0, 0.3, 1, 1.1, 2.4, 30, 7000)] == [1, 0.5, 1, 2, 2.5, 50, 10000]
    assert [short(value) for value in (0, 0.25, 900, 1500, 2.5e6)] == ["0", "0.25", "900", "1.5k", "2.5M"]
