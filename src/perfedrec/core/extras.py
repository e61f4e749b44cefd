"""Packages that come with an extra of perfedrec, and the message where one of them is not installed."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from perfedrec.core.errors import ConfigError

MODULES = {
    "cryptography": "flower",
    "fastapi": "flower",
    "flwr": "flower",
    "google": "flower",
    "httpx": "flower",
    "prometheus_client": "flower",
    "uvicorn": "flower",
    "python_multipart": "web",
    "starlette": "web",
    "ray": "simulation",
    "opendp": "opendp",
    "matplotlib": "figures",
    "jinja2": "report",
    "markupsafe": "report",
    "plotly": "report",
    "optuna": "tune",
    "tensorboard": "tensorboard",
    "alembic": "mlflow",
    "mlflow": "mlflow",
    "sqlalchemy": "mlflow",
}
"""The extra that brings each module which is not among the dependencies of perfedrec itself."""


class MissingExtraError(ConfigError):
    """Something needs an ``extra`` of perfedrec that is not installed. The message names it and how to install it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs the extra {extra}, which is not installed; install it with: {install(extra)}")
        self.extra = extra


@contextmanager
def needed_by(what: str, extra: str | None = None) -> Iterator[None]:
    """Raise :class:`MissingExtraError`, which names ``what``, where a package of an extra cannot be imported. Where
    several extras have the package, ``extra`` is the one to name."""
    try:
        yield
    except ImportError as error:
        found = extra_of(error)
        if found is None:
            raise
        raise MissingExtraError(what, extra or found) from None


def extra_of(error: BaseException) -> str | None:
    """The extra whose package could not be imported; ``None`` for any other error."""
    return MODULES.get((error.name or "").partition(".")[0]) if isinstance(error, ImportError) else None


def install(extra: str) -> str:
    """The command that adds an extra to this installation: into the Python that runs, from where perfedrec came."""
    return shlex.join([near(Path(sys.executable or "python")), "-m", "pip", "install", *_requirement(extra)])


def _requirement(extra: str) -> list[str]:
    origin = _origin()
    url, folder = str(origin.get("url", "")), origin.get("dir_info")
    if folder is not None and urlparse(url).scheme == "file":
        source = Path(url2pathname(urlparse(url).path))
        path = f"{near(source)}[{extra}]"
        if not folder.get("editable"):
            return [path]
        tested = source / "constraints.txt"
        return [*(["--constraint", near(tested)] if tested.exists() else []), "--editable", path]
    if "vcs_info" in origin:
        url = f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
    return [f"perfedrec[{extra}] @ {url}" if url else f"perfedrec[{extra}]"]


def _origin() -> dict[str, Any]:
    """Where perfedrec was installed from, as pip has recorded it; empty for a package index."""
    try:
        found: dict[str, Any] = json.loads(metadata.distribution("perfedrec").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return {}
    return found


def near(path: Path) -> str:
    """A path from the working directory where it lies in it, otherwise the whole path."""
    here = os.getcwd()
    if path.is_relative_to(here):
        inside = str(path.relative_to(here))
        return inside if inside.startswith(".") else os.path.join(".", inside)
    return str(path)
