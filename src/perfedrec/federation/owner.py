"""A node for its owner: lists, what is stored about each user, what has left the node, and the rules for that.

Nothing here loads torch, unless the served method needs it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from perfedrec.core.errors import ConfigError, DataError, check_length
from perfedrec.nn.inference import Floats, Ints, User
from perfedrec.runtimes.node.owned import OwnedFile
from perfedrec.runtimes.node.scorer import Stored, best

if TYPE_CHECKING:
    from perfedrec.data.details import Details
    from perfedrec.federation.offline import TorchScores

KEPT_BYTES = 64 * 2**20
"""The most bytes of scores that are kept for users whose data do not change."""

UNSET: Any = object()


@dataclass(frozen=True)
class Scored:
    """The scores [m] of all items for a user, and their parts; ``own`` says what each own item adds, where that is
    known."""

    stored: Stored
    scores: Floats
    parts: dict[str, Floats]
    own: User | None

    @property
    def size(self) -> int:
        """Bytes."""
        return int(self.scores.nbytes + sum(each.nbytes for each in self.parts.values()))


class Node:
    """A node's file, as its owner uses it. Several threads and processes may use one file at once, also while
    ``perfedrec node run`` works with it; each call sees what was stored last.

    Close it after use, or open it in a ``with`` statement. Methods raise :class:`~perfedrec.DataError` for an unknown
    user or item, :class:`~perfedrec.ConfigError` for another value that is not possible, and
    :class:`~perfedrec.runtimes.node.StoreError` where the node has received no model, or where the file cannot be used.
    """

    def __init__(self, file: OwnedFile) -> None:
        self._file = file
        self._kept, self._lock = OrderedDict[str, Scored](), threading.Lock()
        self._vectors: tuple[tuple[Any, ...], Floats] | None = None
        self._torch: TorchScores | None = None

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open the file of a node, which ``perfedrec node init`` has made."""
        return cls(OwnedFile.open(Path(path)))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._torch is not None:
                self._torch.close()
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    # --- lists ---

    def recommend(
        self,
        user: str,
        k: int = 20,
        exclude: Iterable[str | int] = (),
        among: Iterable[str | int] | None = None,
        why: bool = False,
    ) -> list[dict[str, Any]]:
        """The ``k`` best items that a user neither has nor has dismissed, best first, without those to ``exclude``, and
        where ``among`` is given, of those only.

        Each row has ``item``, ``rank``, ``score``, the part of each model in the score, ``moved`` (places that the item
        gained over the list of the global model), ``title``, ``picture`` (whether there is one) and ``attributes``.
        With ``why``, ``because`` names up to two of the user's items that speak most for the item, each with ``item``,
        ``title`` and ``share``: its share of all that the user's items add to the score, or, where the method scores by
        a vector that belongs to no item, of their likeness to the item.
        """
        check_length(k)
        hidden, kept = self._file.numbers(exclude), None if among is None else self._file.numbers(among)
        found = self._scored(user)
        scores = found.scores.copy()
        if kept is not None:
            others = np.ones(scores.size, dtype=bool)
            others[kept] = False
            scores[others] = -np.inf
        scores[hidden] = -np.inf
        scores[self._file.dismissed_numbers(found.stored.key)] = -np.inf
        items, rows = self._file.listed(user, scores, found.parts, k)
        rows = [row | more for row, more in zip(rows, self._file.details.of(items.tolist()), strict=True)]
        return self._with_reasons(found, items, rows) if why else rows

    def similar(self, item: str | int, k: int = 20) -> list[dict[str, Any]]:
        """The ``k`` items that are most like an item, by the cosine of their vectors in the served model: rows with
        ``item``, ``rank``, ``score``, ``title``, ``picture`` and ``attributes``."""
        check_length(k)
        (number,) = self._file.numbers([item])
        vectors = self._item_vectors()
        likeness = vectors @ vectors[number]
        likeness[number] = -np.inf
        return self._rows(best(likeness, k)[:k], likeness)

    def popular(self, k: int = 20) -> list[dict[str, Any]]:
        """The ``k`` items with which most users of the federation have interacted, as far as the served model knows:
        what to show to somebody of whom nothing is known. Rows as of :meth:`similar`, with the number of interactions
        as the score."""
        check_length(k)
        counts = self._file.popularity()
        return self._rows(best(counts, k)[:k], counts)

    def _rows(self, items: Ints, scores: Floats) -> list[dict[str, Any]]:
        ids, details = self._file.ids(items), self._file.details.of(items.tolist())
        return [
            {"item": item, "rank": rank, "score": float(scores[number]), **more}
            for rank, (item, number, more) in enumerate(zip(ids, items.tolist(), details, strict=True), start=1)
        ]

    def _with_reasons(self, found: Scored, items: Ints, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows with ``because``."""
        own = np.array(found.stored.items, dtype=np.int64)
        shares = np.zeros((items.size, own.size), dtype=np.float32)
        if found.own is not None:
            shares = found.own.contributions(items)
        if not shares.any() and own.size and items.size:
            vectors = self._item_vectors()
            shares = vectors[items] @ vectors[own].T
        shares = np.maximum(shares, 0)
        shares /= np.maximum(shares.sum(1, keepdims=True), np.float32(1e-30))
        strongest = np.argsort(-shares, axis=1, kind="stable")[:, :2]
        named = sorted({int(own[place]) for places in strongest for place in places})
        ids = dict(zip(named, self._file.ids(np.array(named, dtype=np.int64)), strict=True))
        titles = dict(zip(named, (each["title"] for each in self._file.details.of(named)), strict=True))

        def reasons(row: int) -> list[dict[str, Any]]:
            places = [place for place in strongest[row].tolist() if shares[row, place] > 0]
            return [
                {"item": ids[number], "title": titles[number], "share": float(shares[row, place])}
                for place in places
                for number in [int(own[place])]
            ]

        return [each | {"because": reasons(row)} for row, each in enumerate(rows)]

    def _scored(self, user: str) -> Scored:
        """The scores of a user, which are kept until something of what they are made from changes."""
        stored = self._file.stored(user)
        with self._lock:
            kept = self._kept.get(user)
            if kept is not None and kept.stored == stored:
                self._kept.move_to_end(user)
                return kept
        own = self._file.user(stored)
        scores, parts = own.scores() if own is not None else self._with_torch().scores(user)
        scores[list(stored.items)] = -np.inf
        scores, parts = self._file.by_popularity(scores, parts)
        found = Scored(stored, scores, parts, own)
        if self._file.stored(user) == stored:  # torch has read the file later
            with self._lock:
                self._kept[user] = found
                while sum(each.size for each in self._kept.values()) > KEPT_BYTES:
                    self._kept.popitem(last=False)
        return found

    def _with_torch(self) -> TorchScores:
        """What scores by methods that need torch."""
        with self._lock:
            if self._torch is None:
                from perfedrec.federation.offline import TorchScores

                self._torch = TorchScores(self.path)
            return self._torch

    def _item_vectors(self) -> Floats:
        """[m, d] vectors of length 1 of all items in the served model."""
        served, model = self._file.served()
        kept = self._vectors
        if kept is None or kept[0] != served:
            vectors = model.vectors() if model is not None else self._with_torch().item_vectors()
            lengths = np.sqrt(np.square(vectors).sum(1, keepdims=True))
            kept = self._vectors = served, (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
        return kept[1]

    # --- items ---

    def item(self, item: str | int) -> dict[str, Any]:
        """An item with ``item``, ``title``, ``picture`` and ``attributes``."""
        return self._shown(self._file.numbers([item]).tolist())[0]

    def picture(self, item: str | int) -> tuple[bytes, str] | None:
        """The picture of an item and its media type; ``None`` where there is none."""
        return self._file.details.picture(int(self._file.numbers([item])[0]))

    def search(self, text: str, k: int = 20) -> list[dict[str, Any]]:
        """The ``k`` items whose id or title fits a text best; case and accents do not count. Rows as :meth:`item`."""
        check_length(k)
        return self._shown(self._file.details.search(text, k))

    def _shown(self, numbers: list[int]) -> list[dict[str, Any]]:
        ids, details = self._file.ids(np.array(numbers, dtype=np.int64)), self._file.details.of(numbers)
        return [{"item": item, **more} for item, more in zip(ids, details, strict=True)]

    def describe(self, details: Iterable[Details]) -> tuple[int, int]:
        """Store titles, pictures and attributes, as :func:`perfedrec.data.details.read_details` reads them, in place
        of those that the same items have. Returns for how many items, and how many are not in the catalogue.

        Raises :class:`~perfedrec.DataError` where the catalogue has none of the items.
        """
        found = list(details)
        known, others = self._file.describe(found)
        if not known:
            raise DataError(
                f"none of the {others} items is in the catalogue of {self.path}; expected ids such as "
                f"{self._file.ids(np.zeros(1, dtype=np.int64))[0]}"
            )
        return known, others

    # --- users ---

    def users(self) -> list[str]:
        """The users in the file, in the order in which they were added."""
        return self._file.user_names()

    def items_of(self, user: str) -> list[dict[str, Any]]:
        """The items that a user has interacted with, in the order of the catalogue. Rows as :meth:`item`."""
        return self._shown(self._file.own_numbers(user))

    def add(self, user: str, *items: str | int) -> int:
        """Add interactions of a user, who may be new. They are on the disk when this returns. Returns how many of them
        are new.

        The id of a new user has 1 to 256 characters, none of them a control character or a line break.
        """
        return self._file.add_interactions(user, *map(str, items))

    def remove(self, user: str, *items: str | int) -> int:
        """Delete interactions of a user. Returns how many there were. Lists and later rounds are made without them;
        what they have added to earlier rounds stays in sums that are opened."""
        return self._file.remove_interactions(user, *map(str, items))

    def dismiss(self, user: str, *items: str | int) -> int:
        """Never recommend items to a user again. Returns how many of them are newly dismissed. That is neither
        trained on nor sent."""
        return self._file.dismiss(user, *map(str, items))

    def restore(self, user: str, *items: str | int) -> int:
        """Recommend items again after :meth:`dismiss`. Returns how many were dismissed."""
        return self._file.restore(user, *map(str, items))

    def dismissed(self, user: str) -> list[dict[str, Any]]:
        """The items that a user has dismissed. Rows as :meth:`item`."""
        return self._shown(self._file.dismissed_numbers(self._file.key_of(user)).tolist())

    def export(self, user: str) -> dict[str, Any]:
        """Everything that is stored about a user, for JSON."""
        return {
            "user": user,
            **self._file.about(user),
            "items": self.items_of(user),
            "dismissed": self.dismissed(user),
            "journal": self.journal(user),
        }

    def forget(self, user: str) -> str:
        """Delete everything that is stored about a user, and overwrite the deleted data. Returns, in words, what stays
        elsewhere: what the user has added to sums that were opened is in them, and no node can take it out."""
        known, (answers, runs) = self._file.identity(user) >= 0, self._file.journal.shared(user)
        self._file.forget(user)
        with self._lock:
            self._kept.pop(user, None)
        return stays(known, answers, runs)

    # --- the federation ---

    def journal(
        self, user: str | None = None, limit: int | None = None, before: int | None = None
    ) -> list[dict[str, Any]]:
        """What has left this node, newest first: one entry for each answer, or each secure sum.

        With a ``user``, only answers that this user is in. ``limit`` is the most entries, and ``before`` the number of
        an entry that they come before. Each has ``entry`` (its number), ``time`` (seconds since 1970), ``times`` (how
        often a refusal was repeated), ``coordinator`` (address), ``run``, ``phase``, ``round``, ``stage`` (of a secure
        sum), ``sent`` and ``received`` (bytes), ``users`` (of this node, how many are in it), ``others`` (how many
        other nodes are in the same sum; 0: the coordinator saw this node's part alone; ``None``: not known, or no sum),
        ``protection`` (``profile`` and ``statement``), ``epsilon`` so far ``against`` whom (``None``: no guarantee),
        and ``refused`` (the reason, or ``None``).
        """
        if limit is not None and limit < 1:
            raise ConfigError(f"the limit of the journal is {limit}; expected 1 or more")
        if user is not None:
            self._file.key_of(user)
        return self._file.journal.read(user, limit, before)

    def privacy(self) -> dict[str, Any]:
        """What has left this node: ``answers``, ``refusals``, and bytes ``sent`` and ``received``, in all and for each
        of the ``runs``, newest first, with ``coordinator``, ``first`` and ``last`` (seconds since 1970), and the
        largest ``epsilon`` of a user so far ``against`` whom (``None`` where something in the run has no guarantee)."""
        return self._file.journal.totals()

    def rules(self) -> dict[str, Any]:
        """The rules of this node's owner: ``require`` (the profiles that a run has to satisfy, all of them: that of the
        rules, and that with which ``node run`` was last started), ``chosen`` (that of the rules, or ``None``),
        ``paused`` and ``left``."""
        found = self._file.rules.read()
        return {
            "require": list(found.profiles),
            "chosen": found.require,
            "paused": found.paused,
            "left": found.left,
        }

    def set_rules(self, require: str | None = UNSET, paused: bool = UNSET, left: bool = UNSET) -> dict[str, Any]:
        """Change rules, and return all of them. ``perfedrec node run`` obeys at once.

        ``require`` is the profile whose protection a run has to have at least: none, paper, secure or private, or
        ``None`` for the usual one. A ``paused`` node answers nothing. ``left = False`` takes :meth:`leave` back.
        """
        if require is not UNSET:
            from perfedrec.core.nearest import nearest
            from perfedrec.runs.preset_files import presets

            if require is not None and require not in (known := presets("profiles")):
                near = nearest(require, known)
                raise ConfigError(f"unknown profile {require!r}; expected one of {', '.join(known)}{near}")
            self._file.rules.require(require)
        if paused is not UNSET:
            self._file.rules.pause(bool(paused))
        if left is not UNSET:
            self._file.rules.leave() if left else self._file.rules.come_back()
        return self.rules()

    def key(self) -> str | None:
        """The fingerprint of the key with which ``perfedrec node run`` was last started; ``None`` where it never
        was."""
        return self._file.rules.read().key

    def leave(self) -> None:
        """Leave the federation: the node takes part in no run from now on, and in none of those so far ever again. It
        keeps its model and its lists."""
        self._file.rules.leave()

    def summary(self) -> tuple[int, int | None]:
        """The number of users, and when the model was received (seconds since 1970), or ``None`` without one. It takes
        no time, even with many users."""
        return self._file.summary()

    def status(self) -> dict[str, Any]:
        """What is in the file, in figures: see ``perfedrec node status``."""
        return self._file.status()


def stays(known: bool, answers: int, runs: list[str]) -> str:
    """What stays of a user who is forgotten: whether a federation has known the user by a number, and in how many
    answers of this node, in which runs, something of the user was."""
    number = " The federation knew this user by a number, for which this node answers no more." if known else ""
    if not answers:
        return f"As far as the journal goes back, nothing of this user is in any sum.{number}"
    many = "1 answer" if answers == 1 else f"{answers} answers"
    where = f"the run{'s' if len(runs) > 1 else ''} {', '.join(runs)}"
    return (
        f"{many} of this node in {where} had a part of this user: it stays in the sums that were made of "
        "them, and in the models that were trained from these. Nobody can take it out of "
        "these; only new models can be made without it: by a new run or, where the coordinator has kept what each node "
        "sent in the clear, from the parts of the others (perfedrec federation forget --replay). Copies and backups of "
        "the file stay as well. The journal keeps these answers, without a word about whose parts were in "
        f"them.{number}"
    )
