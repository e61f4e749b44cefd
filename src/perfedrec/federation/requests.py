"""Requests of nodes to forget a user: signed on the node, checked and noted by the operator of the federation."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from perfedrec.core.errors import CheckpointError, ConfigError, PerfedrecError, reason
from perfedrec.federation import answers
from perfedrec.federation.bundles import SERVICE
from perfedrec.federation.hosts import Hosts
from perfedrec.federation.owner import Node
from perfedrec.federation.replay import Replay, left_out
from perfedrec.federation.signing import fingerprint, sign, verified
from perfedrec.runs.certificate import Certificate
from perfedrec.runs.checkpoint import Loaded, load
from perfedrec.runs.files import MODEL, NAME, STATUS
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.forget_log import Limits, Log
from perfedrec.runs.shared_model import USERS
from perfedrec.runtimes.flower import public_key
from perfedrec.runtimes.flower.keys import private_key

FORMAT = "perfedrec forget 1"
"""The first words of what is signed, so that a signature is good for nothing else."""

OPERATOR = "operator"
"""Who asks, in a log, where no node does."""

_FIELDS = ("format", "run", "identity", "made", "nonce")


@dataclass(frozen=True)
class SignedRequest:
    """A request that the user with the number ``identity`` is forgotten from a ``run``, made at a time (UTC), with a
    random ``nonce`` by which it is recognised, and signed with the key of the user's node."""

    run: str
    identity: int
    made: str
    nonce: str
    signature: bytes

    @property
    def signed(self) -> bytes:
        """The bytes that are signed."""
        values = (FORMAT, self.run, str(self.identity), self.made, self.nonce)
        return json.dumps(dict(zip(_FIELDS, values, strict=True)), sort_keys=True).encode()

    def write(self, path: Path) -> None:
        """Write it to a new file. Raises :class:`ConfigError` where there is one already."""
        content = json.loads(self.signed) | {"signature": self.signature.hex()}
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({reason(error)}); expected a new file") from None

    @staticmethod
    def read(path: Path) -> SignedRequest:
        """The request in a file. Raises :class:`ConfigError` for anything else. Its signature is not checked."""
        try:
            content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or set(content) != {*_FIELDS, "signature"} or content["format"] != FORMAT:
                raise ValueError("it has other fields")
            texts = {name: content[name] for name in ("run", "made", "nonce")}
            if not all(isinstance(each, str) and len(each) < 200 for each in texts.values()):
                raise ValueError("a field is no short text")
            if not texts["nonce"].isalnum():  # it is in the name of a file
                raise ValueError("its nonce has other characters than letters and digits")
            return SignedRequest(
                **texts, identity=int(content["identity"]), signature=bytes.fromhex(content["signature"])
            )
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise ConfigError(
                f"{path}: no request can be read ({reason(error)}); expected what perfedrec node forget --request wrote"
            ) from None


def make(node: Node, user: str, key: Path) -> SignedRequest:
    """The request to forget a user of a node from the run that the node took part in last, signed with the private key
    in the file ``key``. Raises :class:`ConfigError` where no federation knows the user, and for another key than that
    with which the node last worked, where its file has this."""
    status, identity = node.status(), node.export(user)["identity"]
    if identity is None or status["run"] is None:
        raise ConfigError(f"no federation knows {user}: there is nothing to request; expected forget without --request")
    signer, used = private_key(key), node.key()
    if used is not None and (other := fingerprint(signer.public_key())) != used:
        raise ConfigError(
            f"{key}: is not the key with which this node works ({used}), but {other}; expected "
            "the file that perfedrec node run has as --key"
        )
    made, nonce = datetime.now(UTC).isoformat(timespec="seconds"), secrets.token_hex(16)
    bare = SignedRequest(status["run"], int(identity), made, nonce, b"")
    return replace(bare, signature=signer.sign(bare.signed, ec.ECDSA(hashes.SHA256())))


def accept(
    folder: Path,
    path: Path,
    keys: Path,
    limits: Limits | None = None,
    new_run: Path | None = None,
    signer: Path | None = None,
    replay: Path | None = None,
) -> Certificate:
    """Check the request in the file ``path`` to a run in ``folder``, note it in the run's log, and return the
    certificate of what is done about it. It is written to ``forgotten-NONCE.json`` in the folder.

    The request must be signed with one of the keys of nodes in the folder ``keys``, name this run, and name a user of
    it by the number that only the coordinator and the user's node know. Where the run says which node hosts the user
    (:class:`perfedrec.federation.hosts.Hosts`), the key must be that node's; where it does not, the certificate says
    that this was not checked. A request is accepted once, and within the ``limits``.

    ``new_run`` is the folder of a later run of this federation without the user, which is then checked; ``replay`` is a
    new folder for this run without the user, which is then made of the parts that nodes sent
    (:class:`perfedrec.federation.replay.Replay`). The certificate is signed with the operator's private key in the file
    ``signer``. A request that was accepted can be given again for each of the three, except to sign twice.

    Raises :class:`ConfigError` for a request that is refused; the log has a line for it. For a folder that is not what
    it should be the log has none: that is a mistake of the operator.
    """
    request, run, log = SignedRequest.read(path), RunFolder(folder), Log(folder)
    name, registered = run.name(), _registered(keys)
    users, key = _users(_model(folder)), None if signer is None else _operators_key(signer, registered)
    if new_run is not None:
        _check_new(new_run, folder, request, set(registered.values()))
    again_without = None if replay is None else Replay(folder, replay)
    _check_with(folder, request)
    host, before, file = Hosts(folder).of(request.identity), _accepted(log), folder / f"forgotten-{request.nonce}.json"
    given_again = before.get(str(request.identity), {}).get("nonce") == request.nonce
    again = given_again and any(each is not None for each in (new_run, replay, signer))
    node = "unknown"
    try:
        node = _signer(request, keys, registered)
        _check(request, name, users, {} if again else before)
        _check_host(request, node, host, keys)
    except ConfigError as error:
        log.add("refused", users=[str(request.identity)], by=node, nonce=request.nonce, reason=str(error))
        raise
    stored = _unsigned(file) if again and new_run is None and replay is None and file.exists() else None
    if not again:
        log.allow(limits or Limits(), [str(request.identity)], len(before), len(users), node, nonce=request.nonce)
    about = {"folder": folder.name, "run": name, "request": request.nonce}
    who = answers.Who([str(request.identity)], about, node, checked=host is not None)
    if again_without is not None and replay is not None:
        gone = torch.tensor([request.identity, *map(int, before)]).unique()
        made = again_without.without(lambda part: bool(torch.isin(part.users, gone).any()), gone)
        found = answers.replayed(who, made, replay, run.history())
    elif new_run is not None:
        found = answers.new_run(who, RunFolder(new_run).name())
    else:  # a certificate that is there is signed as it is
        found = stored or answers.accepted(who)
    found = found if key is None else sign(found, key)
    run.write(file.name, found.text().encode())
    _note(log, found, node, new_run or replay or folder, signed_later=stored is not None)
    return found


def forget_node(
    folder: Path, node: str, replay: Path, limits: Limits | None = None, signer: Path | None = None
) -> Certificate:
    """Make the run in ``folder`` without all parts of a ``node``, in the new folder ``replay``, and return the
    certificate. It is written to ``forgotten-node-NAME.json`` in the folder.

    This is for a node that was found out late. It should be excluded first: it is not kept away from later rounds.
    Raises :class:`ConfigError` for a node that has no part in the run, and where the limits do not allow it.
    """
    run, log, without = RunFolder(folder), Log(folder), Replay(folder, replay)
    key = None if signer is None else private_key(signer)
    users = without.users_of(node)
    names, before = [str(each) for each in users.tolist()], _accepted(log)
    log.allow(limits or Limits(), names, len(before.keys() - names), without.users.numel(), OPERATOR)
    gone = torch.tensor([*users.tolist(), *map(int, before)]).unique()
    made = without.without(lambda part: part.node == node or bool(torch.isin(part.users, gone).any()), gone)
    who = answers.Who(names, {"folder": folder.name, "run": run.name(), "node": node}, node)
    found = answers.replayed(who, made, replay, run.history())
    found = found if key is None else sign(found, key)
    run.write(f"forgotten-node-{node}.json", found.text().encode())
    log.done(found.users, found.method, OPERATOR, replay, ())
    return found


def _note(log: Log, found: Certificate, node: str, where: Path, signed_later: bool) -> None:
    """Note in the log that a certificate was written about what is in a folder, or that one was signed later."""
    if signed_later:
        log.add("signed", users=found.users, by=node, nonce=found.run["request"], key=found.signature["key"])
    else:
        log.done(found.users, found.method, node, where, ())


def _accepted(log: Log) -> dict[str, Mapping[str, Any]]:
    """The lines of accepted requests, by user."""
    return {user: line for line in log.lines() if line["event"] == "accepted" for user in line["users"]}


def verify(path: Path, operator: Path, request: Path | None = None) -> Certificate:
    """The certificate in the file ``path``, if it is signed with the operator's key and whole
    (:func:`perfedrec.federation.signing.verified`), and is about the ``request`` of a node's owner. That of a
    simulation is about no request.

    Raises :class:`ConfigError` for any other, which says what is wrong.
    """
    found = verified(path, operator)
    answers = found.run.get("request")
    if request is None:
        if answers is not None:
            raise ConfigError(f"{path}: is about request {answers}; expected the file of your request (--request)")
        return found
    asked = SignedRequest.read(request)
    if answers is None:
        raise ConfigError(f"{path}: is about a simulation and no request; expected it without --request")
    if (answers, found.run.get("run"), found.users) != (asked.nonce, asked.run, [str(asked.identity)]):
        raise ConfigError(
            f"{path}: is the certificate of another request, {answers}; expected that of {asked.nonce}, which is "
            f"in {request}"
        )
    return found


def _operators_key(path: Path, registered: Mapping[str, bytes]) -> ec.EllipticCurvePrivateKey:
    """The private key of the operator in a file. Raises :class:`ConfigError` for that of a ``registered`` node, whose
    owner could sign certificates too."""
    key = private_key(path)
    public = key.public_key()
    for name, content in registered.items():
        if serialization.load_pem_public_key(content) == public:
            raise ConfigError(f"{path}: is the key of node {name}; expected a key of the operator alone (--sign)")
    return key


def _registered(keys: Path) -> dict[str, bytes]:
    """The public keys of nodes in a folder, by name of the node. Raises :class:`ConfigError` where there are none."""
    found = {path.stem: public_key(path) for path in sorted(keys.glob("*.pub")) if path.stem != SERVICE}
    if not found:
        why = "no public keys of nodes are there" if keys.is_dir() else "there is no such folder"
        raise ConfigError(f"{keys}: {why}; expected a folder with files *.pub of nodes (--keys)")
    return found


def _signer(request: SignedRequest, keys: Path, registered: Mapping[str, bytes]) -> str:
    """The name of the node that has signed a request. Raises :class:`ConfigError` where no ``registered`` one has."""
    for name, content in registered.items():
        key = serialization.load_pem_public_key(content)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            continue
        try:
            key.verify(request.signature, request.signed, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            continue
        return name
    raise ConfigError(f"the request is signed with no key in {keys}; expected that of a registered node")


def _check_new(new_run: Path, folder: Path, request: SignedRequest, registered: set[bytes]) -> None:
    """Raise :class:`ConfigError` unless ``new_run`` is a later run of the federation of the run in ``folder``, without
    the user of the request: with the same catalogue, with users of that run, with keys of ``registered`` nodes where
    its keys are still where they were, and begun after the request was made (by the time of the file with its name)."""
    where = f"{new_run}: cannot be certified as a new run of this federation"
    if not new_run.is_dir():
        raise ConfigError(f"{new_run}: there is no such folder; expected that of a run without the user (--new-run)")
    if not RunFolder(new_run).is_federation:
        raise ConfigError(f"{new_run}: not a coordinator's run; expected the folder that perfedrec serve wrote")
    if RunFolder(new_run).name() == request.run:
        raise ConfigError(f"{where}: it goes on with the run of the request; expected a run with a name of its own")
    old, new = _model(folder), _model(new_run)
    if not new.belongs.get("catalogue") or new.belongs["catalogue"] != old.belongs.get("catalogue"):
        raise ConfigError(f"{where}: it has another catalogue of items; expected that of {folder}")
    if not _users(new) & _users(old):
        raise ConfigError(f"{where}: nobody who took part in {folder} took part in it; expected some of its users")
    theirs = _keys_of(new_run)
    if theirs and not theirs & registered:
        raise ConfigError(f"{where}: its nodes have other keys; expected some of the keys in --keys")
    if request.identity in _users(new):
        raise ConfigError(f"{new_run}: the user took part in this run as well; expected a run without the user")
    if int((new_run / NAME).stat().st_mtime) < int(_moment(request.made)):
        raise ConfigError(f"{where}: it began before the request was made ({request.made}); expected a later run")


def _keys_of(run: Path) -> set[bytes]:
    """The public keys that the nodes of a run were registered with; none where they are not known any more."""
    try:
        status = json.loads((run / STATUS).read_text(encoding="utf-8"))
        keys = Path(status["keys"]) if status["keys"] else None
        return set() if keys is None else set(_registered(keys).values())
    except (OSError, ValueError, KeyError, TypeError, PerfedrecError):
        return set()


def _moment(made: str) -> float:
    """The time of a request in seconds since 1970. Raises :class:`ConfigError` for a text that is no time."""
    try:
        return datetime.fromisoformat(made).timestamp()
    except ValueError:
        raise ConfigError(f"the request has the time {made:.60}; expected a time such as 2026-01-31T12:00:00") from None


def _check_host(request: SignedRequest, node: str, host: str | None, keys: Path) -> None:
    """Raise :class:`ConfigError` where a ``node`` has signed a request about a user whom another node hosts. Where that
    one has no key in the folder ``keys``, the file of its key may have been renamed."""
    if host in (None, node):
        return
    expected = f"expected a request of {host}"
    if not (keys / f"{host}.pub").exists():
        expected = (
            f"a node is known by the name of the file of its key, and {keys} has no {host}.pub: if {node}.pub is that "
            f"key, name it {host}.pub again and repeat the command; otherwise {expected}"
        )
    raise ConfigError(
        f"node {node} has signed the request, and user {request.identity} of run {request.run} is on node {host}; "
        f"{expected}"
    )


def _unsigned(file: Path) -> Certificate:
    """The certificate in a file, which is signed now. Raises :class:`ConfigError` for one that has a signature."""
    found = Certificate.read_file(file)
    if found.signature:
        raise ConfigError(
            f"{file}: is signed already, with {found.signature.get('key', 'an unknown key')!s:.60}; expected one "
            "without a signature (--sign)"
        )
    return found


def _check_with(folder: Path, request: SignedRequest) -> None:
    """Raise :class:`ConfigError` for a run that was made without the user of a request."""
    if request.identity in left_out(folder):
        raise ConfigError(
            f"{folder}: this run was made without user {request.identity}; expected the run that it was made of"
        )


def _check(request: SignedRequest, name: str, users: set[int], before: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise :class:`ConfigError` for a request about another run or user, and for a user about whom one was accepted
    ``before``: lines of the log by user."""
    if request.run != name:
        raise ConfigError(f"the request is about run {request.run:.60}; expected {name}")
    if request.identity not in users:
        raise ConfigError(f"the request is about user {request.identity}, who took no part in run {name}")
    if (line := before.get(str(request.identity))) is not None:
        raise ConfigError(f"user {request.identity} was forgotten at {line['time']}; expected one request for each")


def _model(folder: Path) -> Loaded:
    """The model of a federation's run, or its newest complete checkpoint. Raises :class:`CheckpointError` where neither
    is there."""
    run = RunFolder(folder)
    stored = load(folder / MODEL) if (folder / MODEL).exists() else run.newest_checkpoint({})
    if stored is None or USERS not in stored.records:
        raise CheckpointError(
            f"{folder}: has neither a model nor a checkpoint of a federation; expected a run that has played a round"
        )
    return stored


def _users(model: Loaded) -> set[int]:
    """The identities of the users who took part in a run, by its model."""
    return set(model.records[USERS][0]["users"].tolist())
