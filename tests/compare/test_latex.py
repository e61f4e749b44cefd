"""The table for a paper: names, marks and figures, and that LaTeX's special characters are escaped."""

import re
from typing import Any

from perfedrec.compare.latex import latex
from perfedrec.methods.registry import METHODS, TITLES, title

NAMES = ("recall@10", "ndcg@10", "recall@20", "ndcg@20")


def line(label: str, algorithm: str, value: float, sd: float | None, p: float | None = None, **more: Any) -> Any:
    test = {name: {"mean": value + place / 100, "sd": sd} for place, name in enumerate(NAMES)}
    comparison = None if p is None else {"difference": -0.01, "low": -0.02, "high": 0.0, "p": p, "p_adjusted": p}
    found = {"label": label, "data": "my_data", "algorithm": algorithm, "test": test, "comparison": comparison}
    return found | {"n": 3, "missing": 0} | more


def results(*lines: Any) -> Any:
    popularity = dict.fromkeys(NAMES, 0.01) | {"users": 5.0}
    sizes = {"users": 5224, "items": 7597, "interactions": 112576, "popularity": popularity}
    return {
        "reference": "perfedrec_pp",
        "target": None,
        "metric": "ndcg@20",
        "protocol": "full ranking",
        "data": {"my_data": sizes},
        "summary": list(lines),
    }


def rows(text: str) -> dict[str, list[str]]:
    body = re.search(r"\\midrule\n(.*?)\\bottomrule", text, re.S)
    assert body is not None
    split = [each.removesuffix(r" \\").split(" & ") for each in body[1].strip().splitlines()]
    return {cells[0]: cells[1:] for cells in split}


def test_the_best_is_bold_the_second_underlined_and_a_star_marks_a_difference() -> None:
    text = latex(
        results(
            line("perfedrec_pp", "perfedrec_pp", 0.07, 0.001),
            line("lightgcn 50% of_it", "lightgcn", 0.06, 0.002, p=0.01),
            line("mf", "mf", 0.05, None, p=0.2),
            line("mf again", "mf", 0.06, 0.002, p=0.2),
        )
    )
    found = rows(text)
    assert list(found) == ["PerFedRec++", r"LightGCN 50\% of\_it", "MF", "MF again", "Popularity"]
    assert found["PerFedRec++"][0] == r"\textbf{.0700}{\tiny$\pm$.0010}"
    assert found["PerFedRec++"][3] == r"\textbf{.1000}{\tiny$\pm$.0010}"
    assert found[r"LightGCN 50\% of\_it"][3] == r"\underline{.0900}{\tiny$\pm$.0020}$^{*}$"
    assert found["MF again"][3] == r"\underline{.0900}{\tiny$\pm$.0020}"  # equal, and no difference shown
    assert found["MF"] == [".0500", ".0600", ".0700", ".0800"]
    assert r"Method & R@10 & N@10 & R@20 & N@20 \\" in text
    assert r"\label{tab:my-data}" in text
    (caption,) = re.findall(r"\\caption\{(.*)\}", text)
    assert caption.startswith(r"Test results on my\_data (5,224 users, 7,597 items, 112,576 training interactions)")
    assert "Means over 3 seeds" in caption
    assert "*: differs from PerFedRec++ (paired permutation test over users, p $<$ 0.05" in caption
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 1


def test_figures_among_sampled_negatives_have_a_table_of_their_own() -> None:
    sampled = {name: {"mean": 0.5, "sd": None} for name in ("hr@10", "ndcg@10")}
    among = {"test_sampled": sampled, "protocol_sampled": "30 to 37 sampled negatives"}
    text = latex(results(line("mf", "mf", 0.05, None, **among), line("fedmf", "fedmf", 0.04, None)))
    assert text.count(r"\begin{table}") == 2
    second = text[text.rindex(r"\begin{table}") :]
    assert "30 to 37 sampled negatives" in second
    assert r"\label{tab:my-data-sampled}" in second
    assert rows(second) == {"MF": [".5000", ".5000"]}


def test_every_method_has_a_title_and_labels_keep_what_they_add() -> None:
    assert TITLES.keys() == METHODS.keys()
    assert len(set(TITLES.values())) == len(TITLES)
    assert title("perfedrec_pp n_clients_per_round=32") == "PerFedRec++ n_clients_per_round=32"
    assert title("my method") == "my method"
