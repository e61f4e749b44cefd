"""The tutorial notebook runs from the top to the end, and shows small output of the kind that is stored with it."""

import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="the packages that execute notebooks are not installed")
nbclient = pytest.importorskip("nbclient", reason="the packages that execute notebooks are not installed")
pytest.importorskip("ipykernel", reason="the packages that execute notebooks are not installed")

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"


def shown(notebook: Any) -> list[list[str]]:
    """What the output of each cell of code consists of, without warnings of libraries."""
    return [
        sorted({out.get("name") or ",".join(sorted(out["data"])) for out in cell.outputs} - {"stderr"})
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs_and_shows_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    stored = nbformat.read(NOTEBOOK, as_version=4)
    played = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        played, timeout=600, coalesce_streams=True, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert shown(played) == shown(stored)
    texts = ["".join(output.get("text", "") for output in cell.get("outputs", ())) for cell in played.cells]
    tastes = next(text for text in texts if re.match(r"\[\d", text))
    assert tastes.count("2") >= 4  # of the five items for a new user whose items are all of taste 2
    assert any("no individual upload is visible" in text for text in texts)


def test_it_is_small_and_says_nothing_of_the_machine_that_made_it() -> None:
    assert NOTEBOOK.stat().st_size < 40_000
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert "/tmp" not in text
    assert "/home" not in text
    assert "Traceback" not in text
    assert "<div>" in text  # data frames are shown as tables
    assert nbformat.read(NOTEBOOK, as_version=4).metadata.kernelspec.name == "python3"
