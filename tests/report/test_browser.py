"""Reports in a real browser: every chart shows the values of the run, the page requests nothing from the network, and
it is readable in dark mode, on a phone and on paper."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import polars as pl
import pytest
from playwright.sync_api import Browser
from tests.report.tab import AXIS, MARKS, NAME, Tab, same_up_to_scale

from perfedrec.runs.folder import RunFolder


@pytest.fixture(scope="module")
def tab(browser: Browser, report: Path) -> Iterator[Tab]:
    """The report, opened once for all tests that do not change it."""
    opened = Tab(browser, report, viewport={"width": 1100, "height": 900}, offline=True)
    yield opened
    opened.context.close()


def test_the_page_has_no_errors_and_loads_nothing_but_its_file(report: Path, tab: Tab) -> None:
    assert tab.errors == []
    assert tab.requests == [report.as_uri()]
    assert tab.look("() => window.stolen") is None
    assert tab.page.text_content("h1") == f"PerFedRec++ on {NAME}"
    assert report.stat().st_size < 3e6


@pytest.fixture
def server() -> Iterator[Any]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    asked: list[str] = []
    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=listener.serve_forever)
    thread.start()
    yield listener.server_address[1], asked
    listener.shutdown()
    thread.join()
    listener.server_close()


def test_the_browser_blocks_all_requests_and_foreign_scripts(report: Path, visit: Any, server: Any) -> None:
    port, asked = server
    tab = visit(report)
    refused = tab.look(
        """async port => {
          const refused = [];
          addEventListener('securitypolicyviolation', event => refused.push(event.effectiveDirective));
          const place = `http://127.0.0.1:${port}/`;
          await fetch(place + 'fetch').catch(() => null);
          for (const [kind, key] of [['img', 'src'], ['script', 'src'], ['iframe', 'src']]) {
            const element = document.createElement(kind);
            element[key] = place + kind;
            document.body.append(element);
          }
          const script = document.createElement('script');
          script.textContent = 'window.stolen = true';
          document.body.append(script);
          while (refused.length < 5) await new Promise(done => setTimeout(done, 20));
          return refused;
        }""",
        port,
    )
    assert sorted(refused) == ["connect-src", "frame-src", "img-src", "script-src-elem", "script-src-elem"]
    assert tab.look("() => window.stolen") is None
    assert asked == []


def test_every_chart_is_drawn(tab: Tab) -> None:
    names = tab.look("() => [...document.querySelectorAll('.chart')].map(chart => chart.id)")
    assert names == ["curve", "loss", "activity", "map", "geometry", "bytes"]
    for name in names:
        drawn = tab.look(
            "name => document.querySelectorAll(`#${name} .scatterlayer path, #${name} .barlayer path`).length", name
        )
        assert drawn > 0, name
        for axis in ("x", "y"):
            assert tab.look(AXIS, [name, axis]), name


def test_curves_show_the_values_of_the_run_and_switches_change_them(run_folder: Path, report: Path, visit: Any) -> None:
    tab, history, summary = visit(report), RunFolder(run_folder).history(), RunFolder(run_folder).summary()
    seen = [entry for entry in history if entry.valid is not None]
    rounds = [entry.report.round + 1 - summary.n_phases for entry in seen]
    line, best = tab.look(MARKS, "curve")
    assert same_up_to_scale([x for x, _ in line], rounds)
    assert same_up_to_scale([y for _, y in line], [each.valid["ndcg@20"] for each in seen], falling=True)
    assert best == [line[rounds.index(summary.best_round)]]
    assert "round" in tab.look(AXIS, ["curve", "x"])

    tab.page.get_by_label("bytes up").first.check()
    tab.page.get_by_label("Recall@20").first.check()
    totals = np.cumsum([entry.report.bytes_up for entry in history]) / 240
    spent = [float(totals[history.index(entry)]) for entry in seen]
    tab.page.wait_for_function(
        "() => document.querySelector('#curve .xtitle').textContent.includes('sent by a client')"
    )
    line, _ = tab.look(MARKS, "curve")
    assert same_up_to_scale([x for x, _ in line], spent)
    assert same_up_to_scale([y for _, y in line], [each.valid["recall@20"] for each in seen], falling=True)
    assert tab.look(AXIS, ["curve", "y"]) == "validation Recall@20"
    losses = [entry.report.loss for entry in history if entry.report.loss is not None]
    assert tab.look("() => document.getElementById('loss').data[0].y") == pytest.approx(losses, rel=1e-4)


def test_map_geometry_groups_and_bytes_show_the_values_of_the_run(run_folder: Path, tab: Tab) -> None:
    users = pl.read_parquet(run_folder / "user_map.parquet")
    traces = tab.look(MARKS, "map")
    groups = sorted(users["cluster"].unique().to_list())
    assert len(groups) > 1
    assert [len(trace) for trace in traces] == [users.filter(pl.col("cluster") == each).height for each in groups]
    marks = [mark for trace in traces for mark in trace]
    places = pl.concat([users.filter(pl.col("cluster") == each) for each in groups])
    assert same_up_to_scale([x for x, _ in marks], places["x"].to_list())
    assert same_up_to_scale([y for _, y in marks], places["y"].to_list(), falling=True)

    notes = json.loads((run_folder / "diagnostics.json").read_text())["geometry"]
    moments = [notes[name] for name in ("start", "pretrained", "best")]
    for side, marks in zip(("users", "items"), tab.look(MARKS, "geometry"), strict=True):
        assert same_up_to_scale([y for _, y in marks], [each[f"uniformity_{side}"] for each in moments], falling=True)

    tested = pl.read_parquet(run_folder / "test_users.parquet")
    activity = tab.look("() => document.getElementById('activity').data[0]")
    counts = [int(label.split("(")[1].split()[0]) for label in activity["x"]]
    assert sum(counts) == tested.height
    weighted = np.dot(counts, activity["y"]) / tested.height
    assert weighted == pytest.approx(tested["ndcg@20"].mean(), rel=1e-4)

    history = RunFolder(run_folder).history()
    phases = list(dict.fromkeys(entry.report.phase for entry in history))
    widths = tab.look("() => [...document.querySelectorAll('#bytes .point path')].map(bar => bar.getBBox().width)")
    sent = [sum(each.report.bytes_up for each in history if each.report.phase == phase) for phase in phases]
    assert np.array(widths) / max(widths) == pytest.approx(np.array(sent) / max(sent), abs=0.005)


def test_an_open_page_follows_the_system_to_dark_and_back_to_light(report: Path, visit: Any) -> None:
    tab = visit(report, color_scheme="light")
    colours = """() => [getComputedStyle(document.documentElement).backgroundColor,
      getComputedStyle(document.querySelector('#curve .xtick text')).fill,
      getComputedStyle(document.querySelector('#curve .js-line')).stroke]"""
    turned = "fill => getComputedStyle(document.querySelector('#curve .xtick text')).fill !== fill"
    light = tab.look(colours)
    tab.page.emulate_media(color_scheme="dark")
    tab.page.wait_for_function(turned, arg=light[1])
    dark = tab.look(colours)
    assert all(one != other for one, other in zip(light, dark, strict=True))

    def luminance(colour: str) -> float:
        return sum(float(each) for each in colour[4:-1].split(",")[:3])

    assert luminance(light[0]) > 600 > 300 > luminance(light[1])
    assert luminance(dark[0]) < 150 < 600 < luminance(dark[1])
    tab.page.emulate_media(color_scheme="light")
    tab.page.wait_for_function(turned, arg=dark[1])
    assert tab.look(colours) == light
    assert tab.errors == []


def test_a_phone_needs_no_horizontal_scrolling(report: Path, visit: Any) -> None:
    tab = visit(report, viewport={"width": 375, "height": 800}, is_mobile=True, has_touch=True)
    assert tab.look("() => document.documentElement.scrollWidth") == 375
    wide = tab.look(
        """() => [...document.querySelectorAll('body *')].filter(each =>
          !each.closest('.scroll, pre, svg') && each.getBoundingClientRect().right > 375.5)
          .map(each => each.outerHTML)"""
    )
    assert wide == []
    assert tab.look("() => document.querySelector('#curve svg').getBoundingClientRect().width") <= 375
    cut = """() => [...document.querySelectorAll('.xtitle, .ytitle')].filter(title => {
      const inner = title.getBoundingClientRect(), outer = title.closest('.chart').getBoundingClientRect();
      return inner.left < outer.left || inner.right > outer.right
        || inner.top < outer.top || inner.bottom > outer.bottom;
    }).map(title => title.textContent)"""
    assert tab.look(cut) == []
    assert tab.errors == []


def test_print_is_light_and_charts_are_not_cut(report: Path, visit: Any) -> None:
    tab = visit(report, color_scheme="dark")
    tab.look(
        """() => addEventListener('beforeprint', () => {
          window.printed = [...document.querySelectorAll('.chart')].map(chart => [
            chart.querySelector('svg').getBoundingClientRect().width,
            chart.querySelectorAll('.scatterlayer path, .barlayer path').length,
            getComputedStyle(chart.querySelector('.xtick text')).fill]);
        })"""
    )
    paper = tab.page.pdf(format="A4")
    assert paper.startswith(b"%PDF")
    for width, marks, ink in tab.look("() => window.printed"):
        assert width == 660
        assert marks > 0
        assert ink == "rgb(32, 36, 42)"
    tab.page.wait_for_function("() => !document.documentElement.classList.contains('printing')")
    assert tab.look("() => getComputedStyle(document.querySelector('#curve .xtick text')).fill") != "rgb(32, 36, 42)"
    assert tab.errors == []
