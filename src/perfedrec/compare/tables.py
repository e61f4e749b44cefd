"""The table of a comparison as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from perfedrec.compare.schema import Results, Spread, SummaryEntry
from perfedrec.core.counted import counted
from perfedrec.core.dotted import flat
from perfedrec.evaluation.ranking import cutoffs_of
from perfedrec.runs.progress import size

METRICS, SAMPLED = ("recall", "ndcg"), ("hr", "ndcg")
FLOOR = "popularity (floor)"


@dataclass(frozen=True)
class Column:
    """A column of the table.

    ``head`` is its name, ``show`` gives the text of a cell, ``brief`` is the name on a terminal (empty: the terminal
    leaves the column out), and ``rank`` gives the number that is compared to find the best cell (``None``: no best).
    """

    head: str
    show: Callable[[SummaryEntry], str]
    brief: str = ""
    rank: Callable[[SummaryEntry], float | None] | None = None


def columns(results: Results) -> list[Column]:
    """All columns for which the results have figures."""
    return [
        Column("method", lambda line: line["label"], "method"),
        *_metric_columns(results),
        *_comparison_columns(results),
        *_target_columns(results),
        Column("uploads a client", _uploads),
        Column("seconds", lambda line: _plain(line.get("seconds"), "{:.1f}"), "seconds"),
        Column("numbers in the stored model (server + clients)", _parameters),
        Column("privacy", _privacy),
        Column("seeds", _seeds),
    ]


def _metric_columns(results: Results) -> list[Column]:
    """Test metrics by full ranking and, where a run has them, among sampled negatives."""
    found, metric, ks = [], results["metric"], lengths(results)
    for name in dict.fromkeys((*(f"{each}@{k}" for k in ks for each in METRICS), metric)):
        brief = name if name in (metric, f"recall@{ks[-1]}") else ""
        found.append(_metric_column("test", name, results["protocol"], brief))
    sampled = [each.get("protocol_sampled") for each in results["summary"] if each.get("test_sampled")]
    if sampled:
        found += [
            _metric_column("test_sampled", name, str(sampled[-1])) for name in (f"{each}@{ks[0]}" for each in SAMPLED)
        ]
    return found


def lengths(results: Results) -> tuple[int, ...]:
    """The lengths of lists, ascending, for which all finished methods have test metrics."""
    known = [set(cutoffs_of(line["test"])) for line in results["summary"] if line.get("test")]
    return tuple(sorted(set.intersection(*known))) if known else cutoffs_of([results["metric"]])


def _metric_column(part: Literal["test", "test_sampled"], name: str, protocol: str, brief: str = "") -> Column:
    def value(line: SummaryEntry) -> Spread | None:
        return line.get(part, {}).get(name)

    def mean(line: SummaryEntry) -> float | None:
        found = value(line)
        return None if found is None else found["mean"]

    return Column(f"{name}, {protocol}", lambda line: with_deviation(value(line)), brief, mean)


def _comparison_columns(results: Results) -> list[Column]:
    if results["reference"] is None:
        return []
    head = f"{results['metric']} over {results['reference']}"
    return [
        Column(head, _difference, "difference"),
        Column("p, adjusted", _p, "adj. p"),
        Column(f"{head}, 95 % interval over users", _interval, "95 % interval"),
    ]


def _target_columns(results: Results) -> list[Column]:
    if results["target"] is None:
        return []
    target = f"validation {results['target']['metric']} {results['target']['value']:g}"
    return [
        Column(f"rounds until {target}", lambda line: _target(line, "rounds", "{:.1f}".format)),
        Column(f"bytes up until {target}", lambda line: _target(line, "bytes_up", size)),
        Column(f"bytes down until {target}", lambda line: _target(line, "bytes_down", size)),
        Column(f"seconds until {target}", lambda line: _target(line, "seconds", "{:.1f}".format)),
    ]


def rows(results: Results, data: str) -> list[SummaryEntry]:
    """The summaries of a data set, and a row for popularity unless popularity is one of the methods."""
    lines = [line for line in results["summary"] if line["data"] == data]
    if any(line["algorithm"] == "popularity" for line in lines):
        return lines
    test: dict[str, Spread] = {
        name: {"mean": value, "sd": None} for name, value in results["data"][data]["popularity"].items()
    }
    return [*lines, {"label": FLOOR, "data": data, "algorithm": "popularity", "test": test}]


def cells(shown: Sequence[Column], lines: Sequence[SummaryEntry]) -> list[list[tuple[str, bool]]]:
    """The texts of the cells row by row, each with whether it is the best of its column."""
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


def fitting(shown: Sequence[Column], lines: Sequence[SummaryEntry], width: int) -> list[Column]:
    """The columns that fit on a terminal of ``width`` characters, taken from the left.

    A column that is too wide is left out, and narrower ones after it may still be taken. The first column is always
    there. Each column takes two characters of space after it, and the table takes one before the first column.
    """
    kept: list[Column] = []
    left = width - 1
    for column in shown:
        needed = max(len(text) for text in (column.brief, *map(column.show, lines))) + 2
        if needed <= left or not kept:
            kept.append(column)
            left -= needed
    return kept


def markdown(results: Results) -> str:
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


def comma_separated(results: Results) -> str:
    """One line for each method and data set; every figure in a column of its own and not rounded."""
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


def _about(results: Results, data: str) -> str:
    about = results["data"][data]
    sizes = f"{about['users']} users, {about['items']} items, {about['interactions']} training interactions."
    return " ".join([sizes, *split_notes(results, data)])


def split_notes(results: Results, data: str) -> list[str]:
    """What the deviations over seeds say of the split of a data set, in sentences; nothing where chance has no part."""
    about, vary = results["data"][data], results.get("vary")
    splits, chance = about.get("splits", 1), about.get("chance")
    if vary and splits > 1:
        return [f"The {len(results['seeds'])} seeds gave {splits} different splits ({vary})."]
    if vary:
        return [f"All seeds gave the same split: {vary} changes nothing here."]
    if chance is None:
        return []
    return [f'{chance[:1].upper()}{chance[1:]}. All seeds have this one split; vary = "data.seed" draws one for each.']


def reference_note(results: Results) -> str:
    """That no method was tested against another, and how to ask for it; empty where it was, or there is one method."""
    if results["reference"] is not None or len({line["label"] for line in results["summary"]}) < 2:
        return ""
    return 'No significance was tested: the file names no reference. reference = "LABEL" tests all others against it.'


def over(results: Results) -> str:
    """What means and deviations are over."""
    named = {"data.seed": "seeds, each with its own split", "data.fold": "folds"}
    return named.get(results.get("vary") or "", "seeds")


def _note(results: Results) -> str:
    note = f"Mean and standard deviation over {over(results)}, test users with held-out items."
    if results["reference"] is not None:
        note += (
            f" Differences to {results['reference']}: each user's metric is averaged over seeds, then the differences "
            "are averaged over users. Paired permutation test; p-values are adjusted after Benjamini and Yekutieli "
            "within a data set."
        )
    return f"{note} {reference_note(results)}".rstrip()


def with_deviation(value: Spread | None) -> str:
    """A mean with its standard deviation, if it has one: not where there is one run, or all have the same value."""
    if value is None:
        return "-"
    return f"{value['mean']:.4f}" + (f" ± {value['sd']:.4f}" if value["sd"] else "")


def _uploads(line: SummaryEntry) -> str:
    found = line.get("uploads_per_client")
    return _plain(found, "{:.1f}") if found and found["mean"] else "-"


def _plain(value: Spread | None, form: str) -> str:
    return "-" if value is None else form.format(value["mean"])


def _difference(line: SummaryEntry) -> str:
    found = line.get("comparison")
    return "-" if not found else f"{found['difference']:+.4f}"


def _interval(line: SummaryEntry) -> str:
    found = line.get("comparison")
    return "-" if not found else f"{found['low']:+.4f}, {found['high']:+.4f}"


def _p(line: SummaryEntry) -> str:
    found = line.get("comparison")
    return "-" if not found else f"{found['p_adjusted']:.4f}"


def _target(
    line: SummaryEntry, name: Literal["rounds", "bytes_up", "bytes_down", "seconds"], form: Callable[[float], str]
) -> str:
    found = line.get("target")
    if not found or not found["reached"]:
        return "-" if not found else "never"
    if name.startswith("bytes") and not found[name]["mean"]:
        return "-"  # a centralised method sends nothing
    some = "" if found["reached"] == found["of"] else f" ({found['reached']} of {counted(found['of'], 'seed')})"
    return form(found[name]["mean"]) + some


def _parameters(line: SummaryEntry) -> str:
    found = line.get("parameters")
    return "-" if not found else f"{found['server']:,} + {found['clients']:,}"


def _privacy(line: SummaryEntry) -> str:
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


def _seeds(line: SummaryEntry) -> str:
    if "n" not in line:
        return "-"
    if line.get("seedless") and line["n"]:
        return "takes no seed"
    return str(line["n"]) + (f" ({line['missing']} missing)" if line["missing"] else "")
