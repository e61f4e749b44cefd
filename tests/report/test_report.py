"""The content of a report, also for runs that lack something that a report can show."""

import json
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from playwright.sync_api import Browser
from tests.report.tab import rows_of, text_of
from typer.testing import CliRunner

from perfedrec import ConfigError, configure, load, train
from perfedrec.cli import app
from perfedrec.privacy.report import audited, lines
from perfedrec.report import write_report
from perfedrec.report.page import Page, Pairs, Prose, Section, Table, Tile, Tiles, render
from perfedrec.report.run_charts import geometry_chart
from perfedrec.runs.folder import RunFolder

runner = CliRunner()


def test_the_report_has_the_privacy_block_and_the_audit_word_for_word(run_folder: Path, report: Path) -> None:
    text, block = text_of(report), RunFolder(run_folder).summary().privacy
    found = json.loads((run_folder / "audit.json").read_text())
    block["audit"] = audited(found)
    for name, content in lines(block):
        assert f"{name} {content}" in text
    for each in found["findings"]:
        assert each["attack"] in text
        assert f"{each['value']:.3f} {each['guessing']:.3f}" in text
    assert f"{found['bounds'][0]['claim']:.2f} {found['bounds'][0]['lower']:.2f}" in text


def test_the_table_of_test_metrics_has_popularity_and_intervals(run_folder: Path, report: Path) -> None:
    rows = rows_of(report, "Test metrics of the best round; full ranking of all items unseen in training")
    summary, users = RunFolder(run_folder).summary(), pl.read_parquet(run_folder / "test_users.parquet")
    for name, shown in (("ndcg@20", "NDCG@20"), ("recall@10", "Recall@10")):
        value, popular, row = summary.test[name], summary.popularity[name], rows[shown]
        error = users[name].std() / users.height**0.5  # type: ignore[operator]
        low, high = map(float, row["95 % interval"].split(" to "))
        # Student's t at 97.5 % for 239 degrees of freedom is 1.97.
        assert (low, high) == pytest.approx((value - 1.97 * error, value + 1.97 * error), abs=1e-3)
        assert (row["this run"], row["popularity"]) == (f"{value:.4f}", f"{popular:.4f}")
        assert row["times popularity"] == f"{value / popular:.2f}"


def test_the_report_has_the_configuration_and_the_machine(run_folder: Path, report: Path) -> None:
    text = text_of(report)
    assert " ".join((run_folder / "config.toml").read_text().split()) in text
    environment = json.loads((run_folder / "environment.json").read_text())
    assert f"torch {environment['packages']['torch']}" in text
    assert environment["platform"] in text


def test_the_report_says_that_it_shows_single_users_without_ids(run_folder: Path, tmp_path: Path) -> None:
    text = text_of(write_report(run_folder, tmp_path / "report.html"))
    assert "This map shows single users: 240 of 240, without their ids. It comes from a simulation" in text
    assert "privacy profile paper" in text
    assert "personal data" in text


def train_with(folder: Path, algorithm: str, *options: str) -> Path:
    config = configure(
        None,
        overrides=options,
        algorithm=algorithm,
        data__path="synthetic:users=80,items=60,clusters=2,interactions_per_user=8",
    )
    train(config.build(), load(config.data.path), config.run, output=folder, config=config)
    return folder


def test_a_method_without_vectors_and_messages_has_a_report_without_their_charts(tmp_path: Path, visit: Any) -> None:
    written = write_report(train_with(tmp_path / "run", "popularity", "run.rounds=0"))
    text = text_of(written)
    assert "Popularity has no user and item vectors" in text
    assert "Nothing was sent" in text
    assert "NONE: a centralised method has everybody's interactions in one place" in text
    tab = visit(written)
    assert tab.errors == []
    assert tab.look("() => document.querySelectorAll('#map, #geometry, #bytes').length") == 0


def test_a_centralised_method_has_a_map_without_clusters_and_a_table_of_sampled_negatives(tmp_path: Path) -> None:
    folder = train_with(tmp_path / "run", "mf", "run.rounds=2", "run.sampled_negatives=30")
    written = write_report(folder)
    text, sampled = text_of(written), RunFolder(folder).summary().test_sampled
    rows = rows_of(written, "Test metrics among 30 sampled negatives, for comparison with papers that use them")
    assert rows["NDCG@10"]["this run"] == f"{sampled['ndcg@10']:.4f}"
    assert "There were no clusters in that round" in text
    assert "user vectors: a centralised method has them in one place" in text


def test_an_old_run_without_diagnostics_has_a_report(tmp_path: Path) -> None:
    folder = train_with(tmp_path / "run", "mf", "run.rounds=1")
    for name in ("diagnostics.json", "user_map.parquet", "test_users.parquet"):
        (folder / name).unlink()
    text = text_of(write_report(folder))
    assert "MF recorded no vectors" in text


def test_a_run_without_held_out_interactions_has_a_report(tmp_path: Path) -> None:
    for part in ("train", "valid", "test"):
        rows = [f"u{user},i{(user + step) % 9}" for user in range(12) for step in range(4)]
        lines = ["user,item", *(rows if part == "train" else [])]
        (tmp_path / f"{part}.csv").write_text("\n".join(lines) + "\n")
    given = {f"data__{part}": str(tmp_path / f"{part}.csv") for part in ("train", "valid", "test")}
    config = configure("recommended", overrides=("run.rounds=2", "model.embedding_dim=4"), **given)
    dataset = load(None, **{part: given[f"data__{part}"] for part in ("train", "valid", "test")})
    train(config.build(), dataset, config.run, output=tmp_path / "run", config=config)
    assert "There are no test interactions" in text_of(write_report(tmp_path / "run"))


def test_moments_in_the_same_round_share_one_label() -> None:
    start = {"round": -2, "alignment": 1.9, "uniformity_users": -3.9, "uniformity_items": -3.8}
    after = {"round": 0, "alignment": 0.5, "uniformity_users": -2.0, "uniformity_items": -2.5}
    later = {"round": 7, "alignment": 0.4, "uniformity_users": -2.1, "uniformity_items": -2.6}
    together = geometry_chart({"start": start, "pretrained": after, "best": after}).figure.data[0]
    assert list(together.text) == ["start", "pre-trained, best", ""]
    assert list(together.x) == [1.9, 0.5, 0.5]
    apart = geometry_chart({"start": start, "pretrained": after, "best": later}).figure.data[0]
    assert list(apart.text) == ["start", "pre-trained", "best"]


def test_the_command_writes_to_the_file_of_output(run_folder: Path, tmp_path: Path) -> None:
    done = runner.invoke(app, ["report", str(run_folder), "--output", str(tmp_path / "a.html")])
    assert done.exit_code == 0, done.output
    assert f"written to {tmp_path / 'a.html'} (" in done.output
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("folder", "output", "message"),
    [
        ("nowhere", None, "there is no such folder"),
        ("log.jsonl", None, "log.jsonl is a file; expected the folder of"),
        ("empty", None, "not a run folder"),
        ("unfinished", None, "not a finished run"),
        ("damaged", None, "damaged run"),
        ("run", "empty", "is a folder"),
        ("run", "nowhere/report.html", "cannot be written"),
    ],
)
def test_an_error_is_one_line(folder: str, output: str | None, message: str, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "log.jsonl").write_text("{}")
    names = ("config.toml", "environment.json", "metrics.jsonl", "result.json")
    for name, kept in (("unfinished", names[:3]), ("damaged", names)):
        (tmp_path / name).mkdir()
        for each in kept:
            (tmp_path / name / each).write_bytes((run_folder / each).read_bytes())
    (tmp_path / "damaged" / "test_users.parquet").write_bytes(b"PAR1 and nothing more")
    arguments = ["report", str(run_folder if folder == "run" else tmp_path / folder)]
    arguments += [] if output is None else ["--output", str(tmp_path / output)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not list(tmp_path.rglob(".report*")) + list(tmp_path.rglob("report.html"))


def test_without_the_extra_the_error_names_it(run_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    for name in [name for name in sys.modules if name.startswith(("plotly.", "perfedrec.report."))]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match="a report needs the extra report"):
        write_report(run_folder, tmp_path / "report.html")


def test_a_page_without_charts_has_no_script_and_long_words_fit_a_phone(tmp_path: Path, browser: Browser) -> None:
    word = "a" * 90
    table = Table("one", ("method",), [[word]])
    blocks = [Prose(word), Tiles([Tile(word, word, word)]), Pairs([(word, word)]), table]
    file = tmp_path / "page.html"
    file.write_text(render(Page(word, word, word, [Section("a", word, blocks)])), encoding="utf-8")
    assert "<script" not in file.read_text()
    assert "script-src &#39;none&#39;" in file.read_text()
    assert file.stat().st_size < 50_000
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.close()
