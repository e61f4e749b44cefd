"""Reports: one HTML file about a run or a benchmark, to be opened in a browser, without any network."""

from __future__ import annotations

from pathlib import Path

from perfedrec.core.errors import CheckpointError, ConfigError
from perfedrec.runs.checkpoint import write_atomic


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the report of a finished run or a comparison, and return its path: ``output``, or ``report.html`` in its
    folder.

    Raises :class:`CheckpointError` for a folder that holds neither, and :class:`ConfigError` where the extra
    ``report`` is not installed or the file cannot be written.
    """
    try:
        from perfedrec.report.bench import bench_page
        from perfedrec.report.page import render
        from perfedrec.report.run import run_page
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"a report needs the package {error.name}, which is not installed; expected perfedrec with the extra "
            "report: pip install 'perfedrec[report]'"
        ) from None
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder; expected that of a finished run or a comparison")
    output = output or folder / "report.html"
    if output.is_dir():
        raise ConfigError(f"{output} is a folder; expected the name of a file to write")
    page = render(bench_page(folder) if (folder / "results.json").exists() else run_page(folder))
    try:
        write_atomic(output, page.encode())
    except OSError as error:
        raise ConfigError(
            f"{output}: cannot be written ({error.strerror}); expected a file in a folder that exists"
        ) from None
    return output
