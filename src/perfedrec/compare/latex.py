"""The table of a comparison for a paper: LaTeX with the package booktabs, narrow enough for one column."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from perfedrec.compare.schema import Results, Spread, SummaryEntry
from perfedrec.compare.tables import FLOOR, METRICS, SAMPLED, lengths, rows
from perfedrec.methods.registry import title

SHORT = {"recall": "R", "ndcg": "N", "hr": "HR", "mrr": "MRR", "precision": "P"}
"""Names of metrics in the head of a table; its caption explains them."""

LONG = {"recall": "recall", "ndcg": "NDCG", "hr": "hit rate", "mrr": "MRR", "precision": "precision"}

ALPHA = 0.05

Part = Literal["test", "test_sampled"]


def latex(results: Results) -> str:
    """For each data set a table of test metrics, and one of those among sampled negatives, if there are any.

    Methods have the names that papers write. The best mean of a column is bold, the second best underlined; equal means
    are marked alike. A star marks the compared metric of a method that differs from the reference. ``table.md`` and
    ``table.csv`` have the other figures: differences, p-values, bytes, seconds.
    """
    parts = ["% needs \\usepackage{booktabs}"]
    for data in results["data"]:
        lines, ks = rows(results, data), lengths(results)
        names = list(dict.fromkeys((*(f"{name}@{k}" for k in ks for name in METRICS), results["metric"])))
        parts += _table(results, data, lines, "test", names)
        among = [line for line in lines if line.get("test_sampled")]
        if among:
            parts += _table(results, data, among, "test_sampled", [f"{name}@{ks[0]}" for name in SAMPLED])
    return "\n".join([*parts, ""])


def _table(results: Results, data: str, lines: Sequence[SummaryEntry], part: Part, names: Sequence[str]) -> list[str]:
    marks = {name: _marks([_mean(line, part, name) for line in lines]) for name in names}
    body = []
    for place, line in enumerate(lines):
        cells = [_figure(line.get(part, {}).get(name), marks[name][place]) for name in names]
        if part == "test" and results["metric"] in names and _differs(line):
            cells[names.index(results["metric"])] += "$^{*}$"
        label = "popularity" if line["label"] == FLOOR else line["label"]
        body.append(" & ".join([_escaped(title(label)), *cells]) + r" \\")
    label = re.sub(r"[^a-zA-Z0-9]+", "-", data) + ("-sampled" if part == "test_sampled" else "")
    return [
        "",
        r"\begin{table}",
        r"\centering\small",
        r"\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{_escaped(_caption(results, data, lines, part, names))}}}",
        rf"\label{{tab:{label}}}",
        r"\begin{tabular}{l" + "r" * len(names) + "}",
        r"\toprule",
        " & ".join(["Method", *map(_head, names)]) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def _caption(results: Results, data: str, lines: Sequence[SummaryEntry], part: Part, names: Sequence[str]) -> str:
    about, seeds = results["data"][data], max((line.get("n", 0) for line in lines), default=0)
    protocol = results["protocol"]
    if part == "test_sampled":
        protocol = f"{next(line['protocol_sampled'] for line in lines if line.get('protocol_sampled'))}"
    kinds = dict.fromkeys(name.partition("@")[0] for name in names)
    text = (
        f"Test results on {data} ({about['users']:,} users, {about['items']:,} items, {about['interactions']:,} "
        f"training interactions), {protocol}. " + ", ".join(f"{SHORT[kind]}: {LONG[kind]}" for kind in kinds) + "."
    )
    if seeds > 1:
        text += f" Means over {seeds} seeds, with standard deviations."
    text += " Best in bold, second best underlined."
    if part == "test" and any(map(_differs, lines)):
        text += (
            f" *: differs from {title(str(results['reference']))} (paired permutation test over users, p < {ALPHA:g} "
            "after Benjamini and Yekutieli)."
        )
    return text


def _head(name: str) -> str:
    kind, _, k = name.partition("@")
    return f"{SHORT[kind]}@{k}"


def _mean(line: SummaryEntry, part: Part, name: str) -> float | None:
    found = line.get(part, {}).get(name)
    return None if found is None else found["mean"]


def _marks(means: Sequence[float | None]) -> list[str]:
    """The LaTeX command of each mean: that of the best, that of the second best, or none."""
    known = sorted({mean for mean in means if mean is not None}, reverse=True)
    commands = dict(zip(known, (r"\textbf", r"\underline"), strict=False)) if len(known) > 1 else {}
    return ["" if mean is None else commands.get(mean, "") for mean in means]


def _figure(value: Spread | None, mark: str) -> str:
    """A mean with its deviation in small type; values below 1 without the zero before the point, as papers write."""
    if value is None:
        return "--"
    mean = _short(value["mean"])
    text = f"{mark}{{{mean}}}" if mark else mean
    return text if value["sd"] is None else rf"{text}{{\tiny$\pm${_short(value['sd'])}}}"


def _short(value: float) -> str:
    return f"{value:.4f}".removeprefix("0") if value < 1 else f"{value:.4f}"


def _differs(line: SummaryEntry) -> bool:
    found = line.get("comparison")
    return bool(found) and found["p_adjusted"] < ALPHA  # type: ignore[index]


def _escaped(text: str) -> str:
    for special in "\\&%$#_{}":
        text = text.replace(special, {"\\": r"\textbackslash "}.get(special, "\\" + special))
    text = re.sub(r"(?<![\w.])-(?=\d)", "$-$", text)  # a minus, not a hyphen
    text = text.replace("~", r"\textasciitilde ").replace("^", r"\textasciicircum ").replace("<", "$<$")
    return text.replace("±", r"$\pm$").replace(">", "$>$")
