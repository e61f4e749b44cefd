"""Faults of real processes: nothing that was acknowledged is lost, the rounds continue, and the model is that of a run
without the fault where the protocol allows it."""

from __future__ import annotations

import json
import re
import signal
import socket
import sqlite3
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import expect
from tests.federation.test_metrics import as_samples, page, samples
from tests.ports import reserved_port
from tests.runtimes.flower import crew
from tests.runtimes.flower.test_processes import NAME, SECRET, SMALL, as_simulated, draws
from torch import Tensor
from typer.testing import CliRunner

from perfedrec import Node
from perfedrec.cli import app
from perfedrec.core.address import Address
from perfedrec.core.records import flatten
from perfedrec.data.dataset import Dataset
from perfedrec.federation import local
from perfedrec.federation.bundles import BUNDLE, read_bundle
from perfedrec.federation.certificates import end_of, make_certificates
from perfedrec.federation.status import look
from perfedrec.runs import checkpoint, config
from perfedrec.runs.config import DataSettings, open_data
from perfedrec.runs.engine import engine
from perfedrec.runs.folder import RunFolder
from perfedrec.runtimes.flower import Certificates, Control, Endpoint, SuperLink, connection, needs_service, public_key
from perfedrec.runtimes.node import Store
from perfedrec.web import running
from perfedrec.web.guard import Access, Guard
from perfedrec.web.node_pages import NodePages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ELSEWHERE = ("service.", "tokens", "neighbours", "low_rank.")  # what the coordinator does not have
NODES, USERS, ROUNDS = 4, 12, 3
PATH = f"synthetic:users={USERS},items=40,interactions_per_user=8,clusters=2"


@dataclass
class Federation:
    """A folder, and processes by name."""

    folder: Path
    config: Any
    dataset: Dataset
    port: int
    name: str = NAME
    processes: dict[str, Any] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    """The ports of the processes that show metrics."""

    def node(
        self,
        name: str,
        faults: Mapping[int, str] | None = None,
        key: str | None = None,
        ca: Path | None = None,
        version: str | None = None,
        skew: float = 0.0,
    ) -> None:
        log, store = self.folder / "nodes" / name / "log.txt", self.folder / "nodes" / name / "store.db"
        arguments = ["node", "run", "--store", str(store), "--coordinator", f"127.0.0.1:{self.port}"]
        arguments += ["--ca", str(ca or self.folder / "certificates" / "ca.crt")]
        arguments += ["--key", str(self.folder / "keys" / (key or name)), "--require", "none", *self.shown(name)]
        self.processes[name] = crew.start(crew.node, arguments, log, faults or {}, version, skew)

    def nodes(self, number: int = NODES) -> None:
        for each in range(number):
            self.node(f"n{each}")

    def service(self, faults: Mapping[int, str] | None = None) -> None:
        arguments = ["service", "run", "--state", str(self.folder / "service")]
        arguments += ["--coordinator", f"127.0.0.1:{self.port}", "--key", str(self.folder / "keys" / "service")]
        arguments += ["--ca", str(self.folder / "certificates" / "ca.crt"), *self.shown("service")]
        log = self.folder / "service" / "log.txt"
        self.processes["service"] = crew.start(crew.node, arguments, log, faults or {}, None, 0.0)

    def coordinator(self, resume: bool = False, faults: Mapping[int, str] | None = None, **terms: Any) -> None:
        if "service" not in self.processes and needs_service(self.config.build()):
            self.service()
        while not vacant(self.port):  # the SuperLink of a coordinator that was killed needs time to end
            time.sleep(0.1)
        arguments, log = self.serve(resume, **terms) + self.shown("coordinator"), self.folder / "serve.txt"
        self.processes["coordinator"] = crew.start(crew.coordinator, arguments, self.name, log, faults or {})

    def serve(self, resume: bool = False, **terms: Any) -> list[str]:
        arguments = ["serve", "--output", str(self.run), "--catalogue", str(self.folder / "items.txt"), "--quiet"]
        arguments += ["--certificates", str(self.folder / "certificates"), "--nodes", str(self.folder / "keys")]
        arguments += ["--resume"] if resume else ["--config", str(self.folder / "run.toml")]
        waits = {"port": self.port, "min-nodes": NODES, "rounds": ROUNDS, "wait": crew.LONG, "deadline": crew.LONG}
        waits |= terms
        return arguments + [word for name, value in waits.items() for word in (f"--{name}", str(value))]

    def shown(self, name: str) -> list[str]:
        return ["--metrics-port", str(self.ports[name])] if name in self.ports else []

    def shows(self, name: str, wanted: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """The metrics of a process, once they are as ``wanted``."""
        while True:
            assert self.processes[name].is_alive(), self.output()
            with suppress(OSError, HTTPException):
                found = samples(page(self.ports[name]))
                if wanted(found):
                    return found
            time.sleep(0.1)

    def go(self, number: int) -> None:
        """Let a coordinator continue that is held before a round, or (-1) before it hands out the model."""
        (self.folder / f"go-{number}").touch()

    def ends(self, name: str) -> int:
        """The exit code of a process that ends by itself."""
        self.processes[name].join(crew.LONG)
        assert self.processes[name].exitcode is not None, self.output()
        return int(self.processes[name].exitcode)

    def says(self, file: str, pattern: str) -> None:
        """Wait until a line of a file matches the pattern."""
        end, path = time.monotonic() + crew.LONG, self.folder / file
        while not (path.exists() and re.search(pattern, path.read_text())):
            assert time.monotonic() < end, self.output()
            time.sleep(0.1)

    def store(self, number: int) -> Path:
        return self.folder / "nodes" / f"n{number}" / "store.db"

    def log(self, name: str) -> str:
        return (self.folder / "nodes" / name / "log.txt").read_text()

    def lines(self, name: str) -> int:
        return self.log(name).count("\n")

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def rejections(self) -> list[dict[str, Any]]:
        path = self.run / "rejections.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def tables(self) -> dict[str, Tensor]:
        newest = checkpoint.load(checkpoint.folders(self.run / "checkpoints")[0])
        found: dict[str, Tensor] = newest.records["state"][0]
        return {name: each for name, each in found.items() if not name.startswith(ELSEWHERE)}

    def output(self) -> str:
        return "\n".join(f"{path}\n{path.read_text()}" for path in sorted(self.folder.rglob("*.txt")))

    @property
    def clients(self) -> list[int]:
        return [each.report.clients for each in RunFolder(self.run).history()]

    def kept(self) -> None:
        """The nodes' files contain everything that the nodes acknowledged."""
        train = self.dataset.train
        for number, users in enumerate(local.parted(train, len(list((self.folder / "nodes").iterdir())))):
            with Store.open(self.store(number)) as store:
                rows, _ = store.rows(torch.from_numpy(users))
                first, last = train.offsets[users[0]], train.offsets[users[-1] + 1]
                assert rows.items.tolist() == train.items[first:last].tolist()


def vacant(port: int) -> bool:
    with socket.socket() as probe, suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True
    return False


@contextmanager
def laid_out(folder: Path, nodes: int, *options: str, privacy: str | None = None) -> Iterator[Federation]:
    """A federation with a number of ``nodes``, whose processes end with it."""
    given = config.load(
        "recommended",
        None,
        # Faults name rounds by number.
        [f"data.path={PATH}", *SMALL, "pretraining.cluster_passes=0", "pretraining.at=clients", *options],
        privacy=privacy,
        run__rounds=ROUNDS,
    )
    dataset = open_data(given.data)
    local.lay_out(folder, dataset, nodes, secret=SECRET)
    seed = draws(folder, given.build())
    given = given.model_copy(update={"run": given.run.model_copy(update={"seed": seed})})
    (folder / "run.toml").write_text(given.to_toml())
    made = Federation(folder, given, dataset, reserved_port())
    try:
        yield made
    finally:
        for process in made.processes.values():
            process.terminate()
        for process in made.processes.values():
            crew.end(process)


@pytest.fixture
def fed(tmp_path: Path) -> Iterator[Federation]:
    with laid_out(tmp_path / "federation", NODES) as made:
        yield made


@contextmanager
def serving(folder: Path, port: int, files: Path, wait: bool = True) -> Iterator[Control]:
    """A SuperLink without a coordinator."""
    given = Certificates(files / "ca.crt", files / "server.pem", files / "server.key")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "TIMEOUT", crew.LONG)
        link, control = (
            SuperLink(folder, "127.0.0.1", port, given),
            Control(Endpoint(Address("127.0.0.1", port), given.ca)),
        )
    try:
        if wait:
            control.wait(crew.LONG)
        yield control
    finally:
        control.close()
        link.stop()


def age(path: Path) -> None:
    """Give a node's file the first version of its schema."""
    with closing(sqlite3.connect(path, isolation_level=None)) as file:
        tables = ("served", "served_users", "opened", "held_out", "kept_states", "details", "pictures", "dismissed")
        for table in (*tables, "journal_users", "journal", "protections", "rules"):
            file.execute(f"DROP TABLE {table}")
        file.execute("ALTER TABLE runs DROP COLUMN gone")
        file.execute("ALTER TABLE interactions DROP COLUMN part")
        file.execute("ALTER TABLE node DROP COLUMN scrubbing")
        file.execute("ALTER TABLE node DROP COLUMN encoding")
        file.execute("ALTER TABLE runs DROP COLUMN configuration")
        file.execute("PRAGMA user_version = 1")


def undisturbed(fed: Federation, rounds: int = ROUNDS) -> dict[str, Tensor]:
    """The tables of the simulator, which real processes compute bit for bit."""
    simulated: Any = engine(fed.config.build(), fed.dataset, seed=fed.config.run.seed, device="cpu")
    tokens = read_bundle(fed.folder / "nodes" / "n0" / BUNDLE).tokens(fed.dataset.train.n_items)
    simulated.state = replace(simulated.state, tokens=tokens)
    for _ in range(simulated.n_phases + rounds):
        simulated.play()
    return {name: each for name, each in flatten(simulated.state)[0].items() if not name.startswith(ELSEWHERE)}


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_coordinator_killed_before_its_checkpoint_and_superlink_with_messages_under_way(fed: Federation) -> None:
    """The coordinator repeats its round, for which nodes send the answer that they have stored, and starts the
    SuperLink again with what it had. The file of one node has an old schema, and the clock of another is late by 100
    seconds."""
    age(fed.store(0))
    fed.nodes(NODES - 1)
    fed.node(f"n{NODES - 1}", skew=-100.0)
    fed.coordinator(faults={2: "killed"})
    assert fed.ends("coordinator") == -9, fed.output()
    assert len(fed.clients) == 2
    fed.ports["coordinator"] = reserved_port()
    fed.coordinator(resume=True, faults={3: "SuperLink killed", -1: "held"})
    fed.shows("coordinator", lambda shown: shown.get("perfedrec_coordinator_superlink_restarts_total") == 1)
    fed.go(-1)
    assert fed.ends("coordinator") == 0, fed.output()
    as_simulated(fed.config, fed.dataset, fed.folder, fed.run)
    assert fed.rejections == []
    fed.kept()


def test_service_killed(fed: Federation) -> None:
    """Where the service is not started again, the coordinator ends in time, and continues once the service is there.
    Where it is started again, the round only takes longer, even if the service had played it and not answered."""
    fed.nodes()
    fed.service({1: "killed before", 3: "killed after"})
    fed.coordinator(faults={1: "not waiting"})
    assert fed.ends("service") == -9, fed.output()
    assert fed.ends("coordinator") == 3, fed.output()
    assert len(fed.clients) == 1
    assert "the neighbourhood service, node" in (fed.folder / "serve.txt").read_text().splitlines()[-1]
    fed.service({3: "killed after"})
    fed.coordinator(resume=True)
    assert fed.ends("service") == -9, fed.output()
    fed.service()
    assert fed.ends("coordinator") == 0, fed.output()
    as_simulated(fed.config, fed.dataset, fed.folder, fed.run)
    assert fed.rejections == []
    fed.kept()


def test_nodes_killed_before_during_and_after_their_work(fed: Federation) -> None:
    """They are started again at once, and asked again once the SuperLink accepts them."""
    moments = ["killed before", "killed during", "killed after", "killed once sent"]
    for number, moment in enumerate(moments):
        fed.node(f"n{number}", {2: moment})
    fed.coordinator()
    for number in range(len(moments)):
        assert fed.ends(f"n{number}") == -9, fed.output()
        fed.node(f"n{number}")
    assert fed.ends("coordinator") == 0, fed.output()
    assert fed.rejections == []
    assert same(fed.tables, undisturbed(fed)), fed.output()
    fed.kept()


def test_a_slow_node_and_one_that_leaves(fed: Federation) -> None:
    """The round ends at the deadline without the slow node. Later rounds do without the other one until it is back."""
    fed.node("n0", {2: "slow"})
    fed.node("n1", {2: "leaves"})
    fed.node("n2")
    fed.node("n3")
    fed.coordinator(faults={2: "not waiting", 3: "held"})
    assert fed.ends("n1") == 0
    fed.go(3)
    assert fed.ends("coordinator") == 0, fed.output()
    share, clients = USERS // NODES, fed.clients
    without = {(each["node"], each["round"]): each["reason"] for each in fed.rejections}
    assert without == {("n0", 2): "late", ("n1", 3): "away", ("n1", 4): "away"}, fed.output()
    assert clients == [USERS, USERS, USERS - share, USERS - share, USERS - share], fed.output()
    fed.node("n1")
    fed.coordinator(resume=True, rounds=ROUNDS + 1)
    assert fed.ends("coordinator") == 0, fed.output()
    assert fed.clients == [*clients, USERS], fed.output()
    fed.kept()


def test_answers_that_cannot_be_part_of_a_sum(fed: Federation) -> None:
    """Each is refused with its reason, and the round continues with the others, as it does where a disk is full.
    Metrics show what the files contain."""
    fed.ports = {name: reserved_port() for name in ("coordinator", "service", "n1", "n2", "n3")}
    fed.node("n3", version="0.0.1")
    fed.coordinator(faults={-1: "held"}, **{"min-nodes": NODES - 1})
    wrong = {0: "not finite", 2: "size", 3: "keys", 4: "shape"}
    fed.says("serve.txt", "is refused: this node runs version 0.0.1")
    fed.node("n0")
    fed.node("n1", wrong)
    fed.node("n2", {1: "full disk", 3: "malformed", 4: "users"})
    start = "perfedrec_coordinator_rounds_"
    last = fed.shows("coordinator", lambda shown: 0 < shown.get(f"{start}planned", 0) == shown[f"{start}done"])
    fed.go(-1)
    assert fed.ends("coordinator") == 0, fed.output()
    found = {(each["node"], each["round"]): (each["reason"], each["detail"]) for each in fed.rejections}
    assert found.pop(("n3", -1))[0] == "version", fed.output()
    assert "the disk is full" in found[("n2", 1)][1]
    expected = {("n1", number): reason for number, reason in wrong.items()}
    expected |= {("n2", 1): "failed", ("n2", 3): "malformed", ("n2", 4): "users"}
    assert {where: reason for where, (reason, _) in found.items()} == expected
    share, clients = USERS // NODES, fed.clients
    assert clients == [2 * share, 2 * share, 2 * share, share, share]
    assert all(bool(each.isfinite().all()) for each in fed.tables.values())
    with Store.open(fed.store(2)) as store:
        assert store.status()["last_round"] == 4
        received = store.served().received
    fed.kept()
    as_written(fed, last)
    for name, worked, refused in (("service", 5, None), ("n1", 5, None), ("n2", 4, "failed"), ("n3", 0, "version")):
        found, start = samples(page(fed.ports[name])), f"perfedrec_{name if name == 'service' else 'node'}_"
        assert found[f"{start}rounds_total"] == worked, found
        refusals = {each: value for each, value in found.items() if value and each.startswith(f"{start}refusals")}
        assert refusals == ({} if refused is None else {f'{start}refusals_total{{reason="{refused}"}}': 1})
        assert found.get(f"{start}last_round") == (4 if worked else None)
        assert found[f"{start}computing_seconds_total"] > 0
    answered = "perfedrec_node_last_answer_timestamp_seconds"  # set after the answer has been sent
    found = fed.shows("n2", lambda shown: received <= shown[answered])
    assert found[answered] <= time.time()
    assert found["perfedrec_node_users"] == share
    assert found["perfedrec_node_model_timestamp_seconds"] == received


def as_written(fed: Federation, shown: Mapping[str, float]) -> None:
    """The metrics that a coordinator shows after the last round are what it has written to its files."""
    start = "perfedrec_coordinator_"
    found = {name.removeprefix(start): value for name, value in shown.items() if name.startswith(start)}
    history = RunFolder(fed.run).history()
    done = int(found["rounds_done"])
    assert found["rounds_planned"] == done == len(history), shown
    rounds = [each.report for each in history[:done]]
    assert found["round_seconds_count"] == done
    assert found["round_seconds_sum"] == pytest.approx(sum(each.seconds for each in history[:done]))
    assert found["asked_clients_total"] == sum(each.cohort for each in rounds)
    assert found["answered_clients_total"] == sum(each.clients for each in rounds)
    assert found["received_bytes_total"] == sum(each.bytes_up for each in rounds)
    assert found["sent_bytes_total"] == sum(each.bytes_down for each in rounds)
    whole = sum(each.clients == each.cohort for each in rounds)
    assert [found[f'rounds_total{{outcome="{each}"}}'] for each in ("complete", "partial")] == [whole, done - whole]
    written = Counter((each["node"], each["reason"]) for each in fed.rejections if each["round"] < done)
    name = 'rejections_total{{node="{}",reason="{}"}}'.format
    assert {each: value for each, value in found.items() if value and each.startswith("rejections")} == {
        name(*each): value for each, value in written.items()
    }
    assert [found[f'node_connected{{node="{each}"}}'] for each in ("n0", "n1", "n2", "n3", "service")] == [1.0] * 5
    for each in ("ca.crt", "server.pem"):
        end = end_of(fed.folder / "certificates" / each).timestamp()
        assert found[f'certificate_expiry_timestamp_seconds{{certificate="{each}"}}'] == end
    assert found["superlink_restarts_total"] == 0
    assert "epsilon" not in found
    status = look(fed.run)
    assert status["state"] == "finished"
    known = {each: value for each, value in shown.items() if each.startswith(start) and "_bucket" not in each}
    told = as_samples("coordinator", status["figures"])
    assert told == {each: known[each] for each in told}
    assert {each: value for each, value in known.items() if value} == {each: told[each] for each in told if told[each]}
    began = (fed.run / "config.toml").stat().st_mtime + sum(each.seconds for each in history[:done])
    assert began < found["last_round_timestamp_seconds"] < time.time()


def test_a_third_of_the_nodes_is_killed_in_each_stage_of_secure_aggregation(tmp_path: Path, browser: Any) -> None:
    """Of seven nodes two are killed, then one of five, of four and of three: as many as may drop out. What is opened is
    the sum of what the other nodes add, word for word. A node that is killed in the last stage is in the sum. The
    operator sees on the page of the coordinator which nodes are gone, and the owner of a node that is left sees on its
    page that more has left it, without loading it again."""
    dead = {1: ("keys", {0, 1}), 2: ("shares", {2}), 3: ("masked", {3}), 4: ("unmask", {4})}
    parts = local.parted(open_data(DataSettings(path=PATH)).train, 7)
    there = set(range(len(parts)))
    # By item, because in a basis a phase before training ends when four of seven nodes are missing.
    options = f"selection.n_clients_per_round={USERS}", "privacy.rank=0", "privacy.min_clients=2"
    with laid_out(tmp_path / "federation", len(parts), *options, privacy="secure") as fed:
        for number in range(len(parts)):
            faults = {each: f"killed in {stage}" for each, (stage, nodes) in dead.items() if number in nodes}
            fed.node(f"n{number}", faults)
        rounds = len(dead) + 1 - len(fed.config.build().phases)
        terms = {"min-nodes": len(parts), "page-port": reserved_port()}
        fed.coordinator(faults={1: "not waiting", len(dead): "held"}, rounds=rounds, **terms)
        with operators_page(fed, browser, terms["page-port"]) as (states, alerts), owners_page(fed, 5, browser) as left:
            assert states() == {"here": {"n4", "n5", "n6"}, "away": {"n0", "n1", "n2"}, "missed": {"n3"}}
            assert {f"NodeAway n{number} is not connected." for number in range(3)} <= alerts()
            expect(left).to_contain_text("with the answers to", timeout=1000 * crew.LONG)
            before = left.inner_text()
            fed.go(len(dead))
            expect(left).not_to_have_text(before, use_inner_text=True, timeout=1000 * crew.LONG)
            assert fed.ends("coordinator") == 0, fed.output()
        for each in range(len(dead) + 1):
            stage, nodes = dead.get(each, ("", set()))
            adding = there if stage == "unmask" else there - nodes
            words = [np.load(fed.folder / "nodes" / f"n{number}" / f"words-{each}.npy") for number in adding]
            assert np.any(words, 1).all()
            assert np.array_equal(np.load(fed.folder / f"sum-{each}.npy"), np.sum(words, 0)), each
            assert fed.clients[each] == sum(len(parts[number]) for number in adding), fed.output()
            assert [fed.ends(f"n{number}") for number in nodes] == [-9] * len(nodes)
            there -= nodes
        assert {each["reason"] for each in fed.rejections} <= {"late", "away", "code 5"}
        fed.kept()


@contextmanager
def operators_page(fed: Federation, browser: Any, port: int) -> Iterator[Any]:
    """The page beside a coordinator that is held before its last round, opened with the operator's token: functions
    that give the nodes by state, and the alerts. The page ends with the coordinator."""
    fed.says("run/metrics.jsonl", '"round": 3,')
    assert "token=" not in (fed.folder / "serve.txt").read_text()  # which others may read
    context = browser.new_context()
    context.set_default_timeout(0)
    tab = context.new_page()
    tab.goto(f"http://127.0.0.1:{port}/enter")
    tab.get_by_label("Token").fill((fed.folder / "operator.token").read_text().strip())
    tab.get_by_role("button").click()
    expect(tab.locator("progress")).to_have_attribute("value", "4", timeout=1000 * crew.LONG)

    def states() -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for each in tab.locator("#nodes tbody tr").all():
            name = each.locator("th").inner_text().split("\n")[0].strip()
            found.setdefault(each.locator(".state").inner_text(), set()).add(name)
        return found

    yield states, lambda: {" ".join(each.split()) for each in tab.locator(".alerts li").all_inner_texts()}
    tab.wait_for_selector("#lost", state="visible")
    context.close()


@contextmanager
def owners_page(fed: Federation, number: int, browser: Any) -> Iterator[Any]:
    """What has left a node in all, on a page over its file, while the node works for the coordinator."""
    access = Access()
    with Node.open(fed.store(number)) as node, running.listening(0) as listener:
        guard = Guard(NodePages(node).app(), access)
        with running.serving(guard, listener):
            context = browser.new_context(locale="en-GB")
            tab = context.new_page()
            tab.goto(f"{listener.address}/?token={access.one_time()}")
            tab.goto(f"{listener.address}/left?user={node.users()[0]}")
            yield tab.locator(".sums")
            context.close()


def test_a_certificate_is_renewed_and_a_key_replaced_during_a_run(tmp_path: Path) -> None:
    """Nodes do not notice the new certificate. A node with a new key loses nothing, not even the pre-trained vector of
    a user who has not taken part yet; the old key is refused."""
    options, rounds = ["pretraining.kind=contrastive", "pretraining.steps=3", "personal.pretrained=0"], 8
    options.append("selection.n_clients_per_round=3")
    with laid_out(tmp_path / "federation", NODES, *options) as fed:
        phases, files = len(fed.config.build().phases), fed.folder / "certificates"
        fed.nodes()
        fed.coordinator(rounds=rounds, faults={phases: "stopped"})
        assert fed.ends("coordinator") == 128 + signal.SIGTERM, fed.output()
        fed.processes["old"], key = fed.processes["n0"], fed.folder / "keys" / "n0.pub"
        assert CliRunner().invoke(app, ["federation", "key", str(tmp_path / "new")]).exit_code == 0
        (tmp_path / "new").rename(key.with_name("new"))
        (tmp_path / "new.pub").replace(key)
        fed.node("n0", key="new")
        fed.coordinator(resume=True, rounds=rounds, faults={phases + 1: "held", phases + 3: "stopped"})
        fed.says("nodes/n0/log.txt", "the coordinator no longer knows this node")
        fed.says("nodes/n0/log.txt", "is not registered")
        crew.end(fed.processes.pop("old"))

        fed.go(phases + 1)
        assert fed.ends("coordinator") == 128 + signal.SIGTERM, fed.output()
        ca, server = (files / "ca.crt").read_bytes(), (files / "server.pem").read_text()
        assert CliRunner().invoke(app, ["federation", "certificates", str(files)]).exit_code == 0
        fed.coordinator(resume=True, rounds=rounds, faults={phases + 6: "held"})
        fed.says("run/metrics.jsonl", f'"round": {phases + 5},')
        presented = ssl.get_server_certificate(("127.0.0.1", fed.port))
        assert presented == (files / "server.pem").read_text() != server
        fed.go(phases + 6)
        assert (files / "ca.crt").read_bytes() == ca
        assert fed.ends("coordinator") == 0, fed.output()
        for number in range(1, NODES):
            lines = [each for each in fed.log(f"n{number}").splitlines() if not each.startswith("run ")]
            assert sum("connected to" in line for line in lines) == 1
            assert "connected to" in lines[-1]  # and nothing after it
        assert fed.log("n0").count("connected to") == 2
        assert same(fed.tables, undisturbed(fed, rounds)), fed.output()
        assert fed.rejections == []
        fed.kept()

        fed.run.rename(fed.folder / "run before")
        fed.name = "another run"  # which the nodes join without being told to
        fed.coordinator(rounds=1)
        assert fed.ends("coordinator") == 0, fed.output()
        assert fed.clients == [USERS, 3], fed.output()


def test_nodes_that_are_refused(fed: Federation, tmp_path: Path) -> None:
    """With a wrong key, authority, clock or file: one line, and an exit code that is not 0."""
    certificates = fed.folder / "certificates"
    make_certificates(tmp_path / "other")
    make_certificates(tmp_path / "old")
    with serving(tmp_path / "link", fed.port, certificates) as control:
        control.register([public_key(fed.folder / "keys" / "n0.pub")])
        fed.node("n1")  # not registered
        fed.node("n0", ca=tmp_path / "other" / "ca.crt")
        fed.node("n2", key="n0", skew=3600.0)
        assert (fed.ends("n2"), fed.lines("n2")) == (4, 1), fed.output()
        assert "clock" in fed.log("n2")
        assert (fed.ends("n0"), fed.lines("n0")) == (4, 1), fed.output()
        assert "certificate cannot be trusted" in fed.log("n0")
        fed.says("nodes/n1/log.txt", "not registered")
        control.register([public_key(fed.folder / "keys" / "n1.pub")])  # instead of n0, whose key is no longer accepted
        fed.says("nodes/n1/log.txt", "connected to")
        fed.node("n0")
        fed.says("nodes/n0/log.txt", "not registered")
        crew.end(fed.processes["n0"])
        fed.node("n2", key="n1")
        fed.says("nodes/n2/log.txt", "still counts as connected")
        crew.end(fed.processes["n1"])
        fed.says("nodes/n2/log.txt", "connected to")
        both = control.register([public_key(fed.folder / "keys" / f"{name}.pub") for name in ("n0", "n1")])
        assert list(both.values()) == [
            public_key(fed.folder / "keys" / "n1.pub")
        ]  # a key that was removed cannot come back
        with closing(sqlite3.connect(fed.store(3))) as file:
            file.execute("PRAGMA user_version = 99")
        fed.node("n3")
        assert (fed.ends("n3"), fed.lines("n3")) == (2, 1)
        assert "from a newer perfedrec" in fed.log("n3")
    make_certificates(certificates, days=0)  # renewed, and expired at once
    refused = CliRunner().invoke(app, fed.serve())
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "expired" in refused.stderr
    fed.port = reserved_port()
    with serving(tmp_path / "link", fed.port, certificates, wait=False):
        fed.node("n0")
        assert fed.ends("n0") == 4, fed.output()
    assert "expired" in fed.log("n0").splitlines()[-1]
