"""The report of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl

from perfedrec.audit.audit import read_audit
from perfedrec.audit.poisoning.record import Attacked, read_attacks
from perfedrec.core.counted import counted
from perfedrec.core.errors import CheckpointError
from perfedrec.evaluation.ranking import METRICS, cutoffs_of
from perfedrec.methods.registry import title
from perfedrec.privacy.report import audited, lines, without_result
from perfedrec.report import run_charts as charts
from perfedrec.report.federation import figures, nodes
from perfedrec.report.page import Block, Code, Page, Pairs, Prose, Section, Table, Tile, Tiles
from perfedrec.report.statistics import Mean, by_activity, mean_of
from perfedrec.report.style import axes_of, metric_name, plotted, spent
from perfedrec.runs.config import Config, defence_of, load
from perfedrec.runs.diagnostics import read_diagnostics
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.preset_files import presets
from perfedrec.runs.progress import size


class Run:
    """The content of a run folder. Raises :class:`CheckpointError` where the folder cannot be read."""

    def __init__(self, folder: Path) -> None:
        stored = RunFolder(folder)
        self.config, self.summary, self.history = stored.config(), stored.summary(), stored.history()
        try:
            self.notes, self.audit = read_diagnostics(folder) or {}, read_audit(folder)
            self.attacked = read_attacks(folder)
            self.users, self.map = (_table(folder / f"{name}.parquet") for name in ("test_users", "user_map"))
            self.environment: dict[str, Any] = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, pl.exceptions.PolarsError) as error:
            raise CheckpointError(f"{folder}: damaged run: {error}") from None
        self.settings_text = (folder / "config.toml").read_text(encoding="utf-8")
        self.n_phases, self.best = self.summary.n_phases, self.summary.best_round
        self.tested = self.users is not None and self.users.height > 0
        self.means: dict[str, Mean] = {}
        if self.users is not None and self.tested:
            self.means = {name: mean_of(self.users[name].to_numpy()) for name in self.metrics}

    @property
    def name(self) -> str:
        """The name of the method as papers write it."""
        return title(self.config.algorithm)

    @property
    def metrics(self) -> list[str]:
        """The test metrics of single users."""
        return [f"{name}@{k}" for k in cutoffs_of(self.summary.test) for name in METRICS]

    @property
    def data(self) -> str:
        """The name of the data set."""
        if self.summary.nodes_with_model is not None:
            return "the data of its nodes"
        name: str = self.notes.get("data", {}).get("name") or Path(self.config.data.path).name
        return name

    @property
    def clients(self) -> int:
        """The number of users, each of them a client."""
        sent = self.summary.communication
        found = self.notes.get("data", {}).get("users")
        return int(found or self.summary.users or round(sent["uploads"] / max(sent["uploads_per_client"], 1e-9)) or 1)


def run_page(folder: Path) -> Page:
    """The report of a finished run. Raises :class:`CheckpointError` where the folder holds no finished run."""
    run = Run(folder)
    learning = Section("learning", "Learning", _learning(run))
    if run.summary.nodes_with_model is None:
        found = [
            learning,
            Section("test", "Test results", _test(run)),
            Section("users", "Users", _users(run)),
            Section("vectors", "Vectors", _vectors(run)),
        ]
    else:
        found = [Section("nodes", "Nodes", nodes(RunFolder(folder)))]
        if run.summary.valid:
            found = [learning, Section("test", "Test results", figures(run.summary)), *found]
    sections = [
        Section("summary", "Summary", _summary(run)),
        *found,
        Section("communication", "Communication", _communication(run)),
        Section("privacy", "Privacy", _privacy(run)),
        *(
            []
            if run.attacked is None
            else [Section("attacks", "Malicious clients", _attacks(run.attacked, defence_of(run.config)))]
        ),
        Section("set-up", "Set-up", _set_up(run)),
    ]
    return Page("perfedrec report of a run", f"{run.name} on {run.data}", _lead(run), sections)


def _lead(run: Run) -> str:
    if run.summary.nodes_with_model is not None:
        users = counted(run.clients, "user")
        told = f"{run.name} was trained by a federation of {users}, whose data stayed on their nodes"
        metric = next(iter(plotted(list(run.summary.test))), None)
        if metric is None:
            return f"{told}. There are no figures of accuracy here."
        tested = f"{counted(round(run.summary.test['users']), 'user who holds', 'users who hold')} out items"
        return (
            f"{told}. It reaches {metric_name(metric)} {run.summary.test[metric]:.4f} on the {tested}. Each of these "
            "items was ranked among all that are not in the training or validation data of its user."
        )
    if not run.tested:
        return f"{run.name} was trained on {run.data}, which has no test interactions."
    metric, popular = plotted(run.metrics)[0], run.summary.popularity
    mean, floor = run.means[metric], popular[metric]
    beside = f", {mean.value / floor:.2g} times as much as ranking by popularity ({floor:.4f})" if floor else ""
    return (
        f"{run.name} reaches {metric_name(metric)} {mean.value:.4f} on the {counted(mean.n, 'test user')} of "
        f"{run.data}{beside}. Each held-out item was ranked among all items that are not in the training or validation "
        "data of its user."
    )


def _summary(run: Run) -> list[Block]:
    tiles = []
    if run.summary.nodes_with_model is not None:
        for metric in plotted(list(run.summary.test))[:2]:
            users = f"mean over {counted(round(run.summary.test['users']), 'user')} of the nodes"
            tiles.append(Tile(f"{metric_name(metric)}, test", f"{run.summary.test[metric]:.4f}", users))
    for metric in plotted(run.metrics)[:2] if run.tested else ():
        mean = run.means[metric]
        note = f"95 % interval {mean.interval()}; popularity {run.summary.popularity[metric]:.4f}"
        tiles.append(Tile(f"{metric_name(metric)}, test", f"{mean.value:.4f}", note))
    by = f"chosen by validation {metric_name(run.config.run.select_by)}{run.summary.of_sample()}"
    chosen = by if run.summary.valid else "the last one"
    rounds = f"{counted(max(len(run.history) - run.n_phases, 0), 'round')} of training"
    after = f" (after {counted(run.n_phases, 'phase')})" if run.n_phases else ""
    if run.best > 0 or not run.n_phases:
        best, where = str(run.best), f"of {rounds}{after}"
    else:
        best, where = f"phase {run.best + run.n_phases}", f"of {run.n_phases}, before {rounds}"
    name = "Best round" if run.summary.valid else "Round of the model"
    tiles.append(Tile(name, best, f"{where}; {chosen}"))
    sent = run.summary.communication
    if sent["bytes_up"]:
        up, down = sent["bytes_up"] / run.clients, sent["bytes_down"] / run.clients
        note = f"{size(up)} sent and {size(down)} received by a client in total"
        tiles.append(Tile("Uploads per client", f"{sent['uploads_per_client']:.1f}", note))
    blocks: list[Block] = [Tiles(tiles)]
    sizes = run.notes.get("data")
    if sizes:
        blocks.append(
            Prose(
                f"Data: {run.data}, {counted(sizes['users'], 'user')}, {counted(sizes['items'], 'item')}; "
                f"{sizes['train']:,} "
                f"interactions for training, {sizes['valid']:,} for validation and {sizes['test']:,} for testing. "
                f"Seed {run.config.run.seed}. Privacy: {run.summary.privacy['claim']}."
            )
        )
    if run.summary.data:
        blocks.append(Prose("; ".join(run.summary.data) + "."))
    return blocks


def _learning(run: Run) -> list[Block]:
    axes = axes_of(spent(run.history, run.n_phases, run.clients))
    found = [charts.learning_curve(run.history, axes, run.best, run.n_phases)]
    found.append(charts.loss_curve(run.history, axes))
    drawn: list[Block] = [chart for chart in found if chart is not None]
    return drawn or [Prose("No round was evaluated: there are no validation interactions.")]


def _test(run: Run) -> list[Block]:
    if not run.tested:
        return [Prose("There are no test interactions.")]
    popular, rows = run.summary.popularity, []
    for metric in run.metrics:
        mean, floor = run.means[metric], popular[metric]
        ratio = f"{mean.value / floor:.2f}" if floor else "none"
        rows.append([metric_name(metric), f"{mean.value:.4f}", mean.interval(), f"{floor:.4f}", ratio])
    for name in (f"coverage@{k}" for k in cutoffs_of(run.metrics)):
        value, floor = run.summary.test[name], popular[name]
        rows.append([metric_name(name), f"{value:.4f}", "none", f"{floor:.4f}", f"{value / floor:.2f}"])
    blocks: list[Block] = [
        Table(
            "Test metrics of the best round; full ranking of all items unseen in training",
            ("metric", "this run", "95 % interval", "popularity", "times popularity"),
            rows,
            note=f"Means over {counted(run.means[run.metrics[0]].n, 'test user')}, with t intervals over users. The "
            "intervals "
            "say how much the figures would change with other users of this kind, not with another seed. Coverage is "
            "the share of all items that are in the list of at least one user.",
        )
    ]
    sampled = run.summary.test_sampled
    if sampled:
        shown = [[metric_name(name), f"{sampled[name]:.4f}"] for name in run.metrics if name in sampled]
        title = f"Test metrics among {run.summary.protocols['test_sampled']}, for comparison with papers that use them"
        blocks.append(Table(title, ("metric", "this run"), shown))
    return blocks


def _users(run: Run) -> list[Block]:
    if run.users is None or not run.tested:
        return [Prose("There are no test users to compare.")]
    return [
        charts.activity_chart(
            by_activity(run.users, run.metrics), {name: each.value for name, each in run.means.items()}
        )
    ]


def _vectors(run: Run) -> list[Block]:
    blocks: list[Block] = []
    if run.map is not None and run.notes.get("map"):
        vectors = run.summary.privacy.get("user_vectors", "a centralised method has them in one place")
        blocks.append(charts.cluster_map(run.map, run.notes["map"]["explained"]))
        blocks.append(
            Prose(
                f"This map shows single users: {run.map.height:,} of {run.clients:,}, without their ids. It comes from "
                f"a simulation, which has the vectors of all users ({_profile(run.config)}; user vectors: {vectors}). "
                "The coordinator of a real federation could not draw it. If the users are real people, this file is "
                "personal data.",
                aside=True,
            )
        )
    if run.notes.get("geometry"):
        blocks.append(charts.geometry_chart(run.notes["geometry"]))
        blocks.append(
            Prose(
                "Computed from the vectors whose products are the scores, for at most 2,048 sampled users and items. "
                "This is possible only in a simulation, which has the vectors of all users in one place.",
                aside=True,
            )
        )
    if not blocks:
        reason = "has no user and item vectors whose products are its scores" if run.notes else "recorded no vectors"
        blocks.append(Prose(f"{run.name} {reason}. There is no map and no alignment."))
    return blocks


def _profile(config: Config) -> str:
    """The privacy profile of a run, found by its settings."""
    privacy = getattr(config, "privacy", None)
    if privacy is None:
        return "a centralised method"
    for name in presets("profiles"):
        if load(privacy=name, algorithm="perfedrec_pp").privacy == privacy:  # type: ignore[attr-defined]
            return f"privacy profile {name}"
    return "privacy settings of its own"


def _communication(run: Run) -> list[Block]:
    chart = charts.communication_chart(run.history, run.clients)
    if chart is None:
        return [Prose("Nothing was sent: a centralised method has the interactions of all users in one place.")]
    sent = run.summary.communication
    tiles = [
        Tile("Uploads", f"{sent['uploads']:,}", f"{sent['uploads_per_client']:.1f} per client"),
        Tile("Sent by clients", size(sent["bytes_up"]), f"{size(sent['bytes_up_per_upload'])} per upload"),
        Tile("Received by clients", size(sent["bytes_down"]), f"{size(sent['bytes_down_per_upload'])} per upload"),
    ]
    return [Tiles(tiles), chart]


def _privacy(run: Run) -> list[Block]:
    block = dict(run.summary.privacy)
    if run.audit is not None:
        block["audit"] = audited(run.audit)
    blocks: list[Block] = [Pairs(lines(block))]
    if block["releases"]:
        rows = [
            [
                each["release"],
                each["sampling"],
                f"{each['noise']} {each['noise_multiplier']:.3g}" if each["noise"] != "none" else each["reason"],
                str(each["times"]),
                str(each["participations"]),
            ]
            for each in block["releases"]
        ]
        header = (
            "release",
            "sampling",
            "noise (as a multiple of a user's bound), or why there is no guarantee",
            "times",
            "participations of a user",
        )
        blocks.append(Table("What was released, and how often", header, rows, text=3))
    if run.audit is not None:
        blocks += _audit(run.audit)
    return blocks


def _audit(found: dict[str, Any]) -> list[Block]:
    quiet = without_result(found["findings"])
    rows = [
        [
            each["attack"],
            each["metric"],
            "all" if each["round"] is None else str(max(each["round"], 0) or "before training"),
            f"{each['value']:.3f}",
            f"{each['guessing']:.3f}",
            "none" if each["popularity"] is None else f"{each['popularity']:.3f}",
            f"{each['cases']:,}",
        ]
        for each in found["findings"]
        if each["attack"] not in quiet
    ]
    header = ("attack", "figure", "round", "reached", "guessing", "popularity", "cases")
    said = [f"Exposed and named nobody in the sums that were opened: {', '.join(quiet)}."] if quiet else []
    notes = " ".join([*said, f"Not attacked: {'; '.join(found['notes'])}." if found["notes"] else ""]).strip()
    blocks: list[Block] = [Table("Attacks on this run's own uploads", header, rows, 3, notes)]
    if found["bounds"]:
        shown = [
            [
                each["what"],
                "above the claim" if each["failed"] else "within",
                f"{each['claim']:.2f}",
                f"{each['lower']:.2f}",
                "none" if each["lower_gaussian"] is None else f"{each['lower_gaussian']:.2f}",
                f"{each['trials']:,}",
            ]
            for each in found["bounds"]
        ]
        columns = ("canaries on", "verdict", "epsilon claimed", "shown, any noise", "shown, normal noise", "trials")
        blocks.append(Table("Lower bounds on epsilon by canaries", columns, shown, 2))
    return blocks


def _attacks(found: Attacked, defence: str) -> list[Block]:
    k, several = found.before.k, "" if len(found.targets) == 1 else "s"
    long = f"{found.scenario.get('length', 1.0):g} times as long as honest work"
    bound = f"keep the bound on what a client may send; where there is none, what they send is {long}"
    if found.scenario.get("bound") == "ignored":
        bound = "ignore the bound on what a client may send"
    note = (
        f"ER@{k}: the share of the honest users without the target in whose {k} best items it stands; in random lists "
        f"{found.chance:.4f}. Target{several}: {found.named_targets}. Malicious clients {bound}. Simulated, "
        f"{counted(found.rounds, 'round')}, seed {found.seed}. Defence: {defence or 'none'}."
    )
    blocks: list[Block] = [Table("What malicious clients reach", found.header(), found.rows(), 1, note)]
    worst = found.strongest
    if worst is not None:
        caption = f"Groups of users, with {worst.share:.3g} malicious clients and the attack {worst.named}"
        blocks.append(Table(caption, found.group_header(), found.group_rows(), 1))
    return blocks


def _set_up(run: Run) -> list[Block]:
    found = run.environment
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    pairs = [
        ("packages", packages),
        ("Python", found["python"]),
        ("platform", found["platform"]),
        ("processors, threads", f"{found['cpus']}, {found['threads']}"),
        ("GPU", found["cuda"] or "none"),
        (
            "time",
            f"{sum(entry.seconds for entry in run.history):.1f} s of computing in {counted(len(run.history), 'round')}",
        ),
    ]
    return [Pairs(pairs), Code("All options, as config.toml", run.settings_text)]


def _table(path: Path) -> pl.DataFrame | None:
    return pl.read_parquet(path) if path.exists() else None
