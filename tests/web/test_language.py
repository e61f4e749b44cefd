"""Texts: every language has all of them, pages use each, and readers get the language that they ask for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup

import perfedrec.web
from perfedrec.web import node_pages
from perfedrec.web.language import LANGUAGES, Texts, chosen, texts

ROOM = Path(perfedrec.web.__file__).parent


def flat(table: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return found


def test_all_languages_have_the_same_texts_with_the_same_values_in_them() -> None:
    english = flat(texts("en").table)
    assert len(english) > 100
    for language in LANGUAGES[1:]:
        other = flat(texts(language).table)
        assert list(other) == list(english)
        for key, text in english.items():
            if key != "format.months":
                assert sorted(re.findall(r"{\w*}", other[key])) == sorted(re.findall(r"{\w*}", text)), key
            assert other[key].strip() if isinstance(text, str) else len(other[key]) == 12
        same = [key for key, text in english.items() if other[key] == text]
        assert set(same) <= {"list.of_item", "list.part", "rules.pause", "left.phase"}, "not translated"


def test_pages_use_every_text() -> None:
    """Keys that are put together begin with one of the words of the second line."""
    files = [*(ROOM / "templates").glob("*.j2"), *ROOM.glob("*.py")]
    source = " ".join(file.read_text(encoding="utf-8") for file in files)
    families = (
        "format.",
        "phase.",
        "refused.",
        "model.",
        "done.",
        "not_imported.",
        "frame.for_you",
        "frame.have",
        "frame.left",
        "frame.rules",
    )
    families += tuple(f"rules.{name}" for name in node_pages.PROFILES)
    families += tuple(f"start.{name}" for name in ("found", "nothing", "popular", "some", "search_first"))
    families += tuple(f"left.{name}" for name in ("coordinator", "run", "phase", "stage", "users"))
    for key in flat(texts("en").table):
        key = re.sub(r"\.(one|other)$", "", key) if not key.startswith(("phase", "model", "refused")) else key
        assert key.startswith(families) or re.search(rf"['\"]{re.escape(key)}['\"]", source), key
    for key in re.findall(r"\bt\(\s*f?['\"]([\w.]+)['\"][,)]", source):
        assert texts("en").has(key), key


@pytest.mark.parametrize(
    ("accepted", "wanted", "language"),
    [
        ("", None, "en"),
        ("de", None, "de"),
        ("de-AT,de;q=0.9,en;q=0.8", None, "de"),
        ("fr,en;q=0.5,de;q=0.7", None, "de"),
        ("fr, it", None, "en"),
        ("en-GB, de;q=0.99", None, "en"),
        ("de;q=0, en;q=0.1", None, "en"),
        (";;q=,de;q=x,*", None, "de"),
        ("en", "de", "de"),
        ("de", "../de", "de"),
    ],
)
def test_the_language_is_the_one_that_was_chosen_or_that_the_browser_prefers(
    accepted: str, wanted: str | None, language: str
) -> None:
    assert chosen(accepted, wanted) == language


def test_numbers_days_and_lists_are_written_as_in_the_language() -> None:
    en, de = texts("en"), texts("de")
    assert (en.number(1234567), de.number(1234567)) == ("1,234,567", "1.234.567")
    assert (en.number(1234.5), de.number(1234.5), en.number(2.0)) == ("1,234.5", "1.234,5", "2")
    assert [en.bytes(each) for each in (0, 999, 1500, 2_340_000, 5e9)] == ["0 B", "999 B", "1.5 kB", "2.3 MB", "5 GB"]
    assert de.bytes(1500) == "1,5 kB"
    noon = 1_764_417_600.0  # 2025-11-29
    assert re.fullmatch(r"\d+ Nov 2025", en.day(noon))
    assert re.fullmatch(r"\d+\. November 2025", de.day(noon))
    assert [en.listed(each) for each in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
    assert (en("count.things", n=1), en("count.things", n=1200)) == ("1 thing", "1,200 things")


def test_what_is_put_into_a_marked_up_text_is_escaped() -> None:
    t: Texts = texts("en")
    title = Markup("<cite>{}</cite>").format("<b>")
    assert t("list.because", titles=t.listed([title])) == "Because of <cite>&lt;b&gt;</cite>"
    assert isinstance(t("list.because", titles=t.listed([title, title])), Markup)
    assert not isinstance(t("similar.title", title="<b>"), Markup)  # the template escapes it
