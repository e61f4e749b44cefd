"""The certificate of a forgetting: what was done, when, how it was measured, and what it does not cover."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from perfedrec.core.counted import counted
from perfedrec.core.errors import CheckpointError, reason
from perfedrec.runs.folder import RunFolder

NAME = "certificate.json"
"""The file of a run folder with its certificate."""

FORMAT = 1

_KINDS = {"str": str, "int": int, "list": list, "dict": dict, "Cost": dict}
"""What a field is in JSON, by the beginning of its type."""

SIGNED = "perfedrec certificate 1"
"""The first line of what is signed, so that a signature is good for nothing else."""


@dataclass(frozen=True)
class Cost:
    """What a method asked of clients and computed: ``rounds`` in which clients worked, how often a client was asked in
    all of them together (``clients``), their bytes, and ``seconds`` of computing."""

    rounds: int
    clients: int
    bytes_up: int
    bytes_down: int
    seconds: float


@dataclass(frozen=True)
class Certificate:
    """What can be said about a model from which ``users`` (ids of the data) were forgotten by a ``method``.

    ``made`` is the time (UTC). ``run`` says of which model: method, data (fingerprints before and after), and the
    digest of the model file before and after. ``done`` are the steps, ``exact`` and ``approximate`` the parts of the
    model by how they were changed, ``cost`` and ``cost_of_run`` the cost of this and of the run. ``measured`` holds the
    figures (``None``: not known), ``unmeasured`` what was not measured and why, ``not_covered`` what nobody can
    conclude from it. ``signature`` is empty, or has the fingerprint of the key that signed it, and the signature
    (:mod:`perfedrec.federation.signing`).
    """

    made: str
    users: list[str]
    method: str
    run: dict[str, str]
    done: list[str]
    exact: list[str]
    approximate: list[str]
    cost: Cost
    cost_of_run: Cost
    measured: dict[str, Any]
    unmeasured: list[str] = field(default_factory=list)
    not_covered: list[str] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)
    format: int = FORMAT
    signature: dict[str, str] = field(default_factory=dict)

    @property
    def signed(self) -> bytes:
        """The bytes that are signed: a line with :data:`SIGNED`, and all fields but ``signature`` as JSON in ASCII,
        with sorted names and without spaces."""
        content = {name: value for name, value in asdict(self).items() if name != "signature"}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return f"{SIGNED}\n{text}".encode()

    def text(self) -> str:
        """The certificate as JSON."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    def write(self, folder: Path) -> None:
        """Write it to the folder of the run that it is about."""
        RunFolder(folder).write(NAME, self.text().encode())

    @staticmethod
    def read(folder: Path) -> Certificate:
        """The certificate in the folder of a run. Raises :class:`CheckpointError` as :meth:`read_file` does."""
        return Certificate.read_file(folder / NAME)

    @staticmethod
    def read_file(path: Path) -> Certificate:
        """The certificate in a file. Raises :class:`CheckpointError` where there is none, and for other content; a name
        that stands in it twice is such, because people and programs could read two things."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
            if not isinstance(content, dict):
                raise ValueError("it has no fields with names")
            if content["format"] != FORMAT:
                raise CheckpointError(f"{path}: has format {content['format']}; expected format {FORMAT}")
            for each in fields(Certificate):
                if each.name in content and not isinstance(
                    content[each.name], _KINDS[str(each.type).partition("[")[0]]
                ):
                    raise ValueError(f"its field {each.name} has another form")
            costs = {name: Cost(**content[name]) for name in ("cost", "cost_of_run")}
            return Certificate(**{**content, **costs})
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: no certificate can be read ({reason(error)}); expected what perfedrec forget or perfedrec "
                "federation forget wrote"
            ) from None

    def lines(self) -> list[tuple[str, str]]:
        """The certificate as pairs of a name and a text, for people."""
        few = ", ".join(self.users[:10]) + (f" and {len(self.users) - 10} more" if len(self.users) > 10 else "")
        found = [("forgotten", few), ("when", self.made), ("method", self.method)]
        found += [(f"step {place}", text) for place, text in enumerate(self.done, 1)]
        found += [
            ("exact", "; ".join(self.exact) or "nothing"),
            ("approximate", "; ".join(self.approximate) or "nothing"),
        ]
        found += [("cost", self._cost())]
        found += [(name, _figure(value)) for name, value in self.measured.items()]
        found += [("not measured", each) for each in self.unmeasured]
        found += [("alert", each) for each in self.alerts]
        found += [("signed with", self.signature.get("key", "an unknown key"))] if self.signature else []
        return found + [("not covered", each) for each in self.not_covered]

    def _cost(self) -> str:
        mine, whole = self.cost, self.cost_of_run
        share = f" ({mine.clients / whole.clients:.1%} of the run's)" if whole.clients else ""
        return (
            f"clients were asked {counted(mine.clients, 'time')} in {counted(mine.rounds, 'round')}{share}, and "
            f"{mine.seconds:.1f} "
            f"seconds were computed (the run: {whole.seconds:.1f})"
        )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of an object in JSON. Raises :class:`ValueError` where a name stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def finite(value: Any) -> Any:
    """Figures, in dictionaries or alone, with ``None`` for those that are no number: JSON has no NaN."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        known = [f"{name} {_figure(each)}" for name, each in value.items() if each is not None]
        return ", ".join(known) or "not known"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def digest_of_model(folder: Path) -> str:
    """The SHA-256 of the list of digests of a model's files: two models with the same one are the same."""
    manifest = next(iter(sorted((folder / "model").glob("*.json"))), None)
    if manifest is None:
        return ""
    stored = json.loads(manifest.read_bytes())["records"]
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()
