"""The operator's page: how the run of a coordinator is, and how earlier ones were.

It reads the folder of the run (:mod:`perfedrec.federation.status`), in a process of its own, and asks the coordinator
nothing. Every address needs the operator's token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import parse_qsl

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

import perfedrec
from perfedrec.core.errors import PerfedrecError
from perfedrec.federation import status
from perfedrec.runs.progress import size
from perfedrec.web.charts import Series, bars, lines
from perfedrec.web.guard import Access, Guard, set_cookie

ENTER = "/enter"
"""Where a person who has the operator's token gives it to the browser."""

ROUNDS = 10
"""Rounds that the page lists, and lines of what stood out; charts show all rounds."""

STATES = {
    "waiting": "waits for nodes",
    "running": "is running",
    "finished": "has finished",
    "stopped": "was stopped",
    "failed": "has failed",
    "gone": "has no coordinator",
}


def operator_page(folder: Path, access: Access) -> ASGIApp:
    """The page about the run in a ``folder``, or about the newest one there, for those whom ``access`` admits."""
    page = _Operator(folder, access)
    routes = [
        Route("/", page.show),
        Route("/status", page.status),
        Route("/runs/{name}", page.show),
        Route("/runs/{name}/status", page.status),
        Route(ENTER, page.enter, methods=["GET", "POST"]),
        Mount("/assets", StaticFiles(packages=[("perfedrec.web", "assets")])),
    ]
    app = Starlette(routes=routes, exception_handlers={PerfedrecError: page.unreadable, HTTPException: page.missing})
    return Guard(app, access, open_paths=(ENTER, "/assets/operator.css", "/assets/operator.svg"), enter=ENTER)


class _Operator:
    def __init__(self, folder: Path, access: Access) -> None:
        self.folder, self.access = folder, access
        self.templates = Environment(
            loader=PackageLoader("perfedrec.web", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.templates.filters |= {"size": size, "moment": moment}

    def show(self, request: Request) -> Response:
        """The page of a run. It is sent again only if something on it has changed."""
        run = self._run(request)
        view = status.look(run)
        content = self.templates.get_template("operator.html.j2").render(
            view=view,
            states=STATES,
            name=run.name,
            here=[each for each in view["nodes"] if each["state"] in ("here", "missed", "has the model")],
            median=median([each["seconds"] for each in view["history"]] or [0.0]),
            rounds=view["history"][: -ROUNDS - 1 : -1],
            unusual=view["unusual"][: -ROUNDS - 1 : -1],
            charts=charts(view),
            earlier=status.earlier(self.folder, run),
            version=perfedrec.__version__,
        )
        mark = f'"{hashlib.sha256(content.encode()).hexdigest()}"'
        if request.headers.get("if-none-match") == mark:
            return Response(status_code=304, headers={"etag": mark})
        return HTMLResponse(content, headers={"etag": mark})

    def status(self, request: Request) -> Response:
        """The same as JSON, as ``perfedrec federation watch --json`` prints it."""
        return JSONResponse(status.look(self._run(request)))

    async def enter(self, request: Request) -> Response:
        """A form for the operator's token, which is exchanged for a cookie."""
        wrong = False
        if request.method == "POST":
            given = dict(parse_qsl((await request.body()).decode("utf-8", "replace"))).get("token", "").strip()
            if self.access.admits(Headers({"authorization": f"Bearer {given}"}), ""):
                cookie = set_cookie(request.scope, self.access.session())
                return RedirectResponse("/", status_code=303, headers={"set-cookie": cookie})
            wrong = True
        content = self.templates.get_template("enter.html.j2").render(wrong=wrong)
        # With the policy of other pages a browser would not say that the form is one of this server.
        return HTMLResponse(content, status_code=401 if wrong else 200, headers={"referrer-policy": "same-origin"})

    def unreadable(self, request: Request, error: Exception) -> Response:
        """There is no run yet, or none that can be read. The page looks again."""
        return self._nothing(request, 503, "There is no run to show", str(error))

    def missing(self, request: Request, error: Exception) -> Response:
        """There is nothing at this address."""
        code, detail = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, "")
        return self._nothing(request, code, "There is no such page", detail)

    def _nothing(self, request: Request, code: int, title: str, detail: str) -> Response:
        if "text/html" not in request.headers.get("accept", ""):
            return JSONResponse({"detail": detail}, status_code=code)
        content = self.templates.get_template("nothing.html.j2").render(title=title, detail=detail)
        return HTMLResponse(content, status_code=code)

    def _run(self, request: Request) -> Path:
        name = request.path_params.get("name")
        if name is None:
            return status.newest(self.folder)
        for each in status.runs_in(self.folder):
            if each.name == name:
                return each
        raise HTTPException(404, "there is no run of this name")


def charts(view: Mapping[str, Any]) -> dict[str, Markup]:
    """The charts of a run by their titles: accuracy, clients, seconds and bytes of each round."""
    history, accuracy = view["history"], view["accuracy"]
    if not history:
        return {}
    names = [each["name"] for each in history]
    found = {}
    valid = [(each["valid"] or {}).get(accuracy["metric"]) for each in history]
    if accuracy["best"] is not None:
        evaluated = Series(accuracy["metric"], valid)
        found[f"{accuracy['metric']} on held-out items"] = lines([evaluated], names, mark=valid.index(accuracy["best"]))
    answered = Series("in the sum", [each["clients"] for each in history])
    missing = Series("missing", [max(each["cohort"] - each["clients"], 0) for each in history], 2)
    found["Clients"] = bars([answered, missing], names)
    found["Seconds"] = bars([Series("seconds", [each["seconds"] for each in history], 3)], names, " s")
    up = Series("up, from nodes", [each["bytes_up"] for each in history])
    down = Series("down, to nodes", [each["bytes_down"] for each in history], 4)
    found["Bytes"] = bars([up, down], names, "B")
    return found


def moment(seconds: float) -> Markup:
    """A time of this machine, for people and for programs."""
    there = datetime.fromtimestamp(seconds).astimezone()
    return Markup(f'<time datetime="{there.isoformat(timespec="seconds")}">{there:%d %b %Y, %H:%M}</time>')
