"""The report of a run root: one HTML file that needs no other file."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import resources, spec
from results.cells import format_difference, format_value
from results.collect import CollectedResults
from results.energy import format_energy
from results.environments import describe_environment, list_environment_differences
from results.explain import describe_code, describe_energy
from results.figures.all_figures import draw_all_figures
from results.figures.gallery import collect_galleries, is_wide, shrink_picture
from results.figures.style import DARK, LIGHT, data_uri, render_image
from results.formatted import format_table
from results.report.costs import format_run_time, sum_costs_by_stage, sum_unfinished
from results.report.graph import HEIGHT, WIDTH, Node, lay_out_graph
from results.runs import FinishedRun, flatten_config, group_by, sort_by_dependency
from results.tables import Table, build_tables, describe_unplaced
from results.variants import format_setting
from results.verdict import DEFAULT_MARGIN
from results.vocabulary import load_vocabulary

if TYPE_CHECKING:
    from markupsafe import Markup


def render_report(
    collection: CollectedResults,
    root: Path,
    *,
    nodes: Sequence[Node] = (),
    forecasts: Sequence[str] = (),
    paper_says: Mapping[str, Sequence[str]] | None = None,
    margin: float = DEFAULT_MARGIN,
    co2: float | None = None,
    title: str = "",
) -> str:
    """Return the page.

    `nodes` are the runs to draw, also planned ones (default: the finished runs). `forecasts` are
    lines about the k-NN curves of runs that are not done. `paper_says` has, by the id of a
    pretraining, its settings that differ from what the paper's text says. `margin` is that of the
    verdicts, `co2` the grams of CO2 for each kWh, and `title` by default the name of the run root's
    folder.
    """
    from jinja2 import Environment, StrictUndefined

    # StrictUndefined: a misspelt name in the template is an error, not an empty place on the page.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "duration": format_run_time,
        "short": format_setting,
        "fixed": format_value,
        "signed": format_difference,
    }
    template = resources.read_resource("report", "templates", "report.html.j2")
    context = build_context(collection, root, nodes, paper_says or {}, margin, co2)
    if title:
        context["title"] = title
    return environment.from_string(template).render({**context, "forecasts": forecasts})


def build_context(
    collection: CollectedResults,
    root: Path,
    nodes: Sequence[Node],
    paper_says: Mapping[str, Sequence[str]],
    margin: float = DEFAULT_MARGIN,
    co2: float | None = None,
) -> dict[str, Any]:
    """Return the variables of the template."""
    from markupsafe import Markup

    runs = sort_by_dependency(list(collection.runs.values()))
    tables = build_tables(collection.results, spec.table_names())
    # The command gives every run of a reproduction; without one, only finished runs are known.
    drawn = list(nodes) or [
        Node(
            run.run_id,
            run.stage,
            run.name,
            detail=format_run_time(run.seconds),
            needs=tuple(run.upstream.values()),
        )
        for run in runs
    ]
    script = resources.read_resource("report", "templates", "report.js")
    return {
        "title": root.name or "run root",
        # Our own file, which autoescape would turn into text.
        "script": Markup(script),
        # The page runs this script and no other.
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "style": Markup(resources.read_resource("report", "templates", "report.css")),
        "collection": collection,
        "runs": runs,
        "states": Counter(node.state for node in drawn),
        "graph": lay_out_graph(drawn),
        "box": {"width": WIDTH, "height": HEIGHT},
        "costs": sum_costs_by_stage(runs, root),
        "unfinished": sum_unfinished(drawn),
        "our_cells": [(table.name, own) for table in tables for own in table.our_cells()],
        "dataset": load_vocabulary().dataset_title,
        "filled": {table.name: count_filled_cells(table) for table in tables},
        "tables": [format_table(table, margin) for table in tables],
        "left_over": describe_unplaced(collection, tables),
        # Escapes the text itself, since its result is HTML.
        "linked": lambda text: link_run_ids(text, collection.runs),
        # Each figure in both themes: the page follows the theme of the browser.
        "figures": draw_all_figures(collection, root),
        "themes": {"light": LIGHT, "dark": DARK},
        "figure_source": lambda figure, theme: data_uri(render_image(figure, theme, "svg"), "svg"),
        "galleries": collect_galleries(runs, root),
        "picture_source": lambda path: data_uri(*shrink_picture(path)),
        "is_wide": is_wide,
        # Sorted: dicts and sets come in the order in which runs were read.
        "paper_says": {run_id: lines for run_id, lines in sorted(paper_says.items()) if lines},
        "differs": _differs(collection),
        "code": describe_code,
        "energy": partial(describe_energy, co2=co2),
        "kwh": partial(format_energy, co2=co2),
        "flat": flatten_config,
        "versions": _versions(runs),
        "environments": list_environment_differences(runs),
        "environment": describe_environment,
        # Not the time of writing: the same results give the same bytes.
        "newest": max((run.finished for run in runs), default=""),
    }


def count_filled_cells(table: Table) -> tuple[int, int, int]:
    """Return the printed cells that we fill, those we could fill, and our further cells."""
    entries = [entry for entry in table.printed.entries if entry.comparable]
    # Several rows of ours may fill the same printed cell, so only the first row counts.
    filled = sum(len(entry.slots & entry.ours[0].cells.keys()) for entry in entries if entry.ours)
    alone = sum(ours.key not in ours.entry.slots for ours in table.our_cells())
    return filled, sum(len(entry.slots) for entry in entries), alone


def link_run_ids(text: str, runs: Mapping[str, FinishedRun]) -> Markup:
    """Return HTML in which the ids of known runs are links to them."""
    from markupsafe import Markup

    # An id before its own beginnings: a regular expression takes the first alternative that fits.
    known = "|".join(sorted(map(re.escape, runs), reverse=True))
    parts = re.split(rf"\b({known})\b", text) if known else [text]
    return Markup("".join(f'<a href="#run-{p}">{p}</a>' if p in runs else escape(p) for p in parts))


def _differs(collection: CollectedResults) -> dict[str, list[str]]:
    """Return, for each setting that differs from the recipe, the runs whose results it concerns."""
    found: dict[str, set[str]] = {}
    for result in collection.results:
        for line in result.differs:
            found.setdefault(line, set()).add(result.row.run_id)
    return {line: sorted(ids) for line, ids in sorted(found.items())}


def _versions(runs: Sequence[FinishedRun]) -> list[tuple[str, list[FinishedRun]]]:
    """Return each set of package versions with the runs that had it."""

    def describe(run: FinishedRun) -> str:
        versions = [f"{name} {version}" for name, version in sorted(run.versions.items())]
        return ", ".join(versions) or "not recorded"

    return list(group_by(runs, describe).items())
