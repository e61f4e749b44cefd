"""What a node's owner has decided about federations: how much protection they need, a pause, and leaving for good."""

from __future__ import annotations

from dataclasses import dataclass

from perfedrec.runtimes.node.database import Database

REQUIRED = "secure"
"""The profile whose protection a node insists on, unless its owner chooses another one."""


@dataclass(frozen=True)
class Rules:
    """The decisions of a node's owner.

    ``require`` is the profile that the owner has chosen, ``started`` the one that ``node run`` was last started with;
    ``None`` where there is none. While ``paused``, a node answers nothing. A node that has ``left`` takes part in no
    run. ``key`` is the fingerprint of the node's key that ``node run`` was last started with.
    """

    require: str | None = None
    started: str | None = None
    paused: bool = False
    left: bool = False
    key: str | None = None

    @property
    def profiles(self) -> tuple[str, ...]:
        """The profiles that a run has to satisfy, all of them; "none" asks for nothing."""
        chosen = tuple(dict.fromkeys(each for each in (self.require, self.started) if each)) or (REQUIRED,)
        return tuple(each for each in chosen if each != "none") or ("none",)

    @property
    def absence(self) -> str | None:
        """Why the node answers nothing, in a few words; ``None`` where it answers."""
        if self.left:
            return "its owner has left the federation"
        return "its owner has paused it" if self.paused else None


class RuleBook:
    """The rules in a node's file."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def read(self) -> Rules:
        """The rules as they are now."""
        with self._database.reading() as db:
            query = "SELECT require, started, paused, gone, key FROM rules"
            require, started, paused, left, key = db.execute(query).fetchone()
        return Rules(require, started, bool(paused), bool(left), key)

    def require(self, profile: str | None) -> None:
        """Insist on the protection of a profile from now on; ``None`` for the usual one."""
        self._set("require", profile)

    def start(self, profile: str | None) -> None:
        """Keep which profile ``node run`` is started with."""
        self._set("started", profile)

    def use_key(self, fingerprint: str) -> None:
        """Keep with which key ``node run`` is started."""
        self._set("key", fingerprint)

    def pause(self, paused: bool) -> None:
        """Answer nothing from now on, or answer again."""
        self._set("paused", int(paused))

    def leave(self) -> None:
        """Take part in no run from now on. The runs so far are over for this node: their stored answers, and the client
        states that no served model needs, are deleted."""
        with self._database.writing() as db:
            db.execute("UPDATE rules SET gone = 1")
            db.execute("UPDATE runs SET gone = 1, reply = NULL")
            kept = "SELECT number FROM runs JOIN served USING (run)"
            for table in ("memories", "kept_states"):
                db.execute(f"DELETE FROM {table} WHERE run NOT IN ({kept})")
            db.execute("DELETE FROM held_out")

    def come_back(self) -> None:
        """Take part in new runs again, after :meth:`leave`."""
        self._set("gone", 0)

    def _set(self, column: str, value: str | int | None) -> None:
        with self._database.writing() as db:
            db.execute(f"UPDATE rules SET {column} = ?", (value,))
