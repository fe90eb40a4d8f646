"""The report of a run root: one HTML file without anything outside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import resources, spec
from results.cells import signed
from results.collect import Collection
from results.explain import code, line_words
from results.figures.every import drawings
from results.figures.gallery import galleries, small, wide
from results.figures.style import DARK, LIGHT, Drawing, data_uri, image
from results.lines import lay_out
from results.report.costs import by_stage, duration
from results.report.graph import HEIGHT, WIDTH, Node, graph
from results.runs import Run, flat, in_order
from results.tables import Table, build, left_over
from results.variants import short
from results.vocabulary import vocabulary

if TYPE_CHECKING:
    from markupsafe import Markup


@dataclass(frozen=True)
class Shown:
    """A figure as the page shows it; `dark` is for dark screens."""

    name: str
    title: str
    caption: str
    light: str
    dark: str


@dataclass(frozen=True)
class Pictures:
    """Pictures of a run: `images` by name, `colours` by class; `wide` ones need more of the page."""

    title: str
    caption: str
    colours: Mapping[str, str]
    images: Mapping[str, str]
    wide: bool


@dataclass(frozen=True)
class Headline:
    """A cell of ours, and the paper's where it prints one."""

    table: str
    line: str
    dataset: str
    column: str
    ours: str
    paper: str
    difference: str


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

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": duration, "short": short}
    template = environment.from_string(resources.read_text("report", "templates", "report.html.j2"))
    return template.render(context(collection, root, nodes, paper_says or {}))


def context(
    collection: Collection, root: Path, nodes: Sequence[Node], paper_says: Mapping[str, Sequence[str]]
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
        "states": _count(node.state for node in drawn),
        "graph": graph(drawn),
        "box": {"width": WIDTH, "height": HEIGHT},
        "costs": by_stage(runs, root),
        "headlines": [line for table in tables for line in headlines(table)],
        "filled": {table.name: filled(table) for table in tables},
        "tables": [lay_out(table) for table in tables],
        "left_over": left_over(collection, tables),
        "linked": lambda text: linked(text, collection.runs),
        "figures": [_shown(drawing) for drawing in drawings(collection, root)],
        "galleries": _galleries(runs, root),
        "paper_says": {run_id: lines for run_id, lines in sorted(paper_says.items()) if lines},
        "differs": _differs(collection),
        "code": code,
        "flat": flat,
        "versions": _versions(runs),
        "newest": max((run.finished for run in runs), default=""),
    }


def _node(run: Run) -> Node:
    return Node(run.run_id, run.stage, run.name, "done", duration(run.seconds), tuple(run.upstream.values()))


def _count(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def headlines(table: Table) -> list[Headline]:
    """Every cell of ours in a table, those with a printed counterpart first."""
    found = []
    for block in (table.printed, table.elsewhere):
        for entry in block.entries:
            for ours in entry.ours:
                for key, cell in ours.cells.items():
                    printed = entry.paper.get(key)
                    paper = "" if printed is None else f"{printed:.1f}"
                    difference = "" if printed is None else signed(cell.value - printed)
                    words = line_words(entry, ours).removesuffix(", ours")
                    data = vocabulary().dataset(cell.results[0].row.dataset)
                    column = block.columns[key]
                    found.append(Headline(table.name, words, data, column, cell.text(), paper, difference))
    return found


def filled(table: Table) -> tuple[int, int, int]:
    """Cells of the paper's Mugs lines that ours fills, how many there are, and cells without a counterpart."""
    lines = [entry for entry in table.printed.entries if entry.comparable]
    slots = sum(len(entry.paper) or len(entry.notes) for entry in lines)
    ours = sum(len(entry.ours[0].cells) for entry in lines if entry.ours)
    return ours, slots, sum(len(line.cells) for entry in table.elsewhere.entries for line in entry.ours)


def linked(text: str, runs: Mapping[str, Run]) -> Markup:
    """Text in which ids of known runs are links to them."""
    from markupsafe import Markup

    known = "|".join(sorted(map(re.escape, runs), key=len, reverse=True))
    parts = re.split(rf"\b({known})\b", text) if known else [text]
    return Markup("".join(f'<a href="#run-{p}">{p}</a>' if p in runs else escape(p) for p in parts))


def _shown(drawing: Drawing) -> Shown:
    light, dark = (data_uri(image(drawing, theme, "svg"), "svg") for theme in (LIGHT, DARK))
    return Shown(drawing.name, drawing.title, drawing.caption, light, dark)


def _galleries(runs: Sequence[Run], root: Path) -> list[Pictures]:
    shown = []
    for found in galleries(runs, root):
        images = {path.stem: data_uri(*small(path)) for path in found.paths}
        shown.append(Pictures(found.title, found.caption, found.colours, images, wide(found.paths[0])))
    return shown


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


def write(text: str, path: Path) -> Path:
    """The page as a file, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    return temporary.replace(path)
