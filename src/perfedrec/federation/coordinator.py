"""The coordinator's process: it starts a SuperLink, waits for nodes, plays rounds, and gives the nodes the model."""

from __future__ import annotations

import errno
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perfedrec.core.address import PORT, Address, own, parse_host
from perfedrec.core.algorithm import Algorithm
from perfedrec.core.counted import counted
from perfedrec.core.errors import ConfigError, PerfedrecError, reason
from perfedrec.data import Catalogue
from perfedrec.federation import certificates
from perfedrec.federation.admission import Admission, Limits
from perfedrec.federation.agreement import federated
from perfedrec.federation.bundles import SERVICE
from perfedrec.federation.members import Register
from perfedrec.federation.metrics import Expose, Watch, nowhere
from perfedrec.federation.overseer import Overseer
from perfedrec.federation.record import Record
from perfedrec.federation.registry import Registry
from perfedrec.federation.run import LINK, FederatedRun
from perfedrec.federation.sizing import needs
from perfedrec.privacy.report import between_nodes
from perfedrec.runs.config import Config
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.progress import Reporter
from perfedrec.runs.signals import InterruptedRunError, signals
from perfedrec.runs.summary import Summary
from perfedrec.runtimes.flower import (
    AwayError,
    Certificates,
    Control,
    Coordinator,
    Directory,
    Endpoint,
    Federation,
    SuperLink,
    attached,
    needs_service,
    public_key,
)

LEAST = 3
"""Least nodes in a secure sum: each of two nodes could subtract its own part and see the part of the other."""

SOON = 30
"""Days before the end of a certificate from which on its renewal is recommended."""

Tell = Callable[[str], None]
"""Receives what a person should know, in one line."""


@dataclass(frozen=True)
class Terms:
    """How a coordinator deals with its nodes.

    It listens on ``host`` and ``port``, and waits for ``min_nodes`` nodes (default: 1, and :data:`LEAST` where sums are
    secure) with ``min_users`` users for ``wait`` seconds. A round is closed after ``deadline`` seconds, or once the
    share ``enough`` of the clients asked has answered. Raises :class:`ConfigError` for a value that is not possible.
    """

    host: str = "127.0.0.1"
    port: int = PORT
    min_nodes: int | None = None
    min_users: int = 1
    wait: float = 600.0
    deadline: float = 60.0
    enough: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "host", parse_host(self.host, "--host"))  # without brackets
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

    def changed(self) -> dict[str, Any]:
        """The terms that differ from the defaults, by name."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) != each.default}

    def least_nodes(self, algorithm: Algorithm[Any, Any, Any]) -> int:
        """The number of nodes that a run of a method waits for. Raises :class:`ConfigError` where sums are secure, and
        there would be one node only: its sum would be open."""
        if self.min_nodes == 1 and algorithm.protection.secure:
            raise ConfigError(
                "a secure sum needs more than one node; expected 3 or more, so that none sees the part of another, or "
                "--privacy paper or none"
            )
        return self.min_nodes or (LEAST if algorithm.protection.secure else 1)

    @property
    def address(self) -> Address:
        """Where the SuperLink listens."""
        return Address(self.host, self.port)


@dataclass(frozen=True)
class Deployment:
    """What a coordinator is given.

    The configuration of the run, the ``catalogue`` of items that all nodes have, the folder ``output`` to which the run
    is written (``docs/federation.md`` describes it), the folder ``certificates`` with the server's certificates, the
    folder ``keys`` with the nodes' public keys and the register of nodes, the terms, and the ``limits`` of each node.
    With ``resume`` the run in ``output`` is continued, also after SIGKILL. ``name`` is the name of a new run (default:
    a random one). ``keep_sums``: what is opened in each round is kept in the folder ``opened`` of the run, so that it
    can be audited.

    ``models`` is a registry of models (:mod:`perfedrec.federation.registry`): the model of the run becomes a version in
    it, and nodes get the version that is promoted. With ``promote`` that is this one, and also where it is the first.

    The key ``service.pub`` among the keys is that of the neighbourhood service, which some methods need
    (:func:`perfedrec.runtimes.flower.needs_service`).
    """

    config: Config
    catalogue: Catalogue
    output: Path
    certificates: Path
    keys: Path
    terms: Terms = Terms()
    resume: bool = False
    name: str | None = None
    keep_sums: bool = False
    models: Path | None = None
    promote: bool = False
    limits: Limits = field(default_factory=Limits)


def serve(
    given: Deployment,
    reporter: Reporter,
    tell: Tell,
    expose: Expose = nowhere,
    beside: AbstractContextManager[object] | None = None,
) -> Summary:
    """Train with the nodes of a deployment, give them the model, and return the summary.

    ``tell`` receives what happens, line by line, and ``expose`` the source of metrics. ``beside`` is entered once the
    SuperLink runs and left before it ends, so that nodes that are started in it can sign off. SIGINT and SIGTERM end
    the run after the current round with an :class:`InterruptedRunError`; it can be resumed.

    Raises :class:`ConfigError` before anything starts where something in the deployment is wrong, and
    :class:`perfedrec.runtimes.flower.AwayError` where too few nodes connect in time.
    """
    algorithm, terms = federated(given.config), given.terms
    _check_needs(given, algorithm)
    # With more threads, which have little work at a time, most would only wait for each other.
    torch.set_num_threads(given.config.run.threads or 1)
    files, served_as = check_certificates(given.certificates, tell)
    registered = read_keys(given.keys, terms.least_nodes(algorithm))
    admission = Admission(Register(given.keys), given.limits, registered, tell)
    models = _registry(given)
    _check_free(terms.address)
    if needed := needs(algorithm, len(given.catalogue.item_ids)):
        tell(needed.line())
    # The SuperLink is recognised by a name that its certificate has, and not by the address at which it is called.
    here = Endpoint(Address(own(terms.host), terms.port), files.ca, served_as[0].replace("*", "any"))
    with (
        _locked_run(given, algorithm) as run,
        signals(tell) as caught,
        _superlink(given.output / LINK, given, files, here) as (link, control),
        beside or nullcontext(),
    ):
        names = _register(control, registered, given.keys)
        with attached(here, link.secret, control.open()) as grid:
            count = len(registered) - (SERVICE in registered.values())
            where = f"listening on {terms.address} for {counted(count, 'registered node')}"
            tell(f"{where}, with a certificate for {', '.join(served_as)}")
            tell(roles(algorithm))
            coordinator = _coordinator(grid, given, run, names, admission)
            watch = Watch(names, run.progress.total, terms.deadline, certificate_ends(files))
            expose(lambda: watch.metrics(coordinator, link))
            record = Record(run, coordinator, lambda: watch.figures(coordinator, link), tell, given.keys)
            with record.to_the_end():
                directory = _wait_for_nodes(coordinator, terms, algorithm, record.waiting, caught)
                sizes = [users.numel() for users in directory.hosts.values() if users.numel()]
                tell(f"other nodes: {between_nodes(algorithm.settings.privacy, sizes)}")
                run.begin(coordinator, directory.identities)
                overseer = Overseer(run, coordinator, admission, watch, link.refused)
                _play(overseer, directory.hosts, reporter, record, caught)
                test = run.test(coordinator, names, tell)
                took, instead = _hand_out(run, coordinator, models, given.promote)
                summary = run.finish([names.get(node, str(node)) for node in took], sizes=sizes, test=test)
                if models is not None:
                    _add(models, given, tell)
                record.end(summary, instead)
            return summary


def roles(algorithm: Algorithm[Any, Any, Any]) -> str:
    """Who receives what users hand over besides changes of the model, in one line."""
    if needs_service(algorithm):
        return "users' vectors and edges go to the neighbourhood service, sealed"
    if algorithm.protection.sums:
        return "no neighbourhood service is needed: users contribute to sums alone"
    if algorithm.reports_vectors:
        return "this method's coordinator receives users' vectors itself: no neighbourhood service can do that for it"
    return "no neighbourhood service is needed: this method has no work for one"


# --- before anything starts ---


def _check_needs(given: Deployment, algorithm: Algorithm[Any, Any, Any]) -> None:
    """Refuse a deployment that lacks the service or the attributes that the method needs."""
    key, catalogue = given.keys / f"{SERVICE}.pub", given.catalogue
    if needs_service(algorithm) and not key.is_file():
        raise ConfigError(
            f"{given.config.algorithm} needs a neighbourhood service with this configuration, and none is registered; "
            f"expected its public key, {key}, or --privacy secure, which needs none"
        )
    if given.config.attributes and catalogue.item_attributes is None and catalogue.encoding is None:
        raise ConfigError(
            "model.attributes is true, and there are no attributes beside the catalogue; expected item_attributes.csv "
            "or user_encoding.csv there"
        )


def check_certificates(folder: Path, tell: Tell) -> tuple[Certificates, tuple[str, ...]]:
    """The server's certificates in a folder, and the names that they are for. ``tell`` receives a line about each one
    that expires soon.

    Raises :class:`ConfigError` for one that nodes would not trust.
    """
    files = Certificates(*(folder / name for name in (certificates.CA, certificates.CERTIFICATE, certificates.KEY)))
    names = certificates.checked(files.ca, files.certificate, files.key)
    for path, remedy in (
        (files.ca, "make certificates in a new folder, and give the nodes its ca.crt"),
        (files.certificate, f"renew it with perfedrec federation certificates {folder}"),
    ):
        if (left := certificates.days_left(path)) < SOON:
            tell(f"{path}: expires in {counted(round(left), 'day')}; {remedy}")
    return files, names


def certificate_ends(files: Certificates) -> dict[str, float]:
    """When each certificate expires, in seconds since 1970, by the name of its file."""
    return {path.name: certificates.end_of(path).timestamp() for path in (files.ca, files.certificate)}


def read_keys(folder: Path, least: int) -> dict[bytes, str]:
    """The names of the nodes, and of the service if it is registered, by public key (PEM).

    Raises :class:`ConfigError` where two files have the same key, and where there are fewer nodes than the ``least``
    number for which the run waits.
    """
    found: dict[bytes, str] = {}
    for path in sorted(folder.glob("*.pub")):
        if (other := found.setdefault(public_key(path), path.stem)) != path.stem:
            raise ConfigError(f"{path}: is the key of {other}.pub; expected a different key for each node")
    if not found:
        why = "no public keys (*.pub)" if folder.is_dir() else "there is no such folder"
        raise ConfigError(f"{folder}: {why}; make keys with perfedrec federation key, and put those of nodes there")
    if (count := len(found) - (SERVICE in found.values())) < least:
        raise ConfigError(
            f"{folder}: has the keys of {counted(count, 'node')}; expected those of {least}, for which the run waits"
        )
    return found


def _registry(given: Deployment) -> Registry | None:
    """The registry of models of a deployment, where it has one. Raises :class:`CheckpointError` where the version that
    nodes shall get is damaged."""
    if given.models is None:
        return None
    models = Registry(given.models, given.catalogue.fingerprint)
    if not given.promote and models.promoted is not None:
        models.check(models.version(models.promoted))
    return models


def _check_free(address: Address, seconds: float = 5.0) -> None:
    """Refuse an address on which nothing can listen.

    A port in use is tried again for some ``seconds``: the SuperLink of a coordinator that was killed needs time to end.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            for family, kind, _, _, place in socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM):
                with socket.socket(family, kind) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    probe.bind(place)
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > end:
                wanted = "an address of this machine (--host) and a free port (--port)"
                raise ConfigError(f"{address}: {reason(error)}; expected {wanted}") from error
        time.sleep(0.1)


# --- while it runs ---


@contextmanager
def _locked_run(given: Deployment, algorithm: Algorithm[Any, Any, Any]) -> Iterator[FederatedRun]:
    """The run of a deployment, of which no other process is the coordinator."""
    name, folder = given.name or secrets.token_hex(8), RunFolder(given.output)
    with folder.locked():
        yield FederatedRun(given.config, algorithm, given.catalogue, folder, name, given.resume)


@contextmanager
def _superlink(
    folder: Path, given: Deployment, files: Certificates, here: Endpoint
) -> Iterator[tuple[SuperLink, Control]]:
    """A SuperLink that is ready, and the connection that controls it."""
    link = SuperLink(folder, given.terms.host, given.terms.port, files, given.limits.rates)
    control = Control(here)
    try:
        try:
            control.wait()
        except AwayError as error:
            raise AwayError(f"the SuperLink did not start ({error}); see {link.log}") from None
        yield link, control
    finally:
        control.close()
        link.stop()


def _register(control: Control, registered: Mapping[bytes, str], keys: Path) -> dict[int, str]:
    """Register the nodes by their public keys; returns their names by node."""
    names = {node: registered[key] for node, key in control.register(registered).items()}
    for name in sorted(set(registered.values()) - set(names.values())):
        raise ConfigError(f"{keys / name}.pub: was removed from this run before; expected a new key for this node")
    return names


def _coordinator(
    grid: Any, given: Deployment, run: FederatedRun, names: dict[int, str], admission: Admission
) -> Coordinator:
    """The coordinator of a run over the SuperLink's grid. ``names`` are those of the nodes and the service."""
    catalogue, terms = given.catalogue, given.terms
    items, service = catalogue.item_attributes, next((node for node, name in names.items() if name == SERVICE), None)
    run.use_service(service, names)
    admission.know(names)
    federation = Federation(
        run.algorithm,
        len(catalogue.item_ids),
        given.config.run.seed,
        run.setup,
        terms.deadline,
        terms.enough,
        item_attributes=None if items is None else torch.tensor(items.values),
        n_user_attributes=catalogue.n_user_attributes,
        service_client=run.service_client,
        witness=run.keep_opened if given.keep_sums else None,
        keeper=run.keeper(names),
    )
    return Coordinator(grid, federation, names, run.users, service, admission)


def _wait_for_nodes(
    coordinator: Coordinator, terms: Terms, algorithm: Algorithm[Any, Any, Any], tell: Tell, caught: list[int]
) -> Directory:
    """Wait until enough nodes and users, and the service, are connected; returns who hosts whom."""
    least, privacy = terms.least_nodes(algorithm), algorithm.settings.privacy
    users = max(terms.min_users, privacy.min_clients if algorithm.protection.secure else 1)
    try:
        return coordinator.assemble(least, users, terms.wait, tell, lambda: bool(caught))
    except PerfedrecError:
        if caught:
            raise InterruptedRunError("stopped while it waited for nodes", caught[0]) from None
        raise


def _play(
    overseer: Overseer, hosts: Mapping[int, Tensor], reporter: Reporter, record: Record, caught: list[int]
) -> None:
    """Play all rounds that are left with the users in ``hosts``. A signal ends the run after the current one."""
    run, watch = overseer.run, overseer.watch
    overseer.begin(hosts)
    watch.begin(run.progress.done, time.time(), run.last_valid)
    record.begin()
    if run.progress.over:
        record.tell(
            "no round is left to play, and the nodes get the model again; --rounds with a larger number plays more"
        )
    reporter.start(run.progress)
    try:
        while not run.progress.over and not caught:
            watch.count(*run.play(overseer.coordinator, watch.names, record.tell), time.time())
            overseer.look(record.tell)
            record.write("running")
            reporter.round(run.progress)
    finally:
        reporter.stop(run.progress)
    if caught:
        raise InterruptedRunError(f"stopped after {run.progress.place}", caught[0])


# --- the model at the end ---


def _hand_out(
    run: FederatedRun, coordinator: Coordinator, models: Registry | None, promote: bool
) -> tuple[list[int], str]:
    """Give the nodes the model of the run or, where another version is promoted, that one; returns the nodes that have
    the model of the run, and in a few words what they have instead."""
    promoted = None if models is None or promote else models.promoted
    if models is None or promoted is None:
        return coordinator.hand_out(run.best), ""
    version = models.version(promoted)
    if (version.run, version.round) == (run.setup.run, run.selection.best_round):
        return coordinator.hand_out(run.best), ""
    model, setup = models.model(promoted)
    called = f"version {promoted} of {models.path}, which is promoted"
    if needs_service(model.algorithm):
        return [], f"nodes keep the model that they have, because {called}, can be given as a file alone"
    hosts = len(coordinator.directory.hosts) if coordinator.directory else 0
    took = coordinator.hand_out_other(model.algorithm, model.state, model.users, setup)
    return [], f"{called}, is on {len(took)} of {counted(hosts, 'node')}"


def _add(models: Registry, given: Deployment, tell: Tell) -> None:
    """Make the model of a finished run a version of a registry."""
    version = models.add(given.output)
    if given.promote or models.promoted is None:
        models.promote(version.number)
    how = "promoted" if models.promoted == version.number else f"not promoted (version {models.promoted} is)"
    tell(f"the model is version {version.number} of {models.path}, {how}")
