"""The coordinator of a deployment as a run: a SuperLink, its nodes, rounds, a checkpoint after each, a run folder."""

from __future__ import annotations

import errno
import hashlib
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perfedrec import __version__
from perfedrec.core.errors import CheckpointError, ConfigError, PerfedrecError, reason
from perfedrec.core.records import copied, unflatten
from perfedrec.data import Catalogue
from perfedrec.federation import certificates
from perfedrec.federation.bundles import SERVICE
from perfedrec.federation.metrics import Expose, Watch, nowhere
from perfedrec.federation.model_file import method_of
from perfedrec.methods.registry import centralised, method
from perfedrec.privacy.noise import check_source
from perfedrec.privacy.report import privacy_block
from perfedrec.runs import checkpoint
from perfedrec.runs.config import Config
from perfedrec.runs.progress import Reporter, Standing
from perfedrec.runs.training import Entry, InterruptedRunError, read_history, signals, write_settings
from perfedrec.runtimes.flower import (
    Certificates,
    Control,
    Coordinator,
    Rejection,
    ServiceClient,
    Setup,
    SuperLink,
    attached,
    needs_service,
    public_key,
)

LINK = "superlink"
"""Folder of a run in which its SuperLink keeps its state."""

LEAST = 3
"""Nodes in a secure sum: of two each could take its own part off."""

SOON = 30
"""Days before the end of a certificate from which its renewal is asked for."""


@dataclass(frozen=True)
class Terms:
    """How a coordinator deals with its nodes: where it listens, whom it waits for and how long, and when a round is
    closed (``deadline`` in seconds; or once the share ``enough`` of the clients asked has answered).

    ``min_nodes`` is by default 1, and ``LEAST`` where sums are secure."""

    host: str = "127.0.0.1"
    port: int = 18000
    min_nodes: int | None = None
    min_users: int = 1
    wait: float = 600.0
    deadline: float = 60.0
    enough: float = 1.0

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("port", 0 < self.port < 65536, "1 to 65535"),
            ("min_nodes", self.min_nodes is None or self.min_nodes > 0, "at least 1"),
            ("min_users", self.min_users > 0, "at least 1"),
            ("wait", self.wait >= 0, "0 seconds or more"),
            ("deadline", self.deadline > 0, "more than 0 seconds"),
            ("enough", 0 < self.enough <= 1, "more than 0 and at most 1"),
        ):
            if not fits:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected {expected}")


@dataclass(frozen=True)
class Participants:
    """Who takes part in a run: the users' identities [n], ascending."""

    users: Tensor


def with_real_noise(config: Config, chosen: bool = False) -> Config:
    """The configuration with noise from OpenDP, as nodes draw it: what follows from keys is for simulations. Where the
    source was ``chosen`` it stays.

    Raises :class:`ConfigError` where OpenDP is to draw noise and is not installed.
    """
    privacy = getattr(config, "privacy", None)
    if privacy is None:
        return config
    if not chosen:
        privacy = privacy.model_copy(update={"noise_source": "opendp"})
    check_source(privacy)
    return config.model_copy(update={"privacy": privacy})


def told(config: Config, algorithm: Any) -> str:
    """What nodes are told of a configuration: the method and its options, with noise as it was solved."""
    privacy = algorithm.settings.privacy.model_copy(update={"epsilon": None})
    return method_of(config.model_copy(update={"privacy": privacy}))


def serve(
    config: Config,
    catalogue: Catalogue,
    output: Path,
    files: Path,
    keys: Path,
    terms: Terms,
    reporter: Reporter,
    tell: Callable[[str], None],
    resume: bool = False,
    name: str | None = None,
    expose: Expose = nowhere,
    beside: AbstractContextManager[Any] | None = None,
) -> dict[str, Any]:
    """Train with the nodes whose public keys lie in the folder ``keys``, and return the summary.

    The key ``service.pub`` among them is that of the neighbourhood service, which some methods need
    (:func:`perfedrec.runtimes.flower.needs_service`).

    ``files`` is a folder with the server's certificates. What is written to ``output`` is described in
    ``docs/federation.md``. ``tell`` is told what happens, in one line, and ``expose`` is given the source of metrics.
    SIGINT and SIGTERM end the run after the round at hand, with an :class:`InterruptedRunError`; it goes on with
    ``resume``, also after SIGKILL. What runs ``beside`` it begins once there is a SuperLink and ends before it does:
    nodes that do so say goodbye, and may come back at once.
    """
    if centralised(method(config.algorithm)):
        raise ConfigError(f"{config.algorithm} is centralised: it has no nodes; expected a federated method")
    algorithm, registered = config.build(), (keys / f"{SERVICE}.pub").is_file()
    if needs_service(algorithm) and not registered:
        raise ConfigError(
            f"{config.algorithm} needs a neighbourhood service with this configuration, and none is registered; "
            f"expected its public key, {keys / SERVICE}.pub, or --privacy secure, which needs none"
        )
    items = catalogue.item_attributes
    if config.attributes and items is None and catalogue.encoding is None:
        raise ConfigError(
            "model.attributes is true, and no attributes lie beside the catalogue; expected item_attributes.csv or "
            "user_encoding.csv there"
        )
    torch.set_num_threads(config.run.threads or 1)  # for little work at a time several would mostly wait for each other
    given = Certificates(*(files / each for each in (certificates.CA, certificates.CERTIFICATE, certificates.KEY)))
    for path in (given.ca, given.certificate, given.key):
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; make certificates with perfedrec federation certificates")
    for path, remedy in (
        (given.ca, "make certificates in a new folder, and give the nodes its ca.crt"),
        (given.certificate, f"renew it with perfedrec federation certificates {files}"),
    ):
        if (left := certificates.days_left(path)) <= 0:
            raise ConfigError(f"{path}: has expired; {remedy}")
        if left < SOON:
            tell(f"{path}: expires in {left:.0f} days; {remedy}")
    nodes = dict[bytes, str]()
    for path in sorted(keys.glob("*.pub")):
        if (other := nodes.setdefault(public_key(path), path.stem)) != path.stem:
            raise ConfigError(f"{path}: is the key of {other}.pub; expected a key of its own")
    if not nodes:
        raise ConfigError(f"{keys}: no public keys (*.pub); make some with perfedrec federation key")
    least = terms.min_nodes or (LEAST if algorithm.protection.secure else 1)
    if (count := len(nodes) - registered) < least:
        raise ConfigError(f"{keys}: has the keys of {count} nodes; expected those of {least}, for which the run waits")
    _check_free(terms.host, terms.port)
    run = Run(config, algorithm, catalogue, output, name, resume)
    address = f"{'127.0.0.1' if terms.host == '0.0.0.0' else terms.host}:{terms.port}"
    with (
        signals(tell) as caught,
        _superlink(output / LINK, terms, given, address) as (link, control),
        beside or nullcontext(),
    ):
        names = {node: nodes[key] for node, key in control.register(nodes).items()}
        for name in sorted(set(nodes.values()) - set(names.values())):
            raise ConfigError(f"{keys / name}.pub: was removed from this run before; expected a new key for this node")
        with attached(address, given.ca, link.secret, control.open()) as grid:
            tell(f"listening on {terms.host}:{terms.port} for {len(nodes) - registered} registered nodes")
            tell(roles(algorithm))
            service = next((node for node, name in names.items() if name == SERVICE), None)
            run.meet(service, names)
            coordinator = Coordinator(
                grid,
                run.algorithm,
                run.setup,
                len(catalogue.item_ids),
                config.run.seed,
                terms.deadline,
                terms.enough,
                item_attributes=None if items is None else torch.tensor(items.values),
                n_user_attributes=catalogue.n_user_attributes,
                names=names,
                known=run.users,
                service=service,
                service_client=run.service_client,
            )
            ends = {path.name: certificates.end_of(path).timestamp() for path in (given.ca, given.certificate)}
            watch = Watch(names, run.standing.total, terms.deadline, ends)
            expose(lambda: watch.metrics(coordinator, link))
            try:
                roll = coordinator.assemble(least, terms.min_users, terms.wait, tell, lambda: bool(caught))
            except PerfedrecError:
                if caught:
                    raise InterruptedRunError("stopped while it waited for nodes", caught[0]) from None
                raise
            run.begin(coordinator, roll.identities)
            watch.begin(run.standing.done, time.time())
            reporter.start(run.standing)
            try:
                while run.standing.done < run.standing.total and not caught:
                    watch.count(*run.step(coordinator, names, tell), time.time())
                    reporter.round(run.standing)
            finally:
                reporter.stop(run.standing)
            if caught:
                raise InterruptedRunError(f"stopped after round {run.standing.done}", caught[0])
            took = coordinator.hand_out(run.state)
            tell(f"{len(took)} of {len(roll.hosts)} nodes have the model")
            return run.finish([names.get(node, str(node)) for node in took])


def roles(algorithm: Any) -> str:
    """Who takes in what users hand over besides changes of the model, in one line."""
    if needs_service(algorithm):
        return "users' vectors and edges go to the neighbourhood service, sealed"
    if algorithm.protection.sums:
        return "no neighbourhood service is needed: users contribute to sums alone"
    if algorithm.reports_vectors:
        return "this method's coordinator takes in users' vectors itself: no neighbourhood service can do that for it"
    return "no neighbourhood service is needed: this method has nothing for it"


def _check_free(host: str, port: int, seconds: float = 5.0) -> None:
    """Refuse an address that cannot be listened on; the SuperLink of a coordinator that was killed has time to end."""
    end = time.monotonic() + seconds
    while True:
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
                return
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > end:
                wanted = "an address of this machine (--host) and a free port (--port)"
                raise ConfigError(f"{host}:{port}: {reason(error)}; expected {wanted}") from error
        time.sleep(0.1)


@contextmanager
def _superlink(folder: Path, terms: Terms, files: Certificates, address: str) -> Iterator[tuple[SuperLink, Control]]:
    link = SuperLink(folder, terms.host, terms.port, files)
    control = Control(address, files.ca)
    try:
        control.wait()
        yield link, control
    finally:
        control.close()
        link.stop()


class Run:
    """The mutable middle of :func:`serve`: state, history and run folder.

    A checkpoint of another configuration or catalogue is refused, and with the fingerprint of the ``data``, where it is
    known, one of other data.
    """

    def __init__(
        self,
        config: Config,
        algorithm: Any,
        catalogue: Catalogue,
        output: Path,
        name: str | None,
        resume: bool,
        data: str | None = None,
    ) -> None:
        self.config, self.output, self.algorithm = config, output, algorithm
        self.standing = Standing(config.run.rounds + len(self.algorithm.phases), config.run.select_by)
        self.state: Any = None
        self.users: Tensor | None = None
        self.service_client: ServiceClient | None = None
        configuration = told(config, self.algorithm)
        digest = hashlib.sha256(f"{configuration}{config.run.seed}".encode()).hexdigest()
        self.belongs = {"catalogue": catalogue.fingerprint, "configuration": digest}
        if data is not None:
            self.belongs["data"] = data
        self._loaded: checkpoint.Loaded | None = None
        if resume:
            name = self._restore()
        elif output.exists() and any(output.iterdir()):
            raise ConfigError(f"{output} is not empty; expected a new folder (or --resume to go on with the run in it)")
        else:
            name = name or secrets.token_hex(8)
            output.mkdir(parents=True, exist_ok=True)
            write_settings(output, config)
            checkpoint.write_atomic(output / "name", name.encode())
        self.setup = Setup(name, configuration, self.belongs["catalogue"], __version__)

    def _restore(self) -> str:
        """Read the newest checkpoint that is whole, if a round has been played, and the run's name."""
        try:
            name = (self.output / "name").read_text(encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{self.output}: not a coordinator's run: name cannot be read ({error})") from None
        problem: CheckpointError | None = None
        for folder in checkpoint.folders(self.output / "checkpoints"):
            try:
                self._loaded = checkpoint.load(folder, self.belongs)
                break
            except CheckpointError as error:
                problem = error
        if self._loaded is None and problem is not None:
            raise problem
        if self._loaded is not None:
            total = self.standing.total
            self.standing = Standing(**self._loaded.extra["standing"])
            self.standing.total, self.standing.seconds, self.standing.started_at = total, 0.0, self.standing.done
            self.users = self._loaded.records["roll"][0]["users"]
        self._forget_later_lines()
        return name

    def _forget_later_lines(self) -> None:
        """Drop what was written of rounds that are played again, and a line that was cut off in writing."""
        done = self.standing.done
        self._write("metrics.jsonl", [entry.line() for entry in read_history(self.output)[:done]])
        rejections, kept = self.output / "rejections.jsonl", list[dict[str, Any]]()
        for text in rejections.read_text(encoding="utf-8").splitlines() if rejections.exists() else ():
            with suppress(ValueError):
                if (line := json.loads(text))["round"] < done:
                    kept.append(line)
        self._write("rejections.jsonl", kept)

    def _write(self, name: str, lines: list[dict[str, Any]]) -> None:
        if (self.output / name).exists():
            content = "".join(json.dumps(line) + "\n" for line in lines)
            checkpoint.write_atomic(self.output / name, content.encode())

    def meet(self, service: int | None, names: dict[int, str]) -> None:
        """Deal with the neighbourhood ``service``, a node among the ``names``, from what it gave out last on, if there
        is work for it."""
        if service is None or not needs_service(self.algorithm):
            return
        held = {} if self._loaded is None else self._loaded.records.get("mediator", ({}, {}))[0]
        self.service_client = ServiceClient.of(service, held, names)

    def begin(self, coordinator: Coordinator, users: Tensor) -> None:
        """The state that the run starts from, or goes on with."""
        self.users = users
        if self._loaded is None:
            self.state = coordinator.begin()
            return
        blank = coordinator.blank()
        self.state = copied(unflatten(type(blank), *self._loaded.records["state"]))

    def step(
        self, coordinator: Coordinator, names: Mapping[int, str], tell: Callable[[str], None]
    ) -> tuple[Entry, list[tuple[str, str]]]:
        """One round and its checkpoint; returns what is noted of it, and whom it went on without, with the reasons."""
        start = time.perf_counter()
        self.state, report = coordinator.play(self.state)
        seconds = time.perf_counter() - start
        without = self._note(coordinator.rejected, names, tell)
        entry = Entry(report, seconds)
        self.standing.count(report, seconds)
        self._append("metrics.jsonl", entry.line())
        self.checkpoint()
        return entry, without

    def checkpoint(self) -> None:
        assert self.users is not None
        folder = checkpoint.folder_of(self.output / "checkpoints", self.standing.done)
        records = {"state": self.state, "roll": Participants(self.users)}
        if self.service_client is not None:
            records["mediator"] = self.service_client.tensors()
        checkpoint.save(folder, records, self.belongs, {"standing": asdict(self.standing)})
        checkpoint.prune(self.output / "checkpoints")

    def _note(
        self, rejected: list[Rejection], names: Mapping[int, str], tell: Callable[[str], None]
    ) -> list[tuple[str, str]]:
        """Write down whom a round went on without; returns the names of the nodes, with the reasons."""
        without = [(names.get(each.node, str(each.node)), each.reason) for each in rejected]
        for each, (node, _) in zip(rejected, without, strict=True):
            self._append("rejections.jsonl", asdict(each) | {"node": node})
            tell(f"round {each.round}: went on without node {node}: {each.reason}: {each.detail}")
        rejected.clear()
        return without

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with open(self.output / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def finish(self, took: list[str], secure_aggregation: str = "SecAgg+") -> dict[str, Any]:
        """Store the model that is served, and a summary."""
        assert self.users is not None
        n_phases, done = len(self.algorithm.phases), self.standing.done
        extra = {"best_round": done - n_phases, "valid": {}}
        records = {"state": self.algorithm.serving(self.state), "roll": Participants(self.users)}
        checkpoint.save(self.output / "model", records, self.belongs, extra)
        summary = summarised(self.config, self.algorithm, self.standing, self.users.numel(), took, secure_aggregation)
        checkpoint.write_atomic(self.output / "result.json", json.dumps(summary, indent=1).encode())
        return summary


def summarised(
    config: Config, algorithm: Any, standing: Standing, users: int, took: list[str], secure_aggregation: str
) -> dict[str, Any]:
    """What is told of a federation's run of so many ``users``; the nodes ``took`` have its model."""
    n_phases = len(algorithm.phases)
    trained = standing.done - n_phases
    releases = algorithm.releases(max(trained, 0), users)
    return {
        "algorithm": config.algorithm,
        "prelude": n_phases,
        "best_round": trained,
        "users": users,
        "nodes_with_model": took,
        "communication": {name: getattr(standing, name) for name in ("bytes_up", "bytes_down", "uploads")},
        "privacy": privacy_block(algorithm.settings.privacy, releases, secure_aggregation, algorithm.reports_vectors),
    }
