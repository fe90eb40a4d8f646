"""The report of a run root: one HTML file without anything outside it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import resources, spec
from results.cells import fixed, signed
from results.collect import Collection
from results.explain import code
from results.figures.every import drawings
from results.figures.gallery import Gallery, galleries, small, wide
from results.figures.style import DARK, LIGHT, Drawing, Theme, data_uri, image
from results.lines import lay_out
from results.report.costs import by_stage, duration
from results.report.graph import HEIGHT, WIDTH, Node, graph
from results.runs import Run, flat, in_order
from results.tables import Table, build, left_over
from results.variants import short
from results.vocabulary import vocabulary

if TYPE_CHECKING:
    from markupsafe import Markup


def report(
    collection: Collection,
    root: Path,
    *,
    nodes: Sequence[Node] = (),
    paper_says: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """The page. `nodes` are the runs to draw, planned ones too (default: those that are done).

    `paper_says`: by id of a pretraining, where its settings differ from what the paper's text says.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"duration": duration, "short": short, "fixed": fixed, "signed": signed}
    template = environment.from_string(resources.read_text("report", "templates", "report.html.j2"))
    return template.render(context(collection, root, nodes, paper_says or {}))


def context(
    collection: Collection,
    root: Path,
    nodes: Sequence[Node],
    paper_says: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """What the template shows."""
    from markupsafe import Markup

    runs = in_order(list(collection.runs.values()))
    tables = [build(name, collection.results) for name in spec.names()]
    drawn = list(nodes) or [_node(run) for run in runs]
    return {
        "title": root.name or "run root",
        "style": Markup(resources.read_text("report", "templates", "report.css")),
        "collection": collection,
        "runs": runs,
        "states": Counter(node.state for node in drawn),
        "graph": graph(drawn),
        "box": {"width": WIDTH, "height": HEIGHT},
        "costs": by_stage(runs, root),
        "own_cells": [(table.name, own) for table in tables for own in table.own_cells()],
        "dataset": vocabulary().dataset,
        "filled": {table.name: filled(table) for table in tables},
        "tables": [lay_out(table) for table in tables],
        "left_over": left_over(collection, tables),
        "linked": lambda text: linked(text, collection.runs),
        "figures": [
            (figure, _source(figure, LIGHT), _source(figure, DARK))
            for figure in drawings(collection, root)
        ],
        "galleries": [
            (gallery, _pictures(gallery), wide(gallery.paths[0]))
            for gallery in galleries(runs, root)
        ],
        "paper_says": {run_id: lines for run_id, lines in sorted(paper_says.items()) if lines},
        "differs": _differs(collection),
        "code": code,
        "flat": flat,
        "versions": _versions(runs),
        "newest": max((run.finished for run in runs), default=""),
    }


def _node(run: Run) -> Node:
    return Node(
        run.run_id, run.stage, run.name, "done", duration(run.seconds), tuple(run.upstream.values())
    )


def filled(table: Table) -> tuple[int, int, int]:
    """Printed cells that ours fills, how many it could fill, and cells of ours without a printed counterpart."""
    lines = [entry for entry in table.printed.entries if entry.comparable]
    ours = sum(len(entry.slots & entry.ours[0].cells.keys()) for entry in lines if entry.ours)
    alone = sum(own.key not in own.entry.slots for own in table.own_cells())
    return ours, sum(len(entry.slots) for entry in lines), alone


def linked(text: str, runs: Mapping[str, Run]) -> Markup:
    """Text in which ids of known runs are links to them."""
    from markupsafe import Markup

    known = "|".join(sorted(map(re.escape, runs), key=len, reverse=True))
    parts = re.split(rf"\b({known})\b", text) if known else [text]
    return Markup("".join(f'<a href="#run-{p}">{p}</a>' if p in runs else escape(p) for p in parts))


def _source(drawing: Drawing, theme: Theme) -> str:
    return data_uri(image(drawing, theme, "svg"), "svg")


def _pictures(gallery: Gallery) -> list[tuple[str, str]]:
    """Names and sources of the pictures."""
    return [(path.stem, data_uri(*small(path))) for path in gallery.paths]


def _differs(collection: Collection) -> dict[str, list[str]]:
    """Runs with rows, by the settings in which they or what they need differ from the recipe."""
    found: dict[str, set[str]] = {}
    for result in collection.results:
        for line in result.differs:
            found.setdefault(line, set()).add(result.row.run_id)
    return {line: sorted(ids) for line, ids in sorted(found.items())}


def _versions(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Sets of versions, and the runs that had each."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        text = ", ".join(f"{name} {version}" for name, version in sorted(run.versions.items()))
        found.setdefault(text or "not recorded", []).append(run)
    return list(found.items())
