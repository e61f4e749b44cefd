"""perfedrec report: charts and tables in one HTML file."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from perfedrec.cli.common import console, one_line


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN|BENCH", help="folder of a finished run or a comparison")],
    output: Annotated[Path | None, typer.Option(help="file to write (default: report.html in the folder)")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="folder to write each chart to, too, as PDF, SVG and CSV for a paper")
    ] = None,
) -> None:
    """Write one HTML file with charts and tables about a run or a comparison. The file needs no network.

    [bold]perfedrec report runs/a[/bold]

    [bold]perfedrec report bench/yelp --output yelp.html --figures paper/figures[/bold]
    """
    with one_line():
        from perfedrec.report import write_report
        from perfedrec.runs.progress import size

        with warnings.catch_warnings(record=True) as heard:
            written = write_report(folder, output, figures)
        for each in heard:
            print(f"warning: {each.message}", file=sys.stderr)
        console.print(f"written to {written} ({size(written.stat().st_size)})", soft_wrap=True)
        if figures is not None:
            console.print(f"its charts, each as PDF, SVG and CSV, are in {figures}", soft_wrap=True)
