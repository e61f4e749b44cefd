"""Reports: one HTML file about a run or a comparison, which a browser can open without a network, and its charts as
figures for papers."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from perfedrec.core.errors import CheckpointError, ConfigError, reason
from perfedrec.core.extras import needed_by
from perfedrec.runs.checkpoint import write_atomic
from perfedrec.runs.files import BENCH

DOCTYPE = b"<!doctype html>"
"""What a report begins with, in small letters."""


def write_report(folder: Path, output: Path | None = None, figures: Path | None = None) -> Path:
    """Write the report of a finished run or a comparison, and return its path.

    ``folder`` is that of the run or the comparison. The report is written to ``output`` (default: ``report.html`` in
    that folder). With ``figures``, its charts are also written to this folder, as PDF, SVG and CSV.

    Raises :class:`CheckpointError` where the folder holds neither a run nor a comparison, and :class:`ConfigError`
    where the extra ``report`` (or ``figures``) is not installed or a file cannot be written.
    """
    if figures is not None:
        with needed_by("a figure for a paper"):
            import_module("matplotlib")  # asked first: its extra brings what a report needs as well
    with needed_by("a report"):
        from perfedrec.report.bench import bench_page
        from perfedrec.report.page import render
        from perfedrec.report.run import run_page
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; expected the folder of a finished run or comparison")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder; expected the folder of a finished run or comparison")
    output = output or folder / "report.html"
    if output.is_dir():
        raise ConfigError(f"{output} is a folder; expected the name of a file to write")
    if output.exists() and DOCTYPE not in output.read_bytes()[:1000].lower():
        raise ConfigError(f"{output} exists and is no report; expected a new file, or a report to replace")
    of_bench = any((folder / name).exists() for name in (BENCH, "results.json"))
    page = bench_page(folder) if of_bench else run_page(folder)
    if figures is not None:
        from perfedrec.report.figures import write_figures

        write_figures(page, figures)
    try:
        write_atomic(output, render(page).encode())
    except OSError as error:
        raise ConfigError(
            f"{output}: cannot be written ({reason(error)}); expected a file in a folder that exists"
        ) from None
    return output
