"""The command `report`: write the HTML page of a run root."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.files import write_atomic
from results.report.graph import Node
from results.report.page import render_report
from stages.commands.finished_results import collect_finished, find_paper_differences
from stages.commands.reproduction import Selection


def write_report(
    selection: Selection, nodes: Sequence[Node], out: Path | None
) -> tuple[Path, tuple[str, ...]]:
    """Write the page and return its path and a line for each refused result row.

    `nodes` are the runs to draw. The default for `out` is report.html in the run root.
    """
    collection = collect_finished(selection.root, selection.runs)
    differences = find_paper_differences(collection)
    text = render_report(collection, selection.root, nodes=nodes, paper_says=differences)
    return write_atomic(out or selection.root / "report.html", text), collection.problems
