"""What a node writes in its journal: an entry for each answer and each secure sum, in the transaction of the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from perfedrec.core.algorithm import EVALUATE, Algorithm, AnyAlgorithm
from perfedrec.core.errors import PerfedrecError
from perfedrec.privacy.policy import Policy
from perfedrec.privacy.protection import Protection
from perfedrec.privacy.statement import AGAINST, accountable, so_far, statement
from perfedrec.runtimes.flower.codec import UploadError
from perfedrec.runtimes.flower.secure_sum import RECORD
from perfedrec.runtimes.node import Entry, Stated, Store, StoreError
from perfedrec.runtimes.node.journal import SUM

REPEATED = "The node has given the answer to this round that it gave before: it tells nothing new."
"""The statement of a secure sum in which an earlier answer is used again."""

LONGEST = 500
"""The most characters of what another machine writes that come into the journal."""


@dataclass(frozen=True)
class Owner:
    """What the owner of a node says about runs.

    ``policies`` are those that a run has to satisfy now; ``profile_of`` names the profile that describes the protection
    of a method; ``coordinator`` is the address that the node works for.
    """

    policies: Callable[[], Sequence[Policy]] = tuple
    profile_of: Callable[[AnyAlgorithm], str] = lambda algorithm: "none"
    coordinator: str | None = None


@dataclass
class Draft:
    """What is known of an answer while it is made.

    ``received`` are bytes. The ``phase`` is empty in stages of a secure sum that do not tell it. ``users`` [B] are
    those in the answer, by identity. ``repeated``: the answer to the round was made before; ``resent``: so was this
    very message's. ``played`` is the run and the number of a round that is answered. ``said`` is the statement of an
    answer that needs no method for it; ``sealed`` whether something in it is for the neighbourhood service, and
    ``secure`` whether it is a part of a secure sum.
    """

    phase: str
    received: int
    run: str | None = None
    round: int | None = None
    stage: str | None = None
    algorithm: Algorithm[Any, Any, Any] | None = None
    users: Tensor | None = None
    others: int | None = None
    said: str | None = None
    secure: bool = False
    sealed: bool = False
    repeated: bool = False
    resent: bool = False
    played: tuple[str, int] | None = None

    @staticmethod
    def of(message: Message, phase: str = "", stage: str | None = None) -> Draft:
        """What a message tells; where no ``phase`` is given, that of the round that it asks for."""
        records = message.content.config_records
        setup, task = (records.get(name, ConfigRecord()) for name in ("setup", "task"))
        run, number = setup.get("run"), task.get("round")
        return Draft(
            phase=phase or str(task.get("phase", ""))[:LONGEST],
            received=size(message.content),
            run=run[:LONGEST] if isinstance(run, str) else None,
            round=number if isinstance(number, int) else None,
            stage=stage,
            secure=stage is not None,
        )


def size(content: RecordDict) -> int:
    """Bytes of what a message says, as it is packed."""
    return sum(
        sum(len(array.data) for array in record.values()) if isinstance(record, ArrayRecord) else len(record.deflate())
        for record in content.values()
    )


@dataclass
class Diary:
    """Writes the journal in a ``store``, for what the ``owner`` says."""

    store: Store
    owner: Owner
    _sum: tuple[bytes, int] | None = field(default=None, init=False)

    def answer(
        self,
        message: Message,
        draft: Draft,
        work: Callable[[], RecordDict],
        join: Callable[[], AnyAlgorithm] | None = None,
    ) -> Message:
        """The answer to a ``message`` with the content that ``work`` returns, which is stored together with what
        ``work`` stores.

        ``join`` comes first, in a transaction of its own, and returns the method of the run. What is raised is written
        as a refusal, and raised again.
        """
        try:
            if why := self.store.rules.read().absence:
                raise UploadError("away", f"this node answers nothing: {why}")
            if join is not None:
                draft.algorithm = join()
            # Evaluations change nothing, and take long with many users: others can write to the file meanwhile.
            with nullcontext() if draft.phase == EVALUATE.name else self.store.transaction():
                content = work()
                with self.store.transaction():
                    self._write(message, draft, size(content))
        except Exception as error:
            with suppress(StoreError):
                self._write_refusal(message, draft, error)
            raise
        return Message(content, reply_to=message)

    def _write(self, message: Message, draft: Draft, sent: int) -> None:
        journal = self.store.journal
        number = None if draft.stage == "keys" and not draft.resent else self._number_of(message)
        if draft.repeated and number is None and draft.run is not None and draft.round is not None:
            number = journal.latest(draft.run, draft.phase, draft.round)
        if number is None:
            number = journal.write(self._entry(draft, sent, SUM))
        elif draft.resent or (draft.repeated and draft.stage is None):
            journal.repeat(number, sent, draft.received)
        else:
            journal.extend(number, self._entry(draft, sent, None))
        if draft.stage == "keys":
            self._sum = _session(message), number

    def _write_refusal(self, message: Message, draft: Draft, error: Exception) -> None:
        """Write down why a message was not answered; in the entry of the secure sum that it belongs to."""
        known, reason = isinstance(error, PerfedrecError), getattr(error, "reason", "failed")
        why = f"{reason}: {error}" if known else f"failed: {type(error).__name__}: {error}"
        number, about = self._number_of(message), replace(draft, users=None, said=None, repeated=False, stage=None)
        entry = replace(self._entry(about, 0, SUM if number is None else None), refused=why[:LONGEST])
        if number is None:
            self.store.journal.write(entry)
        else:
            self.store.journal.extend(number, entry)

    def _number_of(self, message: Message) -> int | None:
        """The entry of the secure sum that a message belongs to."""
        return self._sum[1] if self._sum is not None and self._sum[0] == _session(message) else None

    def _entry(self, draft: Draft, sent: int, unknown: str | None) -> Entry:
        """The entry of an answer; ``unknown`` stands for a phase that is not known yet."""
        algorithm, about = draft.algorithm, dict[str, Any]()
        if draft.repeated:
            draft = replace(draft, said=REPEATED, users=None)
        if draft.said is not None and algorithm is not None:
            about["protection"] = Stated(self.owner.profile_of(algorithm), draft.said)
        elif algorithm is not None and draft.users is not None:
            protection = cast(Protection, algorithm.protection)
            text = statement(protection, draft.phase, draft.secure, draft.sealed)
            about["protection"] = Stated(self.owner.profile_of(algorithm), text)
        if draft.users is not None:
            users = self.store.keys_of(draft.users)
            about |= {"users": self._epsilons(draft, users), "count": len(users)}
            if users and None not in about["users"].values():
                about["against"] = AGAINST
        return Entry(
            phase=draft.phase or unknown,
            coordinator=self.owner.coordinator,
            run=draft.run,
            round=draft.round,
            stage=draft.stage,
            sent=sent,
            received=draft.received,
            others=draft.others,
            **about,
        )

    def _epsilons(self, draft: Draft, users: list[int]) -> dict[int, float | None]:
        """By key, the epsilon of each user after this answer; ``None`` where nothing has a guarantee."""
        algorithm, nothing = draft.algorithm, dict[int, float | None].fromkeys(users)
        if algorithm is None or draft.run is None or draft.said is not None or not accountable(algorithm):
            return nothing
        before, found = self.store.journal.answers(draft.run, users), dict[tuple[tuple[str, int], ...], float | None]()
        phases = cast(Protection, algorithm.protection).phases
        for user in users:
            counts = {phase: count for phase, count in before.get(user, {}).items() if phase in phases}
            counts[draft.phase] = counts.get(draft.phase, 0) + 1
            key = tuple(sorted(counts.items()))
            if key not in found:
                found[key] = so_far(algorithm, counts).value
            nothing[user] = found[key]
        return nothing


def _session(message: Message) -> bytes:
    """The session of secure aggregation that a message belongs to."""
    record = message.content.config_records.get(RECORD, ConfigRecord())
    found = record.get("session", b"")
    return found if isinstance(found, bytes) else b""
