"""Reports of comparisons, as text and in a real browser."""

import csv
import io
import json
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from playwright.sync_api import Browser
from tests.report.tab import AXIS, MARKS, Tab, rows_of, same_up_to_scale, text_of

from perfedrec.core.errors import CheckpointError
from perfedrec.methods.registry import title
from perfedrec.report import write_report
from perfedrec.report.bench_sweep import sweep_charts
from perfedrec.report.statistics import mean_of
from perfedrec.runs.folder import RunFolder

LABELS = ("LightGCN", "FedMF", "MF embedding_dim=4", "MF embedding_dim=8", "MF embedding_dim=64", "ItemKNN")


@pytest.fixture(scope="module")
def results(bench_folder: Path) -> Any:
    """The results with the names that a reader sees."""
    found = json.loads((bench_folder / "results.json").read_text())
    for each in (*found["summary"], *found["cells"]):
        each["label"] = title(each["label"])
    return found


@pytest.fixture(scope="module")
def tab(browser: Browser, bench_report: Path) -> Iterator[Tab]:
    opened = Tab(browser, bench_report, viewport={"width": 1100, "height": 900}, offline=True)
    yield opened
    opened.context.close()


def mean(results: Any, label: str, metric: str = "recall@20") -> float:
    found = next(each for each in results["summary"] if each["label"] == label)
    return float(found["test"][metric]["mean"])


def test_the_table_has_mean_deviation_interval_and_verdict_of_every_method(
    bench_folder: Path, bench_report: Path, results: Any
) -> None:
    rows = rows_of(bench_report, "Test metrics on planted")
    differences = rows_of(bench_report, "Differences in test Recall@20, full ranking")
    assert list(rows) == [*LABELS, "popularity (floor)"]
    highest = max(mean(results, label) for label in LABELS)  # two methods may share it
    for each in results["summary"]:
        row, found, figures = rows[each["label"]], each["comparison"], each["test"]["recall@20"]
        sd = "" if figures["sd"] is None else f" ± {figures['sd']:.4f}"
        assert row["recall@20, full ranking"] == f"{figures['mean']:.4f}{sd}"
        bold = f"<strong>{figures['mean']:.4f}{sd}</strong>" in bench_report.read_text()
        assert bold == (figures["mean"] == highest)
        frames = [
            pl.read_parquet(bench_folder / cell["folder"] / "test_users.parquet", columns=["user", "recall@20"])
            for cell in results["cells"]
            if cell["label"] == each["label"] and cell["finished"]
        ]
        by_user = pl.concat(frames).group_by("user", maintain_order=True).mean()["recall@20"]
        assert row["Recall@20, 95 % interval over users"] == mean_of(by_user.to_numpy()).interval()
        verdict = row["against LightGCN"]
        if found is None:
            assert (verdict, row["p, adjusted"]) == ("the reference", "none")
            continue
        sure = found["p_adjusted"] < 0.05
        assert verdict == ("no difference shown" if not sure else "better" if found["difference"] > 0 else "worse")
        assert row["p, adjusted"] == f"{found['p_adjusted']:.4f}"
        apart = differences[each["label"]]
        assert apart["against LightGCN"] == verdict
        assert [apart[name] for name in ("difference", "95 % from", "to")] == [
            f"{found[key]:+.4f}" for key in ("difference", "low", "high")
        ]
    verdicts = {row["against LightGCN"] for row in rows.values()}
    assert len(verdicts - {"none", "the reference"}) > 1  # at least two different verdicts occur


def test_runs_that_have_not_finished_are_listed(bench_report: Path) -> None:
    text = text_of(bench_report)
    assert "10 of 11" in text
    assert "FedMF planted 1 stopped by a test" in text


def test_every_chart_is_drawn_without_errors(bench_report: Path, tab: Tab) -> None:
    assert tab.errors == []
    assert tab.requests == [bench_report.as_uri()]
    names = tab.look("() => [...document.querySelectorAll('.chart')].map(chart => chart.id)")
    assert names == [f"data-0-{name}" for name in ("accuracy", "difference", "curves", "cost", "sweep-0")]
    for name in names:
        drawn = "name => document.querySelectorAll(`#${name} .scatterlayer path`).length"
        assert tab.look(drawn, name) > 0, name
        assert tab.look(AXIS, [name, "x"]), name
    assert tab.look("() => [...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")


def test_means_and_differences_are_drawn_at_their_values(tab: Tab, results: Any) -> None:
    ranked = sorted(LABELS, key=lambda label: mean(results, label))
    floor = results["data"]["planted"]["popularity"]["recall@20"]
    seeds, means = tab.look(MARKS, "data-0-accuracy")
    assert len(seeds) == 10
    drawn = tab.look("() => document.getElementById('data-0-accuracy').data[1]")
    values = [floor if label.startswith("popularity") else mean(results, label) for label in drawn["y"]]
    assert [label for label in drawn["y"] if not label.startswith("popularity")] == ranked
    assert same_up_to_scale([x for x, _ in means], values)
    assert [y for _, y in means] == sorted((y for _, y in means), reverse=True)  # the best method is at the top

    compared = {each["label"]: each["comparison"] for each in results["summary"] if each["comparison"]}
    traces = tab.look("() => document.getElementById('data-0-difference').data.map(trace => trace.y)")
    places = tab.look(MARKS, "data-0-difference")
    for labels, sure in zip(traces, (True, False), strict=True):
        assert all((compared[label]["p_adjusted"] < 0.05) == sure for label in labels)
    assert sorted(traces[0] + traces[1]) == sorted(compared)
    marks = [x for trace in places for x, _ in trace]
    assert same_up_to_scale(marks, [compared[label]["difference"] for label in traces[0] + traces[1]])


def test_curves_are_means_over_seeds(bench_folder: Path, tab: Tab, results: Any) -> None:
    lines = {
        trace["name"]: trace
        for trace in tab.look("() => document.getElementById('data-0-curves').data")
        if trace.get("showlegend") is not False
    }
    followed = [label for label in LABELS if label != "ItemKNN"]  # which is fitted in one step and has no curve
    assert list(lines) == sorted(followed, key=lambda label: -mean(results, label))
    for label in ("LightGCN", "FedMF"):
        histories = [
            [entry for entry in RunFolder(bench_folder / cell["folder"]).history() if entry.valid is not None]
            for cell in results["cells"]
            if cell["label"] == label and cell["finished"]
        ]
        means = np.mean([[entry.valid["recall@20"] for entry in each] for each in histories], axis=0)
        assert lines[label]["y"] == pytest.approx(means.tolist(), rel=1e-4)
        assert lines[label]["x"] == [entry.report.round + 1 for entry in histories[0]]
    strokes = tab.look("() => [...document.querySelectorAll('#data-0-curves .js-line')].map(line => line.style.stroke)")
    assert len(set(strokes)) >= 5


def test_cost_and_sweep_charts_show_the_values_of_the_runs(tab: Tab, results: Any) -> None:
    tab.page.locator("#data-0-cost").locator("xpath=ancestor::figure").get_by_label("seconds").check()
    title = "() => document.querySelector('#data-0-cost .xtitle').textContent.startsWith('processor seconds')"
    tab.page.wait_for_function(title)
    points = {trace["name"]: trace for trace in tab.look("() => document.getElementById('data-0-cost').data")}
    assert {label: trace["x"] for label, trace in points.items()} == {
        label: [1.0 if label in ("FedMF", "ItemKNN") else 1.5]
        for label in LABELS  # these have one seed
    }
    for label, trace in points.items():
        assert trace["y"] == pytest.approx([mean(results, label)], rel=1e-4)
    (swept,) = tab.look(MARKS, "data-0-sweep-0")
    values = [mean(results, f"MF embedding_dim={size}") for size in (4, 8, 64)]
    assert same_up_to_scale([y for _, y in swept], values, falling=True)
    assert same_up_to_scale([x for x, _ in swept], [2.0, 3.0, 6.0])  # on a logarithmic axis
    assert tab.look(AXIS, ["data-0-sweep-0", "x"]) == "embedding_dim"


def test_a_comparison_fits_a_phone(bench_report: Path, visit: Any) -> None:
    tab = visit(bench_report, viewport={"width": 375, "height": 800}, is_mobile=True, has_touch=True)
    assert tab.look("() => document.documentElement.scrollWidth") == 375
    assert tab.errors == []


def test_without_methods_there_is_no_sweep_chart() -> None:
    assert sweep_charts("data-0", [], ("recall@20",), "full ranking") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "damaged comparison"), ('{"format": 9}', "written in format 9; expected format 1")],
)
def test_a_comparison_that_cannot_be_read_gives_one_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_chart_comes_with_its_numbers_as_csv(bench_report: Path, tab: Tab) -> None:
    """The file that the link saves has the header and the rows of the table beside it."""
    link = "() => document.querySelector('#data-0-accuracy').closest('figure').querySelector('a[download]')"
    assert tab.look(f"({link})().download") == "data-0-accuracy.csv"
    content = b64decode(tab.look(f"({link})().href").partition("base64,")[2]).decode()
    lines = list(csv.DictReader(io.StringIO(content)))
    table = rows_of(bench_report, "Test metrics, full ranking")
    assert {line["method"]: line["Recall@20"] for line in lines} == {
        label: row["Recall@20"] for label, row in table.items()
    }


def test_the_bar_of_a_chart_has_two_buttons_and_shares_nothing(tab: Tab) -> None:
    buttons = "() => [...document.querySelectorAll('#data-0-accuracy .modebar-btn')].map(each => each.dataset.title)"
    assert tab.look(buttons) == ["Download plot as a PNG", "Reset axes"]
