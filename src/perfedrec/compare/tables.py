"""The table of a comparison as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perfedrec.runs.config import flat
from perfedrec.runs.progress import size

METRICS = ("recall@10", "ndcg@10", "recall@20", "ndcg@20")
SAMPLED = ("hr@10", "ndcg@10")
FLOOR = "popularity (floor)"


@dataclass(frozen=True)
class Column:
    """A column: its head, what it shows of a summary, what is best in it, and its head on a terminal (none: left
    out there)."""

    head: str
    show: Callable[[Mapping[str, Any]], str]
    brief: str = ""
    rank: Callable[[Mapping[str, Any]], float | None] | None = None


def columns(results: Mapping[str, Any]) -> list[Column]:
    """The columns that the results have something for."""
    lines, metric = results["summary"], results["metric"]
    found = [Column("method", lambda line: str(line["label"]), "method")]
    names = dict.fromkeys((*METRICS, metric))
    protocols = {"test": results["protocol"]}
    for each in lines:
        if each.get("test_sampled"):
            protocols["test_sampled"] = each["protocol_sampled"]
    for part, protocol in protocols.items():
        for name in names if part == "test" else SAMPLED:
            found.append(
                Column(
                    f"{name}, {protocol}",
                    lambda line, part=part, name=name: with_deviation(line.get(part, {}).get(name)),  # type: ignore[misc]
                    name if part == "test" and name in (metric, "recall@20") else "",
                    lambda line, part=part, name=name: line.get(part, {}).get(name, {}).get("mean"),  # type: ignore[misc]
                )
            )
    if results["reference"] is not None:
        head = f"{metric} over {results['reference']}"
        found += [Column(head, _difference, "difference"), Column("p, adjusted", _p, "adj. p")]
        found.append(Column(f"{head}, 95 % interval over users", _interval, "95 % interval"))
    if results["target"] is not None:
        target = f"validation {results['target']['metric']} {results['target']['value']:g}"
        found += [
            Column(f"rounds until {target}", lambda line: _target(line, "rounds", "{:.1f}".format)),
            Column(f"bytes up until {target}", lambda line: _target(line, "bytes_up", size)),
            Column(f"bytes down until {target}", lambda line: _target(line, "bytes_down", size)),
            Column(f"seconds until {target}", lambda line: _target(line, "seconds", "{:.1f}".format)),
        ]
    found += [
        Column("uploads a client", _uploads),
        Column("seconds", lambda line: _plain(line.get("seconds"), "{:.1f}"), "seconds"),
        Column("parameters (server + clients)", _parameters),
        Column("privacy", _privacy),
        Column("seeds", _seeds),
    ]
    return found


def rows(results: Mapping[str, Any], data: str) -> list[dict[str, Any]]:
    """The summaries of a data set, with popularity where it is no method of its own."""
    lines = [line for line in results["summary"] if line["data"] == data]
    if any(line["algorithm"] == "popularity" for line in lines):
        return lines
    test = {name: {"mean": value, "sd": None} for name, value in results["data"][data]["popularity"].items()}
    return [*lines, {"label": FLOOR, "data": data, "algorithm": "popularity", "test": test}]


def cells(shown: Sequence[Column], lines: Sequence[Mapping[str, Any]]) -> list[list[tuple[str, bool]]]:
    """Texts row by row, each with whether it is the best of its column."""
    best = {}
    for column in shown:
        values = [value for line in lines if column.rank and (value := column.rank(line)) is not None]
        best[column.head] = max(values, default=None)
    return [
        [
            (
                column.show(line),
                column.rank is not None and best[column.head] is not None and column.rank(line) == best[column.head],
            )
            for column in shown
        ]
        for line in lines
    ]


def fitting(shown: Sequence[Column], lines: Sequence[Mapping[str, Any]], width: int) -> list[Column]:
    """The columns, from the left, that a terminal of so many characters has room for, without those that are too wide.

    The first one is always there. Two characters are after each column, and one is before all.
    """
    kept: list[Column] = []
    left = width - 1
    for column in shown:
        needed = max(len(text) for text in (column.brief, *map(column.show, lines))) + 2
        if needed <= left or not kept:
            kept.append(column)
            left -= needed
    return kept


def markdown(results: Mapping[str, Any]) -> str:
    """A table for each data set."""
    shown, parts = columns(results), []
    for data in results["data"]:
        parts += [f"## {data}", "", _about(results, data), ""]
        parts += [
            "| " + " | ".join(column.head for column in shown) + " |",
            "| " + " | ".join("---" for _ in shown) + " |",
        ]
        for row in cells(shown, rows(results, data)):
            parts.append("| " + " | ".join(f"**{text}**" if best else text for text, best in row) + " |")
        parts.append("")
    return "\n".join([*parts, _note(results), ""])


def latex(results: Mapping[str, Any]) -> str:
    """Metrics, difference and p-values as tabulars of the package booktabs; a page has no room for the rest."""
    shown, parts = [column for column in columns(results) if column.rank or column.brief], []
    for data in results["data"]:
        parts += [
            f"% {data}: {_about(results, data)}",
            r"\begin{tabular}{l" + "r" * (len(shown) - 1) + "}",
            r"\toprule",
        ]
        parts += [" & ".join(_escaped(column.head) for column in shown) + r" \\", r"\midrule"]
        for row in cells(shown, rows(results, data)):
            texts = [rf"\textbf{{{_escaped(text)}}}" if best else _escaped(text) for text, best in row]
            parts.append(" & ".join(texts) + r" \\")
        parts += [r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join([*parts, f"% {_note(results)}", ""])


def comma_separated(results: Mapping[str, Any]) -> str:
    """One line a method and data set, every figure in a column of its own and unrounded."""
    lines = [
        flat({key: value for key, value in line.items() if key not in ("comparison", "target") or value})
        for data in results["data"]
        for line in rows(results, data)
    ]
    heads = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _about(results: Mapping[str, Any], data: str) -> str:
    about = results["data"][data]
    return f"{about['users']} users, {about['items']} items, {about['interactions']} training interactions."


def _note(results: Mapping[str, Any]) -> str:
    note = "Mean and standard deviation over seeds, test users with held-out items."
    if results["reference"] is not None:
        note += (
            f" Differences to {results['reference']}: mean over users of their means over seeds; paired permutation "
            "test, p-values adjusted after Benjamini and Yekutieli within a data set."
        )
    return note


def with_deviation(value: Mapping[str, Any] | None) -> str:
    """A mean with its standard deviation, where there is one."""
    if value is None:
        return "-"
    return f"{value['mean']:.4f}" + ("" if value["sd"] is None else f" ± {value['sd']:.4f}")


def _uploads(line: Mapping[str, Any]) -> str:
    found = line.get("uploads_per_client")
    return _plain(found, "{:.1f}") if found and found["mean"] else "-"


def _plain(value: Mapping[str, Any] | None, form: str) -> str:
    return "-" if value is None else form.format(value["mean"])


def _difference(line: Mapping[str, Any]) -> str:
    found = line.get("comparison")
    return "-" if not found else f"{found['difference']:+.4f}"


def _interval(line: Mapping[str, Any]) -> str:
    found = line.get("comparison")
    return "-" if not found else f"{found['low']:+.4f}, {found['high']:+.4f}"


def _p(line: Mapping[str, Any]) -> str:
    found = line.get("comparison")
    return "-" if not found else f"{found['p_adjusted']:.4f}"


def _target(line: Mapping[str, Any], name: str, form: Callable[[float], str]) -> str:
    found = line.get("target")
    if not found or not found["reached"]:
        return "-" if not found else "never"
    if name.startswith("bytes") and not found[name]["mean"]:
        return "-"  # nothing is sent to a centralised method
    some = "" if found["reached"] == found["of"] else f" ({found['reached']} of {found['of']} seeds)"
    return form(found[name]["mean"]) + some


def _parameters(line: Mapping[str, Any]) -> str:
    found = line.get("parameters")
    return "-" if not found else f"{found['server']:,} + {found['clients']:,}"


def _privacy(line: Mapping[str, Any]) -> str:
    found = line.get("privacy")
    if not found:
        return "-"
    if found["epsilon_coordinator"] is not None:
        guarantee = f"epsilon {found['epsilon_coordinator']:.3g}"
    elif found["claim"].startswith("NONE: a centralised"):
        guarantee = "centralised"
    else:
        guarantee = "no guarantee"
    return guarantee if found["profile"] is None else f"{found['profile']}: {guarantee}"


def _seeds(line: Mapping[str, Any]) -> str:
    if "n" not in line:
        return "-"
    return str(line["n"]) + (f" ({line['missing']} missing)" if line["missing"] else "")


def _escaped(text: str) -> str:
    for special in "\\&%$#_{}":
        text = text.replace(special, {"\\": r"\textbackslash "}.get(special, "\\" + special))
    text = re.sub(r"(?<![\w.])-(?=\d)", "$-$", text)  # a minus, not a hyphen
    return text.replace("±", r"$\pm$").replace("~", r"\textasciitilde ").replace("^", r"\textasciicircum ")
