"""Figures for papers: that they are whole, show what the page shows, and are the same every time."""

import hashlib
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path
from typing import Any

import pytest
from plotly.graph_objects import Scatter
from typer.testing import CliRunner

from perfedrec.cli import app
from perfedrec.core.errors import ConfigError
from perfedrec.report import write_report
from perfedrec.report.bench import bench_page
from perfedrec.report.page import Chart, Option, Page, Section, Switch, Table
from perfedrec.report.run import run_page
from perfedrec.report.style import COLOURS, figure

figures = pytest.importorskip("perfedrec.report.figures", exc_type=ImportError)
matplotlib = figures.matplotlib

runner = CliRunner()


def chart(name: str = "curve", labels: tuple[str, ...] = ("LightGCN",), **layout: Any) -> Chart:
    traces = [
        Scatter(
            x=[1, 2, 4],
            y=[0.1 + place, 0.2 + place, 0.15 + place],
            mode="lines+markers",
            name=label,
            line={"color": COLOURS[place], "dash": "dash"},
            marker={"color": COLOURS[place], "symbol": "square", "size": 9},
        )
        for place, label in enumerate(labels)
    ]
    drawn = figure(traces, "round of training", "validation Recall@20", **layout)
    return Chart(name, "Accuracy", "What it shows.", drawn, Table("n", ("round", "Recall@20"), [["1", "0.1"]]))


def page(*charts: Chart, title: str = "Learning") -> Page:
    return Page("over", "title", "lead", [Section("data-0", title, charts)])


def written(folder: Path, *charts: Chart) -> dict[str, Path]:
    return {path.name: path for path in figures.write_figures(page(*charts), folder)}


def fonts(pdf: Path) -> list[tuple[str, str]]:
    """The fonts of a PDF with their kinds: descriptions of fonts are not compressed."""
    text = pdf.read_bytes().decode("latin-1")
    found = [each for each in re.findall(r"<<(.*?)>>\s*endobj", text, re.DOTALL) if "/Type /Font " in each + " "]
    return [(re.findall(r"/BaseFont /(\S+)", each)[0], re.findall(r"/Subtype /(\S+)", each)[0]) for each in found]


def words(pdf: Path) -> str:
    """The texts of a PDF. Letters stand in brackets, with numbers between them that move letters together."""
    shown = []
    for packed in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf.read_bytes(), re.DOTALL):
        try:
            plain = zlib.decompress(packed).decode("latin-1")
        except zlib.error:
            continue
        for text in re.findall(r"\bBT\n(.*?)\nET\b", plain, re.DOTALL):
            letters = "".join(re.findall(r"\(((?:\\.|[^\\)])*)\)", text, re.DOTALL))
            shown.append(re.sub(r"\\(.)", r"\1", letters).replace("\0", ""))
    return " | ".join(shown)


def test_every_chart_of_a_run_is_written_as_pdf_svg_and_csv(run_folder: Path, tmp_path: Path) -> None:
    done = runner.invoke(
        app, ["report", str(run_folder), "--output", str(tmp_path / "a.html"), "--figures", str(tmp_path / "f")]
    )
    assert done.exit_code == 0, done.output
    assert f"its charts, each as PDF, SVG and CSV, are in {tmp_path / 'f'}" in done.output
    assert (tmp_path / "a.html").exists()
    charts = {each.name: each for each in run_page(run_folder).charts()}
    assert {"curve", "loss", "activity", "map", "geometry", "bytes"} == set(charts)
    names = {path.name for path in (tmp_path / "f").iterdir()}
    for name, each in charts.items():
        assert (tmp_path / "f" / f"{name}.csv").read_text() == each.numbers.csv()
        assert {f"{name}.pdf", f"{name}.svg"} <= names
        others = sum(len(switch.options) - 1 for switch in each.switches)
        assert len([file for file in names if re.fullmatch(rf"{name}(-.*)?\.pdf", file)]) == 1 + others
    assert {"curve-recall-20.pdf", "curve-ndcg-10.svg", "curve-bytes-up.pdf", "bytes-down.pdf"} <= names
    curve = tmp_path / "f" / "curve.pdf"
    assert curve.read_bytes().startswith(b"%PDF-")
    assert {kind for _, kind in fonts(curve)} <= {"Type0", "CIDFontType2", "TrueType"}
    assert {name.partition("+")[2] or name for name, _ in fonts(curve)} == {"DejaVuSans"}
    assert b"/FontFile2" in curve.read_bytes()  # the font itself, as TrueType
    assert "validation NDCG@20" in words(curve)
    assert "validation Recall@20" in words(tmp_path / "f" / "curve-recall-20.pdf")


def test_a_comparison_has_a_figure_for_each_chart_named_by_its_data_set(bench_folder: Path, tmp_path: Path) -> None:
    paths = figures.write_figures(bench_page(bench_folder), tmp_path / "f")
    assert sorted(paths) == sorted((tmp_path / "f").iterdir())
    for kind in ("accuracy", "difference", "curves", "cost", "sweep-0"):
        assert (tmp_path / "f" / f"planted-{kind}.pdf").exists(), kind
        assert ET.parse(tmp_path / "f" / f"planted-{kind}.svg").getroot().tag.endswith("svg")
    shown = words(tmp_path / "f" / "planted-accuracy.pdf")
    assert all(name in shown for name in ("LightGCN", "FedMF", "ItemKNN", "test Recall@20, full ranking"))
    assert "FedMF" in words(tmp_path / "f" / "planted-curves-bytes-up.pdf")
    assert "LightGCN" not in words(tmp_path / "f" / "planted-curves-bytes-up.pdf")  # it sends nothing


def test_a_figure_shows_the_values_of_the_page_in_one_column() -> None:
    data, layout = next(view for _, view in figures._views(chart()))
    shown = figures._figure(data, layout)
    (axes,) = shown.axes
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[1, 0.1], [2, 0.2], [4, 0.15]]
    assert shown.get_size_inches()[0] == pytest.approx(3.3)
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("", "round of training", "validation Recall@20")
    low, high = axes.get_ylim()
    assert 0.05 < low < 0.1 < 0.2 < high < 0.25  # the axis shows the curve, not everything from 0 to 1
    assert shown.legends == []  # one method needs none
    assert all(float(mark).is_integer() for mark in axes.get_xticks())  # there is no round 2.5


def test_lines_differ_without_colours(bench_folder: Path) -> None:
    curves = next(each for each in bench_page(bench_folder).charts() if each.name.endswith("-curves"))
    shown = figures._figure(*next(view for _, view in figures._views(curves)))
    lines = shown.axes[0].lines
    assert len(lines) == 5
    assert len({(line.get_linestyle(), str(line._dash_pattern)) for line in lines}) == 5
    assert len({line.get_marker() for line in lines}) == 5
    assert len(shown.axes[0].patches) == 5  # a band for each


def test_each_choice_of_a_switch_changes_its_traces_and_titles() -> None:
    first = Option("NDCG@20", [{"y": [1, 2, 3]}], {"yaxis": {"title": {"text": "NDCG@20"}}})
    other = Option("Recall@20", [{"y": [3, 2, 1]}], {"yaxis": {"title": {"text": "Recall@20"}}})
    rounds, seconds = Option("round", [{}]), Option("bytes up", [{"x": [5, 6, 7]}])
    plain = chart()
    switches = (Switch("Against", [rounds, seconds]), Switch("Metric", [first, other]))
    both = Chart("curve", "t", "t", plain.figure, plain.numbers, switches)
    found = {
        suffix: (data[0]["x"], data[0]["y"], layout["yaxis"]["title"]["text"])
        for suffix, (data, layout) in figures._views(both)
    }
    assert found == {
        "": ([1, 2, 4], [1, 2, 3], "NDCG@20"),
        "-bytes-up": ([5, 6, 7], [1, 2, 3], "NDCG@20"),
        "-recall-20": ([1, 2, 4], [3, 2, 1], "Recall@20"),
    }


def test_the_same_bytes_come_from_another_process(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.report.test_figures import chart, written; "
        "written(Path(sys.argv[1]), chart(labels=('LightGCN', 'FedMF')))"
    )
    digests = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join([str(Path(__file__).parents[2]), *sys.path])}
        subprocess.run([sys.executable, "-c", script, str(folder)], check=True, env=environment)
        files = sorted(folder.iterdir())
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert digests[0] == digests[1]
    assert set(digests[0]) == {"curve.pdf", "curve.svg", "curve.csv"}


def test_the_settings_of_the_caller_stay_as_they_are(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    written(tmp_path / "f", chart())
    assert dict(matplotlib.rcParams) == before


def test_long_and_odd_labels_are_whole_and_in_the_figure(tmp_path: Path) -> None:
    labels = ("PerFedRec++ without clusters, with pre-training", "a$b_{c}$ 50 % (\\x)", "<script>&", "a" * 90)
    shown = words(written(tmp_path / "f", chart(labels=labels))["curve.pdf"]).replace(" | ", " ")
    assert "PerFedRec++ without clusters, with" in shown
    assert "pre-training" in shown
    assert "a$b_{c}$ 50 % (\\x)" in shown
    assert "<script>&" in shown
    assert shown.replace(" ", "").count("a" * 90) == 1
    with matplotlib.rc_context(figures.STYLE):
        drawn = figures._figure(*next(view for _, view in figures._views(chart(labels=labels))))
        drawn.draw_without_rendering()
    box, whole = drawn.legends[0].get_window_extent(), drawn.bbox
    assert whole.x0 <= box.x0 <= box.x1 <= whole.x1
    assert whole.y0 <= box.y0 <= box.y1 <= whole.y1
    (axes,) = drawn.axes
    assert axes.get_window_extent().height > drawn.dpi  # an inch is left for the curves


def test_letters_that_the_font_lacks_are_named_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="figures show boxes") as heard:
        written(tmp_path / "f", chart(labels=("Метод", "方法方")), chart("loss", labels=("法",)))
    assert [str(each.message).partition(",")[0] for each in heard] == ["figures show boxes for 方 法"]
    assert (tmp_path / "f" / "curve.pdf").exists()


def test_names_of_data_sets_become_names_of_files() -> None:
    def sections(*titles: str) -> Page:
        found = [Section(f"data-{place}", each, [chart(f"data-{place}-cost")]) for place, each in enumerate(titles)]
        return Page("over", "title", "lead", found)

    assert figures._names(sections("ml-100k", "Yelp (2018), 10-core")) == ["ml-100k-cost", "Yelp-2018-10-core-cost"]
    assert figures._names(sections("a b", "a.b", "数据")) == ["a-b-cost", "data-1-cost", "data-2-cost"]


def test_figures_are_replaced_and_other_files_are_kept(tmp_path: Path) -> None:
    first = {name: path.read_bytes() for name, path in written(tmp_path, chart()).items()}
    assert {name: path.read_bytes() for name, path in written(tmp_path, chart()).items()} == first
    (tmp_path / "loss.csv").write_text("mine")
    with pytest.raises(ConfigError, match=r"loss\.csv exists and is no figure of a report"):
        written(tmp_path, chart("loss"))
    assert (tmp_path / "loss.csv").read_text() == "mine"
    assert not (tmp_path / "loss.pdf").exists()


def test_a_folder_that_cannot_be_written_is_one_line(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("a file")
    command = ["report", str(run_folder), "--output", str(tmp_path / "a.html"), "--figures", str(tmp_path / "f")]
    result = runner.invoke(app, command)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "figures cannot be written" in result.stderr
    assert not (tmp_path / "a.html").exists()


def test_without_the_extra_the_error_names_it(run_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "perfedrec.report."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="a figure for a paper needs the extra figures"):
        write_report(run_folder, tmp_path / "report.html", tmp_path / "f")
    assert list(tmp_path.iterdir()) == []
    assert json.loads((run_folder / "result.json").read_text())
