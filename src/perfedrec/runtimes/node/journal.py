"""The journal of a node: what has left it, and what it has refused, in its own file.

An entry is written in the transaction of the answer that it tells of. So no answer is sent that the journal does not
have, and a process that is killed between the two has told more than it has sent, never less.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from perfedrec.runtimes.node.database import Database

JOIN, MODEL, TABLE, SUM = "who takes part", "model", "table of items", "secure sum"
"""Phases of the journal that no method has: a node tells its users' numbers, receives a model, and orders a table; and
a secure sum before the node knows what it is for."""


@dataclass(frozen=True)
class Stated:
    """The protection of an answer: the name of the ``profile`` that describes it, and what it guarantees, as an exact
    ``statement`` in plain words."""

    profile: str
    statement: str


@dataclass(frozen=True)
class Entry:
    """One answer of a node.

    It went to a ``coordinator`` (its address) in a ``phase`` of a ``run``, in ``round`` 0 or later (``None`` where
    there is none); ``stage`` is the last stage of a secure sum that was answered. ``sent`` and ``received`` are bytes.
    ``users`` of this node, by their keys in the file, each with an epsilon so far or ``None``, are in it, ``count`` in
    number; and ``others`` is the number of other nodes in the same sum (0: the coordinator sees this node's part alone;
    ``None``: not known, or there is no sum). Epsilon is that after this answer, and holds ``against`` somebody.
    ``refused`` is why nothing was answered.
    """

    phase: str | None
    coordinator: str | None = None
    run: str | None = None
    round: int | None = None
    stage: str | None = None
    sent: int = 0
    received: int = 0
    count: int | None = None
    users: Mapping[int, float | None] = field(default_factory=dict)
    others: int | None = None
    protection: Stated | None = None
    against: str | None = None
    refused: str | None = None


PLAIN = ("coordinator", "run", "phase", "round", "stage", "others", "against", "refused")
"""The fields of an entry that are stored as they are."""


class Journal:
    """The journal in a node's file."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def write(self, entry: Entry) -> int:
        """Write an entry, and return its number.

        A refusal that repeats the last entry is counted there (``times``) instead.
        """
        with self._database.writing() as db:
            if entry.refused is not None:
                query = "SELECT entry, coordinator, run, phase, round, refused FROM journal ORDER BY entry DESC LIMIT 1"
                last = db.execute(query).fetchone()
                if last and last[1:] == (entry.coordinator, entry.run, entry.phase, entry.round, entry.refused):
                    self.repeat(last[0], entry.sent, entry.received)
                    return int(last[0])
            put = "INSERT INTO journal (time, times, phase, sent, received) VALUES (?, 1, '', 0, 0) RETURNING entry"
            (number,) = db.execute(put, (int(time.time()),)).fetchone()
            self.extend(number, entry)
        return int(number)

    def extend(self, number: int, entry: Entry) -> None:
        """Add to an entry what a later stage of the same answer tells: its bytes are added, and its other fields
        replace those so far."""
        found = list(entry.users.values())
        largest = max(each or 0.0 for each in found) if found and None not in found else None
        with self._database.writing() as db:
            about = {name: getattr(entry, name) for name in PLAIN}
            about |= {"users": entry.count, "epsilon": largest}
            about["protection"] = None if entry.protection is None else self._number_of(db, entry.protection)
            columns = ", ".join(f"{name} = coalesce(:{name}, {name})" for name in about)
            put = f"UPDATE journal SET {columns}, sent = sent + :sent, received = received + :received WHERE entry = :n"
            db.execute(put, {**about, "sent": entry.sent, "received": entry.received, "n": number})
            put = "INSERT INTO journal_users SELECT user, ?, ? FROM users WHERE user = ?"
            db.executemany(put, [(number, epsilon, user) for user, epsilon in entry.users.items()])

    def repeat(self, number: int, sent: int, received: int) -> None:
        """Count an answer, or a refusal, that was sent again: it tells nothing new."""
        with self._database.writing() as db:
            put = "UPDATE journal SET times = times + 1, sent = sent + ?, received = received + ? WHERE entry = ?"
            db.execute(put, (sent, received, number))

    def latest(self, run: str, phase: str, round: int) -> int | None:
        """The number of the newest entry about an answer to a round."""
        query = """
            SELECT max(entry) FROM journal WHERE run = ? AND phase = ? AND round = ? AND refused IS NULL
        """
        with self._database.reading() as db:
            found: int | None = db.execute(query, (run, phase, round)).fetchone()[0]
        return found

    def answers(self, run: str, users: Iterable[int]) -> dict[int, dict[str, int]]:
        """By key, for each of the ``users`` of whom something was sent in a run: how many answers, by phase."""
        query = """
            SELECT user, phase, count(*) FROM journal_users JOIN journal USING (entry)
            WHERE user IN (SELECT value FROM json_each(?)) AND run = ? GROUP BY user, phase
        """
        found: dict[int, dict[str, int]] = {}
        with self._database.reading() as db:
            for user, phase, count in db.execute(query, (json.dumps(list(users)), run)):
                found.setdefault(user, {})[phase] = count
        return found

    @staticmethod
    def _number_of(db: sqlite3.Connection, protection: Stated) -> int:
        """The number of a protection, which is stored once for all answers that had it."""
        known = protection.profile, protection.statement
        db.execute("INSERT OR IGNORE INTO protections (profile, statement) VALUES (?, ?)", known)
        query = "SELECT protection FROM protections WHERE profile = ? AND statement = ?"
        return int(db.execute(query, known).fetchone()[0])

    def read(
        self, user_id: str | None = None, limit: int | None = None, before: int | None = None
    ) -> list[dict[str, Any]]:
        """The entries, newest first, at most ``limit`` of them, and only those ``before`` a number of an entry.

        With a user: the answers that this user is in. Epsilon is that of the user, or else the largest one of all.
        """
        epsilon, own = "journal.epsilon", ""
        if user_id is not None:
            epsilon, own = "own.epsilon", "JOIN journal_users AS own USING (entry) JOIN users ON users.user = own.user"
        query = f"""
            SELECT entry, time, times, coordinator, run, phase, round, stage, sent, received, journal.users, others,
                profile, statement, {epsilon}, against, refused
            FROM journal LEFT JOIN protections USING (protection) {own}
            WHERE (:user IS NULL OR {"users.id" if own else "''"} = :user) AND (:before IS NULL OR entry < :before)
            ORDER BY entry DESC LIMIT :limit
        """
        given = {"user": user_id, "before": before, "limit": -1 if limit is None else limit}
        with self._database.reading() as db:
            rows = db.execute(query, given).fetchall()
        return [_plain(*row) for row in rows]

    def totals(self) -> dict[str, Any]:
        """What has left the node, in all and for each run, newest first.

        Epsilon is the largest one of a user, and ``None`` where something in the run has no guarantee.
        """
        query = f"""
            SELECT run, max(coordinator), min(time), max(time), sum(refused IS NULL),
                sum(iif(refused IS NULL, 0, times)), sum(sent), sum(received),
                iif(sum(users > 0 AND against IS NULL AND phase <> '{JOIN}') > 0, NULL, max(epsilon)),
                max(against)
            FROM journal GROUP BY run ORDER BY max(entry) DESC
        """
        names = ("run", "coordinator", "first", "last", "answers", "refusals", "sent", "received", "epsilon", "against")
        with self._database.reading() as db:
            runs = [dict(zip(names, row, strict=True)) for row in db.execute(query)]
        for each in runs:
            each["against"] = each["against"] if each["epsilon"] is not None else None
        sums = {name: sum(each[name] for each in runs) for name in ("answers", "refusals", "sent", "received")}
        return {**sums, "runs": runs}

    def forget(self) -> None:
        """Say nothing of users who were deleted: the largest epsilon of an answer is that of those who are left."""
        with self._database.writing() as db:
            left = "SELECT entry, max(epsilon) AS largest FROM journal_users GROUP BY entry"
            put = f"UPDATE journal SET epsilon = largest FROM ({left}) AS own WHERE own.entry = journal.entry"
            db.execute(f"{put} AND epsilon IS NOT NULL")
            db.execute("UPDATE journal SET epsilon = NULL WHERE entry NOT IN (SELECT entry FROM journal_users)")

    def shared(self, user_id: str) -> tuple[int, list[str]]:
        """How many answers have something of a user in them, and in which runs; who takes part does not count."""
        query = """
            SELECT run, count(*) FROM journal_users AS own JOIN journal USING (entry)
            JOIN users ON users.user = own.user WHERE id = ? AND phase <> ? GROUP BY run ORDER BY max(entry)
        """
        with self._database.reading() as db:
            found = db.execute(query, (user_id, JOIN)).fetchall()
        return sum(count for _, count in found), [run for run, _ in found if run]


def _plain(*row: Any) -> dict[str, Any]:
    """An entry as people and programs read it."""
    *first, others, profile, statement, epsilon, against, refused = row
    names = ("entry", "time", "times", "coordinator", "run", "phase", "round", "stage", "sent", "received", "users")
    return {
        **dict(zip(names, first, strict=True)),
        "others": others,
        "protection": None if statement is None else {"profile": profile, "statement": statement},
        "epsilon": epsilon,
        "against": against,
        "refused": refused,
    }
