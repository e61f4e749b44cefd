"""What the pages of a node show, made of what the class ``Node`` tells: rows as the templates need them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import urlencode
from zlib import crc32

from markupsafe import Markup

from perfedrec.web.language import Texts

Row = Mapping[str, Any]

MODELS = ("global", "cluster", "local", "pretrained", "neighbourhood")
"""Parts of a score in the order in which they are shown, each in a colour of its own; there can be others."""

FIXED = frozenset({"item", "rank", "score", "moved", "title", "picture", "attributes", "because"})
"""Keys of a row that are no part of its score."""

NAMED = 3
"""People whom a note names; others are counted."""

TINTS = 6
"""Colours of tiles in place of pictures."""

ARTICLES = frozenset(
    {"a", "an", "the", "der", "die", "das", "ein", "eine", "le", "la", "les", "un", "une", "el", "los", "las"}
)
"""First words that a tile's letter does not come from."""


def address(path: str, **values: Any) -> str:
    """An address of these pages; values that are ``None`` or empty are left out."""
    query = urlencode({name: value for name, value in values.items() if value not in (None, "")})
    return f"{path}?{query}" if query else path


def card(row: Row) -> dict[str, Any]:
    """What is shown of an item wherever it stands: its title, its picture or the letter in place of it, and its
    attributes as ``genres``."""
    item = str(row["item"])
    title = str(row.get("title") or item)
    words = [word for word in title.split() if word.casefold() not in ARTICLES] or [title]
    letter = next((each for each in words[0] if each.isalnum()), "·").upper()
    return {
        "item": item,
        "title": title,
        "picture": address("/picture", item=item) if row.get("picture") else None,
        "letter": letter,
        "tint": crc32(item.encode()) % TINTS + 1,
        "genres": [str(value) for value in dict(row.get("attributes") or {}).values() if value],
    }


def shares(row: Row) -> list[tuple[str, float]]:
    """The parts of a score as shares of 100, in the order of :data:`MODELS`. A part that speaks against the item counts
    by its size, because the order of the list depends on it as well; parts below half a percent are left out."""
    parts = {name: abs(float(value)) for name, value in row.items() if name not in FIXED}
    total = sum(parts.values())
    if not total:
        return []
    order = [*(name for name in MODELS if name in parts), *(name for name in parts if name not in MODELS)]
    found = [(name, 100 * parts[name] / total) for name in order]
    return [(name, share) for name, share in found if share >= 0.5]


def suggestion(row: Row, t: Texts) -> dict[str, Any]:
    """A row of a list: a card, why the item stands there, and where its score comes from."""
    own = row.get("because") or ()
    why = [Markup("<cite>{}</cite>").format(each.get("title") or each["item"]) for each in own]
    bars, start = [], 0.0
    for name, share in shares(row):
        number = MODELS.index(name) + 1 if name in MODELS else len(MODELS)
        bars.append({"model": number, "start": start, "width": share})
        start += share
    words = [t("list.part", name=model_name(name, t), percent=round(share)) for name, share in shares(row)]
    said = t("list.share", parts=", ".join(words)) if words else ""
    return {**card(row), "because": t("list.because", titles=t.listed(why)) if why else "", "bars": bars, "share": said}


def legend(rows: Iterable[Row], t: Texts) -> list[tuple[int, str]]:
    """The colours in the bars of a list, and the names of the models that they stand for."""
    found = dict.fromkeys(name for row in rows for name, _ in shares(row))
    known = [name for name in MODELS if name in found]
    names = [(MODELS.index(name) + 1, model_name(name, t)) for name in known]
    return names if len(known) == len(found) else [*names, (len(MODELS), model_name("other", t))]


def model_name(name: str, t: Texts) -> str:
    """What people call a model whose part of a score has this ``name``."""
    return t(f"model.{name}") if t.has(f"model.{name}") else t("model.other")


def fitting(rows: Sequence[Row], query: str) -> list[Row]:
    """The rows whose id, title or attributes have all the words of a ``query``."""
    words = query.casefold().split()

    def text(row: Row) -> str:
        return " ".join(map(str, (row["item"], row.get("title") or "", *dict(row.get("attributes") or {}).values())))

    return [row for row in rows if all(word in text(row).casefold() for word in words)]


def as_csv(user: str, rows: Iterable[Row]) -> str:
    """What a user has, as a table that a spreadsheet opens and ``perfedrec node import`` reads."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["user", "item", "title"])
    table.writerows([user, row["item"], row.get("title") or ""] for row in rows)
    return text.getvalue()


def journal(rows: Iterable[Row], t: Texts) -> list[dict[str, Any]]:
    """The entries of the journal in plain words, newest first: those of one day, run and phase together, with the exact
    figures of each."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        day = datetime.fromtimestamp(row["time"]).date()
        kind = (day, *(row.get(name) for name in ("coordinator", "run", "phase", "refused")), statement(row))
        groups.setdefault(kind, []).append(row)
    return [_group(each, t) for each in groups.values()]


def _group(rows: list[Row], t: Texts) -> dict[str, Any]:
    newest, oldest = rows[0], rows[-1]
    refused, phase = newest.get("refused"), str(newest.get("phase") or "")
    known = t.has(f"phase.{phase}") and phase != "other"
    sent, received = (sum(row[name] for row in rows) for name in ("sent", "received"))
    went = t("left.went" if sent else "left.nothing_went", sent=t.bytes(sent), received=t.bytes(received))
    times = [t.clock(each["time"]) for each in (oldest, newest)]
    return {
        "first": oldest["entry"],
        "day": t.day(newest["time"]),
        "clock": " – ".join(dict.fromkeys(times)),
        "title": t("left.said_refused") if refused else t(f"phase.{phase if known else 'other'}", phase=phase),
        "refused": refused,
        "words": _refusal(str(refused), t) if refused else f"{went} {_mixed(rows, t)}".strip(),
        "times": sum(row.get("times") or 1 for row in rows),
        "statement": statement(newest),
        "facts": [(name, value) for name, value in _facts(newest, t) if value],
        "rows": [_figures(row, t) for row in rows],
    }


def _refusal(reason: str, t: Texts) -> str:
    """Why nothing was answered, in plain words."""
    kind = reason.partition(":")[0]
    return t(f"refused.{kind if t.has(f'refused.{kind}') else 'other'}")


def _mixed(rows: list[Row], t: Texts) -> str:
    """With how many other devices the answers were summed; empty where there was no sum."""
    found = [row.get("others") for row in rows]
    if all(row.get("others") is None and row.get("stage") is None for row in rows):
        return ""
    counts = [each for each in found if each is not None]
    if len(counts) < len(found):
        return t("left.unknown_others")
    least, most = min(counts), max(counts)
    if least == most:
        return t("left.mixed", others=t("count.devices", n=most)) if most else t("left.alone")
    return t("left.mixed", others=t("count.devices", n=f"{least}–{most}"))


def _figures(row: Row, t: Texts) -> dict[str, str]:
    when = f"{t.clock(row['time'])}:{datetime.fromtimestamp(row['time']):%S}"
    return {"when": when, **{name: _shown(row.get(name), t) for name in ("round", "sent", "received", "others")}}


def statement(row: Row) -> str:
    """The exact statement of the protection of an entry: its profile, and what it guarantees."""
    protection = row.get("protection")
    if isinstance(protection, Mapping):
        return ": ".join(str(protection[name]) for name in ("profile", "statement") if protection.get(name))
    return str(protection or "")


def _facts(row: Row, t: Texts) -> Iterable[tuple[str, str]]:
    for name in ("coordinator", "run", "phase", "stage", "users"):
        yield t(f"left.{name}"), _shown(row.get(name), t) if row.get(name) is not None else ""
    if row.get("epsilon") is not None:
        yield t("left.epsilon_so_far"), t("left.against", epsilon=row["epsilon"], who=row.get("against") or "?")
    if row.get("refused"):
        yield t("left.reason"), str(row["refused"])


def _shown(value: Any, t: Texts) -> str:
    return t("left.not_known") if value is None else t.number(value)


def totals(privacy: Mapping[str, Any], t: Texts) -> list[tuple[str, str, str]]:
    """What has left the node in all: names, figures, and notes."""
    left = t("left.sent_note", questions=t("count.questions", n=privacy["answers"]))
    found = [
        (t("left.sent"), t.bytes(privacy["sent"]), left),
        (t("left.received"), t.bytes(privacy["received"]), t("left.received_note")),
    ]
    if privacy["refusals"]:
        found.append((t("left.refused"), t.number(privacy["refusals"]), t("left.refused_note")))
    runs = [run for run in privacy["runs"] if run["answers"]]
    if not runs:
        return found
    spent = [run["epsilon"] for run in runs]
    if None in spent:
        return [*found, (t("left.epsilon"), t("left.epsilon_none"), t("left.epsilon_none_note"))]
    who = t.listed(dict.fromkeys(str(run["against"]) for run in runs))
    return [*found, (t("left.epsilon"), t.number(float(sum(spent))), t("left.epsilon_note", who=who))]


UNDO = {"added": "remove", "removed": "add", "dismissed": "restore", "restored": "dismiss"}
"""What takes a change back."""


def note(query: Mapping[str, str], title_of: Callable[[str], str], t: Texts) -> dict[str, Any] | None:
    """The note about the change that was just made, as the ``query`` of an address tells it; and how to undo it."""
    done, of = query.get("done", ""), query.get("of", "")
    if done in UNDO:
        return {"text": t(f"done.{done}", title=title_of(of)), "undo": UNDO[done], "item": of}
    if done == "imported":
        numbers = [int(each) if each.isdecimal() else 0 for each in of[:60].split("-")]
        things, people, skipped, new = (*numbers, 0, 0, 0, 0)[:4]
        named = query.get("whose", "").split("\n")[:NAMED]
        whose = [*named, t("count.more_people", n=people - len(named))] if people > len(named) else named
        counted = {"things": t("count.things", n=things), "people": t.listed(whose)}
        text = t("done.imported", **counted) if things else t("done.nothing_new")
        text += " " + t("done.new_people", people=t("count.people", n=new)) if new else ""
        text += " " + t("done.left_out", things=t("count.things", n=skipped)) if skipped else ""
        return {"text": text, "undo": None}
    if done in ("paused", "resumed", "rule_kept", "departed", "back"):
        return {"text": t(f"done.{done}"), "undo": None}
    return {"text": t("done.gone", name=of), "undo": None} if done == "gone" else None
